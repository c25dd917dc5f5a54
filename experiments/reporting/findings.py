"""What a table of rows says in words; only what is beyond its noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.canvas import in_order
from experiments.metrics import METRICS
from experiments.plots import primary_metric
from experiments.runs import sampler
from experiments.tables import number

Rows = Sequence[Mapping[str, Any]]
SDE_TITLES = {"vp": "VP", "ve": "VE", "subvp": "sub-VP", "cosine": "cosine VP", "edm": "EDM"}
RESOLVED = 2.0  # standard errors of a difference beyond which it is stated


@dataclass(frozen=True)
class Finding:
    """The best sampler of a target at a budget, or those that share the first place.

    Attributes:
        target, budget: where; ``budget`` as asked for.
        metric: what "best" means.
        best: sampler and SDE, with its figure.
        ties: others that are not told apart from it; empty where the first place is resolved.
    """

    target: str
    budget: int
    metric: str
    best: str
    ties: tuple[str, ...]

    @property
    def resolved(self) -> bool:
        """Whether the best is beyond `RESOLVED` standard errors from every other."""
        return not self.ties


def best_samplers(rows: Rows) -> list[Finding]:
    """For each target, guidance and truth, at each budget, the best of its samplers and SDEs.

    Samples of different laws have no best among them: each law is taken for itself.
    """
    found = []
    groups = in_order_of([law_of(row) for row in rows])
    for group in groups:
        here = [row for row in rows if law_of(row) == group]
        metric = primary_of(here[0], rows)
        for budget in sorted({row["budget"] for row in here if row.get("budget")}):
            finding = _best([row for row in here if row["budget"] == budget], metric, group, budget)
            if finding is not None:
                found.append(finding)
    return found


def law_of(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Target, guidance in words where there is one, and what the row is compared with."""
    guided = str(row.get("guided_by", "unguided"))
    classes = str(row.get("classes") or "")
    words = [] if guided == "unguided" else [guided]
    if classes and classes != "all classes in turn":
        words.append(classes)
    return str(row["target"]), ", ".join(words), str(row.get("truth", ""))


def primary_of(row: Mapping[str, Any], rows: Rows) -> str:
    """The metric that stands for a row's quality."""
    return str(row.get("primary") or primary_metric(rows, row["target"]) or "")


def figure(row: Mapping[str, Any], metric: str) -> float | None:
    """A row's finite figure, or None."""
    found = row["metrics"].get(metric)
    value = None if found is None else found["value"]
    return float(value) if value is not None and math.isfinite(value) else None


def interval(found: Mapping[str, Any]) -> tuple[float, float] | None:
    """``low`` and ``high`` where the run has them, else two standard errors to either side."""
    if found.get("low") is not None and found.get("high") is not None:
        return float(found["low"]), float(found["high"])
    if found.get("stderr") is None:
        return None
    reach = RESOLVED * float(found["stderr"])
    return float(found["value"]) - reach, float(found["value"]) + reach


def sign_of(metric: str) -> int:
    """1 where lower is better, -1 where higher is."""
    return 1 if metric not in METRICS or METRICS[metric].lower_is_better else -1


def seconds_of(row: Mapping[str, Any]) -> float:
    """Seconds of sampling for 1,000 samples: rows may have different numbers of them."""
    return float(row["seconds"]) * 1000 / (row.get("samples") or 1000)


def pareto(
    rows: Rows, metric: str, cost: Callable[[Mapping[str, Any]], float]
) -> list[Mapping[str, Any]]:
    """The rows that no other row beats in both quality and cost, cheapest first."""
    known = [row for row in rows if figure(row, metric) is not None and cost(row) > 0]
    sign = sign_of(metric)
    front: list[Mapping[str, Any]] = []
    for row in sorted(known, key=lambda r: (cost(r), sign * (figure(r, metric) or 0.0))):
        best = sign * (figure(front[-1], metric) or 0.0) if front else math.inf
        if sign * (figure(row, metric) or 0.0) < best:
            front.append(row)
    return front


def in_order_of(groups: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The different ones, each where it first stood."""
    return list(dict.fromkeys(groups))


def _best(rows: Rows, metric: str, law: tuple[str, str, str], budget: int) -> Finding | None:
    sign = sign_of(metric)
    known = [row for row in rows if figure(row, metric) is not None]
    known.sort(key=lambda row: sign * (figure(row, metric) or 0.0))
    if len(known) < 2:
        return None
    top = known[0]
    ties = [row for row in known[1:] if not _apart(top, row, metric)]
    several = len(in_order([str(row["sde"]) for row in rows])) > 1
    target = " · ".join(part for part in law[:2] if part)
    found = top["metrics"][metric]
    return Finding(
        target,
        budget,
        metric,
        f"{_who(top, several)}, {number(found['value'], found.get('stderr'))}",
        tuple(_who(row, several) for row in ties),
    )


def _who(row: Mapping[str, Any], with_sde: bool) -> str:
    return (
        f"{sampler(row)} ({SDE_TITLES.get(row['sde'], row['sde'])})" if with_sde else sampler(row)
    )


def _apart(a: Mapping[str, Any], b: Mapping[str, Any], metric: str) -> bool:
    one, other = a["metrics"][metric], b["metrics"][metric]
    if one.get("stderr") is None or other.get("stderr") is None:
        return False  # a single repeat says nothing of its noise
    noise = math.hypot(one["stderr"], other["stderr"])
    return abs(one["value"] - other["value"]) > RESOLVED * noise
