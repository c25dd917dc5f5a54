"""Linear measurements that are not coordinates of the sample: blurs, matrices, one's own maps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sde_diffusion.broadcast import expand
from sde_diffusion.errors import require_count, require_finite
from sde_diffusion.measurements import LinearMeasurement, Shape


class Blur(LinearMeasurement):
    """Convolution with a kernel, around the edges: the image is taken to repeat.

    Circular edges make the blur diagonal in Fourier space, so that its adjoint, inverse and
    ``(a A A^T + b I)^-1`` are two Fourier transforms each. Frequencies that the kernel damps below
    the square root of the dtype's rounding are taken to be lost.

    Args:
        kernel: ``(kh, kw)`` for events ``(..., H, W)``, each channel alike, or ``(k,)`` for events
            ``(D,)``; its middle, ``k // 2``, is where it is centred. No larger than the events.
        noise_std: of the noise on the blurred sample.
    """

    def __init__(self, kernel: Tensor, noise_std: float = 0.0) -> None:
        super().__init__(noise_std)
        self.kernel = torch.as_tensor(kernel).detach().cpu().double()
        if self.kernel.ndim not in (1, 2) or self.kernel.numel() == 0:
            raise ValueError(f"kernel must be (kh, kw) or (k,), got shape {tuple(kernel.shape)}")
        if not bool(self.kernel.isfinite().all()) or not bool(self.kernel.any()):
            raise ValueError("kernel must be finite and not all zero")
        self._spectra: dict[tuple[Shape, torch.device, torch.dtype], Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        return self._filter(x, self._spectrum(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self._filter(y, self._spectrum(y).conj())

    def spectral(self, v: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        power = self._spectrum(v).abs().square()
        kept = power > torch.finfo(v.dtype).eps * power.max()
        return self._filter(v, torch.where(kept, function(torch.where(kept, power, 1)), 0))

    def solve(self, v: Tensor, a: float | Tensor, b: float) -> Tensor:
        if isinstance(a, Tensor):
            a = expand(a, v).to(v.dtype)
        return self.spectral(v, lambda power: 1 / (a * power + b))

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return self.adjoint(self.solve(y, 1.0, 0.0))

    def event_shape(self, measured: Shape) -> Shape:
        axes = self.kernel.ndim
        fits = len(measured) == 1 if axes == 1 else len(measured) >= 2
        if not fits or any(
            k > side for k, side in zip(self.kernel.shape, measured[-axes:], strict=True)
        ):
            raise ValueError(
                f"kernel of shape {tuple(self.kernel.shape)} does not fit samples of shape "
                f"{measured}; it takes events {'(D,)' if axes == 1 else '(..., H, W)'} no smaller "
                "than itself"
            )
        return measured

    def _filter(self, x: Tensor, response: Tensor) -> Tensor:
        axes = tuple(range(-self.kernel.ndim, 0))
        sides = x.shape[-self.kernel.ndim :]
        return torch.fft.irfftn(torch.fft.rfftn(x, dim=axes) * response, s=sides, dim=axes)

    def _spectrum(self, x: Tensor) -> Tensor:
        sides = tuple(x.shape[-self.kernel.ndim :])
        key = (sides, x.device, x.dtype)
        if key not in self._spectra:
            self.event_shape(tuple(x.shape[1:]))
            with torch.inference_mode(False):
                padded = torch.zeros(sides, dtype=torch.float64)
                padded[tuple(slice(k) for k in self.kernel.shape)] = self.kernel
                shifts = tuple(-(k // 2) for k in self.kernel.shape)
                rolled = padded.roll(shifts, dims=tuple(range(len(sides))))
                spectrum = torch.fft.rfftn(rolled)
                self._spectra[key] = spectrum.to(x.device, x.dtype.to_complex())
        return self._spectra[key]


def gaussian_kernel(size: int, std: float, axes: int = 2) -> Tensor:
    """A Gaussian of ``size`` points along each of ``axes`` axes, summing to 1; float64.

    Args:
        std: in points, above 0.
    """
    require_count("size", size)
    require_count("axes", axes, most=2)
    require_finite("std", std, above=0.0)
    place = torch.arange(size, dtype=torch.float64) - size // 2
    line = torch.exp(-0.5 * (place / std) ** 2)
    line = line / line.sum()
    return line if axes == 1 else line[:, None] * line


class Matrix(LinearMeasurement):
    """A matrix on vectors: ``y = M x`` for events ``(D,)``.

    ``M M^T`` is decomposed once, in float64; what its eigenvalues say is lost (below 1e-12 of the
    largest) is taken to be lost.

    Args:
        matrix: ``(m, D)``.
        noise_std: of the noise on the product.
    """

    def __init__(self, matrix: Tensor, noise_std: float = 0.0) -> None:
        super().__init__(noise_std)
        self.values = torch.as_tensor(matrix).detach().cpu().double()
        if self.values.ndim != 2 or 0 in self.values.shape:
            raise ValueError(f"matrix must have shape (m, D), got {tuple(self.values.shape)}")
        if not bool(self.values.isfinite().all()):
            raise ValueError("matrix must be finite")
        eigenvalues, self._basis = torch.linalg.eigh(self.values @ self.values.T)
        lost = eigenvalues <= 1e-12 * eigenvalues.max().clamp_min(1e-300)
        self._eigenvalues = torch.where(lost, 0.0, eigenvalues)

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.values.shape[1]:
            raise ValueError(
                f"matrix of shape {tuple(self.values.shape)} takes samples (B, "
                f"{self.values.shape[1]}), got {tuple(x.shape)}"
            )
        return _product(self.values, x)

    def adjoint(self, y: Tensor) -> Tensor:
        return _product(self.values.T, y)

    def spectral(self, v: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        eigenvalues = self._eigenvalues.to(v)
        kept = eigenvalues > 0
        factors = torch.where(kept, function(torch.where(kept, eigenvalues, 1)), 0)
        return _product(self._basis, factors * _product(self._basis.T, v))

    def solve(self, v: Tensor, a: float | Tensor, b: float) -> Tensor:
        if isinstance(a, Tensor):
            a = expand(a, v).to(v.dtype)
        return self.spectral(v, lambda eigenvalues: 1 / (a * eigenvalues + b))

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return self.adjoint(self.solve(y, 1.0, 0.0))

    def event_shape(self, measured: Shape) -> Shape:
        rows, columns = self.values.shape
        if measured != (rows,):
            raise ValueError(f"y must have shape (B, {rows}) for this matrix, got (B, *{measured})")
        return (columns,)


class LinearMap(LinearMeasurement):
    """One's own linear function: its adjoint by autograd, its inverses by conjugate gradients.

    Args:
        fn: ``(B, *event) -> (B, *measured)``, linear and differentiable, each sample's from that
            sample alone.
        shape: of an event.
        noise_std: of the noise on what is measured. Where it is 0, the numbers measured must not
            depend on each other.
    Raises:
        ValueError: fn is not linear, as two random samples show, or not differentiable.
    """

    def __init__(
        self, fn: Callable[[Tensor], Tensor], shape: Shape, noise_std: float = 0.0
    ) -> None:
        super().__init__(noise_std)
        if not callable(fn):
            raise TypeError(f"fn must be a function of samples, got {fn!r}")
        self.fn = fn
        self.shape = tuple(shape)
        self.measured = self._probed()

    def __call__(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"samples must have shape (B, *{self.shape}), got {tuple(x.shape)}")
        return self.fn(x)

    def adjoint(self, y: Tensor) -> Tensor:
        create = torch.is_grad_enabled() and y.requires_grad
        with torch.inference_mode(False), torch.enable_grad():
            y = y.clone() if y.is_inference() else y
            x = torch.zeros(
                (len(y), *self.shape), dtype=y.dtype, device=y.device, requires_grad=True
            )
            (result,) = torch.autograd.grad(self.fn(x), x, y, create_graph=create)
        return result

    def event_shape(self, measured: Shape) -> Shape:
        if measured != self.measured:
            raise ValueError(f"y must have shape (B, *{self.measured}), got (B, *{measured})")
        return self.shape

    def _probed(self) -> Shape:
        """The shape of a measurement; raises where the function is not linear."""
        generator = torch.Generator().manual_seed(0)
        a, b = torch.randn(2, 1, *self.shape, generator=generator)
        with torch.inference_mode(False), torch.enable_grad():
            one = self.fn(a.requires_grad_())
        if not one.requires_grad:
            raise ValueError("fn is not differentiable, and its adjoint is taken by autograd")
        one, other, both = one.detach(), self.fn(b), self.fn(2 * a.detach() - 3 * b)
        # Rounding of sums as long as an event.
        slack = 1e-5 * math.sqrt(a.numel()) * float(one.abs().max() + other.abs().max())
        if bool(((2 * one - 3 * other - both).abs() > slack).any()):
            raise ValueError("fn is not linear; a Measurement takes any function")
        return tuple(one.shape[1:])


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    """``(m, D)`` times ``(B, D)``, summed in a fixed order: a matrix product's depends on the
    batch."""
    columns = matrix.to(x).unbind(1)
    total = x[:, :1] * columns[0]
    for j in range(1, len(columns)):
        total = total + x[:, j : j + 1] * columns[j]
    return total
