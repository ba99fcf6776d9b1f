"""Where data sets come from: scikit-learn, binary files, folders of images, timm and Hugging Face.

`_KNOWN`, at the end, is the table of the names, and `_kind_of` the one place that tells what a name stands for.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import create_dataset
from torch import Tensor

from capszoo.errors import DataError, UsageError, one_line

from .binaries import open_binary_set
from .composed import move_digits, pair_digits
from .decoding import Size, sizes_differ, to_uint8
from .folders import image_folder
from .loader import Split
from .readers import ArrayReader, Source, TimmReader, check_channels
from .splits import stratified


class Request(NamedTuple):
    """What is asked for of a data set; the fields are arguments of :func:`capszoo.data.load_data`."""

    name: str
    data_dir: str | os.PathLike | None
    download: bool = False
    img_size: Size | None = None
    in_chans: int | None = None
    follow_links: bool = False


class _Kind(NamedTuple):
    """How a data set is opened, whether it is looked for in `data_dir`, and how far its images are shifted."""

    open: Callable[[Request], Source]
    in_data_dir: bool = True
    translate: int = 0


def list_datasets() -> list[str]:
    """Return the names that `load_data` knows by itself."""
    return list(_KNOWN)


def default_translate(name: str | os.PathLike) -> int:
    """Random shift of training images in pixels, by default.

    FasTrCaps shifts the grey 28x28 sets by 2, colour images of 32x32 are shifted by 4, and `mnist_affine` places its
    digits anywhere on the canvas. Other sets get none.
    """
    return _KNOWN[str(name)].translate if str(name) in _KNOWN else 0


def check_data_dir(dataset: str | None, data_dir: str | os.PathLike) -> None:
    """Refuse a folder that a data set does not use.

    Raises:
        UsageError: If one is given.
    """
    if str(data_dir) != "data" and dataset and not uses_data_dir(dataset):
        raise UsageError(
            f"--data-dir {str(data_dir)!r} is not used by the data set {dataset!r}: leave it out, or give "
            f"--dataset {data_dir} for the images in it"
        )


def uses_data_dir(name: str | os.PathLike) -> bool:
    """Whether a data set is looked for in the `data_dir` of :func:`capszoo.data.load_data`."""
    kind = _kind_of(os.fspath(name))
    return kind is None or kind.in_data_dir


def open_source(request: Request) -> Source:
    """Open the data set of a name.

    Raises:
        DataError: As :func:`capszoo.data.load_data`.
    """
    kind, name = _kind_of(request.name), request.name
    if kind is not None:
        return kind.open(request)
    prefix, _, rest = name.partition("/")
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


def _kind_of(name: str) -> _Kind | None:
    prefix, _, rest = name.partition("/")
    if name in _KNOWN:
        return _KNOWN[name]
    if prefix == "folder" or name in ("torch/folder", "torch/image_folder"):
        return _Kind(_folder)
    if os.path.isdir(name):
        return _Kind(_folder, in_data_dir=False)
    if prefix.lower() in ("torch", "hfds") and rest:
        return _Kind(_timm)
    return None


def _folder(request: Request) -> Source:
    """The folder of a path, `folder/PATH` below the data folder, or the data folder itself (`torch/folder`)."""
    name, (prefix, _, rest) = request.name, request.name.partition("/")
    path = Path(name)
    if prefix == "folder" or name in ("torch/folder", "torch/image_folder"):
        path = Path(request.data_dir or "", rest if prefix == "folder" else "")
    check_channels(request.in_chans, 3)
    class_names, parts = image_folder(path, request.img_size, request.in_chans, request.follow_links)
    return Source(class_names, parts["train"], parts["test"], parts.get("val"))


def _digits(request: Request) -> Source:
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
    train, held_out = (
        (ArrayReader(images[rows], request.img_size, request.in_chans), labels[rows]) for rows in (~test, test)
    )
    return Source([str(label) for label in digits.target_names], train, held_out)


def _binary(request: Request) -> Source:
    name, data_dir, download, img_size, in_chans, _ = request
    return open_binary_set(name, Path(data_dir or "data"), download, img_size, in_chans)


def _composed(compose: Callable[..., Split], request: Request) -> Source:
    """Digits of MNIST in their own size, to be composed once they are split."""
    source = _binary(request._replace(name="mnist", img_size=None, in_chans=None))
    check_channels(request.in_chans, 1)
    source.compose = partial(compose, img_size=request.img_size, in_chans=request.in_chans)
    return source


def _timm(request: Request) -> Source:
    name, data_dir, download, img_size, in_chans, _ = request
    check_channels(in_chans, 3)
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


_KNOWN = {
    "digits": _Kind(_digits, in_data_dir=False, translate=2),
    "mnist": _Kind(_binary, translate=2),
    "fashion_mnist": _Kind(_binary, translate=2),
    "cifar10": _Kind(_binary, translate=4),
    "cifar100": _Kind(_binary, translate=4),
    "svhn": _Kind(_binary),
    "small_norb": _Kind(_binary),
    "multi_mnist": _Kind(partial(_composed, pair_digits)),
    "mnist_affine": _Kind(partial(_composed, move_digits), translate=6),
}
