"""The server: DeepSeek's, OpenAI's and Anthropic's APIs over HTTP for one model, with keys, a ledger and a page."""

from __future__ import annotations

from typing import Any

__all__ = ["create_app", "run"]


def __getattr__(name: str) -> Any:
    if name == "create_app":
        from hadal.server.app import create_app

        return create_app
    if name == "run":
        from hadal.server.run import run

        return run
    raise AttributeError(name)
