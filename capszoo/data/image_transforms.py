"""timm's transforms of PIL images, each image with random numbers of its own, in whatever process reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_train
from torchvision.transforms import Resize

from capszoo.errors import DataError, one_line

from .augment import Augmentation
from .seeding import seed_all

__all__ = ["ImageTransform"]

_IMAGE = 9  # the key of what is drawn, beside (seed, epoch) and the place in the epoch


class ImageTransform:
    """Crops an image, or resizes the whole of it, and changes its colours.

    Args:
        augmentation: The options.
        image_shape: Channels, height and width of what comes out.
        seed: Together with `epoch` and an image's place decides what is drawn.
        epoch: The epoch, from 0.
    """

    def __init__(self, augmentation: Augmentation, image_shape: tuple[int, int, int], seed: int, epoch: int):
        self._key = seed, epoch
        jitter: Any = augmentation.color_jitter
        ranges: dict[str, Any] = {"scale": augmentation.scale, "ratio": augmentation.ratio}
        crop, colours, _ = transforms_imagenet_train(
            image_shape[1:],
            **ranges,
            hflip=0.0,  # flips are those of batches, whether images are in memory or not
            color_jitter=jitter[0] if jitter is not None and len(jitter) == 1 else jitter,
            color_jitter_prob=augmentation.color_jitter_prob,
            force_color_jitter=jitter is not None,
            grayscale_prob=augmentation.grayscale_prob,
            gaussian_blur_prob=augmentation.gaussian_blur_prob,
            auto_augment=augmentation.aa,
            interpolation=augmentation.train_interpolation,
            mean=(0.0,) * image_shape[0],  # the colour of what comes from outside the image
            separate=True,
        )
        for operation in _operations(colours.transforms):
            if operation.name.startswith("Posterize"):
                operation.level_fn = partial(_at_least_one_bit, operation.level_fn)
        resize: Any = crop if augmentation.crops else Resize(image_shape[1:])
        self._steps = [resize, colours]

    def __call__(self, image: Image.Image, place: int) -> Image.Image:
        """Change the image at this place of the epoch; seeds the global generators.

        Raises:
            DataError: If timm or torchvision cannot.
        """
        seed_all(*self._key, _IMAGE, place)
        try:
            for step in self._steps:
                image = step(image)
        except Exception as error:  # they leave to PIL and numpy what values are possible
            raise DataError(
                f"an image of {image.width}x{image.height} cannot be augmented ({one_line(error)}): give other options "
                "than these of --aa, --color-jitter and --gaussian-blur-prob"
            ) from error
        return image


def _operations(transforms: list[Any]) -> Iterator[Any]:
    """timm's AugmentOps in the transform of --aa, which holds a list of them or of lists of them."""
    for transform in transforms:
        for item in [*getattr(transform, "ops", ()), *getattr(transform, "policy", ())]:
            yield from item if isinstance(item, list) else [item]


def _at_least_one_bit(level_fn: Callable[[float, Any], tuple[int, ...]], level: float, hparams: Any) -> tuple[int, ...]:
    """timm posterizes weak and strong images to 0 bits, which PIL takes no more."""
    return (max(1, level_fn(level, hparams)[0]),)
