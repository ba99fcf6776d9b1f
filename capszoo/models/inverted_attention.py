"""Capsules with inverted dot-product attention routing

Paper: `Capsules with Inverted Dot-Product Attention Routing` - https://arxiv.org/abs/2002.04764

A residual network, a 1x1 convolution to a map of capsules with 4x4 poses, two layers of convolutional capsules, class
capsules, and a linear map that all of these share. A child is routed to the parents whose poses agree with its vote;
poses are layer-normalised and have no activation beside them. All layers are routed at once, each from the values of
the pass before, which are those of a first pass with uniform couplings.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from capszoo.arguments import SearchedArgument
from capszoo.layers import InvertedAttentionCaps, InvertedAttentionConvCaps, MatrixPrimaryCaps, conv_caps_size
from capszoo.layers.checkpointing import checkpoint_once
from capszoo.layers.stems import create_stem
from capszoo.losses import CrossEntropyLoss
from capszoo.models import _builder, _couplings
from capszoo.pretrained import fit_weights, shipped_cfgs

__all__ = ["InvertedAttentionCapsNet"]

# Sides and strides of the kernels of the convolutional capsules.
_KERNEL_SIZE = 3
_STRIDES = (2, 1)
# Far above what any paper uses, and a bound to what the header of a file can make a forward pass cost.
_MAX_PASSES = 100


class _NoCaps(nn.Identity):
    """In place of class capsules, which take the parents of the pass before as well; TorchScript compiles the call."""

    def forward(self, x: Tensor, parents: Tensor | None = None) -> Tensor:
        return x


class InvertedAttentionCapsNet(nn.Module):
    """Capsule network of Tsai, Srivastava, Goh and Salakhutdinov 2020 (section 5), in its forms for CIFAR."""

    uniform_arguments = {"num_passes": 1}
    _heads = ("class_caps", "fc")
    _pooled = "capsules"
    returns_logits = True

    if TYPE_CHECKING:  # not at run time, where torch.jit.script would compile by these annotations
        # nn.Identity once `reset_classifier(0)` or `prune_intermediate_layers` took the layer away.
        primary_caps: MatrixPrimaryCaps
        class_caps: InvertedAttentionCaps
        fc: nn.Module
        # From timm's builder and from `create_model`.
        pretrained_cfg: dict[str, Any]
        default_cfg: dict[str, Any]
        creation_args: dict[str, Any]

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 32,
        global_pool: str = "flat",
        backbone: str = "resnet",
        stem_dims: tuple[int, ...] = (64, 128),
        stem_depths: tuple[int, ...] = (3, 4),
        num_types: int = 32,
        pose_size: int = 4,
        num_hidden: int = 0,
        num_passes: int = 2,
        concurrent: bool = True,
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
            backbone: 'resnet', or 'conv' for one convolution, the paper's simple backbone.
            stem_dims: Filters of each stage of the ResNet; of the convolution, one number.
            stem_depths: Basic blocks of each stage of the ResNet. All stages but the first halve the map.
            num_types: Capsule types of the primary and of each convolutional capsule layer.
            pose_size: P, the side of a pose: 4 for CIFAR-10 in the paper, 6 for CIFAR-100.
            num_hidden: Capsules of a layer before the class capsules, connected to the whole map; 0 for no such layer.
                For CIFAR-100 the paper has 20.
            num_passes: Passes of routing; 1 for uniform couplings alone, to measure what routing brings.
            concurrent: Route all layers in each pass from the values of the pass before, as the paper does by default;
                otherwise each layer has all its passes before the next.
            drop_rate: Dropout rate of the primary capsules' values before routing.
            device: Device of the parameters.
            dtype: Type of the parameters.

        Raises:
            ValueError: If the images are too small for the convolutions, or an argument is out of its range.
        """
        given = dict(locals())
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        _builder.check_pool(global_pool, self._pooled)
        _builder.check_sizes(in_chans=in_chans, num_types=num_types, pose_size=pose_size)
        _builder.check_drop_rate(drop_rate)
        if num_passes not in range(1, _MAX_PASSES + 1):
            raise ValueError(f"num_passes={num_passes} is not possible: routing takes 1 to {_MAX_PASSES} whole passes")
        if num_hidden < 0:
            raise ValueError(f"num_hidden={num_hidden} is not possible: it must be 0 or more")
        stem_dims, stem_depths = tuple(stem_dims), tuple(stem_depths)
        height, width = to_2tuple(img_size)
        self.in_chans, self.img_size = in_chans, (height, width)
        self.global_pool, self.drop_rate = global_pool, drop_rate
        self.num_passes, self.concurrent = int(num_passes), concurrent
        self.grad_checkpointing = False
        self._arguments = _builder.given_arguments(
            given, img_size=[height, width], stem_dims=list(stem_dims), stem_depths=list(stem_depths)
        )

        self.stem = create_stem(backbone, in_chans, stem_dims, stem_depths, **dd)
        halvings = 1 if backbone == "conv" else len(stem_dims) - 1
        self.grid_size = (-(-height // 2**halvings), -(-width // 2**halvings))
        top = self.grid_size
        least = 1
        for stride in _STRIDES:
            top = conv_caps_size(top, _KERNEL_SIZE, stride)
        for stride in reversed(_STRIDES):
            least = (least - 1) * stride + _KERNEL_SIZE
        if min(top) < 1:
            least = (least - 1) * 2**halvings + 1
            raise ValueError(
                f"img_size={height}x{width} is too small: the convolutions need {least} pixels each way, resize the "
                f"images"
            )
        self.primary_caps = MatrixPrimaryCaps(stem_dims[-1], num_types, pose_size, **dd)
        self.num_features = num_types * pose_size**2
        self.head_hidden_size = self.num_features * self.grid_size[0] * self.grid_size[1]
        reduction = height // self.grid_size[0]
        self.feature_info = [
            dict(num_chs=stem_dims[-1], reduction=reduction, module="stem"),
            dict(num_chs=self.num_features, reduction=reduction, module="primary_caps.conv"),
            dict(num_chs=self.num_features, reduction=reduction, module="primary_caps"),
        ]
        self._conv_caps_args = [
            dict(num_types=num_types, num_parents=num_types, kernel_size=_KERNEL_SIZE, stride=stride)
            for stride in _STRIDES
        ]
        self.routed_size = top
        self._num_capsules, self._num_hidden = num_types * top[0] * top[1], num_hidden
        self._pose_size = pose_size
        self._build_head(num_classes, **dd)

    @torch.jit.ignore
    def _build_head(self, num_classes: int, **dd: Any) -> None:
        """Make class capsules and classifier for `num_classes`; the layers between are kept where there are any."""
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes} is not possible: it must be 0 or more")
        self.num_classes = num_classes
        dd["pose_size"] = self._pose_size
        if not num_classes or not hasattr(self, "caps"):
            self.caps = nn.ModuleList().train(self.training)
        if num_classes and not len(self.caps):
            self.caps.extend(InvertedAttentionConvCaps(**args, **dd) for args in self._conv_caps_args)
            if self._num_hidden:
                self.caps.append(InvertedAttentionCaps(self._num_capsules, self._num_hidden, **dd))
            self.caps.train(self.training)
        num_capsules = self._num_hidden or self._num_capsules
        self.class_caps = InvertedAttentionCaps(num_capsules, num_classes, **dd) if num_classes else _NoCaps()
        side = dd.pop("pose_size")
        # One map for all class capsules: what tells classes apart are their matrices.
        self.fc = nn.Linear(side**2, 1, **dd) if num_classes else nn.Identity()

    arguments = _builder.arguments
    auxiliary_modules = _builder.auxiliary_modules
    reset_classifier = _builder.reset_classifier
    forward_intermediates = _builder.forward_intermediates
    prune_intermediate_layers = _builder.prune_intermediate_layers
    set_grad_checkpointing = _builder.set_grad_checkpointing
    get_classifier = _builder.get_classifier
    couplings = _couplings.couplings
    couplings_of = _couplings.couplings_of_passes
    routed_capsules = _couplings.routed_poses

    @torch.jit.ignore
    def capsule_layers(self) -> dict[str, nn.Module]:
        """Layers that route."""
        if not self.num_classes:
            return {}
        return {**{f"caps.{i}": layer for i, layer in enumerate(self.caps)}, "class_caps": self.class_caps}

    @torch.jit.ignore
    def capsule_places(self) -> tuple[list[tuple[int, int]], Tensor]:
        """The map below the class capsules, and the place there of each capsule; none with hidden capsules."""
        if self._num_hidden:
            return [], torch.arange(0)
        return _couplings.places_by_type(self)

    @torch.jit.ignore
    def default_criterion(self) -> nn.Module:
        """Cross-entropy, as in the paper."""
        return CrossEntropyLoss()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves out, beside biases and normalisations: none."""
        return set()

    @torch.jit.ignore
    def search_space(self) -> list[SearchedArgument]:
        """What a search may vary: the passes, how they are ordered, and the size of the capsule layers."""
        num_types = self._arguments["num_types"]
        return [
            SearchedArgument("num_passes", [self.num_passes, *({1, 2, 3} - {self.num_passes})]),
            SearchedArgument("concurrent", [self.concurrent, not self.concurrent]),
            SearchedArgument("num_types", [num_types, max(1, num_types // 2)]),
        ]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters for optimisation; what no pattern names (class capsules, fc) is timm's last group."""
        blocks: list[Any] = [(r"^stem\.blocks" if coarse else r"^stem\.blocks\.(\d+)", (0,) if coarse else None)]
        blocks += [(r"^primary_caps", (98,))]
        blocks += [(rf"^caps\.{number}\.", (99 + number,)) for number in range(len(self.caps))]
        return dict(stem=r"^stem\.(?:conv|norm)", blocks=blocks)

    @torch.jit.ignore
    def _levels(self) -> list[Callable[[Tensor], Tensor]]:
        """Levels of `feature_info` that `prune_intermediate_layers` has left, each a function of the one before."""
        primary = self.primary_caps
        run = checkpoint_once if self.grad_checkpointing else nn.Module.__call__
        levels: list[Callable[[Tensor], Tensor]] = [partial(run, self.stem)]
        if not isinstance(primary, nn.Identity):
            levels += [partial(run, primary.conv)]
            if not isinstance(primary.norm, nn.Identity):
                levels += [primary.norm]
        return levels

    @torch.jit.ignore
    def _cut(self, last: int) -> None:
        """Remove the levels after the `last`."""
        if last == 0:
            self.primary_caps = nn.Identity()
        else:
            self.primary_caps.norm = nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to the primary capsules ``[B, T*P*P, H', W']``."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_once(self.primary_caps, checkpoint_once(self.stem, x))
        return self.primary_caps(self.stem(x))

    def _route(self, x: Tensor) -> Tensor:
        """Poses of the class capsules ``[B, J, P*P]`` from the primary capsules ``[B, T*P*P, H', W']``."""
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        _, capsules = self.route_in_passes(x)[-1]
        return capsules.flatten(2)

    def route_in_passes(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each pass the poses below the class capsules that it took, and theirs after it; `x` as `forward_head`."""
        primary = self.primary_caps.to_capsules(x)
        return self._route_concurrently(primary) if self.concurrent else self._route_sequentially(primary)

    def _route_sequentially(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        for layer in self.caps:
            below = x
            x = layer(below, None)
            for _ in range(1, self.num_passes):
                x = layer(below, x)
        capsules = self.class_caps(x, None)
        passes = [(x, capsules)]
        for _ in range(1, self.num_passes):
            capsules = self.class_caps(x, capsules)
            passes.append((x, capsules))
        return passes

    def _route_concurrently(self, primary: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Procedure 2 of the paper, without the passes that cannot reach the class capsules.

        A new pose moves up by one layer a pass: of two passes the second is that of the class capsules alone.
        """
        below, poses = primary, [primary]
        for layer in self.caps:
            below = layer(below, None)
            poses.append(below)
        capsules = self.class_caps(below, None)
        passes = [(below, capsules)]
        for number in range(1, self.num_passes):
            capsules = self.class_caps(poses[-1], capsules)
            passes.append((poses[-1], capsules))
            poses = self._next_poses(poses, self.num_passes - number)
        return passes

    def _next_poses(self, poses: list[Tensor], num_left: int) -> list[Tensor]:
        """One pass of all layers below the class capsules; those too far from them for the passes left stay."""
        following = [poses[0]]
        for i, layer in enumerate(self.caps):
            reaches = len(self.caps) - i < num_left
            following.append(layer(poses[i], poses[i + 1]) if reaches else poses[i + 1])
        return following

    @torch.jit.ignore
    def forward_capsules(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images to class capsules ``[B, J, P, P]`` and their scores ``[B, J]``.

        Args:
            x: Images ``[B, C, H, W]``.

        Raises:
            RuntimeError: If the model has no class capsules (`num_classes=0`).
        """
        _builder.check_classes(self)
        poses = self._route(self.forward_features(x))
        side = self.primary_caps.pose_size
        return poses.unflatten(2, (side, side)), self.fc(poses).squeeze(2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map primary capsules ``[B, T*P*P, H', W']`` to class scores ``[B, J]``, or flatten them if `pre_logits`."""
        if pre_logits or self.num_classes == 0:
            if self.drop_rate > 0.0:
                x = F.dropout(x, p=self.drop_rate, training=self.training)
            return x.flatten(1) if self.global_pool == "flat" else x
        return self.fc(self._route(x)).squeeze(2)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to the logits of the classes ``[B, J]``; the largest is the class."""
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit weights to a model of other classes, channels or image size; keep all that can be kept.

    Raises:
        ValueError: If the weights are those of another architecture.
    """
    other_classes, other_chans, other_size = _builder.trained_otherwise(model)
    if not model.num_classes:  # which has none of the layers that route
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith(("caps.", "fc."))}
    may_differ = {
        "stem.conv.weight": other_chans,
        "caps.2.weight": other_size,
        "class_caps.weight": other_classes or other_size,
    }
    return fit_weights(state_dict, model, [key for key, differs in may_differ.items() if differs])


def _cfg(**kwargs: Any) -> dict[str, Any]:
    """A `pretrained_cfg` for CIFAR-10."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (16, 16),
        "fixed_input_size": True,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "stem.conv",
        "classifier": "class_caps",
        "license": "mit",
        "paper_ids": "arXiv:2002.04764",
        "paper_name": "Capsules with Inverted Dot-Product Attention Routing",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(shipped_cfgs(("capsnet_conv_ia", "capsnet_resnet_ia"), _cfg))

_create_capsnet_ia = partial(_builder.build_model, InvertedAttentionCapsNet, checkpoint_filter_fn)


@register_model
def capsnet_conv_ia(pretrained: bool = False, **kwargs: Any) -> InvertedAttentionCapsNet:
    """The form with one convolution before the capsules, the simple backbone of Tsai et al. 2020; 561,297 parameters.

    The paper's code has the convolution's kernel and stride but no configuration; 256 filters are taken here.
    """
    model_args = dict(backbone="conv", stem_dims=(256,))
    return _create_capsnet_ia("capsnet_conv_ia", pretrained, **dict(model_args, **kwargs))


@register_model
def capsnet_resnet_ia(pretrained: bool = False, **kwargs: Any) -> InvertedAttentionCapsNet:
    """The network for CIFAR-10 of Tsai et al. 2020 with its ResNet backbone; 1,828,817 parameters.

    That for CIFAR-100 has ``pose_size=6, num_hidden=20, num_classes=100``; 2,799,629 parameters.
    """
    return _create_capsnet_ia("capsnet_resnet_ia", pretrained, **kwargs)
