"""Data sets by name: pixels in [0, 1], normalised if asked, a validation split taken from the training set.

The test set is for reporting only; whatever is chosen (an epoch, a policy, a pruning ratio) is chosen on the validation
split. `digits` comes with scikit-learn, so it needs no download; the other names are torchvision's, a folder of images
is read as it is, and `torch/...` and `hfds/...` go through timm.
"""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.layers import to_2tuple
from torch import Tensor

from capszoo.errors import DataError, one_line

from .decoding import Size
from .folders import test_folder
from .loader import Loader
from .readers import Reader, Source
from .sources import Request, default_translate, list_datasets, open_source
from .splits import DataSplits, Split, stratified

_logger = logging.getLogger(__name__)

VAL_FRACTION = 0.1
_MAX_BYTES = 4 << 30

__all__ = [
    "DataError",
    "DataSplits",
    "Loader",
    "Split",
    "default_translate",
    "list_datasets",
    "load_data",
    "load_test_folder",
]


def load_data(
    name: str | os.PathLike,
    data_dir: str | os.PathLike | None = None,
    *,
    img_size: int | Size | None = None,
    in_chans: int | None = None,
    val_fraction: float = VAL_FRACTION,
    seed: int = 0,
    download: bool = False,
    follow_links: bool = False,
    max_bytes: int = _MAX_BYTES,
) -> DataSplits:
    """Load a data set.

    Args:
        name: One of `list_datasets()`; an image folder, as a path or as `folder/<path below data_dir>`; or timm's name
            of a torchvision (`torch/kmnist`) or Hugging Face (`hfds/user/set`) data set. An image folder holds
            `train/<class>/<image>` and `test/<class>/<image>`. `val` or `validation` takes the place of a missing
            `test`; beside `test` it is the validation split, and then none is taken from the training images. With a
            `labels.csv` in each of them images may show several classes, see :func:`capszoo.data.folders.image_folder`.
        data_dir: Folder with the data: by default `data` for torchvision's sets, Hugging Face's cache for its own, and
            the working directory for an image folder.
        img_size: Height and width to resize images to (bilinear, antialiased), or one number for both. By default
            images keep their size, which must then be the same for all.
        in_chans: 1 for grey or 3 for colour; by default what the images are. Stereo images, such as those of
            `small_norb`, have 2, of which 1 takes the first.
        val_fraction: Part of the training images that becomes the validation split, each class in proportion as far as
            whole images allow (a log line names classes that get none); 0 for no validation split.
        seed: Decides which images those are.
        download: Download what is missing, where torchvision or timm can.
        follow_links: Read what links out of an image folder lead to.
        max_bytes: A data set whose images together take more is not held in memory but read while it is used.

    Returns:
        The splits, images as uint8 `[N, C, H, W]`; `Loader` makes batches of them.

    Raises:
        DataError: An unknown name, a folder without the data, damaged files, an argument out of range.
    """
    name = os.fspath(name)
    if not name:
        raise DataError(f"no data set is named: give one of {', '.join(list_datasets())} or the path of a folder")
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction={val_fraction} is out of range: give 0 (no validation split) or more, below 1")
    if seed < 0:
        raise DataError(f"seed={seed} is out of range: give 0 or more")
    if in_chans is not None and in_chans < 1:
        raise DataError(f"in_chans={in_chans} is out of range: give 1 (grey), 2 (stereo) or 3 (colour)")
    if img_size is not None:
        try:
            size = tuple(map(operator.index, to_2tuple(img_size)))
        except TypeError:  # no whole numbers
            size = ()
        if len(size) != 2 or min(size) < 1:
            raise DataError(f"img_size={img_size} is not a size: give one number or (height, width), each 1 or more")
        img_size = size
    try:
        source = open_source(Request(name, data_dir, download, img_size, in_chans, follow_links))
        return _make_splits(name, source, val_fraction, seed, max_bytes)
    except OSError as error:
        raise DataError(
            f"data set {name!r} cannot be read ({one_line(error)}): check the path and who may read it"
        ) from error


def _make_splits(name: str, source: Source, val_fraction: float, seed: int, max_bytes: int) -> DataSplits:
    image_shape = source.train[0].image_shape
    count = sum(len(part[1]) for part in (source.train, source.val, source.test) if part)
    in_memory = count * int(np.prod(image_shape)) <= max_bytes or source.compose is not None
    split = partial(_split, in_memory=in_memory)
    if source.val is not None and val_fraction not in (0, VAL_FRACTION):
        _logger.warning(
            f"data set {name!r} has validation images of its own: val_fraction {val_fraction} has no effect"
        )
    if source.val is not None and not val_fraction:
        _logger.warning(f"the validation images of data set {name!r} are not used, as val_fraction is 0")

    val = None
    labels = source.train[1]
    if val_fraction and source.val is None:
        held_out = stratified(labels, max(1, round(len(labels) * val_fraction)), seed)
        if len(held_out) == 0:
            raise DataError(f"data set {name!r} has no training image to spare for validation: give val_fraction 0")
        kept = torch.ones(len(labels), dtype=torch.bool)
        kept[held_out] = False
        train, val = split(source.train, kept.nonzero().flatten(), held_out)
    else:
        (train,) = split(source.train, torch.arange(len(labels)))
        if val_fraction and source.val is not None:
            (val,) = split(source.val, torch.arange(len(source.val[1])))
    if val is not None:
        remedy = "give a larger --val-fraction, or a val folder that has them"
        if source.val is not None:
            remedy = "add images of them to the val folder"
        _warn_of_missing_classes(name, source.class_names, train.labels, val.labels, remedy)
    (test,) = split(source.test, torch.arange(len(source.test[1])))
    num_classes = len(source.class_names)
    if source.compose is not None:
        train = source.compose(train, "train", num_classes, seed)
        test = source.compose(test, "test", num_classes, seed)
        val = None if val is None else source.compose(val, "val", num_classes, seed)
        image_shape = train.image_shape
    return DataSplits(name, train, val, test, source.class_names, num_classes, image_shape[0], image_shape[1:])


def _split(part: tuple[Reader, Tensor], *selections: Tensor, in_memory: bool) -> list[Split]:
    reader, labels = part
    if not in_memory:
        return [Split(labels[rows], reader=reader, indices=rows) for rows in selections]
    images = _read_all(reader)
    return [Split(labels[rows], images[rows]) for rows in selections]


def load_test_folder(
    folder: str | os.PathLike,
    class_names: Sequence[str],
    img_size: Size,
    in_chans: int,
    *,
    follow_links: bool = False,
    max_bytes: int = _MAX_BYTES,
) -> Split | None:
    """Load the test images alone of a folder, by the classes of trained weights; None for a folder of another layout.

    Args:
        folder: The folder.
        class_names: The classes, in the order of the labels.
        img_size: Height and width to resize images to.
        in_chans: 1 for grey or 3 for colour.
        follow_links: Read what links out of the folder lead to.
        max_bytes: As in :func:`load_data`.

    Raises:
        DataError: As :func:`load_data`, and for a class that is not among them.
    """
    try:
        part = test_folder(Path(folder), class_names, img_size, in_chans, follow_links)
        if part is None:
            return None
        reader, labels = part
        in_memory = len(labels) * int(np.prod(reader.image_shape)) <= max_bytes
        return _split(part, torch.arange(len(labels)), in_memory=in_memory)[0]
    except OSError as error:
        raise DataError(
            f"folder {str(folder)!r} cannot be read ({one_line(error)}): check the path and who may read it"
        ) from error


def _warn_of_missing_classes(name: str, class_names: list[str], train: Tensor, val: Tensor, remedy: str) -> None:
    """Say which classes have training images, but none in the validation split: nothing is chosen by their accuracy."""
    train_counts, val_counts = (_count_classes(labels, len(class_names)) for labels in (train, val))
    missing = ((train_counts > 0) & (val_counts == 0)).nonzero().flatten().tolist()
    if missing:
        named = ", ".join(repr(class_names[label]) for label in missing[:10]) + (", ..." if len(missing) > 10 else "")
        _logger.warning(
            f"the validation split of data set {name!r} has no image of {len(missing)} of {len(class_names)} classes "
            f"({named}): {remedy}"
        )


def _count_classes(labels: Tensor, num_classes: int) -> Tensor:
    """Number of images of each class, int64 `[J]`."""
    return labels.long().sum(dim=0) if labels.ndim == 2 else torch.bincount(labels, minlength=num_classes)


def _read_all(reader: Reader) -> Tensor:
    """Return all images of `reader`, uint8 `[N, C, H, W]`."""
    images = torch.empty(len(reader), *reader.image_shape, dtype=torch.uint8)

    def fill(begin: int) -> None:
        rows = range(begin, min(begin + 256, len(reader)))
        images[rows.start : rows.stop] = reader.read(rows)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding and resizing release the GIL
        list(pool.map(fill, range(0, len(reader), 256)))
    return images
