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
    EpsModel,
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
from sde_diffusion.checkpoints import load_model
from sde_diffusion.networks import MLP
from solvers import Adaptive, CounterNoise, catalogue
from solvers.divergence import Exact, Hutchinson, HutchPlusPlus
from solvers.encoding import ode_solvers
from solvers.jacobian import Jacobian, Memory, Passes, plan_passes
from solvers.likelihood import log_likelihood, student

_draws = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(5)).double()
TARGET = GaussianMixture(  # small and quick; three anisotropic components, rotated
    _draws[:, 0], 0.02 * torch.eye(4) + 0.1 * _draws @ _draws.mT, labels=torch.arange(3)
)
SDE_VP = VPSDE(t_min=1e-5)


def data(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return TARGET.sample(count, 0, dtype=dtype)[0]


def own_prior(sde: VPSDE, target: GaussianMixture = TARGET) -> object:
    return lambda z: target.log_prob_at(z, sde.at(float(sde.t_max)))


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


def tsitouras() -> object:
    return catalogue()["tsitouras"].type()


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


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


def test_estimates_agree_with_the_exact_trace_within_their_standard_errors() -> None:
    x = data(24)
    options = {"solver": tsitouras(), "steps": 10, "grid": "log_snr", "diagnostics": False}
    score_fn = TARGET.score_fn(SDE_VP)
    exact = log_likelihood(score_fn, SDE_VP, x, **options).log_prob
    sizes = {}
    for divergence, law in (
        ("hutchinson", "rademacher"),
        ("hutchinson", "gaussian"),
        ("hutch++", ""),
    ):
        for probes in (4, 16) if law else (6, 9):
            found = log_likelihood(
                score_fn, SDE_VP, x, divergence=divergence, probes=probes,
                probe_law=law or "rademacher", **options,
            )  # fmt: skip
            count = found.values.shape[1]
            t = (found.log_prob - exact) / found.stderr
            # The mean square of Student's t is f / (f - 2); of 24, within 5 deviations or so.
            if count > 4:
                assert float((t**2).mean()) < 3 * (count - 1) / (count - 3)
            low, high = found.interval(0.999)
            assert float(((low <= exact) & (exact <= high)).double().mean()) > 0.8, divergence
            sizes[divergence, law, probes] = float((found.log_prob - exact).square().mean().sqrt())
    for law in ("rademacher", "gaussian"):
        ratio = sizes["hutchinson", law, 4] / sizes["hutchinson", law, 16]
        assert 1.3 < ratio < 3.1  # 2, to the 15 % that 24 samples give either size, three times
    full = log_likelihood(score_fn, SDE_VP, x[:3], divergence="hutch++", probes=12, **options)
    torch.testing.assert_close(full.log_prob, exact[:3], atol=1e-9, rtol=0)


def test_the_t_quantiles_are_students() -> None:
    assert student(0.95, 1) == pytest.approx(12.706, abs=1e-3)
    assert student(0.95, 10_000) == pytest.approx(1.9602, abs=1e-3)


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


class Quadratic:
    """``eps = A x`` with a matrix that is not symmetric."""

    matrix = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double()

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        return Prediction.from_eps(x, level, x @ self.matrix.mT.to(x))


@pytest.mark.parametrize("way", ["reverse", "copies", "forward"])
@pytest.mark.parametrize("pairs", [24, 100])
def test_traces_of_a_known_matrix(way: str, pairs: int) -> None:
    x = torch.randn(3, 5, generator=seeded(2)).double()
    noise = CounterNoise(0)
    jacobian = Jacobian(Quadratic(), x, SDE_VP.at(0.5), Passes(way, pairs))
    trace = Quadratic.matrix.trace().expand(3)
    torch.testing.assert_close(Exact().estimate(jacobian, x.new_empty(0, 3, 5))[:, 0], trace)
    for divergence in (Hutchinson(500), Hutchinson(500, "gaussian")):
        values = divergence.estimate(jacobian, divergence.draw(x, noise))
        stderr = values.std(1) / math.sqrt(500)
        assert float(((values.mean(1) - trace) / stderr).abs().max()) < 4.5
    complete = HutchPlusPlus(15)
    values = complete.estimate(jacobian, complete.draw(x, noise))
    torch.testing.assert_close(values, trace[:, None].expand_as(values))
    rest = torch.cat(
        [HutchPlusPlus(6).estimate(jacobian, HutchPlusPlus(6).draw(x, CounterNoise(seed)))
         for seed in range(30)], 1
    )  # fmt: skip
    assert float(((rest.mean(1) - trace) / (rest.std(1) / math.sqrt(60))).abs().max()) < 4.5


def test_modes_and_passes_give_one_value_and_forward_is_refused_where_it_would_be_wrong() -> None:
    torch.manual_seed(0)
    net = MLP((4,), width=16, blocks=1).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sde = VPSDE()
    score_fn = bind(EpsModel(net, sde), None)
    x = torch.randn(5, 4, generator=seeded(4)).double()
    options = {"solver": tsitouras(), "steps": 4}
    values = [
        log_likelihood(score_fn, sde, x, memory=memory, **options).log_prob
        for memory in (None, 1, 20_000, Memory("forward"), Memory("reverse", vectors=3))
    ]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], atol=1e-9, rtol=0)
    guided = classifier_guided(TARGET.score_fn(sde), TARGET.classifier(sde), 0, 2.0)
    with pytest.raises(ValueError, match="mode='forward' does not go with this score_fn"):
        plan_passes(Memory("forward"), guided, data(2), sde.at(0.5))
    assert plan_passes(Memory(bytes=1), guided, data(2), sde.at(0.5)).way != "forward"
    assert plan_passes(Memory(bytes=1), score_fn, x, sde.at(0.5)).way == "forward"


def test_a_pass_keeps_to_its_memory() -> None:
    """The graph of all samples and products at once would take 40 times what is allowed."""
    net = torch.nn.Sequential(torch.nn.Linear(64, 4096), torch.nn.SiLU(), torch.nn.Linear(4096, 64))

    def score_fn(x: Tensor, level: NoiseLevel) -> Prediction:
        return Prediction.from_eps(x, level, net(x))

    sde, x = VPSDE(), torch.randn(64, 64, generator=seeded(0))
    bound = 4 * 1024**2
    passes = plan_passes(Memory(bytes=bound), score_fn, x, sde.at(0.5))
    each = 2 * 4096 * 4  # what SiLU and the second layer keep of a sample
    assert passes.pairs <= bound / each
    peak = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal peak
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                peak = max(peak, out.numel() * out.element_size())
            return out

    with Watch():
        log_likelihood(
            score_fn, sde, x, solver=catalogue()["ddim"].type(), steps=2, memory=bound,
            diagnostics=False,
        )  # fmt: skip
    weights = 4096 * 64 * 4
    assert peak <= max(bound, weights)


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


def test_evaluations_and_products_are_counted() -> None:
    calls = 0

    def score_fn(x: Tensor, level: NoiseLevel) -> Prediction:
        nonlocal calls
        calls += 1
        return TARGET.predict(x, level)

    options = {"solver": catalogue()["ddim"].type(), "steps": 5, "diagnostics": False}
    plan_passes(Memory(), score_fn, data(2), SDE_VP.at(SDE_VP.t_min))
    before, calls = calls, 0
    found = log_likelihood(score_fn, SDE_VP, data(2), **options)
    assert calls - before == found.nfe == 5
    assert found.products == 5 * 4
    full = log_likelihood(score_fn, SDE_VP, data(2), **{**options, "diagnostics": True})
    assert (full.nfe, full.products) == (9, 7 * 4)
    few = log_likelihood(score_fn, SDE_VP, data(2), divergence="hutchinson", probes=3, **options)
    assert few.products == 15


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


def test_a_shipped_network_by_copies_where_vmap_does_not_go() -> None:
    loaded = load_model("digits-vp")
    score_fn = bind(loaded.model, torch.tensor([3, 7]))
    x = torch.rand(2, 1, 8, 8, generator=seeded(0)) * 2 - 1
    level = loaded.sde.at(0.5)
    passes = plan_passes(Memory(), score_fn, x, level)
    jacobian = Jacobian(score_fn, x, level, passes)
    exact = Exact().estimate(jacobian, x.new_empty(0, 2, 64))[:, 0]
    h = 1e-2
    rise = torch.zeros(2)
    for place in range(64):
        step = torch.zeros(64)
        step[place] = h
        high, low = (score_fn(x + s * step.reshape(1, 8, 8), level).eps for s in (1, -1))
        rise += (high - low).reshape(2, 64)[:, place].detach() / (2 * h)
    torch.testing.assert_close(exact, rise, rtol=5e-3, atol=5e-2)  # h^2 and 1e-7 / h, 64 times


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
