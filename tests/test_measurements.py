"""Measurements: adjoints, inverses, shapes, and the exact posterior of a mixture under them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sde_diffusion import (
    Blur,
    Colorization,
    Downsampling,
    GaussianMixture,
    Inpainting,
    LinearMap,
    LinearMeasurement,
    Matrix,
    Measurement,
    gaussian_kernel,
    named_target,
)

GENERATOR = torch.Generator().manual_seed(0)
UNEVEN = torch.rand(3, 2, generator=GENERATOR, dtype=torch.float64)  # no symmetry hides a flip
CASES: dict[str, tuple[LinearMeasurement, tuple[int, ...]]] = {
    "inpainting": (Inpainting(torch.tensor([[1, 0, 1, 0]] * 2 + [[0, 0, 1, 1]] * 2)), (3, 4, 4)),
    "inpainting all": (Inpainting(torch.ones(5)), (5,)),
    "inpainting none": (Inpainting(torch.zeros(5)), (5,)),
    "colour": (Colorization(), (3, 2, 5)),
    "downsampling": (Downsampling(2), (3, 4, 6)),
    "downsampling vectors": (Downsampling(3), (6,)),
    "blur": (Blur(UNEVEN), (2, 5, 4)),
    "blur vectors": (Blur(gaussian_kernel(3, 0.6, axes=1)), (6,)),
    "blur that loses": (Blur(torch.tensor([0.5, 0.5])), (6,)),  # the highest frequency is gone
    "matrix": (Matrix(torch.randn(3, 5, generator=GENERATOR)), (5,)),
    "matrix with a row twice": (Matrix(torch.ones(2, 5)), (5,)),
    "map": (LinearMap(lambda x: x[:, 0].cumsum(1)[:, 1:], (2, 4)), (2, 4)),
}


def pair(name: str) -> tuple[LinearMeasurement, Tensor, Tensor]:
    """A measurement, samples, and measurements unrelated to them; float64."""
    measurement, event = CASES[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, *event, generator=generator, dtype=torch.float64)
    y = torch.randn(measurement(x).shape, generator=generator, dtype=torch.float64)
    return measurement, x, y


# Sums of at most 48 products of numbers about 1: rounding stays below 1e-13.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("name", CASES)
def test_adjoint(name: str) -> None:
    measurement, x, y = pair(name)
    left = (measurement(x) * y).flatten(1).sum(1)
    right = (x * measurement.adjoint(y)).flatten(1).sum(1)
    torch.testing.assert_close(left, right, **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_pseudo_inverse(name: str) -> None:
    """Two of Penrose's conditions; with the range of A^T the other two follow. Conjugate gradients
    stop at a relative residual of 2e-15, times the condition number, below 100 here."""
    measurement, x, y = pair(name)
    measured = measurement(x)
    back = measurement.pseudo_inverse(measured)
    torch.testing.assert_close(measurement(back), measured, rtol=1e-11, atol=1e-11)
    matrix = measurement.matrix(tuple(x.shape[1:]))
    expected = torch.linalg.pinv(matrix, rtol=1e-7) @ y.reshape(3, -1, 1)
    torch.testing.assert_close(
        measurement.pseudo_inverse(y).flatten(1), expected[..., 0], rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("name", CASES)
def test_solve_and_gram_against_the_matrix(name: str) -> None:
    measurement, x, y = pair(name)
    matrix = measurement.matrix(tuple(x.shape[1:]))
    torch.testing.assert_close(
        measurement(x).flatten(1), x.flatten(1) @ matrix.T, rtol=1e-12, atol=1e-12
    )
    gram, b = matrix @ matrix.T, 0.3
    constant = measurement.gram(tuple(y.shape[1:]))
    if constant is not None:
        torch.testing.assert_close(gram, constant * (gram != 0).double(), **EXACT)
    if name != "map":
        cubed = measurement.spectral(y, lambda power: power**3).reshape(3, -1, 1)
        torch.testing.assert_close(
            cubed, gram @ gram @ gram @ y.reshape(3, -1, 1), rtol=1e-11, atol=1e-11
        )
    spread = torch.tensor([0.7, 0.0, 2.0], dtype=torch.float64)  # one per sample
    for i, found in enumerate(measurement.adjoint(measurement.solve(y, spread, b))):
        whole = spread[i] * gram + b * torch.eye(len(gram), dtype=torch.float64)
        expected = matrix.T @ torch.linalg.solve(whole, y[i].flatten())
        torch.testing.assert_close(found.flatten(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_one_by_one(name: str) -> None:
    measurement, x, y = pair(name)
    for i in range(3):
        part = slice(i, i + 1)
        assert (measurement(x[part]) == measurement(x)[part]).all()
        alone = measurement.pseudo_inverse(y[part])
        assert (alone == measurement.pseudo_inverse(y)[part]).all()


def test_blur_is_the_convolution_written_out() -> None:
    blur, image = Blur(UNEVEN), torch.zeros(1, 4, 5, dtype=torch.float64)
    image[0, 0, 3] = 1.0  # at the edge: the kernel comes in again at the other side
    found = blur(image)[0]
    for i, row in enumerate(UNEVEN):
        for j, value in enumerate(row):
            assert abs(found[(0 + i - 1) % 4, (3 + j - 1) % 5] - value) < 1e-15


def test_noise_is_drawn_where_something_is_measured() -> None:
    x = torch.zeros(20_000, 2)
    y = Inpainting(torch.tensor([1, 0]), noise_std=0.5).draw(x, 0)
    assert (y[:, 1] == 0).all()
    # The deviation of a deviation from n normals is std / sqrt(2 n): five of them.
    assert abs(float(y[:, 0].std()) - 0.5) < 5 * 0.5 / math.sqrt(40_000)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Inpainting(torch.tensor([0.5])), "zeros .unknown. and ones"),
        (lambda: Inpainting(torch.ones(3)).check(torch.ones(1, 4)), "does not fit"),
        (lambda: Inpainting(torch.ones(3, 1)).check(torch.ones(1, 3)), "does not fit"),
        (lambda: Inpainting(torch.ones(3), -1.0), "noise_std"),
        (lambda: Colorization()(torch.ones(2, 1, 8, 8)), "grey images have no colour"),
        (lambda: Colorization().check(torch.ones(2, 3, 8, 8)), r"\(B, 1, H, W\)"),
        (lambda: Downsampling(3)(torch.ones(2, 1, 8, 8)), "sides that 3 divides"),
        (lambda: Downsampling(0), "factor"),
        (lambda: Blur(torch.zeros(3)), "all zero"),
        (lambda: Blur(torch.ones(9, 9))(torch.ones(1, 1, 8, 8)), "does not fit"),
        (lambda: Matrix(torch.ones(3)), r"\(m, D\)"),
        (lambda: Matrix(torch.ones(3, 2))(torch.ones(1, 3)), "takes samples"),
        (lambda: Matrix(torch.ones(3, 2)).check(torch.ones(1, 2)), "must have shape"),
        (lambda: LinearMap(lambda x: x**2, (2,)), "not linear"),
        (lambda: LinearMap(lambda x: x.detach(), (2,)), "not differentiable"),
        (lambda: Measurement(torch.abs).check(torch.tensor([[math.nan]])), "finite"),
    ],
)
def test_what_does_not_fit_is_refused(make: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("y", [torch.ones(2).long(), 3.0, torch.ones(0, 2)])
def test_y_of_another_kind_is_refused(y: object) -> None:
    with pytest.raises(TypeError, match="y must be a floating tensor"):
        Inpainting(torch.ones(2)).check(y)  # type: ignore[arg-type]


# --- the exact posterior -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian", "ring", "moons"])
@pytest.mark.parametrize("noise_std", [0.15, 0.6])
def test_posterior_against_numerical_integration(name: str, noise_std: float) -> None:
    """p(x) p(y | x) summed on a grid of 2-D, whose steps are at most 0.6 of the smallest deviation
    s here: the rectangle rule's error on a Gaussian is exp(-2 (pi s / h)^2) < 1e-20."""
    target = named_target(name)
    matrix = torch.tensor([[0.8, -0.5]], dtype=torch.float64)
    y = torch.tensor([0.4], dtype=torch.float64)
    line = torch.linspace(-6, 6, 301, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    likelihood = torch.distributions.Normal(y, noise_std).log_prob(points @ matrix.T)[:, 0]
    joint = (target.log_prob(points) + likelihood).exp()
    evidence = joint.sum() * 0.04**2
    assert abs(math.log(evidence) - target.log_evidence(matrix, y, noise_std)) < 1e-9
    mean = (joint[:, None] * points).sum(0) / joint.sum()
    centred = points - mean
    covariance = torch.einsum("n,ni,nj->ij", joint / joint.sum(), centred, centred)
    posterior = target.posterior(matrix, y, noise_std)
    torch.testing.assert_close(posterior.mean(), mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(posterior.covariance(), covariance, rtol=1e-8, atol=1e-8)
    some = points[:: len(points) // 7]
    torch.testing.assert_close(
        posterior.log_prob(some),
        (target.log_prob(some) - math.log(evidence)) + likelihood[:: len(points) // 7],
        rtol=1e-9,
        atol=1e-7,
    )


def test_posterior_keeps_classes_that_are_ruled_out() -> None:
    target = named_target("ring")
    posterior = target.posterior(torch.eye(2), target.means[3], noise_std=0.01)
    assert posterior.num_classes == target.num_classes
    assert posterior.weights[3] > 1 - 1e-12
    assert posterior.weights.min() > 0


def test_posterior_without_noise_holds_what_was_measured() -> None:
    target = named_target("gmm16")
    mask = torch.arange(16) % 2
    x0, _ = target.sample(1, 3, dtype=torch.float64)
    measurement = Inpainting(mask)
    samples, _ = target.posterior(measurement, measurement(x0)[0]).sample(
        50, 0, dtype=torch.float64
    )
    # Eigenvalues below 1e-13 of the largest are taken for 0: less than 1e-6 in deviation.
    assert float((measurement(samples) - measurement(x0)).abs().max()) < 1e-6
    assert float(samples[:, mask == 0].std(0).min()) > 0.05


def test_a_measurement_of_nothing_changes_nothing() -> None:
    target = named_target("ring")
    nothing = Inpainting(torch.zeros(2))
    assert target.posterior(nothing, torch.zeros(2)) is target
    assert target.log_evidence(nothing, torch.zeros(2)) == 0


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((torch.ones(2, 3), torch.ones(2)), "A must have shape"),
        ((torch.ones(2, 2), torch.ones(2)), "measures some direction twice"),
        ((torch.ones(1, 2), torch.ones(1), -1.0), "noise_std"),
        ((torch.ones(2), torch.ones(1)), "A must have shape"),
    ],
)
def test_posterior_refuses(arguments: tuple[object, ...], says: str) -> None:
    target = GaussianMixture(torch.zeros(1, 2), torch.ones(1))
    with pytest.raises(ValueError, match=says):
        target.posterior(*arguments)  # type: ignore[arg-type]
