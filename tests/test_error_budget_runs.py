"""Runs of error-budget: stopped and gone on with, on several processes, with samplers that fail."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from experiments import budget_problem, pool
from experiments.cells import Task
from experiments.cli import app
from experiments.computing import Interrupted
from experiments.error_budget import BudgetOptions, BudgetOutcome, make_plan, run
from experiments.records import read_table
from experiments.reporting.page import render
from experiments.results import load_results
from experiments.runs import load_run
from experiments.store import CellStore
from experiments.subject_kinds import ExactSubject
from experiments.work import Done, perform, record_of
from tests.test_compare import Silent
from tests.test_report import Page

SMALL: dict[str, Any] = {
    "targets": ("ring",),
    "sdes": ("vp",),
    "solvers": ("ancestral", "ddim"),
    "budgets": (4, 7),
    "samples": 24,
    "repeats": 2,
}
MACHINE = {"seconds", "judging_seconds", "timing", "peak_bytes"}
BAD = "tests.misbehaving:Raises"


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine solutions that are not: nothing here is about how fine they are."""
    monkeypatch.setattr("experiments.budget_problem.FINE_ODE_STEPS", 6)
    monkeypatch.setattr("experiments.budget_problem.FINE_SDE_STEPS", 12)


def budget(folder: Path, progress: Any = None, **options: Any) -> BudgetOutcome:
    given = BudgetOptions(**{**SMALL, **options, "out": str(folder)})
    return run(make_plan(given), progress or Silent())


def figures(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and records, without what the machine says."""
    rows = load_results(folder)["rows"]
    records = [record.as_dict() for record in read_table(folder / "cells.parquet")]
    return _without_machine(rows), _without_machine(records)


def _without_machine(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in MACHINE} for row in table]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the tasks that are computed from now on."""
    performed: list[str] = []

    def counting(task: Task, *rest: Any) -> Any:
        performed.append(task.kind)
        return perform(task, *rest)

    monkeypatch.setattr(pool, "perform", counting)
    return performed


def test_a_second_run_computes_nothing_and_force_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    performed = counted(monkeypatch)
    budget(tmp_path)
    first = figures(tmp_path)
    # Two solvers x two budgets x two repeats; two equations; one law.
    kinds = {kind: performed.count(kind) for kind in set(performed)}
    assert kinds == {"cell": 8, "fine": 4, "floor": 2}
    performed.clear()
    budget(tmp_path)
    assert performed == []
    assert figures(tmp_path) == first
    budget(tmp_path, budgets=(4, 7, 9))
    assert sorted(performed) == ["cell"] * 4
    budget(tmp_path, repeats=3)
    assert performed.count("cell") == 8  # the third repeats
    performed.clear()
    budget(tmp_path, force=True)
    assert sorted(performed) == ["cell"] * 8 + ["fine"] * 4 + ["floor"] * 2
    assert figures(tmp_path) == first


@pytest.mark.parametrize("after", [0, 4, 9])
def test_interrupted_it_goes_on_to_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    class Stopping(Silent):
        left = after

        def done(self, amount: float) -> None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

    budget(tmp_path / "whole")
    performed = counted(monkeypatch)
    with pytest.raises(Interrupted, match="the same command goes on from there"):
        budget(tmp_path / "stopped", Stopping())
    assert load_results(tmp_path / "stopped")["status"] == "interrupted"
    assert len(performed) == after + 1
    budget(tmp_path / "stopped")
    assert len(performed) == 8 + 4 + 2  # none of them twice
    assert figures(tmp_path / "stopped") == figures(tmp_path / "whole")


def test_lost_and_torn_files_are_computed_again(tmp_path: Path) -> None:
    budget(tmp_path)
    before = figures(tmp_path)
    (tmp_path / "cells.parquet").unlink()
    stored = sorted((tmp_path / "cells").glob("*.json"))
    stored[0].write_text(stored[0].read_text()[:40])
    for path in stored[1::3]:
        path.unlink()
    for path in (tmp_path / "cells").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:20])
    budget(tmp_path)
    assert figures(tmp_path) == before


def test_what_changes_the_figures_changes_the_key() -> None:
    def keys(**change: Any) -> set[str]:
        plan = make_plan(BudgetOptions(**{**SMALL, **change}))
        return {task.key for task in (*plan.shared_tasks(), *plan.solver_tasks())}

    same = keys()
    for change in ({"jobs": 2}, {"cell_timeout": 9.0}, {"out": "x"}, {"batch_size": 5}):
        assert keys(**change) == same  # type: ignore[arg-type]
    for change in (
        {"targets": ("moons",)},
        {"sdes": ("ve",)},
        {"samples": 25},
        {"seed": 1},
        {"denoise": True},
        {"label": "1"},
        {"guidances": ("cfg",), "scales": (2.0,)},
    ):
        assert not keys(**change) & same, change  # type: ignore[arg-type]
    # The grid is the solvers' alone, and what they share stays.
    assert len(keys(grid="karras") & same) == 6


def stored(folder: Path) -> dict[str, Any]:
    """Every tensor that a run has kept."""
    store = CellStore(folder)
    found = {record.key: store.tensors(record.key) or {} for record in store.all()}
    return {f"{key} {name}": x for key, one in found.items() for name, x in one.items()}


def without_batch(folder: Path) -> list[list[dict[str, Any]]]:
    tables = figures(folder)
    return [[{k: v for k, v in row.items() if k != "batch_size"} for row in t] for t in tables]


def test_no_figure_depends_on_the_batch(tmp_path: Path) -> None:
    """Nor on the threads that batches are drawn by; noisy solvers, guided ones and what guided
    samples are compared with among them."""
    given: dict[str, Any] = {"guidances": ("none", "cfg"), "scales": (3.0,), "denoise": True}
    given |= {"budgets": (4,), "jobs": 1}
    budget(tmp_path / "whole", **given)
    budget(tmp_path / "parts", batch_size=5, **given)
    assert without_batch(tmp_path / "whole") == without_batch(tmp_path / "parts")
    whole, parts = stored(tmp_path / "whole"), stored(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    rows = [load_results(tmp_path / name)["rows"] for name in ("whole", "parts")]
    sizes = [{row["batch_size"] for row in one} for one in rows]
    assert sizes == [{24}, {5}]
    records = read_table(tmp_path / "parts" / "cells.parquet")
    assert {record.batch_size for record in records} == {5}
    assert all(record.peak_bytes is not None for record in records)
    plan = make_plan(BudgetOptions(**{**SMALL, **given}))
    task = plan.solver_tasks()[0]
    fine = CellStore(tmp_path / "whole").tensors(plan.given_tasks()[task.key].key)
    threads = [perform(task, fine, workers).record for workers in (1, 3)]
    assert [record.batch_size for record in threads] == [24, 8]
    assert threads[0].metrics == threads[1].metrics


def test_a_batch_that_memory_does_not_hold_is_halved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every solution: the sampler's, the fine ones, and those of the network's error."""
    solved = budget_problem.sample

    def short(*args: Any, **kwargs: Any) -> Any:
        if len(kwargs["x"]) > 7:
            raise torch.OutOfMemoryError("out of memory")
        return solved(*args, **kwargs)

    budget(tmp_path / "whole")
    monkeypatch.setattr(budget_problem, "sample", short)
    halved = budget(tmp_path / "halved")
    assert not halved.failed
    assert {r["batch_size"] for r in load_results(tmp_path / "halved")["rows"]} == {6}
    assert without_batch(tmp_path / "halved") == without_batch(tmp_path / "whole")


def test_a_sampler_that_looks_at_its_batch_is_another_at_another_batch_size() -> None:
    def keys(batch_size: int | None) -> set[str]:
        options = {**SMALL, "solvers": ("tests.samplers:with_generator",), "batch_size": batch_size}
        return {task.key for task in make_plan(BudgetOptions(**options)).solver_tasks()}

    assert not keys(3) & keys(5)


def test_an_identity_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    worked_out = ExactSubject._identity

    def counting(self: ExactSubject, sde: str) -> dict[str, Any]:
        asked.append(sde)
        return worked_out(self, sde)

    monkeypatch.setattr(ExactSubject, "_identity", counting)
    options = BudgetOptions(**{**SMALL, "targets": ("gmm16",), "sdes": ("vp", "ve")})
    plan = make_plan(options)
    plan.solver_tasks()
    assert sorted(asked) == ["ve", "vp"]


def test_a_sampler_that_fails_costs_its_own_rows(tmp_path: Path) -> None:
    bad = budget(tmp_path / "bad", solvers=("ddim", BAD, "ancestral"))
    assert [row.status for row in bad.rows] == ["ok"] * 2 + ["failed"] * 2 + ["ok"] * 2
    (first, *_) = bad.failed
    assert (first.parts, first.total, first.error) == ({}, None, "KeyError: 'no such thing'")
    budget(tmp_path / "good", solvers=("ddim", "ancestral"))
    rows, _ = figures(tmp_path / "bad")
    assert [row for row in rows if row["status"] == "ok"] == figures(tmp_path / "good")[0]
    assert rows[2]["metrics"] == rows[2]["parts"] == {}


def test_a_failed_row_ends_with_exit_code_3_and_says_why(tmp_path: Path) -> None:
    given = ["error-budget", "--sde", "vp", "--nfe", "4", "--samples", "10", "--repeats", "2"]
    solvers = ["--solver", "ddim", "--solver", BAD]
    result = CliRunner().invoke(app, [*given, *solvers, "--out", str(tmp_path)])
    assert result.exit_code == 3, result.output
    words = " ".join(result.output.split())
    assert f"failed: ring · vp · {BAD} · 4 evaluations: KeyError: 'no such thing'" in words
    assert (tmp_path / "error_budget.png").exists()


def test_a_run_without_one_good_row_still_ends_well(tmp_path: Path) -> None:
    given = ["error-budget", "--sde", "vp", "--nfe", "4", "--samples", "10", "--repeats", "2"]
    result = CliRunner().invoke(app, [*given, "--solver", BAD, "--out", str(tmp_path)])
    assert result.exit_code == 3, result.output
    assert not (tmp_path / "error_budget.png").exists()


def test_a_sampler_that_hangs_is_ended(tmp_path: Path) -> None:
    outcome = budget(
        tmp_path, solvers=("ddim", "tests.misbehaving:Hangs"), budgets=(4,), cell_timeout=1.0
    )
    assert [row.status for row in outcome.rows] == ["ok", "timeout"]
    assert "--cell-timeout 1 s" in outcome.rows[1].error


def test_a_fine_solution_that_fails_fails_the_rows_of_its_equation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(task: Task, *rest: Any) -> Any:
        if task.kind == "fine" and task.solver.stochastic and task.repeat == 1:
            return Done(record_of(task, status="failed", error="no memory"), {})
        return perform(task, *rest)

    with monkeypatch.context() as failures:
        failures.setattr(pool, "perform", failing)
        outcome = budget(tmp_path)
    assert {row.planned.cell.solver.stochastic for row in outcome.failed} == {True}
    assert [row.status for row in outcome.rows] == ["failed", "failed", "ok", "ok"]
    assert [row.status for row in budget(tmp_path).rows] == ["ok"] * 4


def test_guided_rows_stand_beside_the_others(tmp_path: Path) -> None:
    given: dict[str, Any] = {"guidances": ("none", "cfg", "classifier"), "scales": (1.0, 3.0)}
    budget(tmp_path, budgets=(4,), **given)
    rows, records = figures(tmp_path)
    parts = {row["guided_by"]: set(row["parts"]) for row in rows}
    of_data = {"truncation", "prior_mismatch", "discretisation", "total", "floor"}
    guided = {"discretisation", "total", "floor"}
    expected = {"unguided": of_data, "cfg γ=1": of_data, "cfg γ=3": guided}
    assert parts == expected | {"classifier γ=1": of_data, "classifier γ=3": guided}
    truths = {(row["guided_by"], row["spec"]): row["truth"] for row in rows}
    assert truths["cfg γ=3", "ancestral"] == "the guided SDE, finely solved"
    assert truths["cfg γ=3", "ddim"] == "the guided ODE, finely solved"
    assert truths["cfg γ=1", "ddim"] == "exact samples of the classes"
    # Exactly, the classifier's gradient and the difference of scores are one field.
    by = {(row["guided_by"], row["spec"]): row["by_repeat"]["total"] for row in rows}
    assert by["cfg γ=3", "ddim"] == pytest.approx(by["classifier γ=3", "ddim"], rel=1e-6)
    assert {record["guidance"] for record in records} == {"none", "cfg", "classifier"}


def test_a_network_is_measured_by_time_once_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    performed = counted(monkeypatch)
    given: dict[str, Any] = {"targets": (), "models": ("digits-vp",), "sdes": (), "buckets": 2}
    given |= {"solvers": ("ddim", BAD), "budgets": (4,), "guidances": ("none", "cfg")}
    first = budget(tmp_path, **given)
    assert performed.count("by_time") == 1
    assert [row.status for row in first.rows] == ["ok", "failed"] * 2
    performed.clear()
    second = budget(tmp_path, **given)
    assert performed == ["cell"] * 4  # the failed ones are tried again
    assert second.networks == first.networks != []
    assert second.references == first.references


def test_a_run_can_be_reported(tmp_path: Path) -> None:
    budget(tmp_path, budgets=(4,), solvers=("ddim", BAD))
    found = load_run(tmp_path)
    page = Page(render(found, trajectories=False))
    assert any("no such thing" in text for _, text in page.all("li"))
    (row, failed) = found.rows
    assert failed["parts"] == {}
    for part in row["parts"].values():
        assert set(part) == {"value", "interval", "resolved"}
    tensors = CellStore(tmp_path).tensors(row["cells"][0])
    assert tensors is not None
    assert tensors["x"].shape == (24, 2)


@pytest.mark.slow
def test_processes_and_a_cluster_give_the_bits_of_one_process(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    given: dict[str, Any] = {"guidances": ("none", "cfg"), "scales": (2.0,)}
    budget(tmp_path / "one", jobs=1, **given)
    budget(tmp_path / "two", jobs=2, **given)
    assert figures(tmp_path / "one") == figures(tmp_path / "two")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
    ) as cluster:
        budget(tmp_path / "cluster", scheduler=cluster.scheduler_address, **given)
    assert figures(tmp_path / "one") == figures(tmp_path / "cluster")
    names = [sorted(p.name for p in (tmp_path / n / "cells").iterdir()) for n in ("one", "two")]
    assert names[0] == names[1]
    for key in (p.stem for p in (tmp_path / "one" / "cells").glob("*.safetensors")):
        a, b = (CellStore(tmp_path / n).tensors(key) for n in ("one", "two"))
        assert a is not None
        assert b is not None
        assert all(torch.equal(a[name], b[name]) for name in a)


def start(folder: Path) -> multiprocessing.process.BaseProcess:
    """A budget in a process of its own, forked from one that has done the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_error_budget_runs"])
    larger = {"samples": 60, "repeats": 3, "guidances": ("none", "cfg")}
    process = context.Process(target=budget, args=(folder,), kwargs=larger)
    process.start()
    return process


@pytest.mark.slow
def test_killed_at_any_moment_the_rerun_gives_the_same_table(tmp_path: Path) -> None:
    def finished(folder: Path) -> bool:
        process = start(folder)
        process.join(120)
        return process.exitcode == 0

    assert finished(tmp_path / "first")  # the server's imports are done now
    started = time.monotonic()
    assert finished(tmp_path / "whole")
    length = time.monotonic() - started
    moments, kills = random.Random(0), 0
    for _ in range(8):
        process = start(tmp_path / "killed")
        process.join(length * moments.uniform(0.0, 0.4))
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills >= 3
    assert finished(tmp_path / "killed")
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")
    assert load_results(tmp_path / "killed")["status"] == "finished"
