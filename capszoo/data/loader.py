"""Batches of a data set: gathered, augmented, converted and normalised on the device.

A data set that fits lives on the device as one uint8 tensor, zero-padded once by the largest shift. A shifted image is
then a window of that tensor, and a batch is one gather of windows and one division by 255, whatever its size. Where the
split says so, the mean is then subtracted and the rest divided by the standard deviation, as timm's transforms do. The
order, the shifts and whatever else changes images in an epoch are drawn at its start from (seed, epoch) alone and on
the CPU, so every device sees the same images, and any step of any epoch can be recomputed: that is all a run needs to
resume in the middle of an epoch.

A data set that does not fit is read by worker processes in the same order and takes the same path from there on; so
does one whose images must go through PIL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from capszoo.errors import DataError

from .augment import Augmentation
from .batch_transforms import BatchTransforms, Places
from .image_transforms import ImageTransform
from .mixing import Mixing
from .readers import ArrayReader
from .seeding import seeded_generator
from .splits import Split
from .streaming import read_images

__all__ = ["Loader", "Split", "seeded_generator"]

# Images are gathered some hundred at a time and handed out as views: at batch 1 a step then costs 2 us, not 20. The
# second limit keeps such a chunk of large images small; a batch above either limit is a chunk by itself.
_CHUNK_IMAGES = 256
_CHUNK_BYTES = 8 << 20


class Loader:
    """One epoch of batches of a split: images float32 `[B, C, H, W]` and their labels on `device`.

    Images have values in [0, 1], less the split's mean and divided by its standard deviation.

    The batches depend on the split, `batch_size`, `shuffle`, `seed`, `epoch`, `translate` and `augmentation` and on
    nothing else, and the loader can be iterated any number of times. The global random state is never touched, and of a
    split in memory no batch waits for the host, unless images must go through PIL. Batches may be views of one tensor.

    `len(loader)` is the number of batches in the whole epoch, whatever `start_step`; iteration yields
    `len(loader) - start_step` of them.

    Args:
        split: The images.
        batch_size: Images in a batch; the last one holds the rest.
        device: Where batches are made.
        shuffle: Draw a new order for each epoch instead of going through the split from its start.
        seed: Together with `epoch` decides the order, the shifts and the rest of the augmentation.
        epoch: The epoch, from 0.
        start_step: The step to begin with: the batches are those of the whole epoch from that step on.
        translate: Shift each image by up to so many pixels each way along both axes, filling with zeros.
        augmentation: What else changes images at random. Labels of mixed images are weights of the classes, float
            `[B, J]`.
        num_classes: J, needed to mix images.
        share: Numerator and denominator of this process's part of each batch, such as (1, 4) for the second of four;
            parts differ by one image at most, and one may be empty where a batch is smaller than the denominator.
        drop_last: Leave out a last batch that is not full.
        num_workers: Worker processes that read a split that is not in memory, or whose images go through PIL; 0 reads
            in this process.
        channels_last: Make images in channels-last memory format.
        with_parts: Of a split whose images have parts, give these too, as the third of a batch: float32
            `[B, P, C, H, W]` in [0, 1], moved as the image is, not normalised.

    Raises:
        DataError: An argument out of range, at once; an image that cannot be decoded, when its turn comes.
        UsageError: An augmentation that is out of range, or impossible for these images.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        device: torch.device | str,
        *,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        start_step: int = 0,
        translate: int = 0,
        augmentation: Augmentation | None = None,
        num_classes: int | None = None,
        share: tuple[int, int] = (0, 1),
        drop_last: bool = False,
        num_workers: int = 0,
        channels_last: bool = False,
        with_parts: bool = False,
    ):
        for key, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("epoch", epoch, 0),
            ("start_step", start_step, 0),
            ("translate", translate, 0),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise DataError(f"{key}={value} is out of range: give a whole number of {least} or more")
        if batch_size >= 1 << 31:
            raise DataError(f"batch_size={batch_size} is out of range: give a whole number below 2^31")
        height, width = split.image_shape[1:]
        if translate >= min(height, width):
            raise DataError(
                f"translate={translate} can shift a whole {height}x{width} image out of sight: give less than "
                f"{min(height, width)}"
            )
        if augmentation is not None:
            augmentation.check()
            on_disk, has_parts = split.images is None, with_parts and split.parts is not None
            augmentation.check_images(split.image_shape, split.multi_label, on_disk, has_parts)
            if augmentation.mixes and num_classes is None:
                raise DataError("images are to be mixed, and num_classes=None does not say how: give their classes")
        self.split = split
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = epoch
        self.start_step = start_step
        self.translate = translate
        self.augmentation = augmentation
        self.num_classes = num_classes
        self.share = share
        self.drop_last = drop_last
        self.num_workers = num_workers
        self.channels_last = channels_last
        self.with_parts = with_parts and split.parts is not None
        self._mean, self._std = (
            torch.tensor(values, device=self.device).view(-1, 1, 1) for values in (split.mean, split.std)
        )
        self._normalized = (set(split.mean), set(split.std)) != ({0.0}, {1.0})
        if len(self) == 0:
            raise DataError(
                f"no batch of {batch_size} can be made of {len(split)} images with drop_last: give a batch size of "
                f"{len(split)} or less"
            )
        if start_step > len(self):
            raise DataError(f"start_step={start_step} is past the end of an epoch of {len(self)} batches")

    def __len__(self) -> int:
        full, rest = divmod(len(self.split), self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order, offsets = self._draw()
        labels = self.split.labels.cpu()[order].to(self.device)
        transforms, mixing = self._augmentations(order)
        if self.share[1] > 1:
            yield from self._part(order, offsets, labels, transforms, mixing)
            return

        # Chunks are counted from the start of the epoch, not from start_step, so that a batch lies at the same place
        # within its chunk, and thus equally aligned in memory, in a resumed epoch.
        channels, height, width = self.split.image_shape
        most = min(_CHUNK_IMAGES, _CHUNK_BYTES // (4 * channels * height * width))
        steps = max(1, most // self.batch_size)
        size = steps * self.batch_size
        stop = self._stop
        first, skip = divmod(self.start_step, steps)
        chunks = [slice(begin, min(begin + size, stop)) for begin in range(first * size, stop, size)]

        for chunk, gathered in zip(chunks, self._gather(chunks, order, offsets, transforms), strict=True):
            images, *parts = gathered
            targets = labels[chunk]
            if mixing is not None:
                partners = images[(mixing.partners[chunk] - chunk.start).to(self.device)]
                images = self._in_format(mixing.images(images, partners, chunk))
                targets = mixing.targets(labels, chunk)
            batches = zip(*(some.split(self.batch_size) for some in (images, targets, *parts)), strict=True)
            for _ in range(skip):
                next(batches)
            skip = 0
            yield from batches

    def order(self) -> Tensor:
        """Indices of the epoch's images in the split, in the order in which they come: int64 `[N]`."""
        return self._draw()[0]

    @property
    def _stop(self) -> int:
        """The number of images in the epoch."""
        return min(len(self.split), len(self) * self.batch_size)

    def _part(
        self,
        order: Tensor,
        offsets: Tensor,
        labels: Tensor,
        transforms: BatchTransforms | None,
        mixing: Mixing | None,
    ) -> Iterator[tuple[Tensor, ...]]:
        """Yield this process's part of each batch; only its own images are read, and what they are mixed with."""
        part, parts = self.share
        slices = []
        for begin in range(self.start_step * self.batch_size, self._stop, self.batch_size):
            size = min(self.batch_size, self._stop - begin)
            slices.append(slice(begin + size * part // parts, begin + size * (part + 1) // parts))
        filled = [own for own in slices if own.stop > own.start]
        wanted: list[Places] = list(filled)
        if mixing is not None and mixing.enabled:
            wanted = [torch.cat([torch.arange(own.start, own.stop), mixing.partners[own]]) for own in filled]
        gathered = self._gather(wanted, order, offsets, transforms)
        channels, height, width = self.split.image_shape
        nothing = [torch.empty(0, channels, height, width, device=self.device)]
        if self.with_parts:
            assert self.split.parts is not None
            nothing.append(torch.empty(0, *self.split.parts.shape[1:], device=self.device))
        for own in slices:
            images, *rest = next(gathered) if own.stop > own.start else nothing
            if mixing is None:
                yield images, labels[own], *rest
            else:
                count = own.stop - own.start
                images = mixing.images(images[:count], images[len(images) - count :], own)
                yield self._in_format(images), mixing.targets(labels, own)

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Return the epoch's order and, as offsets into a padded image, its shifts: int64 `[N]` both, on the CPU."""
        count = len(self.split)
        order = torch.arange(count)
        if self.shuffle:
            order = torch.randperm(count, generator=seeded_generator(self.seed, self.epoch, 0))
        offsets = torch.zeros(count, dtype=torch.int64)
        if self.translate:
            generator = seeded_generator(self.seed, self.epoch, 1)
            down, right = torch.randint(2 * self.translate + 1, (2, count), generator=generator)
            offsets = down * (self.split.image_shape[2] + 2 * self.translate) + right
        return order, offsets

    @property
    def _streams(self) -> bool:
        """Whether images are read, or go through PIL, while they are used."""
        return self.split.images is None or (self.augmentation is not None and self.augmentation.needs_pil)

    def _augmentations(self, order: Tensor) -> tuple[BatchTransforms | None, Mixing | None]:
        """Return what changes, and what mixes, the epoch's images on the device."""
        augmentation, shape = self.augmentation, self.split.image_shape
        if augmentation is None:
            return None, None
        key = self.seed, self.epoch, self.device
        transforms = BatchTransforms(augmentation, shape, order, *key, crops=not self._streams)
        if not augmentation.mixes:
            return transforms, None
        assert self.num_classes is not None
        return transforms, Mixing(augmentation, shape[1:], self._stop, self.batch_size, self.num_classes, *key)

    def _gather(
        self, chunks: Sequence[Places], order: Tensor, offsets: Tensor, transforms: BatchTransforms | None
    ) -> Iterator[list[Tensor]]:
        """Yield the images at some places of the epoch, float32 `[chunk, C, H, W]`, and their parts, where wanted."""
        offsets = offsets.to(self.device)
        if not self._streams:
            split = self.split.to(self.device)
            sources = [split.padded(self.translate, of_parts) for of_parts in (False, True)[: 1 + self.with_parts]]
            starts = [order.to(self.device) * some[0].numel() + offsets for some in sources]
            for chunk in chunks:
                images, *parts = (
                    self._move(self._windows(some, begins[chunk]), chunk, transforms)
                    for some, begins in zip(sources, starts, strict=True)
                )
                shape = () if split.parts is None else split.parts.shape[1:3]
                yield [self._finish(images, chunk, transforms), *(some.unflatten(1, shape) for some in parts)]
            return
        reader, rows = self.split.reader, order
        if reader is None or self.split.indices is None:
            assert self.split.images is not None
            reader = ArrayReader(self.split.images.cpu())
        else:
            rows = self.split.indices[order]
        transform = None
        if self.augmentation is not None and (self.augmentation.needs_pil or self.augmentation.crops):
            transform = ImageTransform(self.augmentation, self.split.image_shape, self.seed, self.epoch)
        places = torch.arange(len(order))
        wanted = [(rows[chunk].tolist(), places[chunk].tolist()) for chunk in chunks]
        read = read_images(reader, wanted, transform, self.num_workers, pin_memory=self.device.type == "cuda")
        for chunk, pixels in zip(chunks, read, strict=True):
            padded = F.pad(pixels.to(self.device, non_blocking=True), [self.translate] * 4).contiguous()
            begins = torch.arange(len(padded), device=self.device) * padded[0].numel() + offsets[chunk]
            images = self._move(self._windows(padded, begins), chunk, transforms)
            yield [self._finish(images, chunk, transforms)]

    def _windows(self, padded: Tensor, starts: Tensor) -> Tensor:
        """Return the images that begin at elements `starts` (int64 `[B]`) of `padded`, uint8 `[B, C, H, W]`."""
        channels, height, width = padded.shape[1], *self.split.image_shape[1:]
        _, channel_stride, row_stride, _ = padded.stride()
        reach = (channels - 1) * channel_stride + (height - 1) * row_stride + width - 1
        windows = padded.as_strided(
            (padded.numel() - reach, channels, height, width), (1, channel_stride, row_stride, 1)
        )
        return windows[starts]

    def _move(self, pixels: Tensor, places: Places, transforms: BatchTransforms | None) -> Tensor:
        """Flip images (or parts) at these places of the epoch, convert them to [0, 1], and move them."""
        if transforms is None:
            return torch.div(self._in_format(pixels), 255)
        images = torch.div(self._in_format(transforms.flip(pixels, places)), 255)
        return self._in_format(transforms.resample(images, places))

    def _finish(self, images: Tensor, places: Places, transforms: BatchTransforms | None) -> Tensor:
        """Normalise the images at these places of the epoch, and erase what is to be erased of them."""
        if self._normalized:
            images = images.sub_(self._mean).div_(self._std)
        return images if transforms is None else self._in_format(transforms.erase(images, places))

    def _in_format(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images
