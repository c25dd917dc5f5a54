"""``AdaptiveSDE``: what ``plan=Adaptive`` gives with its pair, as a solver that has a name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from experiments.cli import app
from experiments.spec import parse_solver, spec_of
from sde_diffusion import VESDE, VPSDE, named_target
from solvers import (
    SRA1,
    Adaptive,
    AdaptiveSDE,
    BrownianPath,
    ImprovedEuler,
    RecordedNoise,
    Solver,
    sample,
)
from tests.problems import IsotropicScore, fitted_order, uniform_grid

RING = named_target("ring")


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=["vp", "ve"])
@pytest.mark.parametrize("pair", [ImprovedEuler(), SRA1()], ids=["improved_euler", "sra1"])
def test_it_is_the_pair_under_the_adaptive_plan(pair: Solver, sde: Any) -> None:
    options: dict[str, Any] = {"shape": (9, 2), "seed": 3, "sample_ids": range(5, 14)}
    solver, plan = AdaptiveSDE(pair, 0.1, 0.05), Adaptive(0.1, 0.05)
    found = sample(RING.score_fn(sde), sde, solver, **options)
    same = sample(RING.score_fn(sde), sde, pair, plan=plan, **options)
    assert torch.equal(found.x, same.x)
    assert found.nfe_per_sample is not None
    assert same.nfe_per_sample is not None
    assert torch.equal(found.nfe_per_sample, same.nfe_per_sample)
    assert (found.nfe, found.network_passes) == (same.nfe, same.network_passes)
    assert found.stats["rejected"] == same.stats["rejected"] > 0
    assert found.times.tolist() == [sde.t_max, sde.t_min]


def test_a_path_may_be_given_and_is_the_one_followed() -> None:
    """Towards the solution on that path, on 300 even steps; RMS over 40 samples goes with the
    tolerance as the pair's strong order does (1, at steps that go as tolerance^(2/3))."""
    sde = VPSDE()
    path = BrownianPath(sde, 0, depth=12)
    options: dict[str, Any] = {"shape": (40, 2), "noise": path, "dtype": torch.float64}
    fine = sample(IsotropicScore(), sde, SRA1(), grid=uniform_grid(sde, 300), **options).x
    tolerances = (0.2, 0.05, 0.0125)
    errors = []
    for tolerance in tolerances:
        solver = AdaptiveSDE(rtol=tolerance, atol=tolerance)
        end = sample(IsotropicScore(), sde, solver, **options).x
        errors.append(float((end - fine).square().mean().sqrt()))
    assert fitted_order([1 / tolerance for tolerance in tolerances], errors) > 2 / 3 - 0.15
    assert errors[-1] < 0.04


def test_noise_that_is_no_path_is_refused_before_any_work() -> None:
    noise = RecordedNoise([], initial=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="noise must be a BrownianPath"):
        sample(IsotropicScore(), VPSDE(), AdaptiveSDE(), shape=(2, 2), noise=noise)


def test_steps_that_are_too_many_are_reported() -> None:
    with pytest.raises(RuntimeError, match="max_steps=3 attempts were not enough"):
        sample(IsotropicScore(), VPSDE(), AdaptiveSDE(max_steps=3), shape=(2, 2))


def test_it_is_named_on_the_command_line(tmp_path: Path) -> None:
    text = "adaptive_sde:pair=sra1,rtol=0.1,atol=0.1"
    assert parse_solver(text) == AdaptiveSDE(SRA1(), 0.1, 0.1)
    assert spec_of(AdaptiveSDE(SRA1(), 0.1, 0.1)) == text
    command = ["compare", "--target", "ring", "--sde", "vp", "--solver", text, "--nfe", "10"]
    command += ["--samples", "40", "--repeats", "1", "--jobs", "1", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    (row,) = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert (row["status"], row["spec"], row["budget"]) == ("ok", text, None)
    assert row["nfe"] > 20
