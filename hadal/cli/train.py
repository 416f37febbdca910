"""`hadal train`: pre-training of a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hadal.cli.options import AsJson, Device, one_sentence_errors, print_json, print_progress, print_table


@one_sentence_errors
def train(
    out: Annotated[Path, typer.Argument(help="Model directory to write; working files go to OUT.run.")],
    corpus: Annotated[Path, typer.Option(help="Folder of text files, .jsonl or .xz.")] = Path("corpus"),
    minutes: Annotated[
        float | None, typer.Option(help="Wall clock of the training loop; 55 if --steps is not given.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps instead of minutes.")] = None,
    scale: Annotated[int, typer.Option(help="1 is nano; 2, 3 ... are wider and deeper.")] = 1,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; nano's if left out.")] = None,
    packs: Annotated[int | None, typer.Option(help="Packs of 1024 tokens in a micro-batch; 1 if left out.")] = None,
    micro_batches: Annotated[int | None, typer.Option(help="Micro-batches in a step; 2 if left out.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed and steps, same model.")] = 0,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option(help="Continue the run in OUT.run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Pre-train a small model with every V4 part and write it quantised, in the official layout."""
    import dataclasses

    from hadal.train.loop import LoopConfig
    from hadal.train.pretrain import PretrainConfig, run

    given = {"steps": steps, "minutes": minutes, "lr": lr, "packs_per_micro_batch": packs}
    given["micro_batches"] = micro_batches
    loop = LoopConfig(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    config = PretrainConfig(corpus=corpus, out=out, loop=loop, scale=scale, device=device, seed=seed, resume=resume)
    report = dataclasses.asdict(run(config, print_progress))
    if as_json:
        return print_json(report)
    losses = [[source, f"{loss:.3f}"] for source, loss in report["held_out"].items()]
    print_table(
        f"{report['steps']} steps, {report['tokens']:,} tokens -> {out}", ["held out", "nats per token"], losses
    )
