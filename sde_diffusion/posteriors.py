"""The exact posterior of a Gaussian mixture under a linear measurement."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Conditioned(NamedTuple):
    """A mixture's components, given what was measured; all float64.

    Attributes:
        means: ``(K, D)``.
        covariances: ``(K, D, D)``.
        log_weights: ``(K,)``, not normalised: ``log w_k + log N(y; A mu_k, A Sigma_k A^T + s^2
            I)``.
    """

    means: Tensor
    covariances: Tensor
    log_weights: Tensor


def conditioned(
    means: Tensor,
    covariances: Tensor,
    log_weights: Tensor,
    matrix: Tensor,
    y: Tensor,
    noise_std: float,
) -> Conditioned:
    """Each component given ``y = A x + noise_std * noise``, ``(m,)``, by the rule for Gaussians.

    With ``S = A Sigma A^T + s^2 I`` and ``K = Sigma A^T S^-1`` the mean is ``mu + K (y - A mu)``
    and the covariance ``(I - K A) Sigma (I - K A)^T + s^2 K K^T``, which stays positive
    semidefinite under rounding.

    Raises:
        ValueError: S is singular.
    """
    residual = y - means @ matrix.T
    spread = matrix @ covariances @ matrix.T
    spread = spread + noise_std**2 * torch.eye(len(matrix), dtype=spread.dtype)
    eigenvalues, basis = torch.linalg.eigh(0.5 * (spread + spread.mT))
    if bool((eigenvalues[:, :1] <= 1e-12 * eigenvalues[:, -1:]).any()):
        raise ValueError(
            "A measures some direction twice, or one in which a component has no width, without "
            "noise; give noise_std above 0, or an A with fewer rows"
        )
    inverse = basis / eigenvalues[:, None, :] @ basis.mT
    gain = covariances @ matrix.T @ inverse
    rest = torch.eye(means.shape[1], dtype=means.dtype) - gain @ matrix
    within = rest @ covariances @ rest.mT + noise_std**2 * gain @ gain.mT
    pulled = torch.einsum("kij,kj->ki", inverse, residual)
    log_likelihood = -0.5 * (
        (residual * pulled).sum(1) + eigenvalues.log().sum(1) + len(y) * math.log(2 * math.pi)
    )
    return Conditioned(
        means + torch.einsum("kij,kj->ki", gain, residual),
        _positive(within),
        log_weights + log_likelihood,
    )


def _positive(covariances: Tensor) -> Tensor:
    """Without the negative eigenvalues that rounding leaves in a singular matrix."""
    values, basis = torch.linalg.eigh(0.5 * (covariances + covariances.mT))
    values = torch.where(values < 1e-13 * values[:, -1:], 0.0, values)
    fixed = basis * values[:, None, :] @ basis.mT
    return 0.5 * (fixed + fixed.mT)
