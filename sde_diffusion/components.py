"""Log-densities of a mixture's components at any noise level, and their joint pull, in bounded
memory.

A component at a noise level is ``N(alpha mu_k, C_k)``, ``C_k = alpha^2 Sigma_k + sigma^2 I``. Two
quantities are wanted of a sample: ``log w_k N(x; k)`` for every component, and, for weights r_k
made from them, ``sum_k r_k C_k^-1 (x - alpha mu_k)``, the score with its sign turned. Nothing of
size (B, K, D) is made at once:

* Few small components go element by element.
* Isotropic components, and diagonal ones at one noise level for all samples, go through matrix
  products, ``|x - mu|^2 = |x|^2 - 2 x.mu + |mu|^2``. What cancels there is of order
  ``|x|^2 / C`` ulps; in float64, about the mean of the means, that is 1e-9 at the smallest noise
  levels of the SDEs (sigma = 0.002), where float32 would leave nothing.
* Rotated components are seen in their own eigenbases by one product for all of them.
* Diagonal components at a level for each sample go element by element in small tiles.

A matrix product sums in an order that depends on its shape and on the number of threads. So that a
sample does not depend on its batch, products and reductions over large mixtures see tiles of one
fixed shape, the last one filled up, on one thread; within a shape every row is treated alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

SMALL = 1024  # numbers in the means, up to which a fixed tile would cost more than it saves
BUDGET = 2**22  # numbers in the largest tensor of a tile (32 MiB), unless one sample needs more
TILE, DEVICE_TILE = 32, 256  # rows of a tile, on a CPU (all of it stays in its cache) and elsewhere


class Tile(NamedTuple):
    """What is known of some samples.

    Attributes:
        joint: ``log w_k N(x; k)``, ``(R, K)``.
        pull: ``(R, K) -> (R, D)``: ``sum_k r_k C_k^-1 (x - alpha mu_k)`` for weights r of sum 1.
        label: ``(R,)`` or None, as given.
    """

    joint: Tensor
    pull: Callable[[Tensor], Tensor]
    label: Tensor | None


_Parts = tuple[Tensor, Callable[[Tensor], Tensor]]


class _Method(Protocol):
    def __call__(self, alpha: Tensor, sigma: Tensor) -> Callable[[Tensor], _Parts]:
        """For noise levels, 0-d or (R,): from x (R, D) to ``joint`` and ``pull`` of a `Tile`."""
        ...


class Components:
    """A mixture's components on one device.

    Args:
        means: ``(K, D)`` float64, as all that follow.
        variances: ``(K, D)``, eigenvalues of the covariances.
        rotation: ``(K, D, D)``, eigenvectors in columns; None: the axes.
        log_weights: ``(K,)``.
    """

    def __init__(
        self, means: Tensor, variances: Tensor, rotation: Tensor | None, log_weights: Tensor
    ) -> None:
        count, dimension = means.shape
        size = means.numel()
        self._small = size <= SMALL
        by_elements = _Elementwise(means, variances, rotation, log_weights)
        self._at_one_level: _Method = by_elements
        self._at_many_levels: _Method = by_elements
        few = TILE if means.device.type == "cpu" else DEVICE_TILE
        whole = BUDGET // size if self._small else min(few, BUDGET // size)
        self._rows_at_one = self._rows_at_many = max(1, whole)
        if self._small:
            return
        if rotation is not None:
            self._at_one_level = _Rotated(means, variances, rotation, log_weights)
            self._at_many_levels = self._at_one_level
            return
        narrow = max(1, min(few, BUDGET // max(count, dimension)))
        self._rows_at_one = narrow
        if bool((variances == variances[:, :1]).all()):
            self._at_one_level = _Isotropic(means, variances[:, 0], log_weights)
            self._at_many_levels, self._rows_at_many = self._at_one_level, narrow
        else:
            self._at_one_level = _Diagonal(means, variances, log_weights)

    def each(
        self,
        x: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        label: Tensor | None,
        read: Callable[[Tile], Tensor],
    ) -> Tensor:
        """``read`` of every tile, put together: ``(B, ...)``.

        Args:
            x: ``(B, D)`` float64.
            alpha, sigma: 0-d or ``(B,)`` float64.
            label: ``(B,)`` or None, cut and filled up like x.
            read: ``(R, ...)`` of a tile, row by row.
        """
        single = alpha.ndim == 0
        method = self._at_one_level if single else self._at_many_levels
        rows = self._rows_at_one if single else self._rows_at_many
        found = []
        with _one_thread(x, alone=self._small):
            one = method(alpha, sigma) if single else None
            for start in range(0, max(len(x), 1), rows):
                there = min(rows, len(x) - start)
                missing = 0 if self._small or there == 0 else rows - there

                def tile(value: Tensor, at: int = start, missing: int = missing) -> Tensor:
                    part = value[at : at + rows]
                    if not missing:
                        return part
                    return torch.cat([part, part[-1:].expand(missing, *part.shape[1:])])

                of = one or method(tile(alpha), tile(sigma))
                joint, pull = of(tile(x))
                labels = None if label is None else tile(label)
                found.append(read(Tile(joint, pull, labels))[:there])
        return found[0] if len(found) == 1 else torch.cat(found)


class _Elementwise:
    """Any components, by differences (R, K, D)."""

    def __init__(
        self,
        means: Tensor,
        variances: Tensor,
        rotation: Tensor | None,
        log_weights: Tensor,
    ) -> None:
        self.means = means
        self.variances = variances
        self.rotation = rotation
        self.log_weights = log_weights

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Callable[[Tensor], _Parts]:
        if alpha.ndim:
            alpha, sigma = alpha[:, None, None], sigma[:, None, None]
        means, rotation = alpha * self.means, self.rotation
        variance = alpha**2 * self.variances + sigma**2
        log_volume = 0.5 * torch.log(2 * math.pi * variance).sum(-1)
        log_weights = self.log_weights - log_volume

        def of(x: Tensor) -> _Parts:
            offset = x[:, None, :] - means
            if rotation is not None:
                offset = _rotate(offset, rotation)
            pulls = offset / variance

            def pull(weights: Tensor) -> Tensor:
                each = weights[:, :, None] * pulls
                return (each if rotation is None else _rotate(each, rotation.mT)).sum(1)

            return log_weights - 0.5 * (offset * pulls).sum(-1), pull

        return of


class _Isotropic:
    """Spherical components; ``(R, K)`` numbers at a time, at one level or as many as samples."""

    def __init__(self, means: Tensor, variances: Tensor, log_weights: Tensor) -> None:
        self.centre = means.mean(0)
        self.means = means - self.centre
        self.squares = self.means.square().sum(1)
        same = bool((variances == variances[0]).all())
        self.variances = variances[:1] if same else variances
        self.log_weights = log_weights

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Callable[[Tensor], _Parts]:
        if alpha.ndim:
            alpha, sigma = alpha[:, None], sigma[:, None]
        variance = alpha**2 * self.variances + sigma**2  # (K or 1,), or (R, K or 1)
        dimension = self.means.shape[1]
        base = self.log_weights - 0.5 * dimension * torch.log(2 * math.pi * variance)
        half = 0.5 / variance

        def of(x: Tensor) -> _Parts:
            y = x - alpha * self.centre
            distance = y.square().sum(1, keepdim=True) + alpha**2 * self.squares
            distance = (distance - 2 * alpha * (y @ self.means.mT)).clamp_min(0)

            def pull(weights: Tensor) -> Tensor:
                if variance.shape[-1] == 1:
                    return (y - alpha * (weights @ self.means)) / variance
                weights = weights / variance
                return y * weights.sum(1, keepdim=True) - alpha * (weights @ self.means)

            return base - half * distance, pull

        return of


class _Diagonal:
    """Components along the axes, all samples at one level: its products serve all of them."""

    def __init__(self, means: Tensor, variances: Tensor, log_weights: Tensor) -> None:
        self.centre = means.mean(0)
        self.means = means - self.centre
        self.variances = variances
        self.log_weights = log_weights

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Callable[[Tensor], _Parts]:
        variance = alpha**2 * self.variances + sigma**2
        precision = 1 / variance
        means = alpha * self.means
        weighted = means * precision
        base = self.log_weights - 0.5 * torch.log(2 * math.pi * variance).sum(1)
        base = base - 0.5 * (means * weighted).sum(1)

        def of(x: Tensor) -> _Parts:
            y = x - alpha * self.centre
            joint = base + (y @ weighted.mT - 0.5 * (y.square() @ precision.mT))

            def pull(weights: Tensor) -> Tensor:
                return y * (weights @ precision) - weights @ weighted

            return joint, pull

        return of


class _Rotated:
    """Components in their eigenbases side by side: ``x`` in all of them is one product."""

    def __init__(
        self, means: Tensor, variances: Tensor, rotation: Tensor, log_weights: Tensor
    ) -> None:
        self.shape = means.shape
        self.frames = rotation.permute(1, 0, 2).reshape(means.shape[1], -1)  # (D, K D)
        self.centre = means.mean(0)
        self.means = torch.einsum("ki,kij->kj", means - self.centre, rotation).reshape(-1)
        self.variances = variances.reshape(-1)
        self.log_weights = log_weights

    def __call__(self, alpha: Tensor, sigma: Tensor) -> Callable[[Tensor], _Parts]:
        if alpha.ndim:
            alpha, sigma = alpha[:, None], sigma[:, None]
        variance = alpha**2 * self.variances + sigma**2
        log_volume = 0.5 * torch.log(2 * math.pi * variance).unflatten(-1, self.shape).sum(-1)
        base = self.log_weights - log_volume

        def of(x: Tensor) -> _Parts:
            offset = (x - alpha * self.centre) @ self.frames - alpha * self.means
            pulls = offset / variance

            def pull(weights: Tensor) -> Tensor:
                each = weights[:, :, None] * pulls.unflatten(1, self.shape)
                return each.flatten(1) @ self.frames.mT

            return base - 0.5 * (offset * pulls).unflatten(1, self.shape).sum(-1), pull

        return of


def _rotate(offset: Tensor, rotation: Tensor) -> Tensor:
    """``(R, K, D)`` times ``(K, D, D)``, summed in a fixed order: a matrix product's depends on the
    number of rows."""
    total = offset[:, :, :1] * rotation[:, 0]
    for j in range(1, rotation.shape[1]):
        total = total + offset[:, :, j : j + 1] * rotation[:, j]
    return total


@contextmanager
def _one_thread(x: Tensor, *, alone: bool) -> Iterator[None]:
    """One thread for products on a CPU: two would sum in another order than one."""
    before = torch.get_num_threads()
    if alone or before == 1 or x.device.type != "cpu":
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
