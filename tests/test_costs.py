"""Seconds per sample at the best batch size: found on a ladder of batch sizes, kept in the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from experiments import costs, draw
from experiments.cli import app
from experiments.costs import Costs, climb, measure
from experiments.draw import Drawn, Machine
from experiments.results import load_results, results_schema
from solvers import Solution
from tests.misbehaving import Raises
from tests.test_runs import task


class Model:
    """A machine whose times are known: ``fixed`` seconds a chunk, and ``each`` a sample."""

    def __init__(self, fixed: float, each: float, fits: int = 1 << 30) -> None:
        self.fixed, self.each, self.fits = fixed, each, fits
        self.sizes: list[int] = []

    def __call__(self, size: int, ids: Tensor) -> Drawn:
        self.sizes.append(size)
        size = min(size, self.fits)
        return Drawn(ids, 1.0, 1.0, self.fixed + self.each * len(ids), size)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_MANY", 2)


def test_batches_grow_while_throughput_rises() -> None:
    """With 16 ms a chunk and 1 ms a sample, time per sample at size B is 1 + 16 / B ms. A doubling
    gains 5 % as long as (1 + 16/B) / (1 + 8/B) >= 1.05, that is up to B = 152: 128 -> 256 gains
    5.9 %, 256 -> 512 gains 3.0 %, 512 -> 1024 less."""
    machine = Model(0.016, 0.001)
    ladder = climb(machine)
    assert [rung.batch_size for rung in ladder.rungs] == [16, 32, 64, 128, 256, 512, 1024]
    assert ladder.stopped == "flat"
    assert ladder.best.batch_size == 1024
    assert ladder.best.per_sample == pytest.approx(0.001 * (1 + 16 / 1024))
    assert machine.sizes[:3] == [16, 16, 16]  # one to warm up, two with the clock


def test_a_slow_machine_a_small_one_and_an_endless_one() -> None:
    slow = climb(Model(0.0, 0.1))  # 1.6 s for 16: no rise at all
    assert (slow.stopped, len(slow.rungs)) == ("flat", 3)
    heavy = climb(Model(5.0, 1e-6))  # the next would take 5 s for each of three draws
    assert (heavy.stopped, len(heavy.rungs)) == ("time", 1)
    small = climb(Model(1.0, 1e-6, fits=100))
    assert (small.stopped, [r.batch_size for r in small.rungs]) == ("memory", [16, 32, 64])
    tiny = climb(Model(1.0, 1e-6, fits=5))
    assert (tiny.stopped, tiny.best.batch_size, tiny.best.samples) == ("memory", 5, 5)
    endless = climb(Model(1.0, 0.0))
    assert (endless.stopped, endless.best.batch_size) == ("largest", costs.MOST)


def test_every_worker_has_a_batch_and_the_fastest_draw_counts() -> None:
    times = iter([9.0, 3.0, 2.0])
    calls = []

    def drawn(size: int, ids: Tensor) -> Drawn:
        calls.append((size, len(ids)))
        return Drawn(ids, 1.0, 1.0, next(times), size)

    rung = measure(drawn, 8, workers=2)
    assert calls == [(8, 16)] * 3
    assert rung.per_sample == 2.0 / 16  # of the two after warm-up


def test_a_gpu_is_awaited_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    awaited = []

    def synchronize(device: torch.device) -> None:
        awaited.append(device)
        clock[0] += 3.0  # what was queued takes three seconds

    def queued(*args: Any, **kwargs: Any) -> Solution:
        x = torch.zeros(kwargs["shape"])
        return Solution(x=x, nfe=1.0, network_passes=1.0, times=torch.ones(2), stats=None)  # type: ignore[arg-type]

    monkeypatch.setattr(draw, "sample", queued)
    monkeypatch.setattr(draw.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    arguments: dict[str, Any] = {"event_shape": (2,), "ids": torch.arange(4), "steps": 1, "seed": 0}
    drawn = Machine(torch.device("cuda")).draw(lambda ids: None, None, None, **arguments)  # type: ignore[arg-type, return-value]
    assert drawn.seconds == 3.0
    assert awaited == [torch.device("cuda")]


def test_costs_are_kept_and_a_failing_sampler_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = costs.draw_task

    def counted(found: Any, machine: Machine, ids: Tensor) -> Drawn:
        calls.append(machine.batch_size)
        return real(found, machine, ids)

    monkeypatch.setattr(costs, "draw_task", counted)
    monkeypatch.setattr(costs, "MOST", 64)
    monkeypatch.setattr(costs.climb, "__kwdefaults__", {"first": 16, "most": 32})
    first = Costs(tmp_path, "cpu", 1)
    few, more = task(budgets=(4,)), task(budgets=(8,))
    found = first.of(few)
    assert found["batch_size"] in (16, 32)
    assert found["seconds_per_sample"] > 0
    assert {r["batch_size"] for r in found["tried"]} == {16, 32}
    del calls[:]
    second = first.of(more)
    assert set(calls) == {found["batch_size"]}  # no ladder once more
    assert second["batch_size"] == found["batch_size"]
    del calls[:]
    assert Costs(tmp_path, "cpu", 1).of(few) == found
    assert calls == []
    assert Costs(tmp_path, "cpu", 1, force=True).of(few)
    assert calls
    broken = dataclasses.replace(few, solver=Raises(), key="broken")
    assert first.of(broken) == {"error": "KeyError: 'no such thing'"}


def test_compare_shows_throughput(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs.climb, "__kwdefaults__", {"first": 16, "most": 16})
    options = "compare --target ring --sde vp --solver ddim --nfe 4,7 --samples 20 --repeats 1"
    out = ("--jobs", "1", "--out", str(tmp_path))
    done = CliRunner().invoke(app, [*options.split(), "--throughput", *out])
    assert done.exit_code == 0, done.output
    assert "milliseconds per sample at the best batch size" in done.stdout
    results = load_results(tmp_path)
    jsonschema.Draft202012Validator(results_schema()).validate(results)
    assert [row["throughput"]["batch_size"] for row in results["rows"]] == [16, 16]
    assert all(row["throughput"]["seconds_per_sample"] > 0 for row in results["rows"])
    refused = CliRunner().invoke(app, ["compare", "--throughput", "--scheduler", "tcp://h:1"])
    assert refused.exit_code == 2
    assert "--throughput measures this machine" in refused.stderr
