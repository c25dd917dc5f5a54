"""The table that ``sde-diffusion likelihood`` prints."""

from __future__ import annotations

import math

from rich import box
from rich.table import Table

from experiments.likelihood import RESULTS, TABLE, LikelihoodPlan, Measured
from experiments.spec import spec_of
from experiments.tables import make_console, number

_ROWS = (
    ("log likelihood", "log p(x)", "nats, of the ODE's law at t_min"),
    ("truth", "true log p(x)", "nats, of clean data"),
    ("absolute error", "|error|", "nats, mean over samples"),
    ("bits per dim", "bits/dim", "of the raw levels, dequantised: an upper bound"),
    ("vlb", "L_vlb", "bits/dim of the raw levels: the discrete chain's bound"),
    ("bound", "-log p ≤", "nats, likelihood-weighting bound on the SDE's law, same data"),
    ("truncation", "truncation", "nats, log p at t_min above clean data's; estimate"),
    ("prior mismatch", "prior", "nats, to add for the true law at t_max; estimate"),
    ("probe stderr", "probes", "nats, a sample's standard error from its probes, mean"),
    ("dequantisation stderr", "draws", "bits/dim, a sample's standard error over draws, mean"),
    ("accuracy", "accuracy", "of p(y | x) by Bayes' rule"),
)


def report(plan: LikelihoodPlan, measured: Measured) -> None:
    """Print the table."""
    summary, console = measured.summary, make_console()
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.title = (
        f"{plan.subject.name} · {plan.sde}, {summary['samples']:.0f} samples, "
        f"{spec_of(plan.solver)}, {plan.settings['divergence']}, {summary['nfe']:.4g} evaluations"
    )
    table.title_justify = "left"
    for name in ("", "mean ± its standard error over samples", "what it is"):
        table.add_column(name)
    for key, name, meaning in _ROWS:
        if key in summary and math.isfinite(summary[key]):
            shown = number(summary[key], summary.get(f"{key} stderr"))
            table.add_row(name, shown, meaning)
    console.print(table)
    if summary["not reached"]:
        console.print(
            f"{summary['not reached']:.0f} samples did not reach the tolerance and are left out: "
            f"'reached' in {TABLE}",
            style="yellow",
        )
    console.print(f"wrote {measured.folder}/ {RESULTS}, {TABLE}")
