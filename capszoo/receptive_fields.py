"""What parts of an image the places of a map of capsules look at, found by derivatives."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .contract import HasRoutedCapsules, has_couplings
from .modes import evaluation_mode

__all__ = ["receptive_fields"]


@contextlib.contextmanager
def evaluating(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """The model in evaluation mode; derivatives by its parameters are not taken."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        with evaluation_mode(model), torch.set_grad_enabled(gradients):
            yield
    finally:
        for parameter, needs in wanted.items():
            parameter.requires_grad_(needs)


def receptive_fields(model: Any) -> Tensor:
    """The part of the image that each place of the map of primary capsules sees, found by derivatives.

    Args:
        model: A model.

    Returns:
        Top, left, bottom (exclusive) and right (exclusive) of each place, in pixels, int64 ``[H', W', 4]``. What the
        network pads does not count, and a field that a global operation widens is the whole image.
    """
    with evaluating(model, gradients=True):
        x = noise_images(model)
        features = model.forward_features(x)
        grids = [(features.shape[2], features.shape[3])]
        if has_couplings(model) and isinstance(model, HasRoutedCapsules):
            maps, _ = model.capsule_places()
            if sum(map(math.prod, maps)) == math.prod(grids[0]):
                grids = maps  # which the map of features has one after the other
        values = features.flatten(2).transpose(1, 2)
        profiles = derivative_profiles(values, torch.arange(values.shape[1]), grids, x)
    fields = []
    for axes in profiles:
        (tops, bottoms), (lefts, rights) = (_extents(axis) for axis in axes)
        for top, bottom in zip(tops, bottoms, strict=True):
            fields += [torch.stack((top, left, bottom, right)) for left, right in zip(lefts, rights, strict=True)]
    return torch.stack(fields).unflatten(0, features.shape[2:])


def noise_images(model: Any) -> Tensor:
    """Images to take derivatives at: eight, so that rectifiers hide nothing, and fewer large ones."""
    height, width = model.img_size
    count = min(8, max(2, 8 * 32 * 32 // (height * width)))
    noise = torch.rand(count, model.in_chans, *model.img_size, generator=torch.Generator().manual_seed(0))
    return noise.to(next(model.parameters())).requires_grad_()


def derivative_profiles(
    values: Tensor, places: Tensor, grids: list[tuple[int, int]], x: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """How much capsules look at each row and at each column of the image: absolute derivatives.

    Args:
        values: Of the capsules, ``[B, I, ...]``.
        places: Of the capsules in the maps, ``[I]``.
        grids: Height and width of each map.
        x: The images ``[B, C, H, W]`` that the values were computed of.

    Returns:
        For each map ``[height, H]`` and ``[width, W]``. A place's rows are those of its whole row of places, and its
        columns those of its column.
    """
    found, first = [], 0
    for height, width in grids:
        inside = (places >= first) & (places < first + height * width)
        axes = []
        for axis, (count, line) in enumerate(((height, (places - first) // width), (width, (places - first) % width))):
            rows = []
            for number in range(count):
                chosen = (inside & (line == number)).nonzero().flatten().to(values.device)
                (gradient,) = torch.autograd.grad(values[:, chosen].abs().sum(), x, retain_graph=True)
                rows.append(gradient.abs().sum(dim=(0, 1, 3 - axis)))
            axes.append(torch.stack(rows).cpu())
        found.append((axes[0], axes[1]))
        first += height * width
    return found


def _extents(profile: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last pixel that places look at, of ``[places, pixels]``; all where nothing is seen."""
    seen = profile > 0
    seen |= ~seen.any(dim=1, keepdim=True)
    first = seen.int().argmax(dim=1)
    return first, seen.shape[1] - seen.flip(1).int().argmax(dim=1)


def pixel_windows(profile: Tensor) -> Tensor:
    """Weights ``[places, pixels]`` of the pixels along an axis, which add up to 1 for each place.

    They are those of a Hann window over the receptive field. Where padding lets borders cut fields off, what is left
    of them is no longer around the place; and places have one and the same field where padding widens each to the whole
    image, or routing lets them compete. Then the derivatives are the weights.
    """
    first, end = _extents(profile)
    sizes = end - first
    differ = len(torch.stack((first, end)).unique(dim=1).T) == len(profile)
    if not differ or bool((sizes != sizes[0]).any()):
        weights = profile + (profile.sum(dim=1, keepdim=True) == 0)
    else:
        weights = torch.zeros(profile.shape)
        for row, start, size in zip(weights, first.tolist(), sizes.tolist(), strict=True):
            row[start : start + size] = torch.hann_window(size + 2, periodic=False)[1:-1]
    return weights / weights.sum(dim=1, keepdim=True)
