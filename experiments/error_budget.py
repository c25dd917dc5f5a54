"""Where a sampler's error comes from, part by part, in one unit: a run of it.

The tasks that `experiments.budget_plan` lays out are computed as a comparison's are, on the
processes of `experiments.pool`; what the run folder already holds is not computed again. The parts
are defined in `experiments.budget_parts` and docs/error-budget.md.
"""

from __future__ import annotations

from dataclasses import asdict

from experiments.budget_plan import BUDGETS, FILE, SOLVERS, BudgetOptions, BudgetPlan, make_plan
from experiments.budget_rows import BudgetOutcome, BudgetRow, BudgetRows
from experiments.cells import Task
from experiments.computing import Computer, Progress
from experiments.experiment_file import EXPERIMENT
from experiments.folders import prepare_out
from experiments.results import RunFolder, naming, write_whole
from experiments.store import CellStore
from experiments.timing import Timing
from experiments.work import Given

__all__ = [
    "BUDGETS",
    "SOLVERS",
    "BudgetOptions",
    "BudgetOutcome",
    "BudgetPlan",
    "BudgetRow",
    "make_plan",
    "run",
]

PICTURES = ("error_budget.png", "network_error.png")


def run(plan: BudgetPlan, progress: Progress, timing: Timing | None = None) -> BudgetOutcome:
    """Measure what the folder does not hold; each part is on disk as soon as it is finished.

    A row whose sampler fails says so, and the others go on.

    Args:
        timing: begun by a caller who counts what comes before and after.

    Raises:
        Interrupted: Ctrl-C.
        WriteError: a full disk; the finished cells are kept.
    """
    timing = timing or Timing()
    timing.processes = None if plan.pool.scheduler else plan.pool.jobs
    options = plan.options
    path = prepare_out(plan.out, pictures=(*PICTURES, "report.html"))
    config = {**asdict(options), "jobs": plan.pool.jobs, "sizes": {plan.subject.name: plan.samples}}
    folder = RunFolder(path, FILE.table, config, device=options.device)
    outcome = BudgetOutcome(plan, folder, CellStore(path))
    rows = BudgetRows(outcome)
    computer = Computer(outcome.store, plan.pool, progress, options.force, timing)
    shared, own = plan.shared_tasks(), plan.solver_tasks()
    progress.start(sum(map(plan.work_of, [*shared, *own])))

    def given_of(task: Task) -> Given | None:
        return outcome.store.tensors(given[task.key].key)

    with computer.keeping(folder, rows, len(plan.cells)):
        with naming(path / EXPERIMENT):
            write_whole(path / EXPERIMENT, FILE.to_toml(options))
        for task, done in computer.run(shared):
            rows.add(done.record)
            progress.done(plan.work_of(task))
        given = plan.given_tasks()
        # What has failed says so in every row that rests on it.
        for task, done in computer.run([t for t in own if rows.ok(given[t.key])], given_of):
            rows.add(done.record)
            progress.done(plan.work_of(task))
        rows.finish()
        outcome.store.write_table(rows.records())
        folder.timing = timing.as_dict()
    return outcome
