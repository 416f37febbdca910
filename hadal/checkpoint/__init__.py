"""Official checkpoints: names and layouts, mapped loading, byte-equal saving, conversion, inspection.

The only room that knows tensor names; above `quant` and `model`.
"""

from hadal.checkpoint.convert import convert
from hadal.checkpoint.inspect import Inspection, inspect
from hadal.checkpoint.load import load_model, locate_model, source_of
from hadal.checkpoint.names import TensorSpec, shard_plan, tensor_table
from hadal.checkpoint.safetensors import CheckpointError
from hadal.checkpoint.save import save_model
from hadal.checkpoint.source import Checkpoint, open_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Inspection",
    "TensorSpec",
    "convert",
    "inspect",
    "load_model",
    "locate_model",
    "open_checkpoint",
    "save_model",
    "shard_plan",
    "source_of",
    "tensor_table",
]
