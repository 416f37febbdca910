"""`hadal serve`: a model over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hadal.cli.options import (
    Device,
    MaxContext,
    Mode,
    Served,
    Threads,
    load_llm,
    one_sentence_errors,
    print_progress,
    size,
)


@one_sentence_errors
def serve(
    model: Served = "nano",
    host: Annotated[
        str, typer.Option(help="Address to bind; the default is reachable from this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to bind; 0 takes a free one.")] = 8000,
    mode: Mode = "fast",
    device: Device = "auto",
    max_concurrent: Annotated[int, typer.Option(min=1, help="Requests that run at once; more wait.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are turned away.")] = 1024,
    max_context: MaxContext = None,
    cache_memory: Annotated[
        int | None, size("Memory for the contexts of requests, running and kept; half of what is free if left out.")
    ] = None,
    prefix_folder: Annotated[
        Path | None, typer.Option(help="Keep contexts in this folder too, so that they outlast a restart.")
    ] = None,
    prefix_disk: Annotated[int, size("Most that this folder may hold.")] = "16GiB",  # type: ignore[assignment]
    speculation: Annotated[
        int | None,
        typer.Option(min=0, help="Most tokens to guess ahead; 0 for none, the draft head's limit if left out."),
    ] = None,
    expert_memory: Annotated[
        int | None, size("Memory for experts, the rest is read from disk when needed; as fits if left out.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Serve a model over HTTP in the shape of DeepSeek's and OpenAI's chat API."""
    import hadal.server

    llm = load_llm(
        model, mode, device, max_context, max_concurrent=max_concurrent, max_waiting=max_waiting,
        cache_memory=cache_memory, prefix_folder=prefix_folder, prefix_disk=prefix_disk, speculation=speculation,
        expert_memory=expert_memory, progress=print_progress,
    )  # fmt: skip
    hadal.server.run(llm, host=host, port=port, threads=threads)
