"""What an error budget is of: a target, a network, or both, and the solutions it compares.

Sample i of repeat r starts from the same noise in every solution, and stochastic solvers walk along
the same Brownian path, coarse or fine.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from experiments.draw import make_machine
from experiments.judging import block_ids, reverse_eta
from experiments.subjects import ExactSubject, ModelSubject, SubjectOptions, make_subjects
from sde_diffusion import SDE, GaussianMixture, bind
from sde_diffusion.loop import generator_for
from sde_diffusion.prediction import ScoreFn
from sde_diffusion.scaling import Scaling
from solvers import (
    DPMSolverPP,
    EulerMaruyama,
    Integrator,
    ProbabilityFlow,
    Solution,
    Solver,
    grids,
    sample,
)
from solvers.noise import BrownianPath, CounterNoise

ORDER = ("truncation", "prior_mismatch", "score_error", "rest", "discretisation")
FINE_ODE_STEPS, FINE_SDE_STEPS = 100, 200
GRID = "log_snr"  # of fine solutions
_DEPTH = 10  # halvings of a Brownian path: finer than the fine solution's steps
_DATA_SEED, _TRUE_SEED, _CUT_SEED = 0x5EED_0011, 0x5EED_0012, 0x5EED_0013


@dataclass
class Problem:
    """A target, a network, or both, under one SDE.

    Attributes:
        name: of the target or the model.
        target: in the network's scaling where there is a network; None: not known.
        network: its scores; None: the target's own.
        data: held-out and training samples where the target is not known.
        label: classes of the samples, in turn, where the network is conditional and the target is
            not known.
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
    device: str
    _kept: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """Exact scores are computed in float64, networks in their own precision."""
        return torch.float64 if self.network is None else torch.float32

    def score(self, repeat: int, exact: bool = False) -> ScoreFn:
        """The network's score, or the exact one."""
        if self.network is None or exact:
            if self.target is None:
                raise ValueError("the exact score is not known: name the target")
            return self.target.score_fn(self.sde)
        labels = None
        if self.target is None and self.num_classes:
            labels = (block_ids(self.samples, repeat) % self.num_classes).to(self.device)
        bound: ScoreFn = bind(self.network, labels)
        return bound

    def start(self, repeat: int, from_law: bool = False) -> Tensor:
        """The states at t_max: from the standard prior, or from the law of noised data, with the
        same noise."""
        ids = block_ids(self.samples, repeat)
        like = torch.empty(len(ids), *self.event_shape, dtype=torch.float64)
        noise = CounterNoise(self.seed, ids).prior(like)
        if not from_law:
            return noise * self.sde.prior_std()
        return self.sde.perturb(self._data(repeat), float(self.sde.t_max), noise)

    def solve(
        self,
        solver: Solver | Integrator,
        steps: int,
        repeat: int,
        *,
        score: ScoreFn | None = None,
        start: Tensor | None = None,
        grid: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Solution:
        """A solution from the noise of the repeat."""
        ids = block_ids(self.samples, repeat)
        stepped = isinstance(solver, Solver) and solver.stochastic
        x = self.start(repeat) if start is None else start
        return sample(
            self.score(repeat) if score is None else score,
            self.sde,
            solver,
            x=x.to(self.device, dtype or self.dtype),
            steps=steps,
            grid=grid or self.grid,
            seed=self.seed,
            sample_ids=ids,
            noise=BrownianPath(self.sde, self.seed, ids, _DEPTH) if stepped else None,
            denoise=self.denoise,
        )

    def fine(
        self,
        solver: Solver | Integrator,
        repeat: int,
        *,
        exact: bool = False,
        from_law: bool = False,
    ) -> Tensor:
        """The fine solution of the equation that a solver solves.

        Args:
            exact: with the exact score, whatever the network.
            from_law: from the law of noised data instead of the standard prior.
        """
        exact = exact or self.network is None
        reference = self.reference("sde" if solver.stochastic else "ode", reverse_eta(solver))
        key = reference, repeat, exact, from_law
        if key not in self._kept:
            self._kept[key] = self.solve(
                reference,
                self.fine_steps(reference),
                repeat,
                score=self.score(repeat, exact),
                start=self.start(repeat, from_law),
                grid=GRID,
                dtype=torch.float64 if exact else None,
            ).x.cpu()
        return self._kept[key]

    def reference(self, kind: str, eta: float = 1.0) -> Solver:
        """What fine solutions of the ODE, or of the member ``eta`` of the reverse family, take."""
        if kind == "ode":
            return ProbabilityFlow("rk4")
        return DPMSolverPP(order=2, eta=eta) if eta <= 1 else EulerMaruyama(eta=eta)

    def fine_steps(self, reference: Solver) -> int:
        """Steps of a fine solution."""
        return FINE_SDE_STEPS if reference.stochastic else FINE_ODE_STEPS

    def truncated(self, repeat: int) -> tuple[Tensor, Tensor]:
        """Data, and the same data at t_min (denoised, where samples are)."""
        data = self._data(repeat)
        generator = generator_for(self.seed + _CUT_SEED, repeat)
        noise = torch.randn(data.shape, generator=generator, dtype=torch.float64)
        cut = self.sde.perturb(data, float(self.sde.t_min), noise)
        if self.denoise:
            level = self.sde.at(float(self.sde.t_min))
            cut = self.score(repeat, exact=True)(cut, level).x0
        return data, cut

    def true_samples(self, repeat: int) -> tuple[Tensor, Tensor] | None:
        """Two independent sets of true samples that nothing else has seen; None without data."""
        if self.target is not None:
            seed = generator_for(self.seed + _TRUE_SEED, repeat).initial_seed()
            both, _ = self.target.sample(2 * self.samples, seed, dtype=torch.float64)
            return both[: self.samples], both[self.samples :]
        if self.data is None:
            return None
        held_out, training = self.data
        size = min(self.samples, len(held_out) // self.repeats, len(training) // self.repeats)
        block = slice(repeat * size, (repeat + 1) * size)
        return held_out[block], training[block]

    def _data(self, repeat: int) -> Tensor:
        if self.target is None:
            raise ValueError("the law of the data is not known: name the target")
        seed = generator_for(self.seed + _DATA_SEED, repeat).initial_seed()
        return self.target.sample(self.samples, seed, dtype=torch.float64)[0]


def make_problem(
    target: str | None,
    model: str | None,
    sdes: Sequence[str],
    *,
    samples: int,
    repeats: int,
    seed: int,
    grid: str | None,
    denoise: bool,
    device: str,
) -> list[Problem]:
    """A problem for each SDE.

    Raises:
        ValueError: neither or unfitting target and model, unknown names, no such device.
    """
    place = make_machine(device, None).device
    if target is None and model is None:
        raise ValueError("name what the budget is of: --target, --model, or both")
    problem = functools.partial(
        Problem,
        samples=samples,
        repeats=repeats,
        seed=seed,
        grid=grid,
        denoise=denoise,
        device=str(place),
    )
    exact = None if target is None else _exact(target, sdes)
    if model is None and exact is not None:
        found = [
            problem(name, sde_name, sde, exact.event_shape, exact.target, None, None, None)
            for name in [exact.name]
            for sde_name, sde in exact.sdes.items()
        ]
    else:
        (subject,) = make_subjects(SubjectOptions((), (str(model),), sdes))
        if not isinstance(subject, ModelSubject):
            raise ValueError(f"--model {model!r} is not a model folder")
        subject.to(place)
        found = [_of_network(problem, subject, exact)]
    for one in found:
        if grid is not None:
            grids.resolve(grid, one.sde, 1)
    return found


def scaled(target: GaussianMixture, scaling: Scaling) -> GaussianMixture:
    """The law of ``scaling.to_model(x)`` for x of the target."""
    factor = float(
        scaling.to_model(torch.ones((), dtype=torch.float64))
        - scaling.to_model(torch.zeros((), dtype=torch.float64))
    )
    variances = target.variances * factor**2
    if target.rotation is not None:
        variances = target.rotation @ torch.diag_embed(variances) @ target.rotation.mT
    return GaussianMixture(scaling.to_model(target.means), variances, target.weights, target.labels)


def _exact(target: str, sdes: Sequence[str]) -> ExactSubject:
    (subject,) = make_subjects(SubjectOptions((target,), (), sdes))
    if not isinstance(subject, ExactSubject):
        raise ValueError(
            f"--target {target} has no exact score; give its network alone: --model {target}-vp"
        )
    return subject


def _of_network(problem: Any, subject: ModelSubject, exact: ExactSubject | None) -> Problem:
    ((sde_name, model),) = subject.models.items()
    target, data = None, None
    if exact is not None:
        if model.event_shape != exact.event_shape:
            raise ValueError(
                f"--model {str(model.path)!r} makes samples of shape {model.event_shape}, and "
                f"--target {exact.name} has {exact.event_shape}; name the target whose samples it "
                "was trained on"
            )
        target = scaled(exact.target, model.data.scaling)
    elif subject.data is not None:
        order = torch.Generator().manual_seed(0)
        held_out, training = subject.data.test_x, subject.data.train_x
        data = (
            held_out[torch.randperm(len(held_out), generator=order)],
            training[torch.randperm(len(training), generator=order)[: 4 * len(held_out)]],
        )
    name = subject.name if exact is None else f"{exact.name} by {subject.name}"
    made: Problem = problem(
        name,
        sde_name,
        model.sde,
        model.event_shape,
        target,
        model.model,
        subject.num_classes,
        data,
    )
    return made
