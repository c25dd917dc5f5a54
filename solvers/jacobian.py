"""Products with the Jacobian of a prediction's noise, within a bound on memory.

Reverse mode (``v J``) evaluates once and goes back through its graph once per vector, several at a
time by ``vmap``. Where an operation does not go with ``vmap`` (channels-last convolutions), copies
of the batch, one per vector, are evaluated and gone back through together. Forward mode (``J v``)
keeps no graph; measured on a CPU on exact mixtures of 16 dimensions it took two to four times as
long, on a small MLP as long to three times as long, and on the shipped U-Net it does not run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sde_diffusion.errors import require_count, unknown_name
from sde_diffusion.prediction import ScoreFn, select
from sde_diffusion.sde import NoiseLevel

MEMORY = 512 * 1024**2
MODES = ("auto", "forward", "reverse")
_LIVE = 3  # copies of what a graph keeps that are alive at once: graph, gradients, workspace
_FULL = 1024  # (sample, vector) pairs beyond which a larger pass is no quicker
_AGREEMENT = 1e-3  # of forward and reverse products, relative; float32 gives 1e-5

Way = Literal["reverse", "copies", "forward"]


@dataclass(frozen=True)
class Memory:
    """What products may take.

    Attributes:
        mode: ``reverse``; ``forward``; or ``auto``: reverse, which is quicker, unless the graph of
            a single sample exceeds ``bytes`` and forward mode gives the same. A choice by the clock
            would make a result depend on the machine's load, in its last digits.
        bytes: that a pass may take beside the weights and the state; batch and vectors are split
            to keep to it, down to one sample and one vector.
        vectors: in one pass, at most; by ``bytes`` alone if ``None``.
    """

    mode: Literal["auto", "forward", "reverse"] = "auto"
    bytes: int = MEMORY
    vectors: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown_name("mode", self.mode, MODES)
        require_count("bytes", self.bytes)
        if self.vectors is not None:
            require_count("vectors", self.vectors)


@dataclass(frozen=True)
class Passes:
    """How the products of a run are made, as found out by ``plan_passes``.

    Attributes:
        way: ``reverse``, ``copies`` (reverse mode on copies) or ``forward``.
        pairs: (sample, vector) pairs in one pass, at most.
        vectors: of each sample in one pass, at most; ``None``: as many as ``pairs`` gives.
    """

    way: Way
    pairs: int
    vectors: int | None = None

    def split(self, count: int) -> int:
        """Samples at a time, of so many."""
        return max(1, min(count, self.pairs))

    def together(self, count: int) -> int:
        """Vectors at a time, for so many samples at a time."""
        most = max(1, min(self.pairs, _FULL) // max(1, count))
        return most if self.vectors is None else min(most, self.vectors)


class Jacobian:
    """The Jacobian of ``x -> eps`` at one level.

    Attributes:
        eps: ``(B, D)``.
        shape: ``(B, D)``.
        vectors: in one pass.
    """

    def __init__(self, score_fn: ScoreFn, x: Tensor, level: NoiseLevel, passes: Passes) -> None:
        self._score_fn, self._x, self._level = score_fn, x, level
        self._way = passes.way
        self._event = x.shape[1:]
        self._flat = x.reshape(len(x), -1)
        self.shape = self._flat.shape
        self.vectors = passes.together(len(x))
        self._graph: tuple[Tensor, Tensor] | None = None
        if self._way == "reverse":
            self._graph = self._traced(score_fn, self._flat, level)
            self.eps = self._graph[1].detach()
        else:
            with torch.no_grad():
                self.eps = self._function(score_fn, level)(self._flat)

    def __call__(self, vectors: Tensor) -> Tensor:
        """``v J`` (in forward mode ``J v``) for each ``v``: ``(n, B, D)``."""
        return torch.cat([self._products(part) for part in vectors.split(self.vectors)])

    def quadratic(self, vectors: Tensor) -> Tensor:
        """``v J v``: ``(n, B)``."""
        return (self(vectors) * vectors).sum(-1)

    def _products(self, vectors: Tensor) -> Tensor:
        if self._way == "forward":
            function = self._function(self._score_fn, self._level)
            return torch.func.vmap(
                lambda v: torch.func.jvp(function, (self._flat,), (v,))[1]
            )(vectors)  # fmt: skip
        if self._graph is not None:
            leaf, output = self._graph
            if not output.requires_grad:
                return torch.zeros_like(vectors)
            if len(vectors) == 1:
                return _gradient(output, leaf, vectors[0], batched=False)[None]
            return _gradient(output, leaf, vectors, batched=True)
        count = len(vectors)
        copies = torch.arange(len(self._x), device=self._x.device).repeat(count)
        level = self._level
        if level.t.ndim:
            level = level.map(lambda field: field.repeat(count))
        leaf, output = self._traced(select(self._score_fn, copies), self._flat[copies], level)
        if not output.requires_grad:
            return torch.zeros_like(vectors)
        found = _gradient(output, leaf, vectors.reshape(output.shape), batched=False)
        return found.reshape(vectors.shape)

    def _traced(self, score_fn: ScoreFn, flat: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = flat.detach().clone().requires_grad_()
            return leaf, self._function(score_fn, level)(leaf)

    def _function(self, score_fn: ScoreFn, level: NoiseLevel) -> Callable[[Tensor], Tensor]:
        def function(flat: Tensor) -> Tensor:
            x = flat.reshape(len(flat), *self._event)
            return score_fn(x, level).eps.reshape(flat.shape)

        return function


def plan_passes(memory: Memory, score_fn: ScoreFn, x: Tensor, level: NoiseLevel) -> Passes:
    """How to make products at ``x`` ``(B, *event)``, found out by a few evaluations of its first
    sample, at a level with 0-d fields. They are not part of any count.

    Raises:
        ValueError: a score function that cannot be differentiated.
    """
    if not len(x):
        return Passes("reverse", 1)
    one, two = (_graph_bytes(score_fn, x, level, copies) for copies in (1, 2))
    each = max(two - one, 8 * x[0].numel() * x.element_size())
    pairs = max(1, memory.bytes // (_LIVE * each))
    want_forward = memory.mode == "forward" or (
        memory.mode == "auto" and _LIVE * each > memory.bytes
    )
    if want_forward:
        if _agree(score_fn, x, level, "forward"):
            return Passes("forward", pairs, memory.vectors)
        if memory.mode == "forward":
            raise ValueError(
                "mode='forward' does not go with this score_fn: an operation has no forward "
                "derivative, or it takes gradients of its own; use mode='reverse'"
            )
    way: Way = "reverse" if _agree(score_fn, x, level, "reverse") else "copies"
    return Passes(way, pairs, memory.vectors)


def _gradient(output: Tensor, leaf: Tensor, vectors: Tensor, *, batched: bool) -> Tensor:
    (found,) = torch.autograd.grad(
        output, leaf, vectors, retain_graph=True, is_grads_batched=batched, allow_unused=True
    )
    return torch.zeros_like(vectors) if found is None else found.detach()


def _agree(score_fn: ScoreFn, x: Tensor, level: NoiseLevel, way: Way) -> bool:
    """Whether a way works on the first sample, without falling back to a loop, and gives what plain
    reverse mode does: forward mode silently drops what a score function differentiates itself."""
    first = select(score_fn, torch.zeros(1, dtype=torch.long, device=x.device))
    size = x[0].numel()
    vectors = torch.cos(torch.arange(2.0 * size)).to(x).reshape(2, 1, size)
    wanted = Jacobian(first, x[:1], level, Passes("copies", 1)).quadratic(vectors)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            found = Jacobian(first, x[:1], level, Passes(way, 2)).quadratic(vectors)
    except (RuntimeError, NotImplementedError, ValueError, UserWarning):
        return False
    return torch.allclose(found, wanted, rtol=_AGREEMENT, atol=_AGREEMENT)


def _graph_bytes(score_fn: ScoreFn, x: Tensor, level: NoiseLevel, copies: int) -> int:
    """What autograd keeps of one evaluation of so many copies of the first sample."""
    indices = torch.zeros(copies, dtype=torch.long, device=x.device)
    several = select(score_fn, indices)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        leaf = x[indices].detach().requires_grad_()
        output = several(leaf, level).eps
    if not output.requires_grad:
        with torch.no_grad():
            moves = not torch.equal(several(leaf + 1, level).eps, several(leaf, level).eps)
        if moves:
            raise ValueError(
                "score_fn passes no gradient on to x (it detaches, or runs under no_grad), so that "
                "its divergence cannot be had; give a differentiable score function"
            )
    return sum(kept.values())
