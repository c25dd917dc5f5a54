"""Pretrained diffusers folders: the same network, the same table, the same samples as diffusers'
own loop.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sde_diffusion import VESDE, TabulatedVPSDE, bind, classifier_free_guided
from sde_diffusion.diffusers_model import from_diffusers
from sde_diffusion.storage import CheckpointError
from solvers import DDIM, Ancestral, ProbabilityFlow, RecordedNoise, sample

diffusers = pytest.importorskip("diffusers")

STEPS = 20


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet(**settings: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            **{"out_channels": 1, **settings},
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
        ).eval()


def folder(path: Path, scheduler: Any, **settings: Any) -> Any:
    net = unet(**settings)
    net.save_pretrained(path / "unet")
    scheduler.save_pretrained(path / "scheduler")
    return net


def ddpm(prediction: str = "epsilon", **settings: Any) -> Any:
    return diffusers.DDPMScheduler(
        num_train_timesteps=STEPS,
        beta_start=1e-3,
        beta_end=0.3,
        prediction_type=prediction,
        clip_sample=False,
        **settings,
    )


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ancestral_sampling_is_that_of_diffusers(
    tmp_path: Path, prediction: str, variance: str
) -> None:
    scheduler = ddpm(prediction, variance_type=f"fixed_{variance}")
    net = folder(tmp_path, scheduler)
    start, seed = randn(3, 1, 8, 8), 5
    x = start
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t).sample, t, x, generator=generator).prev_sample
    # The same draws, in the same order; none at the last step.
    again = torch.Generator().manual_seed(seed)
    draws = [torch.randn(start.shape, generator=again) for _ in range(STEPS - 1)]
    read = from_diffusers(tmp_path)
    assert isinstance(read.sde, TabulatedVPSDE)
    assert (read.event_shape, read.num_classes) == ((1, 8, 8), None)
    found = sample(
        bind(read.model, None),
        read.sde,
        Ancestral(variance=variance),
        x=start,
        steps=STEPS - 1,
        noise=RecordedNoise(draws),
        denoise=True,
    )
    assert found.nfe == STEPS
    # 20 steps in float32 on both sides, diffusers' table in float32 too: sqrt of products of 20
    # numbers, each rounded at 6e-8.
    scale = float(x.abs().max())
    assert float((found.x - x).abs().max()) < 2e-5 * scale


def test_the_labels_are_the_integers_of_training(tmp_path: Path) -> None:
    folder(tmp_path, ddpm(beta_schedule="squaredcos_cap_v2"))
    read = from_diffusers(tmp_path)
    seen: list[Tensor] = []
    read.model.net.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    for i in range(STEPS):
        read.model(randn(2, 1, 8, 8), read.sde.at(torch.tensor((i + 1) / STEPS)))
    assert torch.equal(torch.stack(seen), torch.arange(STEPS)[:, None].expand(-1, 2))
    products = ddpm(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    alphas = torch.stack([read.sde.at(t).alpha for t in read.sde.times])
    torch.testing.assert_close(alphas**2, products.double(), rtol=1e-5, atol=1e-7)


def test_other_solvers_take_it(tmp_path: Path) -> None:
    folder(tmp_path, ddpm())
    read = from_diffusers(tmp_path)
    score_fn = bind(read.model, None)
    shape = (2, *(read.event_shape or ()))
    for solver in (DDIM(), ProbabilityFlow("heun")):
        x = sample(score_fn, read.sde, solver, shape=shape, steps=5).x
        assert x.shape == shape
        assert bool(x.isfinite().all())


def test_ncsnpp_gives_the_score_at_its_noise_level(tmp_path: Path) -> None:
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_min=0.02, sigma_max=20.0)
    net = folder(tmp_path, scheduler, time_embedding_type="fourier")
    read = from_diffusers(tmp_path)
    assert isinstance(read.sde, VESDE)
    assert (read.sde.sigma_min, read.sde.sigma_max, read.sde.t_min) == (0.02, 20.0, 1e-5)
    x = 3 * randn(2, 1, 8, 8)
    for sigma in (0.05, 7.0):
        level = read.sde.at(read.sde.time(-torch.tensor(sigma, dtype=torch.float64).log()).float())
        with torch.no_grad():
            score = net(x, torch.full((2,), sigma)).sample
            found = read.model(x, level).score
        torch.testing.assert_close(found, score, rtol=1e-4, atol=1e-4 * float(score.abs().max()))


def test_reverse_diffusion_is_that_of_score_sde(tmp_path: Path) -> None:
    """diffusers' step on its own discrete sigmas is ancestral sampling's mean and large variance
    (SMLD's twin): x + (s^2 - u^2) score + sqrt(s^2 - u^2) z, from sigma s to u."""
    scheduler = diffusers.ScoreSdeVeScheduler(
        num_train_timesteps=STEPS, sigma_min=0.05, sigma_max=5.0, sampling_eps=1e-5
    )
    net = folder(tmp_path, scheduler, time_embedding_type="fourier")
    read = from_diffusers(tmp_path)
    scheduler.set_timesteps(STEPS)
    scheduler.set_sigmas(STEPS)
    sigmas = scheduler.discrete_sigmas.double().flip(0)
    x = start = 5 * randn(2, 1, 8, 8)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        # Not the step to sigma_min, which lies at t = 0, where no grid here ends.
        for sigma, t in list(zip(sigmas, scheduler.timesteps, strict=True))[:-2]:
            score = net(x, sigma.float().expand(2)).sample
            x = scheduler.step_pred(score, t, x, generator=generator).prev_sample
    again = torch.Generator().manual_seed(3)
    draws = [torch.randn(start.shape, generator=again) for _ in range(STEPS - 1)]
    grid = read.sde.time(-sigmas[:-1].log())
    found = sample(
        bind(read.model, None),
        read.sde,
        Ancestral(variance="large"),
        x=start,
        grid=grid,
        noise=RecordedNoise(draws),
    )
    assert float((found.x - x).abs().max()) < 1e-4 * float(x.abs().max())


def test_classes_and_their_null_label(tmp_path: Path) -> None:
    net = folder(tmp_path, ddpm(), num_class_embeds=4)
    read = from_diffusers(tmp_path, null_label=3)
    assert read.num_classes == 3
    x, level = randn(2, 1, 8, 8), read.sde.at(torch.tensor(0.5))
    label = torch.tensor([0, 2])
    with torch.no_grad():
        ours = (read.model(x, level, label).eps, read.model(x, level).eps)
        for own, given in zip(ours, (label, torch.tensor([3, 3])), strict=True):
            theirs = net(x, torch.tensor([9, 9]), class_labels=given).sample
            torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-6)
    guided = classifier_free_guided(read.model, label, scale=2.0)
    assert guided(x, level).eps.shape == x.shape
    with pytest.raises(ValueError, match=r"label must lie in 0\.\.2"):
        bind(read.model, 3)
    with pytest.raises(ValueError, match="null_label=4 is no class"):
        from_diffusers(tmp_path, null_label=4)


def test_learned_variances_are_left_aside(tmp_path: Path) -> None:
    net = folder(tmp_path, ddpm(), out_channels=2)
    read = from_diffusers(tmp_path)
    x = randn(2, 1, 8, 8)
    with torch.no_grad():
        found = read.model(x, read.sde.at(torch.tensor(0.5))).eps
        torch.testing.assert_close(found, net(x, 9).sample[:, :1], rtol=1e-5, atol=1e-6)


def test_a_folder_of_the_network_alone(tmp_path: Path) -> None:
    net = unet()
    net.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no scheduler_config\.json.*give the pipeline's folder"):
        from_diffusers(tmp_path)
    given = from_diffusers(tmp_path, scheduler=dict(ddpm().config))
    ddpm().save_pretrained(tmp_path)
    found = from_diffusers(tmp_path)
    assert found.sde == given.sde
    x, level = randn(1, 1, 8, 8), found.sde.at(torch.tensor(0.5))
    assert torch.equal(found.model(x, level).eps, given.model(x, level).eps)
    before = torch.get_rng_state()
    from_diffusers(tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a diffusers folder"):
        from_diffusers(tmp_path / "none")
    folder(tmp_path / "a", ddpm())
    weights = next((tmp_path / "a" / "unet").glob("*.safetensors"))

    def changed(name: str, part: str, **values: Any) -> Path:
        copy = tmp_path / name
        shutil.copytree(tmp_path / "a", copy)
        file = next((copy / part).glob("*config.json"))
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
        return copy

    pickled = changed("pickled", "unet")
    (pickled / "unet" / weights.name).rename(pickled / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.bin' only, a pickled file, which can run"):
        from_diffusers(pickled)
    (pickled / "unet" / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        from_diffusers(pickled)
    with pytest.raises(CheckpointError, match="holds a UNet2DConditionModel"):
        from_diffusers(changed("text", "unet", _class_name="UNet2DConditionModel"))
    with pytest.raises(CheckpointError, match=r"is missing|cannot be loaded"):
        from_diffusers(changed("deeper", "unet", layers_per_block=2))
    with pytest.raises(ValueError, match="unknown prediction_type 'flow'"):
        from_diffusers(changed("flow", "scheduler", prediction_type="flow"))
    with pytest.raises(ValueError, match="ends at pure noise"):
        from_diffusers(changed("zero", "scheduler", rescale_betas_zero_snr=True))
    with pytest.raises(ValueError, match="has no table of betas"):
        from_diffusers(changed("odd", "scheduler", beta_schedule="odd"))
    (tmp_path / "a" / "unet" / weights.name).write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        from_diffusers(tmp_path / "a")


def test_without_diffusers_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path, ddpm())
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"sde-diffusion\[diffusers\]"):
        from_diffusers(tmp_path)
