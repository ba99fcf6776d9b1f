"""Create models by name and ask what there is."""

import difflib
import inspect
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models import get_arch_pretrained_cfgs, model_entrypoint, resolve_model_input_args
from timm.models import is_model as timm_is_model
from torch import nn

from . import models
from .checkpoint import CheckpointError, _first_line, check_weights, load_weights, read_metadata
from .layers import set_fused_routing

__all__ = [
    "ModelInfo",
    "create_model",
    "is_model",
    "list_models",
    "list_pretrained",
    "load_model",
    "model_info",
    "model_keywords",
]

# timm's registry keys models by the last part of the module's name, and counts model families of its own too.
_FAMILIES = {"capsnet": models.CapsNet, "cnn_baseline": models.CNNBaseline}

# Keywords that timm takes for any model, beside those of the model's constructor.
_TIMM_KEYWORDS = {
    "cache_dir",
    "exportable",
    "feature_cls",
    "features_only",
    "no_jit",
    "out_indices",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "scriptable",
}

# Of a model that a config.json describes: before its weights are read, nothing else bounds what it asks for.
_MAX_DESCRIBED = 1 << 28


def list_models(
    filter: str | list[str] = "", pretrained: bool = False, exclude_filters: str | list[str] = ""
) -> list[str]:
    """Names of the models, sorted: the capsule networks, and the plain CNN that they are compared with.

    Args:
        filter: Wildcards that a name must match, such as `"*_ws"`.
        pretrained: Only models whose weights are shipped, with their tags.
        exclude_filters: Wildcards that a name must not match.
    """
    return timm.list_models(filter, module=list(_FAMILIES), pretrained=pretrained, exclude_filters=exclude_filters)


def list_pretrained(filter: str | list[str] = "", exclude_filters: str | list[str] = "") -> list[str]:
    """Names of the shipped weights, as `model.tag`."""
    return list_models(filter, pretrained=True, exclude_filters=exclude_filters)


def is_model(name: str) -> bool:
    """Whether `name`, with or without a tag, is a model of this zoo."""
    return name.split(".")[0] in list_models()


def create_model(
    name: str, pretrained: bool = False, checkpoint_path: str | Path | None = None, **kwargs: Any
) -> nn.Module:
    """Create a capsule network by name, as `timm.create_model` does, with errors that say what to do.

    Args:
        name: Such as `"capsnet_ws"`, `"capsnet_ws.mnist"` (with the tag of its weights), `"local-dir:FOLDER"` or
            `"hf-hub:OWNER/NAME"`.
        pretrained: Load the weights that belong to the name.
        checkpoint_path: Load this safetensors file instead, such as the `best.safetensors` of a run.
        **kwargs: `num_classes`, `in_chans`, `img_size`, `decoder`, `num_routing` and others, see
            :class:`capszoo.models.CapsNet`; `features_only` and other keywords of timm.

    Raises:
        ValueError: If the name, its tag or a keyword is unknown, or the weights do not fit.

    Example:

        ```python
        model = capszoo.create_model("capsnet_ws", num_classes=10)
        lengths = model(torch.rand(8, 1, 28, 28))  # [8, 10]
        ```
    """
    if ":" in name:
        _check_source(name, kwargs.get("cache_dir"))
    else:
        _check_keywords(name, kwargs)
    if checkpoint_path is not None and kwargs.get("features_only"):
        raise ValueError(
            "features_only=True does not go with checkpoint_path: pass pretrained=True and "
            "pretrained_cfg_overlay=dict(file=PATH) instead"
        )
    if checkpoint_path is not None:
        # Without memory for the weights first: `kwargs` may come from the file, and ask for more than it holds.
        check_weights(timm.create_model(name, **{**kwargs, "device": "meta"}), checkpoint_path)
    try:
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
    except ValueError:
        raise
    except Exception as error:
        if pretrained and "No pretrained weights exist" in str(error):
            known = ", ".join(list_pretrained()) or "none yet"
            raise ValueError(
                f"no weights are shipped for {name!r} (there are: {known}): use pretrained=False"
            ) from None
        if pretrained:  # a damaged file shows as any exception
            raise ValueError(f"the weights of {name!r} cannot be loaded ({_first_line(error)}): use others") from error
        raise
    if checkpoint_path is not None:
        load_weights(model, checkpoint_path)
    return model


def load_model(path: str | Path, **kwargs: Any) -> nn.Module:
    """Make the model that a checkpoint of `recipes/train.py` belongs to, and load it.

    Args:
        path: A safetensors file such as `runs/NAME/best.safetensors`, whose header says what model it holds.
        **kwargs: Keywords of :func:`create_model` that take the place of the header's, such as `decoder=False`.

    Raises:
        CheckpointError: If the file is missing or damaged, its header names no model, or `img_size` is another one
            than that of single capsules that the model keeps.
    """
    header = read_metadata(path)
    if "model" not in header:
        raise CheckpointError(
            f"{str(path)!r} does not say what model it holds: use create_model(NAME, checkpoint_path=)"
        )
    try:
        return _load_model(path, header["model"], header_arguments(path, header["model"], header), kwargs)
    except CheckpointError:
        raise
    except Exception as error:  # what a file says of its model may be anything
        raise CheckpointError(f"{str(path)!r} holds no model that can be made: {_first_line(error)}") from error


def header_arguments(path: str | Path, name: str, header: dict[str, str]) -> dict[str, Any]:
    """Read what the header of a model's file says of the keywords that made the model.

    Keywords of timm's are left out: they say where weights came from, and a file must not name another.

    Args:
        path: The file, for errors.
        name: Name of the model.
        header: The file's header metadata.

    Raises:
        CheckpointError: If there is a keyword that the model does not take, or a value of the wrong kind.
        ValueError: If no model has this name.
    """
    known = model_parameters(name)
    try:
        model_args = json.loads(header.get("model_args", "{}"))
    except (ValueError, RecursionError):
        model_args = None
    if not isinstance(model_args, dict):
        raise CheckpointError(f"{str(path)!r} is damaged (its 'model_args' are no JSON object): use another checkpoint")
    model_args = {key: value for key, value in model_args.items() if key not in _TIMM_KEYWORDS | {"device", "dtype"}}
    for key, value in model_args.items():
        if key not in known or not _is_kind(value, known[key].default):
            raise CheckpointError(
                f"{str(path)!r} was made with {key}={reprlib.repr(value)}, which {name!r} does not take"
            )
    return model_args


def _load_model(path: str | Path, name: str, model_args: dict[str, Any], kwargs: dict[str, Any]) -> nn.Module:
    # The shapes may agree all the same, and every kept capsule would then look at another place of the image.
    size, wanted = (to_2tuple(values.get("img_size", 28)) for values in (model_args, {**model_args, **kwargs}))
    if model_args.get("keep_capsules") and tuple(size) != tuple(wanted):
        raise CheckpointError(
            f"{str(path)!r} keeps single capsules of images of {size[0]}x{size[1]}: leave out img_size={wanted[0]}"
        )
    return create_model(name, checkpoint_path=path, **{**model_args, **kwargs})


def _is_kind(value: Any, default: Any) -> bool:
    """Whether a value of JSON is of the kind of a keyword's default; None stands for the default."""
    if value is None:
        return True
    if isinstance(default, (bool, str)):
        return type(value) is type(default)
    if isinstance(default, float):
        return type(value) in (int, float) and math.isfinite(value)
    # Sizes, and indices of what a pruned network keeps.
    return all(type(item) is int for item in (value if isinstance(value, list) else [value]))


def _check_source(name: str, cache_dir: str | Path | None) -> None:
    """Check the config.json of a folder or of the hub, before anything of the size that it says is made.

    Raises:
        ValueError: If it is missing or damaged, or describes no model of this zoo, or a vast one.
    """
    try:
        config = resolve_model_input_args(name, cache_dir=cache_dir)
        arch, model_args = config["model_name"], config.get("pretrained_model_args", {})
        _check_keywords(arch, model_args)
        known = model_parameters(arch)
        for key, value in model_args.items():
            if key in {"device", "dtype"} or (key in known and not _is_kind(value, known[key].default)):
                raise ValueError(f"{arch!r} does not take {key}={reprlib.repr(value)}")
        size = sum(value.numel() for value in timm.create_model(name, device="meta", cache_dir=cache_dir).parameters())
    except Exception as error:  # timm takes the file for granted
        raise ValueError(f"{name!r} describes no model that can be made: {_first_line(error)}") from error
    if size > _MAX_DESCRIBED:
        raise ValueError(f"{name!r} describes a model of {size:,} weights, more than {_MAX_DESCRIBED:,}: check it")


def _check_name(name: str) -> None:
    arch, _, tag = name.partition(".")
    known = list_models()
    if arch not in known:
        near = difflib.get_close_matches(arch, known, n=1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown model {arch!r}{hint} Known: {', '.join(known)}")
    if tag and name not in get_arch_pretrained_cfgs(arch):
        weights = list_pretrained(arch)
        near = difflib.get_close_matches(name, weights, n=1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown weights {name!r}{hint} Known: {', '.join(weights) or 'none'}")


def model_keywords(name: str) -> set[str]:
    """Keywords of a model's constructor, by which its kind can be told: not all have routing, or a decoder.

    Raises:
        ValueError: If the name or its tag is unknown.
    """
    return set(model_parameters(name))


def model_parameters(name: str) -> Mapping[str, inspect.Parameter]:
    """Parameters of a model's constructor by keyword.

    Raises:
        ValueError: If the name or its tag is unknown.
    """
    _check_name(name)
    family = _FAMILIES[model_entrypoint(name.split(".")[0]).__module__.rsplit(".", 1)[-1]]
    return inspect.signature(family).parameters


def _check_keywords(name: str, kwargs: dict[str, Any]) -> None:
    """Refuse keywords that no constructor takes; deep inside timm they would be a TypeError without a hint."""
    known = model_keywords(name)
    for key in kwargs:
        if key not in known | _TIMM_KEYWORDS:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"unknown keyword {key!r} for model {name!r}{hint} Known: {', '.join(sorted(known))}")


@dataclass(frozen=True)
class ModelInfo:
    """What a model weighs.

    Attributes:
        name: Name of the model.
        parameters: Number of trainable values.
        macs: Multiply-accumulate operations of one forward pass of one image.
        input_size: (C, H, W) of the images.
        weights: Names of the shipped weights.
    """

    name: str
    parameters: int
    macs: int
    input_size: tuple[int, int, int]
    weights: tuple[str, ...]


def model_info(model: str | nn.Module, **kwargs: Any) -> ModelInfo:
    """Count the parameters and the work of a model.

    Args:
        model: A name, or a model made by `create_model`.
        **kwargs: Keywords of `create_model`, where a name is given.
    """
    # Not at the top: where Triton is not installed, its import logs a warning that helps nobody.
    from torch.utils.flop_counter import FlopCounterMode

    if isinstance(model, str):
        model = create_model(model, device="meta", **kwargs)
    name = model.pretrained_cfg["architecture"]
    input_size = (model.in_chans, *model.img_size)
    parameter = next(model.parameters())
    image = torch.empty(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    # The operator says by its shapes what it does; of the reference, the counter would see the matrix products alone.
    was_training = model.training
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.capszoo.dynamic_routing: _routing_flops})
    model.eval()
    try:
        with set_fused_routing(True), torch.no_grad(), counter:
            model(image)
    finally:
        model.train(was_training)
    weights = list_pretrained(name) if timm_is_model(name) else []
    return ModelInfo(
        name=name,
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        macs=counter.get_total_flops() // 2,
        input_size=input_size,
        weights=tuple(weights),
    )


def _routing_flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int],
    num_iters: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Two operations for every multiply-accumulate of the votes, the agreements and the weighted sums of votes."""
    B, I, K = x_shape  # noqa: E741
    _, _, J, D = weight_shape
    return 2 * B * I * J * D * (K + (num_iters - 1) + num_iters)
