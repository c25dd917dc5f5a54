"""Sequential Monte Carlo: the exact posterior as the particles become many."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sde_diffusion import (
    VPSDE,
    GaussianMixture,
    Inpainting,
    Matrix,
    Measurement,
    bind,
    named_target,
)
from solvers import Ancestral, sample, smc_sample
from tests.problems import SDES

# Two modes; the measurement lies between them and makes the lighter one likelier: guidance that
# only pulls moves too little mass between them, weights move it.
TWO = GaussianMixture(
    torch.tensor([[-1.0, -1.0], [1.0, 0.6]]), torch.tensor([0.09, 0.16]), torch.tensor([0.7, 0.3])
)
SEEN = Matrix(torch.tensor([[1.0, 0.4]]), noise_std=0.15)
Y = torch.tensor([[-0.1]])
POSTERIOR = TWO.posterior(SEEN, Y[0])


def run(particles: int, *, shape: tuple[int, int] = (400, 2), **settings: Any) -> Any:
    settings = {"steps": 60, "grid": "log_snr", **settings}
    sde = settings.pop("sde", VPSDE(t_min=1e-4))
    return smc_sample(TWO.score_fn(sde), sde, SEEN, Y, shape=shape, particles=particles, **settings)


def upper(x: Tensor) -> Tensor:
    """Whether a sample is of the second mode."""
    return (x.sum(-1) > -0.2).double()


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_error_falls_with_particles_to_the_floor(name: str) -> None:
    """The share of a mode that one particle per sample has: binomial, four standard errors."""
    truth = float(upper(POSTERIOR.sample(200_000, 0)[0]).mean())
    floor = 4 * math.sqrt(truth * (1 - truth) / 400)
    errors = []
    for particles in (1, 4, 32):
        found = run(particles, sde=SDES[name])
        errors.append(abs(float(upper(found.x).mean()) - truth))
    assert errors[0] > 2 * floor  # twisted proposals alone are wrong
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < floor
    mean = POSTERIOR.mean()
    stderr = (POSTERIOR.covariance().diagonal() / 400).sqrt()
    # 60 steps of a chain of order 1: 0.02 beside four standard errors.
    assert bool(((found.x.double().mean(0) - mean).abs() < 4 * stderr + 0.02).all())


def test_evidence_is_that_of_the_chain() -> None:
    """Unbiased for the sampler's own chain, of which plain samples give the mean likelihood."""
    sde = VPSDE(t_min=1e-4)
    x = sample(
        TWO.score_fn(sde),
        sde,
        Ancestral(),
        shape=(40_000, 2),
        steps=60,
        grid="log_snr",
        denoise=True,
    ).x.double()
    likelihood = torch.distributions.Normal(Y.double(), 0.15).log_prob(SEEN(x)).exp()
    expected, stderr = float(likelihood.mean()), float(likelihood.std()) / 200
    for gradient in (True, False):
        found = run(32, shape=(400, 2), gradient=gradient).log_evidence.exp()
        both = math.hypot(stderr, float(found.std()) / 20)
        assert abs(float(found.mean()) - expected) < 4 * both
    # The chain tends to the target: within 30 % at 60 steps, this far out in the tails.
    assert abs(math.log(expected) - TWO.log_evidence(SEEN, Y[0])) < 0.3


def test_measurements_without_a_gradient() -> None:
    """Which quadrant a sample lies in, seen through noise: the posterior by rejection."""

    def quadrant(x: Tensor) -> Tensor:
        return (x > 0).sum(1, keepdim=True).to(x.dtype)

    seen = Measurement(quadrant, noise_std=0.4)
    y = torch.tensor([[1.0]])
    sde = VPSDE(t_min=1e-4)
    settings: Any = {"shape": (100, 2), "particles": 200, "steps": 60, "grid": "log_snr"}
    with pytest.raises(ValueError, match=r"not differentiable.*gradient=False"):
        smc_sample(TWO.score_fn(sde), sde, seen, y, **settings)
    found = smc_sample(TWO.score_fn(sde), sde, seen, y, gradient=False, **settings)
    x, _ = TWO.sample(400_000, 0)
    weights = (-0.5 * ((quadrant(x) - 1) / 0.4) ** 2).exp()[:, 0].double()
    for event in (upper, lambda x: (quadrant(x) == 1)[..., 0].double()):
        share = float((weights * event(x)).sum() / weights.sum())
        each = torch.stack([event(p) for p in found.particles])
        means = (found.weights * each).sum(1)
        # Four standard errors over populations, and the bias of a chain of 60 steps, whose own
        # shares, by rejection, are 0.023 below the target's.
        assert abs(float(means.mean()) - share) < 4 * float(means.std()) / 10 + 0.04


def test_samples_do_not_depend_on_their_batch() -> None:
    x0, _ = TWO.sample(5, 1)
    y = SEEN.draw(x0, 0)
    sde = VPSDE()
    settings: Any = {"particles": 6, "steps": 15, "resample_below": 0.9, "dtype": torch.float64}
    together = smc_sample(TWO.score_fn(sde), sde, SEEN, y, shape=(5, 2), **settings)
    for i in range(5):
        alone = smc_sample(
            TWO.score_fn(sde), sde, SEEN, y[i : i + 1], shape=(1, 2), sample_ids=[i], **settings
        )
        assert (alone.x[0] == together.x[i]).all()
        assert (alone.particles[0] == together.particles[i]).all()
        assert (alone.ess[:, 0] == together.ess[:, i]).all()


def test_labels_reach_their_particles() -> None:
    """A score with one label per sample guides all particles of that sample."""
    target, sde = named_target("ring"), VPSDE()
    labels = torch.tensor([0, 2, 4, 6])
    nothing = Inpainting(torch.tensor([0, 0]), noise_std=1.0)
    found = smc_sample(
        bind(target.model(sde), labels),
        sde,
        nothing,
        torch.zeros(1, 2),
        shape=(4, 2),
        particles=3,
        steps=40,
    )
    # Modes lie 0.1 wide on a circle of radius 1.4, a quarter of a turn apart.
    distance = (found.particles.double() - target.means[labels][:, None]).norm(dim=2)
    assert float(distance.max()) < 0.6
    # Nothing is known: no weight moves, and no particle dies.
    assert torch.allclose(found.ess, torch.full_like(found.ess, 3.0))
    assert float(found.log_evidence.abs().max()) < 1e-12


def test_what_is_reported() -> None:
    found = run(8, shape=(7, 2), steps=10)
    assert found.x.shape == (7, 2)
    assert found.particles.shape == (7, 8, 2)
    assert found.ess.shape == (11, 7)
    assert bool(((found.ess >= 1 - 1e-9) & (found.ess <= 8 + 1e-9)).all())
    torch.testing.assert_close(found.weights.sum(1), torch.ones(7, dtype=torch.float64))
    assert (found.nfe, found.network_passes) == (11, 21)  # no gradient at the last level
    plain = run(8, shape=(7, 2), steps=10, gradient=False)
    assert (plain.nfe, plain.network_passes) == (11, 11)
    late = run(8, shape=(7, 2), steps=10, below=2.0)
    acting = int((VPSDE(t_min=1e-4).at(late.times[:-1]).sigma_over_alpha < 2.0).sum())
    assert 0 < acting < 10
    assert (late.nfe, late.network_passes) == (11, 11 + acting)
    assert all((x == found.particles[i]).all(1).any() for i, x in enumerate(found.x))


@pytest.mark.parametrize(
    "change, error, says",
    [
        ({"measurement": Inpainting(torch.ones(2))}, ValueError, "noise_std of the measurement"),
        ({"measurement": torch.abs}, TypeError, "wrap a function"),
        ({"y": torch.zeros(3, 1)}, ValueError, "one measurement, or one per sample, 2"),
        ({"y": torch.zeros(1, 2)}, ValueError, "must have shape"),
        ({"particles": 0}, ValueError, "particles"),
        ({"resample_below": 2.0}, ValueError, "resample_below"),
        ({"below": 0.0}, ValueError, "below"),
        ({"data_std": 0.0}, ValueError, "data_std"),
        ({"steps": 0}, ValueError, "steps"),
        ({"shape": (0, 2)}, ValueError, r"shape\[0\]"),
        ({"sample_ids": [1]}, ValueError, "sample_ids"),
    ],
)
def test_mistakes(change: dict[str, Any], error: type[Exception], says: str) -> None:
    sde = VPSDE()
    given: dict[str, Any] = {"measurement": SEEN, "y": Y, "shape": (2, 2), "steps": 3, **change}
    with pytest.raises(error, match=says):
        smc_sample(TWO.score_fn(sde), sde, given.pop("measurement"), given.pop("y"), **given)
