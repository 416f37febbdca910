"""The server: DeepSeek's chat API over HTTP for one model; one thread computes, the event loop talks to clients."""

from hadal.server.api import create_app
from hadal.server.run import run

__all__ = ["create_app", "run"]
