"""``sample``: a sample does not depend on its batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sde_diffusion import VPSDE, EpsModel, ScoreFn, bind, classifier_free_guided, named_target
from sde_diffusion.networks.mlp import MLP
from solvers import Ancestral, Langevin, PredictorCorrector, sample
from tests.native import NATIVE
from tests.problems import SDES

IDS = torch.tensor([31, 4, 159, 2, 653, 58, 9, 79, 32, 3, 84, 62, 6, 43, 38, 327, 95, 0, 28, 8, 41])
PARTS = ([0], list(range(1, 8)), list(range(8, 21)))  # 1 + 7 + the rest


def in_parts(run: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([run(IDS[part]) for part in PARTS])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", ["ring", "gmm16"])
@pytest.mark.parametrize("sampler", NATIVE)
def test_split_runs_are_bitwise_equal_on_exact_targets(
    sampler: str, target: str, dtype: torch.dtype
) -> None:
    mixture = named_target(target)
    for name in ("vp", "ve"):
        sde = SDES[name]
        score_fn = mixture.score_fn(sde)

        def run(
            ids: Tensor, score_fn: ScoreFn = score_fn, sde: Any = sde, denoise: bool = True
        ) -> Tensor:
            shape = (len(ids), mixture.dimension)
            return sample(
                score_fn,
                sde,
                NATIVE[sampler],
                shape=shape,
                steps=6,
                seed=5,
                sample_ids=ids,
                denoise=denoise,
                dtype=dtype,
            ).x

        whole = run(IDS)
        assert whole.dtype == dtype
        assert bool((in_parts(run) == whole).all())
        order = torch.arange(20, -1, -1)
        assert bool((run(IDS[order]) == whole[order]).all())
        # Two ids give two samples: equality above is not that of constants.
        assert len(whole[:, 0].unique()) == len(IDS)


@pytest.mark.parametrize("sampler", NATIVE)
def test_split_runs_agree_to_rounding_on_a_network(sampler: str) -> None:
    """Matrix products round differently in batches of other sizes: by 1e-16 of values near 1 in
    each of some twenty layers, carried on by 8 steps that stretch a difference by at most
    ``1/alpha`` = 150 in all: 1e-12 is expected, and 1e-10 allowed."""
    sde, net = VPSDE(), random_mlp((3,))
    score_fn = bind(EpsModel(net, sde), None)

    def run(ids: Tensor) -> Tensor:
        return sample(
            score_fn,
            sde,
            NATIVE[sampler],
            shape=(len(ids), 3),
            steps=8,
            sample_ids=ids,
            dtype=torch.float64,
        ).x

    whole = run(IDS)
    assert (in_parts(run) - whole).abs().max() < 1e-10 * whole.abs().max()


def random_mlp(event: tuple[int, ...], dtype: torch.dtype = torch.float64) -> nn.Module:
    """A small network whose every weight is random, none at its zero initialisation."""
    net = MLP(event, width=32, blocks=2).to(dtype)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for weight in net.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=dtype)
            weight.copy_(noise / math.sqrt(weight.shape[-1]))
    return net.eval()


def test_guided_batches_split_with_their_labels() -> None:
    mixture, sde = named_target("ring"), VPSDE()
    labels = IDS % 8

    def run(ids: Tensor) -> Tensor:
        guided = classifier_free_guided(mixture.model(sde), ids % 8, torch.tensor(1.5))
        return sample(guided, sde, Ancestral(), shape=(len(ids), 2), steps=40, sample_ids=ids).x

    whole = run(IDS)
    assert bool((in_parts(run) == whole).all())
    nearest = (whole[:, None].double() - mixture.means).square().sum(2).argmin(1)
    assert nearest.tolist() == labels.tolist()


def test_the_batch_norm_is_the_named_exception() -> None:
    mixture, sde = named_target("ring"), VPSDE()
    solver = PredictorCorrector(corrector=Langevin(norm="batch"))

    def run(ids: Tensor) -> Tensor:
        return sample(
            mixture.score_fn(sde), sde, solver, shape=(len(ids), 2), steps=6, sample_ids=ids
        ).x

    assert (in_parts(run) - run(IDS)).abs().max() > 1e-2


def test_default_ids_count_from_0_and_ids_may_be_a_list() -> None:
    mixture, sde = named_target("ring"), VPSDE()

    def run(**options: Any) -> Tensor:
        return sample(mixture.score_fn(sde), sde, Ancestral(), steps=5, **options).x

    whole = run(shape=(4, 2))
    assert torch.equal(whole, run(shape=(4, 2), sample_ids=[0, 1, 2, 3]))
    assert torch.equal(whole[2:3], run(shape=(1, 2), sample_ids=[2]))
