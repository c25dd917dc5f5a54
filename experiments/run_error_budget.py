"""What ``sde-diffusion error-budget`` does, and what it prints."""

from __future__ import annotations

from rich.text import Text

from experiments import error_budget
from experiments.budget_pictures import budget_bars, budget_tables, network_curves
from experiments.budget_plan import FILE
from experiments.progress import ProgressBar
from experiments.tables import make_console, wrote
from experiments.timing import Timing


def run_error_budget(
    options: error_budget.BudgetOptions, write_to: str | None = None, timing: Timing | None = None
) -> int:
    """Measure, draw and print; how many rows and curves failed.

    Args:
        write_to: only check the options and write them to this experiment file; ``-``: print it.
        timing: begun where the command began.
    """
    timing = timing or Timing()
    plan = error_budget.make_plan(options)
    if write_to is not None:
        FILE.put(options, write_to)
        return 0
    bars, curves = error_budget.PICTURES
    with ProgressBar() as progress:
        outcome = error_budget.run(plan, progress, timing)
        progress.now("pictures")
        path = outcome.folder.path
        files = ["results.json", "cells.parquet"]
        if len(outcome.failed) < len(outcome.rows):
            budget_bars(path / bars, plan.subject.name, outcome.rows)
            files.append(bars)
        if outcome.networks:
            network_curves(path / curves, outcome.networks[0])
            files.append(curves)
    outcome.folder.timing = timing.as_dict()
    outcome.folder.write()
    console = make_console()
    for table in budget_tables(outcome):
        console.print(table)
    failures = [(row.status, f"{row.planned}: {row.error}") for row in outcome.failed]
    failures += [("failed", words) for words in outcome.problems]
    for status, words in failures:
        console.print(Text.assemble((f"{status}: ", "red"), words))
    wrote(console, path, files, timing.started)
    return len(failures)
