"""Data sets composed of the digits of another: overlapping pairs, and digits moved about a larger canvas.

They are made anew from MNIST each time, by a seed, after it has been split: the digits of the validation split and of
the test set are in no training image.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from capszoo.errors import DataError

from .affine import draw_affine, sample_affine
from .decoding import Size, to_uint8
from .readers import ArrayReader
from .seeding import seeded_generator
from .splits import Split

__all__ = ["move_digits", "pair_digits"]

_logger = logging.getLogger(__name__)

# MultiMNIST (Sabour, Frosst and Hinton 2017, section 6): shifts of up to 4 pixels each way make 28x28 digits 36x36.
MOST_SHIFTED = 4
# The canvas of the affine variant of MNIST, on which they trained with digits at random places (section 5.1).
CANVAS = 40
_PARTS = ("train", "val", "test")
_CHUNK = 2048


def pair_digits(
    split: Split,
    part: str,
    num_classes: int,
    seed: int = 0,
    img_size: Size | None = None,
    in_chans: int | None = None,
    pairs_per_image: int = 1,
) -> Split:
    """Overlay each image with one of another class, as MultiMNIST does (Sabour, Frosst and Hinton 2017, section 6).

    Both are shifted by up to 4 pixels each way along both axes and added up, to 255 at most, as the paper's code does.
    The paper has a thousand pairs of each digit.

    Args:
        split: Images in memory with one class each.
        part: "train", "val" or "test", which draw differently.
        num_classes: J.
        seed: Decides partners and shifts.
        img_size: The size to give the pairs; by default 8 pixels more than the images'.
        in_chans: The channels to give them; by default their own.
        pairs_per_image: How often each image is the first of a pair.

    Returns:
        The pairs, with 1 for each of their two classes as labels, float32 `[N, J]`, and the two shifted images, in the
        order of their classes, as `parts`.

    Raises:
        DataError: If all images are of one class.
    """
    images, labels = split.images, split.labels.repeat(pairs_per_image)
    assert images is not None
    generator = seeded_generator(seed, 2, _PARTS.index(part))
    # The partner is drawn from the images in the order of their classes, without those of the first one's class.
    order = split.labels.argsort(stable=True)
    counts = torch.bincount(split.labels, minlength=num_classes)
    others = len(images) - counts[labels]
    if (others == 0).any():
        raise DataError("all images are of one class, and pairs are made of two: use other images")
    place = torch.randint(1 << 62, labels.shape, generator=generator) % others
    first_of_class = (counts.cumsum(0) - counts)[labels]
    partner = order[torch.where(place < first_of_class, place, place + counts[labels])]

    height, width = images.shape[2] + 2 * MOST_SHIFTED, images.shape[3] + 2 * MOST_SHIFTED
    places = torch.randint(2 * MOST_SHIFTED + 1, (2, len(labels), 2), generator=generator)
    firsts = torch.arange(len(images)).repeat(pairs_per_image)
    digits = [_place(images[rows], places[i], (height, width)) for i, rows in enumerate((firsts, partner))]
    merged = digits[0] + torch.minimum(digits[1], 255 - digits[0])  # a sum of uint8 would wrap
    swap = (labels > split.labels[partner])[:, None, None, None, None]
    parts = torch.stack(digits, dim=1)
    parts = torch.where(swap, parts.flip(1), parts)
    present = torch.zeros(len(labels), num_classes)
    present.scatter_(1, torch.stack([labels, split.labels[partner]], dim=1), 1.0)
    merged = _fit(merged, img_size, in_chans)
    return Split(present, merged, parts=_fit(parts.flatten(0, 1), img_size, in_chans).unflatten(0, (-1, 2)))


def move_digits(
    split: Split,
    part: str,
    num_classes: int,
    seed: int = 0,
    img_size: Size | None = None,
    in_chans: int | None = None,
) -> Split:
    """Put digits on a canvas of 40x40: in its middle, at a random place, or changed by a random affine transformation.

    Those of the training set are in the middle, from where the loader shifts each by up to 6 pixels each way, anew in
    every epoch; those of the validation split are at random places. Neither knows other transformations, and those of
    the test set are rotated, sheared and stretched by the published ranges (`capszoo.data.affine`), at a random
    place of those where the whole digit is on the canvas. It is the protocol of Sabour, Frosst and Hinton 2017, section
    5.1, with test images of our own.

    Args:
        split: Images in memory, of 40x40 at most.
        part: "train", "val" or "test".
        num_classes: Not used: labels stay.
        seed: Decides the places and transformations.
        img_size: The size to give the results; by default 40x40.
        in_chans: The channels to give them; by default their own.
    """
    images = split.images
    assert images is not None
    generator = seeded_generator(seed, 3, _PARTS.index(part))
    rooms = torch.tensor([CANVAS - side for side in images.shape[2:]])
    if part == "test":
        moved = _transform(images, generator)
    else:
        places = (rooms // 2).expand(len(images), 2)
        if part == "val":
            draws = [torch.randint(int(room) + 1, (len(images),), generator=generator) for room in rooms]
            places = torch.stack(draws, dim=1)
        moved = _place(images, places, (CANVAS, CANVAS))
    if part == "test" and img_size not in (None, (CANVAS, CANVAS)):
        _logger.warning(
            f"digits on a canvas of {CANVAS}x{CANVAS} are resized to {img_size[0]}x{img_size[1]}, so they are not as "
            f"large as MNIST's: train a model of {CANVAS}x{CANVAS} on them, or measure one of MNIST by --robustness"
        )
    return Split(split.labels, _fit(moved, img_size, in_chans))


def _fit(images: Tensor, img_size: Size | None, in_chans: int | None) -> Tensor:
    reader = ArrayReader(images, img_size, in_chans)
    if reader.image_shape == tuple(images.shape[1:]):
        return images
    rows = range(len(images))
    return torch.cat([reader.read(rows[begin : begin + _CHUNK]) for begin in range(0, len(images), _CHUNK)])


def _place(images: Tensor, places: Tensor, size: Size) -> Tensor:
    """Put images on black ones of a size, each so many pixels down and to the right (int64 `[N, 2]`)."""
    canvas = images.new_zeros(*images.shape[:2], *size)
    height, width = images.shape[2:]
    for down, right in places.unique(dim=0).tolist():
        rows = ((places[:, 0] == down) & (places[:, 1] == right)).nonzero().flatten()
        canvas[rows, :, down : down + height, right : right + width] = images[rows]
    return canvas


def _transform(images: Tensor, generator: torch.Generator) -> Tensor:
    """Apply random affine transformations that leave all of each digit on the canvas."""
    linear = draw_affine(len(images), generator)
    draws = torch.rand(len(images), 2, dtype=torch.float64, generator=generator)
    results = []
    for some, matrices, draw in zip(images.split(_CHUNK), linear.split(_CHUNK), draws.split(_CHUNK), strict=True):
        low, high = (end * CANVAS / 2 - reach for end, reach in zip((-1, 1), _extent(some, matrices), strict=True))
        shifts = low + (high - low) * draw  # where there is no room, `high` is below `low`, and it lies between
        moved = sample_affine(some.double(), matrices.inverse(), shifts, (CANVAS, CANVAS))
        results.append(to_uint8(moved))
    return torch.cat(results)


def _extent(images: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest place (x, y) `[N, 2]`, from the centre, that a digit reaches when transformed."""
    _, _, height, width = images.shape
    shown = F.pad(images.amax(dim=1) > 0, [1, 1, 1, 1])  # bilinear: a pixel reaches into its neighbours
    shown = F.max_pool2d(shown[:, None].float(), 3, 1, 1)[:, 0].flatten(1) > 0
    y, x = torch.meshgrid(
        *(torch.arange(side + 2, dtype=torch.float64) - (side + 1) / 2 for side in (height, width)), indexing="ij"
    )
    at = linear @ torch.stack([x.flatten(), y.flatten()])  # [N, 2, pixels]
    empty = ~shown.any(dim=1)[:, None]
    low = at.masked_fill(~shown[:, None], torch.inf).amin(dim=2).masked_fill(empty, 0)
    high = at.masked_fill(~shown[:, None], -torch.inf).amax(dim=2).masked_fill(empty, 0)
    return low, high
