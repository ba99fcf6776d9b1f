"""Images by index: out of a tensor, out of the files of an image folder, out of one of timm's data sets.

A reader decodes, converts and resizes an image when it is asked for it, and gives the same pixels whether a data set is
read as a whole or while it is used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from capszoo import _moved
from capszoo.errors import DataError, one_line

from .decoding import Size, decode, from_pil, header, not_an_image, sizes_differ, to_pil, to_uint8

__all__ = ["ArrayReader", "FileReader", "Reader", "Size", "Source", "TimmReader", "sizes_differ", "to_uint8"]

# Channels that images of so many can be given, beside their own.
_OTHER_CHANNELS = {1: (3,), 2: (1,), 3: (1,)}


# What changes each of the images that are read, in the size that they have in their files.
Transforms = Sequence[Callable[[Image.Image], Image.Image]]


class Reader(Protocol):
    """Images by index, decoded and resized when asked for."""

    image_shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], transforms: Transforms | None = None) -> Tensor:
        """Return the images at `indices`, changed by their `transforms`, as uint8 `[len(indices), C, H, W]`."""
        ...


@dataclass
class Source:
    """A data set before it is split: readers, and the labels of their images (int64 `[N]` or float32 `[N, J]`).

    Where the data set is composed of these images, `compose` makes the images of each split, from the split, "train",
    "val" or "test", the number of classes and a seed.
    """

    class_names: list[str]
    train: tuple[Reader, Tensor]
    test: tuple[Reader, Tensor]
    val: tuple[Reader, Tensor] | None = None
    compose: Callable[[Any, str, int, int], Any] | None = None


def check_channels(in_chans: int | None, own: int) -> None:
    """Check that images of `own` channels can be given `in_chans`.

    Raises:
        DataError: If they cannot.
    """
    possible = (own, *_OTHER_CHANNELS.get(own, ()))
    if in_chans is not None and in_chans not in possible:
        raise DataError(
            f"in_chans={in_chans} is not possible for images of {own} channel{'s' * (own > 1)}: give "
            + " or ".join(map(str, possible))
        )


class ArrayReader:
    """Images out of one uint8 tensor `[N, C, H, W]`.

    Args:
        images: The images.
        img_size: The size to give them; by default their own.
        in_chans: The channels to give them; by default their own. Grey ones may get 3, colour ones 1, and of the two of
            a stereo camera the first may be taken.

    Raises:
        DataError: If they cannot be given so many channels.
    """

    def __init__(self, images: Tensor, img_size: Size | None = None, in_chans: int | None = None):
        check_channels(in_chans, images.shape[1])
        self.images = images
        self.image_shape = (in_chans or images.shape[1], *(img_size or images.shape[2:]))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int], transforms: Transforms | None = None) -> Tensor:
        images = self.images[list(indices)]
        channels, *size = self.image_shape
        if channels == 1 and images.shape[1] == 3:  # ITU-R 601-2, as PIL's "L"
            images = (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        elif channels == 1:
            images = images[:, :1]
        if list(images.shape[2:]) != size:
            images = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
        images = to_uint8(images).expand(-1, channels, -1, -1).contiguous()
        if transforms is not None:
            changed = [transform(to_pil(image)) for transform, image in zip(transforms, images, strict=True)]
            images = torch.stack([from_pil(image) for image in changed])
        return images


class FileReader:
    """Images out of files.

    Args:
        paths: The files.
        image_shape: Channels (1 or 3), height and width to give them.
    """

    def __init__(self, paths: list[Path], image_shape: tuple[int, int, int]):
        self.paths = paths
        self.image_shape = image_shape

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int], transforms: Transforms | None = None) -> Tensor:
        images = []
        for index, transform in zip(indices, transforms or itertools.repeat(None), strict=False):
            try:
                images.append(decode(self.paths[index], self.image_shape[0], self.image_shape[1:], transform))
            except DataError:  # of a transform
                raise
            except Exception as error:  # PIL's decoders raise anything at damaged files
                raise not_an_image(self.paths[index], error) from error
        return torch.stack(images)


class TimmReader:
    """Images out of one of timm's map-style data sets.

    Args:
        name: Name of the data set, for error messages.
        dataset: What `timm.data.create_dataset` returned.
        img_size: The size to give the images; by default that of the first, which must then be that of all.
        in_chans: The channels to give them, 1 or 3; by default those of the first.
    """

    def __init__(self, name: str, dataset: Any, img_size: Size | None = None, in_chans: int | None = None):
        self.name = name
        # timm's ImageDataset puts the next image in the place of one that cannot be decoded; its reader does not.
        self.items = getattr(dataset, "reader", dataset)
        self.resize = img_size is not None
        try:
            size, grey = header(self.items[0][0])
        except Exception as error:
            raise self._damaged(0, error) from error
        self.image_shape = (in_chans or (1 if grey else 3), *(img_size or size))

    def __len__(self) -> int:
        return len(self.items)

    def read(self, indices: Sequence[int], transforms: Transforms | None = None) -> Tensor:
        channels, size = self.image_shape[0], self.image_shape[1:]
        images = []
        for index, transform in zip(indices, transforms or itertools.repeat(None), strict=False):
            try:
                images.append(decode(self.items[index][0], channels, size if self.resize else None, transform))
            except DataError:
                raise
            except Exception as error:
                raise self._damaged(index, error) from error
            found = images[-1].shape[1], images[-1].shape[2]
            if found != size:
                raise sizes_differ(f"data set {self.name!r}", size, found)
        return torch.stack(images)

    def _damaged(self, index: int, error: Exception) -> DataError:
        return DataError(
            f"image {index} of data set {self.name!r} cannot be decoded ({one_line(error)}): download the set anew"
        )


__getattr__ = _moved.getter(__name__)
