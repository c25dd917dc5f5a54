"""How much of the data's variety samples have."""

from __future__ import annotations

import torch
from torch import Tensor

from sde_diffusion.errors import require_count

__all__ = ["recall", "within_class_variance"]

NEIGHBOURS = 3  # Kynkäänniemi et al. 2019, section 3.1


def within_class_variance(x: Tensor, labels: Tensor) -> float:
    """Mean over classes of the total variance of a class: the trace of its covariance.

    Unbiased: the denominator is one less than the number of a class's samples.

    Args:
        x: (N, *event).
        labels: (N,) classes; each that occurs must occur twice.
    Raises:
        ValueError: a class with a single sample.
    """
    parts = []
    for label in labels.unique():
        part = x[labels == label].flatten(1).double()
        if len(part) < 2:
            raise ValueError(
                f"class {int(label)} has a single sample, which has no variance; draw more samples"
            )
        parts.append(part.var(0).sum())
    return float(torch.stack(parts).mean())


def recall(real: Tensor, generated: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Share of real points that lie in the estimated manifold of the generated ones.

    The manifold is the union of balls around generated points, each reaching to its k-th nearest
    generated neighbour (Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2). It grows with the
    number of points, so compare figures of equal numbers only.

    Args:
        real: (N, F) features of real samples.
        generated: (M, F) features of generated samples, M above ``neighbours``.
        neighbours: k.
    """
    require_count("neighbours", neighbours)
    if len(generated) <= neighbours:
        raise ValueError(
            f"recall with {neighbours} neighbours needs more generated samples than that, got "
            f"{len(generated)}"
        )
    generated, real = generated.double(), real.double()
    # The nearest "neighbour" of a point is the point itself.
    reach = torch.cdist(generated, generated).kthvalue(neighbours + 1, dim=1).values
    return float((torch.cdist(real, generated) <= reach).any(1).double().mean())
