"""Networks: shapes, conditions, configurations, and independence of the batch."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from torch import Tensor, nn

from sde_diffusion import VESDE, VPSDE, EpsModel, bind
from sde_diffusion.loop import seeded
from sde_diffusion.networks import (
    MLP,
    ClassifierNet,
    JudgeNet,
    NoisedClassifier,
    RandomFeatures,
    UNet,
    build_network,
    default_score_config,
    sized_score_config,
)
from sde_diffusion.networks.sizes import SIZES, parameters_of
from tests.networks import randn, stirred

SHAPES = [(), (3,), (1, 3, 3), (1, 8, 8), (3, 8, 12), (1, 5, 7), (1, 28, 28)]


@pytest.mark.parametrize("event", SHAPES, ids=str)
@pytest.mark.parametrize("classes", [None, 4])
def test_the_default_network_of_any_event(event: tuple[int, ...], classes: int | None) -> None:
    net = stirred(build_network(default_score_config(event, classes)))
    assert isinstance(net, UNet if len(event) == 3 and min(event[1:]) >= 4 else MLP)
    assert net.null_label == net.num_classes == classes
    x, t = randn(5, *event), torch.linspace(0.1, 1, 5)
    if classes is None:
        out = net(x, t)
        with pytest.raises(ValueError, match="unconditional network"):
            net(x, t, torch.zeros(5, dtype=torch.long))
    else:
        label = torch.tensor([0, 1, 2, 3, 4])
        out = net(x, t, label)
        null = net(x, t, torch.full((5,), classes))
        assert torch.equal(net(x, t), null)
        assert not torch.allclose(out[:4], null[:4], atol=1e-4)
        torch.testing.assert_close(out[4], null[4])
    assert out.shape == x.shape
    assert not torch.allclose(net(x, t + 0.3), net(x, t), atol=1e-4)
    # One by one as in the batch: no normalisation over it.
    single = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(single, net(x, t), rtol=1e-4, atol=1e-5)


def test_an_untrained_network_ignores_its_label() -> None:
    net = build_network(default_score_config((1, 8, 8), 10))
    x, t = randn(3, 1, 8, 8), torch.rand(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(net(x, t, torch.tensor([1, 2, 3])), net(x, t))


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "mlp", "event_shape": [3], "num_classes": None, "width": 16, "blocks": 2},
        {
            "kind": "unet",
            "event_shape": [1, 8, 8],
            "num_classes": 10,
            "channels": [8, 12],
            "blocks": 2,
            "patch_size": 2,
            "embedding": 16,
        },
        {
            "kind": "unet",
            "event_shape": [1, 8, 8],
            "num_classes": None,
            "channels": [8, 12],
            "blocks": 1,
            "patch_size": 1,
            "embedding": 16,
            "attention": [4],
            "dropout": 0.1,
            "time_embedding": False,
        },
        {
            "kind": "dit",
            "event_shape": [3, 8, 12],
            "num_classes": 4,
            "width": 24,
            "depth": 2,
            "heads": 3,
            "patch_size": 4,
            "mlp_ratio": 2.0,
            "dropout": 0.1,
        },
        {"kind": "classifier", "event_shape": [1, 8, 8], "num_classes": 3, "width": 8},
        {"kind": "judge", "event_shape": [5], "num_classes": 3, "width": 8, "size": 9},
        {"kind": "random_features", "event_shape": [4], "components": 3, "size": 9},
    ],
    ids=lambda config: config["kind"],
)
def test_a_configuration_comes_back(config: dict) -> None:
    net = build_network(config)
    assert net.config() == config
    again = build_network(json.loads(json.dumps(net.config())))
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in net.state_dict().items()
    }


@pytest.mark.parametrize(
    "blocks, channels, patch", [(2, (8, 12), 2), (1, (8,), 1), (1, (4, 6, 8), 1)]
)
def test_unets_of_other_settings(blocks: int, channels: tuple[int, ...], patch: int) -> None:
    net = stirred(UNet((2, 8, 16), None, channels=channels, blocks=blocks, patch_size=patch))
    assert net(randn(2, 2, 8, 16), torch.rand(2)).shape == (2, 2, 8, 16)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"kind": "unett", "event_shape": [1, 8, 8]}, "Did you mean 'unet'"),
        ({"event_shape": [3]}, "network kind"),
        ({"kind": "mlp", "event_shape": [3], "depth": 2}, "depth"),
        ({"kind": "mlp", "event_shape": [3], "width": 0}, "width must be a positive integer"),
        ({"kind": "unet", "event_shape": [3]}, "use kind 'mlp'"),
        ({"kind": "unet", "event_shape": [1, 6, 8], "channels": [4, 4]}, "multiples of it"),
        ({"kind": "unet", "event_shape": [1, 8, 8], "channels": []}, "at least one level"),
        ({"kind": "judge", "event_shape": [3], "num_classes": None}, "num_classes"),
        (
            {"kind": "unet", "event_shape": [1, 8, 8], "attention": [16]},
            "height 16, and the feature maps have heights 4, 2",
        ),
        ({"kind": "unet", "event_shape": [1, 8, 8], "dropout": 1.0}, r"dropout must lie in \[0, 1"),
        ({"kind": "dit", "event_shape": [1, 9, 8]}, "multiples of it"),
        ({"kind": "dit", "event_shape": [1, 8, 8], "width": 20, "heads": 3}, "multiple of 4 and"),
        ({"kind": "dit", "event_shape": [1, 8, 8], "mlp_ratio": 0}, "mlp_ratio must be above 0"),
    ],
)
def test_configurations_that_do_not_fit(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(config)


@pytest.mark.parametrize("event", [(3,), (1, 8, 8), (3, 7, 5), (1, 64, 48)], ids=str)
def test_classifiers_of_any_event(event: tuple[int, ...]) -> None:
    net = ClassifierNet(event, 4).eval()
    classifier = NoisedClassifier(net)
    x = randn(3, *event)
    for sde in (VPSDE(), VESDE()):
        for t in (torch.tensor(0.5), torch.tensor([0.1, 0.5, 1.0])):
            logits = classifier(x, sde.at(t))
            assert logits.shape == (3, 4)
            assert logits.dtype == x.dtype
    judge = JudgeNet(event, 4, size=12).eval()
    assert judge(x).shape == (3, 4)
    assert judge.features(x).shape == (3, 12)


def test_the_noised_classifier_sees_inputs_of_unit_scale() -> None:
    seen: list[Tensor] = []
    net = ClassifierNet((3,), 2)
    net.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    sde = VESDE()
    noise = randn(4096, 3)
    NoisedClassifier(net)(50.0 * noise, sde.at(torch.tensor(1.0)))
    # 12288 standard normals: the standard error of their deviation is 0.0064.
    assert abs(float(seen[0].std()) - 1) < 0.03


def test_random_features_are_whitened_and_fixed_by_their_seed() -> None:
    x = randn(500, 2, 3) * torch.tensor([1.0, 5.0, 0.1])
    maps = [
        RandomFeatures((2, 3), components=4).fit(x, torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    assert torch.equal(maps[0].features(x), maps[1].features(x))
    assert maps[0].features(x).shape == (500, 48)
    z = (x.flatten(1) - maps[0].centre) @ maps[0].projection
    torch.testing.assert_close(torch.cov(z.T, correction=0), torch.eye(4), rtol=0, atol=1e-4)


def test_networks_serve_a_model_and_a_classifier_gradient() -> None:
    sde = VPSDE()
    net = stirred(build_network(default_score_config((1, 8, 8), 10)))
    score_fn = bind(EpsModel(net, sde), torch.tensor([1, 2]))
    x, level = randn(2, 1, 8, 8), sde.at(torch.tensor(0.5))
    assert score_fn(x, level).x0.shape == x.shape
    classifier = NoisedClassifier(ClassifierNet((1, 8, 8), 10))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(classifier(x, level).log_softmax(1)[:, 0].sum(), x)
    assert gradient.shape == x.shape
    assert bool(gradient.isfinite().all())


def test_initial_weights_come_from_their_keys_alone() -> None:
    def make() -> nn.Module:
        return MLP((3,), 2, width=8, blocks=1)

    before = torch.get_rng_state()
    one, two, other = seeded(make, 0, 1), seeded(make, 0, 1), seeded(make, 0, 2)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.inlet.weight, two.inlet.weight)
    assert not torch.equal(one.inlet.weight, other.inlet.weight)


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("kind", ["unet", "mlp"])
def test_networks_that_are_blind_to_time(kind: str, classes: int | None) -> None:
    net = stirred(
        build_network(
            {
                "kind": kind,
                "event_shape": [1, 8, 8],
                "num_classes": classes,
                "time_embedding": False,
            }
        )
    )
    x = randn(3, 1, 8, 8)
    out = net(x, torch.zeros(3))
    assert torch.equal(out, net(x, torch.tensor([0.1, 5.0, 700.0])))
    assert not any("first" in key and key.startswith("condition") for key in net.state_dict())
    if classes is None:
        assert not any("film" in key for key in net.state_dict())
    else:
        label = torch.tensor([0, 1, 2])
        assert not torch.allclose(net(x, torch.zeros(3), label), out, atol=1e-4)


def test_earlier_configurations_make_the_same_network() -> None:
    """Digests of names, and of initial weights by their key, taken before attention, dropout and
    blindness to time were added: the shipped networks must be built, and trained, as they were."""
    expected = {
        (1, 8, 8): "1105a44737941d09",
        (3, 32, 32): "3ad5da624e38c68a",
        (2,): "aa6c02ed8f301600",
    }
    for event, start in expected.items():
        net = seeded(lambda event=event: build_network(default_score_config(event, 10)), 0, 1)
        digest = hashlib.sha256()
        for name, weight in net.state_dict().items():
            digest.update(name.encode())
            digest.update(weight.contiguous().numpy().tobytes())
        assert digest.hexdigest().startswith(start)


@pytest.mark.parametrize("kind", ["unet", "dit"])
@pytest.mark.parametrize("event", [(1, 28, 28), (3, 64, 64)], ids=str)
def test_networks_of_a_number_of_parameters(kind: str, event: tuple[int, ...]) -> None:
    for size in (*SIZES, 5e6):
        config = sized_score_config(event, 10, size, kind=kind)
        wanted = SIZES[size] if isinstance(size, str) else size
        # Widths go in steps: of 4 channels at 16 for the smallest, a quarter of its parameters.
        assert abs(parameters_of(config) / wanted - 1) < (0.25 if wanted < 1e6 else 0.12)
    net = stirred(build_network(sized_score_config(event, 10, "tiny", kind=kind)))
    assert sum(w.numel() for w in net.parameters()) == parameters_of(net.config())
    assert net(randn(2, *event), torch.rand(2)).shape == (2, *event)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="Did you mean 'small'"):
        sized_score_config((1, 8, 8), None, "smal")
    with pytest.raises(ValueError, match="size must be one of"):
        sized_score_config((1, 8, 8), None, 1000)
    with pytest.raises(ValueError, match="kind of a sized score network"):
        sized_score_config((1, 8, 8), None, kind="mlp")
    with pytest.raises(ValueError, match="must be an image"):
        sized_score_config((3,), None)
    patched = sized_score_config((1, 28, 28), None, "tiny", patch_size=2)
    assert patched["patch_size"] == 2
    assert patched["attention"] == [7]
