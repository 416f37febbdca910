"""Train Hadal nano from the starter corpus: python recipes/nano.py --corpus corpus --out runs/nano --minutes 55

Reads from top to bottom. About an hour on two CPU cores; the same command runs on an accelerator, where a larger
--scale and more --packs are worth having. The result is a model folder: `hadal chat runs/nano`.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from hadal.train.loop import LoopConfig
from hadal.train.pretrain import PretrainConfig, run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--corpus", type=Path, default=Path("corpus"), help="folder of text files, .jsonl or .xz")
    parser.add_argument("--out", type=Path, required=True, help="model folder; working files go to OUT.run")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="wall clock of the training loop; 55 if --steps is left out")
    length.add_argument("--steps", type=int, help="number of steps instead; repeats to the bit on one thread")
    parser.add_argument("--scale", type=int, help="1 is nano; 2, 3 ... are wider and deeper")
    parser.add_argument("--lr", type=float, help="peak learning rate, for Muon and AdamW alike")
    parser.add_argument("--packs", type=int, dest="packs_per_micro_batch", help="packs of 1024 tokens in a micro-batch")
    parser.add_argument("--micro-batches", type=int, help="micro-batches in a step; they share the cores of a CPU")
    parser.add_argument("--device", help="`auto`, `cpu` or an accelerator's name")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--resume", action="store_true", help="continue the run in OUT.run")
    given = vars(parser.parse_args())

    # How long, how fast, how much at a time. Dense attention first, then a short warm-up of the indexers, then sparse.
    loop = LoopConfig(**{f.name: given.pop(f.name) for f in fields(LoopConfig) if f.name in given})

    # Stories, books and chats for the first half; the second half is mostly conversations in the V4 chat format.
    config = PretrainConfig(loop=loop, **given)
    report = run(config)
    minutes = report.training_seconds / 60
    print(f"{report.steps} steps, {report.tokens:,} tokens in {minutes:.1f} minutes -> {config.out}")


if __name__ == "__main__":
    main()
