"""Which device computes: the one place that names accelerators; every room receives a `torch.device` from here."""

from __future__ import annotations

import os
from pathlib import Path

import torch


class DeviceError(ValueError):
    """A device that is unknown or absent; the message names the devices that are there."""


def available() -> tuple[str, ...]:
    """Names that `resolve` accepts on this machine, the preferred one first."""
    if not torch.accelerator.is_available():
        return ("cpu",)
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return (kind.type, "cpu")


def resolve(name: str | torch.device = "auto") -> torch.device:
    """The device called `name` ("auto" prefers an accelerator); DeviceError when it is unknown or not present."""
    names = available()
    if str(name) == "auto":
        return torch.device(names[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"unknown device {name!r}; this machine has {', '.join(names)}") from None
    if device.type not in names:
        raise DeviceError(f"device {str(device)!r} is not available; this machine has {', '.join(names)}")
    if device.type != "cpu" and (device.index or 0) >= torch.accelerator.device_count():
        raise DeviceError(
            f"device {str(device)!r} does not exist; there are {torch.accelerator.device_count()} of its kind"
        )
    return device


def fast_dtype(device: torch.device) -> torch.dtype:
    """The carrier of `fast` mode: float32 on a CPU, where plain bfloat16 products are slower; bfloat16 elsewhere."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def memory_available(device: torch.device) -> int:
    """Free bytes on `device`; for a CPU, or one sharing its memory, what machine and control group allow."""
    module = torch.get_device_module(device)
    if device.type != "cpu" and hasattr(module, "mem_get_info"):
        return int(module.mem_get_info(device)[0])
    free = _meminfo() if Path("/proc/meminfo").exists() else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(text) - int(used.read_text())))
    return free


def _meminfo() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise DeviceError("/proc/meminfo has no MemAvailable line; free memory cannot be told on this kernel")
