"""Counter noise over ``torch.randn``. Target: at most 8 times at (64, 3, 32, 32) on the CPU.

Run: ``python -m benchmarks.noise``
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import interleaved, median_ratio
from solvers import CounterNoise

SHAPES = ((64, 2), (2048, 2), (64, 3, 32, 32), (64, 4, 64, 64), (8, 3, 256, 256))
DRAWS = 16  # per timing, so that noise drawn ahead for small events is averaged over its block


def counter(x: torch.Tensor) -> Callable[[], None]:
    noise = CounterNoise(0)
    index = itertools.count()

    def draw() -> None:
        for _ in range(DRAWS):
            noise.normal(x, next(index), 0)

    return draw


def randn(x: torch.Tensor) -> Callable[[], None]:
    def draw() -> None:
        for _ in range(DRAWS):
            torch.randn(x.shape, dtype=x.dtype)

    return draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    table = Table(title=f"counter noise over torch.randn, {torch.get_num_threads()} threads")
    for column in ("shape", "dtype", "counter µs", "randn µs", "ratio"):
        table.add_column(column, justify="right")
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.float64)):
        x = torch.empty(shape, dtype=dtype)
        seconds = interleaved({"counter": counter(x), "randn": randn(x)}, repeats)
        micros = {k: f"{statistics.median(v) / DRAWS * 1e6:.1f}" for k, v in seconds.items()}
        ratio = median_ratio(seconds, "counter", "randn")
        table.add_row(
            str(shape), str(dtype)[6:], micros["counter"], micros["randn"], f"{ratio:.2f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
