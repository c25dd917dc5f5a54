"""Log-likelihoods of gmm16 (16 dimensions, exact score, VP from t_min = 1e-5, float64): error
against the true log-density, calibration of the reported standard errors, and time against peers.

Peers: (a) the recipe of score_sde: SciPy's RK45 on one flattened host vector, so with a batch-wide
error norm, rtol = atol = 1e-5, one Rademacher probe, repeated and averaged; (b) torchdiffeq's
dopri5 on ``(x, log p)`` in t with the exact trace, a backward pass per dimension. Times are of the
processor, on one thread, in one process and in turn, so that a busy machine moves none much.

Run: ``python -m benchmarks.likelihood`` (some minutes), or only the parts named: ``accuracy``,
``calibration`` (writes docs/likelihood_calibration.png), ``speed``.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.canvas import COLOURS, GREY, picture
from sde_diffusion import VPSDE, named_target
from solvers import Adaptive, Tsitouras
from solvers.likelihood import log_likelihood, student

SDE = VPSDE(t_min=1e-5)
TARGET = named_target("gmm16")
SCORE = TARGET.score_fn(SDE)
LAST = SDE.at(SDE.t_max)
LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)
GROUPS = (2, 4, 8, 16, 32, 64)
FIXED = {"solver": Tsitouras(), "steps": 12, "grid": "log_snr", "diagnostics": False}


def own_prior(z: Tensor) -> Tensor:
    return TARGET.log_prob_at(z, LAST)


def data(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x, _ = TARGET.sample(count, seed, dtype=torch.float64)
    return x, TARGET.log_prob(x)


def accuracy(count: int) -> None:
    """Goal 1: the standard prior's floor, and the exact terminal density."""
    x, truth = data(count)
    print(f"exact divergence, {count} samples: mean |error| against the true log-density, nats")
    standard = log_likelihood(SCORE, SDE, x)
    floor = float((own_prior(standard.z) - SDE.prior_log_prob(standard.z)).abs().mean())
    found = float((standard.log_prob - truth).abs().mean())
    verdict("standard prior", found / floor, 1.1, f"{found:.5f}, floor {floor:.5f}, ratio")
    given = log_likelihood(SCORE, SDE, x, prior=own_prior)
    verdict("terminal density given", float((given.log_prob - truth).abs().mean()), 1e-4)
    rest = {
        "  less the truncation reported": given.log_prob - given.truncation,
        "  standard prior, both reports": (
            standard.log_prob + standard.prior_mismatch - standard.truncation
        ),
        "  prior='moments'": log_likelihood(
            SCORE, SDE, x, prior="moments", moments=(TARGET.mean(), TARGET.covariance())
        ).log_prob,
    }
    for name, value in rest.items():
        print(f"{name:34} {float((value - truth).abs().mean()):.2e}")
    print(f"  {given.nfe:.0f} evaluations, {given.products:.0f} products per sample\n")


def verdict(name: str, value: float, goal: float, detail: str = "") -> None:
    met = "met" if value <= goal else f"MISSED by {value / goal:.2f}"
    print(f"{name:34} {detail} {value:.3g} (goal {goal:g}: {met})")


def calibration(count: int) -> None:
    """Goal 2: error as probes^-1/2, and intervals that hold what they say. Against the exact trace
    on the same steps, so that the probes' error is all there is."""
    x, _ = data(count, seed=1)
    exact = log_likelihood(SCORE, SDE, x, **FIXED).log_prob
    values = log_likelihood(
        SCORE, SDE, x, divergence="hutchinson", probes=GROUPS[-1], **FIXED
    ).values  # fmt: skip
    errors, held = [], {}
    print(f"Hutchinson, {count} samples, {GROUPS[-1]} probes each, in groups")
    print("probes   RMS error   reported   " + "  ".join(f"{level:>6.0%}" for level in LEVELS))
    for size in GROUPS:
        grouped = values.reshape(count, -1, size)
        error = (grouped.mean(2) - exact[:, None]).flatten()
        stderr = (grouped.std(2) / math.sqrt(size)).flatten()
        errors.append(float(error.square().mean().sqrt()))
        held[size] = [
            float((error.abs() <= student(level, size - 1) * stderr).double().mean())
            for level in LEVELS
        ]
        reported = float(stderr.square().mean().sqrt())
        shares = "  ".join(f"{share:6.1%}" for share in held[size])
        print(f"{size:6}   {errors[-1]:9.4f}   {reported:8.4f}   {shares}")
    slope = np.polyfit(np.log(GROUPS), np.log(errors), 1)[0]
    print(f"error ~ probes^{slope:.3f} (goal -0.5)")
    at = LEVELS.index(0.95)
    missed = [size for size in GROUPS if not 0.93 <= held[size][at] <= 0.97]
    print(f"95 % intervals hold 93 to 97 %: {'met' if not missed else f'MISSED at {missed}'}\n")
    draw(Path(__file__).parent.parent / "docs" / "likelihood_calibration.png", errors, held)


def draw(path: Path, errors: list[float], held: dict[int, list[float]]) -> None:
    with picture(path, height=3.4) as figure:
        left, right = figure.subplots(1, 2)
        left.loglog(GROUPS, errors, "o-", color=COLOURS[0], label="measured")
        guide = [errors[0] * math.sqrt(GROUPS[0] / size) for size in GROUPS]
        left.loglog(GROUPS, guide, "--", color=GREY, label="probes$^{-1/2}$")
        left.set_xticks(GROUPS, [str(size) for size in GROUPS])
        left.set_yticks([0.5, 1, 2], ["0.5", "1", "2"])
        left.minorticks_off()
        left.set_xlabel("probes")
        left.set_ylabel("RMS error, nats")
        left.set_title("Hutchinson's error, gmm16")
        left.legend()
        right.axhspan(93, 97, color="#E4ECF5", label="93 to 97 %")
        for k, level in enumerate((0.95, 0.8, 0.5)):
            shares = [100 * held[size][LEVELS.index(level)] for size in GROUPS]
            colour = COLOURS[k]
            right.semilogx(GROUPS, shares, "os^"[k] + "-", color=colour, label=f"{level:.0%}")
            right.axhline(100 * level, color=colour, linewidth=0.8, linestyle=":")
        right.set_xticks(GROUPS, [str(size) for size in GROUPS])
        right.minorticks_off()
        right.set_ylim(40, 102)
        right.set_xlabel("probes")
        right.set_ylabel("of intervals hold the exact-trace value, %")
        right.set_title("intervals by Student's t")
        right.legend(loc="center right", bbox_to_anchor=(1.0, 0.42), ncols=2)


def score_sde(x: Tensor, repeats: int, seed: int) -> Tensor:
    """Recipe (a)."""
    from scipy.integrate import solve_ivp

    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(x), dtype=torch.float64)
    for _ in range(repeats):
        probe = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1

        def slope(t: float, flat: np.ndarray, probe: Tensor = probe) -> np.ndarray:
            state = torch.from_numpy(flat[: x.numel()]).reshape(x.shape).clone().requires_grad_()
            level = SDE.at(t)
            with torch.enable_grad():
                drift = level.f * state - 0.5 * level.g2 * SCORE(state, level).score
                (product,) = torch.autograd.grad((drift * probe).sum(), state)
            divergence = (product * probe).sum(1)
            parts = (drift.detach().reshape(-1), divergence)
            return np.concatenate([part.numpy() for part in parts])

        start = np.concatenate([x.reshape(-1).numpy(), np.zeros(len(x))])
        end = solve_ivp(
            slope, (SDE.t_min, SDE.t_max), start, method="RK45", rtol=1e-5, atol=1e-5
        ).y[:, -1]
        z = torch.from_numpy(end[: x.numel()]).reshape(x.shape)
        total += own_prior(z) + torch.from_numpy(end[x.numel() :])
    return total / repeats


def dopri5(x: Tensor, tolerance: float) -> Tensor:
    """Recipe (b)."""
    from torchdiffeq import odeint

    def slope(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        level = SDE.at(t.clamp(SDE.t_min, SDE.t_max))
        with torch.enable_grad():
            at = state[0].detach().requires_grad_()
            drift = level.f * at - 0.5 * level.g2 * SCORE(at, level).score
            trace = torch.zeros_like(state[1])
            for i in range(at.shape[1]):
                (row,) = torch.autograd.grad(drift[:, i].sum(), at, retain_graph=True)
                trace = trace + row[:, i]
        return drift.detach(), trace

    ends = torch.tensor([SDE.t_min, SDE.t_max], dtype=torch.float64)
    z, change = odeint(
        slope, (x, x.new_zeros(len(x))), ends, rtol=tolerance, atol=tolerance, method="dopri5"
    )
    return own_prior(z[-1]) + change[-1]


def speed(count: int, repeats: int) -> None:
    """Goal 3: time at equal error, the terminal density given to all."""
    x, _ = data(count, seed=2)
    truth = TARGET.log_prob_at(x, SDE.at(SDE.t_min))

    def rms(value: Tensor) -> float:
        return float((value - truth).square().mean().sqrt())

    def ours(tolerance: float, **options: object) -> Callable[[], Tensor]:
        plan = Adaptive(tolerance, tolerance)
        return lambda: (
            log_likelihood(
                SCORE, SDE, x, prior=own_prior, plan=plan, diagnostics=False, **options
            ).log_prob
        )

    print(f"time at equal error, {count} samples in one batch, against log p at t_min")
    runs: dict[str, Callable[[], Tensor]] = {
        f"score_sde, {repeats} probes": lambda: score_sde(x, repeats, 0),
        f"Hutchinson, {repeats} probes": ours(
            1e-3, divergence="hutchinson", probes=repeats, seed=5
        ),
    }
    for k in (3, 4, 5, 6):
        runs[f"dopri5, exact, 1e-{k}"] = lambda k=k: dopri5(x, 10.0**-k)
        runs[f"Tsitouras, exact, 1e-{k}"] = ours(10.0**-k)
    errors: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for _ in range(2):
        for name, run in runs.items():
            start = time.process_time()
            errors[name] = rms(run())
            spent = time.process_time() - start
            seconds[name] = min(spent, seconds.get(name, math.inf))
    for name in runs:
        print(f"  {name:26} RMS {errors[name]:9.2e}   {seconds[name]:7.2f} s")
    theirs, mine = list(runs)[:2]
    verdict("(a) Hutchinson against Hutchinson", seconds[mine] / seconds[theirs], 0.5)
    cheap = next(n for n in runs if "Tsit" in n and errors[n] <= errors[theirs])
    verdict(
        "    exact trace against it", seconds[cheap] / seconds[theirs], 0.5,
        f"error {errors[cheap]:.1e} against {errors[theirs]:.1e},",
    )  # fmt: skip
    needed = repeats * (errors[theirs] / 1e-2) ** 2
    print(f"    for 1e-2 nats score_sde needs about {needed:,.0f} repeats")
    curve = {
        kind: sorted((errors[n], seconds[n]) for n in runs if n.startswith(kind))
        for kind in ("dopri5", "Tsitouras")
    }
    for error in (1e-2, 1e-3, 1e-4):
        times = {kind: at(error, points) for kind, points in curve.items()}
        verdict(
            f"(b) dopri5, at {error:.0e} nats", times["Tsitouras"] / times["dopri5"], 0.5,
            f"{times['Tsitouras']:.2f} s against {times['dopri5']:.2f} s,",
        )  # fmt: skip


def at(error: float, points: list[tuple[float, float]]) -> float:
    """Seconds for an error, from ``(error, seconds)``, straight in log-log; NaN outside."""
    errors, seconds = (np.log([point[k] for point in points]) for k in (0, 1))
    return float(np.exp(np.interp(math.log(error), errors, seconds, math.nan, math.nan)))


def main() -> None:
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], None]] = {
        "accuracy": lambda: accuracy(128),
        "calibration": lambda: calibration(250),
        "speed": lambda: speed(8, 16),
    }
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
