"""Batches prepared (dequantised, mirrored, rescaled) and the descriptions that bring them back."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sde_diffusion.data import DataDescription, Dataset, Preparation, Scaling, load_data
from sde_diffusion.samples import as_tensor
from tests.stored import bytes_array, generator
from tests.test_data import image, save


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
