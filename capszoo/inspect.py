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

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contract import HasCapsules, HasRoutedCapsules, decoder_of, has_couplings
from .errors import InspectionError
from .receptive_fields import derivative_profiles, evaluating, noise_images, pixel_windows, receptive_fields

__all__ = [
    "agreement",
    "attribution",
    "coupling_entropy",
    "dead_capsules",
    "part_maps",
    "perturb",
    "place_centers",
    "place_couplings",
    "receptive_fields",
]


def _couplings(model: Any, x: Tensor, features: Tensor | None = None) -> Tensor:
    """Couplings of all iterations; families of the zoo take features that are there already."""
    if not has_couplings(model):
        raise InspectionError(f"{type(model).__name__} has no couplings to look at: give a model with capsule layers")
    if features is not None and hasattr(model, "couplings_of"):
        return model.couplings_of(features)
    return model.couplings(x, iteration=None)


def _routed_capsules(model: Any, features: Tensor) -> tuple[Tensor, Tensor | None]:
    """Capsules ``[B, I, ...]`` that the class capsules take, and their lengths or activations ``[B, I]``."""
    if isinstance(model, HasRoutedCapsules):
        return model.routed_capsules(features)
    if not hasattr(model, "to_capsules"):
        raise InspectionError(f"{type(model).__name__} has no capsules to look at: give a model with capsule layers")
    capsules = model.to_capsules(features)
    return capsules, capsules.flatten(2).norm(dim=2)


def _of_capsules(model: Any, values: Tensor, dim: int) -> Tensor:
    """Leave out the capsules of zeros that stand for pruned ones where types share matrices."""
    index = getattr(model, "capsule_index", None)
    if index is None or bool((index < model.num_primary).all()):
        return values
    return values.index_select(dim, (index < model.num_primary).nonzero().flatten())


def _places(model: Any, grid: tuple[int, int], count: int) -> tuple[list[tuple[int, int]], Tensor]:
    """Sizes of the maps of the capsules that are routed, and the place of each, see `HasRoutedCapsules`.

    A capsule of zeros, which stands for a pruned one, has the place after the last.
    """
    index = getattr(model, "capsule_index", None)  # of a pruned network, places among all capsules of the map
    size = grid[0] * grid[1]
    if isinstance(model, HasRoutedCapsules):
        grids, places = model.capsule_places()
    elif index is not None:
        grids, places = [grid], torch.where(index < model.num_primary, index % size, size).cpu()
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
    with evaluating(model):
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
    with evaluating(model):
        shares = _of_capsules(model, _couplings(model, x), 2).clamp(min=0)
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
    with evaluating(model):
        found = _of_capsules(model, _couplings(model, x), 2)
        first = found[0] if len(found) > 1 else torch.full_like(found[-1], 1 / found.shape[-1])
        return found[-1] / first.clamp(min=torch.finfo(found.dtype).tiny)


def _routed(model: Any, x: Tensor) -> tuple[Tensor, Tensor, list[tuple[int, int]], Tensor]:
    """Couplings ``[R, B, I, J]``, how much each capsule is there ``[B, I]``, and grids and places of `_places`."""
    features = model.forward_features(x)
    couplings = _couplings(model, x, features)
    capsules, activations = _routed_capsules(model, features)
    grids, places = _places(model, (features.shape[2], features.shape[3]), capsules.shape[1])
    if activations is None:
        activations = couplings.new_ones(capsules.shape[:2])
    return couplings, activations.to(couplings), grids, places


def _windows_of(model: Any, grids: list[tuple[int, int]], places: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each map the weights of the rows ``[height, H]`` and columns ``[width, W]`` that its places look at."""
    with evaluating(model, gradients=True):
        x = noise_images(model)
        values, _ = _routed_capsules(model, model.forward_features(x))
        found = derivative_profiles(values, places, grids, x)
    return [(pixel_windows(rows), pixel_windows(columns)) for rows, columns in found]


def place_couplings(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Couplings of the parts of an image: those of the capsules at each place of the map, as a mean by their lengths.

    Args:
        model: A model with couplings of the capsules of a map.
        x: Images ``[B, C, H, W]``.

    Returns:
        Shares ``[R, B, P, J]`` of each place in each class in each iteration of routing, 0 where no capsule is there,
        and how much capsules are there, ``[B, P]``: the mean of their lengths or activations.

    Raises:
        InspectionError: If the model has no couplings, or routes capsules of the whole image, which have no place.
    """
    with evaluating(model):
        return couplings_by_place(model, x)


def couplings_by_place(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`place_couplings` of a model that is in evaluation mode: exporters trace this, which changes nothing."""
    couplings, activations, grids, places = _routed(model, x)
    count = sum(map(math.prod, grids))
    belongs = F.one_hot(places, count + 1)[:, :count].to(couplings)
    total = activations @ belongs
    votes = (couplings * activations.unsqueeze(2)).transpose(-1, -2) @ belongs
    shares = votes / total.clamp(min=torch.finfo(total.dtype).tiny).unsqueeze(1)
    return shares.transpose(-1, -2), total / belongs.sum(dim=0).clamp(min=1)


def place_centers(model: Any) -> Tensor:
    """Where the places of :func:`place_couplings` look: the middles of their receptive fields, see :func:`part_maps`.

    Args:
        model: A model with couplings of the capsules of a map.

    Returns:
        Rows and columns in pixels, ``[P, 2]``.

    Raises:
        InspectionError: As :func:`place_couplings`.
    """
    with evaluating(model):
        _, _, grids, places = _routed(model, noise_images(model)[:1].detach())
    found = []
    for axes in _windows_of(model, grids, places):
        rows, columns = (weights @ (torch.arange(weights.shape[1]) + 0.5) for weights in axes)
        found.append(torch.cartesian_prod(rows, columns))
    return torch.cat(found)


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
    with evaluating(model):
        couplings, activations, grids, places = _routed(model, x)
        couplings = couplings if iteration is None else couplings[iteration]
    fields = []
    for rows, columns in _windows_of(model, grids, places):
        fields.append(torch.einsum("iy,jx->ijyx", rows, columns).flatten(0, 1).flatten(1))
    looks = F.pad(torch.cat(fields), (0, 0, 0, 1)).to(couplings)[places.to(couplings.device)]  # [I, H*W]
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
    with evaluating(model, gradients=True):
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
    with evaluating(model):
        for batch in batches:
            x = batch if isinstance(batch, Tensor) else batch[0]
            _, lengths = _routed_capsules(model, model.forward_features(x))
            if lengths is None:
                raise InspectionError(
                    f"capsules of {type(model).__name__} have neither lengths nor activations: none of them can be dead"
                )
            lengths = _of_capsules(model, lengths.amax(dim=0), 0)
            longest = lengths if longest is None else torch.maximum(longest, lengths)
    if longest is None:
        raise InspectionError("there are no images to look for dead capsules with: give batches of them")
    return longest < threshold
