"""The most memory that work needs, against work of known size."""

from __future__ import annotations

import sys

import pytest
import torch

from experiments.memory import peak_memory

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is reported on a CPU")
def test_the_peak_is_of_this_work_whatever_was_freed_before_it() -> None:
    """Small tensors come from the heap, which keeps what is freed: without giving it back, the
    second block would seem to need nothing. A MiB is for the tensors' own headers and the heap's
    pages: 4,000 bytes and about 400 each."""
    for size in (40, 10, 20):
        with peak_memory(torch.device("cpu")) as peak:
            held = [torch.ones(1_000) for _ in range(size * MIB // 4_000)]
            del held
        assert peak.bytes is not None
        assert size <= peak.bytes / MIB <= 1.2 * size + 1
