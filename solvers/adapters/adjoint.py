"""What the adjoint equation must be told: which tensors a score depends on.

A run whose gradient is that of the adjoint equation keeps no graph, so that its parameters have to
be named beforehand. They are found where autograd finds them, in the graph of an evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sde_diffusion.prediction import Prediction, ScoreFn
from sde_diffusion.sde import SDE, NoiseLevel
from solvers.base import unbound
from solvers.counting import CountedScoreFn
from solvers.solution import Solution


@dataclass(frozen=True)
class Probed:
    """What was found, and what it cost.

    Attributes:
        parameters: leaves that require a gradient and that the score depends on.
        nfe, network_passes: evaluations.
    """

    parameters: tuple[Tensor, ...]
    nfe: int
    network_passes: int

    def added_to(self, solution: Solution) -> Solution:
        """The solution with this cost among its own."""
        each = solution.nfe_per_sample
        return replace(
            solution,
            nfe=solution.nfe + self.nfe,
            network_passes=solution.network_passes + self.network_passes,
            nfe_per_sample=None if each is None else each + self.nfe,
        )


def probe(score_fn: CountedScoreFn, sde: SDE, x: Tensor, times: Tensor) -> Probed:
    """Look for parameters at the first, the middle and the last of ``times``, in one sample."""
    found: dict[int, Tensor] = {}
    one = score_fn.select(torch.tensor([0]))
    with torch.enable_grad():
        for level in unbound(sde.at(times[[0, len(times) // 2, -1]]), x.device):
            eps = one(x[:1].detach(), level).eps
            found |= {id(leaf): leaf for leaf in leaves((eps,))}
    return Probed(tuple(found.values()), one.nfe, one.network_passes)


class Watched:
    """A score function that, where a graph is recorded, refuses parameters nobody was told of."""

    def __init__(self, score_fn: ScoreFn, parameters: Iterable[Tensor]) -> None:
        self._score_fn = score_fn
        self._known = {id(parameter) for parameter in parameters}

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        prediction = self._score_fn(x, level)
        if torch.is_grad_enabled():
            missed = [p for p in leaves((prediction.eps,), x) if id(p) not in self._known]
            if missed:
                shapes = ", ".join(str(tuple(p.shape)) for p in missed)
                raise RuntimeError(
                    f"gradients='adjoint' found at t = {level.t.item():.6g} parameters of shape "
                    f"{shapes} that the score did not depend on at the first, middle and last "
                    "time, where they were looked for: their gradient would be missing; use "
                    "gradients=True"
                )
        return prediction


def leaves(outputs: Iterable[Tensor], inner: Tensor | None = None) -> list[Tensor]:
    """The leaves that require a gradient in the graph of ``outputs``, but not those that are
    reached only through ``inner``."""
    found: list[Tensor] = []
    seen = set() if inner is None else {inner.grad_fn}
    pending = [output.grad_fn for output in outputs]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf is not inner:
            found.append(leaf)
        pending += [following for following, _ in node.next_functions]
    return found
