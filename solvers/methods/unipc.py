"""UniPC: a multistep predictor with a corrector that costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sde_diffusion.errors import require_count, unknown_name
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import NoiseLevel
from solvers.base import Coefficients, State, Step, Stepped, expanded
from solvers.multistep import DataPrediction, History, weighted_sum
from solvers.noise import Noise


class _Carried(NamedTuple):
    """The history, and the state carried to the end of the last step before q was added."""

    history: History
    carried: Tensor | None


@dataclass(frozen=True)
class UniPC(DataPrediction):
    """UniPC: predictor of order p on p values of x0, corrector on p + 1, one evaluation a step.

    The value at a step's end, which the next step needs anyway, first corrects the state there
    (Zhao et al. 2023, arXiv:2302.04867, alg. 1 and 2). The paper's systems for its weights have the
    integrals of the Lagrange polynomials for solution, whatever B(h) is; with two values it takes
    1/2 for the solution instead, and there B(h) matters: ``bh1`` is h, ``bh2`` is ``1 - e^-h``.

    Args:
        order: p, 1 to 4; declared as the order. Measured it is p + 1 for p = 1 and 2, and at least
            p above, where the first steps set the limit. Order 4 evaluates once more in a run.
        variant: ``bh1`` or ``bh2``.
    """

    order: int = 3
    variant: Literal["bh1", "bh2"] = "bh2"
    stochastic = False
    eta = 0.0

    def __post_init__(self) -> None:
        require_count("order", self.order, most=4)
        if self.variant not in ("bh1", "bh2"):
            raise unknown_name("variant", self.variant, ("bh1", "bh2"))

    def init(self, x: Tensor) -> State:
        return _Carried(super().init(x), None)

    def displaced(self, state: State) -> State:
        return _Carried(super().displaced(state.history), None)

    def coefficients(self, step: Step) -> Coefficients:
        """As a multistep method's, and behind them the corrector's weights for the step before."""
        start = step.start
        count, available = start.t.numel(), min(self.order, start.t.numel() - 1)
        c = self.coordinate(start)
        weights = torch.zeros(self.order + 1, count, dtype=torch.float64)
        for known in range(1, available + 1):
            rows = slice(known, known + 1 if known < available else count)
            nodes = [c[rows.start - j : rows.stop - j] for j in range(known + 1)]
            level = start.map(lambda field, rows=rows: field[rows])  # type: ignore[misc]
            weights[: known + 1, rows] = self._integrals(nodes, nodes[1], nodes[0], level)
        return *super().coefficients(step), tuple(weights)

    def coefficients_of(self, step: Step, x: Tensor) -> Coefficients:
        if step.coefficients:
            return step.coefficients
        none = torch.zeros_like(step.start.t)
        return *super().coefficients_of(step, x), expanded((none,) * (self.order + 1), x)

    @property
    def memory(self) -> int:
        return self.order

    def step(self, score_fn: ScoreFn, x: Tensor, step: Step, state: State, noise: Noise) -> Stepped:
        propagators, weights, repair, correction = self.coefficients_of(step, x)
        history, carried = state
        q = self.quantity(score_fn(x, step.start))
        if step.coefficients and self.starting(history):
            x, q = self.repaired(score_fn, step, q, history, repair)
        elif step.coefficients and carried is not None:
            x = weighted_sum(carried, correction, (q, *history.values))
        carried, after = self.carried(x, q, step, history, noise, propagators)
        values = (q, *history.values[: self.order - 1])
        return Stepped(weighted_sum(carried, weights, values), _Carried(after, carried))

    def _integrals(
        self, nodes: list[Tensor], lower: Tensor, upper: Tensor, end: NoiseLevel
    ) -> Tensor:
        if len(nodes) != 2:
            return super()._integrals(nodes, lower, upper, end)
        # Two values: the paper's 1/2 in place of the integral of the linear term.
        h = upper - lower
        size = h if self.variant == "bh1" else -torch.expm1(-h)
        total = super()._integrals([lower], lower, upper, end)[0]
        at_lower = 0 if torch.equal(nodes[0], lower) else 1
        other = nodes[1 - at_lower]
        linear = 0.5 * end.alpha * size * h / (other - lower)
        pair = [linear, linear]
        pair[at_lower] = total - linear
        return torch.stack(pair)
