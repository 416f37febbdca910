"""How far `fast` mode on this processor is from FP32 arithmetic, next to how far the official quantisers are.

    python benchmarks/accuracy.py                                     # nano: held-out nats per token, layer by layer
    python benchmarks/accuracy.py --golden GOLDEN/flash_a             # single sites on recorded official inputs
    HADAL_CPU=avx512 python benchmarks/accuracy.py                    # int8 activations for FP4 weights

`fast` is what `load_model(dtype="auto")` runs. "official" is FP32 with every official quantiser on: FP8 inputs, FP8
keys, FP4 indexer. For a single site the official error is that of the recorded BF16 output of the official code.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from hadal import load_model
from hadal.kernels.cpu import chosen_kernels
from hadal.model import Model
from hadal.model.spans import Batch
from hadal.text import Tokenizer
from hadal.train.corpus import is_held_out, read_corpus
from hadal.train.pretrain import render_ids

HELD_OUT = 0.02
TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--corpus", type=Path, default=Path("corpus"))
    parser.add_argument("--documents", type=int, default=12, help="held-out documents of each source")
    parser.add_argument("--golden", type=Path, help="a golden set with debug_d_ref.safetensors: judge single sites")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"kernels": chosen_kernels()}))
    if arguments.golden:
        for row in site_errors(arguments.golden):
            print(json.dumps(row))
        return
    texts = held_out_ids(arguments.model, arguments.corpus, arguments.documents)
    print(json.dumps({"held-out nats per token": losses(arguments.model, texts)}))
    print(json.dumps({"relative error of the mean stream after each layer": layer_errors(arguments.model, texts)}))


def held_out_ids(model: str, corpus: Path, count: int) -> dict[str, list[Tensor]]:
    """Token ids of held-out documents, cut to `TOKENS`."""
    from hadal.checkpoint import locate_model

    tokenizer = Tokenizer.from_directory(locate_model(model))
    chosen: dict[str, list[Tensor]] = {}
    for source, documents in read_corpus(corpus).items():
        kept = [d for d in documents if is_held_out(d, HELD_OUT)][:count]
        ids = [render_ids(d, tokenizer) if d.messages else tokenizer.encode(d.text) for d in kept]
        chosen[source] = [torch.tensor(i[:TOKENS]) for i in ids if len(i) > 8]
    return chosen


def forms(name: str) -> dict[str, Model]:
    """The same model in each kind of arithmetic."""
    return {
        "fp32": load_model(name, dtype="float32", fake_quant=False, weights="dense"),
        "official": load_model(name, dtype="float32", fake_quant=True, weights="dense"),
        "faithful": load_model(name, dtype="bfloat16", fake_quant=True),
        "fast": load_model(name),
    }


def losses(name: str, texts: dict[str, list[Tensor]]) -> dict[str, dict[str, float]]:
    """Mean next-token loss per source and kind of arithmetic."""
    found: dict[str, dict[str, float]] = {}
    for form, model in forms(name).items():
        found[form] = {}
        for source, documents in texts.items():
            total = sum(float(F.cross_entropy(model.logits(ids)[:-1], ids[1:], reduction="sum")) for ids in documents)
            found[form][source] = round(total / sum(len(ids) - 1 for ids in documents), 4)
    return found


def layer_errors(name: str, texts: dict[str, list[Tensor]]) -> dict[str, list[float]]:
    """Relative RMS difference from FP32 of the streams' mean after each layer, over all documents."""
    models = forms(name)
    sums: dict[str, Tensor] = {}
    for ids in (ids for documents in texts.values() for ids in documents):
        exact = _means(models["fp32"], ids)
        for form in ("official", "faithful", "fast"):
            gap = (_means(models[form], ids) - exact).square().sum((0, 2))
            sums[form] = sums.get(form, 0) + torch.stack((gap, exact.square().sum((0, 2))))
    return {form: [round(v, 5) for v in (s[0] / s[1]).sqrt().tolist()] for form, s in sums.items()}


def _means(model: Model, ids: Tensor) -> Tensor:
    """Mean of the streams after each layer, [T, layers, d] in FP32."""
    layers = range(len(model.config.layers))
    state = model.new_state()
    if (runner := model.runner) is not None:
        runner_state: Any = state
        parts = []
        for pieces in runner._steps([len(ids)], [runner_state], [0], [0]):
            rows, _ = runner._begin(pieces, ids.tolist())
            # A layer's output joins the streams in the first job of the next one.
            stops = [runner._jobs.sites[i, "attention"][0] for i in layers[1:]] + [runner._jobs.main.streams]
            means = []
            for begin, end in pairwise([0, *stops]):
                runner._run(begin, end)
                means.append(runner._streams(rows).mean(1))
            parts.append(torch.stack(means, 1))
        return torch.cat(parts)
    batch = Batch.from_states([len(ids)], [state], model.device)
    x, found = model._embed(ids), []
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            x, _ = block(x, ids, batch, [state.layers[i]])
            found.append(x.float().mean(1))
    return torch.stack(found, 1)


def site_errors(golden: Path) -> list[dict[str, Any]]:
    """Attention and experts of single layers on recorded inputs: error against FP32 of `fast` and of the official."""
    stored = load_file(golden / "debug_d_ref.safetensors")
    models = forms(str(golden / "checkpoint"))
    fast = models["fast"].runner
    assert fast is not None, "these kernels do not run this model"
    rows = []
    for i in range(len(models["fp32"].config.layers)):
        for site, given in (("attention", f"layers.{i}.attn_in"), ("experts", f"layers.{i}.ffn_in")):
            if given not in stored:
                continue
            x = stored[given]
            ids = stored["tokens"][: len(x)]
            exact = _site(models["fp32"], i, site, x.float(), ids)
            outcome = {
                "fast": fast.site(i, site, x, ids),
                "official quantisers, FP32": _site(models["official"], i, site, x.float(), ids),
                "official code, BF16": stored[f"layers.{i}.{'attn' if site == 'attention' else 'ffn'}_out"].float(),
            }
            errors = {k: round(float((v - exact).norm() / exact.norm()), 5) for k, v in outcome.items()}
            rows.append({"layer": i, "site": site, **errors})
    return rows


@torch.no_grad()
def _site(model: Model, i: int, site: str, x: Tensor, ids: Tensor) -> Tensor:
    block = model.blocks[i]
    if site == "experts":
        return block.ffn(x, ids)[0].float()
    state = model.new_state()
    return block.attn(x, Batch.from_states([len(x)], [state], x.device), [state.layers[i]]).float()


if __name__ == "__main__":
    main()
