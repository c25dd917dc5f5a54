"""What is known of a sample: ``y = A(x) + noise_std * noise``, and what guidance asks of A.

A measurement is called with samples ``(B, *event)`` and gives ``(B, *measured)``. A linear one also
has its adjoint ``A^T``, its pseudo-inverse ``A^+`` and ``(a A A^T + b I)^-1``, closed-form where
``A A^T`` is, by conjugate gradients otherwise; no singular value decomposition of an image-sized
matrix is ever made. The blurs and linear maps of the user's own are in ``linear_maps``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand, per_sample_sum
from sde_diffusion.errors import require_count, require_finite

Shape = tuple[int, ...]


class Measurement:
    """Any function of samples, with Gaussian noise.

    Args:
        fn: ``(B, *event) -> (B, *measured)``, each sample's from that sample alone. Methods that
            take a gradient need it differentiable.
        noise_std: of the noise added, at least 0.
    """

    def __init__(self, fn: Callable[[Tensor], Tensor], noise_std: float = 0.0) -> None:
        if not callable(fn):
            raise TypeError(f"fn must be a function of samples, got {fn!r}")
        self.fn = fn
        self.noise_std = _noise(noise_std)

    def __call__(self, x: Tensor) -> Tensor:
        """``A(x)``, without noise."""
        return self.fn(x)

    def draw(self, x: Tensor, seed: int) -> Tensor:
        """A measurement of each sample of ``x``, noise included: ``(B, *measured)``."""
        require_count("seed", seed, least=0)
        clean = self(x)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        return clean + self.noise_std * noise.to(clean)

    def check(self, y: Tensor) -> Tensor:
        """``y`` as guidance uses it, ``(B, *measured)`` or ``(1, *measured)`` for all samples.

        Raises:
            TypeError, ValueError: not a finite floating tensor, or a shape that cannot be of this
                measurement.
        """
        if not isinstance(y, Tensor) or not y.is_floating_point() or y.ndim < 1 or len(y) < 1:
            raise TypeError(
                f"y must be a floating tensor (B, *measured) or (1, *measured), got {_of(y)}"
            )
        if not bool(y.isfinite().all()):
            raise ValueError("y holds NaN or infinite values; a measurement must be finite")
        return y

    def weighed(self, residual: Tensor, a: Tensor, b: float) -> Tensor:
        """``residual`` over the variance ``a + b`` it would have if A kept lengths; a linear
        measurement knows better."""
        return times(1 / (a + b), residual)

    def numbers(self, y: Tensor) -> int:
        """How many numbers are measured of one sample."""
        return y[0].numel()


class LinearMeasurement(Measurement, ABC):
    """A linear function of samples, with Gaussian noise.

    A subclass gives ``__call__``, ``adjoint`` and ``event_shape``, and ``solve`` where there is a
    closed form that ``gram`` does not say.
    """

    def __init__(self, noise_std: float = 0.0) -> None:
        super().__init__(self.__call__, noise_std)

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """``A x``."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """``A^T y``: ``(B, *measured) -> (B, *event)``."""

    @abstractmethod
    def event_shape(self, measured: Shape) -> Shape:
        """The shape of the events of which measurements have the shape ``measured``.

        Raises:
            ValueError: there is none.
        """

    def gram(self, measured: Shape) -> float | None:
        """``c`` where ``A A^T`` is c times the identity on A's range; ``None`` where it is not."""
        return None

    def spectral(self, v: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``function(A A^T) v`` on A's range, and 0 off it.

        Args:
            function: of the eigenvalues above 0, elementwise.
        Raises:
            ValueError: the eigenvalues are not known in closed form.
        """
        gram = self.gram(tuple(v.shape[1:]))
        if gram is None:
            raise ValueError(
                f"{type(self).__name__} has no closed form of its singular values, by which noise "
                "is allowed for; give noise_std=0, or a Matrix"
            )
        return v * function(torch.tensor(gram, dtype=v.dtype, device=v.device))

    def solve(self, v: Tensor, a: float | Tensor, b: float) -> Tensor:
        """``(a A A^T + b I)^-1 v`` on A's range, and 0 off it, of which A^T knows nothing.

        Args:
            v: ``(B, *measured)``.
            a: at least 0; a number, 0-d or ``(B,)``.
            b: at least 0.
        """
        gram = self.gram(tuple(v.shape[1:]))
        if gram is None:
            return conjugate_gradients(lambda w: times(a, self(self.adjoint(w))) + b * w, v)
        return times(1 / (a * gram + b), v)

    def weighed(self, residual: Tensor, a: Tensor, b: float) -> Tensor:
        return self.solve(residual, a, b)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """``A^+ y``: the smallest x with ``A x`` nearest to y."""
        if self.gram(tuple(y.shape[1:])) is None:
            # The normal equations have a solution whatever y is, and the iteration from 0 stays in
            # the range of A^T, where the smallest one is.
            return conjugate_gradients(lambda x: self.adjoint(self(x)), self.adjoint(y))
        return self.adjoint(self.solve(y, 1.0, 0.0))

    def check(self, y: Tensor) -> Tensor:
        y = super().check(y)
        self.event_shape(tuple(y.shape[1:]))
        return y

    def matrix(self, event_shape: Shape) -> Tensor:
        """A as a matrix ``(numbers measured, numbers in an event)``, float64: for small events."""
        size = math.prod(event_shape)
        columns = self(torch.eye(size, dtype=torch.float64).reshape(size, *event_shape))
        return columns.reshape(size, -1).T.contiguous()


class Inpainting(LinearMeasurement):
    """A part of each sample is known: ``y = mask * x``, zero where nothing is.

    A mask of ones measures everything. One of zeros measures nothing: guidance by it is no
    guidance, and samples are unconditional.

    Args:
        mask: True or 1 where known, 0 elsewhere; of the event's shape, or one that broadcasts to
            it, as ``(H, W)`` to ``(C, H, W)``.
        noise_std: of the noise on what is known.
    """

    def __init__(self, mask: Tensor, noise_std: float = 0.0) -> None:
        super().__init__(noise_std)
        mask = torch.as_tensor(mask)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("mask must hold zeros (unknown) and ones (known) only")
        self.mask = mask.bool()

    def __call__(self, x: Tensor) -> Tensor:
        self.event_shape(tuple(x.shape[1:]))
        return x * self.mask.to(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self(y)

    def solve(self, v: Tensor, a: float | Tensor, b: float) -> Tensor:
        return self(super().solve(v, a, b))

    def spectral(self, v: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return self(super().spectral(v, function))

    def gram(self, measured: Shape) -> float:
        return 1.0

    def event_shape(self, measured: Shape) -> Shape:
        own = tuple(self.mask.shape)
        try:
            fits = torch.broadcast_shapes(own, measured) == torch.Size(measured)
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"mask of shape {own} does not fit samples of shape {measured}; give a mask of "
                "their shape, or one that broadcasts to it"
            )
        return measured

    def check(self, y: Tensor) -> Tensor:
        return self(super().check(y))

    def numbers(self, y: Tensor) -> int:
        return int(self.mask.expand(y.shape[1:]).sum())

    def draw(self, x: Tensor, seed: int) -> Tensor:
        return self(super().draw(x, seed))


class Colorization(LinearMeasurement):
    """Colour images are known in grey: the first coordinate of an orthogonal change of colours.

    ``y = (R + G + B) / sqrt(3)``, which decouples the grey of an image from its two colour
    coordinates (Song et al. 2021, arXiv:2011.13456, app. I.2). Events ``(3, H, W)``, measurements
    ``(1, H, W)``; ``y / sqrt(3)`` is the grey image in the range of the channels.
    """

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(
                "Colorization needs colour images (B, 3, H, W), got samples of shape "
                f"{tuple(x.shape)}; grey images have no colour to restore"
            )
        return (x[:, :1] + x[:, 1:2] + x[:, 2:]) * 3**-0.5

    def adjoint(self, y: Tensor) -> Tensor:
        return (y * 3**-0.5).expand(-1, 3, -1, -1)

    def gram(self, measured: Shape) -> float:
        return 1.0

    def event_shape(self, measured: Shape) -> Shape:
        if len(measured) != 3 or measured[0] != 1:
            raise ValueError(
                f"y of Colorization must have shape (B, 1, H, W), got events of shape {measured}"
            )
        return 3, *measured[1:]


class Downsampling(LinearMeasurement):
    """Means over blocks: of ``factor x factor`` pixels, or ``factor`` numbers of a vector.

    ``A A^T = I / n`` with n the size of a block. Events ``(..., H, W)`` or ``(D,)``, whose sides
    ``factor`` must divide.
    """

    def __init__(self, factor: int, noise_std: float = 0.0) -> None:
        super().__init__(noise_std)
        self.factor = require_count("factor", factor)

    def __call__(self, x: Tensor) -> Tensor:
        f = self.factor
        sides = x.shape[max(1, x.ndim - 2) :]
        if x.ndim < 2 or any(side % f for side in sides):
            raise ValueError(
                f"Downsampling by {f} needs sides that {f} divides, got samples of shape "
                f"{tuple(x.shape)}; crop them, or choose another factor"
            )
        if x.ndim == 2:
            return x.reshape(len(x), -1, f).mean(2)
        *lead, height, width = x.shape
        return x.reshape(*lead, height // f, f, width // f, f).mean((-3, -1))

    def adjoint(self, y: Tensor) -> Tensor:
        f = self.factor
        spread = y.repeat_interleave(f, -1)
        if y.ndim > 2:
            spread = spread.repeat_interleave(f, -2)
        return spread * self.gram(tuple(y.shape[1:]))

    def gram(self, measured: Shape) -> float:
        return 1 / self.factor ** min(2, len(measured))

    def event_shape(self, measured: Shape) -> Shape:
        if not measured:
            raise ValueError("y of Downsampling must have shape (B, D) or (B, ..., H, W), got (B,)")
        f = self.factor
        if len(measured) == 1:
            return (measured[0] * f,)
        return *measured[:-2], measured[-2] * f, measured[-1] * f


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], v: Tensor, iterations: int | None = None
) -> Tensor:
    """``w`` with ``apply(w) = v`` for symmetric positive semidefinite ``apply``, per sample.

    Hestenes & Stiefel 1952. Every sample has its own step lengths and stops by itself, at a
    residual of 10 roundings, so that none depends on the others.

    Args:
        v: ``(B, *measured)``.
        iterations: at most; twice the size of a measurement by default.
    """
    # The residual falls below rounding of ||v||, and further steps would divide noise by noise.
    tolerance = (10 * torch.finfo(v.dtype).eps) ** 2
    w, residual, direction = torch.zeros_like(v), v, v
    size = first = per_sample_sum(v * v)
    for _ in range(iterations or 2 * v[0].numel()):
        going = size > tolerance * first
        if not bool(going.any()):
            break
        applied = apply(direction)
        curvature = per_sample_sum(direction * applied)
        going = going & (curvature > 0)
        step = torch.where(going, size / torch.where(going, curvature, 1), 0)
        w = w + expand(step, v) * direction
        residual = residual - expand(step, v) * applied
        new = torch.where(going, per_sample_sum(residual * residual), size)
        ratio = torch.where(going, new / torch.where(going, size, 1), 0)
        direction = torch.where(
            expand(going, v).bool(), residual + expand(ratio, v) * direction, direction
        )
        size = torch.where(going, new, 0)
    return w


def times(weight: float | Tensor, v: Tensor) -> Tensor:
    """``v`` times a number, a 0-d tensor or one number per sample."""
    return v * (expand(weight, v).to(v.dtype) if isinstance(weight, Tensor) else weight)


def _noise(noise_std: float) -> float:
    require_finite("noise_std", noise_std)
    if noise_std < 0:
        raise ValueError(f"noise_std must be at least 0, got {noise_std!r}")
    return float(noise_std)


def _of(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r:.60}"
