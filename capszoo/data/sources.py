"""Where data sets come from: scikit-learn, torchvision, folders of images, timm and Hugging Face."""

from __future__ import annotations

import difflib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from timm.data import create_dataset
from torch import Tensor
from torchvision.datasets.mnist import read_image_file, read_label_file

from capszoo.errors import DataError, one_line

from .decoding import Size, sizes_differ, to_uint8
from .folders import image_folder
from .readers import ArrayReader, Reader, TimmReader
from .splits import stratified

_MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
# Its binary version, which holds no pickles: a byte for the label and 3,072 for the pixels of each image.
_CIFAR_BINARY = "cifar-10-batches-bin"
_CIFAR_BINARY_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "batches.meta.txt")
# name: class in torchvision.datasets, folder and files below the data folder
_TORCHVISION = {
    "mnist": ("MNIST", "MNIST/raw", _MNIST_FILES),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", _MNIST_FILES),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", _CIFAR_FILES),
}


@dataclass
class Source:
    """A data set before it is split: readers, and the labels of their images (int64 `[N]` or float32 `[N, J]`)."""

    class_names: list[str]
    train: tuple[Reader, Tensor]
    test: tuple[Reader, Tensor]
    val: tuple[Reader, Tensor] | None = None


def list_datasets() -> list[str]:
    """Return the names that `load_data` knows by itself."""
    return ["digits", *_TORCHVISION]


def uses_data_dir(name: str | os.PathLike) -> bool:
    """Whether a data set is looked for in the `data_dir` of :func:`capszoo.data.load_data`."""
    prefix, _, rest = os.fspath(name).partition("/")
    by_name = os.fspath(name) in _TORCHVISION or prefix == "folder" or prefix.lower() in ("torch", "hfds") and rest
    return bool(by_name) or not (os.fspath(name) == "digits" or os.path.isdir(name))


def open_source(
    name: str,
    data_dir: str | os.PathLike | None,
    download: bool,
    img_size: Size | None,
    in_chans: int | None,
    follow_links: bool = False,
) -> Source:
    """Open the data set of a name; arguments and errors as :func:`capszoo.data.load_data`."""
    prefix, _, rest = name.partition("/")
    if name == "digits":
        return _digits(img_size, in_chans)
    if name in _TORCHVISION:
        return _torchvision(name, Path(data_dir or "data"), download, img_size, in_chans)
    if prefix == "folder" or name in ("torch/folder", "torch/image_folder"):
        folder = Path(data_dir or "", rest if prefix == "folder" else "")
        class_names, parts = image_folder(folder, img_size, in_chans, follow_links)
        return Source(class_names, **parts)
    if os.path.isdir(name):
        class_names, parts = image_folder(Path(name), img_size, in_chans, follow_links)
        return Source(class_names, **parts)
    if prefix.lower() in ("torch", "hfds") and rest:
        return _timm(name, data_dir, download, img_size, in_chans)
    if prefix.lower() in ("hfids", "tfds", "wds") and rest:
        raise DataError(
            f"data set {name!r} can only be read from start to end, without a validation split or resuming: use "
            "hfds/..., torch/... or an image folder"
        )
    near = difflib.get_close_matches(name.lower().replace("-", "_"), list_datasets(), n=1)
    raise DataError(
        f"unknown data set {name!r}, "
        + (f"did you mean {near[0]!r}? " if near else "and no such folder; ")
        + f"known: {', '.join(list_datasets())}, torch/..., hfds/... or the path of an image folder"
    )


def _digits(img_size: Size | None, in_chans: int | None) -> Source:
    """scikit-learn's 1,797 handwritten digits of 8x8, scaled as MNIST's are: a 20x20 box in the middle of 28x28."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "data set 'digits' comes with scikit-learn, which is not installed: pip install \"capszoo[train]\""
        ) from None
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = to_uint8(F.pad(F.interpolate(images, (20, 20), mode="bicubic"), [4] * 4))
    labels = torch.from_numpy(digits.target).long()
    test = torch.zeros(len(labels), dtype=torch.bool)
    test[stratified(labels, 360, 0)] = True
    parts = [(ArrayReader(images[rows], img_size, in_chans), labels[rows]) for rows in (~test, test)]
    return Source([str(label) for label in digits.target_names], *parts)


def _torchvision(name: str, root: Path, download: bool, img_size: Size | None, in_chans: int | None) -> Source:
    class_name, folder, files = _TORCHVISION[name]
    if class_name == "CIFAR10" and (root / _CIFAR_BINARY).is_dir():
        folder, files = _CIFAR_BINARY, _CIFAR_BINARY_FILES
    dataset_class = getattr(torchvision.datasets, class_name)
    missing = [root / folder / file for file in files if not (root / folder / file).is_file()]
    if missing and download:
        try:
            dataset_class(root, download=True)
        except Exception as error:
            raise DataError(
                f"download of data set {name!r} into '{root}' failed ({one_line(error)}): try again, or copy it there"
            ) from error
    elif missing:
        raise DataError(
            f"data set {name!r} not found in '{root}' (looked for {missing[0]}): give --data-dir a folder that has it, "
            "or add --download"
        )

    parts = []
    for train in (True, False):
        try:
            if folder == _CIFAR_BINARY:
                class_names = (root / folder / files[-1]).read_text("utf-8").split()
                images, labels = _read_cifar_binary(
                    [root / folder / file for file in (files[:5] if train else files[5:6])]
                )
            elif class_name == "CIFAR10":
                dataset = dataset_class(root, train=train)  # checks the files' md5 before it unpickles them
                images, labels = dataset.data, dataset.targets
                class_names = list(dataset.classes)
            else:  # the class would prefer pickles that old versions left beside these files
                paths = [root / folder / file for file in (_MNIST_FILES[:2] if train else _MNIST_FILES[2:])]
                images, labels = read_image_file(paths[0]), read_label_file(paths[1])
                class_names = list(dataset_class.classes)
            images, labels = torch.as_tensor(images), torch.as_tensor(labels, dtype=torch.int64)
            images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
            if not 0 < len(images) == len(labels):
                raise ValueError(f"{len(images)} images and {len(labels)} labels")
            if not 0 <= labels.min() <= labels.max() < len(class_names):
                raise ValueError(f"labels from {labels.min()} to {labels.max()} for {len(class_names)} classes")
        except Exception as error:  # torchvision's readers assert, index and unpickle: damage shows as any exception
            raise DataError(
                f"data set {name!r} in '{root}' is damaged ({one_line(error)}): delete '{root / folder}', then copy it "
                "anew or add --download"
            ) from error
        parts.append((ArrayReader(images.contiguous(), img_size, in_chans), labels))
    one, other = (reader.image_shape[1:] for reader, _ in parts)
    if one != other:
        raise sizes_differ(f"data set {name!r} in '{root}'", one, other)
    return Source(class_names, *parts)


def _read_cifar_binary(paths: list[Path]) -> tuple[Any, Any]:
    """Images uint8 `[N, 32, 32, 3]` and labels."""
    record = 1 + 3 * 32 * 32
    parts = []
    for path in paths:
        content = np.frombuffer(path.read_bytes(), np.uint8)
        if len(content) == 0 or len(content) % record:
            raise ValueError(f"{path.name} has {len(content):,} bytes, no multiple of {record:,}")
        parts.append(content.reshape(-1, record))
    records = np.concatenate(parts)
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0].astype(np.int64)


def _timm(
    name: str, data_dir: str | os.PathLike | None, download: bool, img_size: Size | None, in_chans: int | None
) -> Source:
    root = data_dir
    if name.lower().startswith("torch/"):
        root = data_dir or "data"
    elif importlib.util.find_spec("datasets") is None:
        raise DataError(f"data set {name!r} needs Hugging Face's datasets, not installed here: pip install datasets")

    def open_split(*splits: str) -> tuple[Any, Tensor]:
        failures = []
        for split in splits:
            try:
                dataset = create_dataset(
                    name, root=None if root is None else os.fspath(root), split=split, download=download
                )
                return dataset, _timm_labels(dataset)
            except Exception as error:
                failures.append(f"{split}: {one_line(error)}")
        raise DataError(
            f"data set {name!r} cannot be opened in '{root or 'the Hugging Face cache'}' ({'; '.join(failures)}): "
            "check the name, give --data-dir a folder that has it, or add --download"
        )

    train, train_labels = open_split("train")
    test, test_labels = open_split("test", "validation", "val")
    class_to_idx = getattr(getattr(train, "reader", None), "class_to_idx", None) or {}
    class_names = [
        str(key) for key in getattr(train, "classes", None) or sorted(class_to_idx, key=class_to_idx.__getitem__)
    ]
    class_names = class_names or [str(label) for label in range(int(train_labels.max()) + 1)]
    if max(train_labels.max(), test_labels.max()) >= len(class_names):
        raise DataError(f"data set {name!r} has labels beyond its {len(class_names)} classes: it cannot be trained on")
    reader = TimmReader(name, train, img_size, in_chans)
    test_reader = TimmReader(name, test, img_size, in_chans=reader.image_shape[0])
    if test_reader.image_shape != reader.image_shape:
        raise sizes_differ(f"data set {name!r}", reader.image_shape[1:], test_reader.image_shape[1:])
    return Source(class_names, (reader, train_labels), (test_reader, test_labels))


def _timm_labels(dataset: Any) -> Tensor:
    """Return the labels of one of timm's map-style data sets, int64 `[N]`, without decoding its images if it can."""
    labels = getattr(dataset, "targets", None)
    if hasattr(getattr(dataset, "reader", None), "iter_targets"):
        labels = list(dataset.reader.iter_targets())
    if labels is None or np.ndim(labels) != 1:
        labels = [dataset[index][1] for index in range(len(dataset))]
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or labels.is_floating_point() or len(labels) == 0 or labels.min() < 0:
        raise ValueError("no images, or images without one class label each")
    return labels.long()
