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

from .contract import HasCapsules, HasRoutedCapsules, decoder_of, has_couplings
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
    if not has_couplings(model):
        raise InspectionError(f"{type(model).__name__} has no couplings to look at: give a model with capsule layers")
    return model.couplings(x, iteration=None)


def _routed_capsules(model: Any, features: Tensor) -> tuple[Tensor, Tensor | None]:
    """Capsules ``[B, I, ...]`` that the class capsules take, and their lengths or activations ``[B, I]``."""
    if isinstance(model, HasRoutedCapsules):
        return model.routed_capsules(features)
    if not hasattr(model, "to_capsules"):
        raise InspectionError(f"{type(model).__name__} has no capsules to look at: give a model with capsule layers")
    capsules = model.to_capsules(features)
    return capsules, capsules.flatten(2).norm(dim=2)


def _places(model: Any, grid: tuple[int, int], count: int) -> tuple[list[tuple[int, int]], Tensor]:
    """Sizes of the maps of the capsules that are routed, and the place of each, see `HasRoutedCapsules`."""
    kept = getattr(model, "keep_capsules", ())  # of a pruned network, places among all capsules of the map
    size = grid[0] * grid[1]
    if isinstance(model, HasRoutedCapsules):
        grids, places = model.capsule_places()
    elif kept:
        grids, places = [grid], torch.tensor(kept) % size
    else:
        grids, places = [] if count % size else [grid], torch.arange(count) % size
    if not grids:
        raise InspectionError(
            f"the capsules that {type(model).__name__} routes are not those of a map: no image has a place for them"
        )
    return grids, places


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
    with _evaluating(model, gradients=True):
        x = _noise(model)
        features = model.forward_features(x)
        grids = [(features.shape[2], features.shape[3])]
        if has_couplings(model) and isinstance(model, HasRoutedCapsules):
            maps, _ = model.capsule_places()
            if sum(map(math.prod, maps)) == math.prod(grids[0]):
                grids = maps  # which the map of features has one after the other
        values = features.flatten(2).transpose(1, 2)
        profiles = _profiles(values, torch.arange(values.shape[1]), grids, x)
    fields = []
    for axes in profiles:
        (tops, bottoms), (lefts, rights) = (_extents(axis) for axis in axes)
        for top, bottom in zip(tops, bottoms, strict=True):
            fields += [torch.stack((top, left, bottom, right)) for left, right in zip(lefts, rights, strict=True)]
    return torch.stack(fields).unflatten(0, features.shape[2:])


def _noise(model: Any) -> Tensor:
    """Images to take derivatives at: eight, so that rectifiers hide nothing, and fewer large ones."""
    height, width = model.img_size
    count = min(8, max(2, 8 * 32 * 32 // (height * width)))
    noise = torch.rand(count, model.in_chans, *model.img_size, generator=torch.Generator().manual_seed(0))
    return noise.to(next(model.parameters())).requires_grad_()


def _profiles(values: Tensor, places: Tensor, grids: list[tuple[int, int]], x: Tensor) -> list[tuple[Tensor, Tensor]]:
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


def _windows(profile: Tensor) -> Tensor:
    """Weights ``[places, pixels]`` of the pixels along an axis, which add up to 1 for each place.

    They are those of a Hann window over the receptive field. Where padding lets borders cut fields off, what is left
    of them is no longer around the place, and may be the whole image for all: then the derivatives are the weights.
    """
    first, end = _extents(profile)
    sizes, pixels = end - first, profile.shape[1]
    if len(profile) > 1 and (bool((sizes != sizes[0]).any()) or int(sizes[0]) == pixels):
        weights = profile + (profile.sum(dim=1, keepdim=True) == 0)
    else:
        weights = torch.zeros(profile.shape)
        for row, start, size in zip(weights, first.tolist(), sizes.tolist(), strict=True):
            row[start : start + size] = torch.hann_window(size + 2, periodic=False)[1:-1]
    return weights / weights.sum(dim=1, keepdim=True)


def part_maps(model: Any, x: Tensor, iteration: int | None = -1) -> Tensor:
    """Couplings laid over the image: how much the capsules that look at a pixel vote for each class.

    A capsule counts by its length or activation, in families without either all count alike, and most in the middle of
    its receptive field; in networks that pad their maps, where its derivatives are largest (the effective receptive
    field of Luo et al. 2016).

    Args:
        model: A model with couplings of the capsules of a map.
        x: Images ``[B, C, H, W]``.
        iteration: Of routing, from 0; -1 for the last, None for all.

    Returns:
        ``[B, J, H, W]``, or ``[R, B, J, H, W]`` of all iterations: at each pixel a weighted mean of couplings, 0 where
        all capsules there have length 0.

    Raises:
        InspectionError: If the model has no couplings, or routes capsules of the whole image, which have no place.
    """
    with _evaluating(model):
        couplings = _couplings(model, x)
        features = model.forward_features(x)
        capsules, activations = _routed_capsules(model, features)
        grids, places = _places(model, (features.shape[2], features.shape[3]), capsules.shape[1])
        if activations is None:
            activations = couplings.new_ones(capsules.shape[:2])
        couplings = couplings if iteration is None else couplings[iteration]
    with _evaluating(model, gradients=True):
        noise = _noise(model)
        values, _ = _routed_capsules(model, model.forward_features(noise))
        profiles = _profiles(values, places, grids, noise)
    windows = []
    for rows, columns in profiles:
        windows.append(torch.einsum("iy,jx->ijyx", _windows(rows), _windows(columns)).flatten(0, 1).flatten(1))
    looks = torch.cat(windows).to(couplings)[places.to(couplings.device)]  # [I, H*W]
    activations = activations.to(couplings)
    total = (activations @ looks).clamp(min=torch.finfo(looks.dtype).tiny)
    votes = (couplings * activations.unsqueeze(2)).transpose(-1, -2) @ looks
    return (votes / total.unsqueeze(1)).unflatten(-1, x.shape[2:])


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
    """Capsules below the classes that no image makes longer, or more active, than a threshold: they could be pruned.

    Args:
        model: A model whose capsules have lengths or activations from 0 to 1.
        batches: Images ``[B, C, H, W]``, or pairs of images and labels as a :class:`capszoo.data.Loader` gives them.
        threshold: The length.

    Returns:
        bool ``[I]``.

    Raises:
        InspectionError: If there are no images, or the model has no capsules that can be dead.
    """
    longest: Tensor | None = None
    with _evaluating(model):
        for batch in batches:
            x = batch if isinstance(batch, Tensor) else batch[0]
            _, lengths = _routed_capsules(model, model.forward_features(x))
            if lengths is None:
                raise InspectionError(
                    f"capsules of {type(model).__name__} have neither lengths nor activations: none of them can be dead"
                )
            lengths = lengths.amax(dim=0)
            longest = lengths if longest is None else torch.maximum(longest, lengths)
    if longest is None:
        raise InspectionError("there are no images to look for dead capsules with: give batches of them")
    return longest < threshold
