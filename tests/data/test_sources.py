"""capszoo.data.sources: digits, MNIST and its like, CIFAR-10, and sets through timm."""

import hashlib
import os
import pickle
import sys

import numpy as np
import pytest
import torch
import torchvision

from capszoo.data import Loader, list_datasets, load_data


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


def test_mnist_format(write_mnist, tmp_path):
    data = load_data("mnist", write_mnist(tmp_path), val_fraction=0.25)
    assert (len(data.train), len(data.val), len(data.test)) == (30, 10, 20)
    assert data.val.labels.bincount().tolist() == [1] * 10
    assert data.test.images.shape == (20, 1, 28, 28)
    reference = torchvision.datasets.MNIST(tmp_path, train=False)
    assert torch.equal(data.test.images[:, 0], reference.data) and torch.equal(data.test.labels, reference.targets)
    assert load_data("fashion_mnist", write_mnist(tmp_path, "FashionMNIST")).class_names[0] == "T-shirt/top"


def test_through_timm_equals_by_name(write_mnist, tmp_path):
    write_mnist(tmp_path)
    one, other = load_data("mnist", tmp_path), load_data("torch/mnist", tmp_path)
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(one, part).images, getattr(other, part).images)
        assert torch.equal(getattr(one, part).labels, getattr(other, part).labels)
    assert one.class_names == other.class_names and one.img_size == other.img_size


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


def test_cifar10_format(raises, tmp_path, monkeypatch):
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


def write_cifar_binary(root):
    """Ten images a file; all their bytes are random but the labels."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        records = rng.integers(0, 256, (10, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(10)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("".join(f"name{i}\n" for i in range(10)) + "\n")
    return folder, records


def test_cifar10_without_pickles(raises, tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    folder, last = write_cifar_binary(tmp_path)  # is taken before the other version
    data = load_data("cifar10", tmp_path, val_fraction=0)
    assert data.class_names == [f"name{i}" for i in range(10)]
    assert (len(data.train), len(data.test), data.img_size, data.in_chans) == (50, 10, (32, 32), 3)
    assert data.test.labels.tolist() == list(range(10))
    assert np.array_equal(data.test.images.numpy().reshape(10, -1), last[:, 1:])
    (folder / "data_batch_3.bin").write_bytes(b"short")
    with raises("'cifar10'", "damaged", "data_batch_3.bin has 5 bytes", "delete"):
        load_data("cifar10", tmp_path)
    (folder / "data_batch_3.bin").unlink()
    with raises("'cifar10' not found", "data_batch_3.bin"):
        load_data("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
@pytest.mark.parametrize("exists", [True, False])
def test_missing_data(raises, name, exists, tmp_path):
    root = tmp_path if exists else tmp_path / "nowhere"
    with raises(f"data set '{name}' not found in '{root}'", "looked for", root, "--data-dir", "--download"):
        load_data(name, root)


def test_default_folder_is_data(raises, write_mnist, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with raises("'mnist' not found in 'data'", "MNIST/raw/train-images-idx3-ubyte"):
        load_data("mnist")
    write_mnist(tmp_path / "data")
    assert len(load_data("mnist").test) == 20


def test_missing_file_is_named(raises, write_mnist, tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    with raises("looked for", "t10k-labels-idx1-ubyte"):
        load_data("mnist", tmp_path)


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize("damage", ["empty", "header", "truncated", "junk", "huge"])
def test_damaged_file(raises, write_mnist, file, damage, tmp_path):
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


def test_images_and_labels_that_do_not_belong_together(raises, write_mnist, tmp_path):
    raw = write_mnist(tmp_path) / "MNIST/raw"
    labels = (raw / "train-labels-idx1-ubyte").read_bytes()
    (raw / "train-labels-idx1-ubyte").write_bytes((raw / "t10k-labels-idx1-ubyte").read_bytes())
    with raises("damaged", "40 images and 20 labels"):
        load_data("mnist", tmp_path)
    (raw / "train-labels-idx1-ubyte").write_bytes(labels[:-1] + b"\x0b")
    with raises("damaged", "11"):
        load_data("mnist", tmp_path)


def test_failed_download(raises, write_mnist, tmp_path, monkeypatch):
    def download(self):
        raise RuntimeError("Error downloading x.gz:\nno network\n")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    with raises("download of data set 'mnist'", tmp_path, "x.gz: no network"):
        load_data("mnist", tmp_path, download=True)
    assert len(load_data("mnist", write_mnist(tmp_path), download=True).test) == 20  # nothing is missing


@pytest.mark.parametrize("name, near", [("mnits", "mnist"), ("MNIST", "mnist"), ("fashion-mnist", "fashion_mnist")])
def test_near_match(raises, name, near):
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
def test_unknown_names(raises, name, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with raises(*parts):
        load_data(name)


def test_packages_that_are_not_installed(raises, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with raises("scikit-learn", 'pip install "capszoo[train]"'):
        load_data("digits")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with raises("'hfds/user/set'", "pip install datasets"):
        load_data("hfds/user/set")


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
