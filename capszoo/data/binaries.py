"""Data sets whose images lie in a few binary files: MNIST's and its like, CIFAR's, SVHN's and small NORB's.

None of their pickles is loaded before its checksum has been compared, and no file makes more memory be taken than it
has bytes for.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.datasets.mnist import read_image_file, read_label_file

from capszoo.errors import DataError, one_line

from .decoding import Size
from .readers import ArrayReader, Reader, Source, sizes_differ

__all__ = ["BINARY_SETS", "open_binary_set"]

# Images uint8 [N, C, H, W], labels [N] and the names of the classes.
_Part = tuple[Any, Any, list[str]]


def _packed(path: Path) -> Path:
    return path.with_name(f"{path.name}.gz")


@dataclass(frozen=True)
class _Form:
    """A form in which a data set lies on disk: its files, in a folder below the data folder, and how they are read."""

    folder: str
    files: tuple[str, ...]
    read: Callable[[Path, bool], _Part]  # of the data folder; the training images or the test images
    may_be_packed: bool = False  # by gzip, each with the suffix .gz

    def missing(self, root: Path) -> list[Path]:
        """The files that are not there."""
        paths = [root / self.folder / file for file in self.files]
        return [path for path in paths if not (path.is_file() or self.may_be_packed and _packed(path).is_file())]


@dataclass(frozen=True)
class BinarySet:
    """A data set in binary files.

    Args:
        forms: What is looked for, in this order; the last is what a download gives.
        img_size: The size that images are given by default, if not their own.
        download: Downloads into a data folder; None where torchvision does not have the data set.
        origin: Where the files come from, where they are not downloaded.
        needs: A package that is needed to read it.
    """

    forms: tuple[_Form, ...]
    img_size: Size | None = None
    download: Callable[[Path], Any] | None = None
    origin: str = ""
    needs: str | None = None


def open_binary_set(name: str, root: Path, download: bool, img_size: Size | None, in_chans: int | None) -> Source:
    """Open one of `BINARY_SETS`; arguments as :func:`capszoo.data.load_data`.

    Raises:
        DataError: If it is not there, cannot be downloaded or is damaged, or its images have other channels.
    """
    known = BINARY_SETS[name]
    if known.needs is not None and importlib.util.find_spec(known.needs) is None:
        raise DataError(f"data set {name!r} needs {known.needs}, which is not installed: pip install {known.needs}")
    form = next((form for form in known.forms if (root / form.folder).is_dir()), known.forms[-1])
    missing = form.missing(root)
    if missing and download and known.download is not None:
        form = known.forms[-1]
        try:
            known.download(root)
        except Exception as error:
            raise DataError(
                f"download of data set {name!r} into '{root}' failed ({one_line(error)}): try again, or copy it there"
            ) from error
    elif missing:
        remedy = "or add --download" if known.download is not None else f"or copy there what {known.origin} has"
        raise DataError(
            f"data set {name!r} not found in '{root}' (looked for {missing[0]}): give --data-dir a folder that has it, "
            + remedy
        )

    parts: list[tuple[Reader, Tensor]] = []
    names: list[str] = []
    for train in (True, False):
        try:
            images, labels, names = form.read(root, train)
            images, labels = torch.as_tensor(images), torch.as_tensor(labels, dtype=torch.int64)
            if not 0 < len(images) == len(labels):
                raise ValueError(f"{len(images)} images and {len(labels)} labels")
            if not 0 <= labels.min() <= labels.max() < len(names):
                raise ValueError(f"labels from {labels.min()} to {labels.max()} for {len(names)} classes")
        except Exception as error:  # torchvision's readers assert, index and unpickle: damage shows as any exception
            remedy = "copy it anew" + (" or add --download" if known.download is not None else "")
            raise DataError(
                f"data set {name!r} in '{root}' is damaged ({one_line(error)}): delete '{root / form.folder}', then "
                + remedy
            ) from error
        parts.append((ArrayReader(images.contiguous(), img_size or known.img_size, in_chans), labels))
    one, other = (reader.image_shape[1:] for reader, _ in parts)
    if one != other:
        raise sizes_differ(f"data set {name!r} in '{root}'", one, other)
    return Source(names, parts[0], parts[1])


_MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def _read_mnist(class_name: str, root: Path, train: bool) -> _Part:
    """Read the files themselves: torchvision's class would prefer pickles that old versions left beside them."""
    paths = [root / class_name / "raw" / file for file in (_MNIST_FILES[:2] if train else _MNIST_FILES[2:])]
    names = list(getattr(torchvision.datasets, class_name).classes)
    return read_image_file(paths[0])[:, None], read_label_file(paths[1]), names


def _read_cifar(class_name: str, root: Path, train: bool) -> _Part:
    """Read the version for Python by torchvision's class, which checks the files' md5 before it unpickles them."""
    dataset = getattr(torchvision.datasets, class_name)(root, train=train)
    return dataset.data.transpose(0, 3, 1, 2), dataset.targets, list(dataset.classes)


def _read_cifar_binary(
    folder: str, train_files: tuple[str, ...], test_file: str, names_file: str, labels: int, root: Path, train: bool
) -> _Part:
    """Read the binary version: of each image some labels of one byte, the last of which counts, and 3,072 pixels."""
    record = labels + 3 * 32 * 32
    parts = []
    for file in train_files if train else (test_file,):
        content = np.frombuffer((root / folder / file).read_bytes(), np.uint8)
        if len(content) == 0 or len(content) % record:
            raise ValueError(f"{file} has {len(content):,} bytes, no multiple of {record:,}")
        parts.append(content.reshape(-1, record))
    records = np.concatenate(parts)
    names = (root / folder / names_file).read_text("utf-8").split()
    return records[:, labels:].reshape(-1, 3, 32, 32), records[:, labels - 1].astype(np.int64), names


def _read_svhn(root: Path, train: bool) -> _Part:
    """Read by torchvision's class, which checks the files' md5 first."""
    dataset = torchvision.datasets.SVHN(root / "SVHN", split="train" if train else "test")
    return dataset.data, dataset.labels, [str(digit) for digit in range(10)]


def _download_svhn(root: Path) -> None:
    for split in ("train", "test"):
        torchvision.datasets.SVHN(root / "SVHN", split=split, download=True)


_NORB = "small_norb"
_NORB_FILES = tuple(
    f"smallnorb-5x{toys}x9x18x6x2x96x96-{part}-{kind}.mat"
    for toys, part in (("46789", "training"), ("01235", "testing"))
    for kind in ("dat", "cat")
)
_NORB_CLASSES = ("animal", "human", "airplane", "truck", "car")
# What NORB's matrices begin with, by the bytes of an element: those of images (uint8) and of labels (int32).
_NORB_MAGIC = {1: 0x1E3D4C55, 4: 0x1E3D4C54}
_MOST_PACKED = 1032  # times as many bytes as gzip's format has room for


def _read_norb(root: Path, train: bool) -> _Part:
    """Read images of two cameras, `[N, 2, H, W]`, and their categories."""
    files = _NORB_FILES[:2] if train else _NORB_FILES[2:]
    images = _read_matrix(root / _NORB / files[0], np.dtype(np.uint8), ndim=4)
    labels = _read_matrix(root / _NORB / files[1], np.dtype("<i4"), ndim=1)
    if images.shape[1] != 2:
        raise ValueError(f"{files[0]} has images of {images.shape[1]} cameras, not of 2")
    return images, labels, list(_NORB_CLASSES)


def _read_matrix(path: Path, dtype: np.dtype, ndim: int) -> np.ndarray:
    """Read a matrix in NORB's format, packed by gzip or not, of a type and so many dimensions.

    The format: the type's magic number, the number of dimensions and each of them (three at least), all in 4 bytes,
    lowest first; then the elements.
    """
    is_packed = not path.is_file()
    path = _packed(path) if is_packed else path
    with gzip.open(path) if is_packed else open(path, "rb") as file:
        start = file.read(8)
        if start != struct.pack("<Ii", _NORB_MAGIC[dtype.itemsize], ndim):
            raise ValueError(
                f"{path.name} begins with {start.hex()}, not with a matrix of {ndim} dimensions of {dtype}"
            )
        shape = struct.unpack(f"<{max(3, ndim)}i", file.read(4 * max(3, ndim)))[:ndim]
        offset, size = 8 + 4 * max(3, ndim), math.prod(shape) * dtype.itemsize
        room = os.path.getsize(path) * (_MOST_PACKED if is_packed else 1)
        if min(shape) < 1 or size + offset > room:
            raise ValueError(f"{path.name} has too few bytes for {'x'.join(map(str, shape))} elements")
        if not is_packed and size + offset == room:  # pages are read when they are asked for
            return np.memmap(path, dtype, "c", offset, shape)
        content = file.read(size + 1)
    if len(content) != size:
        raise ValueError(f"{path.name} has not just the bytes of {'x'.join(map(str, shape))} elements")
    return np.frombuffer(bytearray(content), dtype).reshape(shape)


def _of_mnist(class_name: str) -> BinarySet:
    return BinarySet(
        (_Form(f"{class_name}/raw", _MNIST_FILES, partial(_read_mnist, class_name)),),
        download=partial(_download, class_name),
    )


def _of_cifar(class_name: str, python: _Form, *binary: Any) -> BinarySet:
    folder, train_files, test_file, names_file, _ = binary
    form = _Form(folder, (*train_files, test_file, names_file), partial(_read_cifar_binary, *binary))
    return BinarySet((form, python), download=partial(_download, class_name))


def _download(class_name: str, root: Path) -> None:
    getattr(torchvision.datasets, class_name)(root, download=True)


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))

BINARY_SETS = {
    "mnist": _of_mnist("MNIST"),
    "fashion_mnist": _of_mnist("FashionMNIST"),
    # The binary versions first, which hold no pickles.
    "cifar10": _of_cifar(
        "CIFAR10",
        _Form("cifar-10-batches-py", (*_BATCHES, "test_batch", "batches.meta"), partial(_read_cifar, "CIFAR10")),
        "cifar-10-batches-bin",
        tuple(f"{batch}.bin" for batch in _BATCHES),
        "test_batch.bin",
        "batches.meta.txt",
        1,
    ),
    "cifar100": _of_cifar(
        "CIFAR100",
        _Form("cifar-100-python", ("train", "test", "meta"), partial(_read_cifar, "CIFAR100")),
        "cifar-100-binary",
        ("train.bin",),
        "test.bin",
        "fine_label_names.txt",
        2,  # the coarse label and the fine one
    ),
    "svhn": BinarySet(
        (_Form("SVHN", ("train_32x32.mat", "test_32x32.mat"), _read_svhn),), download=_download_svhn, needs="scipy"
    ),
    # Hinton, Sabour and Frosst 2018, section 4: both cameras, downsampled to 48x48.
    _NORB: BinarySet(
        (_Form(_NORB, _NORB_FILES, _read_norb, may_be_packed=True),),
        img_size=(48, 48),
        origin="https://cs.nyu.edu/~ylclab/data/norb-v1.0-small",
    ),
}
