"""`hadal bench` and `hadal doctor`: how fast a model is here, and what this machine offers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from hadal.cli.options import (
    AsJson,
    Served,
    Threads,
    one_sentence_errors,
    print_facts,
    print_json,
    print_progress,
    print_table,
)


@one_sentence_errors
def bench(
    model: Served = "nano",
    phase: Annotated[
        list[str] | None, typer.Option(help="prefill, decode, batch (8 at once), long or train; several.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Prompt or context length; several.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or auto.")] = "auto",
    threads: Threads = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the figures into this SVG file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure prefill, decode and training, each also as a fraction of this machine's own limit."""
    import torch

    from hadal.bench import COLUMNS, run, write_chart
    from hadal.checkpoint import load_model

    torch.set_num_threads(threads or torch.get_num_threads())
    load = functools.partial(load_model, model, device="cpu", dtype=dtype, fake_quant=False)
    figures = run(load, phase, tokens, print_progress)
    count = torch.get_num_threads()
    if plot:
        write_chart(plot, f"{model}, threads: {count}", figures)
    if as_json:
        return print_json({"model": model, "threads": count, "figures": [f.to_dict() for f in figures]})
    print_table(f"{model}, threads: {count}", COLUMNS, [f.row() for f in figures])


@one_sentence_errors
def doctor(as_json: AsJson = False) -> None:
    """Show what this machine offers: versions, devices, threads, free memory, and which kernels run here and why."""
    import os
    import platform

    import torch

    from hadal import __version__
    from hadal.device import available, memory_available, resolve
    from hadal.kernels.describe import describe

    facts: dict[str, Any] = {"hadal": __version__, "python": platform.python_version(), "torch": torch.__version__}
    facts |= {"system": f"{platform.system()} {platform.machine()}", "cpu_count": os.cpu_count()}
    facts |= {"threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    facts |= {"devices": list(available())}
    facts |= {f"free_memory_{name}": memory_available(resolve(name)) for name in available()} | describe()
    print_facts(facts, as_json)
