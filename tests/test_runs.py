"""Cells: known by what determines them, stored as they finish, computed once, wherever they run."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import multiprocessing.process
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from experiments import compare, draw, pool
from experiments.cells import Task
from experiments.compare import CompareOptions, make_plan
from experiments.draw import Machine
from experiments.records import Record, read_table, write_table
from experiments.results import load_results
from experiments.store import CellStore
from experiments.work import perform
from sde_diffusion import VPSDE, named_target
from solvers import DDIM, Solver
from tests.misbehaving import Dies, Hangs, HangsDeaf, Raises
from tests.test_compare import Silent

SMALL: dict[str, Any] = {
    "targets": ("ring",),
    "sdes": ("vp",),
    "solvers": ("ancestral", "ddim"),
    "budgets": (4, 7),
    "samples": 30,
    "repeats": 2,
}
MACHINE = {"seconds", "judging_seconds", "peak_bytes", "batch_size", "network_passes"}


def run(folder: Path, **options: Any) -> compare.Outcome:
    return compare.run(
        make_plan(CompareOptions(**{**SMALL, **options, "out": str(folder)})), Silent()
    )


def task(solver: Solver | None = None, seconds: float | None = None, **options: Any) -> Task:
    plan = make_plan(CompareOptions(**{**SMALL, **options}))
    found = plan.tasks(plan.cells[-1])[0]
    if solver is not None:
        found = dataclasses.replace(found, solver=solver, key=type(solver).__name__)
    return dataclasses.replace(found, seconds=seconds)


def figures(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, without what the machine says."""
    rows = [record.as_dict() for record in read_table(folder / "cells.parquet")]
    return [{k: v for k, v in row.items() if k not in MACHINE} for row in rows]


@pytest.mark.parametrize(
    "change",
    [
        {"targets": ("moons",)},
        {"sdes": ("ve",)},
        {"solvers": ("ddim", "ddim:eta=0.5")},
        {"budgets": (4, 8)},
        {"samples": 31},
        {"seed": 1},
        {"grid": "karras"},
        {"denoise": True},
        {"guidances": ("cfg",), "scales": (2.0,)},
        {"guidances": ("cfg",), "scales": (2.0,), "label": "1"},
    ],
)
def test_what_changes_the_figures_changes_the_key(change: dict[str, Any]) -> None:
    assert task(**change).key != task().key


def test_how_a_cell_is_computed_does_not_change_its_key() -> None:
    for change in ({"batch_size": 3}, {"jobs": 2}, {"repeats": 5}, {"cell_timeout": 9.0}):
        assert task(**change).key == task().key  # type: ignore[arg-type]
    plan = make_plan(CompareOptions(**SMALL))
    keys = [t.key for planned in plan.cells for t in plan.tasks(planned)]
    assert len(set(keys)) == len(keys) == 2 * 2 * 2


def test_a_second_run_computes_nothing_and_force_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    performed: list[str] = []

    def counted(task: Task, *rest: Any) -> Any:
        performed.append(task.kind)
        return perform(task, *rest)

    monkeypatch.setattr(pool, "perform", counted)
    run(tmp_path)
    first = figures(tmp_path), load_results(tmp_path)["rows"]
    assert performed.count("cell") == 8
    assert performed.count("fine") == performed.count("floor") == 2
    performed.clear()
    run(tmp_path)
    assert performed == []
    assert (figures(tmp_path), load_results(tmp_path)["rows"]) == first
    run(tmp_path, repeats=3)
    assert performed.count("cell") == 4  # the third repeats
    performed.clear()
    run(tmp_path, force=True)
    assert performed.count("cell") == 8
    assert figures(tmp_path) == first[0]


def test_a_repeat_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    run(tmp_path / "two", repeats=2)
    run(tmp_path / "three", repeats=3)
    three = [row for row in figures(tmp_path / "three") if row["repeat"] < 2]
    assert figures(tmp_path / "two") == three
    floors = [
        {r.repeat: r.metrics["energy"] for r in CellStore(tmp_path / "three").all() if r.kind == k}
        for k in ("floor", "cell")
    ]
    for energies in floors:
        assert len(set(energies.values())) == 3


@pytest.mark.slow
def test_processes_give_the_bits_of_one_process(tmp_path: Path) -> None:
    run(tmp_path / "one", jobs=1)
    run(tmp_path / "two", jobs=2)
    assert figures(tmp_path / "one") == figures(tmp_path / "two")
    one, two = (sorted((tmp_path / n / "cells").glob("*.safetensors")) for n in ("one", "two"))
    assert [p.name for p in one] == [p.name for p in two]
    for a, b in zip(one, two, strict=True):
        found = load_file(a), load_file(b)
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_torn_and_foreign_files_are_computed_again(tmp_path: Path) -> None:
    run(tmp_path)
    before = figures(tmp_path)
    (tmp_path / "cells.parquet").unlink()
    files = sorted((tmp_path / "cells").glob("*.json"))
    files[0].write_text(files[0].read_text()[:40])
    files[1].write_bytes(b"\xff\xfe")
    for path in files[2:]:
        if json.loads(path.read_text())["kind"] == "cell":
            path.unlink()
    for path in (tmp_path / "cells").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:20])
    run(tmp_path)
    assert figures(tmp_path) == before


def test_a_newer_table_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / "cells.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"sde_diffusion_records_version": "99"}), path)
    with pytest.raises(ValueError, match=r"records version .*99.*update sde-diffusion"):
        run(tmp_path)


def test_records_survive_the_table(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    run(tmp_path, guidances=("none", "cfg"), scales=(2.0,), label="1")
    records = CellStore(tmp_path).all()
    odd = dataclasses.replace(records[0], key="x", label="all", status="failed", metrics={})
    write_table(tmp_path / "t.parquet", [*records, odd])
    assert read_table(tmp_path / "t.parquet") == [*records, odd]
    table = pq.read_table(tmp_path / "t.parquet")
    assert table.schema.field("metric_energy").type == "double"
    assert table.schema.field("nfe").type == "double"
    assert store.get("x") is None
    with pytest.raises(ValueError, match="not a record of a cell"):
        Record.from_dict({"version": 1, "key": "only"})


def test_a_failed_write_leaves_the_old_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path)
    before = (tmp_path / "cells.parquet").read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        run(tmp_path, budgets=(4,))
    assert (tmp_path / "cells.parquet").read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_sampler_that_raises_or_hangs_says_so_in_its_cell() -> None:
    raised = perform(task(Raises())).record
    assert (raised.status, raised.error) == ("failed", "KeyError: 'no such thing'")
    assert raised.metrics == {}
    started = time.monotonic()
    hung = perform(task(Hangs(), seconds=0.3)).record
    assert time.monotonic() - started < 5
    assert hung.status == "timeout"
    assert "--cell-timeout 0.3 s" in hung.error


def test_a_failed_cell_is_tried_again_and_its_row_has_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(found: Task, *rest: Any) -> Any:
        bad = found.kind == "cell" and found.budget == 7 and found.repeat == 1
        return perform(dataclasses.replace(found, solver=Raises()) if bad else found, *rest)

    monkeypatch.setattr(pool, "perform", failing)
    outcome = run(tmp_path, solvers=("ddim",))
    assert [row["status"] for row in outcome.folder.rows] == ["ok", "failed"]
    assert outcome.folder.rows[1]["metrics"] == {}
    assert "no such thing" in outcome.failed[0]["error"]
    monkeypatch.undo()
    assert [row["status"] for row in run(tmp_path, solvers=("ddim",)).folder.rows] == ["ok", "ok"]


@pytest.mark.slow
def test_a_process_that_dies_or_is_deaf_costs_its_own_cell_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_GRACE", 3.0)
    good = [task(budgets=(n,)) for n in (4, 5, 6)]
    bad = [
        task(Dies()),
        dataclasses.replace(task(Dies(mark=str(tmp_path / "mark"))), key="once"),
        task(HangsDeaf()),
    ]
    tasks = [dataclasses.replace(t, seconds=2.0) for t in (*good, *bad)]
    found = {
        t.key: done.record for t, done in pool.Pool(jobs=2).run([(t, None) for t in tasks], print)
    }
    assert [found[t.key].status for t in good] == ["ok"] * 3
    assert found["Dies"].status == "failed"
    assert "its process died" in found["Dies"].error
    assert found["once"].status == "ok"  # a death that does not come again
    assert found["HangsDeaf"].status == "timeout"
    assert "its process was ended" in found["HangsDeaf"].error


def test_a_batch_that_memory_does_not_hold_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*args: Any, **kwargs: Any) -> Any:
        if kwargs["shape"][0] > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(*args, **kwargs)

    sample = draw.sample
    target, sde = named_target("ring"), VPSDE()
    arguments: dict[str, Any] = {
        "event_shape": (2,),
        "ids": torch.arange(23),
        "steps": 3,
        "seed": 0,
    }

    def score(ids: torch.Tensor) -> Any:
        return target.score_fn(sde)

    machine = Machine(torch.device("cpu"))
    whole = machine.draw(score, sde, DDIM(), **arguments)
    monkeypatch.setattr(draw, "sample", short)
    halved = machine.draw(score, sde, DDIM(), **arguments)
    assert (whole.batch_size, halved.batch_size) == (23, 3)
    assert torch.equal(whole.x, halved.x)
    arguments["ids"] = torch.arange(23)
    monkeypatch.setattr(draw, "sample", lambda *a, **k: short(*a, **{**k, "shape": (6,)}))
    with pytest.raises(torch.OutOfMemoryError):
        machine.draw(score, sde, DDIM(), **arguments)


LARGER: dict[str, Any] = {"budgets": (4, 8, 16), "samples": 60, "repeats": 4}


def start(folder: Path) -> multiprocessing.process.BaseProcess:
    """A comparison in a process of its own, forked from one that has done the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_runs"])
    process = context.Process(target=run, args=(folder,), kwargs=LARGER)
    process.start()
    return process


def finished(process: multiprocessing.process.BaseProcess) -> bool:
    process.join(120)
    return process.exitcode == 0


@pytest.mark.slow
def test_killed_at_any_moment_the_rerun_gives_the_same_table(tmp_path: Path) -> None:
    assert finished(start(tmp_path / "first"))  # the server's imports are done now
    started = time.monotonic()
    assert finished(start(tmp_path / "whole"))
    length = time.monotonic() - started
    moments = random.Random(0)
    folder = tmp_path / "killed"
    kills = 0
    for _ in range(100):
        process = start(folder)
        process.join(length * moments.uniform(0.0, 0.5))
        kills += process.is_alive()
        process.kill()
        process.join()
        if (folder / "cells.parquet").exists():  # it has come to its end: from the beginning again
            shutil.rmtree(folder)
        if kills == 20:
            break
    assert kills == 20
    assert finished(start(folder))
    assert figures(folder) == figures(tmp_path / "whole")
    assert load_results(folder)["status"] == "finished"


@pytest.mark.slow
def test_two_processes_write_one_folder(tmp_path: Path) -> None:
    both = [start(tmp_path / "both") for _ in range(2)]
    assert all(finished(process) for process in both)
    assert finished(start(tmp_path / "alone"))
    assert figures(tmp_path / "both") == figures(tmp_path / "alone")
    json.loads((tmp_path / "both" / "results.json").read_text())


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_loses_no_cell(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
    ) as cluster:
        address = cluster.scheduler_address
        plan = make_plan(CompareOptions(**SMALL, out=str(tmp_path / "cluster"), scheduler=address))

        class Killing(Silent):
            killed = False

            def done(self, amount: float) -> None:
                if not self.killed:
                    self.killed = True
                    worker = next(iter(cluster.workers.values()))
                    worker.process.process._process.kill()

        progress = Killing()
        outcome = compare.run(plan, progress)
    assert progress.killed
    assert [row["status"] for row in outcome.folder.rows] == ["ok"] * 4
    run(tmp_path / "here")
    assert figures(tmp_path / "cluster") == figures(tmp_path / "here")


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"sde-diffusion\[cluster\]"):
        pool.connect("tcp://127.0.0.1:9")
