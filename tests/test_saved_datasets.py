"""Folders saved by Hugging Face datasets, and extras that are not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sde_diffusion.data import load_data
from sde_diffusion.samples import as_tensor
from tests.stored import bytes_array


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
