"""CNN baseline: what a capsule network is without capsules

The two convolutions of `capsnet` and a linear classifier, with about the parameters of `capsnet_ws` and trained by the
same recipe, so that a table of results can say what capsules and routing change. Scores are sigmoids of their own:
numbers from 0 to 1 for each class, as the lengths of class capsules are, so that the margin loss of `Dynamic Routing
Between Capsules` - https://arxiv.org/abs/1710.09829 - applies.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import _assert, to_2tuple
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from capszoo.layers import LargeConv2d
from capszoo.models import _builder, _stem
from capszoo.pretrained import fit_weights, shipped_cfgs

__all__ = ["CNNBaseline"]


class CNNBaseline(nn.Module):
    """Two convolutions with ReLU and a linear classifier with sigmoid."""

    _heads = ("fc",)
    _pooled = "features"

    if TYPE_CHECKING:  # not at run time, where torch.jit.script would compile by these annotations
        conv2: nn.Module
        act2: nn.Module
        fc: nn.Module
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
        conv_dim: int = 256,
        kernel_size: int = 9,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Build the network.

        Args:
            num_classes: Classes; 0 for none, and features as output.
            in_chans: Channels of the images.
            img_size: Height and width of the images, in pixels.
            global_pool: 'flat' flattens the features where there is no classifier, '' keeps their map.
            conv_dim: Filters of each convolution.
            kernel_size: Side of both convolution kernels, in pixels.
            drop_rate: Dropout rate of the features before the classifier.
            device: Device of the parameters.
            dtype: Type of the parameters.

        Raises:
            ValueError: If the images are too small for the two convolutions, or an argument is out of its range.
        """
        given = dict(locals())
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        _builder.check_pool(global_pool, "features")
        _builder.check_sizes(in_chans=in_chans, conv_dim=conv_dim, kernel_size=kernel_size)
        _builder.check_drop_rate(drop_rate)
        height, width = to_2tuple(img_size)
        grid = _stem.plan_convs(None, (height, width), kernel_size, None).grid
        self.in_chans = in_chans
        self.img_size = (height, width)
        self.global_pool = global_pool
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self._arguments = _builder.given_arguments(given, img_size=[height, width])

        self.conv1 = LargeConv2d(in_chans, conv_dim, kernel_size, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = LargeConv2d(conv_dim, conv_dim, kernel_size, stride=2, **dd)
        self.act2 = nn.ReLU()  # not in place: the map before it is a level of its own
        self.grid_size = grid
        self.num_features = conv_dim
        self.head_hidden_size = conv_dim * grid[0] * grid[1]
        # The levels of capsnet, the second activation in the place of the squash. Image size over map size, as there:
        # without padding maps shrink by more than the strides.
        self.feature_info = [
            dict(num_chs=conv_dim, reduction=height // (height - kernel_size + 1), module="act1"),
            dict(num_chs=conv_dim, reduction=height // grid[0], module="conv2"),
            dict(num_chs=conv_dim, reduction=height // grid[0], module="act2"),
        ]
        self._build_head(num_classes, **dd)

    @torch.jit.ignore
    def _build_head(self, num_classes: int, **dd: Any) -> None:
        """Make the classifier for `num_classes`."""
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes} is not possible: it must be 0 or more")
        self.num_classes = num_classes
        self.fc = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes else nn.Identity()

    arguments = _builder.arguments
    auxiliary_modules = _builder.auxiliary_modules
    reset_classifier = _builder.reset_classifier
    forward_intermediates = _builder.forward_intermediates
    prune_intermediate_layers = _builder.prune_intermediate_layers
    set_grad_checkpointing = _builder.set_grad_checkpointing

    @torch.jit.ignore
    def capsule_layers(self) -> dict[str, nn.Module]:
        """Layers that route: none."""
        return {}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves out, beside the biases: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters for optimisation; what no pattern names (the classifier) is timm's last group."""
        return dict(stem=r"^conv1", blocks=r"^conv2")

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear classifier."""
        return self.fc

    @torch.jit.ignore
    def _levels(self) -> list[Callable[[Tensor], Tensor]]:
        """Levels of `feature_info` that `prune_intermediate_layers` has left, each a function of the one before."""
        levels: list[Callable[[Tensor], Tensor]] = [lambda x: self.act1(self.conv1(x))]
        if not isinstance(self.conv2, nn.Identity):
            levels += [lambda x: checkpoint(self.conv2, x) if self.grad_checkpointing else self.conv2(x)]
            if not isinstance(self.act2, nn.Identity):
                levels += [self.act2]
        return levels

    @torch.jit.ignore
    def _cut(self, last: int) -> None:
        """Remove the levels after the `last`."""
        if last == 0:
            self.conv2 = nn.Identity()
        self.act2 = nn.Identity()

    def _second(self, x: Tensor) -> Tensor:
        return self.act2(self.conv2(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to the features ``[B, conv_dim, H', W']``."""
        x = self.act1(self.conv1(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(self._second, x)
        return self._second(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features ``[B, conv_dim, H', W']`` to class scores in [0, 1], or flatten them if `pre_logits`."""
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        if pre_logits or self.num_classes == 0:
            return x.flatten(1) if self.global_pool == "flat" else x
        x = x.flatten(1)
        _assert(
            x.shape[1] == self.head_hidden_size,
            f"a classifier of {self.head_hidden_size} features got {x.shape[1]}: make the model for this img_size",
        )
        return self.fc(x).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to class scores ``[B, num_classes]`` in [0, 1]; the largest is the class."""
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit weights to a model of other classes, channels or image size; keep all that can be kept.

    Raises:
        ValueError: If the weights are those of another architecture.
    """
    other_classes, other_chans, other_size = _builder.trained_otherwise(model)
    may_differ = {
        "conv1.weight": other_chans,
        "fc.weight": other_classes or other_size,
        "fc.bias": other_classes,
    }
    return fit_weights(state_dict, model, [key for key, differs in may_differ.items() if differs])


_cfg = partial(_builder.digits_cfg, first_conv="conv1", classifier="fc")

default_cfgs = generate_default_cfgs(shipped_cfgs(("cnn_baseline", "cnn_baseline_tiny"), _cfg))


_create_cnn_baseline = partial(_builder.build_model, CNNBaseline, checkpoint_filter_fn)


@register_model
def cnn_baseline(pretrained: bool = False, **kwargs: Any) -> CNNBaseline:
    """The convolutions of `capsnet`; 5.4 million parameters, as `capsnet_ws`."""
    return _create_cnn_baseline("cnn_baseline", pretrained, **kwargs)


@register_model
def cnn_baseline_tiny(pretrained: bool = False, **kwargs: Any) -> CNNBaseline:
    """64 filters in each convolution; 0.36 million parameters, as `capsnet_tiny`."""
    model_args = dict(conv_dim=64)
    return _create_cnn_baseline("cnn_baseline_tiny", pretrained, **dict(model_args, **kwargs))
