"""Running the application under uvicorn."""

from __future__ import annotations

import os
import socket

import torch
import uvicorn

from hadal.llm import LLM
from hadal.server.api import create_app

_GRACE_SECONDS = 10  # how long answers under way may go on after the first interrupt


class ServeError(ValueError):
    """An address that cannot be bound; the message names it and the remedy."""


def run(llm: LLM, *, host: str = "127.0.0.1", port: int = 8000, threads: int | None = None) -> None:
    """Serve `llm` until interrupted; ServeError when the address is taken or not of this machine.

    `threads` is how many CPU threads the model uses. Left out, it leaves one core to the HTTP side: a model's threads
    that wait at a barrier for one the event loop has displaced cost far more than the core is worth.
    """
    torch.set_num_threads(threads or min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) - 1)))
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()
        except OSError as error:
            raise ServeError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another --host or --port"
            ) from None
        shown = f"[{host}]" if ":" in host else host
        print(f"Hadal serves {llm.name} at http://{shown}:{listener.getsockname()[1]}/v1", flush=True)
        config = uvicorn.Config(create_app(llm), log_level="info", timeout_graceful_shutdown=_GRACE_SECONDS)
        uvicorn.Server(config).run(sockets=[listener])
