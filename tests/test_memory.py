"""The most memory that work needs, against work of known size."""

from __future__ import annotations

import subprocess
import sys

import pytest

SIZES = (40, 10, 20)
WORK = f"""
import torch
from experiments.memory import peak_memory

for size in {SIZES}:
    with peak_memory(torch.device("cpu")) as peak:
        held = [torch.ones(1_000) for _ in range(size * 2**20 // 4_000)]
        del held
    print(peak.bytes / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is reported on a CPU")
def test_the_peak_is_of_this_work_whatever_was_freed_before_it() -> None:
    """Small tensors come from the heap, which keeps what is freed: without giving it back, the
    second block would seem to need nothing. In a process of its own, since the test suite's has
    holes in its heap. 20 % and a MiB are for the tensors' own headers and the heap's pages: 4,000
    bytes and about 400 each."""
    found = subprocess.run(
        [sys.executable, "-c", WORK], capture_output=True, text=True, check=True
    ).stdout.split()
    for size, mib in zip(SIZES, map(float, found), strict=True):
        assert size <= mib <= 1.2 * size + 1
