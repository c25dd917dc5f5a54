"""Data sets: what is read, how it is scaled and split, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sde_diffusion.data import DataDescription, Scaling, data_names, load_data


def save(path: Path, array: np.ndarray, labels: np.ndarray | None = None) -> Path:
    np.save(path, array)
    if labels is not None:
        np.save(path.with_name(f"{path.stem}_labels.npy"), labels)
    return path


def image(path: Path, size: tuple[int, int] = (4, 6), mode: str = "L", seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_digits_are_scaled_split_and_named() -> None:
    data = load_data("digits")
    assert data.event_shape == (1, 8, 8)
    assert len(data.train_x) + len(data.test_x) == 1797
    assert abs(len(data.test_x) / 1797 - 0.2) < 0.01
    assert data.train_x.dtype == torch.float32
    assert data.train_x.min() == -1
    assert data.train_x.max() == 1
    assert data.num_classes == 10
    assert data.class_names == tuple("0123456789")
    assert data.scaling == Scaling(0.0, 16.0)
    raw = data.scaling.to_raw(data.train_x)
    torch.testing.assert_close(raw, raw.round(), rtol=0, atol=1e-6)


def test_digits_are_those_of_scikit_learn() -> None:
    """Read from its file, without importing it; in another order, as the split is drawn."""
    sklearn_digits = pytest.importorskip("sklearn.datasets").load_digits()
    data = load_data("digits")
    pixels = torch.cat([data.train_x, data.test_x]).flatten(1)
    labels = torch.cat([data.train_y, data.test_y])
    ours = sorted(zip(((pixels + 1) * 8).tolist(), labels.tolist(), strict=True))
    theirs = sorted(zip(sklearn_digits.data.tolist(), sklearn_digits.target.tolist(), strict=True))
    assert ours == theirs


def test_the_held_out_part_has_every_class_in_proportion() -> None:
    data = load_data("digits")
    assert data.train_y is not None
    assert data.test_y is not None
    total = data.train_y.bincount() + data.test_y.bincount()
    share = data.test_y.bincount() / total
    assert float((share - 0.2).abs().max()) <= 0.5 / float(total.min())


def test_the_split_is_fixed_by_its_seed_and_loses_nothing() -> None:
    one, two, other = load_data("digits"), load_data("digits"), load_data("digits", seed=1)
    assert torch.equal(one.train_x, two.train_x)
    assert torch.equal(one.test_x, two.test_x)
    assert not torch.equal(one.test_x, other.test_x)

    def sums(d):
        return torch.cat([d.train_x, d.test_x]).flatten(1).double().sum(0)

    torch.testing.assert_close(sums(one), sums(other))


def test_scaling_is_undone() -> None:
    scaling = Scaling(-3.0, 5.0)
    raw = torch.linspace(-3, 5, 9, dtype=torch.float64)
    x = scaling.to_model(raw)
    assert x[0] == -1
    assert x[-1] == 1
    torch.testing.assert_close(scaling.to_raw(x), raw, rtol=0, atol=1e-12)
    assert scaling.to_unit(torch.tensor([-2.0, 0.0, 2.0])).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    "shape, event",
    [((10,), ()), ((10, 3), (3,)), ((10, 4, 5), (1, 4, 5)), ((10, 3, 4, 5), (3, 4, 5))],
)
def test_an_array_of_any_shape(
    tmp_path: Path, shape: tuple[int, ...], event: tuple[int, ...]
) -> None:
    array = np.random.default_rng(0).normal(size=shape)
    data = load_data(save(tmp_path / "a.npy", array))
    assert data.event_shape == event
    assert data.train_y is None
    assert data.num_classes is None
    assert data.scaling == Scaling(float(array.min()), float(array.max()))
    assert (len(data.train_x), len(data.test_x)) == (8, 2)


def test_labels_beside_the_array_or_given(tmp_path: Path) -> None:
    array = np.arange(40, dtype=np.uint8).reshape(20, 2)
    labels = np.arange(20) % 2
    path = save(tmp_path / "a.npy", array, labels)
    beside = load_data(path)
    assert beside.scaling == Scaling(0.0, 255.0)
    assert beside.num_classes == 2
    words = load_data(path, labels=np.where(labels == 0, "cat", "ant"))
    assert words.class_names == ("ant", "cat")
    assert beside.train_y is not None
    assert words.train_y is not None
    assert beside.train_y.bincount().tolist() == words.train_y.bincount().tolist() == [8, 8]


def test_one_class_is_no_label(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", np.arange(12.0).reshape(6, 2), np.zeros(6, dtype=int))
    data = load_data(path)
    assert data.train_y is None
    assert data.class_names == ()


def test_folders_of_images(tmp_path: Path) -> None:
    for k in range(6):
        image(tmp_path / "grey" / f"{k}.png", seed=k)
        image(tmp_path / "classes" / ("b" if k % 2 else "a") / f"{k}.png", mode="RGB", seed=k)
    flat = load_data(tmp_path / "grey")
    assert flat.event_shape == (1, 6, 4)
    assert flat.train_y is None
    assert flat.scaling == Scaling(0.0, 255.0)
    classes = load_data(str(tmp_path / "classes"))
    assert classes.event_shape == (3, 6, 4)
    assert classes.class_names == ("a", "b")


def test_a_description_survives_json() -> None:
    description = load_data("digits").describe()
    assert DataDescription.from_config(description.config()) == description


def test_unknown_names_say_what_exists() -> None:
    with pytest.raises(ValueError, match="Did you mean 'digits'") as caught:
        load_data("digit")
    assert all(name in str(caught.value) for name in data_names())


@pytest.mark.parametrize(
    "array, labels, message",
    [
        (np.array([[1.0, np.nan], [0.0, 1.0]]), None, "1 NaN or infinite"),
        (np.ones((5, 2)), None, "the one value 1.0 everywhere"),
        (np.array([["a"], ["b"]]), None, "save it as numbers"),
        (np.zeros((2, 2, 2, 2, 2)), None, r"expected \(N,\), \(N, D\)"),
        (np.random.default_rng(0).normal(size=(4, 8, 8, 3)), None, r"looks like \(N, H, W, C\)"),
        (np.arange(1.0)[:, None], np.array([0]), "nothing to learn"),
        (np.arange(8.0).reshape(4, 2), np.arange(3), r"expected one per sample, \(4,\)"),
        (np.arange(8.0).reshape(4, 2), np.array([0, 1, 3, 3]), "renumber them"),
        (np.arange(8.0).reshape(4, 2), np.array([-1, 0, 1, 0]), "renumber them"),
        (np.arange(8.0).reshape(4, 2), np.array([0.5, 0, 1, 0]), "give integers"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, array, labels, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(save(tmp_path / "a.npy", array, labels))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.npy' does not exist"):
        load_data(tmp_path / "missing.npy")
    with pytest.raises(ValueError, match="does not exist"):
        load_data(tmp_path / "missing")
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(ValueError, match=r"cannot be read as a \.npy array"):
        load_data(tmp_path / "text.npy")
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="refused"):
        load_data(tmp_path / "objects.npy")
    (tmp_path / "table.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"neither a .npy file nor a .npz file nor a folder"):
        load_data(tmp_path / "table.csv")
    with pytest.raises(ValueError, match="leave labels out"):
        load_data("digits", labels=[0, 1])
    with pytest.raises(ValueError, match="test_fraction"):
        load_data("digits", test_fraction=1.0)


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no images"):
        load_data(tmp_path)
    image(tmp_path / "mixed" / "a.png")
    image(tmp_path / "mixed" / "b.png", size=(5, 6))
    with pytest.raises(ValueError, match=r"a\.png' is 4x6, .*b\.png' is 5x6"):
        load_data(tmp_path / "mixed")
    image(tmp_path / "broken" / "a.png")
    (tmp_path / "broken" / "b.png").write_bytes(b"\x89PNG no image")
    with pytest.raises(ValueError, match=r"1 of 2 images cannot be read: .*b\.png"):
        load_data(tmp_path / "broken")
    image(tmp_path / "both" / "a.png")
    image(tmp_path / "both" / "sub" / "a.png")
    with pytest.raises(ValueError, match="both images and sub-folders"):
        load_data(tmp_path / "both")
    image(tmp_path / "one" / "a.png")
    with pytest.raises(ValueError, match="at least 2"):
        load_data(tmp_path / "one")
