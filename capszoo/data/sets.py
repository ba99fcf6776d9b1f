"""Data sets by name: pixels in [0, 1], normalised if asked, a validation split taken from the training set.

The test set is for reporting only; whatever is chosen (an epoch, a policy, a pruning ratio) is chosen on the validation
split. `digits` comes with scikit-learn, so it needs no download; the other names are torchvision's, a folder of images
is read as it is, and `torch/...` and `hfds/...` go through timm.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import math
import operator
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from timm.data import create_dataset
from timm.layers import to_2tuple
from torch import Tensor
from torchvision.datasets.mnist import read_image_file, read_label_file

from capszoo.data.loader import Loader, Split, seeded_generator
from capszoo.data.readers import ArrayReader, Reader, Size, TimmReader, image_folder, sizes_differ, to_uint8
from capszoo.errors import DataError, one_line

_logger = logging.getLogger(__name__)

__all__ = ["DataError", "DataSplits", "Loader", "Split", "default_translate", "list_datasets", "load_data"]

_MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
# name: class in torchvision.datasets, folder and files below the data folder
_TORCHVISION = {
    "mnist": ("MNIST", "MNIST/raw", _MNIST_FILES),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", _MNIST_FILES),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", _CIFAR_FILES),
}

# Mean and standard deviation over so many images are those of all to a percent or so.
_STATISTICS_IMAGES = 2048


@dataclass
class DataSplits:
    """A data set.

    Args:
        name: The name it was asked for by.
        train: Training images, without those of `val`.
        val: Validation images, or None.
        test: Test images, for reporting only.
        class_names: Name of each class, in the order of the labels.
        num_classes: How many there are.
        in_chans: Channels of an image, 1 or 3.
        img_size: Height and width of an image.
    """

    name: str
    train: Split
    val: Split | None
    test: Split
    class_names: list[str]
    num_classes: int
    in_chans: int
    img_size: Size

    @property
    def multi_label(self) -> bool:
        """Whether an image may show several classes or none; its label is then 0 or 1 for each, float32 `[J]`."""
        return self.train.multi_label

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the training images by channel, of pixels in [0, 1].

        Of a set that is read while it is used, those of some thousand images. A channel of one value has 1 as its
        standard deviation.
        """
        train = self.train
        images = train.images
        if images is None:
            assert train.reader is not None and train.indices is not None
            some = torch.randperm(len(train), generator=seeded_generator(0))[:_STATISTICS_IMAGES].sort().values
            images = train.reader.read(train.indices[some].tolist())
        values = torch.arange(256, dtype=torch.float64, device="cpu") / 255
        mean, std = [], []
        for channel in images.unbind(1):
            share = torch.bincount(channel.flatten(), minlength=256).double().cpu() / channel.numel()
            mean.append(float(share @ values))
            std.append(float((share @ (values - mean[-1]).square()).sqrt()) or 1.0)
        return tuple(mean), tuple(std)

    def normalize(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Have loaders of all splits give images less `mean`, divided by `std`.

        Args:
            mean: One number a channel, or one for all.
            std: Likewise, above 0.

        Raises:
            DataError: If their number or a value is not possible.
        """
        mean, std = (tuple(float(value) for value in values) for values in (mean, std))
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, self.in_chans):
                raise DataError(
                    f"{name} has {len(values)} numbers, images have {self.in_chans} channels: give 1 or {self.in_chans}"
                )
            if not all(math.isfinite(value) and (name == "mean" or value > 0) for value in values):
                wanted = "finite numbers" + (" above 0" if name == "std" else "")
                raise DataError(f"{name}={' '.join(map(str, values))} is out of range: give {wanted}")
        for split in (self.train, self.val, self.test):
            if split is not None:
                split.mean, split.std = mean, std


def list_datasets() -> list[str]:
    """Return the names that `load_data` knows by itself."""
    return ["digits", *_TORCHVISION]


def default_translate(name: str | os.PathLike) -> int:
    """Random shift of training images in pixels: FasTrCaps shifts the grey 28x28 sets by 2, other sets get none."""
    return {"digits": 2, "mnist": 2, "fashion_mnist": 2, "cifar10": 4}.get(str(name), 0)


def load_data(
    name: str | os.PathLike,
    data_dir: str | os.PathLike | None = None,
    *,
    img_size: int | Size | None = None,
    in_chans: int | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    download: bool = False,
    max_bytes: int = 4 << 30,
) -> DataSplits:
    """Load a data set.

    Args:
        name: One of `list_datasets()`; an image folder, as a path or as `folder/<path below data_dir>`; or timm's name
            of a torchvision (`torch/kmnist`) or Hugging Face (`hfds/user/set`) data set. An image folder holds
            `train/<class>/<image>` and `test/<class>/<image>`. `val` or `validation` takes the place of a missing
            `test`; beside `test` it is the validation split, and then none is taken from the training images. With a
            `labels.csv` in each of them images may show several classes, see :func:`capszoo.data.readers.image_folder`.
        data_dir: Folder with the data: by default `data` for torchvision's sets, Hugging Face's cache for its own, and
            the working directory for an image folder.
        img_size: Height and width to resize images to (bilinear, antialiased), or one number for both. By default
            images keep their size, which must then be the same for all.
        in_chans: 1 for grey or 3 for colour; by default what the images are.
        val_fraction: Part of the training images that becomes the validation split, each class in proportion as far as
            whole images allow (a log line names classes that get none); 0 for no validation split.
        seed: Decides which images those are.
        download: Download what is missing, where torchvision or timm can.
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
    if in_chans not in (None, 1, 3):
        raise DataError(f"in_chans={in_chans} is not supported: give 1 (grey) or 3 (colour)")
    if img_size is not None:
        try:
            size = tuple(map(operator.index, to_2tuple(img_size)))
        except TypeError:  # no whole numbers
            size = ()
        if len(size) != 2 or min(size) < 1:
            raise DataError(f"img_size={img_size} is not a size: give one number or (height, width), each 1 or more")
        img_size = size
    try:
        source = _open(name, data_dir, download, img_size, in_chans)
        return _make_splits(name, source, val_fraction, seed, max_bytes)
    except OSError as error:
        raise DataError(
            f"data set {name!r} cannot be read ({one_line(error)}): check the path and who may read it"
        ) from error


@dataclass
class _Source:
    """A data set before it is split: readers, and the labels of their images (int64 `[N]` or float32 `[N, J]`)."""

    class_names: list[str]
    train: tuple[Reader, Tensor]
    test: tuple[Reader, Tensor]
    val: tuple[Reader, Tensor] | None = None


def _open(
    name: str, data_dir: str | os.PathLike | None, download: bool, img_size: Size | None, in_chans: int | None
) -> _Source:
    prefix, _, rest = name.partition("/")
    if name == "digits":
        return _digits(img_size, in_chans)
    if name in _TORCHVISION:
        return _torchvision(name, Path(data_dir or "data"), download, img_size, in_chans)
    if prefix == "folder" or name in ("torch/folder", "torch/image_folder"):
        class_names, parts = image_folder(Path(data_dir or "", rest if prefix == "folder" else ""), img_size, in_chans)
        return _Source(class_names, **parts)
    if os.path.isdir(name):
        class_names, parts = image_folder(Path(name), img_size, in_chans)
        return _Source(class_names, **parts)
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


def _make_splits(name: str, source: _Source, val_fraction: float, seed: int, max_bytes: int) -> DataSplits:
    image_shape = source.train[0].image_shape
    count = sum(len(part[1]) for part in (source.train, source.val, source.test) if part)
    in_memory = count * int(np.prod(image_shape)) <= max_bytes

    def split(part: tuple[Reader, Tensor], *selections: Tensor) -> list[Split]:
        reader, labels = part
        if not in_memory:
            return [Split(labels[rows], reader=reader, indices=rows) for rows in selections]
        images = _read_all(reader)
        return [Split(labels[rows], images[rows]) for rows in selections]

    val = None
    labels = source.train[1]
    if val_fraction and source.val is None:
        held_out = _stratified(labels, max(1, round(len(labels) * val_fraction)), seed)
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
    return DataSplits(
        name, train, val, test, source.class_names, len(source.class_names), image_shape[0], image_shape[1:]
    )


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


def _stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """Choose `count` images, each class in proportion (largest remainder), leaving one of each class at least.

    Args:
        labels: int64 `[N]`, or 0 and 1 `[N, J]`, see :func:`_stratified_by_sets`.
        count: How many; fewer are chosen if the classes have no more to spare.
        seed: Decides which.

    Returns:
        int64 `[count]`, ascending.
    """
    generator = seeded_generator(seed)
    if labels.ndim == 2:
        return _stratified_by_sets(labels, count, generator)
    present = torch.bincount(labels).double()
    spare = (present - 1).clamp(min=0)
    exact = present * count / len(labels)
    quota = exact.floor().minimum(spare)
    while quota.sum() < count and (quota < spare).any():
        quota[torch.where(quota < spare, exact - quota, -torch.inf).argmax()] += 1
    chosen = []
    for label, share in enumerate(quota.long().tolist()):
        members = (labels == label).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:share]])
    return torch.cat(chosen).sort().values


def _stratified_by_sets(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Choose `count` images that each show a set of classes, so that each class is there in proportion.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011): class by class, the one with the fewest images
    left first, each of its images goes to that part, chosen or kept, which lacks most images of the class. Images that
    show nothing come last, and make up the number.

    Args:
        labels: 0 and 1 `[N, J]`.
        count: How many; fewer are chosen if the classes have no more to spare.
        generator: Draws the order of the images.

    Returns:
        int64 `[count]`, ascending.
    """
    labels = torch.cat([labels > 0, (labels == 0).all(dim=1, keepdim=True)], dim=1)
    shown = [row.nonzero().flatten().tolist() for row in labels]
    images_of: list[list[int]] = [[] for _ in range(labels.shape[1])]
    for image in torch.randperm(len(labels), generator=generator).tolist():
        for label in shown[image]:
            images_of[label].append(image)
    left = list(map(len, images_of))
    lacking = [number * count / len(labels) for number in left]  # of each class, among the chosen ones
    kept_of = [0] * len(left)
    chosen: set[int] = set()
    kept: dict[int, None] = {}  # in the order in which they were placed

    def share_out(label: int) -> None:
        for image in images_of[label]:
            if image in chosen or image in kept:
                continue
            # What the other part lacks is the rest of the images that are left; the last of a class is never chosen.
            wanted = lacking[label] > left[label] - lacking[label] and len(chosen) < count
            if wanted and all(kept_of[other] + left[other] > 1 for other in shown[image]):
                chosen.add(image)
            else:
                kept[image] = None
            for other in shown[image]:
                left[other] -= 1
                lacking[other] -= image in chosen
                kept_of[other] += image in kept

    while any(left[:-1]):
        share_out(min((label for label, number in enumerate(left[:-1]) if number), key=left.__getitem__))
    share_out(-1)
    for image in reversed(kept):  # those of no class, and of the most frequent ones
        if len(chosen) < count and all(kept_of[other] > 1 for other in shown[image]):
            chosen.add(image)
            for other in shown[image]:
                kept_of[other] -= 1
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def _read_all(reader: Reader) -> Tensor:
    """Return all images of `reader`, uint8 `[N, C, H, W]`."""
    images = torch.empty(len(reader), *reader.image_shape, dtype=torch.uint8)

    def fill(begin: int) -> None:
        rows = range(begin, min(begin + 256, len(reader)))
        images[rows.start : rows.stop] = reader.read(rows)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding and resizing release the GIL
        list(pool.map(fill, range(0, len(reader), 256)))
    return images


def _digits(img_size: Size | None, in_chans: int | None) -> _Source:
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
    test[_stratified(labels, 360, 0)] = True
    parts = [(ArrayReader(images[rows], img_size, in_chans), labels[rows]) for rows in (~test, test)]
    return _Source([str(label) for label in digits.target_names], *parts)


def _torchvision(name: str, root: Path, download: bool, img_size: Size | None, in_chans: int | None) -> _Source:
    class_name, folder, files = _TORCHVISION[name]
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
            if class_name == "CIFAR10":
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
    return _Source(class_names, *parts)


def _timm(
    name: str, data_dir: str | os.PathLike | None, download: bool, img_size: Size | None, in_chans: int | None
) -> _Source:
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
    return _Source(class_names, (reader, train_labels), (test_reader, test_labels))


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
