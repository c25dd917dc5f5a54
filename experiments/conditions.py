"""What samples are asked for: a guidance, its scale, and the classes of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sde_diffusion.errors import require_finite, unknown_name
from sde_diffusion.scales import Scale
from sde_diffusion.sde import NoiseLevel

GUIDANCES = ("none", "classifier", "cfg")
ALL = "all"

Law = Literal["whole", "conditional", "guided"]


@dataclass(frozen=True)
class Condition:
    """One guidance at one scale, towards one class, all classes in turn, or none.

    Attributes:
        guidance: "none", "classifier" or "cfg".
        scale: gamma: 0 unconditional, 1 conditional; None without guidance.
        label: a class, "all" (sample i has class ``i mod C``), or None.
        interval: (low, high) in sigma/alpha, outside which gamma is 1; None: everywhere.
    """

    guidance: str = "none"
    scale: float | None = None
    label: int | Literal["all"] | None = None
    interval: tuple[float, float] | None = None

    @property
    def law(self) -> Law:
        """Which law an exact score and an exact solver would sample.

        ``guided``: neither the whole nor the conditional law; what the guided equation gives.
        """
        if self.label is None or (self.scale == 0 and self.interval is None):
            return "whole"
        return "conditional" if self.guidance == "none" or self.scale == 1 else "guided"

    def labels(self, ids: Tensor, num_classes: int | None) -> Tensor | None:
        """The classes (B,) of the samples with these ids, or None."""
        return None if self.label is None else self.class_of(ids, num_classes or 1)

    def class_of(self, ids: Tensor, num_classes: int) -> Tensor:
        """The classes, where there is a label."""
        if isinstance(self.label, int):
            return torch.full_like(ids, self.label)
        return ids % num_classes

    @property
    def guided_by(self) -> str:
        """The guidance in words."""
        if self.guidance == "none":
            return "unguided"
        where = "" if self.interval is None else f" in {interval_name(self.interval)}"
        return f"{self.guidance} γ={self.scale:g}{where}"

    @property
    def weight(self) -> Scale:
        """The scale as a function of the noise level, where there is an interval."""
        scale, interval = self.scale or 0.0, self.interval
        if interval is None:
            return scale

        def inside(level: NoiseLevel) -> Tensor:
            ratio = level.sigma_over_alpha
            within = (ratio >= interval[0]) & (ratio <= interval[1])
            return torch.where(within, scale, 1.0)

        return inside

    def identity(self) -> dict[str, Any]:
        """JSON-like values by which this is known; what it does not have is not among them."""
        values = asdict(self)
        if self.interval is None:
            del values["interval"]
        return values

    @property
    def classes(self) -> str:
        """The classes in words; empty where none is asked for."""
        if self.label is None:
            return ""
        return "all classes in turn" if self.label == ALL else f"class {self.label}"

    def __str__(self) -> str:
        words = [self.guided_by if self.guidance != "none" else "", self.classes]
        return ", ".join(word for word in words if word)


def make_conditions(
    guidances: Sequence[str],
    scales: Sequence[float],
    label: str | None,
    unguided: Literal["all"] | None = None,
) -> list[Condition]:
    """The conditions that the options --guidance, --scale and --label stand for.

    Args:
        label: a class, "all", "none", or None: all classes in turn where guided.
        unguided: what None stands for without guidance.
    Raises:
        ValueError: an unknown guidance, a scale that is not finite or has no guidance to scale, a
            label that is neither a class nor "all".
    """
    for guidance in guidances:
        if guidance not in GUIDANCES:
            raise unknown_name("--guidance", guidance, GUIDANCES)
    for scale in scales:
        require_finite("--scale", scale)
    guided = [guidance for guidance in dict.fromkeys(guidances) if guidance != "none"]
    if scales and not guided:
        raise ValueError(
            f"--scale {scales[0]:g} has nothing to scale: add --guidance cfg or --guidance "
            "classifier, or leave --scale out"
        )
    given = parse_label(label)
    if label == "none" and guided:
        raise ValueError(
            f"--label none leaves --guidance {guided[0]} nothing to guide towards: give a class, "
            "or all"
        )
    conditions = []
    if "none" in guidances or not guided:
        conditions.append(Condition(label=unguided if label is None else given))
    for guidance in guided:
        for scale in dict.fromkeys(scales or (1.0,)):
            conditions.append(Condition(guidance, float(scale), "all" if given is None else given))
    return conditions


def interval_name(interval: tuple[float, float] | None) -> str:
    """An interval in words: "σ/α 0.3–3", or "full"."""
    return "full" if interval is None else f"σ/α {interval[0]:g}–{interval[1]:g}"


def parse_label(text: str | None) -> int | Literal["all"] | None:
    """``--label``: a class number, "all" or "none"."""
    if text is None or text == "none":
        return None
    if text == ALL:
        return "all"
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"--label must be a class number from 0, 'all' (each in turn) or 'none', got {text!r}"
        ) from None
