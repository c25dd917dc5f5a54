"""The accuracy benchmark's verdicts: what counts as met, from records written by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.accuracy_report import report
from benchmarks.adaptive import PEER, evaluations_at
from sde_diffusion.storage import write_json


def test_evaluations_are_read_off_the_runs_that_no_other_beats() -> None:
    """Along ``nfe = 10 / rms`` the geometric mean of two errors needs that of their counts; a run
    with more evaluations and more error than another changes nothing."""
    runs = [(1e-1, 100.0), (1e-3, 10_000.0), (2e-1, 300.0)]
    assert evaluations_at(1e-2, runs) == pytest.approx(1000)
    assert math.isnan(evaluations_at(1e-4, runs))


def test_met_and_missed(tmp_path: Path) -> None:
    name = "ring-vp-float32-10"
    write_json(tmp_path / f"{name}-theirs.json", {"A": [0.2, 0.1], "B": [0.1, 0.2], "C": None})
    write_json(tmp_path / f"{name}-ours.json", {"x @ time": [0.05, 0.3], "y @ time": [0.5, 0.12]})
    write_json(tmp_path / f"{name}-fitted.json", {"x @ fitted": [0.06, 0.1]})
    energies = {
        "ours": {"best": "s", "energies": [1.0, 2.0, 3.0]},
        "theirs": {"best": "t", "energies": [1.0, 1.0, 1.0]},
    }
    write_json(tmp_path / "ring-vp-float32-20-stochastic.json", energies)
    adaptive = {PEER: [[1e-1, 10], [1e-3, 1000]], "Pair": [[1e-1, 5], [1e-3, 900]]}
    write_json(tmp_path / "ring-vp-adaptive.json", adaptive)
    text = report(tmp_path)
    assert "| untuned RMS <= 1 | 1 of 1 | 0.50 | 0.50 | 0.50 |  |" in text
    assert "ring, vp, float32, NFE 10: 1.20 |" in text  # the medians: 0.12 of y, 0.1 of A
    assert "| fitted RMS <= 0.7 | 1 of 1 | 0.60 |" in text
    # Differences 0, 1, 2: mean 1, standard error 1 / sqrt(3).
    assert "| energy, in standard errors <= 2 | 1 of 1 | 1.73 |" in text
    # sqrt(0.5 * 0.9) at the middle, 0.9 at the end.
    assert "ring, vp, RMS 1e-03: 0.90 |" in text
    assert "| ring, vp | 0.67 Pair | **0.90** Pair | - | - |" in text


def test_an_empty_store_has_no_verdicts(tmp_path: Path) -> None:
    assert "met" in report(tmp_path)
