"""Log-likelihoods against closed forms, independent integration, and each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sde_diffusion import (
    EDMSDE,
    VESDE,
    VPSDE,
    GaussianMixture,
    NoiseLevel,
    Prediction,
    ScoreFn,
    SubVPSDE,
    bind,
    classifier_free_guided,
    classifier_guided,
    named_target,
)
from solvers import Adaptive, catalogue
from solvers.encoding import ode_solvers
from solvers.jacobian import Memory
from solvers.likelihood import log_likelihood
from tests.likelihoods import SDE_VP, TARGET, data, own_prior, seeded, tsitouras


def test_gmm16_under_vp_to_a_tenth_of_a_millinat() -> None:
    """The benchmark's goal, on a few samples: exact trace, the terminal density given."""
    target = named_target("gmm16")
    x, _ = target.sample(6, 0, dtype=torch.float64)
    found = log_likelihood(target.score_fn(SDE_VP), SDE_VP, x, prior=own_prior(SDE_VP, target))
    assert float((found.log_prob - found.truncation - target.log_prob(x)).abs().max()) < 1e-4
    assert float((found.log_prob - target.log_prob(x)).abs().mean()) < 2e-4


@pytest.mark.parametrize(
    "sde", [VPSDE(), VESDE(), SubVPSDE(), EDMSDE()], ids=["vp", "ve", "subvp", "edm"]
)
def test_a_mixture_has_its_own_log_density(sde: VPSDE) -> None:
    """At t_min, with the terminal density given; to the tolerance 1e-7 a step in nats."""
    x = data(4)
    found = log_likelihood(
        TARGET.score_fn(sde), sde, x, prior=own_prior(sde), plan=Adaptive(1e-7, 1e-7)
    )
    truth = TARGET.log_prob_at(x, sde.at(float(sde.t_min)))
    torch.testing.assert_close(found.log_prob, truth, atol=1e-5, rtol=0)
    assert bool(found.reached.all())
    assert bool((found.stderr == 0).all())
    assert found.prior_mismatch is None
    # What t_min hides: sigma^2 against variances of 0.01, first order kept, second left out.
    clean = TARGET.log_prob(x)
    second = 4 * (float(sde.at(float(sde.t_min)).sigma) ** 2 / 0.02) ** 2 * 30
    torch.testing.assert_close(found.log_prob - found.truncation, clean, atol=1e-5 + second, rtol=0)


@pytest.mark.parametrize("sde", [SDE_VP, VESDE()], ids=["vp", "ve"])
def test_the_prior_mismatch_is_estimated_and_matched_moments_remove_it(sde: VPSDE) -> None:
    x = data(4)
    score_fn = TARGET.score_fn(sde)
    options = {"solver": tsitouras(), "steps": 10, "grid": "log_snr"}
    standard = log_likelihood(score_fn, sde, x, **options)
    true = TARGET.log_prob_at(standard.z, sde.at(float(sde.t_max))) - sde.prior_log_prob(standard.z)
    assert float(true.abs().max()) > 1e-3
    # Second order in a mismatch of about 0.01 a dimension.
    torch.testing.assert_close(standard.prior_mismatch, true, atol=1e-5, rtol=1e-3)
    exact = log_likelihood(score_fn, sde, x, prior=own_prior(sde), **options)
    torch.testing.assert_close(
        standard.log_prob + standard.prior_mismatch, exact.log_prob, atol=1e-5, rtol=0
    )
    moments = (TARGET.mean(), TARGET.covariance())
    matched = log_likelihood(score_fn, sde, x, prior="moments", moments=moments, **options)
    left, before = (
        float((each.log_prob - exact.log_prob).abs().max()) for each in (matched, standard)
    )
    assert left < 0.05 * before  # third moments at t_max, alpha^3 of the data's
    many = TARGET.sample(4000, 1, dtype=torch.float64)[0]
    sampled = log_likelihood(score_fn, sde, x, prior="moments", moments=many, **options)
    assert float((sampled.log_prob - exact.log_prob).abs().max()) < 0.2 * before


@pytest.mark.parametrize("name", ode_solvers())
def test_every_ode_solver_gives_the_gaussians_density(name: str) -> None:
    sde = VPSDE()
    target = GaussianMixture(torch.tensor([[0.5, -1.0]]), torch.tensor([[0.09, 1.44]]))
    solver = catalogue()[name].type()
    x, _ = target.sample(3, 0, dtype=torch.float64)
    own = getattr(solver, "adaptive", False)
    found = log_likelihood(
        target.score_fn(sde),
        sde,
        x,
        prior=own_prior(sde, target),
        solver=solver,
        steps=None if own else 200,
        grid=None if own else "log_snr",
        diagnostics=False,
    )
    truth = target.log_prob_at(x, sde.at(sde.t_min))
    # Two dimensions at 200 steps: h = 0.06 in log-SNR, so about h^order, or 1e-5 a step.
    atol = 2e-3 if own else max(2 * 0.06**solver.order, 1e-6)
    torch.testing.assert_close(found.log_prob, truth, atol=atol, rtol=0)


@pytest.mark.parametrize("scale", [2.0, 0.3])
def test_scaling_the_data_shifts_the_log_density_by_d_log_scale(scale: float) -> None:
    """Under VE with sigmas scaled alike, every step is the same."""
    x, rotation = data(3), torch.linalg.qr(torch.randn(4, 4, generator=seeded(1)).double())[0]
    plain = GaussianMixture(TARGET.means, TARGET._full_covariances(), TARGET.weights)
    moved = GaussianMixture(
        scale * TARGET.means @ rotation.mT + 3.0,
        scale**2 * rotation @ TARGET._full_covariances() @ rotation.mT,
        TARGET.weights,
    )
    sdes = VESDE(0.01, 50.0), VESDE(0.01 * scale, 50.0 * scale)
    values = [
        log_likelihood(
            target.score_fn(sde), sde, at, prior=own_prior(sde, target), plan=Adaptive(1e-7, 1e-7)
        ).log_prob
        for target, sde, at in (
            (plain, sdes[0], x),
            (moved, sdes[1], scale * x @ rotation.mT + 3.0),
        )
    ]
    torch.testing.assert_close(values[1], values[0] - 4 * math.log(scale), atol=1e-4, rtol=0)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson", "hutch++"])
def test_a_samples_value_does_not_depend_on_its_batch(divergence: str) -> None:
    x, labels = data(7), torch.arange(7) % 3
    options = {"divergence": divergence, "probes": 6, "seed": 3}
    fixed = {"solver": tsitouras(), "steps": 6, "grid": "log_snr"}
    part = torch.tensor([4, 1])
    for more in (fixed, {"plan": Adaptive(1e-3, 1e-3)}):
        whole = log_likelihood(TARGET.score_fn(SDE_VP, labels), SDE_VP, x, **options, **more)
        alone = log_likelihood(
            TARGET.score_fn(SDE_VP, labels[part]),
            SDE_VP,
            x[part],
            sample_ids=part,
            **options,
            **more,
        )
        for name in ("log_prob", "stderr", "z", "truncation", "prior_mismatch"):
            a, b = getattr(whole, name)[part], getattr(alone, name)
            if more is fixed:
                assert torch.equal(a, b), name
            else:  # step sizes are per-sample powers, which round by the vector's length
                torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_guided_and_conditional_likelihoods() -> None:
    """With scale 1 both guidances are the exact conditional, whose density is known."""
    label, x = 2, TARGET.sample(3, 1, label=2, dtype=torch.float64)[0]
    truth = TARGET.conditional(label).log_prob_at(x, SDE_VP.at(SDE_VP.t_min))
    model = TARGET.model(SDE_VP)
    guided: list[ScoreFn] = [
        bind(model, label),
        classifier_guided(TARGET.score_fn(SDE_VP), TARGET.classifier(SDE_VP), label),
        classifier_free_guided(model, label, torch.tensor(1.0)),
    ]
    for score_fn in guided:
        found = log_likelihood(
            score_fn, SDE_VP, x, prior=own_prior(SDE_VP, TARGET.conditional(label)),
            plan=Adaptive(1e-6, 1e-6), diagnostics=False,
        )  # fmt: skip
        torch.testing.assert_close(found.log_prob, truth, atol=1e-4, rtol=0)


class NanAbove:
    """An exact score that is NaN where the first element is above 10."""

    target = GaussianMixture(torch.zeros(1, 2), torch.ones(1))

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        eps = self.target.score_fn(VPSDE())(x, level).eps
        return Prediction.from_eps(x, level, torch.where(x[:, :1] > 10, math.nan, eps))


def test_a_sample_that_fails_is_nan_and_reported_and_the_others_keep_their_values() -> None:
    sde = VPSDE()
    x = torch.tensor([[0.5, 1.0], [100.0, 0.0], [-1.0, 0.3]], dtype=torch.float64)
    found = log_likelihood(NanAbove(), sde, x, diagnostics=False)
    assert found.reached.tolist() == [True, False, True]
    assert found.log_prob.isnan().tolist() == [False, True, False]
    good = torch.tensor([0, 2])
    truth = NanAbove.target.log_prob(x[good])
    torch.testing.assert_close(found.log_prob[good], truth, atol=1e-4, rtol=0)
    stopped = log_likelihood(
        TARGET.score_fn(sde), sde, data(2), plan=Adaptive(1e-12, 1e-12, max_steps=20)
    )
    assert not bool(stopped.reached.any())
    assert bool(stopped.log_prob.isnan().all())


def test_a_scalar_event_and_an_image_and_float32() -> None:
    sde = VPSDE()
    x = torch.tensor([0.3, -1.0])
    normal = torch.distributions.Normal(0.0, 1.0)

    def score_fn(x: Tensor, level: NoiseLevel) -> Prediction:
        return Prediction.from_eps(
            x, level, x * level.sigma.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        )

    for event in ((), (1, 2, 3)):
        at = x.reshape(2, *[1] * len(event)).expand(2, *event).contiguous()
        found = log_likelihood(score_fn, sde, at, diagnostics=False)
        assert found.z.shape == at.shape
        assert found.z.dtype == torch.float32
        wanted = normal.log_prob(at).reshape(2, -1).sum(1).double()
        torch.testing.assert_close(found.log_prob, wanted, atol=1e-4, rtol=0)


def test_what_does_not_fit_is_refused_before_any_work() -> None:
    sde, x = VPSDE(), data(2)
    score_fn = TARGET.score_fn(sde)
    cases = [
        ({"divergence": "exakt"}, "unknown divergence 'exakt'. Did you mean 'exact'"),
        ({"divergence": "hutch++", "probes": 2}, "probes must be at least 3"),
        ({"divergence": "hutchinson", "probes": 0}, "probes must be at least 1"),
        ({"probe_law": "cauchy", "divergence": "hutchinson"}, "unknown law 'cauchy'"),
        ({"prior": "normal"}, "unknown prior 'normal'"),
        ({"prior": "moments"}, "needs moments="),
        ({"moments": x}, "moments is only used with prior='moments'"),
        ({"prior": "moments", "moments": x[:, :3]}, "moments must be at least two samples"),
        ({"prior": "moments", "moments": (x[0], x)}, r"moments must be \(mean, covariance\)"),
        ({"memory": Memory, "sample_ids": [1]}, "sample_ids must be 2 whole numbers"),
        ({"solver": catalogue()["ancestral"].type(), "steps": 3}, "draws noise"),
    ]
    for options, message in cases:
        options = {k: v for k, v in options.items() if v is not Memory}
        with pytest.raises(ValueError, match=message.replace("hutch++", r"hutch\+\+")):
            log_likelihood(score_fn, sde, x, **options)
    with pytest.raises(ValueError, match=r"x\[1\] holds NaN"):
        log_likelihood(score_fn, sde, torch.stack([x[0], x[1] / 0]))
    for memory in (0, -1):
        with pytest.raises(ValueError, match="bytes must be at least 1"):
            log_likelihood(score_fn, sde, x, memory=memory)
    with pytest.raises(ValueError, match="unknown mode 'both'"):
        Memory("both")

    def detached(x: Tensor, level: NoiseLevel) -> Prediction:
        return Prediction.from_eps(x, level, TARGET.predict(x, level).eps.detach())

    with pytest.raises(ValueError, match="passes no gradient on to x"):
        log_likelihood(detached, sde, x)
