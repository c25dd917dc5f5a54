"""What ``sde-diffusion error-budget`` does, and what it prints."""

from __future__ import annotations

import time

from experiments import error_budget
from experiments.budget_pictures import budget_bars, budget_tables, network_curves
from experiments.progress import ProgressBar
from experiments.tables import make_console, wrote


def run_error_budget(options: error_budget.BudgetOptions) -> None:
    """Measure, draw and print."""
    started = time.monotonic()
    plan = error_budget.make_plan(options)
    bars, curves = error_budget.PICTURES
    with ProgressBar() as progress:
        outcome = error_budget.run(plan, progress)
        progress.now("pictures")
        path = outcome.folder.path
        budget_bars(path / bars, plan.problems[0].name, outcome.rows)
        files = ["results.json", bars]
        if outcome.networks and outcome.networks[0].loss:
            network_curves(path / curves, outcome.networks[0])
            files.append(curves)
    console = make_console()
    for table in budget_tables(outcome):
        console.print(table)
    wrote(console, path, files, started)
