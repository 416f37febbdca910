"""Freed memory stays: after a few rounds of the same large tensors hardly a new page is touched."""

import platform
import resource
import subprocess
import sys

import pytest

PROBE = """
import resource, torch
from hadal.train.memory import keep_freed_memory
assert keep_freed_memory()
def work():
    kept = [torch.zeros(4_000_000) for _ in range(8)]
for _ in range(5):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_pages_are_used_again():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    pages = 8 * 16_000_000 // resource.getpagesize()
    assert int(done.stdout) < pages // 5
