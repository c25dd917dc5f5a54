"""Networks with attention and transformers: conditions, mixed precision, compiling, positions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sde_diffusion.networks import DiT, build_network
from sde_diffusion.networks.unet import Attention
from tests.networks import randn, stirred

LARGER = {
    "attention": {"channels": [8, 16], "patch_size": 1, "attention": [8, 4], "dropout": 0.2},
    "dit": {"width": 24, "depth": 2, "heads": 3},
}


def larger(name: str, classes: int | None = 3, **settings: object) -> nn.Module:
    kind = "dit" if name == "dit" else "unet"
    return build_network(
        {"kind": kind, "event_shape": [2, 8, 8], "num_classes": classes, **LARGER[name], **settings}
    )


@pytest.mark.parametrize("name", LARGER)
def test_larger_networks_know_time_and_class_and_start_at_zero(name: str) -> None:
    net = larger(name)
    x, t, label = randn(4, 2, 8, 8), torch.linspace(0.1, 1, 4), torch.tensor([0, 1, 2, 3])
    fresh = net.eval()(x, t, label)
    assert fresh.shape == x.shape
    assert name != "dit" or bool((fresh == 0).all())
    assert torch.equal(fresh, net(x, t))  # class embeddings start at zero
    net = stirred(net)
    assert torch.equal(net(x, t), net(x, t, torch.full((4,), 3)))
    assert not torch.allclose(net(x, t)[:3], net(x, t, label)[:3], atol=1e-4)
    assert not torch.allclose(net(x, t + 0.3), net(x, t), atol=1e-4)
    single = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(single, net(x, t), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="unconditional network"):
        larger(name, None)(x, t, label)
    # Dropout acts in training alone.
    again = larger(name, dropout=0.5)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.eval()(x, t), net(x, t))
    assert not torch.equal(again.train()(x, t), net(x, t))


@pytest.mark.parametrize("name", LARGER)
def test_an_average_of_the_parameters_is_all_of_the_network(name: str) -> None:
    net = larger(name)
    assert set(net.state_dict()) == {key for key, _ in net.named_parameters()}


@pytest.mark.parametrize("name", LARGER)
def test_the_memory_format_does_not_matter(name: str) -> None:
    net = stirred(larger(name))
    x, t = randn(3, 2, 8, 8), torch.rand(3, generator=torch.Generator().manual_seed(0))
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(net(last, t), net(x, t), rtol=1e-4, atol=1e-5)
    plain = net.to(memory_format=torch.contiguous_format)(x, t)
    moved = net.to(memory_format=torch.channels_last)(last, t)
    torch.testing.assert_close(moved, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*LARGER, "mlp"])
def test_networks_train_in_mixed_precision(name: str) -> None:
    mlp = {"kind": "mlp", "event_shape": [2, 8, 8], "num_classes": 3}
    net = stirred(build_network(mlp) if name == "mlp" else larger(name, dropout=0.0))
    x, t, label = randn(3, 2, 8, 8), torch.rand(3), torch.tensor([0, 1, 3])
    gradients = []
    for enabled in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = net(x, t, label).float().square().sum()
        loss.backward()
        gradients.append(torch.cat([w.grad.flatten() for w in net.parameters()]))
    # bfloat16 keeps 8 bits: a hundred layers' roundings of 2^-9 add up to some per cent.
    assert float((gradients[1] - gradients[0]).norm()) < 0.05 * float(gradients[0].norm())


@pytest.mark.parametrize("name", LARGER)
def test_networks_compile_into_one_graph(name: str) -> None:
    net = stirred(larger(name))
    x, t, label = randn(3, 2, 8, 8), torch.rand(3), torch.tensor([0, 1, 3])
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, label), net(x, t, label))


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
def test_a_compiled_step_has_the_same_gradient(name: str) -> None:
    net = stirred(larger(name))
    x, t, label = randn(3, 2, 8, 8), torch.rand(3), torch.tensor([0, 1, 3])
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    gradients = []
    for called in (net, compiled):
        net.zero_grad()
        called(x, t, label).square().sum().backward()
        gradients.append(torch.cat([w.grad.flatten() for w in net.parameters()]))
    # Some gradients (of a key's bias) are zero but for rounding: compared over all parameters.
    assert float((gradients[1] - gradients[0]).norm()) < 1e-4 * float(gradients[0].norm())


def test_attention_is_softmax_of_scaled_products() -> None:
    attention = stirred(Attention(12, head_width=4))
    h = randn(2, 12, 3, 5)
    query, key, value = attention.inlet(attention.norm(h)).flatten(2).chunk(3, dim=1)
    heads = []
    for part in range(3):
        q, k, v = (z[:, 4 * part : 4 * part + 4] for z in (query, key, value))
        weight = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / 2, dim=2)
        heads.append(torch.einsum("bqk,bck->bcq", weight, v))
    expected = h + attention.outlet(torch.cat(heads, 1).reshape(h.shape))
    torch.testing.assert_close(attention(h), expected, rtol=1e-5, atol=1e-5)


def test_a_transformer_knows_where_its_patches_are() -> None:
    net = stirred(DiT((1, 4, 8), None, width=16, depth=1, heads=2, patch_size=2))
    t = torch.ones(1)
    x = torch.zeros(1, 1, 4, 8)
    out = net(x, t)
    # Equal patches, different places: without positions all outputs would be equal.
    patches = nn.functional.pixel_unshuffle(out, 2).flatten(2)[0].T
    assert len({tuple(round(v, 5) for v in row) for row in patches.tolist()}) == 8
    # A change of one patch reaches the others, and itself most.
    x[0, 0, :2, :2] = 1.0
    moved = (net(x, t) - out).abs().detach()
    assert float(moved.flatten().min()) > 0
    assert float(moved[0, 0, :2, :2].mean()) > float(moved.mean())
