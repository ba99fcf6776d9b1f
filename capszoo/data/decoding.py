"""Files of images to pixels: their headers, their decoding, and the bounds of both."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from capszoo.errors import DataError, one_line

Size = tuple[int, int]  # height, width
_GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
_EXIF_ORIENTATION = 0x0112
# Without those that run another program (EPS) or that nobody keeps images for training in.
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def to_uint8(images: Tensor) -> Tensor:
    """Return pixels in [0, 255] of any type as uint8, rounded and clamped."""
    return images if images.dtype == torch.uint8 else images.round().clamp(0, 255).to(torch.uint8)


def header(file: Path | IO[bytes] | Image.Image) -> tuple[Size, bool]:
    """Return height and width of an image as it will be decoded, and whether it is grey."""
    with _open(file) as image:
        exif = Image.Image.getexif(image)  # of the base class: PNG's own decodes the whole image
        turned = exif.get(_EXIF_ORIENTATION, 1) >= 5  # 5 to 8 swap the axes
        return image.size if turned else image.size[::-1], image.mode in _GREY_MODES


def decode(
    file: Path | IO[bytes] | Image.Image,
    in_chans: int,
    img_size: Size | None,
    transform: Callable[[Image.Image], Image.Image] | None = None,
) -> Tensor:
    """Return an image as uint8 `[in_chans, H, W]`, in its own size if `img_size` is None.

    `transform` changes the whole image, grey or RGB, before it is resized.
    """
    with _open(file) as image:
        image = to_channels(ImageOps.exif_transpose(image), in_chans)
        if transform is not None:
            image = transform(image)
        height, width = img_size or (image.height, image.width)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return from_pil(image)


def from_pil(image: Image.Image) -> Tensor:
    """Return a grey or RGB image as uint8 `[C, H, W]`."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def to_pil(pixels: Tensor) -> Image.Image:
    """Return uint8 `[C, H, W]` of 1 or 3 channels as a grey or RGB image."""
    return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())


def to_channels(image: Image.Image, in_chans: int) -> Image.Image:
    """Return an image of any mode as 8 bits of grey (1) or colour (3)."""
    if image.mode == "F":
        raise ValueError("floating-point pixels, save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which PIL would clip to 255
        values = np.asarray(image).clip(0, 65535)
        # Integers of 32 bits may hold 8 of them, as numpy's do by default.
        bits = 0 if image.mode == "I" and values.max(initial=0) < 256 else 8
        image = Image.fromarray((values >> bits).astype(np.uint8))
    return image.convert("L" if in_chans == 1 else "RGB")


@contextmanager
def _open(file: Path | IO[bytes] | Image.Image) -> Iterator[Image.Image]:
    if isinstance(file, Image.Image):
        with file:
            yield file
        return
    with ExitStack() as stack:
        if isinstance(file, Path):
            file = stack.enter_context(_BoundedFile(file))
        image = stack.enter_context(Image.open(file, formats=_FORMATS))
        # PIL warns of such a size and refuses twice of it; a file of some bytes can claim it.
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width}x{image.height} are more than {Image.MAX_IMAGE_PIXELS:,} pixels")
        yield image


class _BoundedFile(io.BufferedReader):
    """A file that is asked for no more than it has: PIL reads as much as a header says, Python takes that memory."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self.size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        rest = max(0, self.size - self.tell())
        return super().read(rest if size is None or size < 0 else min(size, rest))


def not_an_image(path: Path, error: Exception) -> DataError:
    """The error of a file that cannot be decoded."""
    reason = one_line(error)
    if isinstance(error, UnidentifiedImageError):  # PIL's message names its own object
        try:
            reason = "its format is not known" if path.stat().st_size else "it is empty"
        except OSError:
            reason = "its format is not known"
    return DataError(f"'{path}' is not an image that can be decoded ({reason}): delete or mend it")


def sizes_differ(what: str, one: Size, other: Size) -> DataError:
    """The error of images that should have one size."""
    return DataError(
        f"{what} has images of different sizes ({one[0]}x{one[1]} and {other[0]}x{other[1]}): give --img-size, to "
        "which all are resized"
    )
