"""Perturbed samples and the prior, against their laws."""

from __future__ import annotations

import pytest
import torch

from sde_diffusion import EDMSDE, SDE, VESDE, VPSDE, CosineVPSDE, SubVPSDE, TabulatedVPSDE
from tests.problems import (
    DDPM_BETAS,
    SDES,
    GaussianProblem,
    assert_close_to_monte_carlo,
    inner_times,
)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("event", [(3,), (2, 4, 5), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_perturb_is_alpha_x0_plus_sigma_noise_sample_by_sample(
    name: str, event: tuple[int, ...], dtype: torch.dtype
) -> None:
    sde = SDES[name]
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, *event, generator=generator, dtype=dtype)
    times = torch.tensor(inner_times(sde, 4), dtype=torch.float64)
    per_sample = sde.perturb(x0, times, noise)  # float64 times must not promote a float32 state
    assert per_sample.dtype == dtype
    assert per_sample.shape == x0.shape
    for i, t in enumerate(times.tolist()):
        alpha, sigma = (v.item() for v in (sde.at(t).alpha, sde.at(t).sigma))
        expected = alpha * x0[i] + sigma * noise[i]
        torch.testing.assert_close(per_sample[i], expected)  # rounding of one dtype
        for one in (t, torch.tensor(t, dtype=torch.float64)):
            whole = sde.perturb(x0, one, noise)
            assert whole.dtype == dtype
            torch.testing.assert_close(whole[i], expected)


@pytest.mark.parametrize("name", SDES)
def test_perturbed_samples_have_the_marginals_moments(name: str) -> None:
    problem = GaussianProblem(SDES[name])
    n, t = 40_000, inner_times(SDES[name], 5)[2]
    x0, _ = problem.target.sample(n, seed=1, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = SDES[name].perturb(x0, t, noise)
    expected = problem.marginal(t)
    variance = expected.covariance.diagonal()
    assert_close_to_monte_carlo(x.mean(0), expected.mean, (variance / n).sqrt())
    # Var of an entry of a sample covariance: (C_ij^2 + C_ii C_jj) / n.
    spread = ((expected.covariance**2 + torch.outer(variance, variance)) / n).sqrt()
    assert_close_to_monte_carlo(torch.cov(x.T), expected.covariance, spread)


def test_perturb_wants_noise_of_the_right_shape() -> None:
    with pytest.raises(ValueError, match=r"noise must have x0's shape \(4, 2\), got \(4,\)"):
        VPSDE().perturb(torch.zeros(4, 2), 0.5, torch.zeros(4))


PRIORS = [
    (VPSDE(), 1.0),
    (CosineVPSDE(), 1.0),
    (SubVPSDE(), 1.0),
    (TabulatedVPSDE.from_betas(DDPM_BETAS), 1.0),
    (VESDE(), 50.0),
    (VESDE(0.02, 8.0), 8.0),
    (VESDE(0.01, 1.0, t_max=0.5), 0.1),  # geometric: halfway between 0.01 and 1
    (EDMSDE(), 80.0),
    (EDMSDE(t_max=20.0), 20.0),
]


@pytest.mark.parametrize("sde, std", PRIORS, ids=repr)
@pytest.mark.parametrize("event", [(3,), (2, 3, 4), ()])
def test_prior_is_a_normal_of_its_std(sde: SDE, std: float, event: tuple[int, ...]) -> None:
    assert sde.prior_std().shape == ()
    assert sde.prior_std().dtype == torch.float64
    assert sde.prior_std().item() == pytest.approx(std, rel=1e-12)
    x = 2 * std * torch.randn(5, *event, generator=torch.Generator().manual_seed(3)).double()
    each = torch.distributions.Normal(torch.tensor(0.0).double(), std).log_prob(x)
    expected = each.reshape(5, -1).sum(1)
    found = sde.prior_log_prob(x)
    assert found.shape == (5,)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
