from __future__ import annotations

import pytest
import torch

from hadal import device


def test_auto_is_an_available_device() -> None:
    assert device.resolve("auto").type == device.available()[0]
    assert device.available()[-1] == "cpu"


def test_the_cpu_is_always_there() -> None:
    assert device.resolve("cpu") == torch.device("cpu")
    assert device.fast_dtype(torch.device("cpu")) == torch.float32
    assert 2**20 < device.memory_available(torch.device("cpu")) < 2**50


def test_unknown_and_absent_devices_are_named_with_those_that_exist() -> None:
    with pytest.raises(device.DeviceError, match=r"unknown device 'abacus'; this machine has .*cpu"):
        device.resolve("abacus")
    absent = next(name for name in ("xpu", "hpu", "mtia") if name not in device.available())
    with pytest.raises(device.DeviceError, match=r"is not available; this machine has .*cpu"):
        device.resolve(absent)


def test_an_index_beyond_the_last_accelerator_is_refused() -> None:
    kind = device.available()[0]
    if kind == "cpu":
        pytest.skip("this machine has no accelerator")
    with pytest.raises(device.DeviceError, match="does not exist"):
        device.resolve(f"{kind}:99")


def test_an_accelerator_that_cannot_tell_its_memory_shares_the_host_s() -> None:
    assert not hasattr(torch.mps, "mem_get_info")
    assert 2**20 < device.memory_available(torch.device("mps")) < 2**50
