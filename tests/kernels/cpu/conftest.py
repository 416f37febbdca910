"""What tests of the `cpu` kernel table share."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest

from hadal.kernels.cpu.target import Isa
from tests.kernels.cpu.harness import instruction_sets


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The table's operators on each instruction set that runs here."""
    with patch("hadal.kernels.cpu.call.detect", lambda: (Isa(request.param), "chosen by the test")):
        yield request.param
