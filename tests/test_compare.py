"""The comparison: equal evaluations, floors, guided laws, and independence of the batch size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from experiments import compare, judging
from experiments.compare import CompareOptions, make_plan
from experiments.conditions import Condition, make_conditions
from experiments.draw import make_machine
from experiments.features import FeatureSpace
from experiments.judging import Cell, ExactJudge
from experiments.results import load_results, results_schema
from experiments.subjects import ExactSubject, ModelSubject, SubjectOptions, make_subjects
from experiments.tables import comparison_tables, number
from solvers import DDIM, Ancestral, EulerMaruyama, PredictorCorrector, ProbabilityFlow


class Silent:
    """No progress bar."""

    def start(self, total: float) -> None: ...

    def now(self, what: str) -> None: ...

    def done(self, amount: float) -> None: ...


def compared(folder: Path, **options: Any) -> compare.Outcome:
    given = {"targets": ["ring"], "sdes": ["vp"], "budgets": [6, 13], "samples": 60, "repeats": 2}
    plan = make_plan(CompareOptions(**{**given, **options}, out=str(folder)))  # type: ignore[arg-type]
    return compare.run(plan, Silent())


def figures(outcome: compare.Outcome) -> list[dict[str, Any]]:
    """Rows without what the machine says."""
    clock = {"seconds", "seconds_interval", "peak_bytes", "batch_size"}
    return [{k: v for k, v in row.items() if k not in clock} for row in outcome.folder.rows]


@pytest.mark.parametrize("guidance", ["none", "cfg", "classifier"])
def test_results_are_the_same_bits_for_every_batch_size(
    tmp_path: Path, guidance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "FINE_SDE_STEPS", 20)
    monkeypatch.setattr(ExactJudge, "fine_steps", 10)
    options: dict[str, Any] = {"guidances": [guidance], "sdes": ["vp", "ve"]}
    if guidance != "none":
        options |= {"scales": [2.0], "solvers": ["ancestral", "probability_flow"], "budgets": [6]}
    runs = [
        figures(compared(tmp_path / str(size), batch_size=size, **options)) for size in (13, None)
    ]
    assert runs[0] == runs[1]


def test_rows_are_whole_fit_the_schema_and_keep_the_budget(tmp_path: Path) -> None:
    outcome = compared(tmp_path, solvers=[*compare.SOLVERS, "probability_flow:method=rk4"])
    results = load_results(tmp_path)
    jsonschema.Draft202012Validator(results_schema()).validate(results)
    assert results["status"] == "finished"
    assert len(results["rows"]) == 5 * 2
    for row in results["rows"]:
        per_step = {"predictor_corrector": 2, "probability_flow": 2}.get(row["solver"], 1)
        per_step = 4 if row["settings"].get("method") == "rk4" else per_step
        assert row["nfe"] == row["network_passes"] == row["steps"] * per_step <= row["budget"]
        assert row["nfe"] + per_step > row["budget"]  # as many steps as the budget allows
        assert row["samples"] == 120
        assert ("rms" in row["metrics"]) == (row["solver"] == "probability_flow")
        for metric in ("energy", "sliced_w2", "w2"):
            assert row["metrics"][metric]["stderr"] > 0
    floor = results["floor"]["ring"]
    assert set(floor) == {"energy", "sliced_w2", "w2"}
    assert floor["energy"]["value"] < min(
        row["metrics"]["energy"]["value"] for row in results["rows"] if row["budget"] == 6
    )
    assert [t.title for t in comparison_tables(outcome.folder.rows)]


def test_guidance_at_scale_one_is_the_conditional_and_at_zero_the_whole(tmp_path: Path) -> None:
    outcome = compared(
        tmp_path,
        guidances=["none", "cfg", "classifier"],
        scales=[0.0, 1.0, 3.0],
        label="2",
        solvers=["ancestral", "ddim"],
        budgets=[10],
        samples=200,
    )
    rows = {(r["solver"], r["guidance"], r["scale"]): r for r in outcome.folder.rows}
    truth = {key: row["truth"] for key, row in rows.items()}
    assert truth["ddim", "none", None] == truth["ddim", "cfg", 1] == "exact samples of the classes"
    assert truth["ddim", "classifier", 0] == "exact samples"
    assert truth["ddim", "cfg", 3] == "the guided ODE, finely solved"
    assert truth["ancestral", "cfg", 3] == "the guided SDE, finely solved"
    for solver in ("ancestral", "ddim"):
        energy = {key: row["metrics"]["energy"]["value"] for key, row in rows.items()}
        # The same law by three equations that are equal: up to rounding the same samples.
        assert energy[solver, "cfg", 1] == pytest.approx(energy[solver, "none", None], rel=1e-3)
        assert energy[solver, "classifier", 1] == pytest.approx(energy[solver, "cfg", 1], rel=1e-3)
        assert energy[solver, "classifier", 3] == pytest.approx(energy[solver, "cfg", 3], rel=1e-3)
    assert rows["ddim", "cfg", 3]["network_passes"] == 2 * rows["ddim", "cfg", 3]["nfe"] == 20
    assert rows["ddim", "cfg", 1]["network_passes"] == 10


def test_a_fine_solution_reaches_its_own_truth() -> None:
    """The guided SDE and the guided ODE have different laws; each solver is judged by its own."""
    subject = ExactSubject("moons", ["vp"])
    judge = ExactJudge(subject, 300, 0, make_machine("cpu", None))
    condition = Condition("cfg", 3.0, 1)
    solvers = {"ODE": (ProbabilityFlow("rk4"), 50), "SDE": (Ancestral(), 400)}
    found = {}
    for kind, (solver, steps) in solvers.items():
        x = (
            make_machine("cpu", None)
            .draw(
                subject.score_of("vp", condition),
                subject.sdes["vp"],
                solver,
                event_shape=(2,),
                ids=torch.arange(600),
                steps=steps,
                seed=5,
            )
            .x
        )
        for judged in solvers:
            cell = Cell("vp", condition, solvers[judged][0])
            values = [judge.metrics(cell, x[r * 300 :][:300], r)["energy"] for r in range(2)]
            floors = [judge.floor(cell, r)["energy"] for r in range(2)]
            found[kind, judged] = sum(values) / 2
            found["floor", judged] = sum(floors) / 2
    for kind in solvers:
        other = "SDE" if kind == "ODE" else "ODE"
        assert found[kind, kind] < 3 * found["floor", kind]
        assert found[kind, other] > 3 * found[kind, kind]


def test_labels_of_true_samples_go_through_the_classes_as_the_samples_do() -> None:
    subject = ExactSubject("ring", ["ve"])
    judge = ExactJudge(subject, 16, 0, make_machine("cpu", None))
    cell = Cell("ve", Condition(label="all"), DDIM())
    x = torch.cat([judge.true_samples(cell, repeat) for repeat in range(2)])
    angle = torch.atan2(x[:, 1], x[:, 0]).mul(4 / torch.pi).round().long() % 8
    assert angle.tolist() == [i % 8 for i in range(32)]


def test_adaptive_solvers_run_once_at_their_own_steps(tmp_path: Path) -> None:
    outcome = compared(
        tmp_path,
        solvers=["ddim", "torchdiffeq_ode:norm=batch,rtol=0.001,atol=0.001"],
        samples=20,
    )
    rows = [row for row in outcome.folder.rows if row["solver"] == "torchdiffeq_ode"]
    assert len(rows) == 1
    assert rows[0]["steps"] is None
    assert rows[0]["nfe"] > 13


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["rnig"]}, "unknown --target 'rnig'. Did you mean 'ring'"),
        ({"sdes": ["vpp"]}, "unknown --sde 'vpp'. Did you mean 'vp'"),
        ({"budgets": [0]}, "--nfe must be at least 1, got 0"),
        ({"budgets": [1]}, "--nfe 1 is too few for predictor_corrector.*at least 2"),
        ({"samples": 1}, "--samples must be at least 2"),
        ({"repeats": 0}, "--repeats must be at least 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"scales": [2.0]}, "--scale 2 has nothing to scale"),
        ({"guidances": ["cgf"]}, "unknown --guidance 'cgf'. Did you mean 'cfg'"),
        ({"guidances": ["cfg"], "scales": [float("nan")]}, "--scale must be a finite number"),
        ({"guidances": ["cfg"], "label": "8"}, r"--label must lie in 0..7 for 'ring'"),
        ({"guidances": ["cfg"], "label": "none"}, "--label none leaves --guidance cfg nothing"),
        ({"label": "two"}, "--label must be a class number"),
        ({"targets": ["gaussian"], "guidances": ["cfg"]}, "'gaussian' has a single class"),
        ({"grid": "karas"}, "unknown grid 'karas'. Did you mean 'karras'"),
        ({"device": "cuda:99"}, "--device 'cuda:99' cannot be used here"),
        ({"data": "x.npy"}, "--data is compared with a model's samples"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compared(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_an_older_run_is_written_over_and_another_folder_is_not(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    compared(mine, solvers=["ddim"], budgets=[6])
    (mine / "samples.png").write_bytes(b"old")
    compared(mine, solvers=["ancestral"], budgets=[6])
    assert [row["solver"] for row in load_results(mine)["rows"]] == ["ancestral"]
    assert not (mine / "samples.png").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"--out .* is not empty and holds no earlier run"):
        compared(other)
    assert [p.name for p in other.iterdir()] == ["thesis.tex"]


def test_default_folder_is_the_same_for_the_same_question() -> None:
    first, second = (make_plan(CompareOptions(targets=["ring"], seed=s)).out for s in (0, 1))
    assert first == make_plan(CompareOptions(targets=["ring"], batch_size=5)).out
    assert first != second
    assert first.startswith("runs/compare-ring-")


def test_conditions() -> None:
    assert make_conditions(["none"], [], None) == [Condition()]
    assert make_conditions(["none"], [], None, "all") == [Condition(label="all")]
    assert make_conditions(["none"], [], "none", "all") == [Condition()]
    assert make_conditions(["cfg"], [1, 3], "2") == [
        Condition("cfg", 1.0, 2),
        Condition("cfg", 3.0, 2),
    ]
    assert make_conditions(["cfg"], [], None) == [Condition("cfg", 1.0, "all")]


def test_family_members_have_laws_of_their_own() -> None:
    judge = ExactJudge(ExactSubject("ring", ["vp"]), 10, 0, make_machine("cpu", None))
    condition = Condition("cfg", 2.0, 1)
    keys = [
        judge.law(Cell("vp", condition, solver))
        for solver in (
            ProbabilityFlow(),
            Ancestral(eta=0.5),
            EulerMaruyama(),
            PredictorCorrector(),
        )
    ]
    assert len(set(keys)) == 3
    assert keys[2] == keys[3]


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (0.01234, 0.00042, "0.0123 ± 0.0004"),
        (0.01234, 0.0012, "0.0123 ± 0.0012"),
        (123.4, 12.0, "123 ± 12"),
        (0.5, None, "0.5"),
        (None, None, "not finite"),
        (12549.3, 404.7, "12549 ± 405"),
        (3e-7, 1e-8, "3.0e-07 ± 1e-08"),
    ],
)
def test_numbers_have_the_digits_their_errors_allow(
    value: float | None, stderr: float | None, text: str
) -> None:
    assert number(value, stderr) == text


def test_digits_are_judged_against_real_digits(tmp_path: Path) -> None:
    outcome = compared(
        tmp_path,
        targets=["digits"],
        sdes=["vp", "ve"],
        solvers=["ddim"],
        budgets=[10],
        samples=20,
        batch_size=11,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["floor"]["digits"]) == {"frechet", "accuracy"}
    for row in outcome.folder.rows:
        assert row["label"] == "all"
        assert row["metrics"]["accuracy"]["value"] > 0.8
        assert row["metrics"]["frechet"]["value"] < 100
        assert "rms" in row["metrics"]


def test_reference_in_equal_parts_is_that_of_balanced_data() -> None:
    (subject,) = make_subjects(SubjectOptions(("digits",), (), ("vp",)))
    assert isinstance(subject, ModelSubject)
    space = FeatureSpace(subject.judge, subject.data)
    assert subject.data is not None
    x, y = subject.data.train_x, subject.data.train_y
    assert y is not None
    least = int(y.bincount().min())
    balanced = torch.cat([x[y == c][:least] for c in range(10)])
    assert space.distance(balanced, "all") < 0.2
    assert space.distance(x[y == 3], 3) < 1e-3
    assert space.distance(x[y == 3], 4) > 1
    assert space.floor_size(20, "all") == 20
    assert set(space.floor(20, 2, None)) == {"frechet"}
    assert space.floor(20, 20, None) == {}  # 359 held-out digits are 17 blocks
