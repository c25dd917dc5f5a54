"""Samples in chunks, side by side on the processor's cores.

A sample is a function of the seed and its id, so how it is batched, and beside what, changes
nothing. Each chunk runs on one thread: small tensors gain little from two threads that wait for
each other at every operation, and much from two chunks at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sde_diffusion.prediction import ScoreFn
from sde_diffusion.sde import SDE
from solvers import Integrator, Solution, Solver, sample

ScoreOf = Callable[[Tensor], ScoreFn]  # sample ids (B,) -> the score of that batch
Look = Callable[[int, int], None]  # steps done, steps in all


@dataclass(frozen=True)
class Drawn:
    """Samples and what they cost; counts are per sample.

    Attributes:
        x: (N, *event), on the CPU.
        seconds: wall time for all of them.
        batch_size: samples in the largest chunk.
    """

    x: Tensor
    nfe: float
    network_passes: float
    seconds: float
    batch_size: int


class _Stopped(Exception):  # noqa: N818
    """Another chunk failed or Ctrl-C was pressed."""


@dataclass(frozen=True)
class Machine:
    """Where and how to sample.

    Attributes:
        device: torch device.
        batch_size: samples in one chunk at most; None: as the caller suggests.
        workers: chunks at a time.
    """

    device: torch.device
    batch_size: int | None = None
    workers: int = 1

    def draw(
        self,
        score_of: ScoreOf,
        sde: SDE,
        solver: Solver | Integrator,
        *,
        event_shape: tuple[int, ...],
        ids: Tensor,
        steps: int | None,
        seed: int,
        grid: str | None = None,
        denoise: bool = False,
        dtype: torch.dtype = torch.float32,
        suggested: int = 1024,
    ) -> Drawn:
        """The samples with these ids, drawn as `solve` says.

        Args:
            score_of: the score for a batch, given its ids.
            ids: (N,) long.
            suggested: as of `solve`.
        """

        def one(rows: Tensor, look: Look) -> Solution:
            part = ids[rows]
            return sample(
                score_of(part),
                sde,
                solver,
                shape=(len(part), *event_shape),
                sample_ids=part,
                steps=steps,
                grid=grid,
                seed=seed,
                denoise=denoise,
                dtype=dtype,
                device=self.device,
                progress=look,
            )

        return self.for_solver(solver).solve(one, len(ids), suggested)

    def for_solver(self, solver: Solver | Integrator) -> Machine:
        """Itself; for a sampler whose samples depend on their batch one chunk at a time, so that
        they depend on nothing but the batch size."""
        return replace(self, workers=1) if getattr(solver, "depends_on_batch", False) else self

    def solve(
        self, one: Callable[[Tensor, Look], Solution], count: int, suggested: int = 1024
    ) -> Drawn:
        """``count`` samples in chunks.

        A chunk for which memory does not suffice is halved until it does, and so are all after it:
        the samples are the same.

        Args:
            one: the samples at these places, (B,) long from 0 to ``count``; to call back at steps.
            suggested: chunk size where the user has named none; made smaller so that every worker
                has something to do.
        """
        size = self.batch_size or max(1, min(suggested, -(-count // self.workers)))
        while True:
            chunks = list(torch.arange(count).split(size))
            started = time.perf_counter()
            try:
                solutions = _side_by_side(one, chunks, self.workers)
                if self.device.type == "cuda":  # it answers before it has computed
                    torch.cuda.synchronize(self.device)
                break
            except RuntimeError as error:
                if not _out_of_memory(error) or size == 1:
                    raise
            size = -(-size // 2)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        seconds = time.perf_counter() - started
        weights = [len(part) / count for part in chunks]
        return Drawn(
            torch.cat([s.x.detach().cpu() for s in solutions]),
            _rounded(sum(w * s.nfe for w, s in zip(weights, solutions, strict=True))),
            _rounded(sum(w * s.network_passes for w, s in zip(weights, solutions, strict=True))),
            seconds,
            size,
        )


def make_machine(device: str, batch_size: int | None) -> Machine:
    """The machine for a device: on a CPU as many workers as torch has threads.

    Raises:
        ValueError: no such device here.
    """
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError):
        here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        raise ValueError(
            f"--device {device!r} cannot be used here; available: {', '.join(here)}"
        ) from None
    workers = torch.get_num_threads() if place.type == "cpu" else 1
    return Machine(place, batch_size, max(1, workers))


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Torch on one thread: the workers are what fills the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _side_by_side(
    one: Callable[[Tensor, Look], Solution],
    chunks: list[Tensor],
    workers: int,
) -> list[Solution]:
    stop = threading.Event()

    def look(done: int, total: int) -> None:
        if stop.is_set():
            raise _Stopped

    if workers == 1 or len(chunks) == 1:
        return [one(part, look) for part in chunks]
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        futures = [pool.submit(one, part, look) for part in chunks]
        return [future.result() for future in futures]
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether torch, on any device, says that memory does not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _rounded(count: float) -> float:
    """Without the rounding errors of a weighted mean of equal whole numbers."""
    nearest = round(count)
    return nearest if abs(count - nearest) < 1e-9 * max(1.0, abs(count)) else count
