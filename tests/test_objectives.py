"""Objectives by name: losses against their definitions in x0, times against their laws."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sde_diffusion import (
    EDMSDE,
    SDE,
    VESDE,
    VPSDE,
    CosineVPSDE,
    EDMModel,
    EpsModel,
    GaussianMixture,
    NoiseLevel,
    Prediction,
    ScoreModel,
    SubVPSDE,
    TabulatedVPSDE,
    VModel,
    X0Model,
    no_time,
)
from sde_diffusion.checkpoints import FeatureStatistics, load_model, save_model
from sde_diffusion.data import DataDescription, Scaling
from sde_diffusion.losses import (
    denoising_loss,
    edm_loss,
    likelihood_weighting,
    log_normal_times,
    simple_loss,
    uniform_log_snr_times,
    uniform_times,
)
from sde_diffusion.networks import MLP, RandomFeatures
from sde_diffusion.objectives import (
    OBJECTIVES,
    PARAMETRIZATIONS,
    GeometricLadder,
    MinSNRLoss,
    even_times,
    named_objective,
    parametrized,
)
from tests.problems import DDPM_BETAS, SHORT_BETAS, assert_close_to_monte_carlo

SDES = {
    "vp": VPSDE(),
    "cosine": CosineVPSDE(),
    "subvp": SubVPSDE(),
    "ve": VESDE(),
    "edm": EDMSDE(),
    "chain": TabulatedVPSDE.from_betas(DDPM_BETAS),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Shrink(nn.Module):
    """A network that is not right: a third of its input."""

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        return x / 3


def a_batch(sde: SDE, n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    x0, noise = torch.randn(2, n, 3, generator=generator(1))
    return x0, noise, uniform_log_snr_times(n, sde, generator(2))


def model_for(name: str, sde: SDE) -> EpsModel:
    return parametrized("edm" if name == "edm" else "eps", Shrink(), sde)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_gives_one_finite_value_per_sample_and_times_in_range(name: str) -> None:
    sde = SDES["chain"]
    objective = named_objective(name, model_for(name, sde), sde)
    t = objective.times(7, sde, generator())
    assert t.shape == (7,)
    assert t.dtype == torch.float32
    assert float(t.min()) >= sde.t_min * (1 - 1e-6)
    assert float(t.max()) <= sde.t_max
    x0 = (torch.randn(7, 3, generator=generator(1)) / 3).clamp(-1, 1)
    noise = torch.randn(7, 3, generator=generator(2))
    loss = objective.loss(model_for(name, sde), x0, None, sde.at(t), noise)
    assert loss.shape == (7,)
    assert bool(loss.isfinite().all())


def test_simple_and_edm_are_what_the_shipped_models_were_trained_with() -> None:
    """The very functions, so that the generator is consumed alike and weights come out bitwise."""
    vp, edm = VPSDE(), VESDE()
    simple = named_objective("simple", EpsModel(Shrink(), vp), vp)
    assert simple.loss is simple_loss
    assert simple.times is uniform_times
    preconditioned = EDMModel(Shrink(), edm, sigma_data=0.6)
    objective = named_objective("edm", preconditioned, edm, mean=-0.9, std=1.4)
    assert objective.loss is edm_loss
    expected = log_normal_times(9, edm, generator(3), mean=-0.9, std=1.4)
    assert torch.equal(objective.times(9, edm, generator(3)), expected)


@pytest.mark.parametrize("sde", [SDES["ve"], SDES["edm"]], ids=["ve", "edm"])
def test_where_noise_grows_instead_times_are_even_in_log_snr(sde: SDE) -> None:
    assert even_times(sde) is uniform_log_snr_times


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "score", "edm"])
@pytest.mark.parametrize("name", SDES)
def test_min_snr_is_one_loss_in_whatever_form_the_network_predicts(name: str, kind: str) -> None:
    """Against the squared error of x0 times min(SNR, 5), in float64."""
    sde = SDES[name]
    x0, noise, t = (part.double() for part in a_batch(sde, 9))
    level = sde.at(t)
    model = parametrized(kind, Shrink(), sde)
    loss = MinSNRLoss()(model, x0, None, level, noise)
    found = model(level.alpha[:, None] * x0 + level.sigma[:, None] * noise, level).x0
    snr = (level.alpha / level.sigma) ** 2
    expected = snr.clamp_max(5) * (found - x0).square().mean(1)
    # Cosine's SNR falls to 1e-5, where x0 from eps loses five of sixteen digits.
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("model", "weight"),
    [
        (EpsModel, lambda snr: snr.clamp_max(5) / snr),
        (VModel, lambda snr: snr.clamp_max(5) / (snr + 1)),
        (X0Model, lambda snr: snr.clamp_max(5)),
    ],
)
def test_min_snr_weights_are_the_papers_under_vp(model, weight) -> None:
    """A silent network's error is its target, so the loss shows the weight (Hang et al.)."""

    class Silent(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return torch.zeros_like(x)

    sde = VPSDE()
    x0, noise, t = (part.double() for part in a_batch(sde, 9))
    level = sde.at(t)
    targets = {
        EpsModel: noise,
        X0Model: x0,
        VModel: level.alpha[:, None] * noise - level.sigma[:, None] * x0,
    }
    expected = weight((level.alpha / level.sigma) ** 2) * targets[model].square().mean(1)
    loss = MinSNRLoss()(model(Silent(), sde), x0, None, level, noise)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


def test_v_and_x0_losses_are_the_simple_loss_reweighted_under_vp() -> None:
    """``||v_theta - v||^2 = ||eps_theta - eps||^2 / alpha^2`` and ``sigma^2 / alpha^2`` for x0."""
    sde = VPSDE()
    x0, noise, t = (part.double() for part in a_batch(sde))
    level = sde.at(t)
    model = VModel(Shrink(), sde)
    simple = simple_loss(model, x0, None, level, noise)
    for name, factor in (("v", level.alpha**-2), ("x0", (level.sigma / level.alpha) ** 2)):
        loss = named_objective(name, model, sde).loss(model, x0, None, level, noise)
        torch.testing.assert_close(loss, factor * simple, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", SDES)
def test_importance_sampled_likelihood_agrees_with_uniform_times_and_varies_less(
    name: str,
) -> None:
    """Spread over samples against spread, and the means within the standard errors of independent
    draws, which stratified times keep below.

    From where sigma is 2 per cent on, so that the uniform estimate has a finite spread to compare.
    """
    whole = SDES[name]
    start = float(whole.time(torch.tensor(4.0, dtype=torch.float64)))
    settings = whole.config() | {"t_min": start}
    settings.pop("kind")
    sde = type(whole)(**settings)
    # Preconditioned, so that the error of eps is of one size at every level, as a trained one's is.
    model = EDMModel(Shrink(), sde, sigma_data=1.0)
    n = 20_000
    x0, noise = torch.randn(2, n, 2, generator=generator(4), dtype=torch.float64)

    def values(times, loss) -> Tensor:
        t = times(n, sde, generator(5)).double()
        return loss(model, x0, None, sde.at(t), noise)

    objective = named_objective("likelihood", model, sde)
    by_importance = values(objective.times, objective.loss)
    by_weight = values(uniform_times, partial(denoising_loss, weighting=likelihood_weighting))
    spread = math.sqrt((by_importance.var() + by_weight.var()) / n)
    assert_close_to_monte_carlo(by_importance.mean(), by_weight.mean(), spread)
    # On VE uniform times are uniform in log-SNR already: the weight is constant.
    assert float(by_importance.var()) < 1.001 * float(by_weight.var())
    if name not in ("ve", "edm"):
        assert float(by_importance.var()) < 0.5 * float(by_weight.var())


@pytest.mark.parametrize("name", SDES)
def test_likelihood_times_have_the_density_of_the_weight(name: str) -> None:
    """The share of times below t is the weight's integral up to t, by the trapezoid rule."""
    sde = SDES[name]
    drawn = named_objective("likelihood", EpsModel(Shrink(), sde), sde).times(
        2000, sde, generator()
    )
    t = torch.logspace(math.log10(sde.t_min), math.log10(sde.t_max), 40001, dtype=torch.float64)
    t = t.clamp(sde.t_min, sde.t_max)
    share = torch.cumulative_trapezoid(likelihood_weighting(sde.at(t)), t)
    share = share / share[-1]
    for quantile in (0.1, 0.5, 0.9):
        at = t[1:][torch.searchsorted(share, quantile)]
        # Stratified draws miss by at most one in 2000; the chain's g^2 has kinks for the rule.
        assert abs(float((drawn.double() <= at).double().mean()) - quantile) < 2e-3


@pytest.mark.parametrize("name", ["ve", "edm", "vp"])
def test_the_ladder_is_geometric_and_every_rung_equally_likely(name: str) -> None:
    sde = SDES[name]
    ladder = GeometricLadder(8)
    ratio = sde.at(ladder.rungs(sde)).sigma_over_alpha
    torch.testing.assert_close(ratio[1:] / ratio[:-1], (ratio[1] / ratio[0]).expand(7))
    ends = torch.stack([sde.at(float(t)).sigma_over_alpha for t in (sde.t_min, sde.t_max)])
    torch.testing.assert_close(ratio[[0, -1]], ends)
    drawn = ladder(800, sde, generator())
    _, counts = drawn.unique(return_counts=True)
    assert counts.tolist() == [100] * 8
    single = torch.cat([ladder(1, sde, source) for source in [generator(3)] for _ in range(800)])
    _, counts = single.unique(return_counts=True)
    # Binomial(800, 1/8): standard deviation 9.4.
    assert_close_to_monte_carlo(counts.double(), 100.0, 9.4)


def test_the_ncsn_loss_is_sigma_squared_times_score_matching() -> None:
    """``sigma^2 / 2 ||s + (x_t - x_0) / sigma^2||^2 / D`` (Song & Ermon 2019, eq. 5-6)."""
    sde = VESDE()
    model = parametrized("ncsnv2", Shrink(), sde)
    x0, noise, t = (part.double() for part in a_batch(sde))
    level = sde.at(t)
    loss = named_objective("ncsn", model, sde, levels=10).loss(model, x0, None, level, noise)
    sigma = level.sigma[:, None]
    x = x0 + sigma * noise
    score = x / 3 / sigma
    expected = 0.5 * (sigma**2 * (score + (x - x0) / sigma**2) ** 2).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


def test_discrete_times_are_the_chains_own_each_equally_likely() -> None:
    chain = TabulatedVPSDE.from_betas(SHORT_BETAS)
    objective = named_objective("discrete_simple", EpsModel(Shrink(), chain), chain)
    times, counts = objective.times(200, chain, generator()).unique(return_counts=True)
    assert torch.equal(times, chain.times.float())
    assert counts.tolist() == [10] * 20
    assert objective.loss is simple_loss
    part = TabulatedVPSDE.from_betas(SHORT_BETAS, t_min=0.2, t_max=0.5)
    inside = named_objective("discrete_simple", EpsModel(Shrink(), part), part)
    assert inside.times(200, part, generator()).unique().tolist() == pytest.approx(
        [0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5]
    )


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_a_network_under_every_name_is_stored_and_read_again(kind: str, tmp_path) -> None:
    sde = VESDE(sigma_max=8.0)
    net = MLP((2,), width=8, blocks=1)
    nn.init.normal_(net.outlet.weight, generator=generator())
    model = parametrized(kind, net, sde, sigma_data=0.7)
    x = torch.randn(5, 2, generator=generator())
    judge = RandomFeatures((2,))
    judge.fit(x, generator())
    save_model(
        tmp_path / kind,
        model,
        data=DataDescription("x", (2,), None, (), Scaling(-1, 1), 5, 5),
        judge=judge,
        reference={"train": FeatureStatistics.of(judge, x), "test": FeatureStatistics.of(judge, x)},
        half=False,
    )
    again = load_model(tmp_path / kind).model
    level = sde.at(torch.full((5,), 0.3))
    assert torch.equal(again(x, level).eps, model(x, level).eps)


def test_ncsnv2_sees_the_state_alone() -> None:
    """The score times sigma is the same at every level: F is blind to sigma."""
    sde = VESDE()
    net = MLP((2,), width=8, blocks=1)
    nn.init.normal_(net.outlet.weight, generator=generator())
    model = parametrized("ncsnv2", net, sde)
    assert isinstance(model, ScoreModel)
    assert model.time_label is no_time
    x = torch.randn(4, 2, generator=generator())
    levels = [sde.at(torch.full((4,), t)) for t in (0.1, 0.9)]
    low, high = (model(x, level).score * level.sigma[:, None] for level in levels)
    torch.testing.assert_close(low, high)
    torch.testing.assert_close(low, net(x, torch.zeros(4)))


def exact_but_for(kind: type, error: Tensor, target: GaussianMixture, sde: SDE) -> EpsModel:
    """The exact score as a model of a kind, its noise off by a factor ``1 + error``, (B,)."""

    class Exact(kind):
        def _predict(self, x: Tensor, level: NoiseLevel, label: object) -> Prediction:
            eps = target.predict(x, level).eps
            return Prediction.from_eps(x, level, (1 + error[:, None]) * eps)

    return Exact(Shrink(), sde)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in OBJECTIVES
        for kind in (EpsModel, X0Model, VModel, EDMModel)
        if name not in ("vlb", "hybrid") and (name != "edm" or kind is EDMModel)
    ],
)
def test_the_exact_score_is_the_minimiser_of_every_objective(name: str, kind: type) -> None:
    """The loss's derivative by a factor on the exact noise is 0 in the mean over samples; where the
    noise is a third too large it is not. (The variational bound's decoder has another optimum.)"""
    sde = TabulatedVPSDE.from_betas(SHORT_BETAS)
    target = GaussianMixture(torch.tensor([[-0.6, 0.2], [0.7, 0.1]]), torch.tensor([0.05, 0.2]))
    n = 2000
    x0, _ = target.sample(n, seed=1, dtype=torch.float64)
    noise = torch.randn(n, 2, generator=generator(2), dtype=torch.float64)

    def slopes(error: float) -> Tensor:
        factor = torch.full((n,), error, dtype=torch.float64, requires_grad=True)
        model = exact_but_for(kind, factor, target, sde)
        objective = named_objective(name, model, sde)
        level = sde.at(objective.times(n, sde, generator(3)).double())
        loss = objective.loss(model, x0, None, level, noise)
        return torch.autograd.grad(loss.sum(), factor)[0]

    right = slopes(0.0)
    assert_close_to_monte_carlo(right.mean(), 0.0, float(right.std()) / math.sqrt(n))
    wrong = slopes(0.33)
    assert float(wrong.mean() / (wrong.std() / math.sqrt(n))) > 5


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("min_snt", {}, "unknown objective 'min_snt'. Did you mean 'min_snr'?"),
        ("min_snr", {"gama": 3.0}, "Did you mean 'gamma'?"),
        ("min_snr", {"gamma": 0.0}, "gamma must be a finite number greater than 0"),
        ("simple", {"gamma": 3.0}, "objective 'simple' has no settings"),
        ("edm", {}, "needs an EDM-preconditioned network, got EpsModel"),
        ("ncsn", {"levels": 1}, "levels must be at least 2"),
        ("discrete_simple", {}, "needs a discrete chain, got VPSDE"),
        ("vlb", {}, "needs a discrete chain, got VPSDE"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(name, settings, message) -> None:
    sde = VPSDE()
    with pytest.raises(ValueError) as error:  # noqa: PT011
        named_objective(name, EpsModel(Shrink(), sde), sde, **settings)
    assert message in str(error.value)


def test_an_unknown_parametrization_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown parametrization 'epss'.*'eps'"):
        parametrized("epss", Shrink(), VPSDE())


def test_the_documents_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parent.parent / "docs" / "training-objectives.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(block, "training-objectives.md", "exec"), {"__name__": "document"})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for name in [*OBJECTIVES, *PARAMETRIZATIONS]:
        assert f"`{name}`" in text
