"""Options and fixtures that all rooms' tests share."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

# One thread per process: tests run side by side, and tiny operators on several threads mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shared", default=None, metavar="DIR", help="reference data (default: ../shared beside the clone)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # helpers of the run inherit the folder, so kernels are compiled once
        folder = tempfile.mkdtemp(prefix="hadal-tests-")
        os.environ["HADAL_CACHE"] = folder
        os.environ["HADAL_DATA"] = f"{folder}/data"  # nothing may come into the user's own
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    config.addinivalue_line("markers", "slow: takes more than a few seconds; left out by default")


@pytest.fixture(scope="session")
def shared_dir(request: pytest.FixtureRequest) -> Path:
    """The folder with golden vectors and reference data; skips the test where there is none."""
    given = request.config.getoption("--shared")
    folder = Path(given) if given else request.config.rootpath.parent / "shared"
    if given and not folder.is_dir():
        raise pytest.UsageError(f"--shared {given} is not a directory")
    if not folder.is_dir():
        pytest.skip("needs the reference data; give --shared DIR")
    return folder
