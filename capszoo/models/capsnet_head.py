"""Capsule heads: any network of timm as the backbone, and class capsules of any kind on its map

Papers:
* `Dynamic Routing Between Capsules` - https://arxiv.org/abs/1710.09829
* `Efficient-CapsNet: Capsule Network with Self-Attention Routing` - https://arxiv.org/abs/2101.12491
* `Capsules with Inverted Dot-Product Attention Routing` - https://arxiv.org/abs/2002.04764
* `Self-Routing Capsule Networks` - https://papers.nips.cc/paper/8982-self-routing-capsule-networks

A head makes primary capsules of the map of one level of the backbone's features, and class capsules of these. The heads
are those of the other families: to compare them, a backbone and all else can stay the same.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from capszoo.arguments import SearchedArgument
from capszoo.layers import Backbone, drop_capsules
from capszoo.layers.checkpointing import checkpoint_once
from capszoo.models import _builder, _couplings, _heads, _stem
from capszoo.pretrained import fit_weights, shipped_cfgs

__all__ = ["CapsNetHead"]


class CapsNetHead(nn.Module):
    """A backbone of timm, and a capsule head on its map."""

    # Of the default head.
    uniform_arguments = {"head_kwargs": {"num_routing": 1}}
    _heads = ("head",)
    _pooled = "capsules"
    _ends_in_activation = False

    if TYPE_CHECKING:  # not at run time, where torch.jit.script would compile by these annotations
        # nn.Identity once `reset_classifier(0)` or `prune_intermediate_layers` took the layer away.
        primary_caps: nn.Module
        head: Any
        backbone: Backbone
        default_criterion: Callable[[], nn.Module]
        # From timm's builder and from `create_model`.
        pretrained_cfg: dict[str, Any]
        default_cfg: dict[str, Any]
        creation_args: dict[str, Any]

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 224,
        global_pool: str = "flat",
        backbone: str = "resnet18",
        backbone_level: int | None = None,
        backbone_pretrained: bool = False,
        backbone_kwargs: dict | None = None,
        head: str = "dynamic",
        num_types: int | None = None,
        caps_dim: int | None = None,
        class_dim: int = 16,
        head_kwargs: dict | None = None,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Build the network.

        Args:
            num_classes: J, the number of class capsules; 0 for none, and features as output.
            in_chans: Channels of the images.
            img_size: Height and width of the images, in pixels.
            global_pool: 'flat' flattens the primary capsules where there are no class capsules, '' keeps their map.
            backbone: Name of a timm network, or 'stem' for 3x3 convolutions of stride 2, see
                :class:`capszoo.layers.Backbone`.
            backbone_level: Level of its features; None for the last whose map is as large as the head needs it.
            backbone_pretrained: Start from timm's weights of the backbone, and normalise images as they were.
            backbone_kwargs: More keywords of the backbone, such as ``{"drop_path_rate": 0.1}``.
            head: Kind of the head, one of `capszoo.models.list_heads()`.
            num_types: Primary capsule types; None for the head's default.
            caps_dim: K, the dimension of a primary capsule; None for the head's default.
            class_dim: D, the dimension of a class capsule, for heads that let it be chosen.
            head_kwargs: More keywords of the head, such as ``{"num_routing": 1}``.
            drop_rate: Dropout rate of the primary capsules' values before the head; of whole capsules before
                'self_routing'.
            device: Device of the parameters.
            dtype: Type of the parameters.

        Raises:
            ValueError: If there is no such backbone or head, the map is too small for the head, or an argument is out
                of its range.
        """
        given = dict(locals())
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        kind = _heads.find_head(head)
        _builder.check_pool(global_pool, self._pooled)
        num_types = kind.num_types if num_types is None else num_types
        caps_dim = kind.caps_dim if caps_dim is None else caps_dim
        _builder.check_sizes(in_chans=in_chans, num_types=num_types, caps_dim=caps_dim, class_dim=class_dim)
        _builder.check_drop_rate(drop_rate)
        height, width = to_2tuple(img_size)
        self.in_chans, self.img_size = in_chans, (height, width)
        self.global_pool, self.drop_rate = global_pool, drop_rate
        self.grad_checkpointing = False
        self._num_levels = 3
        self.returns_logits = kind.returns_logits
        self._drops_capsules, self._num_types = kind.drops_capsules, num_types
        if kind.criterion is not None:  # else the margin loss, of which options may then say more
            self.default_criterion = kind.criterion
        self.backbone = _stem.make_backbone(given, (height, width), kind.least_map, **dd)
        arguments = _builder.given_arguments(given, img_size=[height, width], num_types=num_types, caps_dim=caps_dim)
        self._arguments = _stem.without_sources(arguments, self.backbone)

        channels, map_size = self.backbone.num_features, self.backbone.map_size
        self.primary_caps = kind.primary(channels, map_size, num_types, caps_dim, **dd)
        # Shapes by a pass without memory for its values, whatever the head makes its capsules of.
        primary = kind.primary(channels, map_size, num_types, caps_dim, device="meta").eval()
        convolved = primary.conv(torch.empty(1, channels, *map_size, device="meta"))
        _, self.num_features, *grid = kind.finish(primary, convolved).shape
        self.grid_size = (grid[0], grid[1])
        _builder.check_capsules(num_types * grid[0] * grid[1], height, width, "set backbone_level")
        self.head_hidden_size = self.num_features * grid[0] * grid[1]
        self.feature_info = [
            dict(num_chs=channels, reduction=height // map_size[0], module="backbone"),
            dict(num_chs=convolved.shape[1], reduction=height // convolved.shape[2], module="primary_caps.conv"),
            dict(num_chs=self.num_features, reduction=height // grid[0], module="primary_caps"),
        ]
        self._head_args = dict(name=head, grid_size=self.grid_size, class_dim=class_dim, kwargs=dict(head_kwargs or {}))
        _heads.check_kwargs(head, self._head_args["kwargs"])
        self._build_head(num_classes, **dd)

    @staticmethod
    def least_map(given: Mapping[str, Any]) -> int:
        """Pixels each way that the map of the backbone's default level has at least, for a head."""
        return _heads.find_head(given["head"]).least_map

    @torch.jit.ignore
    def _build_head(self, num_classes: int, **dd: Any) -> None:
        """Make the head for `num_classes`."""
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes} is not possible: it must be 0 or more")
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            self.head = _heads.make_head(self.primary_caps, num_classes, **self._head_args, **dd)

    arguments = _builder.arguments
    auxiliary_modules = _builder.auxiliary_modules
    reset_classifier = _builder.reset_classifier
    forward_intermediates = _builder.forward_intermediates
    prune_intermediate_layers = _builder.prune_intermediate_layers
    set_grad_checkpointing = _builder.set_grad_checkpointing
    couplings = _couplings.couplings

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The class capsules."""
        return self.head.class_caps if self.num_classes else self.head

    @torch.jit.ignore
    def capsule_layers(self) -> dict[str, nn.Module]:
        """Layers that route."""
        if not self.num_classes:
            return {}
        return {f"head.{key}": layer for key, layer in self.head.capsule_layers().items()}

    @torch.jit.ignore
    def couplings_of(self, features: Tensor) -> Tensor:
        """Couplings ``[R, B, I, J]`` of primary capsules ``[B, num_features, H', W']``."""
        return self.head.couplings_of(features)

    @torch.jit.ignore
    def routed_capsules(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Capsules that the class capsules take, and their lengths or activations, see `capszoo.contract`."""
        return self.head.routed_capsules(features)

    @torch.jit.ignore
    def capsule_places(self) -> tuple[list[tuple[int, int]], Tensor]:
        """Where these are, see `capszoo.contract`."""
        return self.head.capsule_places()

    @torch.jit.ignore
    def search_space(self) -> list[SearchedArgument]:
        """What a search may vary: the number of capsule types, and how long they are."""
        num_types, caps_dim = self._arguments["num_types"], self._arguments["caps_dim"]
        smaller = max(1, caps_dim // 2)
        if self._arguments["head"] == "inverted_attention":  # whose poses are squares
            smaller = max(1, math.isqrt(caps_dim) // 2) ** 2
        return [
            SearchedArgument("num_types", [max(1, num_types // part) for part in (1, 2, 4)]),
            SearchedArgument("caps_dim", [caps_dim, smaller]),
        ]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves out."""
        return {"head.class_caps.bias"} & {key for key, _ in self.named_parameters()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters for optimisation: the backbone's layers, the primary capsules; the head is timm's last."""
        return self.backbone.group_matcher("backbone.", [r"^primary_caps"], coarse)

    @torch.jit.ignore
    def _levels(self) -> list[Callable[[Tensor], Tensor]]:
        """Levels of `feature_info` that `prune_intermediate_layers` has left, each a function of the one before."""
        primary: Any = self.primary_caps
        finish = _heads.find_head(self._arguments["head"]).finish
        levels: list[Any] = [self.backbone]
        if self._num_levels == 2:
            levels += [primary]
        elif self._num_levels == 3:
            levels += [primary.conv, partial(finish, primary)]
        return levels

    @torch.jit.ignore
    def _cut(self, last: int) -> None:
        """Remove the levels after the `last`."""
        self.primary_caps = nn.Identity() if last == 0 else self.primary_caps.conv
        self.num_features = self.feature_info[last]["num_chs"]
        self._num_levels = last + 1

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to the primary capsules ``[B, num_features, H', W']``."""
        x = self.backbone(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_once(self.primary_caps, x)
        return self.primary_caps(x)

    def _drop(self, x: Tensor) -> Tensor:
        """Drop values of primary capsules, or whole capsules where their activations stand as logarithms."""
        if self._drops_capsules:
            return drop_capsules(x, self._num_types, self.drop_rate, self.training)
        return F.dropout(x, p=self.drop_rate, training=self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map primary capsules to class scores ``[B, J]``, or flatten them if `pre_logits`."""
        if self.drop_rate > 0.0:
            x = self._drop(x)
        if pre_logits or self.num_classes == 0:
            return x.flatten(1) if self.global_pool == "flat" else x
        return self.head(x)

    @torch.jit.ignore
    def forward_capsules(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images ``[B, C, H, W]`` to class capsules ``[B, J, ...]`` and class scores ``[B, J]``.

        Raises:
            RuntimeError: If the model has no class capsules (`num_classes=0`).
        """
        _builder.check_classes(self)
        x = self.forward_features(x)
        if self.drop_rate > 0.0:
            x = self._drop(x)
        capsules = self.head.capsules(x)
        return capsules, self.head.scores(capsules)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to class scores ``[B, J]``, by the head lengths from 0 to 1 or logits."""
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit weights to a model of other classes, channels or image size; keep all that can be kept.

    Raises:
        ValueError: If the weights are those of another architecture.
    """
    other_classes, other_chans, other_size = _builder.trained_otherwise(model)
    may_differ = {
        **dict.fromkeys(_stem.image_weights(model), other_chans),
        "primary_caps.caps.conv.weight": other_size,
        "head.class_caps.weight": other_classes or other_size,
        "head.class_caps.bias": other_classes or other_size,
    }
    return fit_weights(state_dict, model, [key for key, differs in may_differ.items() if differs])


_cfg = partial(
    _builder.digits_cfg,
    input_size=(3, 224, 224),
    interpolation="bicubic",
    first_conv="backbone.net.conv1",
    classifier="head.class_caps",
)

default_cfgs = generate_default_cfgs(shipped_cfgs(("capsnet_head",), _cfg))

_create_capsnet_head = partial(_builder.build_model, CapsNetHead, checkpoint_filter_fn)


@register_model
def capsnet_head(pretrained: bool = False, **kwargs: Any) -> CapsNetHead:
    """A backbone of timm (`backbone=`, resnet18 by default) under a capsule head (`head=`, dynamic by default)."""
    return _create_capsnet_head("capsnet_head", pretrained, **kwargs)
