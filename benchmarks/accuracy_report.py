"""What ``benchmarks.accuracy`` measured, as markdown: tables, ratios, and what was missed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import adaptive
from sde_diffusion.storage import read_json

FITTED_TARGET = 0.7
ADAPTIVE_TARGET = 0.8
STANDARD_ERRORS = 2.0

Pairs = dict[str, list[float] | None]


class Verdict(NamedTuple):
    """One target met or missed."""

    what: str
    where: str
    ratio: float
    most: float

    @property
    def met(self) -> bool:
        return self.ratio <= self.most


class Best(NamedTuple):
    """The least error of one side, and who has it."""

    error: float
    name: str


def report(folder: Path) -> str:
    """All tables of what is there, then the verdicts."""
    pieces: dict[str, dict[str, Any]] = {
        path.stem: read_json(path) for path in sorted(folder.glob("*.json"))
    }
    problems = dict.fromkeys(name.rsplit("-", 2)[0] for name in pieces if name.endswith("-ours"))
    verdicts: list[Verdict] = []
    lines: list[str] = []
    for problem in problems:
        lines += _ode_table(problem, pieces, verdicts)
    lines += _sde_table(pieces, verdicts)
    lines += _adaptive_table(pieces, verdicts)
    return "\n".join([*_summary(verdicts), *lines])


def _ode_table(
    problem: str, pieces: dict[str, dict[str, Any]], verdicts: list[Verdict]
) -> Iterator[str]:
    yield from ("", f"### {problem.replace('-', ', ')}", "")
    columns = ["NFE", *(f"our best {kind} | theirs | ratio" for kind in ("RMS", "median"))]
    yield f"| {' | '.join(columns)} | fitted RMS | ratio |"
    yield "| ---: | --- | --- | ---: | --- | --- | ---: | --- | ---: |"
    for name in pieces:
        where, _, rest = name.rpartition(f"{problem}-")
        nfe, _, part = rest.partition("-")
        if where or part != "ours":
            continue
        ours, theirs, fitted = (
            pieces.get(f"{problem}-{nfe}-{side}", {}) for side in ("ours", "theirs", "fitted")
        )
        row = [str(int(nfe))]
        where = f"{problem.replace('-', ', ')}, NFE {int(nfe)}"
        for k, kind in enumerate(("RMS", "median")):
            mine, other = _best(ours, k), _best(theirs, k)
            ratio = mine.error / other.error
            row += [_cell(mine), _cell(other), _ratio(ratio, 1.0)]
            if math.isfinite(ratio):
                verdicts.append(Verdict(f"untuned {kind}", where, ratio, 1.0))
        if fitted:
            mine, other = _best(fitted, 0), _best(theirs, 0)
            ratio = mine.error / other.error
            row += [_cell(mine), _ratio(ratio, FITTED_TARGET)]
            if math.isfinite(ratio):
                verdicts.append(Verdict("fitted RMS", where, ratio, FITTED_TARGET))
        else:
            row += ["", ""]
        yield "| " + " | ".join(row) + " |"


def _sde_table(pieces: dict[str, dict[str, Any]], verdicts: list[Verdict]) -> Iterator[str]:
    yield from ("", "### Stochastic: unbiased energy distance to exact samples, float32", "")
    yield "| target, SDE, NFE | ours | theirs | ours - theirs | its standard error |"
    yield "| --- | --- | --- | ---: | ---: |"
    for name, record in pieces.items():
        if not name.endswith("-stochastic"):
            continue
        target, sde, _, nfe, _ = name.split("-")
        where = f"{target}, {sde}, {int(nfe)}"
        sides = {side: record[side] for side in ("ours", "theirs") if side in record}
        row = [where]
        row += [f"{statistics.mean(s['energies']):.1e} {s['best']}" for s in sides.values()]
        if len(sides) == 2:
            pairs = zip(sides["ours"]["energies"], sides["theirs"]["energies"], strict=True)
            differences = [a - b for a, b in pairs]
            mean = statistics.mean(differences)
            error = statistics.stdev(differences) / math.sqrt(len(differences))
            row += [f"{mean:+.1e}", f"{error:.1e}"]
            verdicts.append(
                Verdict("energy, in standard errors", where, mean / error, STANDARD_ERRORS)
            )
        yield "| " + " | ".join(row) + " |"


def _adaptive_table(pieces: dict[str, dict[str, Any]], verdicts: list[Verdict]) -> Iterator[str]:
    yield from ("", "### Adaptive: evaluations over those of dopri5 in t, at equal RMS", "")
    rows = {name: record for name, record in pieces.items() if name.endswith("-adaptive")}
    errors = [f"{error:.0e}" for error in adaptive.ERRORS]
    yield "| target, SDE | " + " | ".join(f"RMS {error}" for error in errors) + " |"
    yield "| --- |" + " ---: |" * len(errors)
    for name, record in rows.items():
        target, sde, _ = name.split("-")
        cells = []
        for error, (ratio, solver) in adaptive.ratios(record).items():
            cells.append(f"{_ratio(ratio, ADAPTIVE_TARGET)} {solver}" if ratio else "-")
            if ratio:
                where = f"{target}, {sde}, RMS {error}"
                verdicts.append(Verdict("adaptive", where, ratio, ADAPTIVE_TARGET))
        yield f"| {target}, {sde} | " + " | ".join(cells) + " |"


def _summary(verdicts: list[Verdict]) -> Iterator[str]:
    yield from ("| target | met | median ratio | best | worst | missed |",)
    yield "| --- | ---: | ---: | ---: | ---: | --- |"
    for what in dict.fromkeys(verdict.what for verdict in verdicts):
        group = [verdict for verdict in verdicts if verdict.what == what]
        ratios = [verdict.ratio for verdict in group]
        missed = sorted((v for v in group if not v.met), key=lambda v: -v.ratio)
        yield (
            f"| {what} <= {group[0].most:g} | {len(group) - len(missed)} of {len(group)} | "
            f"{statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} | "
            + "; ".join(f"{v.where}: {v.ratio:.2f}" for v in missed)
            + " |"
        )


def _best(found: Pairs, k: int) -> Best:
    valid = [Best(pair[k], name) for name, pair in found.items() if pair]
    return min(valid, default=Best(math.nan, "-"))


def _cell(best: Best) -> str:
    return "-" if math.isnan(best.error) else f"{best.error:.1e} {best.name}"


def _ratio(value: float, most: float) -> str:
    """Bold where the target is missed."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.2f}" if value <= most else f"**{value:.2f}**"
