"""What happens before the first request: threads and addresses."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from hadal.server.run import ServeError, run


@pytest.mark.parametrize("given", [None, 3])
def test_the_model_leaves_a_core_to_http_unless_told(given: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged at an address that cannot be bound, so that nothing is served."""
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServeError, match="cannot listen"):
            run(cast(Any, SimpleNamespace(name="none")), port=taken.getsockname()[1], threads=given)
    assert chosen == [given or 7]
