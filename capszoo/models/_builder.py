"""What the families share of timm's contract: checks of arguments, features by level, new heads, configurations.

Functions whose first argument is `self` become methods where a class names them; there is no base class.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_device_dtype
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from capszoo.arguments import SearchedArgument
from capszoo.layers import capsule_lengths
from capszoo.models import _stem
from capszoo.pretrained import check_source
from capszoo.pretrained_cfg import cfg_of_model, forget_classes, trained_otherwise

__all__ = [
    "arguments",
    "auxiliary_modules",
    "build_model",
    "capsule_layers",
    "check_capsules",
    "check_decoder_dims",
    "check_drop_rate",
    "check_pool",
    "check_sizes",
    "digits_cfg",
    "forward_capsules",
    "forward_intermediates",
    "get_classifier",
    "given_arguments",
    "no_weight_decay",
    "prune_intermediate_layers",
    "reconstruct",
    "replace_head",
    "reset_classifier",
    "searched_decoder",
    "set_grad_checkpointing",
    "trained_otherwise",
]

_MAX_CAPSULES = 1 << 22
# What else the locals of a constructor hold, and arguments that may change later, which models keep as attributes.
_NOT_KEPT = {"self", "__class__", "device", "dtype", "num_classes", "global_pool", "drop_rate", "keep_capsules"}


def check_sizes(**sizes: int) -> None:
    """Check that sizes are 1 or more.

    Raises:
        ValueError: If one is not; it is named.
    """
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} is not possible: it must be 1 or more")


def check_drop_rate(drop_rate: float) -> None:
    """Check a dropout rate.

    Raises:
        ValueError: If it is not between 0 and 1.
    """
    if not 0.0 <= drop_rate <= 1.0:
        raise ValueError(f"drop_rate={drop_rate} is not possible: it must be between 0 and 1")


def check_pool(global_pool: str, features: str | None) -> None:
    """Check how features leave a model without classes.

    Args:
        global_pool: 'flat' or ''.
        features: What the features are, for the error; None leaves them out.

    Raises:
        ValueError: If it is another one.
    """
    if global_pool not in ("flat", ""):
        reason = "" if features is None else f"{features} are not pooled, "
        raise ValueError(f"global_pool={global_pool!r} is not possible: {reason}use 'flat' or ''")


def check_decoder_dims(decoder_dims: Sequence[int]) -> None:
    """Check the widths of a decoder's hidden layers.

    Raises:
        ValueError: If they are not two of 1 or more.
    """
    if len(decoder_dims) != 2 or min(decoder_dims) < 1:
        raise ValueError(f"decoder_dims={decoder_dims} is not possible: give two widths of 1 or more")


def check_capsules(num_capsules: int, height: int, width: int, remedy: str) -> None:
    """Bound the primary capsules: shared matrices have the same shapes whatever the size of the images.

    Raises:
        ValueError: If there are more than four million.
    """
    if num_capsules > _MAX_CAPSULES:
        raise ValueError(
            f"img_size={height}x{width} makes {num_capsules:,} primary capsules, more than {_MAX_CAPSULES:,}: "
            f"resize the images or {remedy}"
        )


def given_arguments(values: Mapping[str, Any], **replaced: Any) -> dict[str, Any]:
    """Arguments of a constructor that its class stays with, as JSON can hold them.

    Args:
        values: The constructor's `locals()`, before it sets others.
        **replaced: Those that are kept as other values.
    """
    return {key: replaced.get(key, value) for key, value in values.items() if key not in _NOT_KEPT}


@torch.jit.ignore
def set_grad_checkpointing(self: Any, enable: bool = True) -> None:
    """Enable or disable gradient checkpointing of the layers after the first, and of the stages of a backbone."""
    self.grad_checkpointing = enable
    if getattr(self, "backbone", None) is not None:
        self.backbone.set_grad_checkpointing(enable)


def forward_intermediates(
    self: Any,
    x: Tensor,
    indices: int | list[int] | None = None,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
    """Forward features and return intermediates; a method of models whose `_levels` are functions of the one before.

    Args:
        self: The model.
        x: Images ``[B, C, H, W]``.
        indices: Levels to return, counted as in `feature_info`: the last n if int, all if None; of a network cut by
            `prune_intermediate_layers`, of those that are left.
        norm: Not used, for timm's interface.
        stop_early: Stop after the last level asked for; needs `intermediates_only`.
        output_fmt: Must be 'NCHW'.
        intermediates_only: Return the intermediates alone.

    Returns:
        The intermediates, or the final features and the intermediates.
    """
    assert output_fmt == "NCHW", "Output format must be NCHW."
    assert intermediates_only or not stop_early, "Must use intermediates_only for early stopping."
    levels = self._levels()
    taken, last = feature_take_indices(len(levels), indices)
    intermediates = []
    for number, level in enumerate(levels[: last + 1] if stop_early else levels):
        x = level(x)
        if number in taken:
            intermediates.append(x)
    return intermediates if intermediates_only else (x, intermediates)


def prune_intermediate_layers(
    self: Any, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
) -> list[int]:
    """Remove the layers that the given intermediates do not need; a method of models with `_levels` and `_cut`.

    Args:
        self: The model.
        indices: Levels to keep, counted as in `feature_info`: the last n if int.
        prune_norm: Also take the last level away where it is a squash or an activation (`_ends_in_activation`, the
            default) and only the map before it is kept, as timm's models do with their last norm: `forward_features`
            then ends at that map.
        prune_head: Remove the classifier and what needs it, too.

    Returns:
        The levels, counted from the first.
    """
    num_levels = len(self._levels())
    taken, last = feature_take_indices(num_levels, indices)
    # Without its last squash or activation alone a network keeps its head.
    before_end = getattr(self, "_ends_in_activation", True) and last == len(self.feature_info) - 2
    cut = last < num_levels - 1 and (prune_norm or not before_end)
    if cut:
        self._cut(last)
    if prune_head or (cut and not before_end):
        self.reset_classifier(0, "")
    return taken


def check_classes(model: Any) -> None:
    """Refuse a model without class capsules.

    Raises:
        RuntimeError: If it has `num_classes=0`.
    """
    if model.num_classes == 0:
        raise RuntimeError("this model has num_classes=0 and no class capsules: call reset_classifier(num_classes)")


@torch.jit.ignore
def forward_capsules(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Map images to class capsules and scores, their lengths; a method of models with `to_capsules` and `class_caps`.

    Args:
        self: The model.
        x: Images ``[B, C, H, W]``.

    Returns:
        Class capsules ``[B, J, D]`` and class scores ``[B, J]``.

    Raises:
        RuntimeError: If the model has no class capsules (`num_classes=0`).
    """
    check_classes(self)
    x = self.forward_features(x)
    if self.drop_rate > 0.0:
        x = F.dropout(x, p=self.drop_rate, training=self.training)
    capsules = self.class_caps(self.to_capsules(x))
    return capsules, capsule_lengths(capsules)


@torch.jit.ignore
def reconstruct(self: Any, x: Tensor, target: Tensor | None = None) -> Tensor:
    """Draw each image again from one class capsule; a method of models with a `decoder`, which may be None.

    Args:
        self: The model.
        x: Images ``[B, C, H, W]``.
        target: Class whose capsule is drawn, ``[B]``; that of the highest score if None.

    Returns:
        Images ``[B, C, H, W]`` with values in [0, 1].

    Raises:
        RuntimeError: If the model was made without decoder.
    """
    if self.decoder is None:
        raise RuntimeError("this model has no decoder: make it with create_model(..., decoder=True)")
    capsules, scores = self.forward_capsules(x)
    if target is None:
        target = scores.argmax(dim=1)
    return self.decoder(capsules, target)


@torch.jit.ignore
def arguments(self: Any) -> dict[str, Any]:
    """Keywords, as JSON can hold them, with which `create_model` makes a network of these shapes again."""
    now = {key: getattr(self, key) for key in ("num_classes", "global_pool", "drop_rate")}
    return {**self._arguments, **now}


@torch.jit.ignore
def auxiliary_modules(self: Any) -> dict[str, nn.Module | None]:
    """Modules that only training uses: the decoder, which may be None, of families that can have one."""
    return {"decoder": self.decoder} if hasattr(self, "decoder") else {}


@torch.jit.ignore
def capsule_layers(self: Any) -> dict[str, nn.Module]:
    """Layers that route; a method of models whose one such layer is `class_caps`, as are the next two."""
    return {"class_caps": self.class_caps} if self.num_classes else {}


@torch.jit.ignore
def no_weight_decay(self: Any) -> set[str]:
    """Parameters that weight decay leaves out."""
    return {"class_caps.bias"}


@torch.jit.ignore
def get_classifier(self: Any) -> nn.Module:
    """The class capsules."""
    return self.class_caps


def replace_head(model: nn.Module, names: Iterable[str], build: Callable[..., None]) -> None:
    """Make a model's head again: of the same type and device, in the same mode, frozen where the old one was.

    Args:
        model: The model.
        names: Names of the modules that `build` sets; one may be None.
        build: Takes `device` and `dtype`.
    """
    parts = {name: list(module.parameters()) for name in names if (module := getattr(model, name)) is not None}
    frozen = {name for name, params in parts.items() if params and not any(p.requires_grad for p in params)}
    build(**get_device_dtype(model))
    for name in names:
        module = getattr(model, name)
        if module is not None:
            module.train(model.training)
            module.requires_grad_(name not in frozen)


def reset_classifier(self: Any, num_classes: int, global_pool: str | None = None) -> None:
    """Make a new head, of the same type and device, frozen if the old one was; a method of models with `_heads`.

    Args:
        self: The model.
        num_classes: Classes of the new head; 0 removes it, and `forward` then gives the features.
        global_pool: 'flat' or '', kept if None.
    """
    if global_pool is not None:
        check_pool(global_pool, self._pooled)
        self.global_pool = global_pool
    replace_head(self, self._heads, lambda **dd: self._build_head(num_classes, **dd))
    forget_classes(self)


def searched_decoder(decoder_dims: Sequence[int]) -> list[SearchedArgument]:
    """What a search may vary of a decoder: whether there is one, what it takes, and its widths."""
    widths = {width: [max(1, int(width * units)) for units in decoder_dims] for width in (1.0, 0.5, 0.25)}
    return [
        SearchedArgument("decoder", [True, False]),
        SearchedArgument("small_decoder", [False, True], needs="decoder"),
        SearchedArgument("decoder_dims", widths, name="decoder_width", needs="decoder"),
    ]


def digits_cfg(**kwargs: Any) -> dict[str, Any]:
    """A `pretrained_cfg` for 28x28 digits and the like.

    Args:
        **kwargs: `first_conv` and `classifier`, and what else differs.
    """
    return {
        "num_classes": 10,
        "input_size": (1, 28, 28),
        "pool_size": (6, 6),
        "fixed_input_size": True,
        # Digits reach to the border: any crop would cut them.
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "interpolation": "bilinear",
        "mean": (0.0,),
        "std": (1.0,),
        "license": "mit",
        **kwargs,
    }


def build_model(
    cls: type[nn.Module], filter_fn: Callable[..., Any], variant: str, pretrained: bool = False, **kwargs: Any
) -> nn.Module:
    """Build a model as timm does; weights are checked before timm reads them.

    Args:
        cls: Its class.
        filter_fn: Fits weights to the model, see :func:`capszoo.pretrained.fit_weights`.
        variant: Name of the entrypoint.
        pretrained: Load its weights.
        **kwargs: Keywords of the class and of timm; of `out_indices` the default is all levels of `feature_info`.

    Raises:
        ValueError: As :func:`capszoo.pretrained.check_source`, and for `out_indices` without `features_only`.
    """
    of_backbone = _stem.cfg_overlay(cls, kwargs)
    overlay = {**of_backbone, **(kwargs.get("pretrained_cfg_overlay") or {})}
    if pretrained:
        if of_backbone and not any(kwargs.get(key) for key in ("pretrained_cfg", "pretrained_cfg_overlay")):
            raise ValueError(
                f"the weights of {variant!r} are of the network without backbone: leave out pretrained, or give "
                f"backbone_pretrained=True for those of the backbone"
            )
        overlay = check_source(variant, kwargs.get("pretrained_cfg"), overlay)
    kwargs["pretrained_cfg_overlay"] = overlay
    out_indices = kwargs.pop("out_indices", None)
    if out_indices is not None and not kwargs.get("features_only"):
        raise ValueError(f"out_indices={out_indices} has no effect without features_only=True: give that, too")
    if out_indices is None and kwargs.get("feature_cls", "getter") != "getter":  # others take no None for all
        of_features = ("features_only", "feature_cls", "backbone_pretrained")
        plain = {**{key: kwargs[key] for key in kwargs if key not in of_features}, "device": "meta"}
        levels = [level["module"] for level in build_model(cls, filter_fn, variant, **plain).feature_info]
        # timm's lists and dictionaries of features hold modules of the outermost level alone.
        is_flat = kwargs["feature_cls"] in ("list", "dict")
        out_indices = tuple(i for i, name in enumerate(levels) if not (is_flat and "." in name))
    model = build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )
    cfg = getattr(model, "pretrained_cfg", None)
    has_backbone = getattr(model, "backbone", None) is not None
    if cfg and hasattr(model, "img_size") and (has_backbone or any(trained_otherwise(model))):
        model.pretrained_cfg = model.default_cfg = cfg_of_model(model, cfg, same_source=True)
    if not pretrained:
        forget_classes(model)
    return model
