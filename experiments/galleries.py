"""The pictures of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.compare import Outcome, PlannedCell
from experiments.conditions import Condition
from experiments.judging import Cell, ExactJudge, Judge
from experiments.pictures import SampleGroup, samples_figure
from experiments.plots import quality_vs_nfe, quality_vs_seconds
from experiments.spec import spec_of
from experiments.tables import number

SHOWN_SAMPLES = 600
SHOWN_BUDGET = 20  # few enough evaluations for samplers to differ visibly
_TITLES = {"vp": "VP", "ve": "VE", "subvp": "sub-VP", "cosine": "cosine VP", "edm": "EDM"}


def draw_pictures(outcome: Outcome) -> list[Path]:
    """quality_vs_nfe.png, quality_vs_seconds.png and samples.png, in the run's folder."""
    folder, rows = outcome.folder.path, outcome.folder.rows
    paths = [folder / name for name in ("quality_vs_nfe.png", "quality_vs_seconds.png")]
    panels = _panel_rows(rows)
    floor = {row["target"]: row["floor"] for row in reversed(panels)}
    primary = {row["target"]: row["primary"] for row in panels}
    quality_vs_nfe(paths[0], panels, floor, metrics=primary)
    quality_vs_seconds(paths[1], panels, floor, metrics=primary)
    paths.append(folder / "samples.png")
    samples_figure(paths[2], _groups(outcome))
    return paths


def _panel_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for the curves: where a target was guided in several ways, a panel for each."""
    shown = []
    for row in rows:
        alike = [r for r in rows if r["target"] == row["target"]]
        target = row["target"]
        if len({r["guided_by"] for r in alike}) > 1:
            target += f", {row['guided_by']}"
        if "finely" in row["truth"]:  # the guided ODE and SDE have different laws, and floors
            target += " (ODE)" if "ODE" in row["truth"] else " (SDE)"
        plain = {"guidance": "none", "scale": None, "solver_label": row["spec"]}
        shown.append({**row, **plain, "target": target})
    return shown


def _groups(outcome: Outcome) -> list[SampleGroup]:
    budget = _shown_budget([planned.budget for planned in outcome.finished])
    pairs = zip(outcome.finished, outcome.folder.rows, strict=True)
    shown = [(p, r) for p, r in pairs if p.budget in (None, budget)]
    groups = []
    for key in dict.fromkeys(_key(planned, row) for planned, row in shown):
        here = [(p, r) for p, r in shown if _key(p, r) == key]
        samples = {spec_of(p.cell.solver): outcome.samples(p, SHOWN_SAMPLES) for p, _ in here}
        panels = {spec: x for spec, x in samples.items() if x is not None}
        if not panels:
            continue
        planned = here[0][0]
        condition = str(planned.cell.condition)
        name = planned.subject.name
        judge = outcome.plan.judge(planned)
        density = judge.density(planned.cell) if isinstance(judge, ExactJudge) else None
        sde = _TITLES.get(planned.cell.sde, planned.cell.sde)
        title = f"{name} · {sde}"
        if budget is not None:
            title += f", {budget} evaluations"
        if condition:
            title += f", {condition}"
        groups.append(
            SampleGroup(
                title=title,
                panels=panels,
                truth=_true_samples(outcome, planned),
                density=None
                if density is None or planned.subject.event_shape != (2,)
                else density.log_prob,
                notes={spec_of(p.cell.solver): _note(r) for p, r in here},
                truth_name=_truth_name(judge, planned.cell),
            )
        )
    return groups


def _true_samples(outcome: Outcome, planned: PlannedCell) -> Tensor | None:
    judge, found, count = outcome.plan.judge(planned), [], 0
    for repeat in range(outcome.plan.options.repeats):
        x = judge.true_samples(planned.cell, repeat) if count < SHOWN_SAMPLES else None
        if x is not None:
            found.append(x)
            count += len(x)
    return torch.cat(found)[:SHOWN_SAMPLES] if found else None


def _key(planned: PlannedCell, row: Mapping[str, Any]) -> tuple[str, str, Condition, str]:
    return planned.subject.name, planned.cell.sde, planned.cell.condition, row["truth"]


def _shown_budget(budgets: Sequence[int | None]) -> int | None:
    known = sorted({budget for budget in budgets if budget is not None})
    if not known:
        return None
    enough = [budget for budget in known if budget >= SHOWN_BUDGET]
    return enough[0] if enough else known[-1]


def _truth_name(judge: Judge, cell: Cell) -> str:
    if not isinstance(judge, ExactJudge):
        return "held-out data"
    return "the same, finely solved" if cell.condition.law == "guided" else "true samples"


def _note(row: Mapping[str, Any]) -> str:
    found = row["metrics"].get(row["primary"])
    if found is None:
        return ""
    own = f" @ {row['nfe']:.4g}" if row["budget"] is None else ""
    return f"{row['primary']} {number(**found)}{own}"
