"""Per-sample figures of a likelihood run: put together, averaged, written as lines."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Figures:
    """Per-sample results, ``(N,)`` float64 each, in nats but as said; ``None`` where not had."""

    log_prob: Tensor
    stderr: Tensor
    reached: Tensor
    nfe: Tensor
    truncation: Tensor | None = None
    prior_mismatch: Tensor | None = None
    bits_per_dim: Tensor | None = None
    bits_stderr: Tensor | None = None
    bound: Tensor | None = None
    bound_stderr: Tensor | None = None
    vlb: Tensor | None = None
    truth: Tensor | None = None
    predicted: Tensor | None = None


def together(parts: list[Figures]) -> Figures:
    """The figures of batches as one."""
    found = {}
    for item in fields(Figures):
        values = [getattr(part, item.name) for part in parts]
        found[item.name] = None if values[0] is None else torch.cat([v.cpu() for v in values])
    return Figures(**found)  # type: ignore[arg-type]


def summarised(figures: Figures, labels: Tensor | None) -> dict[str, float]:
    """Means over the samples that arrived, with their standard errors over samples."""
    kept = figures.reached
    summary: dict[str, float] = {"samples": len(kept), "not reached": int((~kept).sum())}

    def add(name: str, values: Tensor | None) -> None:
        if values is not None and bool(kept.any()):
            chosen = values[kept].double()
            summary[name] = float(chosen.mean())
            summary[f"{name} stderr"] = float(chosen.std() / math.sqrt(len(chosen)))

    add("log likelihood", figures.log_prob)
    add("bits per dim", figures.bits_per_dim)
    add("vlb", figures.vlb)
    add("truncation", figures.truncation)
    add("prior mismatch", figures.prior_mismatch)
    add("bound", figures.bound)
    add("probe stderr", figures.stderr)
    add("dequantisation stderr", figures.bits_stderr)
    if figures.truth is not None:
        add("truth", figures.truth)
        add("absolute error", (figures.log_prob - figures.truth).abs())
    if figures.predicted is not None and labels is not None:
        right = (figures.predicted == labels).double()
        summary["accuracy"] = float(right.mean())
        summary["accuracy stderr"] = float(right.std() / math.sqrt(len(right)))
    summary["nfe"] = float(figures.nfe.mean())
    return summary


def lines(figures: Figures, labels: Tensor | None) -> str:
    """CSV, a line per sample."""
    columns = {
        item.name: getattr(figures, item.name).tolist()
        for item in fields(figures)
        if getattr(figures, item.name) is not None
    }
    if labels is not None:
        columns = {"label": labels.tolist(), **columns}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", *columns])
    for index, row in enumerate(zip(*columns.values(), strict=True)):
        writer.writerow([index, *row])
    return text.getvalue()
