"""One random official checkpoint per format, shared by the room's tests; nobody may change it in place."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.tiny import dspark_config, random_tensors, tiny_config, write_checkpoint


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP4 experts, FP8 dense, MTP, two shards cut in the middle of a layer."""
    config = tiny_config()
    return write_checkpoint(tmp_path_factory.mktemp("fp4") / "model", config, random_tensors(config), shards=2)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything BF16, no draft head in the files although the config announces one."""
    config = tiny_config(quantization=False, expert_dtype=None)
    tensors = random_tensors(config, "bf16", "bf16")
    trunk = {name: t for name, t in tensors.items() if not name.startswith("mtp.")}
    return write_checkpoint(tmp_path_factory.mktemp("bf16") / "model", config, trunk)


@pytest.fixture(scope="session")
def dspark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP8 everywhere, three DSpark stages, with library metadata in the headers."""
    config = dspark_config().replace(expert_dtype="fp8")
    tensors = random_tensors(config, "fp8", "fp8")
    return write_checkpoint(tmp_path_factory.mktemp("ds") / "model", config, tensors, metadata={"format": "pt"})
