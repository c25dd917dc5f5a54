"""How good a model is at every noise level: its loss and its classifier's accuracy by time.

Buckets are equally wide in log-SNR, so that they mean the same under every SDE. Each sample is
noised once in each bucket, to a time and with a noise that follow from the seed, the number of
samples and the sample's place: successive evaluations differ by the model, not by the draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sde_diffusion.errors import require_count
from sde_diffusion.loop import generator_for
from sde_diffusion.losses import Loss, perturbed
from sde_diffusion.objectives import Objective
from sde_diffusion.sde import SDE, NoiseLevel

__all__ = ["Bucket", "accuracy_by_time", "loss_by_time"]

Statistic = Callable[[Tensor, Tensor | None, NoiseLevel, Tensor], Tensor]


@dataclass(frozen=True)
class Bucket:
    """A mean over a range of times.

    Attributes:
        t_low, t_high: the times it spans.
        half_log_snr_high, half_log_snr_low: the same at t_low and at t_high.
        mean: over the samples.
        stderr: standard error of the mean, from the spread over samples; NaN for a single one.
            Times are spread evenly over the bucket, so it errs on the large side.
        n: samples.
    """

    t_low: float
    t_high: float
    half_log_snr_high: float
    half_log_snr_low: float
    mean: float
    stderr: float
    n: int

    def config(self) -> dict[str, Any]:
        """JSON-able values; what is not finite is None."""
        values = asdict(self)
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


def loss_by_time(
    model: Callable[..., Any],
    objective: Objective | Loss,
    x: Tensor,
    y: Tensor | None,
    sde: SDE,
    *,
    buckets: int = 10,
    seed: int = 0,
    batch_size: int = 256,
) -> list[Bucket]:
    """The validation loss in each of ``buckets`` ranges of times, from little noise to much.

    Args:
        model: called (x, level, label) -> Prediction; evaluated without gradients and, if it is a
            module, in eval mode. ``len(x) buckets`` evaluations.
        objective: an objective, of which the loss is taken and the law of times is not, or a loss
            ``(model, x0, label, level, noise) -> (B,)``. The simple loss is the usual one.
        x: held-out samples, (N, *event).
        y: their labels, (N,), or None.
        sde: of the model.
        seed: of times and noise.
        batch_size: samples at a time; it changes the result by rounding only.

    Raises:
        ValueError: no samples, labels that do not fit, or a number out of range.
    """
    loss = objective.loss if isinstance(objective, Objective) else objective

    def statistic(x0: Tensor, label: Tensor | None, level: NoiseLevel, noise: Tensor) -> Tensor:
        return loss(model, x0, label, level, noise)  # type: ignore[arg-type]

    return _by_time(model, statistic, x, y, sde, buckets, seed, batch_size)


def accuracy_by_time(
    classifier: Callable[[Tensor, NoiseLevel], Tensor],
    x: Tensor,
    y: Tensor,
    sde: SDE,
    *,
    buckets: int = 10,
    seed: int = 0,
    batch_size: int = 256,
) -> list[Bucket]:
    """The share of noised samples whose class a classifier finds, in each range of times.

    Args:
        classifier: called (x_t, level) -> logits (B, C).
        x: held-out samples, (N, *event).
        y: their classes, (N,).
        sde, buckets, seed, batch_size: as in `loss_by_time`.

    Raises:
        ValueError: no samples, classes that do not fit, or a number out of range.
    """
    if y is None:
        raise ValueError("y must hold the classes of x: accuracy needs them, got None")

    def statistic(x0: Tensor, label: Tensor | None, level: NoiseLevel, noise: Tensor) -> Tensor:
        return classifier(perturbed(x0, level, noise), level).argmax(1).eq(cast(Tensor, label))

    return _by_time(classifier, statistic, x, y, sde, buckets, seed, batch_size)


@torch.no_grad()
def _by_time(
    model: Callable[..., Any],
    statistic: Statistic,
    x: Tensor,
    y: Tensor | None,
    sde: SDE,
    buckets: int,
    seed: int,
    batch_size: int,
) -> list[Bucket]:
    require_count("buckets", buckets)
    require_count("seed", seed, least=0)
    require_count("batch_size", batch_size)
    n = len(x)
    if not n:
        raise ValueError("x must hold at least one sample, got none")
    if y is not None and y.shape != (n,):
        raise ValueError(f"y must have one label per sample, ({n},), got {tuple(y.shape)}")
    top, bottom = (float(sde.at(float(t)).half_log_snr) for t in (sde.t_min, sde.t_max))
    edges = torch.linspace(top, bottom, buckets + 1, dtype=torch.float64)
    times = sde.time(edges).clamp(sde.t_min, sde.t_max)
    found = []
    with _evaluating(model):
        for k in range(buckets):
            t = _spread_times(n, sde, edges[k : k + 2], seed, k)
            values = torch.cat(
                [
                    statistic(
                        x[part],
                        None if y is None else y[part],
                        sde.at(t[part].to(x.device)),
                        _noise(x, part, seed, k),
                    ).double()
                    for part in torch.arange(n).split(batch_size)
                ]
            )
            found.append(
                Bucket(
                    t_low=float(times[k]),
                    t_high=float(times[k + 1]),
                    half_log_snr_high=float(edges[k]),
                    half_log_snr_low=float(edges[k + 1]),
                    mean=float(values.mean()),
                    stderr=float(values.std()) / math.sqrt(n) if n > 1 else math.nan,
                    n=n,
                )
            )
    return found


def _spread_times(n: int, sde: SDE, edges: Tensor, seed: int, bucket: int) -> Tensor:
    """n times of a bucket, one in each of n equal parts of it, in random order, (n,) float32."""
    generator = generator_for(seed, bucket)
    order = torch.randperm(n, generator=generator)
    offset = torch.rand(n, generator=generator, dtype=torch.float64)
    levels = edges[0] + (edges[1] - edges[0]) * (order + offset) / n
    return sde.time(levels).clamp(sde.t_min, sde.t_max).float()


def _noise(x: Tensor, rows: Tensor, seed: int, bucket: int) -> Tensor:
    """Noise of these samples, each from its own generator."""
    draws = [
        torch.randn(x.shape[1:], generator=generator_for(seed, bucket, 1, int(row))) for row in rows
    ]
    return torch.stack(draws).to(x)


@contextmanager
def _evaluating(model: object) -> Iterator[None]:
    """A module in eval mode; its own mode comes back."""
    modules = (
        [part for part in model.modules() if part.training] if isinstance(model, nn.Module) else []
    )
    for part in modules:
        part.training = False
    try:
        yield
    finally:
        for part in modules:
            part.training = True
