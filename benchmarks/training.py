"""What the training loop costs beyond a bare PyTorch step, and beside diffusers' UNet2DModel.

Target: at most 1.03 times the bare step of our own network. One step is: draw a batch with its
times and noise, forward, backward, clip, AdamW, average of weights. Steps alternate, so that a
drifting machine moves all alike; on the CPU, CPU time is compared, not the wall's.

Run: ``python -m benchmarks.training``
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.timing import interleaved, median_ratio
from sde_diffusion import VPSDE
from sde_diffusion.accelerated import make_accelerator
from sde_diffusion.data import Dataset, Scaling
from sde_diffusion.loop import Loop, StageSettings
from sde_diffusion.networks import sized_score_config
from sde_diffusion.training_settings import TrainSettings
from sde_diffusion.training_tasks import SCORE, Tasks

SHAPE = (3, 32, 32)
SDE = VPSDE()


def bare_step(net: nn.Module, data: Tensor, batch: int, times_scale: float) -> Callable[[], None]:
    """The step by hand, with PyTorch's own generator and the schedule written out."""
    device = next(net.parameters()).device
    average = copy.deepcopy(net).eval().requires_grad_(False)
    weights, averages = list(net.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-4, betas=(0.9, 0.99), fused=True)

    def step() -> None:
        x0 = data[torch.randint(len(data), (batch,))].to(device)
        t = 1e-3 + (1 - 1e-3) * torch.rand(batch)
        noise = torch.randn(x0.shape).to(device)
        alpha = torch.exp(-0.25 * t**2 * 19.9 - 0.05 * t).to(device)[:, None, None, None]
        x = alpha * x0 + (1 - alpha**2).sqrt() * noise
        found = net(x, t.to(device) * times_scale)
        loss = (getattr(found, "sample", found) - noise).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1e-3)

    return step


def ours(size: float, data: Tensor, batch: int, device: str) -> tuple[Loop, int]:
    """The loop as `train` runs it, with its network."""
    held = Dataset("noise", data, None, data[:8], None, None, Scaling(-1.0, 1.0))
    network = sized_score_config(SHAPE, None, size)
    own = {k: v for k, v in network.items() if k not in ("event_shape", "num_classes")}
    score = StageSettings(steps=10**6, batch_size=batch, learning_rate=1e-4)
    tasks = Tasks(held, SDE, TrainSettings(score=score, network=own), 0)
    net = tasks.network(SCORE)
    count = sum(p.numel() for p in net.parameters())
    accelerator = make_accelerator(device)
    return Loop(SCORE, net, tasks.task(SCORE, net), score, 0, 1, accelerator=accelerator), count


def peer(count: int) -> nn.Module | None:
    """diffusers' U-Net with about as many parameters, where diffusers is installed."""
    if importlib.util.find_spec("diffusers") is None:
        return None
    from diffusers import UNet2DModel

    def make(width: int) -> nn.Module:
        return UNet2DModel(
            sample_size=SHAPE[1],
            in_channels=SHAPE[0],
            out_channels=SHAPE[0],
            block_out_channels=(width, 2 * width, 2 * width),
            layers_per_block=2,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )

    def parameters(width: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in make(width).parameters())

    return make(min(range(16, 400, 4), key=lambda width: abs(parameters(width) - count)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.5e6, 2.5e6])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    torch.set_num_threads(1 if on_cpu else torch.get_num_threads())
    torch.manual_seed(0)
    data = torch.rand(512, *SHAPE) * 2 - 1
    table = Table(title=f"one training step, batch {arguments.batch} of {SHAPE}, one process")
    for column in ("step of", "parameters", "seconds", "samples/s", "over bare", "quartiles"):
        table.add_column(column, justify="right")
    for size in arguments.sizes:
        loop, count = ours(size, data, arguments.batch, arguments.device)
        bare = copy.deepcopy(loop.average).requires_grad_(True).train()
        other = peer(count)
        nets = {"bare PyTorch, our network": (bare, 1.0)}
        if other is not None:
            nets["plain loop, UNet2DModel"] = (other.to(arguments.device).train(), 999.0)

        def step(loop: Loop = loop) -> None:
            loop.step()
            if loop.done % loop.look_every == 0:
                loop.look()

        runs: dict[str, Callable[[], object]] = {"sde-diffusion": step}
        for name, (net, scale) in nets.items():
            runs[name] = bare_step(net, data, arguments.batch, scale)
        counts = {name: sum(p.numel() for p in net.parameters()) for name, (net, _) in nets.items()}
        clock = time.process_time if on_cpu else synchronized
        seconds = interleaved(runs, arguments.repeats, clock)
        floor = "bare PyTorch, our network"
        for name, taken in seconds.items():
            ratios = [a / b for a, b in zip(taken, seconds[floor], strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            middle = statistics.median(taken)
            table.add_row(
                name,
                f"{counts.get(name, count):,}",
                f"{middle:.3f}",
                f"{arguments.batch / middle:.1f}",
                f"{median_ratio(seconds, name, floor):.3f}",
                f"{low:.3f} … {high:.3f}",
            )
        table.add_section()
        loop.close()
    Console(width=110).print(table)


def synchronized() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
