"""Running the application under uvicorn."""

from __future__ import annotations

import socket

import uvicorn

from hadal.llm import LLM
from hadal.server.api import create_app

_GRACE_SECONDS = 10  # how long answers under way may go on after the first interrupt


class ServeError(ValueError):
    """An address that cannot be bound; the message names it and the remedy."""


def run(llm: LLM, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve `llm` until interrupted; ServeError when the address is taken or not of this machine."""
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
