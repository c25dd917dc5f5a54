"""What the framework costs beyond the network and beyond a plain loop. Ratios of one run.

Targets: at most 1.02 over the bare network for U-Nets of 1 to 5 million parameters at 4x3x32x32;
with a free network at most 3 times the plain loop of the same update at (64, 2), 1.3 times at
image sizes.

Run: ``python -m benchmarks.overhead``
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.plain import LOOPS
from benchmarks.timing import interleaved, median_ratio
from sde_diffusion import VPSDE, EpsModel, NoiseLevel, Prediction
from sde_diffusion.networks import UNet
from solvers import CounterNoise, sample
from solvers.catalogue import named

SDE = VPSDE()
SHAPES = ((64, 2), (64, 3, 32, 32), (64, 4, 64, 64))
STEPS = 100
# Schedulers that make the same update or, where diffusers has no such one, the nearest.
PEERS = {
    "ancestral": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "euler_maruyama": ("EulerAncestralDiscreteScheduler", {}),
    "probability_flow": ("HeunDiscreteScheduler", {}),
}


def network_overhead(console: Console, repeats: int) -> None:
    """``sample`` over NFE times the bare network."""
    table = Table(title="sample over NFE x bare network, batch 4x3x32x32 (target <= 1.02)")
    for column in ("parameters", "solver", "NFE", "sample s", "network s", "ratio", "quartiles"):
        table.add_column(column, justify="right")
    for width in (64, 128):
        torch.manual_seed(0)
        net = UNet((3, 32, 32), channels=(width, width, 2 * width), patch_size=1).eval()
        count = sum(p.numel() for p in net.parameters())
        model, shape = EpsModel(net, SDE), (4, 3, 32, 32)
        x, t = torch.randn(shape), torch.full((4,), 0.5)
        for name, steps in (("ddim", 10), ("euler_maruyama", 10), ("probability_flow", 5)):
            solver = named(name)()
            nfe = int(sample(model, SDE, solver, shape=shape, steps=steps).nfe)

            def whole(solver=solver, model=model, shape=shape, steps=steps) -> None:
                sample(model, SDE, solver, shape=shape, steps=steps)

            def bare(net=net, x=x, t=t, nfe=nfe) -> None:
                with torch.no_grad():
                    for _ in range(nfe):
                        net(x, t)

            seconds = interleaved({"sample": whole, "network": bare}, repeats)
            ratios = [a / b for a, b in zip(seconds["sample"], seconds["network"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            table.add_row(
                f"{count / 1e6:.1f} M",
                name,
                str(nfe),
                *(f"{statistics.median(seconds[k]):.3f}" for k in ("sample", "network")),
                f"{middle:.3f}",
                f"{low:.3f} - {high:.3f}",
            )
    console.print(table)


def update_overhead(console: Console, repeats: int) -> None:
    """Microseconds per evaluation with a free network, beside plain loops and diffusers."""
    with_peers = importlib.util.find_spec("diffusers") is not None
    table = Table(
        title=f"µs per evaluation with a free network, {STEPS} steps, set-up included "
        "(target <= 3 at (64, 2), <= 1.3 at image sizes, over the plain loop)"
    )
    columns = ["shape", "solver", "sample", "plain loop", "ratio", "plain loop, randn", "ratio"]
    for column in columns + (["diffusers", "ratio"] if with_peers else []):
        table.add_column(column, justify="right")
    for shape in SHAPES:
        for name in LOOPS:
            runs = _contenders(name, shape, with_peers)
            count = max(3, repeats // (1 if shape[0] * shape[1] < 1000 and len(shape) == 2 else 6))
            seconds = interleaved(runs, count)
            evaluations = STEPS * (2 if name in ("probability_flow", "predictor_corrector") else 1)
            micros = {k: statistics.median(v) / evaluations * 1e6 for k, v in seconds.items()}
            row = [str(shape), name, f"{micros['sample']:.1f}"]
            for floor in ("plain", "randn", "diffusers")[: 3 if with_peers else 2]:
                if floor in runs:
                    ratio = median_ratio(seconds, "sample", floor)
                    row += [f"{micros[floor]:.1f}", f"{ratio:.2f}"]
                else:
                    row += ["-", "-"]
            table.add_row(*row, end_section=name == list(LOOPS)[-1])
    console.print(table)
    console.print(
        "[dim]The plain loop of a stochastic solver draws the same counter noise; 'randn' draws "
        "torch.randn instead. diffusers: its scheduler of the same or the nearest update.[/dim]"
    )


def _contenders(
    name: str, shape: tuple[int, ...], with_peers: bool
) -> dict[str, Callable[[], object]]:
    output = torch.randn(shape)
    noise = CounterNoise(0)
    solver = named(name)()

    def score_fn(x: Tensor, level: NoiseLevel) -> Prediction:
        return Prediction.from_eps(x, level, output)

    def net(x: Tensor, t: object) -> Tensor:
        return output

    def run_plain(draw: Callable[[int, Tensor], Tensor]) -> Callable[[], object]:
        loop = LOOPS[name](SDE, STEPS, net, draw)

        def run() -> Tensor:
            with torch.no_grad():
                return loop(torch.randn(shape))

        return run

    runs: dict[str, Callable[[], object]] = {
        "sample": lambda: sample(score_fn, SDE, solver, shape=shape, steps=STEPS),
        "plain": run_plain(lambda i, x: noise.normal(x, i, 0)),
    }
    if solver.stochastic:
        runs["randn"] = run_plain(lambda i, x: torch.randn_like(x))
    if with_peers and name in PEERS:
        runs["diffusers"] = _diffusers_loop(name, shape, net)
    return runs


def _diffusers_loop(
    name: str, shape: tuple[int, ...], net: Callable[[Tensor, object], Tensor]
) -> Callable[[], object]:
    import diffusers

    class_name, settings = PEERS[name]
    scheduler = getattr(diffusers, class_name)(**settings)

    def run() -> Tensor:
        scheduler.set_timesteps(STEPS)
        x = torch.randn(shape) * scheduler.init_noise_sigma
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x).prev_sample
        return x

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--part", choices=("network", "update", "both"), default="both")
    arguments = parser.parse_args()
    console = Console()
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if arguments.part != "update":
        network_overhead(console, max(5, arguments.repeats // 3))
    if arguments.part != "network":
        update_overhead(console, arguments.repeats)


if __name__ == "__main__":
    main()
