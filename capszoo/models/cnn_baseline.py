"""CNN baseline: what a capsule network is without capsules

The two convolutions of `capsnet` and a linear classifier, with about the parameters of `capsnet_ws` and trained by the
same recipe, so that a table of results can say what capsules and routing change. Scores are sigmoids of their own:
numbers from 0 to 1 for each class, as the lengths of class capsules are, so that the margin loss of `Dynamic Routing
Between Capsules` - https://arxiv.org/abs/1710.09829 - applies.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import _assert, get_device_dtype, to_2tuple
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from capszoo.pretrained import check_source, fit_weights, shipped_cfgs

__all__ = ["CNNBaseline"]


class CNNBaseline(nn.Module):
    """Two convolutions with ReLU and a linear classifier with sigmoid."""

    if TYPE_CHECKING:  # not at run time, where torch.jit.script would compile by these annotations
        conv2: nn.Module
        act2: nn.Module
        fc: nn.Module
        decoder: None
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
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        _check_pool(global_pool)
        for name, value in (("in_chans", in_chans), ("conv_dim", conv_dim), ("kernel_size", kernel_size)):
            if value < 1:
                raise ValueError(f"{name}={value} is not possible: it must be 1 or more")
        if not 0.0 <= drop_rate <= 1.0:
            raise ValueError(f"drop_rate={drop_rate} is not possible: it must be between 0 and 1")
        height, width = to_2tuple(img_size)
        least = 2 * kernel_size - 1
        if min(height, width) < least:
            raise ValueError(
                f"img_size={height}x{width} is too small: two {kernel_size}x{kernel_size} convolutions need {least} "
                f"pixels each way, resize the images or set kernel_size"
            )
        self.in_chans = in_chans
        self.img_size = (height, width)
        self.global_pool = global_pool
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self._arguments = dict(in_chans=in_chans, img_size=[height, width], conv_dim=conv_dim, kernel_size=kernel_size)

        self.conv1 = nn.Conv2d(in_chans, conv_dim, kernel_size, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(conv_dim, conv_dim, kernel_size, stride=2, **dd)
        self.act2 = nn.ReLU()  # not in place: the map before it is a level of its own
        grid = tuple((size - 2 * (kernel_size - 1) - 1) // 2 + 1 for size in (height, width))
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
        # What trains and measures capsule networks asks for it.
        self.register_module("decoder", None)
        self._build_head(num_classes, **dd)

    @torch.jit.ignore
    def _build_head(self, num_classes: int, **dd: Any) -> None:
        """Make the classifier for `num_classes`."""
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes} is not possible: it must be 0 or more")
        self.num_classes = num_classes
        self.fc = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes else nn.Identity()

    @torch.jit.ignore
    def arguments(self) -> dict[str, Any]:
        """Keywords, as JSON can hold them, with which `create_model` makes a network of these shapes again."""
        return {
            **self._arguments,
            "num_classes": self.num_classes,
            "global_pool": self.global_pool,
            "drop_rate": self.drop_rate,
        }

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves out, beside the biases: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters for optimisation; what no pattern names (the classifier) is timm's last group."""
        return dict(stem=r"^conv1", blocks=r"^conv2")

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing of the second convolution."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier, of the same type and device, frozen if the old one was.

        Args:
            num_classes: Classes of the new head; 0 removes it, and `forward` then gives the features.
            global_pool: 'flat' or '', kept if None.
        """
        dd = get_device_dtype(self)
        params = list(self.fc.parameters())
        frozen = bool(params) and not any(p.requires_grad for p in params)
        if global_pool is not None:
            _check_pool(global_pool)
            self.global_pool = global_pool
        self._build_head(num_classes, **dd)
        self.fc.train(self.training)
        self.fc.requires_grad_(not frozen)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Forward features and return intermediates.

        Args:
            x: Images ``[B, C, H, W]``.
            indices: Levels to return, counted as in `feature_info`: the last n if int, all if None; of a network cut
                by `prune_intermediate_layers`, of those that are left.
            norm: Not used, for timm's interface.
            stop_early: Stop after the last level asked for; needs `intermediates_only`.
            output_fmt: Must be 'NCHW'.
            intermediates_only: Return the intermediates alone.

        Returns:
            The intermediates, or the final features and the intermediates.
        """
        assert output_fmt == "NCHW", "Output format must be NCHW."
        assert intermediates_only or not stop_early, "Must use intermediates_only for early stopping."
        num_levels = self._num_levels()
        take_indices, max_index = feature_take_indices(num_levels, indices)
        intermediates = []
        x = self.act1(self.conv1(x))
        if 0 in take_indices:
            intermediates.append(x)
        if num_levels > 1 and not (stop_early and max_index == 0):
            checkpointed = self.grad_checkpointing and not torch.jit.is_scripting()
            x = checkpoint(self.conv2, x) if checkpointed else self.conv2(x)
            if 1 in take_indices:
                intermediates.append(x)
            if not (stop_early and max_index == 1):
                x = self.act2(x)
            if 2 in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def _num_levels(self) -> int:
        """Levels of `feature_info` that `prune_intermediate_layers` has left."""
        if isinstance(self.conv2, nn.Identity):
            return 1
        return 2 if isinstance(self.act2, nn.Identity) else 3

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers that the given intermediates do not need.

        Args:
            indices: Levels to keep, counted as in `feature_info`: the last n if int.
            prune_norm: Also take the second activation away where only the map before it is kept, as timm's models do
                with their last norm: `forward_features` then ends at that map.
            prune_head: Remove the classifier, too.

        Returns:
            The levels, counted from the first.
        """
        take_indices, max_index = feature_take_indices(self._num_levels(), indices)
        if max_index == 0:
            self.conv2, self.act2 = nn.Identity(), nn.Identity()
        elif max_index == 1 and prune_norm:
            self.act2 = nn.Identity()
        if prune_head or max_index == 0:
            self.reset_classifier(0, "")
        return take_indices

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


def _check_pool(global_pool: str) -> None:
    if global_pool not in ("flat", ""):
        raise ValueError(f"global_pool={global_pool!r} is not possible: features are not pooled, use 'flat' or ''")


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit weights to a model of other classes, channels or image size; keep all that can be kept.

    Raises:
        ValueError: If the weights are those of another architecture.
    """
    cfg = model.pretrained_cfg
    source_chans, *source_size = cfg["input_size"]
    may_differ = []
    if model.in_chans != source_chans:
        may_differ += ["conv1.weight"]
    if model.num_classes != cfg["num_classes"]:
        may_differ += ["fc.weight", "fc.bias"]
    if tuple(model.img_size) != tuple(source_size):
        may_differ += ["fc.weight"]
    return fit_weights(state_dict, model, may_differ)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (1, 28, 28),
        "pool_size": (6, 6),
        "fixed_input_size": True,
        # Digits reach to the border: any crop would cut them.
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.0,),
        "std": (1.0,),
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "mit",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(shipped_cfgs(("cnn_baseline", "cnn_baseline_tiny"), _cfg))


def _create_cnn_baseline(variant: str, pretrained: bool = False, **kwargs: Any) -> CNNBaseline:
    if pretrained:
        overlay = check_source(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        kwargs["pretrained_cfg_overlay"] = overlay
    out_indices = kwargs.pop("out_indices", (0, 1, 2))
    return build_model_with_cfg(
        CNNBaseline,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


@register_model
def cnn_baseline(pretrained: bool = False, **kwargs: Any) -> CNNBaseline:
    """The convolutions of `capsnet`; 5.4 million parameters, as `capsnet_ws`."""
    return _create_cnn_baseline("cnn_baseline", pretrained, **kwargs)


@register_model
def cnn_baseline_tiny(pretrained: bool = False, **kwargs: Any) -> CNNBaseline:
    """64 filters in each convolution; 0.36 million parameters, as `capsnet_tiny`."""
    model_args = dict(conv_dim=64)
    return _create_cnn_baseline("cnn_baseline_tiny", pretrained, **dict(model_args, **kwargs))
