"""The reverse SDE by steps that every sample chooses for itself, under one solver's name."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sde_diffusion.errors import require_count, require_finite
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import SDE
from solvers.adapters.scaled import counting
from solvers.adaptive import Adaptive
from solvers.base import Integrator, Solver
from solvers.methods.stochastic_pairs import ImprovedEuler
from solvers.noise import CounterNoise, Noise
from solvers.plans import Run
from solvers.solution import Solution


@dataclass(frozen=True)
class AdaptiveSDE(Integrator):
    """The reverse SDE by adaptive steps: a stochastic pair under ``plan=Adaptive``.

    With the defaults the method of Jolicoeur-Martineau et al. 2021 (arXiv:2105.14080), each sample
    with steps of its own and on one Brownian path, so that a rejected step biases nothing. It gives
    what ``sample(..., pair, plan=Adaptive(rtol, atol, max_steps))`` gives, for where a solver is
    named: in ``compare``, ``sample`` and ``orders``. A run needs no ``steps``; of a grid it takes
    the two ends. The default tolerances are of the size of the paper's and come to 90 to 150
    evaluations on the named targets; their number grows about as ``tolerance^(-2/3)``. At 0.1, on
    ``N(0, 1/4)`` under VP, the variance of 80,000 samples was 1.003 +- 0.005 of the exact one.

    The path is the one of the run's seed and sample ids, or the ``BrownianPath`` given as its
    noise.

    Args:
        pair: a stochastic solver that estimates its error: ``ImprovedEuler`` or ``SRA1``.
        rtol, atol: tolerances, above 0: see ``Adaptive``.
        max_steps: attempts, kept or rejected, that any sample may make.
    """

    pair: Solver = field(default_factory=ImprovedEuler)
    rtol: float = 0.05
    atol: float = 0.05
    max_steps: int = 10_000
    stochastic = True
    adaptive = True

    def __post_init__(self) -> None:
        require_finite("rtol", self.rtol, above=0.0)
        require_finite("atol", self.atol, above=0.0)
        require_count("max_steps", self.max_steps)
        if not isinstance(self.pair, Solver):
            raise TypeError(f"pair must be a Solver such as ImprovedEuler(), got {self.pair!r}")
        if not self.pair.stochastic or self.pair.error_order is None:
            raise ValueError(
                f"pair must draw noise and estimate its error, as ImprovedEuler() and SRA1() do, "
                f"got {self.pair!r}; for the ODE, use sample(..., plan=Adaptive())"
            )

    @property
    def order(self) -> int:
        return self.pair.order

    @property
    def weak_order(self) -> int:
        return self.pair.weak_order

    def solve(
        self, score_fn: ScoreFn, sde: SDE, x: Tensor, times: Tensor, noise: Noise
    ) -> Solution:
        """As every Integrator's.

        Raises:
            ValueError: noise that is neither a ``CounterNoise`` nor a ``BrownianPath``.
            RuntimeError: a sample has not arrived after ``max_steps``.
            NonFiniteError: the score or the state became NaN or infinite.
        """
        plan = Adaptive(self.rtol, self.atol, self.max_steps)
        if isinstance(noise, CounterNoise):
            noise = plan.noise(sde, True, noise.seed, noise.sample_ids)
        run = Run(counting(score_fn), sde, self.pair, x, times, noise, None, False, False)
        return plan.run(run)
