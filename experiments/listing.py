"""What there is: solvers, and targets."""

from __future__ import annotations

import inspect

from rich import box
from rich.table import Table
from rich.text import Text

from sde_diffusion import TARGETS
from sde_diffusion.checkpoints import describe, shipped_models
from solvers.adapters.diffusers_ import PREFIX
from solvers.catalogue import Entry, catalogue, peers


def solver_tables() -> list[Table]:
    """Solvers and correctors, with order, kind and settings."""
    entries = catalogue().values()
    solvers = _table("Solvers", "for --solver NAME or --solver NAME:setting=value,setting=value")
    for entry in sorted(entries, key=lambda e: (e.adapter, e.kind, e.name)):
        if entry.kind != "corrector":
            kind = f"{entry.kind}, adapter" if entry.adapter else entry.kind
            solvers.add_row(*_row(entry, f"{kind}, order {entry.order}"))
    correctors = _table(
        "Correctors", "for --solver predictor_corrector:corrector=NAME(setting=value)"
    )
    for entry in entries:
        if entry.kind == "corrector":
            correctors.add_row(*_row(entry, "corrector"))
    if not peers():
        return [solvers, correctors]
    schedulers = _table(
        "Schedulers of diffusers", "for --solver diffusers:NAME or diffusers:NAME:setting=value"
    )
    for entry in peers().values():
        schedulers.add_row(
            entry.name.removeprefix(PREFIX),
            f"{entry.kind}, order {entry.order}",
            Text(", ".join(entry.settings)),
            Text(_first_sentence(entry.type)),
        )
    return [solvers, correctors, schedulers]


def target_table() -> Table:
    """Exact targets and shipped models."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.title = Text.assemble(("Targets", "bold"), "  for --target NAME")
    table.title_justify = "left"
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("parts", justify="right")
    table.add_column("classes", justify="right")
    table.add_column("what")
    for name, make in sorted(TARGETS.items()):
        target = make()
        table.add_row(
            name,
            str(target.event_shape),
            str(len(target.weights)),
            str(target.num_classes),
            _first_sentence(make),
        )
    shipped = [name for name in shipped_models() if name.startswith("digits-")]
    if shipped:
        about = describe(shipped[0])
        shape = "(" + ", ".join(map(str, about["data"]["event_shape"])) + ")"
        sdes = ", ".join(name.removeprefix("digits-") for name in shipped)
        table.add_row(
            "digits",
            shape,
            "–",
            str(about["data"]["num_classes"]),
            f"scikit-learn's handwritten digits by shipped networks ({sdes}); trained by: "
            "sde-diffusion train digits",
        )
    table.add_row(
        "empirical:DATA",
        "as the data",
        "samples",
        "as the data",
        "The law of a data set's own samples, which it memorises: empirical:digits, "
        "empirical:mnist5k, empirical:x.npy, empirical:FOLDER",
    )
    table.add_row(
        "FILE.toml",
        "–",
        "–",
        "–",
        'A mixture\'s own numbers, or kind = "grid", "ring", "random", "empirical" '
        "(docs/targets.md)",
    )
    table.caption = Text(
        "All but digits are Gaussian mixtures (parts: components): scores, classes and samples are "
        "exact. Your own data: sde-diffusion train DATA, then --model FOLDER.",
        style="dim",
    )
    table.caption_justify = "left"
    return table


def _table(title: str, use: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.title = Text.assemble((title, "bold"), f"  {use}")
    table.title_justify = "left"
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("settings and defaults")
    table.add_column("what", ratio=1)
    return table


def _row(entry: Entry, kind: str) -> tuple[str, str, Text, Text]:
    settings = Text(
        "\n".join(f"{name}={_short(value)}" for name, value in entry.settings.items()) or "–"
    )
    return entry.name, kind, settings, Text(_first_sentence(entry.type))


def _short(value: object) -> str:
    if isinstance(value, dict):
        return str(value["name"])
    return f"{value:g}" if isinstance(value, float) else str(value)


def _first_sentence(thing: object) -> str:
    """The first paragraph of a docstring, on one line."""
    text = inspect.getdoc(thing) or ""
    return " ".join(text.split("\n\n")[0].split()).rstrip(".")
