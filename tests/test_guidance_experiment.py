"""The guidance experiment: its judges, its intervals, and the scale at which a solver breaks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from experiments import work
from experiments.breaking import breaking_scale
from experiments.conditions import Condition
from experiments.draw import make_machine
from experiments.guidance_judging import (
    ExactGuidanceJudge,
    GuidanceJudge,
    make_guidance_judge,
    saturation,
)
from experiments.guidance_pictures import draw_guidance
from experiments.guidance_run import GuidanceOptions, make_plan, run
from experiments.judging import Cell
from experiments.metrics import paired_distances
from experiments.options import intervals
from experiments.results import load_results, results_schema
from experiments.subjects import ExactSubject, SubjectOptions, make_subjects
from solvers import ProbabilityFlow, sample

GUIDED = Condition("cfg", 4.0, "all")


class Silent:
    """No progress bar."""

    def start(self, total: float) -> None: ...

    def now(self, what: str) -> None: ...

    def done(self, amount: float) -> None: ...


def test_the_breaking_scale_is_where_the_error_crosses_the_tolerance() -> None:
    scales = [1.0, 2.0, 4.0, 8.0]
    rng = np.random.default_rng(0)
    # RMS 0.01 exp(gamma): above 0.25 from log(25) = 3.22, which lies on a line in the logarithm.
    base = rng.standard_normal(4000)
    base /= math.sqrt(float(np.mean(base**2)))
    found = breaking_scale(scales, [0.01 * math.exp(s) * base for s in scales], 0.25)
    assert found.scale == pytest.approx(math.log(25), rel=1e-9)
    assert found.low < found.scale < found.high
    # The RMS of 4,000 normal numbers has a relative deviation of 1/sqrt(8000); d gamma = d log e.
    assert (found.high - found.low) / 2 == pytest.approx(1.96 / math.sqrt(8000), rel=0.2)
    small, large = [0.1 * base] * 4, [base] * 4
    assert breaking_scale(scales, small, 0.25).scale == math.inf
    assert breaking_scale(scales, large, 0.25).scale == -math.inf
    assert breaking_scale(scales, [small[0], small[0], None, None], 0.25).scale == 4.0
    with pytest.raises(ValueError, match="increase"):
        breaking_scale([2.0, 1.0], small[:2], 0.25)


def test_an_exact_judge_tells_alignment_fidelity_diversity_and_saturation_apart() -> None:
    subject = ExactSubject("ring", ["vp"])
    judge = make_guidance_judge(subject, 800, 0, make_machine("cpu", None))
    assert isinstance(judge, ExactGuidanceJudge)
    cell = Cell("vp", GUIDED, ProbabilityFlow())
    floor = judge.floor(cell, 0)
    true = judge.true_samples(cell, 0)
    labels = GUIDED.class_of(torch.arange(800), subject.target.num_classes)
    assert floor["accuracy"] > 0.98
    assert floor["variance"] == pytest.approx(1, abs=4 * math.sqrt(2 / 800))  # of a mean square
    means = torch.stack([true[labels == c].mean(0) for c in range(subject.target.num_classes)])
    shrunk = means[labels] + 0.5 * (true - means[labels])
    narrow = judge.metrics(cell, shrunk, 0)
    assert narrow["accuracy"] >= floor["accuracy"]
    whole = judge.metrics(cell, true, 0)
    assert narrow["variance"] == pytest.approx(whole["variance"] / 4, rel=1e-4)
    assert narrow["recall"] < 0.8 * whole["recall"]
    assert narrow["energy"] > 2 * floor["energy"]
    assert whole["saturation"] == 0
    assert judge.metrics(cell, 2 * true, 0)["saturation"] > 0.2
    wrong = judge.metrics(cell, true[torch.arange(800).roll(1)], 0)
    assert wrong["accuracy"] < 0.1
    assert wrong["energy"] > 0.5  # each class at its neighbour's place
    deviation = float((true - true.mean(0)).square().sum(1).mean().sqrt())
    assert judge.deviation == pytest.approx(deviation, rel=0.05)
    assert judge.paired_metrics(torch.full((5,), judge.deviation))["relative"] == pytest.approx(1)


def test_saturation_counts_values_beyond_a_margin() -> None:
    x = torch.tensor([-1.2, -1.05, 0.0, 1.09, 1.11])
    assert saturation(x, torch.tensor(-1.0), torch.tensor(1.0)) == pytest.approx(2 / 5)


def test_an_interval_is_the_same_for_both_guidances_and_one_outside_it() -> None:
    (subject,) = make_subjects(SubjectOptions(("ring",), (), ("vp",)))
    ids = torch.arange(16)

    def end(condition: Condition) -> torch.Tensor:
        score, sde = subject.score_of("vp", condition)(ids), subject.sdes["vp"]
        settings = {"shape": (16, 2), "steps": 12, "grid": "log_snr", "dtype": torch.float64}
        return sample(score, sde, ProbabilityFlow(), **settings).x  # type: ignore[arg-type]

    inside = replace(GUIDED, interval=(0.3, 3.0))
    cfg, classifier = end(inside), end(replace(inside, guidance="classifier"))
    torch.testing.assert_close(cfg, classifier, rtol=1e-6, atol=1e-6)
    full, conditional = end(GUIDED), end(replace(GUIDED, scale=1.0))
    for guidance in ("cfg", "classifier"):
        everywhere = end(replace(GUIDED, guidance=guidance, interval=(0.0, 1e9)))
        torch.testing.assert_close(everywhere, full, rtol=1e-6, atol=1e-6)
        nowhere = end(replace(GUIDED, guidance=guidance, interval=(1e8, 1e9)))
        torch.testing.assert_close(nowhere, conditional, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(cfg, full, atol=1e-2)
    assert replace(GUIDED, scale=0.0, interval=(0.3, 3.0)).law == "guided"
    assert "interval" not in GUIDED.identity()  # cells of older runs keep their keys


def test_a_run_is_whole_stored_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = GuidanceOptions(
        targets=("ring",),
        samples=64,
        repeats=2,
        solvers=("dpm_solver_pp", "ancestral"),
        budgets=(6,),
        guidances=("cfg",),
        scales=(1.0, 8.0),
        intervals=(None, (0.3, 3.0)),
        jobs=1,
        out=str(tmp_path),
    )
    monkeypatch.setattr(ExactGuidanceJudge, "fine_steps", 60)
    outcome, lines = run(make_plan(options), Silent())
    results = load_results(tmp_path)
    jsonschema.Draft202012Validator(results_schema()).validate(results)
    assert results["experiment"] == "guidance"
    rows = {(r["spec"], r["scale"], r["interval"] is None): r for r in results["rows"]}
    assert len(rows) == 2 * 3  # at gamma 1 an interval changes nothing, and is not run
    for (solver, scale, full), row in rows.items():
        assert ("relative" in row["metrics"]) == (solver == "dpm_solver_pp")
        assert (row["breaks_at"] is None) == (solver == "ancestral")
        assert set(row["floor"]) >= {"accuracy", "energy", "recall", "saturation", "variance"}
        assert full or scale == 8
    strong, weak = rows["dpm_solver_pp", 8.0, True], rows["dpm_solver_pp", 1.0, True]
    assert strong["metrics"]["relative"]["value"] > 2 * weak["metrics"]["relative"]["value"]
    assert strong["metrics"]["energy"]["value"] > weak["metrics"]["energy"]["value"]
    assert [line.interval for line in lines] == [None, (0.3, 3.0)] * 2
    first = lines[0].breaking
    assert first is not None
    assert 1 < first.scale < 8
    assert first.low <= first.scale <= first.high
    names = [path.name for path in draw_guidance(outcome, lines)]
    assert names == ["guidance.png", "guidance_intervals.png", "guidance_samples.png"]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a cell that the folder holds was computed again")

    monkeypatch.setattr(work, "compute", never)
    again, _ = run(make_plan(options), Silent())
    assert again.folder.rows == outcome.folder.rows


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"guidances": ("none",)}, "--guidance must be classifier or cfg"),
        ({"label": "none"}, "--label none"),
        ({"tolerance": 0.0}, "--tolerance"),
        ({"samples": 8}, "--samples 8 is too few"),
        ({"targets": ("gaussian",)}, "gaussian"),
        ({"budgets": (1,), "solvers": ("probability_flow",)}, "--nfe 1 is too few"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(replace(GuidanceOptions(targets=("ring",)), **wrong))  # type: ignore[arg-type]


def test_intervals_are_read() -> None:
    assert intervals("--intervals", ["full,0.3:3", "1:10"]) == [None, (0.3, 3.0), (1.0, 10.0)]
    for text in ("3:1", "1", "a:b", "-1:2"):
        with pytest.raises(ValueError, match="--intervals must be low:high"):
            intervals("--intervals", [text])


@pytest.mark.parametrize("guidance", ["classifier", "cfg"])
def test_the_fine_solution_of_networks_is_fine(tmp_path: Path, guidance: str) -> None:
    """At the largest scale, against another method: classical Runge-Kutta, 240 evaluations."""
    options = GuidanceOptions(
        solvers=("ddim",), budgets=(8,), guidances=(guidance,), scales=(8.0,), samples=40,
        repeats=1, jobs=1, out=str(tmp_path),
    )  # fmt: skip
    plan = make_plan(options)
    (planned,) = plan.cells
    judge = plan.judge(planned)
    assert isinstance(judge, GuidanceJudge)
    subject, cell, ids = planned.subject, planned.cell, torch.arange(6)

    def solved(solver: Any, steps: int) -> torch.Tensor:
        return sample(
            subject.score_of(cell.sde, cell.condition)(ids), subject.sdes[cell.sde], solver,
            shape=(len(ids), *subject.event_shape), steps=steps, grid="log_snr", seed=0,
            sample_ids=ids,
        ).x  # fmt: skip

    with torch.no_grad():
        one = solved(judge.fine_solver, judge.fine_steps)
        other = solved(ProbabilityFlow("rk4"), 60)
    error = paired_distances(one, other).square().mean().sqrt() / judge.deviation
    # Either is off by about 1e-3; a solver breaks at 0.25, and the least error told is 0.03.
    assert float(error) < 0.005
