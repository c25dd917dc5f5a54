"""Notice NaN and infinity without looking at every step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sde_diffusion.errors import NonFiniteError
from sde_diffusion.prediction import Prediction, ScoreFn
from sde_diffusion.sde import NoiseLevel
from solvers.base import Solver, State, Step
from solvers.noise import Noise

_EVERY = 16


class FiniteGuard:
    """Looks at the state every few steps and, where it is not finite, replays to find the step at
    fault.

    A look waits for the device and reads the whole state once, so it is not taken at every step.
    NaN and infinity never leave a state again, and a replay from the last good state repeats the
    run, because noise is a function of its place.
    """

    def __init__(
        self, solver: Solver, score_fn: ScoreFn, noise: Noise, x: Tensor, state: State
    ) -> None:
        self._solver = solver
        self._score_fn = score_fn
        self._noise = noise
        self._good: tuple[Tensor, State] = (x, state)
        self._since: list[Step] = []

    def watch(self, steps: Sequence[Step], x: Tensor, state: State) -> None:
        """Note steps taken; look if it is time."""
        self._since += steps
        if len(self._since) >= _EVERY:
            self.finish(x)
            self._good = (x, state)
            self._since.clear()

    def finish(self, x: Tensor) -> None:
        """Look now."""
        if self._since and not bool(x.isfinite().all()):
            self._replay()

    def _replay(self) -> None:
        x, state = self._good
        for step in self._since:
            checked = _Checked(self._score_fn)
            x, state, _ = self._solver.step(checked, x, step, state, self._noise)
            if checked.failed:
                self._fail(step, "score_fn returned NaN or infinity")
            if not bool(x.isfinite().all()):
                self._fail(
                    step,
                    "the state left the finite numbers; the score was finite, so use more steps",
                )
        self._fail(
            self._since[0], "NaN or infinity appeared, and did not when replayed; from here on"
        )

    def _fail(self, step: Step, what: str) -> None:
        time = step.start.t.max().item()
        raise NonFiniteError(f"{what} at step {step.index}, t = {time:.6g}", step.index, time)


def explain(
    solver: Solver, score_fn: ScoreFn, x: Tensor, step: Step, state: State, noise: Noise
) -> NonFiniteError:
    """Replay a step that did not come out finite and say where that began."""
    checked = _Checked(score_fn)
    solver.step(checked, x, step, state, noise)
    what = "score_fn returned NaN or infinity" if checked.failed else "the state became infinite"
    time = checked.time if checked.failed else step.start.t.max().item()
    return NonFiniteError(f"{what} at step {step.index}, t = {time:.6g}", step.index, time)


class _Checked:
    """Notes whether, and at which time first, the score of a finite state is not finite."""

    def __init__(self, score_fn: ScoreFn) -> None:
        self._score_fn = score_fn
        self.failed = False
        self.time = 0.0

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        prediction = self._score_fn(x, level)
        if self.failed or not bool(x.isfinite().all()):
            return prediction
        if not bool(prediction.eps.isfinite().all()):
            self.failed = True
            self.time = level.t.max().item()
        return prediction
