import hashlib
import os
import pickle
import random
import struct
import sys

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from capszoo.data import Loader, list_datasets, load_data
from capszoo.data.splits import stratified
from capszoo.errors import DataError


def raises(*parts):
    """Expect a DataError of one line that holds all `parts`, in this order."""
    return pytest.raises(DataError, match="^" + "[^\n]*".join(["", *map(_escape, parts), ""]) + "$")


def _escape(part):
    return "".join("\\" + c if c in r"\.()[]{}*+?^$|" else c for c in str(part))


def write_mnist(root, folder="MNIST", train=40, test=20):
    """Write a tiny set in MNIST's format whose images all differ."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, count, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels.tobytes())
    return root


def write_folder(root, parts=("train", "test"), classes=("cat", "dog"), count=6, size=(8, 10), mode="RGB"):
    """Write an image folder whose images all differ; `size` is height and width."""
    rng = np.random.default_rng(0)
    for part in parts:
        for label in classes:
            (root / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(root / part / label / f"{i}.png")
    return root


def rows(split):
    """Return the images of a split as a set of bytes."""
    return {image.numpy().tobytes() for image in split.images}


def write_tables(root, parts=("train", "test"), classes=("cat", "dog", "bird"), count=9, size=(8, 10)):
    """Write a folder whose images show several classes: image i those whose bits i has, the last in a folder below."""
    rng = np.random.default_rng(0)
    for part in parts:
        (root / part / "more").mkdir(parents=True)
        lines = [",".join(["file", *classes])]
        for i in range(count):
            name = f"{i}.png" if i < count - 1 else "more/last.png"
            Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(root / part / name)
            lines.append(",".join([name, *(str(i >> j & 1) for j in range(len(classes)))]))
        (root / part / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


# Splits.


def test_digits():
    data = load_data("digits", val_fraction=0)
    assert (len(data.train), data.val, len(data.test)) == (1437, None, 360)
    assert data.num_classes == 10 and data.class_names == list("0123456789")
    assert (data.in_chans, data.img_size) == (1, (28, 28))
    assert data.train.images.shape == (1437, 1, 28, 28) and data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert data.train.images.min() == 0 and data.train.images.max() == 255
    border = data.train.images.clone()
    border[:, :, 4:24, 4:24] = 0
    assert border.max() == 0
    counts = torch.stack([data.train.labels.bincount(), data.test.labels.bincount()]).double()
    assert (counts[1] / counts.sum(0) - 360 / 1797).abs().max() < 0.005
    images, _ = next(iter(Loader(data.train, 1437, "cpu")))
    assert images.min() == 0 and images.max() == 1


def test_digits_are_the_right_way_up_and_match_their_labels():
    from sklearn.datasets import load_digits

    small = torch.from_numpy(load_digits().images).float() / 16
    data = load_data("digits", val_fraction=0)
    for split in (data.train, data.test):
        shrunk = torch.nn.functional.interpolate(split.images[:, :, 4:24, 4:24].float() / 255, (8, 8), mode="area")
        nearest = torch.cdist(shrunk.flatten(1), small.flatten(1)).argmin(1)
        assert torch.equal(torch.from_numpy(load_digits().target)[nearest], split.labels)


@pytest.mark.parametrize("val_fraction", [0.1, 0.25])
def test_validation_split_is_stratified_disjoint_and_decided_by_seed(val_fraction):
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


def test_global_random_state_is_left_alone(tmp_path):
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    load_data("digits")
    load_data(write_folder(tmp_path))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_small_validation_split_has_an_image(tmp_path):
    data = load_data(write_folder(tmp_path, count=2))
    assert len(data.val) == 1 and len(data.train) == 3


# MNIST and its like.


def test_mnist_format(tmp_path):
    data = load_data("mnist", write_mnist(tmp_path), val_fraction=0.25)
    assert (len(data.train), len(data.val), len(data.test)) == (30, 10, 20)
    assert data.val.labels.bincount().tolist() == [1] * 10
    assert data.test.images.shape == (20, 1, 28, 28)
    reference = torchvision.datasets.MNIST(tmp_path, train=False)
    assert torch.equal(data.test.images[:, 0], reference.data) and torch.equal(data.test.labels, reference.targets)
    assert load_data("fashion_mnist", write_mnist(tmp_path, "FashionMNIST")).class_names[0] == "T-shirt/top"


def test_through_timm_equals_by_name(tmp_path):
    write_mnist(tmp_path)
    one, other = load_data("mnist", tmp_path), load_data("torch/mnist", tmp_path)
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(one, part).images, getattr(other, part).images)
        assert torch.equal(getattr(one, part).labels, getattr(other, part).labels)
    assert one.class_names == other.class_names and one.img_size == other.img_size


def test_colour_and_size_of_grey_images(tmp_path):
    write_mnist(tmp_path)
    grey = load_data("mnist", tmp_path)
    colour = load_data("mnist", tmp_path, in_chans=3)
    assert colour.in_chans == 3 and torch.equal(colour.train.images, grey.train.images.expand(-1, 3, -1, -1))
    small = load_data("mnist", tmp_path, img_size=np.int64(7))
    assert small.img_size == (7, 7)
    assert grey.train.images.float().std() > 70 and small.train.images.float().std() < 20  # antialiased: noise averages
    wide = load_data("mnist", tmp_path, img_size=(28, 40))
    assert wide.test.images.shape == (20, 1, 28, 40)


def write_cifar(root, monkeypatch):
    """Write CIFAR-10's files with 10 images each, and the checksums that torchvision asks for."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(name):
        data = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
        return [name, write(name, {"data": data, "labels": list(range(10))})]

    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(cifar, "test_list", [batch("test_batch")])
    names = [f"class {i}" for i in range(10)]
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": write("batches.meta", {"label_names": names})})
    return root


def test_cifar10_format(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    data = load_data("cifar10", tmp_path, val_fraction=0.2)
    assert (len(data.train), len(data.val), len(data.test)) == (40, 10, 10)
    assert (data.in_chans, data.img_size, data.class_names[3]) == (3, (32, 32), "class 3")
    reference = torchvision.datasets.CIFAR10(tmp_path, train=False)
    image, label = reference[4]
    assert np.array_equal(data.test.images[4].permute(1, 2, 0), np.asarray(image)) and data.test.labels[4] == label
    grey = load_data("cifar10", tmp_path, in_chans=1).test.images[4, 0].int()
    assert (grey - torch.from_numpy(np.array(image.convert("L"))).int()).abs().max() <= 1
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"junk")
    with raises("'cifar10'", tmp_path, "damaged", "delete"):
        load_data("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
@pytest.mark.parametrize("exists", [True, False])
def test_missing_data(name, exists, tmp_path):
    root = tmp_path if exists else tmp_path / "nowhere"
    with raises(f"data set '{name}' not found in '{root}'", "looked for", root, "--data-dir", "--download"):
        load_data(name, root)


def test_default_folder_is_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with raises("'mnist' not found in 'data'", "MNIST/raw/train-images-idx3-ubyte"):
        load_data("mnist")
    write_mnist(tmp_path / "data")
    assert len(load_data("mnist").test) == 20


def test_missing_file_is_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    with raises("looked for", "t10k-labels-idx1-ubyte"):
        load_data("mnist", tmp_path)


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize("damage", ["empty", "header", "truncated", "junk", "huge"])
def test_damaged_file(file, damage, tmp_path):
    path = write_mnist(tmp_path) / "MNIST/raw" / file
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "header": content[:6],
            "truncated": content[:-1],
            "junk": b"<html>404 not found</html>" * 9,
            "huge": content[:4] + b"\xff" * 4 + content[8:],
        }[damage]
    )
    with raises("'mnist'", tmp_path, "damaged", "delete"):
        load_data("mnist", tmp_path)


def test_images_and_labels_that_do_not_belong_together(tmp_path):
    raw = write_mnist(tmp_path) / "MNIST/raw"
    labels = (raw / "train-labels-idx1-ubyte").read_bytes()
    (raw / "train-labels-idx1-ubyte").write_bytes((raw / "t10k-labels-idx1-ubyte").read_bytes())
    with raises("damaged", "40 images and 20 labels"):
        load_data("mnist", tmp_path)
    (raw / "train-labels-idx1-ubyte").write_bytes(labels[:-1] + b"\x0b")
    with raises("damaged", "11"):
        load_data("mnist", tmp_path)


def test_failed_download(tmp_path, monkeypatch):
    def download(self):
        raise RuntimeError("Error downloading x.gz:\nno network\n")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    with raises("download of data set 'mnist'", tmp_path, "x.gz: no network"):
        load_data("mnist", tmp_path, download=True)
    assert len(load_data("mnist", write_mnist(tmp_path), download=True).test) == 20  # nothing is missing


# Image folders.


@pytest.mark.parametrize("held_out", ["test", "val", "validation"])
def test_image_folder(held_out, tmp_path):
    root = write_folder(tmp_path, ("train", held_out), ("img10", "img2"), count=5)
    (root / "train" / ".hidden").mkdir()
    for litter in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (root / "train" / litter).touch()
        (root / "train" / "img2" / litter).touch()
    (root / "README.txt").write_text("about these images")
    data = load_data(root, val_fraction=0.2)
    assert data.class_names == ["img2", "img10"]
    assert (len(data.train), len(data.val), len(data.test)) == (8, 2, 10)
    assert data.val.labels.tolist() == [0, 1]
    assert (data.in_chans, data.img_size) == (3, (8, 10))
    first = np.asarray(Image.open(root / held_out / "img10" / "0.png"))
    assert np.array_equal(data.test.images[5].permute(1, 2, 0), first) and data.test.labels[5] == 1


def test_image_folder_by_other_names(tmp_path, monkeypatch):
    write_folder(tmp_path / "sets" / "pets")
    direct = load_data(tmp_path / "sets" / "pets")
    monkeypatch.chdir(tmp_path)
    for name, data_dir in (
        ("sets/pets", None),
        ("folder/sets/pets", None),
        ("folder/pets", "sets"),
        ("folder", "sets/pets"),
        ("torch/image_folder", "sets/pets"),
    ):
        assert torch.equal(load_data(name, data_dir).train.images, direct.train.images)


def test_validation_folder_beside_test_is_the_validation_split(tmp_path):
    root = write_folder(tmp_path, ("train", "val", "test"), count=3)
    data = load_data(root)
    assert (len(data.train), len(data.val), len(data.test)) == (6, 6, 6)
    assert np.array_equal(data.val.images[0].permute(1, 2, 0), np.asarray(Image.open(root / "val/cat/0.png")))
    without = load_data(root, val_fraction=0)
    assert without.val is None and len(without.train) == 6


def test_image_folder_of_one_held_out_part_has_no_part_twice(tmp_path):
    data = load_data(write_folder(tmp_path, ("train", "val", "validation")), val_fraction=0.25)
    assert not rows(data.val) & rows(data.test)
    assert len(data.train) == 9


def test_image_folder_resizes_and_converts(tmp_path):
    root = write_folder(tmp_path)
    data = load_data(root, img_size=(6, 4), in_chans=1, val_fraction=0)
    assert data.train.images.shape == (12, 1, 6, 4)
    image = Image.open(root / "train/cat/0.png").convert("L").resize((4, 6), Image.Resampling.BILINEAR)
    assert np.array_equal(data.train.images[0, 0], np.asarray(image))


# Folders of images that show several classes.


def test_tables(tmp_path):
    root = write_tables(tmp_path)
    (root / "train" / ".hidden").touch()
    (root / "train" / "more" / "Thumbs.db").touch()
    text = (root / "test" / "labels.csv").read_text()
    (root / "test" / "labels.csv").write_text("\ufeff" + text.replace(",", " , ").replace("\n", "\r\n") + "\r\n,,,\r\n")
    data = load_data(root, val_fraction=0)
    assert data.class_names == ["cat", "dog", "bird"] and data.num_classes == 3 and data.multi_label
    assert (len(data.train), data.val, len(data.test)) == (9, None, 9)
    assert (data.in_chans, data.img_size) == (1, (8, 10))
    expected = torch.tensor([[i & 1, i >> 1 & 1, i >> 2 & 1] for i in range(9)]).float()
    for split in data.train, data.test:
        assert torch.equal(split.labels, expected) and split.labels.dtype == torch.float32
    for i, name in ((3, "3.png"), (8, "more/last.png")):
        assert np.array_equal(data.test.images[i, 0], np.asarray(Image.open(root / "test" / name)))
    batches = list(Loader(data.train, 4, "cpu", shuffle=True))
    order = Loader(data.train, 4, "cpu", shuffle=True).order()
    assert torch.equal(torch.cat([labels for _, labels in batches]), expected[order])
    assert not load_data(write_folder(tmp_path / "pets")).multi_label


def test_tables_that_do_not_fit_into_memory(tmp_path):
    root = write_tables(tmp_path, ("train", "val", "test"))
    whole, read = load_data(root), load_data(root, max_bytes=0)
    assert len(whole.val) == 9 and read.train.images is None
    for one, other in zip(Loader(whole.train, 4, "cpu"), Loader(read.train, 4, "cpu"), strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def edit(old, new, part="train"):
    def change(root):
        table = root / part / "labels.csv"
        text = table.read_text()
        assert old in text
        table.write_text(text.replace(old, new, 1))

    return change


def link(root):
    (root / "train" / "loop").symlink_to(root / "train")


TABLE_FAULTS = {
    "no table of test": (lambda root: (root / "test/labels.csv").unlink(), "test/labels.csv' does not exist, but"),
    "no table of train": (lambda root: (root / "train/labels.csv").unlink(), "train/labels.csv' does not exist, but"),
    "missing image": (lambda root: (root / "train/3.png").unlink(), "line 5: there is no image '3.png' in"),
    "image without a line": (lambda root: (root / "test/3.png").rename(root / "test/x.png"), "no image '3.png'"),
    "extra image": (lambda root: (root / "train/x.png").touch(), "has no line for '", "train/x.png"),
    "extra file below": (lambda root: (root / "train/more/x.txt").touch(), "has no line for '", "more/x.txt"),
    "image twice": (edit("3.png", "./2.png"), "line 5: './2.png' is there twice"),
    "outside": (edit("3.png", "../test/3.png"), "line 5: there is no image '../test/3.png'"),
    "absolute": (edit("3.png", "/3.png"), "line 5: there is no image '/3.png'"),
    "word": (edit("3.png,1,1,0", "3.png,1,yes,0"), "line 5: 'yes' for the class 'dog': give 0 or 1"),
    "number": (edit("3.png,1,1,0", "3.png,1,2,0"), "line 5: '2' for the class 'dog': give 0 or 1"),
    "empty": (edit("3.png,1,1,0", "3.png,1,,0"), "line 5: '' for the class 'dog': give 0 or 1"),
    "short line": (edit("3.png,1,1,0", "3.png,1,1"), "line 5: 2 values for 3 classes"),
    "long line": (edit("3.png,1,1,0", "3.png,1,1,0,0"), "line 5: 4 values for 3 classes"),
    "other name": (edit("dog", "doc", "test"), "has other classes than", "class 2 is 'doc', there 'dog'"),
    "other order": (edit("cat,dog", "dog,cat", "test"), "class 1 is 'dog', there 'cat'"),
    "name twice": (edit("dog", "cat"), "names the class 'cat' twice"),
    "no name": (edit("dog", ""), "names the class '' in its first line"),
    "no classes": (lambda root: (root / "train/labels.csv").write_text("file\n0.png\n"), "names no classes"),
    "no lines": (lambda root: (root / "train/labels.csv").write_text("file,cat\n"), "names no images"),
    "nothing": (lambda root: (root / "train/labels.csv").write_text(""), "names no images"),
    "not text": (lambda root: (root / "train/labels.csv").write_bytes(b"\xff\xfe\0"), "is not a table (UnicodeDecode"),
    "open quote": (edit("3.png", '"3.png'), "is not a table (Error: unexpected end of data)"),
    "not an image": (lambda root: (root / "train/3.png").write_text("hello"), "3.png' is not an image"),
    "links in a circle": (link, "train/loop' is a link to a folder"),
}


@pytest.mark.parametrize("fault", TABLE_FAULTS)
def test_faults_of_tables(fault, tmp_path):
    change, *parts = TABLE_FAULTS[fault]
    change(write_tables(tmp_path))
    with raises(*parts):
        load_data(tmp_path)


def test_class_that_no_training_image_shows(tmp_path):
    write_tables(tmp_path, count=4)  # of three bits
    with raises("train/labels.csv' shows the class 'bird': add some, or delete its column from all tables"):
        load_data(tmp_path)


def test_classes_that_only_one_part_has(tmp_path):
    write_tables(tmp_path)
    table = tmp_path / "test" / "labels.csv"
    table.write_text("".join(line.rpartition(",")[0] + "\n" for line in table.read_text().splitlines()))
    with raises("has other classes than", "class 3 is none, there 'bird'"):
        load_data(tmp_path)


def test_table_elsewhere(tmp_path):
    root = write_tables(tmp_path / "set")
    (root / "train/labels.csv").rename(tmp_path / "labels.csv")
    (root / "train/labels.csv").symlink_to(tmp_path / "labels.csv")
    with raises("train/labels.csv' is a link out of"):
        load_data(root)


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


# Classes that the validation split lacks.


def test_warning_of_classes_without_validation_images(tmp_path, caplog):
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


def test_warning_of_classes_that_the_val_folder_lacks(tmp_path, caplog):
    write_folder(tmp_path, ("train", "test"))
    write_folder(tmp_path, ("val",), ("cat",))
    load_data(tmp_path)
    (record,) = caplog.records
    assert "has no image of 1 of 2 classes ('dog'): add images of them to the val folder" in record.getMessage()


def test_warning_of_several_classes(tmp_path, caplog):
    write_tables(tmp_path, count=33)
    text = (tmp_path / "train/labels.csv").read_text().splitlines()
    text[1:] = [line.rpartition(",")[0] + ",0" for line in text[1:]]
    text[5] = text[5][:-1] + "1"
    (tmp_path / "train/labels.csv").write_text("\n".join(text))
    load_data(tmp_path)
    (record,) = caplog.records
    assert "has no image of 1 of 3 classes ('bird'): give a larger --val-fraction" in record.getMessage()


@pytest.mark.parametrize("mode, in_chans", [("L", 1), ("1", 1), ("LA", 1), ("P", 3), ("RGBA", 3)])
def test_image_modes(mode, in_chans, tmp_path):
    data = load_data(write_folder(tmp_path, mode=mode))
    assert data.in_chans == in_chans and data.train.images.shape[1:] == (in_chans, 8, 10)


def test_sixteen_bit_images_keep_their_contrast(tmp_path):
    root = write_folder(tmp_path, classes=("a",), count=2)
    ramp = (np.arange(80, dtype=np.uint16) * 800).reshape(8, 10)
    Image.fromarray(ramp).save(root / "test/a/0.png")
    data = load_data(root, in_chans=1, val_fraction=0)
    assert np.array_equal(data.test.images[0, 0], ramp >> 8)


def test_exif_orientation(tmp_path):
    root = write_folder(tmp_path, classes=("a",), count=2)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    for path in root.glob("*/*/*.png"):
        Image.open(path).save(path, exif=exif)
    data = load_data(root, val_fraction=0)
    assert data.img_size == (10, 8)
    plain = np.asarray(Image.open(root / "train/a/0.png"))
    assert np.array_equal(data.train.images[0].permute(1, 2, 0), np.rot90(plain, -1))


def test_images_of_different_sizes_need_a_size(tmp_path):
    root = write_folder(tmp_path)
    Image.new("RGB", (5, 4)).save(root / "test" / "dog" / "0.png")
    with raises(root, "different sizes", "4x5", "8x10", "--img-size"):
        load_data(root)
    assert load_data(root, img_size=8).test.images.shape == (12, 3, 8, 8)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("file", ["notes.txt", "text.png", "empty.png"])
def test_file_that_is_no_image(file, streamed, tmp_path):
    path = write_folder(tmp_path) / "test" / "cat" / file
    path.write_text("" if file == "empty.png" else "notes\non these images")
    with raises(path, "not an image", "delete"):
        load_data(tmp_path, img_size=8, in_chans=3, max_bytes=0 if streamed else 1 << 30)


def test_truncated_image(tmp_path):
    path = write_folder(tmp_path, size=(64, 64)) / "test" / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:3000])
    with raises(path, "not an image", "delete"):
        load_data(tmp_path)
    streamed = load_data(tmp_path, max_bytes=0)
    for num_workers in (0, 1):
        with raises(path, "not an image", "delete"):
            list(Loader(streamed.test, 4, "cpu", num_workers=num_workers))


def test_broken_layouts(tmp_path):
    with raises(tmp_path, "no training images", tmp_path / "train", "train/<class>/<image>"):
        load_data(tmp_path)
    (tmp_path / "train").mkdir()
    with raises(tmp_path, "no test images", tmp_path / "test", "test/<class>/<image>"):
        load_data(tmp_path)
    (tmp_path / "test").mkdir()
    with raises(tmp_path / "train", "no images"):
        load_data(tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    with raises(tmp_path / "train/cat", "no images", "delete"):
        load_data(tmp_path)
    (tmp_path / "train/cat/.DS_Store").touch()
    with raises(tmp_path / "train/cat", "no images"):
        load_data(tmp_path)
    Image.new("L", (4, 4)).save(tmp_path / "train/cat/0.png")
    with raises(tmp_path / "test", "no images"):
        load_data(tmp_path)
    write_folder(tmp_path, ("test",), ("dgo",))
    with raises(tmp_path / "test/dgo", "class", "train", "does not have"):
        load_data(tmp_path)
    (tmp_path / "train/cat/more").mkdir()
    with raises(tmp_path / "train/cat/more", "not an image file"):
        load_data(tmp_path)
    Image.new("L", (4, 4)).save(tmp_path / "train/0.png")
    with raises(tmp_path / "train/0.png", "not a folder"):
        load_data(tmp_path)


def test_no_image_to_spare_for_validation(tmp_path):
    root = write_folder(tmp_path, count=1)
    with raises("no training image to spare", "val_fraction 0"):
        load_data(root)
    assert len(load_data(root, val_fraction=0).train) == 2


def test_missing_folder(tmp_path):
    with raises("unknown data set", tmp_path / "nowhere", "no such folder"):
        load_data(tmp_path / "nowhere")
    with raises("image folder", tmp_path / "nowhere", "does not exist"):
        load_data("folder/nowhere", tmp_path)


# Streaming.


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("mnist", {}),
        ("mnist", {"img_size": (30, 17), "in_chans": 3}),
        ("torch/mnist", {"img_size": 20}),
        ("folder", {}),
        ("folder", {"img_size": 7, "in_chans": 1}),
    ],
)
def test_streamed_set_equals_the_same_in_memory(name, kwargs, tmp_path):
    root = write_folder(tmp_path) if name == "folder" else write_mnist(tmp_path)
    memory, streamed = (load_data(name, root, max_bytes=limit, **kwargs) for limit in (1 << 30, 0))
    assert (memory.img_size, memory.in_chans, memory.class_names) == (
        streamed.img_size,
        streamed.in_chans,
        streamed.class_names,
    )
    for part, num_workers in (("train", 1), ("val", 0), ("test", 0)):
        one, other = getattr(memory, part), getattr(streamed, part)
        assert one.images is not None and other.images is None
        assert len(one) == len(other) and one.image_shape == other.image_shape
        pairs = zip(
            Loader(one, 3, "cpu", shuffle=True, translate=2, start_step=0),
            Loader(other, 3, "cpu", shuffle=True, translate=2, start_step=0, num_workers=num_workers),
            strict=True,
        )
        assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def test_max_bytes_counts_all_pixels(tmp_path):
    write_mnist(tmp_path)
    assert load_data("mnist", tmp_path, max_bytes=60 * 784).train.images is not None
    assert load_data("mnist", tmp_path, max_bytes=60 * 784 - 1).train.images is None


# Names and arguments.


@pytest.mark.parametrize("name, near", [("mnits", "mnist"), ("MNIST", "mnist"), ("fashion-mnist", "fashion_mnist")])
def test_near_match(name, near):
    with raises(f"unknown data set '{name}', did you mean '{near}'?", *list_datasets()):
        load_data(name)


@pytest.mark.parametrize(
    "name, parts",
    [
        ("zzz", ["unknown data set 'zzz'", "digits, mnist, fashion_mnist, cifar10"]),
        ("", ["no data set is named", "digits"]),
        ("foo/bar", ["unknown data set 'foo/bar'"]),
        ("torch/nope", ["'torch/nope'", "nope", "check the name"]),
        ("torch/kmnist", ["'torch/kmnist'", "--data-dir", "--download"]),
        ("tfds/mnist", ["'tfds/mnist'", "use hfds/"]),
    ],
)
def test_unknown_names(name, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with raises(*parts):
        load_data(name)


def test_packages_that_are_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with raises("scikit-learn", 'pip install "capszoo[train]"'):
        load_data("digits")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with raises("'hfds/user/set'", "pip install datasets"):
        load_data("hfds/user/set")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"val_fraction": -0.1},
        {"val_fraction": 1.0},
        {"val_fraction": float("nan")},
        {"seed": -1},
        {"in_chans": 2},
        {"img_size": 0},
        {"img_size": (28, 0)},
        {"img_size": (1, 28, 28)},
        {"img_size": "20x32"},
        {"img_size": (20, 32.0)},
    ],
)
def test_arguments_out_of_range(kwargs):
    ((key, value),) = kwargs.items()
    with raises(f"{key}={value}", "give"):
        load_data("digits", **kwargs)


def test_unreadable_folder(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    write_folder(tmp_path)
    monkeypatch.setattr("capszoo.data.folders._entries", refuse)
    with raises("Permission denied", tmp_path / "train"):
        load_data(tmp_path)


# Real data, where the environment says where it is.


@pytest.mark.skipif("CAPSZOO_TEST_DATA" not in os.environ, reason="CAPSZOO_TEST_DATA names no folder")
@pytest.mark.parametrize("name, mean, std", [("mnist", 0.1307, 0.3081), ("fashion_mnist", 0.2860, 0.3530)])
def test_real_sets(name, mean, std):
    data = load_data(name, os.environ["CAPSZOO_TEST_DATA"])
    assert (len(data.train), len(data.val), len(data.test)) == (54000, 6000, 10000)
    labels = torch.cat([data.train.labels, data.val.labels]).bincount()
    if name == "mnist":
        assert labels.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert (data.val.labels.bincount() - labels / 10).abs().max() < 1
    pixels = torch.cat([data.train.images, data.val.images]).float() / 255
    assert abs(pixels.mean() - mean) < 1e-4 and abs(pixels.std() - std) < 1e-4


# Normalisation.


@pytest.mark.parametrize("max_bytes", [4 << 30, 0])
def test_statistics_are_those_of_the_training_images(tmp_path, max_bytes):
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


def test_a_channel_of_one_value_is_only_shifted(tmp_path):
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
def test_normalisations_that_are_not_possible(tmp_path, mean, std, parts):
    data = load_data(write_folder(tmp_path))
    with raises(*parts):
        data.normalize(mean, std)
    assert data.train.mean == (0.0,)
