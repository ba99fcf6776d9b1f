"""Look into a capsule network: what its capsules encode, how its routing decides, and what parts of an image count.

Each function takes a model and images ``[B, C, H, W]``, normalised as the model's `pretrained_cfg` says (of
:class:`capszoo.data.Loader`, or `capszoo.engine.Normalization(model)(pixels)`), and leaves the model as it was.

Example:

    ```python
    model = capszoo.create_model("capsnet_tiny.mnist", pretrained=True, decoder=True)
    drawn = capszoo.inspect.perturb(model, images)       # [B, 16, 11, 1, 28, 28]: one dimension turned at a time
    maps = capszoo.inspect.part_maps(model, images)      # [B, 10, 28, 28]: which parts vote for which class
    ```
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .contract import HasCapsules, HasCouplings, decoder_of
from .errors import InspectionError

__all__ = ["agreement", "attribution", "coupling_entropy", "dead_capsules", "part_maps", "perturb", "receptive_fields"]


@contextlib.contextmanager
def _evaluating(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """The model in evaluation mode; derivatives by its parameters are not taken."""
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval().requires_grad_(False)
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, needs in wanted.items():
            parameter.requires_grad_(needs)


def _couplings(model: Any, x: Tensor) -> Tensor:
    if not isinstance(model, HasCouplings):
        raise InspectionError(f"{type(model).__name__} has no couplings to look at: give a model with capsule layers")
    return model.couplings(x, iteration=None)


def perturb(
    model: nn.Module,
    x: Tensor,
    dims: Sequence[int] | None = None,
    values: Sequence[float] | Tensor | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """Change one number of a class capsule at a time and draw what it then encodes (Sabour et al. 2017, figure 4).

    Args:
        model: A model with a decoder.
        x: Images ``[B, C, H, W]``.
        dims: Which of the capsule's D numbers to change; all if None.
        values: What is added to them, ``[V]``; the paper's -0.25 to 0.25 by steps of 0.05 if None.
        target: Class whose capsule is drawn, ``[B]``; the predicted one if None.

    Returns:
        Images ``[B, len(dims), V, C, H, W]`` with values in [0, 1].

    Raises:
        InspectionError: If the model has no decoder, or a dimension is not there.
    """
    decoder = decoder_of(model)
    if decoder is None or not isinstance(model, HasCapsules):
        raise InspectionError("this model has no decoder to draw with: make it with decoder=True, or use other weights")
    with _evaluating(model):
        capsules, scores = model.forward_capsules(x)
        target = scores.argmax(dim=1) if target is None else target
        shape, capsules = capsules.shape, capsules.flatten(2)
        dims = range(capsules.shape[2]) if dims is None else list(dims)
        for dim in dims:
            if not 0 <= dim < capsules.shape[2]:
                raise InspectionError(f"dims has {dim}: a capsule has {capsules.shape[2]} numbers, counted from 0")
        added = torch.linspace(-0.25, 0.25, 11) if values is None else torch.as_tensor(values, dtype=torch.float32)
        added = added.to(capsules)
        drawn = []
        for row, index in zip(capsules, target.tolist(), strict=True):
            changed = row.repeat(len(dims), len(added), 1, 1)
            for place, dim in enumerate(dims):
                changed[place, :, index, dim] += added
            changed = changed.flatten(0, 1)
            images = decoder(changed.view(-1, *shape[1:]), target.new_full((len(changed),), index))
            drawn.append(images.unflatten(0, (len(dims), len(added))))
    return torch.stack(drawn)


def coupling_entropy(model: nn.Module, x: Tensor) -> Tensor:
    """Whether routing decides anything: the entropy of the couplings of each iteration, over that of equal ones.

    1 says that each capsule divides its vote evenly, as before any routing; 0 that each votes for one class alone.
    Couplings are taken in proportion where they do not add up to 1.

    Args:
        model: A model with couplings.
        x: Images ``[B, C, H, W]``.

    Returns:
        ``[R]``, means over capsules and images, from 0 to 1.

    Raises:
        InspectionError: If the model has no couplings.
    """
    with _evaluating(model):
        shares = _couplings(model, x).clamp(min=0)
        shares = shares / shares.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
        entropy = -torch.special.xlogy(shares, shares).sum(dim=-1)
        return entropy.mean(dim=(1, 2)) / max(math.log(shares.shape[-1]), torch.finfo(shares.dtype).tiny)


def agreement(model: nn.Module, x: Tensor) -> Tensor:
    """How much routing moved each capsule's vote to each class: last couplings over those of the first iteration.

    Above 1 the capsule agrees with the class capsule, below 1 it does not. Of routing without iterations, over 1 / J.

    Args:
        model: A model with couplings.
        x: Images ``[B, C, H, W]``.

    Returns:
        ``[B, I, J]``.

    Raises:
        InspectionError: If the model has no couplings.
    """
    with _evaluating(model):
        found = _couplings(model, x)
        first = found[0] if len(found) > 1 else torch.full_like(found[-1], 1 / found.shape[-1])
        return found[-1] / first.clamp(min=torch.finfo(found.dtype).tiny)


def receptive_fields(model: Any) -> Tensor:
    """The part of the image that each place of the map of primary capsules sees, found by derivatives.

    Args:
        model: A model.

    Returns:
        Top, left, bottom (exclusive) and right (exclusive) of each place, in pixels, int64 ``[H', W', 4]``. What the
        network pads does not count, and a field that a global operation widens is the whole image.
    """
    parameter = next(model.parameters())
    with _evaluating(model, gradients=True):
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(8, model.in_chans, *model.img_size, generator=generator)
        x = noise.to(parameter).requires_grad_()
        features = model.forward_features(x)
        height, width = features.shape[2:]
        fields = torch.empty(height, width, 4, dtype=torch.int64)
        # A place's rows are those of its whole row of places, and its columns those of its column.
        rows = [_extent(features[:, :, i].abs().sum(), x, 0) for i in range(height)]
        columns = [_extent(features[:, :, :, j].abs().sum(), x, 1) for j in range(width)]
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            fields[i, j] = torch.tensor([top, left, bottom, right])
    return fields


def _extent(value: Tensor, x: Tensor, axis: int) -> tuple[int, int]:
    """First and one past the last row (axis 0) or column (1) of the image that a value depends on."""
    (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
    seen = (gradient != 0).any(dim=0).any(dim=0).any(dim=1 - axis).nonzero().flatten()
    return (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, x.shape[2 + axis])


def part_maps(model: Any, x: Tensor, iteration: int = -1) -> Tensor:
    """Couplings laid over the image: how much the capsules that look at a pixel vote for each class.

    A capsule counts by its length, and most in the middle of its receptive field.

    Args:
        model: A model with couplings, whose capsules below the classes are those of its map of features.
        x: Images ``[B, C, H, W]``.
        iteration: Of routing, from 0; -1 for the last.

    Returns:
        ``[B, J, H, W]``: at each pixel a weighted mean of couplings, 0 where all capsules there have length 0.

    Raises:
        InspectionError: If the model has no couplings, or a pruned network keeps single capsules of its map.
    """
    with _evaluating(model):
        couplings = _couplings(model, x)[iteration]
        features = model.forward_features(x)
        batch, _, height, width = features.shape
        capsules = model.to_capsules(features)
        types, rest = divmod(capsules.shape[1], height * width)
        if rest or len(getattr(model, "keep_capsules", ())):
            raise InspectionError("this model keeps single capsules of its map: no image has a place for the others")
        lengths = capsules.flatten(2).norm(dim=2).view(batch, types, height * width)
        shares = couplings.view(batch, types, height * width, -1)
        votes = torch.einsum("btp,btpj->bjp", lengths, shares)
        places = lengths.sum(dim=1, keepdim=True)
    fields = receptive_fields(model).flatten(0, 1)
    image_height, image_width = x.shape[2:]
    windows = torch.zeros(len(fields), image_height, image_width, dtype=votes.dtype)
    for window, (top, left, bottom, right) in zip(windows, fields.tolist(), strict=True):
        rows, columns = (torch.hann_window(size + 2, periodic=False)[1:-1] for size in (bottom - top, right - left))
        window[top:bottom, left:right] = torch.outer(rows, columns)
    windows = windows.flatten(1).to(votes.device)
    total = (places @ windows).clamp(min=torch.finfo(votes.dtype).tiny)
    return (votes @ windows / total).unflatten(2, (image_height, image_width))


def attribution(model: nn.Module, x: Tensor, target: Tensor | None = None, steps: int = 32) -> Tensor:
    """What each pixel adds to a class's score: integrated gradients (Sundararajan, Taly and Yan 2017, equation 1).

    The path leads from a black image, which normalisation makes of zeros, to the image.

    Args:
        model: A model.
        x: Images ``[B, C, H, W]``.
        target: The class ``[B]``; the predicted one if None.
        steps: Points of the path, at the middles of its parts.

    Returns:
        ``[B, C, H, W]``; an image's sum is the difference of its score and that of the black image, but for the steps.
    """
    from .engine.task import Normalization

    black = Normalization(model, x.device)(torch.zeros_like(x)).to(x)
    with _evaluating(model, gradients=True):
        if target is None:
            with torch.no_grad():
                target = model(x).argmax(dim=1)
        total = torch.zeros_like(x)
        for step in range(steps):
            point = (black + (step + 0.5) / steps * (x - black)).detach().requires_grad_()
            chosen = model(point).gather(1, target[:, None]).sum()
            total += torch.autograd.grad(chosen, point)[0]
    return (x - black) * total / steps


def dead_capsules(model: Any, batches: Iterable[Any], threshold: float = 0.05) -> Tensor:
    """Primary capsules that no image makes longer than a threshold: they could be pruned.

    Args:
        model: A model with `to_capsules`, whose primary capsules have lengths from 0 to 1.
        batches: Images ``[B, C, H, W]``, or pairs of images and labels as a :class:`capszoo.data.Loader` gives them.
        threshold: The length.

    Returns:
        bool ``[I]``.

    Raises:
        InspectionError: If there are no images.
    """
    longest: Tensor | None = None
    with _evaluating(model):
        for batch in batches:
            x = batch if isinstance(batch, Tensor) else batch[0]
            lengths = model.to_capsules(model.forward_features(x)).flatten(2).norm(dim=2).amax(dim=0)
            longest = lengths if longest is None else torch.maximum(longest, lengths)
    if longest is None:
        raise InspectionError("there are no images to look for dead capsules with: give batches of them")
    return longest < threshold
