"""Training: corpus to documents to packed batches, Muon and AdamW, losses, the loop, and the pre-training stage.

Sits above model, checkpoint and text. `hadal.train.pretrain.run` is the whole stage; the other modules are its parts.
"""
