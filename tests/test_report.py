"""The report's page by an HTML parser: everything in it, nothing fetched, nothing injected."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from experiments import compare
from experiments.cli import app
from experiments.compare import CompareOptions, make_plan
from experiments.merging import merge
from experiments.reporting import page, pictures
from experiments.reporting.charts import Chart, budget_charts, quality_charts
from experiments.reporting.findings import best_samplers, pareto
from experiments.reporting.page import render, write_report
from experiments.runs import Run, load_run
from tests.test_compare import Silent
from tests.test_plots import row

pytest.importorskip("plotly", reason="the report needs the extra report")


class Page(HTMLParser):
    """Elements with their attributes and text."""

    VOID = ("meta", "link", "img", "input", "br", "line", "rect", "circle", "path")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open[0][0]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, {name: value or "" for name, value in attrs}, [""])
        self.elements.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element[2][0] += data

    def all(self, tag: str, **attributes: str) -> list[tuple[dict[str, str], str]]:
        return [
            (found, text[0])
            for name, found, text in self.elements
            if name == tag and all(found.get(key) == value for key, value in attributes.items())
        ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run") / "a"
    options = CompareOptions(
        targets=("ring",),
        sdes=("vp", "ve"),
        solvers=("ancestral", "ddim"),
        budgets=(4, 8),
        samples=40,
        repeats=2,
        out=str(folder),
    )
    compare.run(make_plan(options), Silent())
    return load_run(folder)


@pytest.fixture(scope="module")
def text(run: Run) -> str:
    return render(run)


def figures(parsed: Page) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(parsed.all("script", id="data")[0][1])
    return found


def test_every_row_and_figure_is_on_the_page(run: Run, text: str) -> None:
    parsed = Page(text)
    rows = [element for element in parsed.elements if element[0] == "tr"]
    values = [attributes["data-value"] for attributes, _ in parsed.all("td", **{"class": "number"})]
    for shown in run.rows:
        assert repr(float(shown["metrics"]["energy"]["value"])) in values
    assert len([r for r in rows if "ancestral" in r[2][0] or "ddim" in r[2][0]]) == len(run.rows)
    assert parsed.all("code", id="command")[0][1] == run.results["command"]
    assert run.results["environment"]["versions"]["torch"] in text
    anchors = {attributes["href"][1:] for attributes, _ in parsed.all("a")}
    assert anchors <= {attributes.get("id") for _, attributes, _ in parsed.elements}
    known = figures(parsed)
    plots = [attributes["data-figure"] for attributes, _ in parsed.all("div", **{"class": "plot"})]
    # Two SDEs against evaluations and seconds, two samplers and the truth on each SDE, a slider.
    assert len(plots) == len(set(plots)) == 2 * 2 + 2 * 3 + 1
    assert set(plots) < set(known)


def test_nothing_is_fetched(text: str) -> None:
    parsed = Page(text)
    for name, attributes, _ in parsed.elements:
        for key in ("src", "href", "srcset", "data", "action"):
            given = attributes.get(key, "")
            assert given == "" or given.startswith(("#", "data:")), (name, given)
    policy = parsed.all("meta", **{"http-equiv": "Content-Security-Policy"})[0][0]["content"]
    assert policy.startswith("default-src 'none'")
    assert text.count("<script") == 3 + text.split("<script>")[1].count("<script")
    style = parsed.all("style")[0][1]
    assert "url(" not in style
    assert "@import" not in style


def test_plotly_knows_every_key_of_the_figures(text: str) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects")
    for figure in figures(Page(text)).values():
        if "layout" in figure:
            plain = re.sub(r'"@\w+"', '"#000000"', json.dumps(figure))
            graph_objects.Figure(json.loads(plain))  # raises for a key or value it does not know


def test_the_slider_ends_where_the_run_ended(run: Run, text: str) -> None:
    """The trajectory computed anew arrives at the kept samples of the same cell."""
    parsed = Page(text)
    journey = parsed.all("figure", **{"class": "card journey"})[0][0]
    found = figures(parsed)[journey["data-frames"]]
    sde, name = re.search(r"· (\S+) · (\w+), 8 evaluations", found["title"]).groups()  # type: ignore[union-attr]
    shown = next(
        r
        for r in run.rows
        if (r["sde"], r["spec"], r["budget"]) == (sde.lower(), name, 8)
    )  # fmt: skip
    kept = pictures.CellStore(run.path).tensors(shown["cells"][0])
    assert kept is not None
    # To the four digits on the page.
    assert found["frames"][-1]["x"] == pytest.approx(kept["x"][:, 0].tolist(), rel=1e-3)
    assert len(found["frames"]) == len(found["moments"]) == 9
    slider = parsed.all("input", type="range")[0][0]
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "8", "8")


def test_names_and_messages_cannot_become_markup(run: Run) -> None:
    evil = '</script><img src="http://x/" onerror="alert(1)">'
    rows = [{**r, "target": evil, "status": "failed", "error": evil} for r in run.rows]
    text = render(replace(run, results={**run.results, "rows": rows, "command": evil}))
    assert evil not in text
    assert not [a for a, _ in Page(text).all("img") if "http" in a.get("src", "")]
    assert any(evil in t for _, t in Page(text).all("li"))  # shown as it is


def test_certificates_and_error_budgets_are_shown_where_there_are_some(
    run: Run, tmp_path: Path
) -> None:
    check = {"name": "order", "declared": "2", "measured": "1.99", "passed": True}
    certificate = {
        "name": "heun", "kind": "ODE", "order": 2.0, "checks": [check], "passed": True,
    }  # fmt: skip
    orders = {"passed": True, "certificates": [certificate]}
    (tmp_path / "orders.json").write_text(json.dumps(orders))
    budget = {"discretisation": {"value": 0.2, "stderr": 0.1}, "score": {"value": 0.1}}
    rows = [{**r, "error_budget": budget} for r in run.rows]
    changed = Run(tmp_path, {**run.results, "rows": rows}, {})
    parsed = Page(render(changed, trajectories=False))
    ids = {attributes["id"] for attributes, _ in parsed.all("section")}
    assert {"orders", "budget"} <= ids
    assert "denoising" not in ids
    assert "1.99" in parsed.all("section", id="orders")[0][1]
    bars = budget_charts(rows)[0].figure["data"]
    assert [bar["name"] for bar in bars] == ["discretisation (solver)", "score error (network)"]
    assert all(bar["x"] == [value] * 4 for bar, value in zip(bars, (0.2, 0.1), strict=True))


def test_what_cannot_be_sampled_again_is_said(run: Run) -> None:
    config = {**run.results["config"], "targets": [], "models": ["/no/such/model"]}
    text = render(replace(run, results={**run.results, "config": config}))
    said = [t for _, t in Page(text).all("p", **{"class": "warning"})]
    assert len(said) == 1
    assert "/no/such/model" in said[0]


def test_merged_and_old_runs_have_reports(run: Run, tmp_path: Path) -> None:
    more = tmp_path / "more"
    options = {**run.results["config"], "seed": 3, "out": str(more)}
    known = {k: v for k, v in options.items() if k in CompareOptions.__dataclass_fields__}
    compare.run(make_plan(CompareOptions(**known)), Silent())
    merged = load_run(merge(run, load_run(more), str(tmp_path / "m"), "merge"))
    assert len(Page(render(merged)).all("figure", **{"class": "card journey"})) == 1
    since = ("cells", "error", "peak_bytes", "batch_size", "status")
    rows = [{k: v for k, v in r.items() if k not in since} for r in run.rows]
    (tmp_path / "results.json").write_text(
        json.dumps({**run.results, "schema_version": 1, "rows": rows})
    )
    parsed = Page(render(load_run(tmp_path), trajectories=False))
    assert len(parsed.all("div", **{"class": "plot"})) == 4  # the curves; samples were not kept


def test_the_page_is_whole_or_not_there(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "page.html"
    out.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("experiments.results.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(run, str(out), trajectories=False)
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert out.read_text() == "old"


def test_the_command_writes_it_and_names_mistakes(run: Run, tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["report", str(run.path), "--no-trajectories"])
    assert done.exit_code == 0, done.output
    assert (run.path / page.PAGE).read_text(encoding="utf-8").startswith("<!doctype html>")
    for arguments, words in (
        ([str(tmp_path)], "no results at"),
        ([str(run.path), "--out", str(tmp_path)], "is a folder"),
        ([str(run.path), "--out", str(tmp_path / "no" / "page.html")], "there is no folder"),
    ):
        wrong = runner.invoke(app, ["report", *arguments])
        assert wrong.exit_code == 2
        assert words in wrong.output


def shown(solver: str, nfe: int, value: float, stderr: float | None = 0.01, **more: Any) -> Any:
    metrics = {"energy": {"value": value, "stderr": stderr}}
    given = {"nfe": nfe, "budget": nfe, "spec": solver, "primary": "energy", "truth": "exact"}
    return row(solver=solver, metrics=metrics, **{**given, **more})


def test_the_best_is_named_only_where_it_is_resolved() -> None:
    rows = [
        shown("a", 10, 0.10), shown("b", 10, 0.14),  # apart by 0.04, noise 0.0141
        shown("a", 20, 0.05), shown("b", 20, 0.07), shown("c", 20, 0.5),  # a, b by 0.02
        shown("a", 40, 0.01, None), shown("b", 40, 0.9, None),  # one repeat: noise unknown
        shown("a", 80, 0.01),
    ]  # fmt: skip
    ten, twenty, forty = best_samplers(rows)
    assert (ten.resolved, ten.best.split(",")[0]) == (True, "a")
    assert (twenty.resolved, twenty.ties) == (False, ("b",))
    assert (forty.resolved, forty.ties) == (False, ("b",))


def test_other_laws_are_not_ranked_together() -> None:
    guided = {"guidance": "cfg", "scale": 2.0, "guided_by": "cfg γ=2"}
    ode, sde = "the guided ODE, finely solved", "the guided SDE, finely solved"
    rows = [
        shown("a", 10, 0.1, truth=ode, **guided),
        shown("b", 10, 0.5, truth=sde, **guided),
    ]
    assert best_samplers(rows) == []
    assert len(quality_charts(rows, "nfe")) == 2


def test_the_front_is_what_nothing_beats() -> None:
    """Against the definition, pair by pair, on random points."""
    import numpy as np

    points = np.random.default_rng(0).uniform(0.1, 1, (60, 2))
    rows = [shown(f"s{i}", float(c), float(v)) for i, (c, v) in enumerate(points)]
    front = {r["spec"] for r in pareto(rows, "energy", lambda r: float(r["nfe"]))}
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
