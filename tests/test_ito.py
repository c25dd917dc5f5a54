"""General SDEs: the divergence against closed forms, reverse and flow against linear solvers, and
what is refused."""

import math

import pytest
import torch

import solvers
from sde_diffusion import VPSDE, ItoSDE, NonFiniteError, classifier_guided, named_target
from sde_diffusion.ito import (
    DensityTransition,
    GaussianPrior,
    GeometricBrownianMotion,
    LogNormal,
    calculus,
    gradient_of,
    score_fn_from,
    score_from,
    simulated,
)
from sde_diffusion.ito.equations import CHARTS, Charted
from solvers import CounterNoise, ito, sample, sample_ito
from tests.problems import SDES, assert_close_to_monte_carlo

T = torch.tensor(0.4, dtype=torch.float64)


def states(n, *event, seed=0, positive=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *event, generator=generator, dtype=torch.float64)
    return x.exp() if positive else x


def zero(x, t):
    return torch.zeros_like(x)


# --- the divergence ------------------------------------------------------------------------------

MIX = states(3, 2, seed=9)
# G by kind, and div G G^T worked out by hand.
FIELDS = {
    # G G^T = |x|^2 I
    "isotropic": (lambda x, t: x.norm(dim=1), lambda x: 2 * x),
    "diagonal": (lambda x, t: x.sin() * t, lambda x: (2 * x).sin() * T**2),
    # G G^T = x x^T
    "scalar": (lambda x, t: x, lambda x: (x.shape[1] + 1) * x),
    # G = x_i S_ij: (G G^T)_ij = x_i x_j (S S^T)_ij
    "general": (
        lambda x, t: x[:, :, None] * MIX,
        lambda x: x * ((MIX @ MIX.T).sum(1) + (MIX @ MIX.T).diagonal()),
    ),
}


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("elements", [calculus.ELEMENTS, 1])
def test_divergence_of_the_covariance(kind, elements, monkeypatch):
    monkeypatch.setattr(calculus, "ELEMENTS", elements)  # 1: every direction a chunk of its own
    field, exact = FIELDS[kind]
    sde = ItoSDE(lambda x, t: x, field, kind=kind)
    x = states(5, 3)
    assert torch.allclose(sde.covariance_divergence(x, T), exact(x), rtol=1e-12, atol=1e-12)


def test_divergence_does_not_depend_on_the_batch():
    sde = ItoSDE(lambda x, t: x, FIELDS["general"][0], kind="general")
    x = states(64, 3)
    whole = sde.covariance_divergence(x, T)
    parts = torch.cat([sde.covariance_divergence(part, T) for part in x.split(7)])
    assert torch.equal(whole, parts)


def test_divergence_takes_events_of_any_shape_and_times_per_sample():
    x = states(4, 2, 3)
    sde = ItoSDE(
        lambda x, t: x,
        lambda x, t: x.flatten(1)[:, :, None] * t.reshape(-1, 1, 1) * torch.ones(6, 1).double(),
        kind="general",
    )
    t = torch.linspace(0.1, 1, 4, dtype=torch.float64)
    # G = t x: G G^T = t^2 x x^T, divergence t^2 (D + 1) x.
    exact = 7 * x * t[:, None, None] ** 2
    assert torch.allclose(sde.covariance_divergence(x, t), exact, rtol=1e-12)


def test_divergence_given_is_used_and_constant_noise_has_none():
    given = ItoSDE(lambda x, t: x, lambda x, t: x, divergence=lambda x, t: 7 * x)
    assert torch.equal(given.covariance_divergence(MIX, T), 7 * MIX)
    constant = ItoSDE(lambda x, t: x, lambda x, t: t, kind="isotropic", state_dependent=False)
    assert constant.covariance_divergence(MIX, T) is None


def test_the_closed_divergences_of_the_examples_are_those_of_autograd():
    sde = GeometricBrownianMotion(0.3, 0.7).sde()
    x = states(5, 2, positive=True)
    by_autograd = calculus.covariance_divergence(sde.diffusion, sde.kind, x, T)
    assert torch.allclose(sde.covariance_divergence(x, T), by_autograd, rtol=1e-12)


# --- the equations -------------------------------------------------------------------------------


def test_reverse_and_flow_are_what_the_formulas_say():
    # f - div - A (s + gamma grad log p(y|x)), and half of it, with a matrix G written out.
    sde = ItoSDE(lambda x, t: -x, FIELDS["general"][0], kind="general")
    x, score, guidance = states(5, 3), states(5, 3, seed=1), states(5, 3, seed=2)
    g = FIELDS["general"][0](x, T)
    covariance = g @ g.mT
    pull = (covariance @ (score + 2 * guidance)[:, :, None])[:, :, 0] + FIELDS["general"][1](x)
    reverse = sde.reverse(lambda x, t: score, lambda x, t: guidance, scale=2.0)
    flow = sde.flow(lambda x, t: score, lambda x, t: guidance, scale=torch.full((5,), 2.0))
    assert torch.allclose(reverse.drift(x, T), -x - pull)
    assert torch.allclose(flow.drift(x, T), -x - 0.5 * pull)
    assert torch.equal(reverse.diffusion(x, T), g)
    assert (reverse.stochastic, flow.stochastic) == (True, False)


def test_a_constant_matrix_is_one_for_all_samples():
    size = torch.tensor([0.5, 2.0], dtype=torch.float64)
    options = {"state_dependent": False, "t_min": 0.0}
    diagonal = ItoSDE(zero, lambda x, t: size, **options)
    general = ItoSDE(zero, lambda x, t: torch.diag(size), kind="general", **options)
    x = states(6, 2)
    runs = [
        sample_ito(sde.reverse(lambda x, t: -x), ito.Milstein(), x=x, steps=5, seed=1).x
        for sde in (diagonal, general)
    ]
    assert torch.allclose(*runs, rtol=1e-12)
    srk = sample_ito(diagonal.reverse(lambda x, t: -x), ito.Torchsde("srk"), x=x, steps=5, seed=1)
    heun = sample_ito(general.reverse(lambda x, t: -x), ito.Torchsde("heun"), x=x, steps=5, seed=1)
    assert srk.x.shape == heun.x.shape == x.shape


@pytest.mark.parametrize("name", SDES)
def test_a_linear_sde_is_sampled_as_its_own_solver_does(name):
    # The same update from the same noise: rounding only.
    sde, target = SDES[name], named_target("gmm16")
    score_fn = target.score_fn(sde)
    x = states(3, 16) * sde.prior_std()
    times = solvers.grids.log_snr(sde, 20)
    equation = ItoSDE.from_linear(sde).reverse(score_from(score_fn, sde))
    linear = sample(score_fn, sde, solvers.EulerMaruyama(), x=x, grid=times, seed=5)
    general = sample_ito(equation, ito.EulerMaruyama(), x=x, grid=times, seed=5)
    assert torch.allclose(linear.x, general.x, rtol=1e-9, atol=1e-9)
    assert linear.nfe == general.nfe == 20


def test_a_linear_flow_reaches_the_same_end():
    sde, target = VPSDE(), named_target("gaussian")
    score_fn = target.score_fn(sde)
    x = states(2, 2)
    # Both solved to 1e-9; within 30 tolerances, as in test_adapters.py.
    linear = sample(score_fn, sde, solvers.TorchdiffeqODE(rtol=1e-9, atol=1e-9), x=x)
    equation = ItoSDE.from_linear(sde).flow(score_from(score_fn, sde))
    general = sample_ito(equation, ito.Torchdiffeq(rtol=1e-9, atol=1e-9), x=x)
    assert torch.allclose(linear.x, general.x, atol=6e-8)


def test_the_linear_prior_and_guided_scores_pass_the_bridge():
    sde, target = VPSDE(), named_target("ring")
    guided = classifier_guided(target.score_fn(sde), target.classifier(sde), 1, scale=1.0)
    equation = ItoSDE.from_linear(sde).reverse(score_from(guided, sde))
    run = sample_ito(equation, ito.EulerMaruyama(), shape=(6, 2), steps=9, seed=2)
    again = sample(guided, sde, solvers.EulerMaruyama(), shape=(6, 2), steps=9, seed=2, grid="time")
    assert torch.allclose(run.x, again.x, rtol=1e-3, atol=1e-4)  # float32
    assert (run.nfe, run.network_passes) == (again.nfe, again.network_passes)
    x, level = states(4, 2), sde.at(0.5)
    back = score_fn_from(score_from(guided, sde))(x, level)
    assert torch.allclose(back.eps, guided(x, level).eps, rtol=1e-12)
    prior = ItoSDE.from_linear(SDES["ve"]).prior
    assert torch.allclose(prior.log_prob(x), SDES["ve"].prior_log_prob(x), rtol=1e-12)


def test_linear_transition_has_the_score_of_its_density():
    sde = VPSDE()
    kernel = ItoSDE.from_linear(sde).transition
    x0, x, t = states(4, 2), states(4, 2, seed=1), torch.linspace(0.1, 1, 4).double()

    def log_prob(x, x0, t):
        level = sde.at(t)
        offset = x - level.alpha[:, None] * x0
        return (-0.5 * offset**2 / level.sigma[:, None] ** 2).sum(1)

    by_density = DensityTransition(kernel.sample, log_prob)
    assert torch.allclose(kernel.score(x, x0, t), by_density.score(x, x0, t), rtol=1e-10)


@pytest.mark.parametrize("chart", CHARTS)
def test_charts_have_the_derivatives_they_claim(chart):
    chart = CHARTS[chart]
    x = states(7, 1, positive=True).requires_grad_()
    (slope,) = torch.autograd.grad(chart.of(x).sum(), x, create_graph=True)
    y = chart.of(x).detach()
    assert torch.allclose(chart.back(y), x)
    assert torch.allclose(chart.slope(y).expand_as(x), slope)
    if slope.requires_grad:
        (bend,) = torch.autograd.grad(slope.sum(), x, allow_unused=True)
        assert torch.allclose(chart.bend(y), torch.zeros_like(x) if bend is None else bend)


def test_logarithm_of_geometric_motion_is_brownian_in_both_directions():
    process = GeometricBrownianMotion(0.3, 0.7)
    data = LogNormal(0.2, 0.5)
    sde, chart = process.sde(), CHARTS["log"]
    y = states(5, 1)
    forward = Charted(sde.forward(), chart)
    assert torch.allclose(forward.drift(y, T), torch.full_like(y, 0.3 - 0.5 * 0.7**2))
    assert torch.allclose(forward.diffusion(y, T), torch.full_like(y, 0.7))
    # Backward: the reverse of a Brownian motion with drift, whose marginal is normal.
    law = process.marginal(data, T)
    reverse = Charted(sde.reverse(lambda x, t: law.score(x)), chart)
    exact = (0.3 - 0.5 * 0.7**2) + 0.7**2 * (y - law.mean) / law.variance
    assert torch.allclose(reverse.drift(y, T), exact)


def test_simulation_has_the_law_of_the_transition():
    process = GeometricBrownianMotion(0.1, 0.5)
    n, t = 4000, torch.linspace(0.2, 1, 4000, dtype=torch.float64)
    x0 = torch.full((n, 1), 2.0, dtype=torch.float64)
    x, before = simulated(process.sde(), x0, t, 50, torch.Generator().manual_seed(0))
    law = process.marginal(LogNormal(x0.log(), 0.0), t[:, None])
    z = (x.log() - law.mean) / law.variance.sqrt()
    # Euler's bias in the mean of log x, sigma^2 h / 2 of a standard deviation or so, is below 0.01.
    assert_close_to_monte_carlo(z.mean(), 0.0, n**-0.5 + 0.002)
    assert_close_to_monte_carlo(z.var(), 1.0, (2 / n) ** 0.5 + 0.004)
    assert not torch.equal(x, before)


# --- what is refused -----------------------------------------------------------------------------

GEOMETRIC = GeometricBrownianMotion().sde()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"drift": 1.0}, "drift must be callable"),
        ({"divergence": 1.0}, "divergence must be callable"),
        ({"kind": "diagnal"}, "Did you mean 'diagonal'"),
        ({"coordinates": "logs"}, "Did you mean 'log'"),
        ({"t_min": 2.0}, "t_min must lie in"),
        ({"t_max": math.inf}, "t_max must be a finite"),
    ],
)
def test_sdes_that_cannot_be(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ItoSDE(**{"drift": lambda x, t: x, "diffusion": lambda x, t: x, **change})


TWISTED = ItoSDE(  # x_2 is driven by x_1 dw_2: the smallest noise that does not commute
    zero, lambda x, t: torch.stack([torch.ones_like(x), x.flip(1)], 1).tril(), kind="general"
)


@pytest.mark.parametrize(
    "equation, solver, change, message",
    [
        (GEOMETRIC.reverse(zero), ito.RungeKutta(), {}, "for equations without noise"),
        (GEOMETRIC.flow(zero), ito.EulerMaruyama(), {}, "this one has none"),
        (GEOMETRIC.reverse(zero), ito.EulerMaruyama(), {"x": -torch.ones(2, 1)}, "positive"),
        (GEOMETRIC.reverse(zero), ito.EulerMaruyama(), {"steps": None}, "steps is missing"),
        (GEOMETRIC.reverse(zero), ito.EulerMaruyama(), {"grid": "karras"}, "unknown grid"),
        (GEOMETRIC.reverse(zero), ito.EulerMaruyama(), {"grid": [0.1, 1.0]}, "must fall"),
        (GEOMETRIC, ito.EulerMaruyama(), {"grid": [1.0, 0.1]}, "must rise"),
        (GEOMETRIC, ito.EulerMaruyama(), {"grid": [0.0, 9.0]}, "t_max=1"),
        (GEOMETRIC, ito.EulerMaruyama(), {"shape": (2, 1), "x": None}, "prior"),
        (GEOMETRIC, ito.EulerMaruyama(), {"coordinates": "polar"}, "unknown coordinates"),
        (GEOMETRIC, ito.Torchsde(), {"trajectory": True}, "trajectory does not apply"),
        (GEOMETRIC, solvers.EulerMaruyama(), {}, "solver of solvers.ito"),
        (GEOMETRIC.reverse(lambda x, t: x[:, 0]), ito.EulerMaruyama(), {}, "x's shape"),
        (ItoSDE(lambda x, t: x[:, :1], zero), ito.EulerMaruyama(), {}, "drift gave shape"),
        (
            ItoSDE(zero, lambda x, t: torch.ones(3, 2), kind="general"),
            ito.EulerMaruyama(),
            {},
            "diffusion of kind",
        ),
        (ItoSDE(zero, lambda x, t: x.flip(1)), ito.EulerMaruyama(), {}, "g_i depend on x_i"),
        (TWISTED, ito.Milstein(), {}, "commutative"),
        (TWISTED, ito.Torchsde("srk"), {}, "diagonal or scalar"),
    ],
)
def test_runs_that_cannot_be(equation, solver, change, message):
    given = {"x": torch.rand(2, 2) + 0.5, "steps": 4, **change}
    if "grid" in change and not isinstance(change["grid"], str):
        given["steps"] = None
    with pytest.raises((ValueError, TypeError), match=message):
        sample_ito(equation, solver, **given)


@pytest.mark.parametrize("make", [lambda: ito.RungeKutta("rk5"), lambda: ito.Torchsde("rk")])
def test_unknown_methods(make):
    with pytest.raises(ValueError, match="unknown method"):
        make()


def test_nan_names_its_step():
    def score(x, t):
        return torch.where(t < 0.5, math.nan, -x)

    sde = ItoSDE.from_linear(VPSDE())
    with pytest.raises(NonFiniteError, match=r"step 26, t = 0\.4805") as error:
        sample_ito(sde.reverse(score), ito.EulerMaruyama(), shape=(2, 2), steps=50)
    assert error.value.step == 26


def test_a_solve_that_does_not_end_names_its_sample():
    def score(x, t):  # a jump at every evaluation: no tolerance is reached
        return x * 0 + 1e6 * torch.sin(1e9 * t)

    with pytest.raises(RuntimeError, match=r"sample 0 at t = .*max_nfe=50"):
        sample_ito(
            ItoSDE.from_linear(VPSDE()).flow(score),
            ito.Torchdiffeq(rtol=1e-12, atol=1e-12, max_nfe=50),
            x=torch.ones(1, 1, dtype=torch.float64),
        )


def test_gradient_of_flows_under_no_grad_and_refuses_a_single_number():
    x = states(3, 2)
    with torch.no_grad():
        assert torch.allclose(gradient_of(lambda x, t: (-0.5 * x**2).sum(1))(x, T), -x)
    with pytest.raises(ValueError, match="one value per sample"):
        gradient_of(lambda x, t: x.sum())(x, T)


def test_trajectory_and_empty_batch_and_prior():
    sde = ItoSDE(zero, lambda x, t: torch.ones_like(x), state_dependent=False, t_min=0.0)
    run = sample_ito(sde, ito.EulerMaruyama(), x=states(3, 2), steps=5, trajectory=2)
    assert run.trajectory.shape == (4, 3, 2)
    assert run.trajectory_times.tolist() == pytest.approx([0, 0.4, 0.8, 1.0])
    assert torch.equal(run.trajectory[-1], run.x)
    assert run.nfe == 0
    empty = sample_ito(sde, ito.EulerMaruyama(), x=states(0, 2), steps=5)
    assert empty.x.shape == (0, 2)
    z = CounterNoise(4).prior(torch.empty(3, 2))
    assert torch.equal(GaussianPrior(2.0).sample(lambda slot: z), 2 * z)
