"""From images of any kind to classes: what a trained model says of a file, a picture, an array or a tensor."""

import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .contract import decoder_of, to_probabilities
from .data.decoding import decode, not_an_image
from .data.folders import images_below
from .data.readers import ArrayReader
from .errors import DataError, one_line
from .modes import evaluation_mode

__all__ = ["Prediction", "class_names_of", "predict", "reconstruct", "to_pixels"]


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        class_name: Name of the class of the highest score; its number where the model knows no names.
        class_index: Its number, from 0.
        score: Its score, from 0 to 1: the length of its capsule, or its probability where a model gives logits.
        second_name: Name of the class of the second-highest score, None where there is one class.
        second_score: Its score.
        scores: Scores of all classes, in order.
    """

    class_name: str
    class_index: int
    score: float
    second_name: str | None
    second_score: float | None
    scores: tuple[float, ...]


def class_names_of(model: Any) -> list[str]:
    """Names of a model's classes from its `pretrained_cfg`; their numbers where it has none for all of them."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    names = cfg.get("label_names") or ()
    return [*map(str, names)] if len(names) == model.num_classes else [*map(str, range(model.num_classes))]


def to_pixels(image: Any, model: Any) -> Tensor:
    """Turn an image into the pixels that a model takes: float32 `[C, H, W]` in [0, 1], not normalised.

    Args:
        image: A path, a PIL image, an array `[H, W]`, `[H, W, C]` or, where the last side cannot be channels,
            `[C, H, W]`, or a tensor `[C, H, W]`; of uint8, or of floats in [0, 1]. Other sizes are resized (bilinear),
            colour becomes grey or grey colour, as the model wants. A model of other channels (2 are stereo) takes
            arrays and tensors of as many.
        model: The model; its `in_chans` and `img_size` count.

    Raises:
        DataError: If it is none of these, or cannot be read.
    """
    size, channels = tuple(model.img_size), model.in_chans
    possible = (1, 3) if channels in (1, 3) else (channels,)
    if channels not in (1, 3) and isinstance(image, (str, os.PathLike, Image.Image)):
        raise DataError(f"the model takes images of {channels} channels, which no file has: give an array [H, W, C]")
    if isinstance(image, (str, os.PathLike)):
        path = Path(image)
        if not path.is_file():
            raise DataError(f"no image at {str(path)!r}: check the path")
        try:
            return decode(path, model.in_chans, size).float() / 255
        except Exception as error:
            raise not_an_image(path, error) from error
    if isinstance(image, Image.Image):
        try:
            return decode(image.copy(), model.in_chans, size).float() / 255
        except Exception as error:
            raise DataError(f"a PIL image of mode {image.mode!r} cannot be used ({one_line(error)})") from error
    if isinstance(image, Tensor):
        if image.ndim != 3:
            raise DataError(
                f"a tensor of shape {list(image.shape)} is not an image: give [C, H, W], or a batch of them"
            )
        image = image.detach().cpu()
        # NumPy lacks some types of floats.
        array = (image.float() if image.is_floating_point() else image).permute(1, 2, 0).numpy()
    elif isinstance(image, np.ndarray):
        array = image[:, :, None] if image.ndim == 2 else image
        if array.ndim == 3 and array.shape[2] not in possible and array.shape[0] in possible:
            array = array.transpose(1, 2, 0)
    else:
        raise DataError(f"{type(image).__name__!r} is not an image: give a path, a PIL image, an array or a tensor")
    if array.ndim != 3 or array.shape[2] not in possible or 0 in array.shape:
        wanted = "one grey or three colour channels" if channels in (1, 3) else f"the model's {channels} channels"
        raise DataError(f"an image of shape {list(image.shape)} is not possible: give {wanted}")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating):
            raise DataError(f"pixels of type {array.dtype} are not possible: give uint8, or floats in [0, 1]")
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise DataError("pixels beyond 0 to 1 are not possible: give floats in [0, 1], or uint8")
        if array.shape == (*size, model.in_chans):
            return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1).float()
        array = (array * 255).round().astype(np.uint8)
    if channels not in (1, 3):  # PIL has no such images
        pixels = torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)[None]
        return ArrayReader(pixels, size).read([0])[0].float() / 255
    return (
        decode(Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array), model.in_chans, size).float() / 255
    )


def _normalized(model: Any, pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as the model takes them, on its device and in its type."""
    from .engine.task import Normalization

    parameter = next(model.parameters())
    return Normalization(model, parameter.device)(pixels.to(parameter.device)).to(parameter.dtype)


@torch.inference_mode()
def predict_pixels(model: nn.Module, pixels: Tensor) -> list[Prediction]:
    """Predict the classes of pixels `[B, C, H, W]` in [0, 1]; the model is used as it is, normalised as it wants."""
    scores = to_probabilities(model, model(_normalized(model, pixels)).float()).cpu()
    names, found = class_names_of(model), []
    for row in scores:
        best, *others = row.topk(min(2, len(row))).indices.tolist()
        values = row.tolist()
        second = others[0] if others else None
        found.append(
            Prediction(
                names[best],
                best,
                values[best],
                None if second is None else names[second],
                None if second is None else values[second],
                tuple(values),
            )
        )
    return found


@torch.inference_mode()
def reconstruct(model: Any, pixels: Tensor) -> Tensor:
    """Draw images again from their class capsules: pixels `[B, C, H, W]` in [0, 1] to such pixels.

    Raises:
        DataError: If the model has no decoder.
    """
    if decoder_of(model) is None:
        raise DataError("this model has no decoder to reconstruct images with: use weights that have one")
    capsules, scores = model.forward_capsules(_normalized(model, pixels))
    drawn = decoder_of(model)(capsules, scores.argmax(dim=1))  # type: ignore[misc]
    return drawn.float().clamp(0, 1).cpu()


def predict(model: nn.Module, images: Any, batch_size: int = 256) -> Prediction | list[Prediction]:
    """Predict the class of an image, or of many.

    Args:
        model: A trained model, of `capszoo.load_model(FILE)` or `capszoo.create_model(NAME, pretrained=True)`. It is
            put into evaluation mode for the call.
        images: An image as :func:`capszoo.prediction.to_pixels` takes it, a sequence of such, a folder, or a batch
            `[B, C, H, W]`.
        batch_size: Images at a time.

    Returns:
        A prediction for one image, a list for several.

    Raises:
        DataError: If an image cannot be read, or the model has no classes.

    Example:

        ```python
        model = capszoo.create_model("capsnet_tiny.mnist", pretrained=True)
        print(capszoo.predict(model, "five.png").class_name)
        ```
    """
    if not getattr(model, "num_classes", 0):
        raise DataError("this model has no classes to predict: make it with num_classes above 0")
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size} is out of range: give 1 or more")
    is_one = not isinstance(images, (list, tuple)) and getattr(images, "ndim", 0) < 4
    if isinstance(images, (str, os.PathLike)) and Path(images).is_dir():
        images, is_one = _images_of(images), False
    several: Sequence[Any] = [images] if is_one else images
    found: list[Prediction] = []
    with evaluation_mode(model):
        for start in range(0, len(several), batch_size):
            pixels = [to_pixels(several[place], model) for place in range(start, min(start + batch_size, len(several)))]
            found += predict_pixels(model, torch.stack(pixels))
    return found[0] if is_one else found


def named_images(names: Iterable[str]) -> Iterator[tuple[str, DataError | None]]:
    """The files that the command line names, and what is wrong with a name."""
    for name in names:
        if name == "-":
            lines = (line.rstrip("\r\n") for line in sys.stdin if line.strip())
            first = next(lines, None)
            if first is None:
                yield name, DataError("standard input names no images: give a line for each")
            else:
                yield from named_images(itertools.chain([first], lines))
        elif Path(name).is_dir():
            try:
                paths = _images_of(name)
            except DataError as error:
                yield name, error
            else:
                yield from ((str(path), None) for path in paths)
        else:
            yield name, None


def _images_of(folder: str | os.PathLike[str]) -> list[Path]:
    """The images below a folder, which must be some."""
    try:
        paths = images_below(Path(folder))
    except OSError as error:
        raise DataError(f"folder {str(folder)!r} cannot be read ({one_line(error)}): mend its permissions") from error
    if not paths:
        raise DataError(f"folder {str(folder)!r} holds no images: check the path")
    return paths
