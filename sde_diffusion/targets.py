"""Exact targets: Gaussian mixtures, whose density, score and posterior under every SDE are
closed-form.

Under ``x_t = alpha x_0 + sigma eps`` a mixture stays a mixture,
``p_t = sum_k w_k N(alpha mu_k, alpha^2 Sigma_k + sigma^2 I)``. Everything is computed in float64,
in log-space and in the eigenbasis of each covariance, by operations that treat every sample alike:
the result for one sample is the same, bit for bit, in whatever batch it stands. Memory is bounded
however large the mixture (`sde_diffusion.components`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sde_diffusion.components import BUDGET, Components, Tile
from sde_diffusion.errors import require_count, require_finite
from sde_diffusion.measurements import LinearMeasurement
from sde_diffusion.parametrization import Label, batch_of_labels, check_label, part_of
from sde_diffusion.posteriors import Conditioned, conditioned
from sde_diffusion.prediction import Prediction, ScoreFn
from sde_diffusion.sde import SDE, NoiseLevel

_DATA = NoiseLevel(
    *(torch.tensor(v, dtype=torch.float64) for v in (0.0, 1.0, 0.0, math.inf, 0.0, 0.0))
)


class GaussianMixture:
    """``sum_k w_k N(mu_k, Sigma_k)`` with a class label on each component.

    Args:
        means: ``(K, D)``.
        covariances: ``(K, D, D)`` full, ``(K, D)`` diagonal, or ``(K,)`` isotropic variances;
            positive semidefinite.
        weights: ``(K,)``, positive, normalised here; equal by default.
        labels: ``(K,)`` integers from 0; all 0 by default. Several components may share a class.
        event_shape: of one sample, of D numbers; ``(D,)`` by default. Below, ``(B, *event)`` are
            samples of that shape; moments are of the D numbers in a row.
    Raises:
        ValueError: shapes that do not fit, values that are not finite, a covariance that is not
            symmetric positive semidefinite, weights or labels out of range.
    """

    def __init__(
        self,
        means: Tensor,
        covariances: Tensor,
        weights: Tensor | None = None,
        labels: Tensor | None = None,
        event_shape: Sequence[int] | None = None,
    ) -> None:
        self.means = _finite("means", means)
        if self.means.ndim != 2 or 0 in self.means.shape:
            raise ValueError(f"means must have shape (K, D), got {tuple(means.shape)}")
        count, self.dimension = self.means.shape
        self.event_shape = (self.dimension,) if event_shape is None else tuple(event_shape)
        if math.prod(self.event_shape) != self.dimension or min(self.event_shape, default=1) < 1:
            raise ValueError(
                f"event_shape must hold the {self.dimension} numbers of a mean, got "
                f"{self.event_shape}"
            )
        self.variances, self.rotation = _eigenbasis(
            _finite("covariances", covariances), count, self.dimension
        )
        weights = torch.ones(count) if weights is None else weights
        weights = _finite("weights", weights)
        if weights.shape != (count,) or bool((weights <= 0).any()):
            raise ValueError(f"weights must be {count} positive numbers, got {_short(weights)}")
        self.weights = weights / weights.sum()
        labels = torch.zeros(count, dtype=torch.long) if labels is None else torch.as_tensor(labels)
        if labels.shape != (count,) or labels.is_floating_point() or bool((labels < 0).any()):
            raise ValueError(f"labels must be {count} integers from 0, got {_short(labels)}")
        self.labels = labels.long().cpu()
        self.num_classes = int(self.labels.max()) + 1
        missing = sorted(set(range(self.num_classes)) - set(self.labels.tolist()))
        if missing:
            raise ValueError(
                f"labels must use every class from 0 to {self.num_classes - 1}; missing: {missing}"
            )
        self._on_device: dict[torch.device, _Parameters] = {}

    @property
    def has_density(self) -> bool:
        """Whether clean data has a density: no component is flat in any direction."""
        return bool((self.variances > 0).all())

    def conditional(self, label: int) -> GaussianMixture:
        """The law of one class, itself a mixture with the single class 0."""
        check_label(self, label)
        chosen = self.labels == label
        covariances = self._covariances()[chosen]
        weights, shape = self.weights[chosen], self.event_shape
        return GaussianMixture(self.means[chosen], covariances, weights, event_shape=shape)

    def posterior(
        self, A: Tensor | LinearMeasurement, y: Tensor, noise_std: float | None = None
    ) -> GaussianMixture:
        """The law of x given ``A x + noise_std * noise = y``: again a mixture, with its labels.

        The ground truth by which guidance is judged.

        Args:
            A: ``(m, D)``, or a linear measurement of events. Rows of zeros say nothing and
                are left out.
            y: what was measured of one sample: ``(m,)``, or ``(*measured,)``.
            noise_std: at least 0; the measurement's own where one is given, otherwise 0.
        Raises:
            ValueError: shapes that do not fit; without noise, an A whose rows depend on each other.
        """
        matrix, noise_std = self._matrix(A, noise_std)
        y = _finite("y", y).reshape(-1)
        if matrix.shape != (len(y), self.dimension):
            raise ValueError(
                f"A must have shape ({len(y)}, {self.dimension}) for y of {len(y)} numbers, got "
                f"{tuple(matrix.shape)}"
            )
        says = matrix.abs().amax(1) > 0
        if not bool(says.any()):
            return self
        found = self._conditioned(matrix[says], y[says], noise_std)
        if not bool(self.variances.any()):  # points stay where they are, and stay spheres
            found = found._replace(means=self.means, covariances=self.variances)
        # Not below what the constructor takes for positive: a component ruled out stays, so that
        # its class keeps its number.
        weights = torch.softmax(found.log_weights, 0).clamp_min(1e-300)
        return GaussianMixture(
            found.means, found.covariances, weights, self.labels, self.event_shape
        )

    def log_evidence(
        self, A: Tensor | LinearMeasurement, y: Tensor, noise_std: float | None = None
    ) -> float:
        """``log p(y)`` of what was measured of one sample, in nats; arguments as in
        ``posterior``."""
        matrix, noise_std = self._matrix(A, noise_std)
        y = _finite("y", y).reshape(-1)
        says = matrix.abs().amax(1) > 0
        if not bool(says.any()):
            return 0.0
        found = self._conditioned(matrix[says], y[says], noise_std)
        return float(torch.logsumexp(found.log_weights, 0))

    def _matrix(
        self, A: Tensor | LinearMeasurement, noise_std: float | None
    ) -> tuple[Tensor, float]:
        if isinstance(A, LinearMeasurement):
            own = A.noise_std if noise_std is None else noise_std
            A = A.matrix(self.event_shape)
        else:
            own = 0.0 if noise_std is None else noise_std
        require_finite("noise_std", own)
        if own < 0:
            raise ValueError(f"noise_std must be at least 0, got {own!r}")
        matrix = _finite("A", A)
        if matrix.ndim != 2:
            raise ValueError(f"A must have shape (m, {self.dimension}), got {tuple(matrix.shape)}")
        return matrix, own

    def _conditioned(self, matrix: Tensor, y: Tensor, noise_std: float) -> Conditioned:
        covariances = self._full_covariances()
        return conditioned(self.means, covariances, self.weights.log(), matrix, y, noise_std)

    def mean(self) -> Tensor:
        """Mean of the mixture, ``(D,)`` float64."""
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        """Covariance of the mixture, ``(D, D)`` float64."""
        within = torch.diag(self.weights @ self.variances)
        if self.rotation is not None:
            within = torch.einsum("k,kij->ij", self.weights, self._full_covariances())
        centred = self.means - self.mean()
        return within + torch.einsum("k,ki,kj->ij", self.weights, centred, centred)

    def sample(
        self, n: int, seed: int, label: int | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """``n`` exact samples and their classes, ``(n, *event)`` and ``(n,)``, on the CPU.

        Args:
            label: draw from one class only.
        """
        require_count("n", n, least=0)
        if label is not None:
            check_label(self, label)
        generator = torch.Generator().manual_seed(seed)
        weights = self.weights if label is None else self.weights * (self.labels == label)
        component = (
            torch.multinomial(weights, n, replacement=True, generator=generator)
            if n
            else torch.empty(0).long()
        )
        noise = torch.randn(n, self.dimension, generator=generator, dtype=torch.float64)
        noise = noise * self.variances[component].sqrt()
        if self.rotation is not None:
            rows = max(1, BUDGET // self.dimension**2)
            noise = torch.cat(
                [
                    torch.einsum("nij,nj->ni", self.rotation[which], part)
                    for which, part in zip(component.split(rows), noise.split(rows), strict=True)
                ]
            )
        x = (self.means[component] + noise).to(dtype)
        return x.reshape(n, *self.event_shape), self.labels[component]

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density at ``x`` in nats: ``(B, *event) -> (B,)``, in ``x``'s dtype.

        Raises:
            ValueError: there is none (``has_density``).
        """
        if not self.has_density:
            raise ValueError(
                "log_prob needs a density, and a component has no variance in some direction; "
                "ask for log_prob_at(x, level) at a noise level"
            )
        return self.log_prob_at(x, _DATA)

    def log_prob_at(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """Log-density of ``x_t`` at a noise level, 0-d or ``(B,)``: ``(B, *event) -> (B,)``."""
        return self._each(x, level, None, lambda tile: tile.joint.logsumexp(1))

    def score_fn(self, sde: SDE, label: Label = None) -> ScoreFn:
        """The exact score under ``sde``, of the whole mixture or of one class (int, or ``(B,)``
        classes)."""
        check_label(self, label)
        if isinstance(label, int):
            return _ExactScore(self.conditional(label), None)
        return _ExactScore(self, label)

    def model(self, sde: SDE) -> ExactModel:
        """The exact scores as a class-conditional model, ``(x, level, label=None) ->
        Prediction``."""
        return ExactModel(self)

    def classifier(self, sde: SDE) -> ExactClassifier:
        """The exact class posterior as ``(x, level) -> logits (B, C)``: ``log p(class, x_t)``."""
        return ExactClassifier(self)

    def predict(self, x: Tensor, level: NoiseLevel, label: Tensor | None = None) -> Prediction:
        """The exact prediction; ``label`` ``(B,)`` long, with ``num_classes`` for the whole
        mixture."""
        labels, null = self._parameters(x.device).labels, self.num_classes

        def pull(tile: Tile) -> Tensor:
            joint = tile.joint
            if tile.label is not None:
                known = (labels == tile.label[:, None]) | (tile.label[:, None] == null)
                joint = joint.where(known, -math.inf)
            return tile.pull(torch.softmax(joint, 1))

        score = -self._each(x, level, label, pull)
        return Prediction.from_score(x, level, score.reshape(x.shape))

    def class_logits(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """``log p(class, x_t)``: ``(B, *event) -> (B, C)``, in ``x``'s dtype."""
        members = self._parameters(x.device).members

        def logits(tile: Tile) -> Tensor:
            return torch.stack([tile.joint[:, which].logsumexp(1) for which in members], 1)

        return self._each(x, level, None, logits)

    def _each(
        self,
        x: Tensor,
        level: NoiseLevel,
        label: Tensor | None,
        read: Callable[[Tile], Tensor],
    ) -> Tensor:
        """What ``read`` makes of the components, tile by tile: ``(B, ...)`` in ``x``'s dtype."""
        if x.ndim < 1 or tuple(x.shape[1:]) != self.event_shape:
            shape = ", ".join(map(str, self.event_shape))
            raise ValueError(f"x must have shape (B, {shape}), got {tuple(x.shape)}")
        wide = x.double().reshape(len(x), self.dimension)
        alpha, sigma = level.alpha.double(), level.sigma.double()
        components = self._parameters(x.device).components
        return components.each(wide, alpha, sigma, label, read).to(x.dtype)

    def _parameters(self, device: torch.device) -> _Parameters:
        if device not in self._on_device:
            with torch.inference_mode(False):
                self._on_device[device] = _Parameters(self, device)
        return self._on_device[device]

    def _covariances(self) -> Tensor:
        return self.variances if self.rotation is None else self._full_covariances()

    def _full_covariances(self) -> Tensor:
        if self.rotation is None:
            return torch.diag_embed(self.variances)
        return self.rotation @ torch.diag_embed(self.variances) @ self.rotation.mT


class _Parameters:
    """The mixture's numbers on one device."""

    def __init__(self, mixture: GaussianMixture, device: torch.device) -> None:
        self.components = Components(
            mixture.means.to(device),
            mixture.variances.to(device),
            None if mixture.rotation is None else mixture.rotation.to(device),
            mixture.weights.log().to(device),
        )
        self.labels = mixture.labels.to(device)
        self.members = [
            (mixture.labels == c).nonzero()[:, 0].to(device) for c in range(mixture.num_classes)
        ]


class _ExactScore:
    cost = 1

    def __init__(self, mixture: GaussianMixture, label: Tensor | None) -> None:
        self.mixture = mixture
        self.label = label

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.mixture.event_shape

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        label = None if self.label is None else batch_of_labels(self.label, x)
        return self.mixture.predict(x, level, label)

    def select(self, indices: Tensor) -> _ExactScore:
        return _ExactScore(self.mixture, part_of(self.label, indices))


class ExactModel:
    """A mixture's conditional scores, called like a class-conditional network."""

    cost = 1

    def __init__(self, mixture: GaussianMixture) -> None:
        self.mixture = mixture
        self.num_classes = mixture.num_classes
        self.null_label = mixture.num_classes

    def __call__(self, x: Tensor, level: NoiseLevel, label: Label = None) -> Prediction:
        return self.mixture.predict(x, level, None if label is None else batch_of_labels(label, x))


class ExactClassifier:
    """A mixture's class posterior given ``x_t``, called like a noise-aware classifier."""

    def __init__(self, mixture: GaussianMixture) -> None:
        self.mixture = mixture
        self.num_classes = mixture.num_classes

    def __call__(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """Logits ``(B, C)``: ``log p(class, x_t)``, in ``x``'s dtype."""
        return self.mixture.class_logits(x, level)


def _finite(name: str, value: Tensor) -> Tensor:
    # Cloned so that a tensor made under inference_mode can take part in a classifier's gradient.
    with torch.inference_mode(False):
        value = torch.as_tensor(value).detach().clone().cpu().double()
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {_short(value)}")
    return value


def _short(value: Tensor) -> str:
    return str(value.tolist()) if value.numel() <= 64 else f"shape {tuple(value.shape)}"


def _eigenbasis(covariances: Tensor, count: int, dimension: int) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues ``(K, D)`` and, for full covariances, eigenvectors ``(K, D, D)`` in columns."""
    shapes = {(count,), (count, dimension), (count, dimension, dimension)}
    if tuple(covariances.shape) not in shapes:
        raise ValueError(
            f"covariances must have shape ({count},), ({count}, {dimension}) or "
            f"({count}, {dimension}, {dimension}), got {tuple(covariances.shape)}"
        )
    rotation = None
    if covariances.ndim == 3:
        if not torch.allclose(covariances, covariances.mT, rtol=1e-6, atol=1e-12):
            raise ValueError("covariances must be symmetric matrices")
        # Symmetrised because rounding of a float32 matrix would otherwise reach the eigenvectors.
        variances, rotation = torch.linalg.eigh(0.5 * (covariances + covariances.mT))
        # Eigenvalues of a singular matrix come out as rounding noise around 0.
        noise = 1e-6 * variances.abs().amax(1, keepdim=True)
        variances = torch.where(variances.abs() <= 1e-9 * noise, 0.0, variances)
    else:
        variances = (
            covariances if covariances.ndim == 2 else covariances[:, None].expand(count, dimension)
        )
    if bool((variances < 0).any()):
        raise ValueError(
            "covariances must be positive semidefinite, got an eigenvalue "
            f"{variances.min().item():g}"
        )
    return variances, rotation
