"""Units, dequantisation, classes, and the bound on the likelihood."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from experiments.cli import app
from sde_diffusion import (
    VESDE,
    VPSDE,
    GaussianMixture,
    NoiseLevel,
    Prediction,
    SubVPSDE,
    TabulatedVPSDE,
)
from sde_diffusion.data_files import Scaling
from sde_diffusion.discrete_bound import vlb
from sde_diffusion.units import bin_width, bits_per_dim, within_range
from solvers import catalogue, class_posterior, dequantised_likelihood, likelihood_bound
from solvers.dequantised import dequantise
from solvers.likelihood import log_likelihood
from tests.problems import DDPM_BETAS

TARGET = GaussianMixture(
    torch.tensor([[-0.5, 0.1], [0.4, -0.2], [0.3, 0.6]]),
    torch.tensor([0.02, 0.05, 0.03]),
    torch.tensor([0.5, 0.3, 0.2]),
    labels=torch.tensor([0, 1, 1]),
)
FIXED = {"solver": catalogue()["tsitouras"].type(), "steps": 10, "grid": "log_snr"}


def test_offsets_of_bits_per_dimension() -> None:
    """8-bit data: 8 on [0, 1] and 7 on [-1, 1] with bins' outer edges there; log2(127.5) for
    x / 127.5 - 1."""
    zero = torch.zeros(1)
    assert bits_per_dim(zero, (3, 2), 1 / 256) == 8
    assert bits_per_dim(zero, (3, 2), 2 / 256) == 7
    width = bin_width(Scaling(0, 255))
    assert width == pytest.approx(2 / 255)
    assert float(bits_per_dim(zero, (5,), width)) == pytest.approx(math.log2(127.5))
    assert bin_width(Scaling(0, 65535)) == pytest.approx(2 / 65535)
    assert bin_width(Scaling(-3, 13), levels=17) == pytest.approx(2 / 16)
    with pytest.raises(ValueError, match="levels is missing: a range of 0 to 16"):
        bin_width(Scaling(0, 16))
    with pytest.raises(ValueError, match="width must be a finite number greater than 0"):
        bits_per_dim(zero, (5,), 0.0)


def test_a_uniform_density_has_log2_levels_bits() -> None:
    """Density 1 / 2 per dimension on [-1, 1] with n bins: every level has probability 1 / n."""
    log_prob = torch.tensor([-6 * math.log(2.0)])
    assert float(bits_per_dim(log_prob, (6,), 2 / 32)) == pytest.approx(5)


def test_the_scale_of_raw_data_does_not_change_its_bits() -> None:
    """Raw levels 0..255 and the same as -1000..1000 have the same width in [-1, 1]."""
    assert bin_width(Scaling(-1000, 1000), 256) == pytest.approx(bin_width(Scaling(0, 255)))


def test_dequantised_bits_are_near_and_above_the_entropy_of_the_levels() -> None:
    """Of a Gaussian cut into bins of a fifth of its deviation, with levels drawn from it: the
    cross-entropy exceeds that of the levels by Jensen's gap, about (width/deviation)^2/24."""
    deviation, width = 0.25, 0.05
    target = GaussianMixture(torch.zeros(1, 1), torch.tensor([deviation**2]))
    sde = VPSDE(t_min=1e-5)
    x, _ = target.sample(200, 0, dtype=torch.float64)
    levels = ((x / width).round() * width).clamp(-1, 1)
    found = dequantised_likelihood(
        target.score_fn(sde), sde, levels, width=width, draws=4, diagnostics=False,
        prior=lambda z: target.log_prob_at(z, sde.at(1.0)), **FIXED,
    )  # fmt: skip
    edges = torch.stack([levels - width / 2, levels + width / 2]) / deviation
    probability = torch.special.ndtr(edges[1]) - torch.special.ndtr(edges[0])
    truth = -torch.log2(probability[:, 0])
    gap = found.bits_per_dim - truth
    # Within five standard errors of the mean over 200 samples and 4 draws, above by Jensen.
    stderr = float(gap.std() / math.sqrt(200))
    assert abs(float(gap.mean()) - 0.04 / 24 / math.log(2)) < 5 * stderr
    assert float(found.stderr.mean()) == pytest.approx(float(gap.abs().mean()), rel=0.5)
    assert found.values.shape == (200, 4)


def test_dequantisation_is_uniform_and_depends_on_the_sample_alone() -> None:
    x = torch.zeros(20_000, dtype=torch.float64)
    noise = dequantise(x, 2.0, 0, seed=1)
    assert float(noise.abs().max()) <= 1
    # The variance of U(-1, 1) is 1/3, its standard error over 20,000 draws 0.002.
    assert float(noise.var()) == pytest.approx(1 / 3, abs=0.01)
    assert float(noise.mean()) == pytest.approx(0, abs=0.021)
    ids = torch.tensor([7, 3])
    assert torch.equal(noise[ids], dequantise(x[:2], 2.0, 0, seed=1, sample_ids=ids))
    assert not torch.equal(noise, dequantise(x, 2.0, 1, seed=1))


def test_data_outside_the_scalings_range_is_refused_or_clipped() -> None:
    x = torch.tensor([[0.0, 1.0], [-1.5, 0.2]])
    with pytest.raises(ValueError, match=r"x\[1\] holds -1.5, outside \[-1, 1\]"):
        within_range(x)
    assert within_range(x, clip=True).tolist()[1][0] == -1
    sde = VPSDE()
    with pytest.raises(ValueError, match=r"x\[1\] holds -1.5"):
        dequantised_likelihood(TARGET.score_fn(sde), sde, x, width=0.1, **FIXED)
    dequantised_likelihood(TARGET.score_fn(sde), sde, x, width=0.1, clip=True, **FIXED)


def test_the_class_posterior_is_the_targets_own() -> None:
    sde = VPSDE(t_min=1e-5)
    x, _ = TARGET.sample(6, 0, dtype=torch.float64)
    weights = torch.tensor([0.5, 0.5])
    last = sde.at(1.0)
    found = class_posterior(
        TARGET.model(sde), sde, x, weights=weights, solver=FIXED["solver"], steps=30, grid="log_snr"
    )
    truth = torch.log_softmax(TARGET.classifier(sde)(x, sde.at(sde.t_min)), 1)
    # The standard prior is off by about alpha_T times the means: 0.0066 * 0.6 * |z|.
    torch.testing.assert_close(found.log_posterior, truth, atol=0.05, rtol=0)
    assert torch.equal(found.label, truth.argmax(1))
    own = torch.stack(
        [TARGET.conditional(c).log_prob_at(x, sde.at(sde.t_min)) for c in (0, 1)], 1
    )  # fmt: skip
    torch.testing.assert_close(found.log_prob, own, atol=0.05, rtol=0)
    assert float(last.alpha) < 0.01
    with pytest.raises(ValueError, match="weights must be 2 positive numbers"):
        class_posterior(TARGET.model(sde), sde, x, weights=[1.0, 0.0])
    with pytest.raises(ValueError, match="num_classes is missing"):
        class_posterior(lambda x, level, label: None, sde, x)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), SubVPSDE()], ids=["vp", "ve", "subvp"])
def test_with_the_exact_score_the_bound_is_the_value(sde: VPSDE) -> None:
    """The paths of the model are those of the data then, and the bound is tight, but for the
    prior."""
    x, _ = TARGET.sample(5, 0, dtype=torch.float64)
    found = likelihood_bound(TARGET.score_fn(sde), sde, x, draws=600)
    truth = -TARGET.log_prob_at(x, sde.at(float(sde.t_min)))
    assert float(found.stderr.max()) < 0.4
    assert float(((found.bound - truth).abs() / found.stderr).max()) < 4.5
    again = likelihood_bound(
        TARGET.score_fn(sde), sde, x[3:4], draws=600, sample_ids=torch.tensor([3])
    )
    assert torch.equal(again.values[0], found.values[3])


class Scaled:
    """The exact noise of N(0, v), times a factor: a wrong score whose reverse SDE is linear."""

    def __init__(self, variance: float, factor: float) -> None:
        self.variance, self.factor = variance, factor

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        total = level.alpha**2 * self.variance + level.sigma**2
        eps = (level.sigma / total).reshape(-1, *[1] * (x.ndim - 1)).to(x) * x
        return Prediction.from_eps(x, level, self.factor * eps)


@pytest.mark.parametrize("factor", [0.8, 1.3])
def test_the_bound_lies_above_the_reverse_sdes_law_of_a_perturbed_score(factor: float) -> None:
    """That law is Gaussian: dv/dt backward = -2 a v + g^2 with drift a, here by fine steps."""
    sde, variance = VPSDE(), 0.3
    score_fn = Scaled(variance, factor)
    times = torch.linspace(1.0, sde.t_min, 20_001, dtype=torch.float64)
    middle = sde.at(0.5 * (times[1:] + times[:-1]))
    total = middle.alpha**2 * variance + middle.sigma**2
    h = times[:-1] - times[1:]
    rate = -middle.f - middle.g2 * factor / total  # of x, per unit of time backward
    spread = torch.ones((), dtype=torch.float64)
    for decay, gain in zip(torch.exp(2 * rate * h), middle.g2 * h, strict=True):
        spread = spread * decay + gain
    x = torch.tensor([[0.1, -0.3], [0.9, 0.2], [0.0, 0.0]], dtype=torch.float64)
    log_prob = -0.5 * ((x**2).sum(1) / spread + 2 * torch.log(2 * math.pi * spread))
    found = likelihood_bound(score_fn, sde, x, draws=1500)
    gap = found.bound + log_prob
    assert bool((gap > 4 * found.stderr).all()), gap
    exact = likelihood_bound(Scaled(variance, 1.0), sde, x, draws=1500)
    ode = log_likelihood(Scaled(variance, 1.0), sde, x, **FIXED)
    assert float(((exact.bound + ode.log_prob).abs() / exact.stderr).max()) < 4.5


def test_the_chains_bound_lies_above_the_likelihood_on_the_same_data() -> None:
    """``-log P(levels) <= L_vlb`` and ``<=`` the dequantised ODE value, with the exact score; the
    chain's bound is the larger one: its decoder and its thousand steps are not exact."""
    chain = TabulatedVPSDE.from_betas(DDPM_BETAS)
    x, _ = TARGET.sample(12, 3, dtype=torch.float64)
    width = 2 / 255
    levels = ((x.clamp(-1, 1) + 1) / width).round() * width - 1
    score_fn = TARGET.score_fn(chain)
    upper = vlb(score_fn, chain, levels, draws=2).bits_per_dim
    ode = dequantised_likelihood(score_fn, chain, levels, width=width, draws=2, **FIXED)
    # Bins of 0.008 against deviations of 0.14 and more: the density times the volume, to 1e-3.
    truth = bits_per_dim(TARGET.log_prob(levels), (2,), width)
    stderr = float((upper - truth).std() / math.sqrt(12))
    assert float((upper - truth).mean()) > -3 * stderr
    assert float((ode.bits_per_dim - truth).abs().max()) < 0.05  # noise of t = 0.001, one draw
    assert float((upper - ode.bits_per_dim).mean()) > -3 * stderr


def lines(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "likelihood.csv").read_text().splitlines()))


def test_the_command_writes_a_line_per_sample_and_a_summary(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["likelihood", "--target", "moons", "-n", "5", "--prior", "exact", "--steps", "12",
                 "--bound", "4", "--classify", "--batch-size", "3", "--out", str(out)]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "log p(x)" in done.stdout
    rows = lines(out)
    summary = json.loads((out / "likelihood.json").read_text())["summary"]
    assert [row["index"] for row in rows] == list("01234")
    mean = sum(float(row["log_prob"]) for row in rows) / 5
    assert summary["log likelihood"] == pytest.approx(mean)
    assert summary["samples"] == 5
    assert 0 <= summary["accuracy"] <= 1
    arguments[arguments.index("3")] = "5"
    again = CliRunner().invoke(app, [*arguments[:-1], str(tmp_path / "other")])
    assert again.exit_code == 0
    other = lines(tmp_path / "other")
    assert [row["log_prob"] for row in rows] == [row["log_prob"] for row in other]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["likelihood", "--target", "ring", "--solver", "ancestral"], "draws noise"),
        (["likelihood", "--target", "ring", "--solver", "deis"], "steps is missing"),
        (["likelihood", "--target", "ring", "--prior", "other"], "unknown --prior"),
        (["likelihood", "--prior", "exact"], "--prior exact needs a target"),
        (["likelihood", "-n", "100000"], "more than the"),
        (["likelihood", "--target", "ring", "--label", "all"], "--label must be a class, 'own'"),
        (["likelihood", "--label", "12"], "--label must lie in 0..9"),
        (["likelihood", "--target", "ring", "--divergence", "exakt"], "unknown divergence"),
        (["likelihood", "--steps", "5", "--tolerance", "0.1"], "exclude each other"),
        (["interpolate", "--target", "gmm16"], "the picture is of images or of points"),
        (["interpolate", "--points", "1"], "--points must be at least 2"),
        (["interpolate", "--classes", "--label", "3"], "leave --label out"),
        (["interpolate", "--pairs", "5000"], "needs 10000 held-out samples"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_interpolate_draws_paths_and_classes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    for more in ([], ["--classes"]):
        done = CliRunner().invoke(
            app, ["interpolate", "--target", "moons", "--pairs", "2", "--points", "3", "--steps",
                  "8", "--out", str(out), *more],
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        held = {path.name for path in out.iterdir()}
        assert held == {"interpolation.json", "interpolation.npy", "interpolation.png"}
