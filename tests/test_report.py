"""The report's page by an HTML parser: everything in it, nothing fetched, nothing injected."""

from __future__ import annotations

import json
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
from experiments.reporting.budgets import budget_charts, largest_table
from experiments.reporting.contents import verdicts
from experiments.reporting.page import render, write_report
from experiments.reporting.scales import breaks_table
from experiments.reporting.slopes import slope_charts, slope_table
from experiments.reporting.sources import load_source
from experiments.runs import Run, load_run
from tests.reported import shown
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
    for one in run.rows:
        assert repr(float(one["metrics"]["energy"]["value"])) in values
    # Rows of the table have a status at their end; those of the advice's evidence have none.
    assert len([r for r in rows if r[2][0].rstrip().endswith("ok")]) == len(run.rows)
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
    changed = Run(tmp_path, {**run.results, "rows": run.rows}, {})
    parsed = Page(render(changed, trajectories=False))
    ids = {attributes["id"] for attributes, _ in parsed.all("section")}
    assert "orders" in ids
    assert "denoising" not in ids
    assert "1.99" in parsed.all("section", id="orders")[0][1]
    # A folder of orders alone, too; and on the page of another run.
    alone = {**orders, "experiment": "orders", "command": "orders", "started": "", "config": {},
             "status": "finished", "environment": run.results["environment"]}  # fmt: skip
    (tmp_path / "orders.json").write_text(json.dumps(alone))
    certificates = load_source(tmp_path)
    for text in (render(certificates), render(run, more=[certificates], trajectories=False)):
        parsed = Page(text)
        assert "1.99" in parsed.all("section", id="orders")[0][1]
        assert parsed.all("code")[0][1] in ("orders", run.results["command"])
    alone_page = Page(render(certificates))
    assert not alone_page.all("section", id="table")
    assert "1 certified, all pass." in alone_page.all("section", id="summary")[0][1]


def test_an_error_budget_is_stacked_and_its_largest_part_named() -> None:
    parts = {
        "discretisation": {"value": 0.2, "interval": [0.1, 0.3], "resolved": True},
        "truncation": {"value": 0.1, "interval": [0.0, 0.15], "resolved": False},
        "total": {"value": 0.25, "interval": [0.2, 0.26], "resolved": True},
        "floor": {"value": 0.05, "interval": None, "resolved": True},
    }
    rows = [shown("a", nfe, 0.1, parts=parts) for nfe in (10, 20)]
    *bars, total = budget_charts(rows)[0].figure["data"]
    assert {bar["name"]: bar["x"] for bar in bars} == {
        "truncation at t_min": [0.1, 0.1],
        "discretisation": [0.2, 0.2],
        "Monte Carlo (floor)": [0.05, 0.05],
    }
    assert total["x"] == [0.25, 0.25]
    assert total["error_x"]["array"] == pytest.approx([0.01, 0.01])
    assert total["error_x"]["arrayminus"] == pytest.approx([0.05, 0.05])
    first = largest_table(rows)["rows"][0]
    assert first[-3:] == ["discretisation", "0.2 (0.1–0.3)", "0.25 (0.2–0.26)"]
    assert budget_charts([shown("a", 10, 0.1)]) == []


def test_slopes_have_their_law_and_their_order() -> None:
    law = {
        "order": 2.0, "order_low": 1.9, "order_high": 2.1, "first": 8, "last": 32, "constant": 3.0,
        "wanted": [{"error": 1e-3, "nfe": 54.8, "low": 50.0, "high": None, "how": "extrapolated"}],
    }  # fmt: skip
    rows = [
        row(steps=n, metrics={"error": {"value": 3.0 / n**2, "stderr": None}}, spec="heun",
            declared_order=2, law=law)
        for n in (8, 16, 32)
    ]  # fmt: skip
    line, points = slope_charts(rows)[0].figure["data"]
    # The law goes through the points: 3 n^-2 at both ends.
    assert line["x"] == [8, 32]
    assert line["y"] == pytest.approx([points["y"][0], points["y"][-1]])
    table = slope_table(rows)
    assert table["heads"][-1] == "NFE for 0.001"
    assert table["rows"] == [
        ["ring · VP", "heun", "2", "2.00 (1.90–2.10)", "8–32", "55* (50–never)"]
    ]


def test_breaking_scales_are_in_the_words_of_the_console() -> None:
    def at(scale: float, interval: Any, value: Any, side: str) -> Any:
        ends = {"scale": value, "low": value, "high": value}
        sides = {f"{key}_side": side for key in ends}
        return shown("ddim", 8, 0.1, guidance="cfg", scale=scale, interval=interval,
                     breaks_at={**ends, **sides})  # fmt: skip

    rows = [
        at(1.0, None, 2.5, "within"), at(4.0, None, 2.5, "within"),
        at(4.0, [0.3, 3.0], None, "above"),
    ]  # fmt: skip
    assert breaks_table(rows)["rows"] == [
        ["ring · VP · cfg", "ddim", "2.5 (2.5–2.5)"],
        ["ring · VP · cfg in σ/α 0.3–3", "ddim", "> 4"],
    ]


@pytest.mark.parametrize(
    ("arguments", "sections"),
    [
        ("steps --sde vp --solver ddim --steps 4,8,16", {"table", "slopes"}),
        (
            "error-budget --sde vp --nfe 4 --solver ddim --samples 20 --repeats 2",
            {"table", "budget", "samples"},
        ),
        (
            "guidance --target ring --solver ddim --nfe 4 --scale 1,2 --samples 40 --jobs 1",
            {"table", "nfe", "seconds", "scales", "samples", "denoising"},
        ),
        ("orders --quick --solver ddim", {"orders"}),
    ],
)
def test_every_experiment_has_a_page(tmp_path: Path, arguments: str, sections: set[str]) -> None:
    runner = CliRunner()
    done = runner.invoke(app, [*arguments.split(), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    done = runner.invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    parsed = Page((tmp_path / page.PAGE).read_text(encoding="utf-8"))
    found = {attributes["id"] for attributes, _ in parsed.all("section")}
    assert found == {"summary", "environment"} | sections
    assert not parsed.all("p", **{"class": "warning"})


def test_a_recipe_says_what_came_nearest() -> None:
    given = {"floor": {"energy": {"value": 0.05, "stderr": None}}, "seed": 0}
    rows = [shown("a", 10, 0.2, **given), shown("b", 10, 0.1, **given)]
    (line,) = verdicts("recipe", rows, Path())
    words = "ring, nearest to the data by Energy distance (squared): b · NFE 10, 0.100 ± 0.010"
    assert line.startswith(words)
    assert line.endswith("; true samples: 0.05.")


def test_other_folders_name_what_can_be_reported(tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["sample", "-n", "4", "--nfe", "2", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    wrong = runner.invoke(app, ["report", str(tmp_path)])
    assert wrong.exit_code == 2
    words = " ".join(wrong.output.split())
    assert "is of sde-diffusion sample, which has no report: its figures are in" in words
    assert "compare, guidance, steps, error-budget, recipe or orders" in words


def test_the_advice_is_that_of_the_console(tmp_path: Path) -> None:
    arguments = (
        "compare --target ring --sde vp,ve --solver ddim --solver euler_maruyama --nfe 4,8,32 "
        "--samples 400 --repeats 4 --jobs 1"
    ).replace("vp,ve", "vp --sde ve")
    runner = CliRunner()
    done = runner.invoke(app, [*arguments.split(), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    said = re.search(r"ring · vp: .*?(?=wrote )", done.output, re.DOTALL)
    assert said is not None
    assert " use " in said[0]  # something was resolved
    parsed = Page(render(load_run(tmp_path), trajectories=False))
    lines = [text for name, found, (text,) in parsed.elements
             if name == "p" and found.get("class", "").startswith("line")]  # fmt: skip
    assert " ".join(" ".join(lines).split()) == " ".join(said[0].split())
    # The table is after the advice, and evidence stands below it.
    ids = [attributes["id"] for attributes, _ in parsed.all("section")]
    assert ids[:2] == ["summary", "table"]
    assert parsed.all("summary")[0][1] == "Evidence"


def test_what_cannot_be_sampled_again_isverdicts(run: Run) -> None:
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
        ([str(run.path), "--with", str(run.path)], "of which nothing stands on another run's page"),
        ([str(run.path), "--out", str(tmp_path / "no" / "page.html")], "there is no folder"),
    ):
        wrong = runner.invoke(app, ["report", *arguments])
        assert wrong.exit_code == 2
        assert words in " ".join(wrong.output.split())
