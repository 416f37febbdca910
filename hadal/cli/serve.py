"""`hadal serve`: a model over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hadal.cli.machines import fleet_opener, open_upstream
from hadal.cli.options import Device, MaxContext, Mode, Served, Threads, load_llm, one_sentence_errors, size

if TYPE_CHECKING:
    from collections.abc import Callable

    from hadal.server.backend import Backend

_NETWORK, _REQUESTS, _ACCOUNTS, _LOGS = "Network", "Requests", "Accounts", "Logs and traces"
_MACHINES = "More than one machine"


def _of(panel: str, text: str, **more: Any) -> Any:
    return typer.Option(rich_help_panel=panel, help=text, **more)


def _seconds(text: str) -> Any:
    return _of(_REQUESTS, text, min=0, metavar="SECONDS")


@one_sentence_errors
def serve(
    model: Served = "nano",
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings in TOML; options stand over them.")
    ] = None,
    mode: Mode = "fast",
    device: Device = "auto",
    max_concurrent: Annotated[int, typer.Option(min=1, help="Requests that run at once; more wait.")] = 16,
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
    host: Annotated[
        str, _of(_NETWORK, "Address to bind; the default is reachable from this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, _of(_NETWORK, "Port to bind; 0 takes a free one.", min=0, max=65535)] = 8000,
    open_bind: Annotated[
        bool | None, typer.Option("--open", rich_help_panel=_NETWORK, help="Serve other machines without any key.")
    ] = None,
    tls_cert: Annotated[Path | None, _of(_NETWORK, "Certificate chain (PEM), to serve HTTPS.")] = None,
    tls_key: Annotated[Path | None, _of(_NETWORK, "Its private key (PEM).")] = None,
    cors: Annotated[list[str] | None, _of(_NETWORK, "Origin whose pages may call; may be repeated.")] = None,
    history: Annotated[
        str | None, _of(_REQUESTS, "`lenient` repairs earlier turns, `strict` refuses what DeepSeek refuses.")
    ] = None,
    max_waiting: Annotated[int, _of(_REQUESTS, "Requests that may wait; more are turned away.", min=1)] = 1024,
    max_wait_seconds: Annotated[float | None, _seconds("Longest predicted wait of a request that is let in.")] = None,
    start_seconds: Annotated[float | None, _seconds("Longest wait for an answer's first token.")] = None,
    request_seconds: Annotated[float | None, _seconds("Longest time of an answer; no limit if left out.")] = None,
    keep_alive_seconds: Annotated[float | None, _seconds("Silence after which a sign of life is sent.")] = None,
    drain_seconds: Annotated[float | None, _seconds("Time for answers to end after the first signal to stop.")] = None,
    body_limit: Annotated[int | None, size("Largest body of a request.", rich_help_panel=_REQUESTS)] = None,
    data: Annotated[Path | None, _of(_ACCOUNTS, "Folder of database, files and batches.")] = None,
    database: Annotated[str | None, _of(_ACCOUNTS, "sqlite:///FILE or postgresql://...", metavar="URL")] = None,
    prices: Annotated[Path | None, _of(_ACCOUNTS, "Price lists in TOML, beside those that come along.")] = None,
    price_list: Annotated[str | None, _of(_ACCOUNTS, "Price list that costs are counted by.", metavar="NAME")] = None,
    log_format: Annotated[str | None, _of(_LOGS, "text or json.")] = None,
    otel: Annotated[
        bool | None, typer.Option("--otel", rich_help_panel=_LOGS, help="Send OpenTelemetry spans (OTEL_* variables).")
    ] = None,
    upstream: Annotated[
        str | None,
        _of(_MACHINES, "vLLM, SGLang or Hadal server to answer; MODEL needs no weights then.", metavar="URL"),
    ] = None,
    upstream_model: Annotated[str | None, _of(_MACHINES, "Its name there; the first if left out.")] = None,
    upstream_key: Annotated[
        str | None, _of(_MACHINES, "Key to send there.", envvar="HADAL_UPSTREAM_KEY", show_default=False)
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", rich_help_panel=_MACHINES, help="Replicas under Ray Serve, here or at RAY_ADDRESS.")
    ] = False,
    replicas: Annotated[int | None, _of(_MACHINES, "How many with --ray; SIGHUP replaces them.", min=1)] = None,
) -> None:
    """Serve a model over HTTP in the shapes of DeepSeek's, OpenAI's and Anthropic's APIs."""
    import hadal.server.run
    from hadal.server.backend import LocalBackend
    from hadal.server.settings import read_settings

    settings = read_settings(
        config, model=Path(model).resolve().name, open_bind=open_bind, tls_cert=tls_cert, tls_key=tls_key,
        cors=tuple(cors) if cors else None, history=history, max_wait_seconds=max_wait_seconds,
        start_seconds=start_seconds, request_seconds=request_seconds, keep_alive_seconds=keep_alive_seconds,
        drain_seconds=drain_seconds, body_limit=body_limit, data=data, database=database, prices=prices,
        price_list=price_list, log_format=log_format, otel=otel,
    )  # fmt: skip

    if (upstream and ray) or (replicas and not ray):
        raise hadal.server.run.ServeError("--upstream, and --ray with --replicas, exclude each other; give one of them")
    engine: dict[str, Any] = {
        "max_concurrent": max_concurrent, "cache_memory": cache_memory, "prefix_folder": prefix_folder,
        "prefix_disk": prefix_disk, "speculation": speculation, "expert_memory": expert_memory,
    }  # fmt: skip
    start_fleet = None
    if ray:
        options = engine | {"mode": mode, "device": device, "max_context": max_context}
        start_fleet = fleet_opener(model, options, replicas or 2, threads, max_waiting)

    def load(progress: Callable[[str], None]) -> Backend:
        if upstream:
            return open_upstream(model, upstream, upstream_model, upstream_key, max_waiting)
        if start_fleet is not None:
            return start_fleet()
        llm = load_llm(model, mode, device, max_context, max_waiting=max_waiting, progress=progress, **engine)
        return LocalBackend(llm)

    hadal.server.run.run(load, settings, host=host, port=port, threads=threads)
