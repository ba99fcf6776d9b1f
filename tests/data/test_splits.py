"""capszoo.data.splits: stratified validation images, statistics, and what is said of classes that are missing."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capszoo.data import Loader, load_data, splits
from capszoo.data.splits import stratified


@pytest.mark.parametrize("val_fraction", [0.1, 0.25])
def test_validation_split_is_stratified_disjoint_and_decided_by_seed(rows, val_fraction):
    whole = load_data("digits", val_fraction=0)
    data = load_data("digits", val_fraction=val_fraction)
    assert len(data.val) == round(1437 * val_fraction) and len(data.train) + len(data.val) == 1437
    share = data.val.labels.bincount() / whole.train.labels.bincount()
    assert (share - val_fraction).abs().max() < 0.01
    assert rows(data.train) | rows(data.val) == rows(whole.train)
    assert not rows(data.train) & rows(data.val)
    assert not rows(data.test) & (rows(data.train) | rows(data.val))
    assert torch.equal(data.test.images, whole.test.images)

    again = load_data("digits", val_fraction=val_fraction)
    other = load_data("digits", val_fraction=val_fraction, seed=1)
    assert torch.equal(again.val.images, data.val.images) and torch.equal(again.train.images, data.train.images)
    assert rows(other.val) != rows(data.val)
    assert torch.equal(other.test.images, data.test.images)


@settings(deadline=None, max_examples=60)
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=80), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 9)
)
def test_stratified(labels, fraction, seed):
    labels = torch.tensor(labels)
    count = max(1, round(len(labels) * fraction))
    chosen = stratified(labels, count, seed)
    assert len(chosen.unique()) == len(chosen) == min(count, len(labels) - len(labels.unique()))
    present, taken = labels.bincount(minlength=6), labels[chosen].bincount(minlength=6)
    assert (taken[present > 0] < present[present > 0]).all()
    exact = present * count / len(labels)
    assert ((taken >= exact.floor()) | (taken == present - 1))[present > 0].all()


def test_global_random_state_is_left_alone(write_folder, tmp_path):
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    load_data("digits")
    load_data(write_folder(tmp_path))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_small_validation_split_has_an_image(write_folder, tmp_path):
    data = load_data(write_folder(tmp_path, count=2))
    assert len(data.val) == 1 and len(data.train) == 3


@settings(deadline=None, max_examples=100)
@given(data=st.data(), classes=st.integers(1, 6), images=st.integers(2, 60), fraction=st.floats(0.02, 0.98))
def test_stratified_by_several_classes(data, classes, images, fraction):
    row = st.lists(st.booleans(), min_size=classes, max_size=classes)
    labels = torch.tensor(data.draw(st.lists(row, min_size=images, max_size=images))).float()
    count = max(1, round(images * fraction))
    chosen = stratified(labels, count, seed=3)
    assert torch.equal(chosen, stratified(labels, count, seed=3))
    assert len(chosen.unique()) == len(chosen) <= count
    present, taken = labels.sum(dim=0), labels[chosen].sum(dim=0)
    assert (taken[present > 0] < present[present > 0]).all(), "each class is left to train on"
    if len(chosen) < count:  # each image that is left is the last of a class, or the last of none
        left = torch.ones(images, dtype=torch.bool)
        left[chosen] = False
        rest = torch.cat([labels, (labels == 0).all(dim=1, keepdim=True)], dim=1)[left]
        assert ((rest.sum(dim=0) == 1) & (rest > 0)).any(dim=1).all()


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_each_of_several_classes_is_in_proportion(fraction):
    generator = torch.Generator().manual_seed(0)
    rates = torch.tensor([0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.3])
    labels = (torch.rand(1000, 7, generator=generator) < rates).float()
    labels[:, 6] *= labels[:, 1]  # not independent
    count = round(1000 * fraction)
    chosen = stratified(labels, count, seed=0)
    assert len(chosen) == count
    assert (labels[chosen].sum(dim=0) - labels.sum(dim=0) * fraction).abs().max() <= 1
    assert not torch.equal(chosen, stratified(labels, count, seed=1))
    one_class = torch.eye(5)[torch.arange(100) % 5]
    assert labels.sum() and one_class[stratified(one_class, 10, 0)].sum(dim=0).tolist() == [2] * 5


def test_no_image_to_spare_for_validation(raises, write_folder, tmp_path):
    root = write_folder(tmp_path, count=1)
    with raises("no training image to spare", "val_fraction 0"):
        load_data(root)
    assert len(load_data(root, val_fraction=0).train) == 2


def test_warning_of_classes_without_validation_images(write_folder, tmp_path, caplog):
    write_folder(tmp_path, classes=[f"class{i}" for i in range(12)], count=3)
    for i in range(3, 60):
        (tmp_path / "train/class5" / f"{i}.png").write_bytes((tmp_path / "train/class5/0.png").read_bytes())
    data = load_data(tmp_path, val_fraction=0.1)
    missing = [name for i, name in enumerate(data.class_names) if not (data.val.labels == i).any()]
    assert 5 < len(missing) < 12 and "class5" not in missing
    (record,) = caplog.records
    named = ", ".join(map(repr, missing[:10])) + (", ..." if len(missing) > 10 else "")
    assert record.levelname == "WARNING" and record.getMessage() == (
        f"the validation split of data set {str(tmp_path)!r} has no image of {len(missing)} of 12 classes ({named}): "
        "give a larger --val-fraction, or a val folder that has them"
    )
    caplog.clear()
    load_data(tmp_path, val_fraction=0)
    load_data(tmp_path, val_fraction=0.4)
    load_data("digits")
    assert not caplog.records


def test_warning_of_classes_that_the_val_folder_lacks(write_folder, tmp_path, caplog):
    write_folder(tmp_path, ("train", "test"))
    write_folder(tmp_path, ("val",), ("cat",))
    load_data(tmp_path)
    (record,) = caplog.records
    assert "has no image of 1 of 2 classes ('dog'): add images of them to the val folder" in record.getMessage()


def test_warning_of_several_classes(write_tables, tmp_path, caplog):
    write_tables(tmp_path, count=33)
    text = (tmp_path / "train/labels.csv").read_text().splitlines()
    text[1:] = [line.rpartition(",")[0] + ",0" for line in text[1:]]
    text[5] = text[5][:-1] + "1"
    (tmp_path / "train/labels.csv").write_text("\n".join(text))
    load_data(tmp_path)
    (record,) = caplog.records
    assert "has no image of 1 of 3 classes ('bird'): give a larger --val-fraction" in record.getMessage()


@pytest.mark.parametrize("max_bytes", [4 << 30, 0])
def test_statistics_are_those_of_the_training_images(write_folder, tmp_path, max_bytes, monkeypatch):
    monkeypatch.setattr(splits, "_IMAGES_AT_ONCE", 2)
    data = load_data(write_folder(tmp_path), val_fraction=0.25, max_bytes=max_bytes)
    assert (data.train.images is None) == (max_bytes == 0)
    pixels = torch.cat([images for images, _ in Loader(data.train, 4, "cpu")]).double()
    mean, std = data.statistics()
    torch.testing.assert_close(torch.tensor(mean).double(), pixels.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(std).double(), pixels.std((0, 2, 3), correction=0), rtol=1e-5, atol=1e-6)
    data.normalize(mean, std)
    for split in (data.train, data.val, data.test):
        assert (split.mean, split.std) == (mean, std) == (split.to("cpu").mean, split.to("cpu").std)
    pixels = torch.cat([images for images, _ in Loader(data.train, 4, "cpu")])
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(pixels.std((0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-5)


def test_a_channel_of_one_value_is_only_shifted(write_folder, tmp_path):
    data = load_data(write_folder(tmp_path))
    data.train.images[:, 1] = 51
    mean, std = data.statistics()
    assert mean[1] == pytest.approx(0.2) and std[1] == 1.0


@pytest.mark.parametrize(
    ("mean", "std", "parts"),
    [
        ((0.5, 0.5), (1.0,), ("mean has 2 numbers", "give 1 or 3")),
        ((0.5,), (1.0, 1.0, 0.0), ("std=1.0 1.0 0.0 is out of range", "above 0")),
        ((float("nan"),), (1.0,), ("mean=nan is out of range",)),
    ],
)
def test_normalisations_that_are_not_possible(raises, write_folder, tmp_path, mean, std, parts):
    data = load_data(write_folder(tmp_path))
    with raises(*parts):
        data.normalize(mean, std)
    assert data.train.mean == (0.0,)
