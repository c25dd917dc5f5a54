"""What an error budget is of: a target, a network, or both, and the solutions it compares.

Sample i of repeat r starts from the same noise in every solution, and stochastic solvers walk along
the same Brownian path, coarse or fine.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.conditions import ALL, Condition
from experiments.draw import Drawn, Look, Machine, ScoreOf
from experiments.judging import block_ids, class_samples, reverse_eta
from experiments.subject_kinds import exact_score, network_score
from sde_diffusion import SDE, GaussianMixture
from sde_diffusion.loop import generator_for
from sde_diffusion.prediction import ScoreFn
from solvers import (
    DPMSolverPP,
    EulerMaruyama,
    Integrator,
    ProbabilityFlow,
    Solution,
    Solver,
    sample,
)
from solvers.noise import BrownianPath, CounterNoise

ORDER = ("truncation", "prior_mismatch", "score_error", "rest", "discretisation")
FINE_ODE_STEPS, FINE_SDE_STEPS = 100, 200
GRID = "log_snr"  # of fine solutions
_DEPTH = 10  # halvings of a Brownian path: finer than the fine solution's steps
_DATA_SEED, _TRUE_SEED, _CUT_SEED = 0x5EED_0011, 0x5EED_0012, 0x5EED_0013
_UNGUIDED = Condition()
_TRUE_IDS = 1 << 40  # beyond the ids of what is measured


@dataclass(frozen=True)
class Problem:
    """A target, a network, or both, under one SDE.

    Attributes:
        name: of the target or the model.
        target: in the network's scaling where there is a network; None: not known.
        network: its scores; None: the target's own.
        data: held-out and training samples where the target is not known.
        condition: the guidance and the classes that are asked for.
        machine: where samples are drawn, and how many at a time; ``suggested`` where it does not
            say. No figure depends on that.
        classifier: of noised inputs, for the network's classifier guidance.
    """

    name: str
    sde_name: str
    sde: SDE
    event_shape: tuple[int, ...]
    target: GaussianMixture | None
    network: Any
    num_classes: int | None
    data: tuple[Tensor, Tensor] | None
    samples: int
    repeats: int
    seed: int
    grid: str | None
    denoise: bool
    machine: Machine
    suggested: int = 1024
    condition: Condition = _UNGUIDED
    classifier: Any = None

    @property
    def dtype(self) -> torch.dtype:
        """Exact scores are computed in float64, networks in their own precision."""
        return torch.float64 if self.network is None else torch.float32

    @property
    def device(self) -> torch.device:
        """Where scores are computed."""
        return self.machine.device

    @property
    def law_known(self) -> bool:
        """Whether the law that is sampled is one of data; at other γ no data has it."""
        return self.condition.law != "guided"

    def ids(self, repeat: int) -> Tensor:
        """Of the samples of a repeat."""
        return block_ids(self.samples, repeat)

    def classes(self, repeat: int) -> Tensor | None:
        """The classes of a repeat's samples where they are asked for in turn, so that their numbers
        are no matter of chance; None elsewhere."""
        if self.condition.law == "whole" or self.condition.label != ALL:
            return None
        return self.condition.labels(self.ids(repeat), self.num_classes)

    def score(self, ids: Tensor, exact: bool = False) -> ScoreFn:
        """The network's score, or the exact one, guided as the condition says."""
        if self.network is None or exact:
            if self.target is None:
                raise ValueError("the exact score is not known: name the target")
            return exact_score(self.target, self.sde, self.condition)(ids.to(self.device))
        made = network_score(self.network, self.classifier, self.condition, self.num_classes)
        return made(ids.to(self.device))

    def start(self, ids: Tensor, data: Tensor | None = None) -> Tensor:
        """The states at t_max: from the standard prior, or of data, with the same noise."""
        like = torch.empty(len(ids), *self.event_shape, dtype=torch.float64)
        noise = CounterNoise(self.seed, ids).prior(like)
        if data is None:
            return noise * self.sde.prior_std()
        return self.sde.perturb(data, float(self.sde.t_max), noise)

    def solve(
        self,
        solver: Solver | Integrator,
        steps: int,
        ids: Tensor,
        *,
        score_of: ScoreOf | None = None,
        start: Tensor | None = None,
        grid: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Drawn:
        """A solution from the noise of the samples, in chunks as the machine says.

        Args:
            score_of: ids of a chunk -> its score; None: `score`.
            start: the states at t_max, in the order of the ids; None: from the standard prior.
        """
        stepped = isinstance(solver, Solver) and solver.stochastic

        def one(rows: Tensor, look: Look) -> Solution:
            part = ids[rows]
            x = self.start(part) if start is None else start[rows]
            return sample(
                (score_of or self.score)(part),
                self.sde,
                solver,
                x=x.to(self.device, dtype or self.dtype),
                steps=steps,
                grid=grid or self.grid,
                seed=self.seed,
                sample_ids=part,
                noise=BrownianPath(self.sde, self.seed, part, _DEPTH) if stepped else None,
                denoise=self.denoise,
                progress=look,
            )

        return self.machine.for_solver(solver).solve(one, len(ids), self.suggested)

    def fine(
        self,
        reference: Solver,
        steps: int,
        ids: Tensor,
        *,
        exact: bool = False,
        start: Tensor | None = None,
    ) -> Tensor:
        """A fine solution of an equation.

        Args:
            reference, steps: as `reference_for` and `fine_steps` say.
            exact: with the exact score, whatever the network.
            start: the states at t_max; None: from the standard prior.
        """
        exact = exact or self.network is None
        return self.solve(
            reference,
            steps,
            ids,
            score_of=functools.partial(self.score, exact=exact),
            start=start,
            grid=GRID,
            dtype=torch.float64 if exact else None,
        ).x

    def truncated(self, repeat: int) -> tuple[Tensor, Tensor]:
        """Data, and the same data at t_min (denoised, where samples are)."""
        data = self.law_samples(repeat)
        generator = generator_for(self.seed + _CUT_SEED, repeat)
        noise = torch.randn(data.shape, generator=generator, dtype=torch.float64)
        cut = self.sde.perturb(data, float(self.sde.t_min), noise)
        if self.denoise:
            level = self.sde.at(float(self.sde.t_min))
            cut = self.score(self.ids(repeat), exact=True)(cut, level).x0
        return data, cut

    def true_samples(self, repeat: int) -> tuple[Tensor, Tensor] | None:
        """Two independent sets of true samples that nothing else has seen; None without data, and
        where the law is what the guided equation gives: see `guided_truth`."""
        if self.target is not None and self.law_known:
            seed = generator_for(self.seed + _TRUE_SEED, repeat).initial_seed()
            if self.condition.law == "whole":
                both, _ = self.target.sample(2 * self.samples, seed, dtype=torch.float64)
                return both[: self.samples], both[self.samples :]
            labels = self.condition.class_of(self.ids(repeat), self.target.num_classes).repeat(2)
            both = class_samples(self.target, labels, seed, torch.float64)
            return both[: self.samples], both[self.samples :]
        if self.data is None:
            return None
        held_out, training = self.data
        size = min(self.samples, len(held_out) // self.repeats, len(training) // self.repeats)
        block = slice(repeat * size, (repeat + 1) * size)
        return held_out[block], training[block]

    def guided_truth(self, reference: Solver, steps: int, repeat: int) -> tuple[Tensor, Tensor]:
        """Two independent sets of fine solutions of the exact guided equation."""
        classes = self.num_classes or 1
        # Ids that keep the class of the samples they stand for.
        far = (_TRUE_IDS // classes * classes, 2 * _TRUE_IDS // classes * classes)
        ids = self.ids(repeat)
        first, second = (self.fine(reference, steps, ids + n, exact=True) for n in far)
        return first, second

    def law_samples(self, repeat: int) -> Tensor:
        """Samples of the law of the data, which other parts than the total begin with."""
        if self.target is None or not self.law_known:
            raise ValueError("the law of the data is not known: name the target")
        seed = generator_for(self.seed + _DATA_SEED, repeat).initial_seed()
        if self.condition.law == "whole":
            return self.target.sample(self.samples, seed, dtype=torch.float64)[0]
        labels = self.condition.class_of(self.ids(repeat), self.target.num_classes)
        return class_samples(self.target, labels, seed, torch.float64)


def reference_for(solver: Solver | Integrator) -> Solver:
    """What fine solutions of a solver's equation take: of the ODE, or of the member eta of the
    reverse family."""
    eta = reverse_eta(solver)
    if eta == 0:
        return ProbabilityFlow("rk4")
    return DPMSolverPP(order=2, eta=eta) if eta <= 1 else EulerMaruyama(eta=eta)


def fine_steps(reference: Solver) -> int:
    """Steps of a fine solution."""
    return FINE_SDE_STEPS if reference.stochastic else FINE_ODE_STEPS


def equation_of(solver: Solver | Integrator) -> str:
    """A solver's equation in a word: "ODE", "SDE", "SDE η=0.5"."""
    eta = reverse_eta(solver)
    return "ODE" if eta == 0 else "SDE" if eta == 1 else f"SDE η={eta:g}"
