"""Train Hadal nano from the starter corpus: python recipes/nano.py --corpus corpus --out runs/nano --minutes 55

Reads from top to bottom. About an hour on two CPU cores; the same command runs on an accelerator, where a larger
--scale and more --packs are worth having. The result is a model folder: `hadal chat --model runs/nano`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from hadal.device import resolve
from hadal.train.loop import LoopConfig
from hadal.train.pretrain import PretrainConfig, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("corpus"), help="folder of .xz text files")
    parser.add_argument("--out", type=Path, required=True, help="model folder; working files go to OUT.run")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="wall clock of the training loop (default 55)")
    length.add_argument(
        "--steps", type=int, help="number of steps instead of minutes; repeats to the bit on one thread"
    )
    parser.add_argument("--scale", type=int, default=1, help="1 is nano; 2, 3 ... are wider and deeper")
    parser.add_argument("--lr", type=float, default=6e-3, help="peak learning rate, for Muon and AdamW alike")
    parser.add_argument("--packs", type=int, default=1, help="packs of 1024 tokens in a micro-batch")
    parser.add_argument(
        "--micro-batches", type=int, default=2, help="micro-batches in a step; they share the cores of a CPU"
    )
    parser.add_argument("--device", default="auto", help="`auto`, `cpu` or an accelerator's name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue the run in OUT.run")
    arguments = parser.parse_args()

    # On a CPU the micro-batches of a step run side by side, one thread each.
    on_cpu = resolve(arguments.device).type == "cpu"
    workers = min(arguments.micro_batches, os.cpu_count() or 1) if on_cpu else 1
    if workers > 1:
        torch.set_num_threads(1)

    # How long, how fast, how much at a time. Dense attention first, then a short warm-up of the indexers, then sparse.
    minutes = None if arguments.steps else arguments.minutes or 55
    loop = LoopConfig(
        steps=arguments.steps,
        minutes=minutes,
        lr=arguments.lr,
        packs_per_micro_batch=arguments.packs,
        micro_batches=arguments.micro_batches,
        workers=workers,
        evaluations=5,
    )

    # Stories, books and chats for the first half; the second half is mostly conversations in the V4 chat format.
    config = PretrainConfig(
        corpus=arguments.corpus,
        out=arguments.out,
        loop=loop,
        scale=arguments.scale,
        device=arguments.device,
        seed=arguments.seed,
        resume=arguments.resume,
    )
    report = run(config)
    minutes_taken = report.training_seconds / 60
    print(f"{report.steps} steps, {report.tokens:,} tokens in {minutes_taken:.1f} minutes -> {arguments.out}")


if __name__ == "__main__":
    main()
