"""The pictures of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.canvas import in_order
from experiments.compare import Kept, Outcome
from experiments.judging import ExactJudge
from experiments.pictures import SampleGroup, samples_figure
from experiments.plots import quality_vs_nfe, quality_vs_seconds
from experiments.spec import spec_of
from experiments.tables import number

SHOWN_BUDGET = 20  # few enough evaluations for samplers to differ visibly
_TITLES = {"vp": "VP", "ve": "VE", "subvp": "sub-VP", "cosine": "cosine VP", "edm": "EDM"}


def draw_pictures(outcome: Outcome) -> list[Path]:
    """quality_vs_nfe.png, quality_vs_seconds.png and samples.png, in the run's folder."""
    folder, rows = outcome.folder.path, outcome.folder.rows
    floor = outcome.folder.floor
    paths = [folder / name for name in ("quality_vs_nfe.png", "quality_vs_seconds.png")]
    primary = {row["target"]: row["primary"] for row in rows}
    quality_vs_nfe(paths[0], rows, floor, metrics=primary)
    quality_vs_seconds(paths[1], rows, floor, metrics=primary)
    paths.append(folder / "samples.png")
    samples_figure(paths[2], _groups(outcome))
    return paths


def _groups(outcome: Outcome) -> list[SampleGroup]:
    budget = _shown_budget([kept.planned.budget for kept in outcome.kept])
    pairs = list(zip(outcome.kept, outcome.folder.rows, strict=False))
    shown = [(k, r) for k, r in pairs if k.planned.budget in (None, budget)]
    keys = in_order([_key(kept) for kept, _ in shown])
    groups = []
    for key in keys:
        here = [(k, r) for k, r in shown if _key(k) == key]
        planned = here[0][0].planned
        condition = str(planned.cell.condition)
        name = planned.subject.name
        judge = outcome.judges[name]
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
                panels={spec_of(k.planned.cell.solver): k.x for k, _ in here},
                truth=outcome.truths.get((name, planned.cell.condition)),
                density=None
                if density is None or planned.subject.event_shape != (2,)
                else density.log_prob,
                notes={spec_of(k.planned.cell.solver): _note(r) for k, r in here},
                truth_name="true samples" if isinstance(judge, ExactJudge) else "held-out data",
            )
        )
    return groups


def _key(kept: Kept) -> str:
    planned = kept.planned
    return f"{planned.subject.name}|{planned.cell.sde}|{planned.cell.condition}"


def _shown_budget(budgets: Sequence[int | None]) -> int | None:
    known = sorted({budget for budget in budgets if budget is not None})
    if not known:
        return None
    enough = [budget for budget in known if budget >= SHOWN_BUDGET]
    return enough[0] if enough else known[-1]


def _note(row: Mapping[str, Any]) -> str:
    found = row["metrics"].get(row["primary"])
    if found is None:
        return ""
    own = f" @ {row['nfe']:.4g}" if row["budget"] is None else ""
    return f"{row['primary']} {number(**found)}{own}"
