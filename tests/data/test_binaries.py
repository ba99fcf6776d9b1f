"""capszoo.data.binaries: CIFAR-100, SVHN and small NORB, from tiny files in their formats."""

import gzip
import hashlib
import os
import pickle
import struct
import sys

import numpy as np
import pytest
import torch
import torchvision

from capszoo.data import default_translate, load_data
from capszoo.data.binaries import BINARY_SETS
from capszoo.data.sources import uses_data_dir


def write_cifar100(root, count=200):
    """The binary version; all bytes are random but the labels."""
    folder = root / "cifar-100-binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        records = rng.integers(0, 256, (count, 3074), dtype=np.uint8)
        records[:, 0], records[:, 1] = np.arange(count) % 20, np.arange(count) % 100
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    (folder / "fine_label_names.txt").write_text("".join(f"name{i}\n" for i in range(100)) + "\n")
    return folder, records


def test_cifar100(raises, tmp_path):
    folder, last = write_cifar100(tmp_path)
    data = load_data("cifar100", tmp_path, val_fraction=0.5)
    assert (len(data.train), len(data.val), len(data.test)) == (100, 100, 200)
    assert (data.in_chans, data.img_size, data.num_classes, data.class_names[99]) == (3, (32, 32), 100, "name99")
    assert data.test.labels.tolist() == last[:, 1].tolist()  # the fine ones
    assert np.array_equal(data.test.images.numpy().reshape(200, -1), last[:, 2:])
    (folder / "test.bin").write_bytes(b"short")
    with raises("'cifar100'", "damaged", "test.bin has 5 bytes", "3,074", "delete"):
        load_data("cifar100", tmp_path)
    (folder / "fine_label_names.txt").unlink()
    with raises("'cifar100' not found", "fine_label_names.txt", "--download"):
        load_data("cifar100", tmp_path)


def test_cifar100_for_python(raises, tmp_path, monkeypatch):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    pixels = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
    cifar = torchvision.datasets.CIFAR100
    for key in ("train", "test"):
        listed = [[key, write(key, {"data": pixels, "fine_labels": list(range(10)), "coarse_labels": [0] * 10})]]
        monkeypatch.setattr(cifar, f"{key}_list", listed)
    md5 = write("meta", {"fine_label_names": [f"class {i}" for i in range(100)]})
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": md5})
    data = load_data("cifar100", tmp_path, val_fraction=0)
    assert (data.num_classes, data.class_names[7], data.test.labels.tolist()) == (100, "class 7", list(range(10)))
    assert np.array_equal(data.test.images.numpy().reshape(10, -1), pixels)
    (folder / "train").write_bytes(b"junk")
    with raises("'cifar100'", "damaged"):
        load_data("cifar100", tmp_path)


def test_svhn(raises, tmp_path, monkeypatch):
    io = pytest.importorskip("scipy.io")
    (tmp_path / "SVHN").mkdir()
    rng = np.random.default_rng(0)
    listed = dict(torchvision.datasets.SVHN.split_list)
    for split in ("train", "test"):
        file = tmp_path / "SVHN" / f"{split}_32x32.mat"
        pixels = rng.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
        io.savemat(file, {"X": pixels, "y": (np.arange(20, dtype=np.uint8) % 10 + 1)[:, None]})  # 10 stands for 0
        listed[split] = ["", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", listed)
    data = load_data("svhn", tmp_path, val_fraction=0)
    assert (data.in_chans, data.img_size, data.class_names) == (3, (32, 32), list("0123456789"))
    assert data.test.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2
    assert np.array_equal(data.test.images.numpy(), pixels.transpose(3, 2, 0, 1))
    (tmp_path / "SVHN/test_32x32.mat").write_bytes(b"junk")
    with raises("'svhn'", "damaged", "delete"):
        load_data("svhn", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with raises("'svhn' needs scipy", "pip install scipy"):
        load_data("svhn", tmp_path)


def test_svhn_is_downloaded_into_its_folder(tmp_path, monkeypatch, raises):
    pytest.importorskip("scipy.io")
    asked = []
    monkeypatch.setattr(torchvision.datasets.SVHN, "download", lambda self: asked.append((self.root, self.split)))
    with raises("download of data set 'svhn'", tmp_path):  # nothing came
        load_data("svhn", tmp_path, download=True)
    assert asked == [(str(tmp_path / "SVHN"), "train")] or asked == [(tmp_path / "SVHN", "train")]


NORB = "smallnorb-5x{}x9x18x6x2x96x96-{}-{}.mat"
NORB_PARTS = (("46789", "training"), ("01235", "testing"))


def matrix(values, magic):
    shape = (*values.shape, *[1] * (3 - values.ndim))
    return struct.pack(f"<Ii{len(shape)}i", magic, values.ndim, *shape) + values.tobytes()


def write_norb(root, count=20, size=96, packed=False):
    """Files in the format of small NORB; the second camera sees the negative of the first."""
    folder = root / "small_norb"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for toys, part in NORB_PARTS:
        left = rng.integers(0, 256, (count, size, size), dtype=np.uint8)
        contents = {
            "dat": matrix(np.stack([left, 255 - left], axis=1), 0x1E3D4C55),
            "cat": matrix(np.arange(count, dtype="<i4") % 5, 0x1E3D4C54),
        }
        for kind, content in contents.items():
            name = NORB.format(toys, part, kind)
            (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return folder, left


@pytest.mark.parametrize("packed", [False, True])
def test_small_norb(packed, tmp_path):
    _, left = write_norb(tmp_path, packed=packed)
    data = load_data("small_norb", tmp_path, img_size=96, val_fraction=0.25)
    assert (len(data.train), len(data.val), len(data.test)) == (15, 5, 20)
    assert (data.in_chans, data.num_classes, data.img_size) == (2, 5, (96, 96))
    assert data.class_names == ["animal", "human", "airplane", "truck", "car"]
    assert data.test.labels.tolist() == [0, 1, 2, 3, 4] * 4
    assert np.array_equal(data.test.images[:, 0], left) and np.array_equal(data.test.images[:, 1], 255 - left)


def test_small_norb_is_resized_as_in_the_papers(tmp_path):
    _, left = write_norb(tmp_path)
    data = load_data("small_norb", tmp_path, val_fraction=0)
    assert data.img_size == (48, 48) and data.test.images.shape == (20, 2, 48, 48)
    halves = torch.nn.functional.interpolate(
        torch.from_numpy(left).float()[:, None], (48, 48), mode="bilinear", antialias=True
    )
    assert torch.equal(data.test.images[:, :1], halves.round().clamp(0, 255).to(torch.uint8))
    streamed = load_data("small_norb", tmp_path, val_fraction=0, max_bytes=0)
    assert torch.equal(streamed.test.reader.read(range(20)), data.test.images)


def test_channels_of_stereo_images(raises, tmp_path):
    _, left = write_norb(tmp_path, size=12)
    first = load_data("small_norb", tmp_path, img_size=12, in_chans=1)
    assert first.in_chans == 1 and np.array_equal(first.test.images[:, 0], left)
    with raises("in_chans=3 is not possible for images of 2 channels", "give 2 or 1"):
        load_data("small_norb", tmp_path, in_chans=3)
    for name in ("digits", "torch/mnist", "hfds/a/b", tmp_path):
        with raises("in_chans=2 is not possible for images of", "give"):
            load_data(name, in_chans=2)
    with raises("in_chans=0 is out of range", "give"):
        load_data("digits", in_chans=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["dat", "cat"])
@pytest.mark.parametrize(
    "damage", ["empty", "header", "short", "long", "junk", "other kind", "huge", "negative", "most", "none"]
)
def test_damaged_small_norb(raises, packed, kind, damage, tmp_path):
    folder, _ = write_norb(tmp_path, size=4)
    path = folder / NORB.format("01235", "testing", kind)
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "header": content[:6],
            "short": content[:-1],
            "long": content + b"1",
            "junk": b"<html>404 not found</html>" * 9,
            "other kind": content[:4] + b"\3" + content[5:],
            "huge": content[:8] + b"\xff\xff\xff\x7f" * 3 + content[20:],
            "negative": content[:8] + b"\xff" * 4 + content[12:],
            "most": content[:8] + struct.pack("<i", 700) + content[12:],  # gzip has room for so many
            "none": content[:8] + bytes(4) + content[12:],
        }[damage]
    )
    if packed:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    with raises("'small_norb'", tmp_path, "damaged", path.name if damage not in ("empty", "header") else "", "delete"):
        load_data("small_norb", tmp_path)


def test_small_norb_that_is_not_there(raises, tmp_path):
    with raises("'small_norb' not found", NORB.format("46789", "training", "dat"), "--data-dir", "cs.nyu.edu"):
        load_data("small_norb", tmp_path, download=True)
    folder, _ = write_norb(tmp_path, size=4)
    labels = folder / NORB.format("46789", "training", "cat")
    labels.write_bytes(matrix(np.arange(20, dtype="<i4"), 0x1E3D4C54))
    with raises("'small_norb'", "damaged", "labels from 0 to 19 for 5 classes", "delete"):
        load_data("small_norb", tmp_path)
    labels.write_bytes(matrix(np.zeros(19, "<i4"), 0x1E3D4C54))
    with raises("'small_norb'", "damaged", "20 images and 19 labels"):
        load_data("small_norb", tmp_path)
    images = folder / NORB.format("46789", "training", "dat")
    images.write_bytes(matrix(np.zeros((19, 3, 4, 4), np.uint8), 0x1E3D4C55))
    with raises("'small_norb'", "damaged", "3 cameras"):
        load_data("small_norb", tmp_path)


def test_one_table_of_names():
    assert {name for name in BINARY_SETS if uses_data_dir(name)} == set(BINARY_SETS)
    shifts = {name: default_translate(name) for name in (*BINARY_SETS, "digits", "torch/mnist", "nowhere")}
    assert shifts == {
        **dict.fromkeys(("digits", "mnist", "fashion_mnist"), 2),
        **dict.fromkeys(("cifar10", "cifar100"), 4),
        **dict.fromkeys(("svhn", "small_norb", "torch/mnist", "nowhere"), 0),
    }


@pytest.mark.parametrize(
    "name, uses",
    [("digits", False), ("folder/x", True), ("torch/folder", True), ("torch/mnist", True), ("hfds/a/b", True),
     ("tfds/x", True), ("unknown", True), (os.path.dirname(__file__), False)],
)  # fmt: skip
def test_who_uses_data_dir(name, uses):
    assert uses_data_dir(name) == uses


@pytest.mark.skipif("CAPSZOO_TEST_DATA" not in os.environ, reason="CAPSZOO_TEST_DATA names no folder")
@pytest.mark.parametrize(
    "name, counts, classes",
    [("cifar10", (50_000, 10_000), 10), ("cifar100", (50_000, 10_000), 100), ("svhn", (73_257, 26_032), 10),
     ("small_norb", (24_300, 24_300), 5)],
)  # fmt: skip
def test_real_sets(name, counts, classes):
    root = os.environ["CAPSZOO_TEST_DATA"]
    if not any(os.path.isdir(os.path.join(root, form.folder)) for form in BINARY_SETS[name].forms):
        pytest.skip(f"{root} has no {name}")
    if name == "svhn" and "scipy" not in sys.modules:
        pytest.importorskip("scipy")
    data = load_data(name, root, val_fraction=0)
    assert (len(data.train), len(data.test)) == counts and data.num_classes == classes
    assert len(data.train.labels.bincount()) == classes
