"""What the harder targets promise, a data set's own law, and targets from files."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.conditions import Condition
from experiments.draw import Machine
from experiments.judging import Cell, make_judge
from experiments.pictures import _Plane
from experiments.subjects import SubjectOptions, make_subjects
from sde_diffusion import (
    VESDE,
    VPSDE,
    GaussianMixture,
    empirical_mixture,
    load_target,
    named_target,
)
from sde_diffusion.data import load_data
from solvers import Ancestral, ProbabilityFlow, sample

# --- named ---------------------------------------------------------------------------------------


def student(x: Tensor, mean: Tensor, tau: float, nu: float) -> Tensor:
    """Log-density of the multivariate t law in the plane."""
    square = ((x - mean) / tau).square().sum(1)
    volume = math.lgamma(nu / 2 + 1) - math.lgamma(nu / 2) - math.log(nu * math.pi * tau**2)
    return volume - (nu / 2 + 1) * torch.log1p(square / nu)


def test_heavy_tails_are_students() -> None:
    target = named_target("heavy_tails")
    modes = [target.conditional(c) for c in (0, 1)]
    # Unit mean variance: tau^2 E[1/u] + the means' own 0.545, E[1/u] = 3, tau = 0.35 beforehand.
    tau = 0.35 / math.sqrt(3 * 0.35**2 + 0.545)
    direction = torch.tensor([[0.6, -0.8]], dtype=torch.float64)
    for mode in modes:
        mean = mode.means[0]
        radii = torch.tensor([[0.0], [0.1], [1.0], [4.0], [10.0], [50.0]], dtype=torch.float64)
        x = mean + tau * radii * direction
        wrong = (mode.log_prob(x) - student(x, mean, tau, 3.0)).abs()
        # tau itself: the sum for E[1/u] ends at log u = -9, which leaves out 0.6 %.
        assert (wrong < 0.02).all()
        exact_tau = float((mode.variances[-1, 0] * math.exp(2.5)).sqrt())
        x = mean + exact_tau * radii * direction
        wrong = (mode.log_prob(x) - student(x, mean, exact_tau, 3.0)).abs()
        assert (wrong[:5] < 1e-5).all()
        assert wrong[5] < 2e-3
    # Each a density of its own with its own score.
    x = target.sample(64, seed=0, dtype=torch.float64)[0].requires_grad_()
    level = VESDE().at(0.5)
    (wanted,) = torch.autograd.grad(target.log_prob_at(x, level).sum(), x)
    torch.testing.assert_close(target.predict(x, level).score, wanted, rtol=1e-9, atol=1e-9)


def test_swiss_roll_lies_on_its_surface() -> None:
    target = named_target("swiss_roll")
    x, labels = target.sample(4000, seed=0, dtype=torch.float64)
    scale = float(target.variances.min().sqrt()) / 0.1
    t = torch.linspace(1.3 * math.pi, 4.7 * math.pi, 4000, dtype=torch.float64)
    curve = scale * torch.stack([t * t.cos(), t * t.sin()], 1)
    distances = torch.cdist(x[:, [0, 2]], curve)
    nearest = distances.min(1)
    # Half-normal of 0.1, and the sagitta of pieces 0.6 * 0.9 wide on circles of radius 4.7 or more:
    # 0.03 on average. The next turn is 6.3 away.
    assert nearest.values.mean() < 0.12 * scale
    assert (nearest.values < 1.0 * scale).all()
    # The classes follow each other along the roll.
    along = [t[nearest.indices[labels == c]].mean().item() for c in range(4)]
    assert along == sorted(along)
    assert target.covariance().diagonal()[1] < target.covariance().diagonal()[[0, 2]].min()


def test_imbalanced_and_nearly_singular() -> None:
    weights = named_target("imbalanced").weights
    torch.testing.assert_close(weights[:-1] / weights[1:], torch.full((5,), 3.0).double())
    assert float(weights[-1]) == pytest.approx(1 / 364)
    singular = named_target("nearly_singular")
    condition = singular.variances.amax(1) / singular.variances.amin(1)
    torch.testing.assert_close(condition, torch.full((4,), 1e6).double(), rtol=1e-6, atol=0)
    assert singular.has_density


@pytest.mark.parametrize("name", ["heavy_tails", "imbalanced", "nearly_singular", "swiss_roll"])
def test_classes_follow_bayes_rule(name: str) -> None:
    target, level = named_target(name), VPSDE().at(0.2)
    x, _ = target.sample(300, seed=1, dtype=torch.float64)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    x = level.alpha * x + level.sigma * noise
    shares = torch.stack(
        [target.weights[target.labels == c].sum() for c in range(target.num_classes)]
    )
    parts = [target.conditional(c).log_prob_at(x, level) for c in range(target.num_classes)]
    joint = torch.stack(parts, 1) + shares.log()
    torch.testing.assert_close(target.classifier(VPSDE())(x, level), joint, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        joint.logsumexp(1), target.log_prob_at(x, level), rtol=1e-9, atol=1e-9
    )
    only, same = target.sample(50, seed=1, label=1)
    assert (same == 1).all()
    assert only.shape == (50, target.dimension)


# --- empirical -----------------------------------------------------------------------------------


def test_digits_score_by_hand() -> None:
    data = load_data("digits")
    x0 = torch.cat([data.train_x[:], data.test_x[:]]).double()
    target, sde = named_target("empirical:digits"), VPSDE()
    assert target.means.shape == (1797, 64)
    assert (target.event_shape, target.num_classes) == ((1, 8, 8), 10)
    level = sde.at(0.2)
    x = level.alpha * x0[:12] + level.sigma * torch.randn(
        12, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    square = (x[:, None] - level.alpha * x0).flatten(2).square().sum(2)
    logits = -square / (2 * level.sigma**2)
    denoised = torch.einsum("bn,nchw->bchw", logits.softmax(1), x0)
    found = target.score_fn(sde)(x, level)
    torch.testing.assert_close(found.x0, denoised, rtol=1e-9, atol=1e-9)
    volume = 32 * math.log(2 * math.pi * float(level.sigma) ** 2) + math.log(1797)
    torch.testing.assert_close(
        target.log_prob_at(x, level), logits.logsumexp(1) - volume, rtol=1e-9, atol=1e-9
    )
    # The class's own samples alone.
    labels = torch.cat([data.train_y, data.test_y])
    alone = torch.einsum("bn,nchw->bchw", logits[:, labels == 3].softmax(1), x0[labels == 3])
    torch.testing.assert_close(target.score_fn(sde, 3)(x, level).x0, alone, rtol=1e-9, atol=1e-9)


def test_samples_of_the_law_and_of_solvers_are_the_data() -> None:
    target, sde = named_target("empirical:digits"), VPSDE()
    drawn, labels = target.sample(20, seed=1, label=4, dtype=torch.float64)
    assert (labels == 4).all()
    of_class = target.conditional(4).means
    assert (torch.cdist(drawn.flatten(1), of_class).min(1).values < 1e-6).all()
    for solver in (ProbabilityFlow("heun"), Ancestral()):
        run = sample(
            target.score_fn(sde, torch.arange(6)),
            sde,
            solver,
            shape=(6, 1, 8, 8),
            steps=40,
            denoise=True,
            dtype=torch.float64,
        )
        apart = torch.cdist(run.x.flatten(1), target.means)
        # At t_min = 1e-3 the noise, 0.01, tells any two digits apart: each is one of them.
        assert (apart.min(1).values < 1e-6).all()
        assert torch.equal(target.labels[apart.argmin(1)], torch.arange(6))


def test_without_width_there_is_no_density() -> None:
    x = torch.tensor([[[0.0, 1.0]], [[2.0, 3.0]]])
    sharp, wide = empirical_mixture(x), empirical_mixture(x, torch.tensor([0, 1]), std=0.5)
    assert not sharp.has_density
    with pytest.raises(ValueError, match=r"log_prob needs a density.*log_prob_at"):
        sharp.log_prob(x)
    by_hand = math.log(0.5 * (1 + math.exp(-8 / 0.5)) / (2 * math.pi * 0.25))
    assert wide.log_prob(x.double()).tolist() == pytest.approx([by_hand, by_hand])
    assert wide.num_classes == 2
    with pytest.raises(ValueError, match="std must be at least 0, got -1"):
        empirical_mixture(x, std=-1)
    with pytest.raises(ValueError, match="x must hold samples"):
        empirical_mixture(torch.empty(0, 2))


def test_empirical_of_a_file_and_of_nothing(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    np.save(tmp_path / "x_labels.npy", np.arange(30) % 3)
    (subject,) = make_subjects(SubjectOptions((f"empirical:{tmp_path / 'x.npy'}",), (), ("vp",)))
    assert (subject.event_shape, subject.num_classes) == ((3,), 3)
    with pytest.raises(ValueError, match=r"--target empirical:digit: .*Did you mean 'digits'"):
        make_subjects(SubjectOptions(("empirical:digit",)))
    with pytest.raises(ValueError, match=r"x\.npy.*--target empirical:"):
        make_subjects(SubjectOptions((str(tmp_path / "x.npy"),)))


# --- files ---------------------------------------------------------------------------------------


def from_text(tmp_path: Path, text: str) -> GaussianMixture:
    file = tmp_path / "target.toml"
    file.write_text(text)
    return load_target(file)


def test_a_mixture_in_a_file_is_that_mixture(tmp_path: Path) -> None:
    means = [[-1.0, 0, 0, 0], [1.0, 0.5, 0, 0]]
    np.save(tmp_path / "means.npy", np.array(means))
    wanted = GaussianMixture(
        torch.tensor(means), torch.tensor([0.05, 0.1]), torch.tensor([1.0, 3.0]),
        torch.tensor([1, 0]), (1, 2, 2),
    )  # fmt: skip
    rest = "weights = [1, 3]\nlabels = [1, 0]\nevent_shape = [1, 2, 2]\n"
    level = VPSDE().at(0.3)
    x = wanted.sample(5, seed=0, dtype=torch.float64)[0]
    diagonal = [[v] * 4 for v in (0.05, 0.1)]
    for given in (means, '"means.npy"'):
        for covariances in ([0.05, 0.1], diagonal):
            made = from_text(tmp_path, f"means = {given}\ncovariances = {covariances}\n{rest}")
            for read in (
                lambda m: m.score_fn(VPSDE())(x, level).score,
                lambda m: m.class_logits(x, level),
            ):
                torch.testing.assert_close(read(made), read(wanted), rtol=1e-6, atol=1e-6)
    same = from_text(tmp_path, f"means = {means}\ncovariances = 0.3")
    assert bool((same.variances == 0.3).all())


def test_rules_make_what_they_say(tmp_path: Path) -> None:
    grid = from_text(tmp_path, 'kind = "grid"\nside = 3\ndimension = 4\nstd = 0.05')
    assert grid.means.shape == (81, 4)
    assert grid.num_classes == 10
    wanted = torch.full((4,), 1 + 0.05**2).double()
    torch.testing.assert_close(grid.covariance().diagonal(), wanted)
    assert len(set(map(tuple, grid.means.tolist()))) == 81
    ring = from_text(tmp_path, 'kind = "ring"\ncomponents = 5\ndimension = 3\nclasses = 5')
    torch.testing.assert_close(ring.means.norm(dim=1), torch.full((5,), 2.0).double().sqrt())
    assert ring.num_classes == 5
    text = 'kind = "random"\ncomponents = 2000\ndimension = 256\nseed = 7\nstd = [0.1, 0.4]'
    random = from_text(tmp_path, text)
    assert random.means.shape == (2000, 256)
    assert random.means.std().item() == pytest.approx(1, abs=0.01)  # 7 standard errors
    widths = random.variances.sqrt()
    assert 0.1 <= widths.min() < 0.101
    assert 0.399 < widths.max() <= 0.4
    assert torch.equal(from_text(tmp_path, text).means, random.means)
    assert not torch.equal(from_text(tmp_path, text.replace("7", "8")).means, random.means)
    digits = from_text(tmp_path, 'kind = "empirical"\ndata = "digits"\nstd = 0.1\nclasses = false')
    assert digits.num_classes == 1
    assert digits.has_density
    assert digits.event_shape == (1, 8, 8)


def test_the_examples_of_the_docs_load(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs/targets.md").read_text()
    examples = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    shapes = [from_text(tmp_path, example).means.shape for example in examples]
    assert shapes == [(2, 2), (2000, 256)]


def test_data_beside_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(20, 2)))
    assert from_text(tmp_path, 'kind = "empirical"\ndata = "x.npy"').means.shape == (20, 2)


@pytest.mark.parametrize(
    "text, message",
    [
        ("means = [", "is not TOML"),
        ("covariances = [1.0]", "the key 'means' is missing"),
        ("means = [[0.0]]", "the key 'covariances' is missing"),
        ("means = [[0.0]]\ncovariance = [1.0]", "unknown key 'covariance'.*'covariances'"),
        ('kind = "rng"', "unknown kind 'rng'.*'ring'"),
        ("kind = 3", "unknown kind 3"),
        ("means = [[0.0], [1.0, 2.0]]\ncovariances = [1.0]", "means must be a list of numbers"),
        ('means = [["a"]]\ncovariances = [1.0]', "means must be a list of numbers"),
        ('means = "no.npy"\ncovariances = [1.0]', r"means = 'no\.npy' is no \.npy file"),
        ("means = [[0.0]]\ncovariances = [-1.0]", "covariances must be positive"),
        ("means = [[0.0]]\ncovariances = [1.0, 2.0]", "covariances must have shape"),
        ("means = [[0.0]]\ncovariances = [1.0]\nweights = [0.0]", "weights must be 1 positive"),
        ("means = [[0.0]]\ncovariances = [1.0]\nlabels = [0.5]", "labels must be 1 integers"),
        ("means = [[0.0]]\ncovariances = [1.0]\nevent_shape = [2]", "event_shape must hold"),
        ("means = [[0.0]]\ncovariances = [1.0]\nevent_shape = 1", "event_shape must be a list"),
        ('kind = "grid"\nside = 1', "side must be at least 2"),
        ('kind = "grid"\nside = 10\ndimension = 9', "more than 100,000 components"),
        ('kind = "ring"\ncomponents = 2.5', "components must be a whole number"),
        ('kind = "ring"\ncomponents = 3\nclasses = 4', "classes must be at most 3"),
        ('kind = "random"\ncomponents = 3\ndimension = 5000', "dimension must be at most 4096"),
        ('kind = "random"\ncomponents = 3\ndimension = 2\nstd = 0', "std must be a finite"),
        ('kind = "random"\ncomponents = 3\ndimension = 2\nstd = [1]', r"std must be .*\[low, high"),
        ('kind = "random"\ncomponents = 3\ndimension = 2\nstd = "a"', "std must be a number"),
        ('kind = "empirical"\ndata = 3', "data must be a name or path"),
        ('kind = "empirical"\ndata = "digts"', "unknown data set 'digts'"),
        ('kind = "empirical"\ndata = "digits"\nclasses = 3', "classes must be true or false"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"target\.toml'.*{message}"):
        from_text(tmp_path, text)


def test_files_are_subjects(tmp_path: Path) -> None:
    texts = {"a/mine.toml": "components = 4", "b/mine.toml": "components = 6"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(f'kind = "ring"\n{text}\n')
    files = tuple(str(tmp_path / name) for name in texts)
    first, second = make_subjects(SubjectOptions((*files, "ring"), (), ("vp",)))[:2]
    assert (first.name, second.name) == ("mine", "mine'")
    assert (first.num_classes, second.num_classes) == (4, 6)
    assert first.identity("vp") != second.identity("vp")
    with pytest.raises(ValueError, match=r"--target .*none\.toml.* cannot be read: No such file"):
        make_subjects(SubjectOptions((str(tmp_path / "none.toml"),)))


def test_images_of_a_law_are_judged() -> None:
    (subject,) = make_subjects(SubjectOptions(("empirical:digits",), (), ("vp",)))
    judge = make_judge(subject, 30, 0, Machine(torch.device("cpu")))
    for condition in (Condition(), Condition(label="all")):
        cell = Cell("vp", condition, Ancestral())
        true = judge.true_samples(cell, 0)
        assert true is not None
        assert true.shape == (30, 1, 8, 8)
        same, floor = judge.metrics(cell, true, 0), judge.floor(cell, 0)
        assert same["energy"] == pytest.approx(0, abs=1e-9)
        assert floor["energy"] > 0.1  # about the mean distance, 6, times 2 / 30
        assert math.isfinite(floor["w2"] + floor["sliced_w2"])


# --- pictures ------------------------------------------------------------------------------------


def test_vectors_are_seen_where_they_vary_most() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 5, generator=generator, dtype=torch.float64)
    x = x * torch.tensor([0.1, 3.0, 0.2, 2.0, 0.1]) + 7
    plane = _Plane.of(x)
    assert plane is not None
    torch.testing.assert_close(
        plane.seen(x).T.cov().diag(), torch.linalg.eigvalsh(x.T.cov())[[-1, -2]]
    )
    # Nearly the second and the fourth axis, not turned round.
    assert plane.axes[1, 0] > 0.99
    assert plane.axes[3, 1] > 0.99
    assert _Plane.of(x[:, :2]) is None


def test_posterior_of_points_weighs_them() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 1, 2, 2, generator=generator, dtype=torch.float64)
    matrix = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    target, y, noise = empirical_mixture(x), matrix @ x[0].flatten() + 0.1, 0.4
    law = target.posterior(matrix, y, noise)
    square = (y - target.means @ matrix.mT).square().sum(1)
    torch.testing.assert_close(law.weights, (-square / (2 * noise**2)).softmax(0))
    assert torch.equal(law.means, target.means)
    assert not law.variances.any()
    assert law.rotation is None
    assert law.event_shape == (1, 2, 2)
