"""Batches of a data set: gathered, shifted, converted and normalised on the device.

A data set that fits lives on the device as one uint8 tensor, zero-padded once by the largest shift. A shifted image is
then a window of that tensor, and a batch is one gather of windows and one division by 255, whatever its size. Where the
split says so, the mean is then subtracted and the rest divided by the standard deviation, as timm's transforms do. The
order
and the shifts of an epoch are drawn at its start from (seed, epoch) alone and on the CPU, so every device sees the same
images, and any step of any epoch can be recomputed: that is all a run needs to resume in the middle of an epoch.

A data set that does not fit is read by worker processes in the same order and takes the same path from there on.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from capszoo.data.readers import Reader
from capszoo.errors import DataError

__all__ = ["Loader", "Split"]

# Images are gathered some hundred at a time and handed out as views: at batch 1 a step then costs 2 us, not 20. The
# second limit keeps such a chunk of large images small; a batch above either limit is a chunk by itself.
_CHUNK_IMAGES = 256
_CHUNK_BYTES = 8 << 20


@dataclass(eq=False, repr=False)
class Split:
    """The training, validation or test images of a data set.

    Args:
        labels: Class indices, int64 `[N]`, or weights of the classes, float `[N, J]`, where an image may show several
            or none; on the same device as `images`.
        images: uint8 `[N, C, H, W]`, or None for a split that is read from disk while it is used.
        reader: Where the images of such a split come from.
        indices: int64 `[N]`, the place of each image in `reader`.
        mean: Subtracted from images in [0, 1], one number a channel or one for all.
        std: What is left is divided by this, one number a channel or one for all.
        parts: uint8 `[N, P, C, H, W]` beside `images` that are composed of P others: these, in the order of the P
            classes that their labels show.
    """

    labels: Tensor
    images: Tensor | None = None
    reader: Reader | None = None
    indices: Tensor | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    parts: Tensor | None = None
    _on_device: dict[torch.device, Split] = field(default_factory=dict, init=False)
    _padded: dict[bool, tuple[int, Tensor]] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Split({len(self)} images of {'x'.join(map(str, self.image_shape))})"

    @property
    def multi_label(self) -> bool:
        """Whether labels are weights of the classes."""
        return self.labels.ndim == 2

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.reader.image_shape if self.images is None else tuple(self.images.shape[1:])

    def to(self, device: torch.device | str) -> Split:
        """Return this split with its tensors on `device`; the copy is made once and kept."""
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        if device == self.labels.device:
            return self
        if device not in self._on_device:
            images, parts = (None if some is None else some.to(device) for some in (self.images, self.parts))
            self._on_device[device] = Split(self.labels.to(device), images, self.reader, self.indices, parts=parts)
        self._on_device[device].mean, self._on_device[device].std = self.mean, self.std
        return self._on_device[device]

    def padded(self, margin: int, of_parts: bool = False) -> Tensor:
        """Return the images with `margin` zeros on each side, uint8 `[N, C, H + 2 margin, W + 2 margin]`.

        The result for the last `margin` above 0 is kept. That of parts has those of an image as its channels, P C.
        """
        images = self.parts.flatten(1, 2) if of_parts else self.images
        if margin == 0:
            return images.contiguous()
        if of_parts not in self._padded or self._padded[of_parts][0] != margin:
            self._padded[of_parts] = margin, F.pad(images, [margin] * 4)
        return self._padded[of_parts][1]


class Loader:
    """One epoch of batches of a split: images float32 `[B, C, H, W]` and their labels on `device`.

    Images have values in [0, 1], less the split's mean and divided by its standard deviation.

    The batches depend on the split, `batch_size`, `shuffle`, `seed`, `epoch` and `translate` and on nothing else, and
    the loader can be iterated any number of times. The global random state is never touched, and of a split in memory
    no batch waits for the host. Batches may be views of one tensor.

    `len(loader)` is the number of batches in the whole epoch, whatever `start_step`; iteration yields
    `len(loader) - start_step` of them.

    Args:
        split: The images.
        batch_size: Images in a batch; the last one holds the rest.
        device: Where batches are made.
        shuffle: Draw a new order for each epoch instead of going through the split from its start.
        seed: Together with `epoch` decides the order and the shifts.
        epoch: The epoch, from 0.
        start_step: The step to begin with: the batches are those of the whole epoch from that step on.
        translate: Shift each image by up to so many pixels each way along both axes, filling with zeros.
        share: Numerator and denominator of this process's part of each batch, such as (1, 4) for the second of four;
            parts differ by one image at most, and one may be empty where a batch is smaller than the denominator.
        drop_last: Leave out a last batch that is not full.
        num_workers: Worker processes that read a split that is not in memory; 0 reads in this process.
        channels_last: Make images in channels-last memory format.
        with_parts: Of a split whose images have parts, give these too, as the third of a batch: float32
            `[B, P, C, H, W]` in [0, 1], shifted as the image is, not normalised.

    Raises:
        DataError: An argument out of range, at once; an image that cannot be decoded, when its turn comes.
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
        self.split = split
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = epoch
        self.start_step = start_step
        self.translate = translate
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
        if self.share[1] > 1:
            yield from self._part(order, offsets)
            return
        labels = self.split.labels.cpu()[order].to(self.device)

        # Chunks are counted from the start of the epoch, not from start_step, so that a batch lies at the same place
        # within its chunk, and thus equally aligned in memory, in a resumed epoch.
        channels, height, width = self.split.image_shape
        count = min(_CHUNK_IMAGES, _CHUNK_BYTES // (4 * channels * height * width))
        steps = max(1, count // self.batch_size)
        size = steps * self.batch_size
        stop = min(len(self.split), len(self) * self.batch_size)
        first, skip = divmod(self.start_step, steps)
        chunks = [slice(begin, min(begin + size, stop)) for begin in range(first * size, stop, size)]

        for chunk, pixels in zip(chunks, self._gather(chunks, order, offsets), strict=True):
            images, *parts = pixels
            batch = images, labels[chunk], *parts
            batches = zip(*(some.split(self.batch_size) for some in batch), strict=True)
            for _ in range(skip):
                next(batches)
            skip = 0
            yield from batches

    def order(self) -> Tensor:
        """Indices of the epoch's images in the split, in the order in which they come: int64 `[N]`."""
        return self._draw()[0]

    def _part(self, order: Tensor, offsets: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield this process's part of each batch; only its own images are read."""
        part, parts = self.share
        stop = min(len(self.split), len(self) * self.batch_size)
        slices = []
        for begin in range(self.start_step * self.batch_size, stop, self.batch_size):
            size = min(self.batch_size, stop - begin)
            slices.append(slice(begin + size * part // parts, begin + size * (part + 1) // parts))
        labels = self.split.labels.cpu()[order].to(self.device)
        filled = [own for own in slices if own.stop > own.start]
        gathered = self._gather(filled, order, offsets)
        channels, height, width = self.split.image_shape
        nothing = [torch.empty(0, channels, height, width, device=self.device)]
        if self.with_parts:
            nothing.append(torch.empty(0, *self.split.parts.shape[1:], device=self.device))
        for own in slices:
            images, *parts = next(gathered) if own.stop > own.start else nothing
            yield images, labels[own], *parts

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

    def _gather(self, chunks: list[slice], order: Tensor, offsets: Tensor) -> Iterator[list[Tensor]]:
        """Yield the images of each chunk of the epoch, float32 `[chunk, C, H, W]`, and their parts, where wanted."""
        if self.split.images is not None:
            split = self.split.to(self.device)
            padded = [split.padded(self.translate, of_parts) for of_parts in (False, True)[: 1 + self.with_parts]]
            starts = [(order * some[0].numel() + offsets).to(self.device) for some in padded]
            for chunk in chunks:
                images, *parts = (
                    self._windows(some, begins[chunk]) for some, begins in zip(padded, starts, strict=True)
                )
                yield [self._normalize(images), *(some.unflatten(1, split.parts.shape[1:3]) for some in parts)]
            return
        rows = self.split.indices[order]
        loader = DataLoader(
            _Rows(self.split.reader),
            batch_size=None,
            sampler=[rows[chunk].tolist() for chunk in chunks],
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_outlive_signals if self.num_workers else None,
            generator=torch.Generator(),  # else it draws its workers' seed from the global one
        )
        offsets = offsets.to(self.device)
        for chunk, images in zip(chunks, _read(loader), strict=True):
            if isinstance(images, DataError):
                raise images
            padded = F.pad(images.to(self.device, non_blocking=True), [self.translate] * 4).contiguous()
            starts = torch.arange(len(padded), device=self.device) * padded[0].numel() + offsets[chunk]
            yield [self._normalize(self._windows(padded, starts))]

    def _windows(self, padded: Tensor, starts: Tensor) -> Tensor:
        """Return the images that begin at elements `starts` (int64 `[B]`) of `padded`, float32 `[B, C, H, W]`."""
        channels, height, width = padded.shape[1], *self.split.image_shape[1:]
        _, channel_stride, row_stride, _ = padded.stride()
        reach = (channels - 1) * channel_stride + (height - 1) * row_stride + width - 1
        windows = padded.as_strided(
            (padded.numel() - reach, channels, height, width), (1, channel_stride, row_stride, 1)
        )
        pixels = windows[starts]
        if self.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        return torch.div(pixels, 255)

    def _normalize(self, images: Tensor) -> Tensor:
        return images.sub_(self._mean).div_(self._std) if self._normalized else images


def _outlive_signals(worker: int) -> None:
    """In a worker: leave Ctrl-C and SIGTERM to the parent.

    They often go to all processes of a job, and the parent has to finish its step; workers end with it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _read(loader: DataLoader) -> Iterator[Tensor | DataError]:
    """Pass on what worker processes read; one that was killed, for memory say, is an error of the data."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that reads images has died ({str(error).splitlines()[0]}): give less --workers, or free memory"
        ) from error


def seeded_generator(*key: int) -> torch.Generator:
    """Return a CPU generator that depends on all numbers of `key`.

    The numbers are hashed: torch's CPU generator keeps 32 bits of a seed, and a sum, say, would make epoch 1 of seed 0
    the epoch 0 of seed 1.
    """
    digest = hashlib.sha256(",".join(str(int(number)) for number in key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


class _Rows(Dataset):
    """The images of a reader by list of indices, in a worker process."""

    def __init__(self, reader: Reader):
        self.reader = reader

    def __getitem__(self, indices: list[int]) -> Tensor | DataError:
        try:
            return self.reader.read(indices)
        except DataError as error:  # handed over as a value: raised, DataLoader would bury it in the worker's traceback
            return error

    def __len__(self) -> int:
        return len(self.reader)
