"""What each command does, and what it prints."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from experiments import compare, generate, generate_shards, steps
from experiments.advice import advise
from experiments.asymptotics import evaluations_text
from experiments.costs import throughput_table
from experiments.experiment_file import EXPERIMENT
from experiments.galleries import draw_pictures
from experiments.plots import error_vs_steps
from experiments.progress import ProgressBar
from experiments.steps_plan import FILE
from experiments.tables import comparison_tables, legend, make_console, wrote
from experiments.timing import Timing

if TYPE_CHECKING:  # imported where it is used: half a second that no other command needs
    from experiments.certify import orders


def run_compare(
    options: compare.CompareOptions, write_to: str | None = None, timing: Timing | None = None
) -> int:
    """``sde-diffusion compare``; how many rows failed.

    Args:
        timing: begun where the command began.
        write_to: only check the options and write them to this experiment file; ``-``: print it.
    """
    timing = timing or Timing()
    plan = compare.make_plan(options)
    if write_to is not None:
        plan.file.put(options, write_to)
        return 0
    with ProgressBar() as bar:
        outcome = compare.run(plan, bar, timing)
        bar.now("pictures")
        paths = draw_pictures(outcome)
    outcome.folder.timing = timing.as_dict()
    outcome.folder.write()
    console = make_console()
    for table in comparison_tables(outcome.folder.rows):
        console.print(table)
    console.print(legend(outcome.folder.rows), style="dim")
    for line in advise(outcome.folder.rows).lines:
        console.print(line, markup=False)
    if (costs := throughput_table(outcome.folder.rows)) is not None:
        console.print(costs)
    for row in outcome.failed:
        where = f"{row['target']} · {row['sde']} · {row['spec']} · {row['budget'] or 'own steps'}"
        console.print(Text.assemble((f"{row['status']}: ", "red"), f"{where}: {row['error']}"))
    files = ["results.json", "cells.parquet", *(p.name for p in paths)]
    wrote(console, outcome.folder.path, files, timing.started)
    return len(outcome.failed)


def run_steps(options: steps.StepsOptions, write_to: str | None, started: float) -> None:
    """``sde-diffusion steps``.

    Args:
        write_to: only check the options and write them to this experiment file; ``-``: print it.
        started: `time.monotonic` when the command began.
    """
    plan = steps.make_plan(options)
    if write_to is not None:
        FILE.put(options, write_to)
        return
    with ProgressBar() as bar:
        folder, fitted = steps.run(plan, bar)
        bar.now("picture")
        laws = {(plan.subject.name, f.sde, f.solver): f.law for f in fitted if f.law is not None}
        error_vs_steps(folder.path / steps.PICTURE, folder.rows, metric="error", laws=laws)
    console = make_console()
    console.print(_slope_table(plan, fitted))
    wrote(console, folder.path, ["results.json", EXPERIMENT, steps.PICTURE], started)


def run_orders(options: orders.OrdersOptions) -> bool:
    """``sde-diffusion orders``; whether every solver passed that is not a peer."""
    from experiments.certify import orders
    from experiments.certify.report import draw_orders, tables

    started = time.monotonic()
    plan = orders.make_plan(options)
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # it comments on settings in every run
    with ProgressBar() as bar:
        file, certificates = orders.run(plan, bar)
        bar.now("picture")
        drawn = draw_orders(file.path / orders.PICTURE, certificates)
    console = make_console()
    for table in tables(certificates):
        console.print(table)
    peers = [certificate for certificate in certificates if certificate.peer]
    own = [certificate for certificate in certificates if not certificate.peer]
    failed = [certificate.name for certificate in own if not certificate.passed]
    verdict = "all pass" if not failed else f"{len(failed)} fail: {', '.join(failed)}"
    if own:
        console.print(f"{len(own)} certified, {verdict}")
    if peers:
        missing = sum(not certificate.passed for certificate in peers)
        console.print(
            f"{len(peers)} of diffusers measured, {missing} miss something they declare or are "
            "asked for; the exit code does not speak of them"
        )
    wrote(console, file.path, [orders.ORDERS, *([orders.PICTURE] if drawn else [])], started)
    return not failed


def run_sample(options: generate.SampleOptions) -> None:
    """``sde-diffusion sample``."""
    started = time.monotonic()
    process = generate_shards.launched()
    if generate_shards.is_sharded(options, process):
        _run_shards(options, process, started)
        return
    plan = generate.make_plan(options)
    with ProgressBar() as bar:
        written = generate.run(plan, bar)
    drawn = written.drawn
    console = make_console()
    console.print(
        f"{len(drawn.x):,} samples of {plan.subject.name}, {drawn.nfe:g} evaluations each "
        f"({drawn.network_passes:g} network passes), {drawn.seconds:.2g} s of sampling"
    )
    wrote(console, written.folder, list(written.files), started)


def _run_shards(
    options: generate.SampleOptions, process: generate_shards.Process, started: float
) -> None:
    """This process's part of a large set; the first process says how far it is."""
    plan = generate_shards.make_shard_plan(options, process)
    with ProgressBar(shown=process.rank == 0) as bar:
        written = generate_shards.run_shards(plan, process, bar)
    console = make_console()
    who = f"process {process.rank} of {process.world}: " if process.world > 1 else ""
    console.print(
        f"{who}{written.drawn} shards drawn, {written.found} found finished, "
        f"{written.seconds:.2g} s of sampling"
    )
    if written.finished:
        files = ["manifest.json", "samples.png", f"shards/ ({options.count:,} samples)"]
        wrote(console, written.folder, files, started)


_NOISY = (
    "SDE solvers: weak error, |mean log density - true|, in nats; its floor is the standard error. "
)


def _slope_table(plan: steps.StepsPlan, fitted: Sequence[steps.Fitted]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    wanted, asked = plan.options.wanted, f", {plan.condition}" if str(plan.condition) else ""
    said = f"{asked}  error against steps, grid {plan.options.grid}"
    table.title = Text.assemble((plan.subject.name, "bold"), said)
    table.title_justify = "left"
    counts = sorted({count for fit in fitted for count in fit.errors})
    room = 5 if not wanted else 3
    shown = counts if len(counts) <= room else [counts[0], counts[len(counts) // 2], counts[-1]]
    table.add_column("steps", overflow="fold")
    for count in shown:
        table.add_column(str(count), justify="right")
    table.add_column("declared", justify="right")
    table.add_column("fitted", justify="right")
    table.add_column("on", justify="right")
    for error in wanted:
        table.add_column(f"NFE for {error:g}", justify="right")
    for sde in dict.fromkeys(fit.sde for fit in fitted):
        table.add_section()
        floors = [f.floor for f in fitted if f.sde == sde and f.kind == "ODE"]
        known = f"  floor {floors[0]:.1g}" if floors else ""
        table.add_row(Text.assemble((sde.upper(), "bold"), (known, "dim")))
        for fit in (f for f in fitted if f.sde == sde):
            slope = fit.slope
            law, region = fit.law, ""
            order = Text("below the floor", style="dim")
            if law is not None:
                close = law.order_high >= fit.declared - 0.25
                text = f"{law.order:.2f} ({law.order_low:.2f}–{law.order_high:.2f})"
                order = Text(text, style="green" if close else "yellow")
                region = f"{law.first}–{law.last}"
            elif slope is not None:
                order, region = Text(f"{slope.order:.2f}", style="yellow"), "no region"
            errors = [
                Text(
                    f"{fit.errors[n].value:.2g}",
                    style="" if fit.errors[n].value > 3 * fit.floor else "dim",
                )
                for n in shown
            ]
            table.add_row(
                Text(f"  {fit.solver}"),
                *errors,
                str(fit.declared),
                order,
                region,
                *map(evaluations_text, fit.needed),
            )
    noisy = _NOISY if any(fit.kind == "SDE" for fit in fitted) else ""
    table.caption = Text(
        "ODE solvers: RMS distance to the fine ODE from the same noise, "
        f"{steps.precision_of(plan)}. {noisy}Dim: at most three times the floor, not fitted. In "
        "brackets 95 %; on: the asymptotic region; *: finer than all grids.",
        style="dim",
    )
    table.caption_justify = "left"
    return table
