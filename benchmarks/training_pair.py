"""Hadal and transformers in turn on the same random model: forward and backward tokens per CPU-second, one thread.

    python benchmarks/training_pair.py --rounds 3

The model is `small` of transformers_pair.py, one document of 1,024 tokens, next-token loss, gradients of all weights.
Hadal keeps float32 weights: `float32` is float32 throughout, `bfloat16 products` runs the large products in bfloat16,
`bfloat16` carries activations in it too; transformers' weights are of the named type. It gives its indexers no
gradient, so the ratio, best against best, is taken without Hadal's indexer objective; `hadal with indexers` has it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from transformers_pair import DTYPES, SMALL, build_peer, rate

from hadal.model import Numerics
from hadal.train.memory import keep_freed_memory

SYSTEMS = ("hadal", "transformers")
MODES = {
    "float32": Numerics(),
    "bfloat16 products": Numerics(matmul=torch.bfloat16),
    "bfloat16": Numerics(dtype=torch.bfloat16, matmul=torch.bfloat16),
}
Step = Callable[[torch.Tensor], float]  # one forward and backward pass; returns the loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--backend", default="auto", help="Hadal's kernel table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # for both sides
    ids = torch.randint(3, SMALL["vocab_size"], (arguments.tokens,), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        build_peer().save_pretrained(folder)
        sides: dict[tuple[str, str], Step] = {}
        for mode, numerics in MODES.items():
            sides["hadal", mode] = make_hadal(numerics, folder, arguments.backend, indexer_loss=False)
            if mode in DTYPES:
                sides["transformers", mode] = make_transformers(mode, folder)
        sides["hadal with indexers", mode] = make_hadal(numerics, folder, arguments.backend, indexer_loss=True)
        rows: dict[tuple[str, str], list[float]] = {}
        losses: dict[tuple[str, str], float] = {}
        for _ in range(arguments.rounds):
            for key, step in sides.items():
                rows.setdefault(key, []).append(
                    rate(len(ids), lambda key=key, step=step: losses.update({key: step(ids)}))
                )
    for (name, dtype), values in rows.items():
        cell = {"system": name, "dtype": dtype, "tokens_per_cpu_second": round(statistics.median(values), 1)}
        print(json.dumps(cell | {"rounds": [round(v, 1) for v in values], "loss": round(losses[name, dtype], 4)}))
    best = {name: max(statistics.median(v) for (n, _), v in rows.items() if n == name) for name in SYSTEMS}
    print(json.dumps({"hadal_over_transformers": round(best["hadal"] / best["transformers"], 2)}))


def make_hadal(numerics: Numerics, folder: str, backend: str, *, indexer_loss: bool) -> Step:
    """Hadal's step with float32 weights."""
    from hadal import load_model
    from hadal.model import Model
    from hadal.train.losses import head_loss_sum, shifted_targets

    loaded = load_model(folder, device="cpu", dtype="float32", fake_quant=False)
    model = Model(loaded.config, numerics, backend)
    model.load_state_dict(loaded.state_dict())

    def step(ids: torch.Tensor) -> float:
        model.zero_grad(set_to_none=True)
        out = model.training_forward(ids, [0, len(ids)], indexer_loss=indexer_loss)
        targets = shifted_targets(ids, torch.ones_like(ids, dtype=torch.bool), [0, len(ids)], 1)
        loss = head_loss_sum(out.hidden_TD, out.head_VD, targets, product=numerics.matmul) / (len(ids) - 1)
        (loss if out.indexer_kl is None else loss + out.indexer_kl).backward()
        return float(loss.detach())

    return step


def make_transformers(dtype: str, folder: str) -> Step:
    """The peer's step, its weights in the named type."""
    from transformers import DeepseekV4ForCausalLM

    model: Any = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).train()

    def step(ids: torch.Tensor) -> float:
        model.zero_grad(set_to_none=True)
        loss = model(ids[None], labels=ids[None], use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    return step


if __name__ == "__main__":
    main()
