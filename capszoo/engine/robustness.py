"""Images turned, moved and resized: how much of a model's accuracy is left.

A network that was trained on upright images in the middle of their frame is measured on images that are not. Pixels
that come from outside are zero, as the background of MNIST is.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from capszoo.data import seeded_generator
from capszoo.data.affine import draw_affine, sample_affine
from capszoo.modes import evaluation_mode
from capszoo.precision import autocast

from .metrics import right_answers
from .task import Normalization

__all__ = ["ROBUSTNESS_COLUMNS", "draw_shifts", "measure_robustness", "transform"]

ANGLES = (15, 30)
MAX_SHIFT = 6
SCALES = (0.8, 1.2)
# Names of the measures, as they stand in tables.
ROBUSTNESS_COLUMNS = (
    *(f"top1_rotate_{angle}" for angle in ANGLES),
    f"top1_shift_{MAX_SHIFT}",
    *(f"top1_scale_{scale}" for scale in SCALES),
    "top1_affine",
)


def transform(images: Tensor, angle: float = 0.0, scale: float = 1.0, shifts: Tensor | None = None) -> Tensor:
    """Rotate and resize images about their centre, then move them; bilinear, with zeros from outside.

    Images that are not to change, or to move by whole pixels, do just that.

    Args:
        images: ``[B, C, H, W]``, floating.
        angle: Degrees, counter-clockwise as `torch.rot90` turns.
        scale: Size of the content over its size before; the frame stays.
        shifts: Pixels to the right and down ``[B, 2]``; None for none.

    Returns:
        Images of the same shape, type and device.

    Raises:
        ValueError: If `scale` is not above 0.
    """
    if scale <= 0:
        raise ValueError(f"scale={scale} is not possible: it must be above 0")
    radians = torch.tensor(angle, dtype=torch.float64).deg2rad()
    cos, sin = (float(radians.cos()) / scale, float(radians.sin()) / scale)
    return sample_affine(images, torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64), shifts)


def draw_shifts(count: int, generator: torch.Generator, max_shift: int = MAX_SHIFT) -> Tensor:
    """Draw whole pixels from -max_shift to max_shift for both axes of `count` images, int64 ``[count, 2]``."""
    return torch.randint(-max_shift, max_shift + 1, (count, 2), generator=generator)


@torch.inference_mode()
def measure_robustness(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], amp: torch.dtype | None = None, seed: int = 0
) -> dict[str, float]:
    """Measure the accuracy on changed images; the same images are changed in the same way every time.

    Args:
        model: A model of this zoo; left in the mode it was in.
        loader: Batches of images ``[B, C, H, W]``, normalised as the model's `pretrained_cfg` says, and labels ``[B]``
            or ``[B, J]`` in a fixed order, on the model's device.
        amp: Type for autocast.
        seed: Seed of the shifts.

    Returns:
        Top-1 accuracy (the exact-match accuracy where labels are weights of the classes, see
        :func:`capszoo.engine.metrics.right_answers`) by the names of `ROBUSTNESS_COLUMNS`: under rotation by 15 and 30
        degrees (each the mean of both directions), a shift of up to 6 pixels each way along both axes, a size of 0.8
        and 1.2, and random rotations, shears and stretches by the ranges of :mod:`capszoo.data.affine`.

    Raises:
        ValueError: If there are no images.
    """
    count, right = 0, dict.fromkeys(ROBUSTNESS_COLUMNS, 0.0)
    # On the CPU and image by image: the same changes whatever device and batch size.
    generator, affine_generator = seeded_generator(seed), seeded_generator(seed, 1)
    with evaluation_mode(model):
        for images, labels in loader:
            normalization = Normalization(model, images.device)
            pixels = normalization.undo(images)  # zeros from outside are black
            shifts = draw_shifts(len(labels), generator)
            count += len(labels)

            def score(changed: Tensor, labels: Tensor = labels, normalization: Normalization = normalization) -> float:
                with autocast(changed.device, amp):
                    return float(right_answers(model(normalization(changed)), labels).sum())

            for angle in ANGLES:
                right[f"top1_rotate_{angle}"] += sum(score(transform(pixels, sign * angle)) for sign in (1, -1)) / 2
            right[f"top1_shift_{MAX_SHIFT}"] += score(transform(pixels, shifts=shifts))
            for scale in SCALES:
                right[f"top1_scale_{scale}"] += score(transform(pixels, scale=scale))
            right["top1_affine"] += score(sample_affine(pixels, draw_affine(len(labels), affine_generator).inverse()))
    if count == 0:
        raise ValueError("there are no images to measure robustness on")
    return {name: value / count for name, value in right.items()}
