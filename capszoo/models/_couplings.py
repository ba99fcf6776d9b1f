"""What families share of looking into their routing: couplings, the capsules that are routed, and where these are.

A model, or the head of one, has `couplings_of(features)`, `routed_capsules(features)` and `capsule_places()`, of one of
the kinds below.
"""

from typing import Any

import torch
from torch import Tensor

from capszoo.layers import capsule_lengths

from ._builder import check_classes

Grids = list[tuple[int, int]]


@torch.jit.ignore
@torch.no_grad()
def couplings(self: Any, x: Tensor, iteration: int | None = -1) -> Tensor:
    """How capsules divide their votes among the classes, by the operators' own arithmetic; a method of such models.

    Args:
        self: The model.
        x: Images ``[B, C, H, W]``.
        iteration: Of routing, from 0; -1 for the last, None for all.

    Returns:
        Couplings ``[B, I, J]``, or ``[R, B, I, J]`` of all iterations; without derivatives.

    Raises:
        RuntimeError: If the model has no class capsules (`num_classes=0`), or was made without capsule layers.
        IndexError: If there are fewer iterations.
    """
    check_classes(self)
    if not self.capsule_layers():
        raise RuntimeError("this model was made without capsule layers and has no couplings: make it with some")
    found = self.couplings_of(self.forward_features(x))
    if iteration is not None and not -len(found) <= iteration < len(found):
        raise IndexError(f"iteration={iteration} is not possible: there are {len(found)}, counted from 0")
    return found if iteration is None else found[iteration]


# Capsules are vectors, whose lengths say how much they are there.


@torch.jit.ignore
def couplings_of_vectors(self: Any, features: Tensor) -> Tensor:
    """Couplings ``[R, B, I, J]`` of the capsules of a map; a method of models and heads with `to_capsules`."""
    return self.class_caps.couplings(self.to_capsules(features))


@torch.jit.ignore
def routed_vectors(self: Any, features: Tensor) -> tuple[Tensor, Tensor]:
    """Capsules ``[B, I, K]`` that the class capsules take, and their lengths ``[B, I]``."""
    capsules = self.to_capsules(features)
    return capsules, capsule_lengths(capsules)


@torch.jit.ignore
def places_by_type(self: Any) -> tuple[Grids, Tensor]:
    """The map that is routed, and the place there of each capsule, which are ordered by type, then by place."""
    height, width = self.routed_size
    return [(height, width)], torch.arange(self.class_caps.num_capsules) % (height * width)


# Inverted attention: poses are normalised, so that nothing says how much a capsule is there; passes of all layers.


@torch.jit.ignore
def couplings_of_passes(self: Any, features: Tensor) -> Tensor:
    """Couplings ``[R, B, I, J]`` of each pass; a method of models and heads with `route_in_passes`."""
    found, parents = [], None
    for below, capsules in self.route_in_passes(features):
        found.append(self.class_caps.couplings(below, parents))
        parents = capsules
    return torch.stack(found)


@torch.jit.ignore
def routed_poses(self: Any, features: Tensor) -> tuple[Tensor, None]:
    """Poses ``[B, I, P, P]`` that the class capsules take in the last pass."""
    below, _ = self.route_in_passes(features)[-1]
    return below.permute(0, 1, 4, 5, 2, 3).flatten(1, 3), None


# Class capsules take a map as it is. Capsules of self-routing have logarithms of activations, and the types at a place
# stand together.


@torch.jit.ignore
def couplings_of_map(self: Any, features: Tensor) -> Tensor:
    """Couplings ``[1, B, I, J]`` of the capsules of a map, which class capsules take as it is."""
    return self.class_caps.couplings(features)


@torch.jit.ignore
def routed_with_activations(self: Any, features: Tensor) -> tuple[Tensor, Tensor]:
    """Poses ``[B, I, K]`` that the class capsules take, and their activations ``[B, I]``."""
    poses, log_activations = self.class_caps.to_capsules(features)
    return poses, log_activations.exp()


@torch.jit.ignore
def places_by_place(self: Any) -> tuple[Grids, Tensor]:
    """The map that is routed, and the place there of each capsule, which are ordered by place, then by type."""
    height, width = self.routed_size
    places = torch.arange(height * width)
    return [(height, width)], places.repeat_interleave(self.class_caps.num_types)
