"""Experiments as TOML files: read as the command line is, refused with the key and the value."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from experiments.cli import app
from experiments.experiment_file import EXPERIMENT
from experiments.planning import FILE, CompareOptions, make_plan
from experiments.records import read_table
from experiments.results import load_results

EXAMPLE = Path(__file__).parents[1] / "examples" / "compare.toml"
SMALL = ("--target", "ring", "--solver", "ddim", "--nfe", "4", "--samples", "20", "--repeats", "2")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_every_option_survives_the_file(tmp_path: Path) -> None:
    options = CompareOptions(
        targets=("ring",),
        models=('a "quoted" folder',),
        sdes=("vp", "ve"),
        solvers=("ddim:eta=0.5",),
        budgets=(4, 8),
        guidances=("none", "cfg"),
        scales=(1.0, 3.0),
        label="all",
        data="bilder/größe.npy",
        samples=12,
        repeats=5,
        seed=7,
        batch_size=3,
        device="cuda:1",
        grid="karras",
        denoise=True,
        out="somewhere",
        jobs=2,
        scheduler="tcp://host:8786",
        cell_timeout=1.5,
    )
    read = FILE.read(written(tmp_path, FILE.to_toml(options)))
    assert CompareOptions(**read) == options
    assert CompareOptions(**FILE.read(written(tmp_path, FILE.to_toml(CompareOptions())))) == (
        CompareOptions()
    )
    assert FILE.read(written(tmp_path, "[compare]\nforce = true\n")) == {"force": True}
    assert "force" not in FILE.to_toml(CompareOptions(force=True))


def test_a_class_may_be_a_number_and_a_scale_a_whole_one(tmp_path: Path) -> None:
    text = '[compare]\nlabel = 2\nscales = [1, 2.5]\nguidance = ["cfg"]\n'
    assert FILE.read(written(tmp_path, text)) == {
        "label": "2",
        "scales": (1.0, 2.5),
        "guidances": ("cfg",),
    }


def test_what_is_typed_replaces_what_the_file_says(tmp_path: Path) -> None:
    file = written(tmp_path, '[compare]\ntargets = ["moons"]\nnfe = [8]\nseed = 3\nrepeats = 9\n')
    typed = CompareOptions(targets=("ring",), budgets=(6,), repeats=3, samples=20)
    options, sources = FILE.combined(
        typed, str(file), {"target", "repeats", "samples", "experiment"}
    )
    # Of the command line only what was typed, even where that is the default (--repeats 3).
    assert options == CompareOptions(targets=("ring",), budgets=(8,), seed=3, repeats=3, samples=20)
    assert sources == {"nfe": str(file), "seed": str(file)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[compare\n", "mine.toml is not TOML: "),
        ("[compair]\n", "mine.toml: unknown table 'compair'. Did you mean 'compare'?"),
        ('targets = ["ring"]\n', "mine.toml: targets stands in no table; put a line [compare]"),
        ("compare = 3\n", "mine.toml: [compare] must be a table of keys, got 3"),
        ("[compare]\nsolvrs = []\n", "unknown key in [compare] 'solvrs'. Did you mean 'solvers'?"),
        ("[compare]\nbudgets = [3]\n", "unknown key in [compare] 'budgets'."),
        ("[compare]\nnfe = [10, 'x']\n", "[compare] nfe.1: input should be a valid integer, got"),
        ("[compare]\nseed = '3'\n", "[compare] seed: input should be a valid integer, got '3'"),
        ("[compare]\ntargets = 'ring'\n", "[compare] targets: input should be a valid "),
        ("[compare]\nsamples = 2020-01-01\n", "mine.toml: a value is of a kind that no key takes"),
        # What only the plan finds: the option's own message, after the file and the key.
        ("[compare]\ntargets = ['rnig']\n", "mine.toml, [compare] targets: unknown --target 'rni"),
        ("[compare]\nnfe = [0]\n", "mine.toml, [compare] nfe: --nfe must be at least 1, got 0"),
        ("[compare]\nbatch_size = 0\n", "[compare] batch_size: --batch-size must be at least 1"),
        ("[compare]\nscales = [3]\n", "mine.toml, [compare] scales: --scale 3 has nothing to sca"),
    ],
)
def test_wrong_files_are_refused_with_one_line(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(written(tmp_path, text))
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert message in line
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]


def test_a_mistake_typed_is_not_laid_to_the_file(tmp_path: Path) -> None:
    done = run(written(tmp_path, "[compare]\nnfe = [8]\n"), "--nfe", "0")
    assert done.stderr.strip() == "error: --nfe must be at least 1, got 0"
    gone = run(tmp_path / "gone.toml")
    assert gone.exit_code == 2
    assert "cannot be read (No such file or directory); give a TOML file" in gone.stderr


def test_the_example_runs_and_its_run_folder_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ("--samples", "20", "--repeats", "1", "--sde", "vp", "--nfe", "6", "--jobs", "1")
    done = run(EXAMPLE, *small, "--out", "a")
    assert done.exit_code == 0, done.output
    rows = load_results("a")["rows"]
    assert {row["target"] for row in rows} == {"ring", "gmm16"}
    assert {row["grid"] for row in rows} == {"karras"}
    assert len(rows) == 2 * 4
    again = run(Path("a") / EXPERIMENT, "--out", "b")
    assert again.exit_code == 0, again.output
    keys = [[r.key for r in read_table(Path(out) / "cells.parquet")] for out in ("a", "b")]
    assert keys[0] == keys[1]


def test_options_are_written_as_a_file_that_gives_the_same_plan(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    done = run(*SMALL, "--write-experiment", file)
    assert done.exit_code == 0, done.output
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]  # and nothing was run
    printed = run(file, "--write-experiment", "-")
    assert printed.stdout == file.read_text()
    assert set(tomllib.loads(printed.stdout)["compare"]) <= {
        FILE.key_of(f.name) for f in fields(CompareOptions)
    }
    typed = CompareOptions(("ring",), solvers=("ddim",), budgets=(4,), samples=20, repeats=2)
    assert make_plan(CompareOptions(**FILE.read(file))).out == make_plan(typed).out
    over = run(*SMALL, "--write-experiment", file)
    assert over.exit_code == 2
    assert "exists; name a new file, or - to print" in over.stderr
    nowhere = run(*SMALL, "--write-experiment", tmp_path / "no" / "x.toml")
    assert "cannot be written (No such file or directory)" in nowhere.stderr
    wrong = run("--nfe", "0", "--write-experiment", tmp_path / "wrong.toml")
    assert wrong.exit_code == 2
    assert not (tmp_path / "wrong.toml").exists()
