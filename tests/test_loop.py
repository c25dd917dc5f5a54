"""The loop: schedules, averages, accumulated parts, updates that are skipped, layers that draw."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from sde_diffusion.accelerated import check_trackers, make_accelerator
from sde_diffusion.loop import (
    Batch,
    Loop,
    NonFiniteLossError,
    StageSettings,
    Task,
    generator_for,
    seeded,
)

SETTINGS = StageSettings(steps=20, batch_size=12, warmup=2, learning_rate=1e-2)


def task(poison: tuple[int, ...] = (), value: float = math.nan) -> Task:
    """Least squares; the batch of a poisoned draw has one target that is not finite."""
    draws = -1

    def draw(generator: torch.Generator) -> Batch:
        nonlocal draws
        draws += 1
        x = torch.randn(12, 4, generator=generator)
        y = x.sum(1, keepdim=True)
        if draws in poison:
            y[3] = value
        return x, y, None

    return Task(draw, lambda net, batch: (net(batch[0]) - batch[1]).square().mean(1))


def network(dropout: float = 0.0) -> nn.Module:
    return seeded(
        lambda: nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Dropout(dropout), nn.Linear(16, 1)),
        0,
    )


def loop(work: Task | None = None, settings: StageSettings = SETTINGS, **more) -> Loop:
    return Loop("net", network(more.pop("dropout", 0.0)), work or task(), settings, 0, 1, **more)


def parameters(trained: Loop) -> list[Tensor]:
    return [p.detach().clone() for p in trained.net.parameters()]


def test_a_step_is_adamw_on_the_clipped_gradient_and_the_average_follows() -> None:
    """Against the same written out in plain torch, bit for bit."""
    ours, net, work = loop(), network(), task()
    average = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    for step in range(6):
        ours.step()
        loss = work.loss(net, work.draw(generator_for(0, 1, step))).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = SETTINGS.rate(step)
        optimizer.step()
        for mean, weight in zip(average.parameters(), net.parameters(), strict=True):
            mean.data.lerp_(weight.data, 1 - SETTINGS.decay(step))
    for ours_, plain in zip(parameters(ours), net.parameters(), strict=True):
        assert torch.equal(ours_, plain)
    for ours_, plain in zip(ours.average.parameters(), average.parameters(), strict=True):
        assert torch.equal(ours_, plain)


@pytest.mark.parametrize("accumulate", [2, 3, 5, 12])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(accumulate: int) -> None:
    """5 does not divide the 12 samples: parts of 3, 3, 2, 2, 2. Sums in another order differ by
    float32 rounding, which 10 steps of AdamW at 1e-2 enlarge to below 1e-4."""
    whole, parts = loop(), loop(accumulate=accumulate)
    for _ in range(10):
        assert float(parts.step()) == pytest.approx(float(whole.step()), rel=1e-4)
    for a, b in zip(parameters(whole), parameters(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_batch_smaller_than_its_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=12 of the net cannot be shared"):
        loop(accumulate=13)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_changes_no_weight(value: float) -> None:
    trained = loop(task(poison=(2,), value=value))
    trained.step(), trained.step()
    before, moments = parameters(trained), trained.state()
    trained.step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(trained), strict=True))
    after = trained.state()
    kept = [n for n in moments if n.startswith(("first.", "second.")) or n == "updates"]
    assert len(kept) == 9
    assert all(torch.equal(moments[name], after[name]) for name in kept)
    assert trained.look().skipped == 1
    trained.step()
    assert not torch.equal(before[0], parameters(trained)[0])
    assert all(bool(p.isfinite().all()) for p in trained.average.parameters())


def test_a_finite_loss_with_an_infinite_gradient_is_skipped_too() -> None:
    work = Task(task().draw, lambda net, batch: net(batch[0]).square().sum(1).sqrt() * 1e38 * 1e-38)
    trained = loop(work)
    before = parameters(trained)

    class Cliff(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            return gradient * math.inf

    trained.task = Task(work.draw, lambda net, batch: Cliff.apply(net(batch[0])).sum(1))
    assert bool(trained.step().isfinite())
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(trained), strict=True))
    assert trained.look().skipped == 1


def test_patience_counts_updates_in_a_row() -> None:
    settings = StageSettings(steps=20, batch_size=12, non_finite_patience=3)
    trained = loop(task(poison=(1, 2, 4, 5, 7, 8, 9, 10)), settings)
    for _ in range(9):
        trained.step()
        trained.look()
    trained.step()
    with pytest.raises(NonFiniteLossError, match="3 steps in a row, the last one 9") as caught:
        trained.look()
    assert caught.value.step == 9
    trained.step()  # looked at late, it names the same step
    with pytest.raises(NonFiniteLossError, match="the last one 9"):
        trained.look()


def test_dropout_draws_from_the_step_alone_and_leaves_the_global_generator() -> None:
    whole = loop(dropout=0.5)
    for _ in range(4):
        whole.step()
    first = loop(dropout=0.5)
    first.step(), first.step()
    second = loop(dropout=0.5)
    second.load(first.state(), 2)
    torch.rand(5)
    before = torch.get_rng_state()
    second.step(), second.step()
    assert torch.equal(before, torch.get_rng_state())
    assert all(
        torch.equal(a, b) for a, b in zip(parameters(whole), parameters(second), strict=True)
    )
    without = loop()
    for _ in range(4):
        without.step()
    assert not torch.equal(parameters(whole)[0], parameters(without)[0])


def test_bf16_trains_and_the_weights_stay_float32() -> None:
    trained = loop(accelerator=make_accelerator(mixed_precision="bf16"))
    seen: list[torch.dtype] = []
    inner = trained.net[0]
    inner.register_forward_hook(lambda module, given, found: seen.append(found.dtype))
    losses = [float(trained.step()) for _ in range(20)]
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in trained.net.parameters()} == {torch.float32}
    plain = loop()  # and what this one was told does not linger
    exact = [float(plain.step()) for _ in range(20)]
    assert losses == pytest.approx(exact, rel=0.05)  # bfloat16 keeps 8 bits
    assert all(a != b for a, b in zip(losses, exact, strict=True))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "inverse_sqrt"])
def test_learning_rates(schedule: str) -> None:
    settings = StageSettings(steps=100, warmup=10, learning_rate=1.0, schedule=schedule)
    rates = [settings.rate(step) for step in range(100)]
    assert all(a < b for a, b in pairwise(rates[:11]))
    assert rates[10] == pytest.approx(1.0)
    ends = {"cosine": 0.0, "linear": 0.0, "constant": 1.0, "inverse_sqrt": math.sqrt(11 / 100)}
    assert rates[-1] == pytest.approx(ends[schedule], abs=0.02)
    middle = {"cosine": 0.5, "linear": 0.5, "constant": 1.0, "inverse_sqrt": math.sqrt(11 / 56)}
    assert rates[55] == pytest.approx(middle[schedule], abs=1e-12)


def test_decays_of_the_average() -> None:
    def decay(step: int, **settings) -> float:
        return StageSettings(steps=10, ema_decay=0.999, **settings).decay(step)

    assert [decay(n) for n in (0, 10, 10**6)] == [0.1, 0.55, 0.999]
    assert decay(0, ema_warmup="none") == 0.999
    power = {"ema_warmup": "power", "ema_power": 0.75, "ema_scale": 2.0}
    assert decay(0, **power) == 0.0
    assert decay(30, **power) == pytest.approx(1 - 16**-0.75)
    assert decay(10**9, **power) == 0.999
    # After n steps, a weight from 5 % of n steps ago counts half as much as the present one.
    assert decay(1000, ema_warmup="half_life") ** 50 == pytest.approx(0.5)
    assert decay(0, ema_warmup="half_life") == 0.0
    assert decay(10**9, ema_warmup="half_life") == 0.999
    with pytest.raises(ValueError, match="Did you mean 'half_life'"):
        StageSettings(steps=1, ema_warmup="halflife")
    with pytest.raises(ValueError, match="Did you mean 'cosine'"):
        StageSettings(steps=1, schedule="cosin")


def test_devices_precisions_and_trackers_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="'fp16' needs a GPU"):
        make_accelerator(mixed_precision="fp16")
    with pytest.raises(ValueError, match="Did you mean 'bf16'"):
        make_accelerator(mixed_precision="bf15")
    with pytest.raises(ValueError, match="use cpu or cuda"):
        make_accelerator("meta")
    with pytest.raises(ValueError, match="Did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])
    with pytest.raises(ValueError, match=r"tracker 'aim' is not installed.*pip install aim"):
        check_trackers(["aim"])
