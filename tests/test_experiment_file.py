"""Experiments as TOML files: read as the command line is, refused with the key and the value."""

from __future__ import annotations

import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from experiments import budget_plan
from experiments.budget_plan import FILE as BUDGET
from experiments.budget_plan import BudgetOptions
from experiments.cli import app
from experiments.experiment_file import COMMANDS, EXPERIMENT, ExperimentFile
from experiments.guidance_judging import ExactGuidanceJudge
from experiments.guidance_run import FILE as GUIDANCE
from experiments.guidance_run import GuidanceOptions
from experiments.planning import FILE, CompareOptions, make_plan
from experiments.records import read_table
from experiments.results import load_results
from experiments.steps_plan import FILE as STEPS

EXAMPLES = Path(__file__).parents[1] / "examples"
EXAMPLE = EXAMPLES / "compare.toml"
SMALL = ("--target", "ring", "--solver", "ddim", "--nfe", "4", "--samples", "20", "--repeats", "2")


def run(*arguments: str | Path, command: str = "compare") -> Result:
    return CliRunner().invoke(app, [command, *map(str, arguments)])


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


def test_every_option_of_guidance_and_of_error_budget_survives_the_file(tmp_path: Path) -> None:
    guided = GuidanceOptions(
        targets=("ring",),
        scales=(1.0, 2.5),
        intervals=(None, (0.3, 3.0), (1e-3, 1 / 3)),
        tolerance=0.1,
        grid=None,
        batch_size=7,
    )
    # A grid of None has no value in TOML, and the default of guidance is a grid.
    read = GUIDANCE.read(written(tmp_path, GUIDANCE.to_toml(guided)))
    assert GuidanceOptions(**read) == replace(guided, grid="log_snr")
    budget = BudgetOptions(models=("m",), sdes=("ve",), samples=40, buckets=3, label="2", jobs=2)
    read = BUDGET.read(written(tmp_path, BUDGET.to_toml(budget)))
    assert BudgetOptions(**read) == budget
    for file, options in ((GUIDANCE, GuidanceOptions()), (BUDGET, BudgetOptions())):
        assert file.options(**file.read(written(tmp_path, file.to_toml(options)))) == options


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("guidance", "[compare]\nnfe = [8]\n", "[compare] is of another command than guidance; "),
        ("guidance", "[compare]\n[guidance]\n", "run: sde-diffusion compare "),
        ("compare", "[guidance]\n", "[guidance] is of another command than compare; run: sde-diff"),
        ("compare", "[error-budget]\n", "run: sde-diffusion error-budget "),
        ("compare", 'guidance = ["cfg"]\n', "guidance stands in no table; put a line [compare]"),
        ("error-budget", "[error_budget]\n", "table 'error_budget'. Did you mean 'error-budget'?"),
        ("error-budget", "[guidance]\n", "run: sde-diffusion guidance "),
        ("error-budget", "[error-budget]\nbuckets = 'x'\n", "[error-budget] buckets: input should"),
        ("error-budget", "[error-budget]\nbuckets = 0\n", "[error-budget] buckets: --buckets must"),
        (
            "error-budget",
            "[error-budget]\ntargets = ['rnig']\n",
            "[error-budget] targets: unknown ",
        ),
        (
            "error-budget",
            "[error-budget]\nthroughput = true\n",
            "unknown key in [error-budget] 'th",
        ),
        ("guidance", "[guidance]\nuntil_resolved = true\n", "unknown key in [guidance] 'until_re"),
        ("guidance", "[guidance]\ntolerance = 0\n", "mine.toml, [guidance] tolerance: --tolerance"),
        ("guidance", "[guidance]\nintervals = [[1, 2]]\n", "[guidance] intervals.0: input should "),
        ("guidance", "[guidance]\nintervals = ['2:1']\n", "[guidance] intervals: --intervals must"),
    ],
)
def test_a_file_is_of_the_command_that_its_table_names(
    command: str, text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(written(tmp_path, text), command=command)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.strip().splitlines()
    assert message in line
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]


def test_the_commands_that_take_files_are_those_that_are_named() -> None:
    assert {file.table for file in (FILE, STEPS, GUIDANCE, BUDGET)} == set(COMMANDS)


@pytest.mark.parametrize(
    ("command", "example", "rows"),
    [("guidance", "guidance.toml", 5), ("error-budget", "error_budget.toml", 6)],
)
def test_other_examples_run_and_their_run_folders_repeat_them(
    command: str, example: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.budget_problem.FINE_ODE_STEPS", 6)
    monkeypatch.setattr("experiments.budget_problem.FINE_SDE_STEPS", 12)
    monkeypatch.setattr(ExactGuidanceJudge, "fine_steps", 20)
    small = ["--samples", "40", "--repeats", "1", "--sde", "vp", "--jobs", "1", "--out", "a"]
    given = [EXAMPLES / example, *small, *(["--solver", "ddim"] if command == "guidance" else [])]
    given += ["--nfe", "8"] if command == "guidance" else []
    printed = run(*given, "--write-experiment", "-", command=command)
    assert printed.exit_code == 0, printed.output
    assert not list(tmp_path.iterdir())
    done = run(*given, command=command)
    assert done.exit_code == 0, done.output
    assert (Path("a") / EXPERIMENT).read_text() == printed.stdout
    assert len(load_results("a")["rows"]) == rows
    assert load_results("a")["timing"]["overhead_share"] is not None
    again = run(Path("a") / EXPERIMENT, "--out", "b", command=command)
    assert again.exit_code == 0, again.output
    keys = [[r.key for r in read_table(Path(out) / "cells.parquet")] for out in ("a", "b")]
    assert keys[0] == keys[1]


def test_the_example_of_steps_runs_and_its_run_folder_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--steps", "8,16", "--solver", "ddim", "--out", "a"]
    printed = run(EXAMPLES / "steps.toml", *few, "--write-experiment", "-", command="steps")
    assert printed.exit_code == 0, printed.output
    assert not list(tmp_path.iterdir())
    done = run(EXAMPLES / "steps.toml", *few, command="steps")
    assert done.exit_code == 0, done.output
    assert (Path("a") / EXPERIMENT).read_text() == printed.stdout
    again = run(Path("a") / EXPERIMENT, "--out", "b", command="steps")
    assert again.exit_code == 0, again.output
    a, b = ([row["metrics"] for row in load_results(out)["rows"]] for out in ("a", "b"))
    assert a == b
    assert len(a) == 2
    wrong = run(EXAMPLES / "guidance.toml", command="steps")
    assert wrong.exit_code == 2
    assert "run: sde-diffusion guidance" in wrong.output


def test_an_error_budget_of_nothing_is_of_the_ring(tmp_path: Path) -> None:
    """As on the command line: a file need not say what is the default."""
    file = written(tmp_path, "[error-budget]\nnfe = [4]\n")
    options, _ = BUDGET.combined(BudgetOptions(), str(file), ())
    assert budget_plan.make_plan(options).subject.name == "ring"


@pytest.mark.parametrize("file", [FILE, STEPS, GUIDANCE, BUDGET], ids=lambda file: file.table)
def test_a_file_has_the_defaults_of_the_command_line(file: ExperimentFile[Any]) -> None:
    printed = run("--write-experiment", "-", command=file.table)
    assert printed.exit_code == 0, printed.output
    assert printed.stdout == file.to_toml(file.options())
