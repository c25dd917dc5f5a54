"""Charts of the report: their fronts, intervals, laws and seconds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from experiments.reporting.charts import Chart, quality_charts, undominated
from tests.reported import shown


def test_other_laws_have_charts_of_their_own() -> None:
    guided = {"guidance": "cfg", "scale": 2.0, "guided_by": "cfg γ=2"}
    ode, sde = "the guided ODE, finely solved", "the guided SDE, finely solved"
    rows = [
        shown("a", 10, 0.1, truth=ode, **guided),
        shown("b", 10, 0.5, truth=sde, **guided),
    ]
    assert len(quality_charts(rows, "nfe")) == 2


def test_the_front_is_what_nothing_beats() -> None:
    """Against the definition, pair by pair, on random points."""
    points = np.random.default_rng(0).uniform(0.1, 1, (60, 2))
    rows = [shown(f"s{i}", float(c), float(v)) for i, (c, v) in enumerate(points)]
    front = {r["spec"] for r in undominated(rows, "energy", "nfe")}
    beaten = {
        f"s{i}"
        for i, (c, v) in enumerate(points)
        if any(a <= c and b <= v and (a, b) != (c, v) for a, b in points)
    }
    assert front == {r["spec"] for r in rows} - beaten
    assert len(front) > 2


def test_intervals_stay_on_a_logarithmic_axis() -> None:
    chart: Chart = quality_charts([shown("a", 10, 0.01, 0.02), shown("a", 20, 0.02, 0.001)], "nfe")[
        0
    ]
    line = next(trace for trace in chart.figure["data"] if trace.get("meta") == "sampler")
    low = [y - d for y, d in zip(line["y"], line["error_y"]["arrayminus"], strict=True)]
    assert min(low) > 0
    assert low[1] == pytest.approx(0.018)
    assert line["error_y"]["array"] == pytest.approx([0.04, 0.002])
    ticks = chart.figure["layout"]["yaxis"]["tickvals"]
    assert [float(t) for t in chart.figure["layout"]["yaxis"]["ticktext"]] == pytest.approx(ticks)
    assert math.isclose(chart.figure["data"][0]["y"][0], 0.01)  # the front: no floor in these rows


def test_seconds_are_of_as_many_samples_whatever_a_row_has() -> None:
    few = shown("a", 10, 0.1, samples=500, seconds=0.1)
    many = shown("b", 10, 0.2, samples=2000, seconds=0.2)
    traces = quality_charts([few, many], "seconds")[0].figure["data"]
    spent = {t["name"]: t["x"] for t in traces if t.get("meta") == "sampler"}
    assert spent == {"a": [pytest.approx(0.2)], "b": [pytest.approx(0.1)]}
