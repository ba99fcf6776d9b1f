"""Images read by worker processes while they are used."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from capszoo.data.readers import Reader
from capszoo.errors import DataError

from .image_transforms import ImageTransform
from .seeding import kept_random_state

__all__ = ["read_images"]


def read_images(
    reader: Reader,
    parts: list[tuple[list[int], list[int]]],
    transform: ImageTransform | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Tensor]:
    """Yield the images of each part, uint8 `[part, C, H, W]`.

    Args:
        reader: Where they come from.
        parts: Of each part the indices of its images in the reader, and their places in the epoch.
        transform: What changes them.
        num_workers: Processes that read; 0 reads in this one.
        pin_memory: Put them where a GPU can fetch them from.

    Raises:
        DataError: An image that cannot be decoded, or a process that has died.
    """
    loader = DataLoader(
        _Images(reader, transform),
        batch_size=None,
        sampler=parts,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_outlive_signals if num_workers else None,
        generator=torch.Generator(),  # else it draws its workers' seed from the global one
    )
    try:
        for images in loader:
            if isinstance(images, DataError):
                raise images
            yield images
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that reads images has died ({str(error).splitlines()[0]}): give less --workers, or free memory"
        ) from error


def _outlive_signals(worker: int) -> None:
    """In a worker: leave Ctrl-C and SIGTERM to the parent.

    They often go to all processes of a job, and the parent has to finish its step; workers end with it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Images(Dataset):
    """The images of a reader by lists of indices and of places in the epoch, in a worker process."""

    def __init__(self, reader: Reader, transform: ImageTransform | None):
        self.reader, self.transform = reader, transform

    def __getitem__(self, part: tuple[list[int], list[int]]) -> Tensor | DataError:
        indices, places = part
        try:
            if self.transform is None:
                return self.reader.read(indices)
            with kept_random_state():
                return self.reader.read(indices, [partial(self.transform, place=place) for place in places])
        except DataError as error:  # handed over as a value: raised, DataLoader would bury it in the worker's traceback
            return error

    def __len__(self) -> int:
        return len(self.reader)
