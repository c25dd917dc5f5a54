"""docs/results.md names every key and column that is written, and its readers run."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from experiments import compare
from experiments.compare import CompareOptions, make_plan
from experiments.metrics import METRICS
from experiments.records import RECORDS_VERSION, Record
from experiments.results import SCHEMA_VERSION, load_results, results_schema
from tests.test_compare import Silent

TEXT = (Path(__file__).parent.parent / "docs" / "results.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The place of runs/mine."""
    top = tmp_path_factory.mktemp("documented")
    options: dict[str, Any] = {
        "targets": ("ring",),
        "sdes": ("vp",),
        "solvers": ("ddim",),
        "budgets": (3,),
        "samples": 10,
        "repeats": 2,
    }
    compare.run(make_plan(CompareOptions(**options, out=str(top / "runs" / "mine"))), Silent())
    return top


def names(section: str) -> set[str]:
    """What stands in backticks in the first column of a section's tables."""
    part = TEXT.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    firsts = [line.split("|")[1] for line in part.splitlines() if line.startswith("| ")]
    return {name for first in firsts for name in re.findall(r"`(\w+)`", first)}


def test_every_key_of_results_is_explained(folder: Path) -> None:
    results = load_results(folder / "runs" / "mine")
    known = names("results.json")
    assert set(results) <= known
    assert set(results["rows"][0]) <= known
    schema = results_schema()
    assert set(schema["properties"]) | set(schema["$defs"]["row"]["properties"]) <= known
    assert set(METRICS) - {"error"} <= known
    environment = schema["properties"]["environment"]["required"]
    assert all(f"`{name}`" in TEXT for name in environment)


def test_every_column_of_cells_is_explained() -> None:
    columns = {field.name for field in dataclasses.fields(Record)} - {"metrics"}
    assert columns | {"metric_NAME"} == names("cells.parquet")


def test_the_versions_are_this_programs() -> None:
    assert f"Version {SCHEMA_VERSION}." in TEXT
    assert f"Records version {RECORDS_VERSION}," in TEXT
    assert f"| results {SCHEMA_VERSION} |" in TEXT


@pytest.mark.parametrize("library", ["pandas", "polars", "duckdb"])
def test_the_readers_run(
    library: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(library)
    monkeypatch.chdir(folder)
    (block,) = [block for block in BLOCKS if f"import {library}" in block]
    exec(compile(block, "docs/results.md", "exec"), {})
    assert "ddim" in capsys.readouterr().out
