"""Affine transformations of images: the sampling, and the draws of the published affine variant of MNIST."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .decoding import Size

__all__ = ["draw_affine", "inverse_maps", "sample_affine"]

# Tieleman's affine variant of MNIST (2013): rotation up to 20 degrees, shear up to 0.2, each axis at 0.8 to 1.2 times
# its size, all uniform.
MAX_ANGLE = 20
MAX_SHEAR = 0.2
SCALES = (0.8, 1.2)


def draw_affine(count: int, generator: torch.Generator) -> Tensor:
    """Draw the linear parts of `count` transformations, in pixels: float64 `[count, 2, 2]`, of columns (x, y).

    Each axis is stretched first, then x sheared by a part of y, then all rotated about the centre.
    """
    draws = torch.rand(count, 4, dtype=torch.float64, generator=generator)
    angle = ((2 * draws[:, 0] - 1) * MAX_ANGLE).deg2rad()
    shear = (2 * draws[:, 1] - 1) * MAX_SHEAR
    across, down = (SCALES[0] + (SCALES[1] - SCALES[0]) * draws[:, 2:]).unbind(1)
    cos, sin, nothing = angle.cos(), angle.sin(), torch.zeros_like(angle)
    stretched = torch.stack([torch.stack([across, shear * down], 1), torch.stack([nothing, down], 1)], dim=1)
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], dim=1) @ stretched


def inverse_maps(radians: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Where in an image each point of its rotated, rescaled and sheared form comes from, in pixels from the centre.

    The image is sheared, rescaled and rotated about its centre, in this order, as torchvision's `affine` does.

    Args:
        radians: Angles `[B]`, clockwise.
        scale: Size of the content over its size before `[B]`.
        shear: Tangents of the shear along the rows `[B]`.

    Returns:
        Linear maps of places (x, y) `[B, 2, 2]`.
    """
    cos, sin = radians.cos() / scale, radians.sin() / scale
    rows = (cos - shear * sin, sin + shear * cos), (-sin, cos)
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def sample_affine(images: Tensor, inverse: Tensor, shifts: Tensor | None = None, size: Size | None = None) -> Tensor:
    """Transform images about their centre, then move them; bilinear, with zeros from outside.

    The positions are computed in float64: in float32 they are off by a millionth of a pixel, and images that are not
    to change, or to move by whole pixels, would.

    Args:
        images: `[B, C, H, W]`, floating.
        inverse: From a place in the result to that in the image, both in pixels (x, y) from the centre: `[B, 2, 2]` or
            `[2, 2]`.
        shifts: Pixels to the right and down `[B, 2]`; None for none.
        size: Height and width of the results, by default the images'.

    Returns:
        `[B, C, *size]`, of the same type and device.
    """
    height, width = size or tuple(images.shape[-2:])
    # The places that are sampled are in half widths and half heights.
    own, other = (torch.tensor(sides, dtype=torch.float64) for sides in (images.shape[:-3:-1], (width, height)))
    linear = (inverse.to("cpu", torch.float64) * other / own[:, None]).to(images.device).expand(len(images), 2, 2)
    moved = images.new_zeros(len(images), 2, dtype=torch.float64)
    if shifts is not None:
        moved = shifts.to(moved) * 2 / other.to(images.device)
    theta = torch.cat([linear, -linear @ moved[:, :, None]], dim=2)
    grid = F.affine_grid(theta, [*images.shape[:2], height, width], align_corners=False)
    return F.grid_sample(images.double(), grid, padding_mode="zeros", align_corners=False).to(images.dtype)
