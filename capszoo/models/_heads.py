"""Capsule heads of any map: what makes primary capsules of it, and class capsules and scores of these.

A head is a class. `primary` makes the module from a map ``[B, C, H, W]`` to primary capsules
``[B, num_features, H', W']``: its `conv`, and then `finish`. An instance takes these to class scores ``[B, J]``:
`scores` of `capsules`, the class capsules ``[B, J, ...]``. The layer that tells classes apart is its `class_caps`.
`HEADS` has an entry for each.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from capszoo.errors import unknown_name
from capszoo.layers import (
    ClassCaps,
    InvertedAttentionCaps,
    InvertedAttentionConvCaps,
    MatrixPrimaryCaps,
    PoseCaps,
    PrimaryCaps,
    SelfAttentionRouting,
    SelfRouting,
    capsule_lengths,
    conv_caps_size,
)
from capszoo.layers.backbone import LEAST_MAP
from capszoo.losses import CrossEntropyLoss
from capszoo.models import _couplings, _stem

from .efficient_capsnet import ConvNorm, DepthwiseCaps
from .inverted_attention import InvertedAttentionCapsNet

__all__ = ["HEADS", "check_kwargs", "find_head", "list_heads", "make_head"]

# What a head's constructor gets from the model.
_FROM_MODEL = {"primary", "grid_size", "num_classes", "class_dim", "dd"}


class VectorHead(nn.Module):
    """Class capsules whose lengths are the scores.

    Attributes:
        num_types: Types of primary capsules by default.
        caps_dim: Their dimension by default.
        least_map: Pixels each way of the map that it is made for.
        criterion: Makes the loss of its scores; None for the margin loss.
        returns_logits: Whether its scores are logits or log-probabilities.
        drops_capsules: Whether dropout must leave out whole capsules, by :func:`capszoo.layers.drop_capsules`.

    Args:
        num_types: T, the types of primary capsules.
        caps_dim: K, their dimension.
        class_caps: The layer from capsules ``[B, T*H*W, K]`` to class capsules ``[B, J, D]``.
        grid_size: (H, W) of their map.
    """

    num_types, caps_dim, least_map = 32, 8, LEAST_MAP
    criterion: Callable[[], nn.Module] | None = None
    returns_logits = False
    drops_capsules = False

    couplings_of = _couplings.couplings_of_vectors
    routed_capsules = _couplings.routed_vectors
    capsule_places = _couplings.places_by_type

    def __init__(self, num_types: int, caps_dim: int, class_caps: nn.Module, grid_size: tuple[int, int]):
        super().__init__()
        self.shape, self.routed_size = (num_types, caps_dim), grid_size
        self.class_caps = class_caps

    @torch.jit.ignore
    def capsule_layers(self) -> dict[str, nn.Module]:
        """Layers that route, by name."""
        return {"class_caps": self.class_caps}

    def to_capsules(self, x: Tensor) -> Tensor:
        """Reorder a map ``[B, T*K, H, W]`` into capsules ``[B, T*H*W, K]``, type-major."""
        return x.unflatten(1, self.shape).permute(0, 1, 3, 4, 2).flatten(1, 3)

    def capsules(self, x: Tensor) -> Tensor:
        """Map primary capsules ``[B, T*K, H, W]`` to class capsules ``[B, J, D]``."""
        return self.class_caps(self.to_capsules(x))

    def scores(self, capsules: Tensor) -> Tensor:
        """Map class capsules to their lengths ``[B, J]``."""
        return capsule_lengths(capsules)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.capsules(x))


class DynamicHead(VectorHead):
    """Dynamic routing, see :class:`capszoo.models.CapsNet`; the primary capsules' map is about 6x6.

    Args:
        primary: The module of the primary capsules.
        grid_size: (H', W') of their map.
        num_classes: J.
        class_dim: D, the dimension of a class capsule.
        num_routing: R, the number of routing iterations.
        share_weights: One vote matrix per capsule type instead of one per capsule.
        dd: Device and dtype of the parameters.
    """

    def __init__(
        self,
        primary: PrimaryCaps,
        grid_size: tuple[int, int],
        num_classes: int,
        class_dim: int = 16,
        num_routing: int = 3,
        share_weights: bool = False,
        **dd: Any,
    ):
        num_types, caps_dim = primary.num_types, primary.caps_dim
        num_capsules = num_types * grid_size[0] * grid_size[1]
        more: dict[str, Any] = dict(num_weights=num_types if share_weights else num_capsules, num_routing=num_routing)
        more |= _stem.fresh_votes("default", share_weights, grid_size[0] * grid_size[1])
        class_caps = ClassCaps(num_capsules, caps_dim, num_classes, class_dim, **more, **dd)
        super().__init__(num_types, caps_dim, class_caps, grid_size)

    @staticmethod
    def primary(in_chans: int, map_size: tuple[int, int], num_types: int, caps_dim: int, **dd: Any) -> nn.Module:
        """A convolution with squash."""
        kernel_size, stride = _stem.default_conv(map_size)
        return PrimaryCaps(in_chans, num_types, caps_dim, kernel_size, stride, **dd)

    @staticmethod
    def finish(primary: PrimaryCaps, x: Tensor) -> Tensor:
        """Make primary capsules of the map of their convolution."""
        return primary.squash_map(x)


class DepthwisePrimaryCaps(nn.Module):
    """A 1x1 convolution to the capsules' channels, with ReLU and BatchNorm, and a depthwise one over the whole map."""

    def __init__(self, in_chans: int, num_types: int, caps_dim: int, map_size: tuple[int, int], **dd: Any):
        super().__init__()
        self.conv = ConvNorm(in_chans, num_types * caps_dim, 1, **dd)
        self.caps = DepthwiseCaps(num_types, caps_dim, map_size, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.caps(self.conv(x))


class SelfAttentionHead(VectorHead):
    """Self-attention routing, see :class:`capszoo.models.EfficientCapsNet`; each type has one primary capsule.

    Args:
        primary: The module of the primary capsules.
        grid_size: (1, 1).
        num_classes: J.
        class_dim: D, the dimension of a class capsule.
        couplings: 'attention', or 'uniform' for the ablation without.
        dd: Device and dtype of the parameters.
    """

    num_types, caps_dim, least_map = 16, 8, 6

    def __init__(
        self,
        primary: DepthwisePrimaryCaps,
        grid_size: tuple[int, int],
        num_classes: int,
        class_dim: int = 16,
        couplings: str = "attention",
        **dd: Any,
    ):
        num_types, caps_dim = primary.caps.num_types, primary.caps.caps_dim
        class_caps = SelfAttentionRouting(num_types, caps_dim, num_classes, class_dim, couplings, **dd)
        super().__init__(num_types, caps_dim, class_caps, grid_size)

    @staticmethod
    def primary(in_chans: int, map_size: tuple[int, int], num_types: int, caps_dim: int, **dd: Any) -> nn.Module:
        """A depthwise convolution as large as the map, with squash."""
        return DepthwisePrimaryCaps(in_chans, num_types, caps_dim, map_size, **dd)

    @staticmethod
    def finish(primary: DepthwisePrimaryCaps, x: Tensor) -> Tensor:
        """Make primary capsules of the map of their convolution."""
        return primary.caps(x)


class InvertedAttentionHead(nn.Module):
    """Two convolutional capsule layers and class capsules, by inverted dot-product attention; the scores are logits.

    See :class:`capszoo.models.InvertedAttentionCapsNet`. `caps_dim` is that of a matrix, the square of its side.

    Args:
        primary: The module of the primary capsules.
        grid_size: (H', W') of their map, 7x7 at least.
        num_classes: J.
        num_passes: Passes of routing; 1 for uniform couplings alone.
        concurrent: Route all layers in each pass from the values of the pass before, otherwise one after the other.
        dd: Device and dtype of the parameters.

    Raises:
        ValueError: If the map is too small.
    """

    num_types, caps_dim, least_map = 32, 16, LEAST_MAP
    criterion: Callable[[], nn.Module] | None = CrossEntropyLoss
    returns_logits = True
    drops_capsules = False

    _route_sequentially = InvertedAttentionCapsNet._route_sequentially
    _route_concurrently = InvertedAttentionCapsNet._route_concurrently
    _next_poses = InvertedAttentionCapsNet._next_poses
    couplings_of = _couplings.couplings_of_passes
    routed_capsules = _couplings.routed_poses
    capsule_places = _couplings.places_by_type

    def __init__(
        self,
        primary: MatrixPrimaryCaps,
        grid_size: tuple[int, int],
        num_classes: int,
        num_passes: int = 2,
        concurrent: bool = True,
        **dd: Any,
    ):
        super().__init__()
        if not 1 <= num_passes <= 100:
            raise ValueError(f"num_passes={num_passes} is not possible: routing takes 1 to 100 whole passes")
        num_types, side = primary.num_types, primary.pose_size
        self.shape, self.num_passes, self.concurrent = (num_types, side, side), num_passes, concurrent
        self.caps = nn.ModuleList()
        top = grid_size
        for stride in (2, 1):
            self.caps.append(InvertedAttentionConvCaps(num_types, num_types, side, stride=stride, **dd))
            top = conv_caps_size(top, 3, stride)
        if min(top) < 1:
            raise ValueError(
                f"head='inverted_attention' needs a map of 7x7, the backbone's is {grid_size[0]}x{grid_size[1]}: set "
                f"backbone_level or resize the images"
            )
        self.routed_size = top
        self.class_caps = InvertedAttentionCaps(num_types * top[0] * top[1], num_classes, side, **dd)
        self.fc = nn.Linear(side**2, 1, **dd)

    @staticmethod
    def primary(in_chans: int, map_size: tuple[int, int], num_types: int, caps_dim: int, **dd: Any) -> nn.Module:
        """A 1x1 convolution and a layer normalisation of each pose."""
        side = math.isqrt(caps_dim)
        if side**2 != caps_dim:
            raise ValueError(f"caps_dim={caps_dim} is not possible: poses of 'inverted_attention' are squares, give 16")
        return MatrixPrimaryCaps(in_chans, num_types, side, **dd)

    @staticmethod
    def finish(primary: MatrixPrimaryCaps, x: Tensor) -> Tensor:
        """Make primary capsules of the map of their convolution."""
        return primary.norm(x)

    @torch.jit.ignore
    def capsule_layers(self) -> dict[str, nn.Module]:
        """Layers that route, by name."""
        return {**{f"caps.{i}": layer for i, layer in enumerate(self.caps)}, "class_caps": self.class_caps}

    def route_in_passes(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Poses of each pass, see :meth:`capszoo.models.InvertedAttentionCapsNet.route_in_passes`."""
        x = x.unflatten(1, self.shape)
        return self._route_concurrently(x) if self.concurrent else self._route_sequentially(x)

    def capsules(self, x: Tensor) -> Tensor:
        """Map primary capsules ``[B, T*P*P, H, W]`` to class capsules ``[B, J, P*P]``."""
        _, capsules = self.route_in_passes(x)[-1]
        return capsules.flatten(2)

    def scores(self, capsules: Tensor) -> Tensor:
        """Map class capsules to logits ``[B, J]``, by one linear layer for all classes."""
        return self.fc(capsules).squeeze(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.capsules(x))


class SelfRoutingHead(nn.Module):
    """Self-routing of all capsules of the map (:class:`capszoo.models.SelfRoutingNet`); scores are log-probabilities.

    Args:
        primary: The module of the primary capsules.
        grid_size: (H', W') of their map.
        num_classes: J.
        couplings: 'self', or 'uniform' for the ablation without.
        dd: Device and dtype of the parameters.
    """

    num_types, caps_dim, least_map = 32, 16, 6
    criterion: Callable[[], nn.Module] | None = CrossEntropyLoss
    returns_logits = True
    drops_capsules = True

    couplings_of = _couplings.couplings_of_map
    routed_capsules = _couplings.routed_with_activations
    capsule_places = _couplings.places_by_place

    def __init__(
        self, primary: PoseCaps, grid_size: tuple[int, int], num_classes: int, couplings: str = "self", **dd: Any
    ):
        super().__init__()
        num_types = primary.num_types
        caps_dim = primary.conv.out_channels // num_types - 1
        self.routed_size = grid_size
        self.class_caps = SelfRouting(num_types, caps_dim, num_classes, grid_size, couplings, **dd)

    @staticmethod
    def primary(in_chans: int, map_size: tuple[int, int], num_types: int, caps_dim: int, **dd: Any) -> nn.Module:
        """A 3x3 convolution and BatchNorm, to poses and activations."""
        return PoseCaps(in_chans, num_types, caps_dim, **dd)

    @staticmethod
    def finish(primary: PoseCaps, x: Tensor) -> Tensor:
        """Make primary capsules of the map of their convolution."""
        return primary.activate(x)

    @torch.jit.ignore
    def capsule_layers(self) -> dict[str, nn.Module]:
        """Layers that route, by name."""
        return {"class_caps": self.class_caps}

    def capsules(self, x: Tensor) -> Tensor:
        """Map primary capsules to class capsules ``[B, J, 1]``, which are the logarithms of their activations alone."""
        return self.class_caps(x).unsqueeze(2)

    def scores(self, capsules: Tensor) -> Tensor:
        """The logarithms of the activations ``[B, J]``."""
        return capsules.squeeze(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.capsules(x))


HEADS: dict[str, Any] = {
    "dynamic": DynamicHead,
    "inverted_attention": InvertedAttentionHead,
    "self_attention": SelfAttentionHead,
    "self_routing": SelfRoutingHead,
}


def list_heads() -> list[str]:
    """Names that `capsnet_head` takes as ``head=``."""
    return list(HEADS)


def find_head(name: str) -> Any:
    """The class of a head.

    Raises:
        ValueError: If there is none of this name.
    """
    if name not in HEADS:
        raise ValueError(unknown_name("head", name, HEADS, f"choose from {', '.join(HEADS)}"))
    return HEADS[name]


def check_kwargs(name: str, kwargs: Mapping[str, Any]) -> None:
    """Check keywords of a head that are not the model's.

    Raises:
        ValueError: If it does not take one.
    """
    known = sorted(inspect.signature(find_head(name)).parameters.keys() - _FROM_MODEL)
    for key in kwargs:
        if key not in known:
            text = unknown_name("keyword", str(key), known, f"it takes {', '.join(known)}")
            raise ValueError(f"head_kwargs={dict(kwargs)} of head={name!r}: {text}")


def make_head(
    primary: nn.Module,
    num_classes: int,
    name: str,
    grid_size: tuple[int, int],
    class_dim: int,
    kwargs: Mapping[str, Any],
    **dd: Any,
) -> nn.Module:
    """Make a head.

    Args:
        primary: The module of its primary capsules.
        num_classes: J.
        name: Its name.
        grid_size: (H', W') of the primary capsules' map.
        class_dim: D, the dimension of a class capsule, where the head takes one.
        kwargs: More keywords.
        **dd: Device and dtype of the parameters.

    Raises:
        ValueError: If a keyword is not possible.
    """
    kind = find_head(name)
    own = {"class_dim": class_dim} if "class_dim" in inspect.signature(kind).parameters else {}
    return kind(primary, grid_size, num_classes, **own, **kwargs, **dd)
