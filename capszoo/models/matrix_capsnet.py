"""Networks of matrix capsules, routed by EM or by variational Bayes

Papers:
`Matrix capsules with EM routing` - https://openreview.net/forum?id=HJWLfGWRb
`Capsule Routing via Variational Bayes` - https://arxiv.org/abs/1905.11455

A convolution, primary capsules with a pose of 4x4 numbers and an activation, two convolutions of capsules, and class
capsules over the whole map, whose matrices are shared by its positions and whose votes hold these positions. No weight
depends on the size of the images.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from capszoo.arguments import SearchedArgument
from capszoo.layers import ClassMatrixCaps, ConvMatrixCaps, PosePrimaryCaps, join_matrix_capsules, split_matrix_capsules
from capszoo.layers.checkpointing import checkpoint_once
from capszoo.losses import CrossEntropyLoss, SpreadLoss
from capszoo.models import _builder, _couplings
from capszoo.pretrained import fit_weights, shipped_cfgs

__all__ = ["MatrixCapsNet"]

# Pixels that leave one position after a 5x5 and a 3x3 kernel of stride 2 and a 3x3 kernel.
_LEAST_SIZE = 17


class Stem(nn.Module):
    """A 5x5 convolution of stride 2 and ReLU; with BatchNorm between them, and then without bias, if `norm`."""

    def __init__(self, in_chans: int, out_chans: int, norm: bool, **dd: Any):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, 5, stride=2, bias=not norm, **dd)
        self.norm = nn.BatchNorm2d(out_chans, **dd) if norm else nn.Identity()
        self.act = nn.ReLU()
        nn.init.kaiming_uniform_(self.conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class MatrixCapsNet(nn.Module):
    """Network of Hinton, Sabour and Frosst 2018 (section 4) or of Ribeiro, Leontidis and Kollias 2020."""

    uniform_arguments = {"num_routing": 1}
    _heads = ("class_caps",)
    _pooled = "capsules"
    _ends_in_activation = False

    if TYPE_CHECKING:  # not at run time, where torch.jit.script would compile by these annotations
        # nn.Identity once `reset_classifier(0)` or `prune_intermediate_layers` took the layer away.
        primary_caps: PosePrimaryCaps
        blocks: nn.Sequential
        class_caps: ClassMatrixCaps
        # From timm's builder and from `create_model`.
        pretrained_cfg: dict[str, Any]
        default_cfg: dict[str, Any]
        creation_args: dict[str, Any]

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | tuple[int, int] = 28,
        global_pool: str = "flat",
        routing: str = "em",
        num_routing: int = 3,
        final_lambda: float = 0.01,
        conv_dim: int = 32,
        num_types: tuple[int, int, int] = (32, 32, 32),
        pose_size: int = 4,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Build the network.

        Args:
            num_classes: J, the number of class capsules; 0 for none, and features as output.
            in_chans: Channels of the images.
            img_size: Height and width of the images, in pixels.
            global_pool: 'flat' flattens the last map of capsules where there are no class capsules, '' keeps it.
            routing: 'em', or 'vb' with its BatchNorm.
            num_routing: Routing iterations; with 1 couplings are uniform, the ablation without routing.
            final_lambda: What lambda of EM tends to: the fewer children a parent has, the larger it should be.
            conv_dim: Filters of the convolution.
            num_types: Types of capsules: primary, and of the two convolutions of capsules.
            pose_size: Side of a pose matrix, at least 2.
            drop_rate: Rate at which capsules are dropped before the class capsules.
            device: Device of the parameters.
            dtype: Type of the parameters.

        Raises:
            ValueError: If the images are too small, or an argument is out of its range.
        """
        given = dict(locals())
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        _builder.check_pool(global_pool, self._pooled)
        if len(num_types) != 3 or min(num_types) < 1:
            raise ValueError(f"num_types={num_types} is not possible: give three numbers of types of 1 or more")
        if pose_size < 2:
            raise ValueError(f"pose_size={pose_size} is not possible: coordinates need poses of 2x2 or more")
        _builder.check_sizes(in_chans=in_chans, conv_dim=conv_dim)
        _builder.check_drop_rate(drop_rate)
        height, width = to_2tuple(img_size)
        if min(height, width) < _LEAST_SIZE:
            raise ValueError(
                f"img_size={height}x{width} is too small: the three kernels need {_LEAST_SIZE} pixels each way, "
                f"resize the images"
            )
        if not 0 < final_lambda < math.inf:
            raise ValueError(f"final_lambda={final_lambda} is not possible: give a number above 0, such as 0.01")
        self.in_chans, self.img_size = in_chans, (height, width)
        self.global_pool, self.drop_rate, self.pose_size = global_pool, drop_rate, pose_size
        self.routing, self.num_types = routing, num_types[-1]
        self.grad_checkpointing = False
        self._arguments = _builder.given_arguments(given, img_size=[height, width], num_types=list(num_types))

        primary, middle, last = num_types
        numbers = pose_size * pose_size + 1
        routed: dict[str, Any] = dict(
            pose_size=pose_size, method=routing, num_routing=num_routing, final_lambda=final_lambda
        )
        self.stem = Stem(in_chans, conv_dim, routing == "vb", **dd)
        self.primary_caps = PosePrimaryCaps(conv_dim, primary, pose_size, routing == "vb", **dd)
        self.blocks = nn.Sequential(
            ConvMatrixCaps(primary, middle, 3, 2, **routed, **dd), ConvMatrixCaps(middle, last, 3, 1, **routed, **dd)
        )
        sizes = [((side - 5) // 2 + 1, ((side - 5) // 2 - 2) // 2 - 1) for side in (height, width)]
        self.grid_size = (sizes[0][1], sizes[1][1])
        self.num_features = last * numbers
        self.head_hidden_size = self.num_features * self.grid_size[0] * self.grid_size[1]
        self.feature_info = [
            dict(num_chs=conv_dim, reduction=height // sizes[0][0], module="stem"),
            dict(num_chs=primary * numbers, reduction=height // sizes[0][0], module="primary_caps"),
            dict(num_chs=last * numbers, reduction=height // sizes[0][1], module="blocks"),
        ]
        self._class_caps_args = dict(in_types=last, **routed)
        self._build_head(num_classes, **dd)

    @torch.jit.ignore
    def _build_head(self, num_classes: int, **dd: Any) -> None:
        """Make class capsules for `num_classes`."""
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes} is not possible: it must be 0 or more")
        self.num_classes = num_classes
        self.class_caps = (
            ClassMatrixCaps(num_classes=num_classes, **self._class_caps_args, **dd) if num_classes else nn.Identity()
        )

    arguments = _builder.arguments
    auxiliary_modules = _builder.auxiliary_modules
    reset_classifier = _builder.reset_classifier
    forward_intermediates = _builder.forward_intermediates
    prune_intermediate_layers = _builder.prune_intermediate_layers
    set_grad_checkpointing = _builder.set_grad_checkpointing
    get_classifier = _builder.get_classifier
    couplings = _couplings.couplings
    couplings_of = _couplings.couplings_of_map

    @torch.jit.ignore
    def capsule_layers(self) -> dict[str, nn.Module]:
        """Layers that route."""
        layers = {"blocks.0": self.blocks[0], "blocks.1": self.blocks[1], "class_caps": self.class_caps}
        return layers if self.num_classes else {}

    @torch.jit.ignore
    def default_criterion(self) -> nn.Module:
        """Spread loss with a margin from 0.2 to 0.9 for EM; for VB cross-entropy of the activations, as its authors."""
        return SpreadLoss(margin=0.9, first_margin=0.2) if self.routing == "em" else CrossEntropyLoss()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves out."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in ("beta_u", "beta_a")}

    @torch.jit.ignore
    def routed_capsules(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Poses ``[B, T * H' * W', P, P]`` that the class capsules take, and their activations ``[B, T * H' * W']``."""
        return self.class_caps.to_capsules(features)

    @torch.jit.ignore
    def capsule_places(self) -> tuple[list[tuple[int, int]], Tensor]:
        """The last map and the place there of each capsule, which are ordered by type, then by place."""
        height, width = self.grid_size
        return [(height, width)], torch.arange(height * width).repeat(self.num_types)

    @torch.jit.ignore
    def search_space(self) -> list[SearchedArgument]:
        """What a search may vary: the routing iterations."""
        num_routing = self._arguments["num_routing"]
        return [SearchedArgument("num_routing", [num_routing, *({1, 2, 3} - {num_routing})])]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters for optimisation; what no pattern names (the class capsules) is timm's last group."""
        return dict(stem=r"^stem", blocks=[(r"^primary_caps", (0,)), (r"^blocks\.0", (1,)), (r"^blocks\.1", (2,))])

    @torch.jit.ignore
    def _levels(self) -> list[Callable[[Tensor], Tensor]]:
        """Levels of `feature_info` that `prune_intermediate_layers` has left, each a function of the one before."""
        levels: list[Callable[[Tensor], Tensor]] = [self.stem]
        if not isinstance(self.primary_caps, nn.Identity):
            levels += [self.primary_caps]
            if not isinstance(self.blocks, nn.Identity):
                levels += [self._route]
        return levels

    @torch.jit.ignore
    def _cut(self, last: int) -> None:
        """Remove the levels after the `last`."""
        if last == 0:
            self.primary_caps = nn.Identity()
        self.blocks = nn.Identity()

    def _route(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for block in self.blocks:
                x = checkpoint_once(block, x)
            return x
        return self.blocks(x)

    def _drop(self, x: Tensor) -> Tensor:
        """Drop capsules of a map: their activations, by which they vote."""
        poses, activations = split_matrix_capsules(x, self.num_types, self.pose_size)
        return join_matrix_capsules(poses, F.dropout(activations, p=self.drop_rate, training=self.training))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to the last map of capsules ``[B, T * P * P + T, H', W']``."""
        return self._route(self.primary_caps(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map capsules ``[B, T * P * P + T, H', W']`` to class scores ``[B, J]``, or flatten them if `pre_logits`."""
        if self.drop_rate > 0.0:
            x = self._drop(x)
        if pre_logits or self.num_classes == 0:
            return x.flatten(1) if self.global_pool == "flat" else x
        return self.class_caps(x)[1]

    @torch.jit.ignore
    def forward_capsules(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images ``[B, C, H, W]`` to the poses ``[B, J, P, P]`` and the activations ``[B, J]`` of the classes.

        Raises:
            RuntimeError: If the model has no class capsules (`num_classes=0`).
        """
        if self.num_classes == 0:
            raise RuntimeError("this model has num_classes=0 and no class capsules: call reset_classifier(num_classes)")
        x = self.forward_features(x)
        if self.drop_rate > 0.0:
            x = self._drop(x)
        return self.class_caps(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to the activations of the class capsules ``[B, J]``; the largest is the class."""
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit weights to a model of other classes, channels or image size; keep all that can be kept.

    Raises:
        ValueError: If the weights are those of another architecture.
    """
    other_classes, other_chans, _ = _builder.trained_otherwise(model)
    may_differ = ["stem.conv.weight"] if other_chans else []
    if other_classes:
        may_differ += [key for key in model.state_dict() if key.startswith("class_caps.")]
    return fit_weights(state_dict, model, may_differ)


_cfg = partial(_builder.digits_cfg, pool_size=(3, 3), first_conv="stem.conv", classifier="class_caps")
_em_cfg = partial(_cfg, paper_ids="openreview:HJWLfGWRb", paper_name="Matrix capsules with EM routing")
_vb_cfg = partial(_cfg, paper_ids="arXiv:1905.11455", paper_name="Capsule Routing via Variational Bayes")

default_cfgs = generate_default_cfgs(
    {
        **shipped_cfgs(("capsnet_em", "capsnet_em_small", "capsnet_em_mini"), _em_cfg),
        **shipped_cfgs(("capsnet_vb", "capsnet_vb_small", "capsnet_vb_mini"), _vb_cfg),
    }
)

_create_matrix_capsnet = partial(_builder.build_model, MatrixCapsNet, checkpoint_filter_fn)


@register_model
def capsnet_em(pretrained: bool = False, **kwargs: Any) -> MatrixCapsNet:
    """The network of Hinton, Sabour and Frosst 2018."""
    model_args = dict(routing="em", conv_dim=32, num_types=(32, 32, 32))
    return _create_matrix_capsnet("capsnet_em", pretrained, **dict(model_args, **kwargs))


@register_model
def capsnet_em_small(pretrained: bool = False, **kwargs: Any) -> MatrixCapsNet:
    """The smaller network of the same paper (table 1)."""
    model_args = dict(routing="em", conv_dim=64, num_types=(8, 16, 16))
    return _create_matrix_capsnet("capsnet_em_small", pretrained, **dict(model_args, **kwargs))


@register_model
def capsnet_em_mini(pretrained: bool = False, **kwargs: Any) -> MatrixCapsNet:
    """A network for a CPU."""
    model_args = dict(routing="em", num_routing=2, final_lambda=0.1, conv_dim=32, num_types=(4, 4, 8))
    return _create_matrix_capsnet("capsnet_em_mini", pretrained, **dict(model_args, **kwargs))


@register_model
def capsnet_vb(pretrained: bool = False, **kwargs: Any) -> MatrixCapsNet:
    """The network of Ribeiro, Leontidis and Kollias 2020: 244,682 parameters for five classes of stereo images."""
    model_args = dict(routing="vb", conv_dim=64, num_types=(16, 32, 32))
    return _create_matrix_capsnet("capsnet_vb", pretrained, **dict(model_args, **kwargs))


@register_model
def capsnet_vb_small(pretrained: bool = False, **kwargs: Any) -> MatrixCapsNet:
    """The smaller network of the same paper: 68,714 parameters for five classes of stereo images."""
    model_args = dict(routing="vb", conv_dim=64, num_types=(8, 16, 16))
    return _create_matrix_capsnet("capsnet_vb_small", pretrained, **dict(model_args, **kwargs))


@register_model
def capsnet_vb_mini(pretrained: bool = False, **kwargs: Any) -> MatrixCapsNet:
    """A network for a CPU."""
    model_args = dict(routing="vb", num_routing=2, conv_dim=32, num_types=(4, 4, 8))
    return _create_matrix_capsnet("capsnet_vb_mini", pretrained, **dict(model_args, **kwargs))
