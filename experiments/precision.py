"""Networks in float64, where they can be computed in it: slopes are read off small errors."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from experiments.conditions import Condition
from experiments.subjects import ExactSubject, ModelSubject, Subject
from sde_diffusion.prediction import ScoreFn

__all__ = ["in_float64"]


def in_float64(
    subject: Subject, condition: Condition, device: torch.device
) -> tuple[Subject, torch.dtype]:
    """The subject as it is computed in the widest precision it has, and that precision.

    A network is copied, its weights widened to float64, which changes none of them, and called once
    under each SDE. Where it, its copy or the device refuses, or it answers in another precision (a
    cast to float32 within), it stays as it is, in float32. Parts that round within, as a time
    embedding of its own in float32, cannot be seen here: they show in the floor that is measured.

    Args:
        condition: what is asked of it, so that a classifier that guides it counts too.
        device: where it is called.
    """
    if isinstance(subject, ExactSubject):
        return subject, torch.float64
    if not isinstance(subject, ModelSubject):
        return subject, torch.float32
    try:
        wide = copy.copy(subject)
        wide.models = {
            sde: replace(
                model, model=_widened(model.model), classifier=_widened(model.classifier)
            ).to(device)
            for sde, model in subject.models.items()
        }
        answers = all(_answers(wide, sde, condition, device) for sde in wide.sdes)
    except Exception:  # whatever a user's network does with what it was not written for
        answers = False
    return (wide, torch.float64) if answers else (subject, torch.float32)


def _widened(part: Any) -> Any:
    """A copy in float64; what has no weights follows its inputs."""
    return copy.deepcopy(part).double() if isinstance(part, nn.Module) else part


def _answers(subject: Subject, sde: str, condition: Condition, device: torch.device) -> bool:
    """Whether the score at the first time is float64 throughout."""
    score_fn: ScoreFn = subject.score_of(sde, condition)(torch.arange(2))
    x = torch.zeros(2, *subject.event_shape, dtype=torch.float64, device=device)
    with torch.no_grad():
        found = score_fn(x, subject.sdes[sde].at(float(subject.sdes[sde].t_max)))
    return all(part.dtype == torch.float64 for part in (found.eps, found.x0))
