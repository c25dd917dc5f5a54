"""The traces inside a log-likelihood: exact and estimated, the passes that give them, their memory
and their number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sde_diffusion import VPSDE, EpsModel, NoiseLevel, Prediction, bind, classifier_guided
from sde_diffusion.checkpoints import load_model
from sde_diffusion.networks import MLP
from solvers import CounterNoise, catalogue
from solvers.divergence import Exact, Hutchinson, HutchPlusPlus
from solvers.jacobian import Jacobian, Memory, Passes, plan_passes
from solvers.likelihood import log_likelihood, student
from tests.likelihoods import SDE_VP, TARGET, data, seeded, tsitouras


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
