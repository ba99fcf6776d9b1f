"""Create models by name and ask what there is."""

import difflib
import functools
import inspect
import json
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
from timm.layers import to_2tuple
from timm.models import get_arch_pretrained_cfgs, model_entrypoint, resolve_model_input_args
from timm.models import is_model as timm_is_model
from timm.utils.model import unwrap_model
from torch import nn

from . import _moved, models  # noqa: F401  (registers the models)
from ._version import __version__
from .arguments import check_value
from .checkpoint import WeightsFile, check_weights, computing_arguments, load_weights, read_file, save_weights
from .contract import keeps_contract
from .errors import CheckpointError, UsageError, WriteError, first_line
from .pretrained import no_weights_for
from .pretrained_cfg import header_facts

__all__ = [
    "check_arguments",
    "create_model",
    "family_of",
    "is_model",
    "list_models",
    "list_pretrained",
    "load_model",
    "model_header",
    "model_keywords",
    "save_model",
    "uniform_arguments",
]


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

# Keywords that a file must not give: where to compute, and whether to fetch weights from elsewhere.
_NOT_OF_FILES = {"backbone_pretrained", "device", "dtype"}

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
    names = timm.list_models(filter, pretrained=pretrained, exclude_filters=exclude_filters)
    return [name for name in names if family_of(name) is not None]


def family_of(name: str) -> type[nn.Module] | None:
    """The class of a model that is registered with timm and keeps the contract of :mod:`capszoo.contract`, else None.

    Whoever registered it: the return annotation of its entrypoint names the class.

    Args:
        name: Name of a model, with or without a tag.
    """
    arch = name.split(".")[0]
    return _family(model_entrypoint(arch)) if timm_is_model(arch) else None


def uniform_arguments(name: str) -> dict[str, Any]:
    """Keywords that give a family of models uniform couplings in place of its routing, to measure what it brings.

    A family has them as its class attribute `uniform_arguments`.

    Args:
        name: Name of a model.

    Raises:
        UsageError: If it has no routing to do without.
    """
    family = family_of(name)
    found = getattr(family, "uniform_arguments", None)
    if found is None:
        raise UsageError(f"{name!r} has no form with uniform couplings: choose a model with capsule layers")
    return dict(found)


@functools.cache
def _family(entrypoint: Callable[..., Any]) -> type[nn.Module] | None:
    returned = entrypoint.__annotations__.get("return")
    if isinstance(returned, str):  # as under `from __future__ import annotations`
        returned = entrypoint.__globals__.get(returned)
    return returned if keeps_contract(returned) else None


def list_pretrained(filter: str | list[str] = "", exclude_filters: str | list[str] = "") -> list[str]:
    """Names of the shipped weights, as `model.tag`."""
    return list_models(filter, pretrained=True, exclude_filters=exclude_filters)


def is_model(name: str) -> bool:
    """Whether `name`, with or without a tag, is a model of this zoo, and no file that happens to be named like one."""
    arch, dot, _ = name.partition(".")
    return arch in list_models() and (not dot or name in list_pretrained() or not Path(name).exists())


def create_model(
    name: str, pretrained: bool = False, checkpoint_path: str | Path | WeightsFile | None = None, **kwargs: Any
) -> nn.Module:
    """Create a capsule network by name, as `timm.create_model` does, with errors that say what to do.

    Args:
        name: Such as `"capsnet_ws"`, `"capsnet_ws.mnist"` (with the tag of its weights), `"local-dir:FOLDER"` or
            `"hf-hub:OWNER/NAME"`.
        pretrained: Load the weights that belong to the name.
        checkpoint_path: Load this safetensors file instead, such as the `best.safetensors` of a run, or what
            :func:`capszoo.checkpoint.read_file` gave of it.
        **kwargs: `num_classes`, `in_chans`, `img_size`, `decoder`, `num_routing` and others, see
            :class:`capszoo.models.CapsNet`; `features_only` and other keywords of timm.

    Raises:
        ValueError: If the name, its tag or a keyword is unknown, a value is of the wrong type, or the weights do not
            fit.

    Example:

        ```python
        model = capszoo.create_model("capsnet_ws", num_classes=10)
        lengths = model(torch.rand(8, 1, 28, 28))  # [8, 10]
        ```
    """
    kwargs = check_arguments(name, kwargs)
    if checkpoint_path is not None:
        kwargs.pop("backbone_pretrained", None)  # the file has all weights
    if checkpoint_path is not None and kwargs.get("features_only"):
        raise ValueError(
            "features_only=True does not go with checkpoint_path: pass pretrained=True and "
            "pretrained_cfg_overlay=dict(file=PATH) instead"
        )
    try:
        if checkpoint_path is not None:
            # Without memory for the weights first: `kwargs` may come from the file, and ask for more than it holds.
            checkpoint_path = read_file(checkpoint_path)
            if checkpoint_path.metadata.get("model") == name.partition(".")[0]:
                of_file = header_arguments(checkpoint_path.path, name, checkpoint_path.metadata)
                kwargs = {**computing_arguments(of_file, kwargs.get("img_size")), **kwargs}
            check_weights(timm.create_model(name, **{**kwargs, "device": "meta"}), checkpoint_path)
        model = timm.create_model(name, pretrained=pretrained, **kwargs)
    except ValueError:
        raise
    except Exception as error:
        if pretrained and "No pretrained weights exist" in str(error):
            raise ValueError(no_weights_for(name, list_pretrained())) from None
        if pretrained:  # a damaged file shows as any exception
            raise ValueError(f"the weights of {name!r} cannot be loaded ({first_line(error)}): use others") from error
        if isinstance(error, (RuntimeError, TypeError, OverflowError)):  # no such device, no memory, sizes beyond it
            raise ValueError(f"{name!r} cannot be made ({first_line(error)}): check its arguments") from error
        raise
    if checkpoint_path is not None:
        load_weights(model, checkpoint_path)
    return model


def save_model(path: str | Path, model: nn.Module, /, **metadata: Any) -> None:
    """Write a model to a safetensors file, from which :func:`load_model` makes it again.

    Args:
        path: File to write; its folder must exist.
        model: A model made by `create_model`, pruned or not, on any device; wrappers of DDP and torch.compile are
            taken off. Weights keep their dtype.
        **metadata: More facts for the header, such as `dataset` or an accuracy; `class_names`, `mean` and `std` take
            the place of those in the model's `pretrained_cfg`. Other values than strings become JSON.

    Raises:
        WriteError: If the model could not be made again, or the file cannot be written.

    Example:

        ```python
        capszoo.save_model("digits.safetensors", model, class_names=list("0123456789"))
        model = capszoo.load_model("digits.safetensors")
        ```
    """
    model = unwrap_model(model)
    save_weights(path, model, model_header(model, **metadata))


def model_header(model: nn.Module, /, **metadata: Any) -> dict[str, Any]:
    """What the header of a model's file says: name and keywords of the model, `mean` and `std` of its images, and more.

    Args:
        model: As in :func:`save_model`, and not wrapped.
        **metadata: As in :func:`save_model`.

    Raises:
        WriteError: If the model could not be made again from its header.
    """
    reserved = sorted(metadata.keys() & {"capszoo_version", "format", "model", "model_args"})
    if reserved:
        raise WriteError(f"{reserved[0]!r} is what the header says of the model itself: give it another name")
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name = cfg.get("architecture")
    if name not in list_models() or not hasattr(model, "arguments"):
        raise WriteError(f"this {type(model).__name__} was not made by capszoo.create_model: write it with safetensors")
    arguments = model.arguments()
    # Weights alone do not tell: some layers have none.
    again = create_model(name, device="meta", **arguments)
    found, expected = ({key: type(part).__name__ for key, part in m.named_modules()} for m in (model, again))
    for key in [*found, *expected]:
        if found.get(key) != expected.get(key):
            raise WriteError(
                f"{name!r} could not be made again: its {key!r} is not that of create_model, as after "
                "prune_intermediate_layers; write its state_dict with capszoo.checkpoint.save_tensors"
            )
    facts = {"model": name, "model_args": arguments, **header_facts(model)}
    return {"capszoo_version": __version__, **facts, **metadata}


def load_model(path: str | Path | WeightsFile, **kwargs: Any) -> nn.Module:
    """Make the model that a file of :func:`save_model` or a checkpoint of the recipes holds, and load it.

    Weights become float32, whatever dtype they have in the file, unless `dtype` is given. What the header says of the
    `mean` and `std` of the images goes into the model's `pretrained_cfg`.

    Args:
        path: A safetensors file such as `runs/NAME/best.safetensors`, whose header says what model it holds, or what
            :func:`capszoo.checkpoint.read_file` gave of it.
        **kwargs: Keywords of :func:`create_model` that take the place of the header's, such as `decoder=False` or
            `dtype=torch.float16`.

    Raises:
        CheckpointError: If the file is missing or damaged, its header names no model, or `img_size` is another one
            than that of single capsules that the model keeps.
    """
    file = read_file(path)
    path, header = file.path, file.metadata
    if "model" not in header:
        raise CheckpointError(
            f"{str(path)!r} does not say what model it holds: use create_model(NAME, checkpoint_path=)"
        )
    if header["model"] in list_models():  # else it is the file's fault, and not the caller's
        check_arguments(header["model"], kwargs)
    try:
        return _load_model(file, header["model"], header_arguments(path, header["model"], header), kwargs)
    except CheckpointError:
        raise
    except Exception as error:  # what a file says of its model may be anything
        raise CheckpointError(f"{str(path)!r} holds no model that can be made: {first_line(error)}") from error


def header_arguments(path: str | Path, name: str, header: dict[str, str]) -> dict[str, Any]:
    """Read what the header of a model's file says of the keywords that made the model.

    Keywords of timm's are left out: they say where weights came from, and a file must not name another.

    Args:
        path: The file, for errors.
        name: Name of the model.
        header: The file's header metadata.

    Raises:
        CheckpointError: If there is a keyword that the model does not take, or a value of the wrong type.
        ValueError: If no model has this name.
    """
    _check_name(name)
    try:
        model_args = json.loads(header.get("model_args", "{}"))
    except (ValueError, RecursionError):
        model_args = None
    if not isinstance(model_args, dict):
        raise CheckpointError(f"{str(path)!r} is damaged (its 'model_args' are no JSON object): use another checkpoint")
    model_args = {key: value for key, value in model_args.items() if key not in _TIMM_KEYWORDS | _NOT_OF_FILES}
    try:
        return check_arguments(name, model_args)
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} was made with arguments that cannot be used: {error}") from None


def _load_model(file: WeightsFile, name: str, model_args: dict[str, Any], kwargs: dict[str, Any]) -> nn.Module:
    kwargs = check_arguments(name, kwargs)
    # The shapes may agree all the same, and every kept capsule would then look at another place of the image.
    size, wanted = (to_2tuple(values.get("img_size") or 28) for values in (model_args, {**model_args, **kwargs}))
    if model_args.get("keep_capsules") and tuple(size) != tuple(wanted):
        raise CheckpointError(
            f"{str(file.path)!r} keeps single capsules of images of {size[0]}x{size[1]}: leave out "
            f"img_size={kwargs['img_size']}"
        )
    return create_model(name, checkpoint_path=file, **{**model_args, **kwargs})


def _check_source(name: str, cache_dir: str | Path | None) -> str:
    """Check the config.json of a folder or of the hub, before anything of the size that it says is made.

    Returns:
        The name of the model that it describes.

    Raises:
        ValueError: If it is missing or damaged, or describes no model of this zoo, or a vast one.
    """
    try:
        config = resolve_model_input_args(name, cache_dir=cache_dir)
        arch, model_args = config["model_name"], config.get("pretrained_model_args", {})
        check_arguments(arch, model_args)
        for key in _NOT_OF_FILES & set(model_args):
            raise ValueError(f"{arch!r} does not take {key}={reprlib.repr(model_args[key])} from a file")
        size = sum(value.numel() for value in timm.create_model(name, device="meta", cache_dir=cache_dir).parameters())
    except Exception as error:  # timm takes the file for granted
        raise ValueError(f"{name!r} describes no model that can be made: {first_line(error)}") from error
    if size > _MAX_DESCRIBED:
        raise ValueError(f"{name!r} describes a model of {size:,} weights, more than {_MAX_DESCRIBED:,}: check it")
    return arch


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

    Args:
        name: As :func:`create_model` takes it.

    Raises:
        ValueError: If the name or its tag is unknown, or its folder describes no model.
    """
    return set(_annotations(name))


def _annotations(name: str, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """Types of the arguments of a model's constructor, by keyword."""
    if ":" in name:
        name = _check_source(name, cache_dir)
    _check_name(name)
    parameters = inspect.signature(family_of(name), eval_str=True).parameters
    return {key: parameter.annotation for key, parameter in parameters.items()}


def check_arguments(name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Check keywords of a model and their values; deep inside timm and torch they would be errors without a hint.

    The one check for calls, command lines, YAML, headers of weights and config.json: each value is held against the
    annotation of the constructor. None stands for the default, as in timm.

    Args:
        name: As :func:`create_model` takes it.
        kwargs: Keywords of its constructor; those of timm for any model are let through.

    Returns:
        The keywords, numbers and sequences of numpy and torch as Python's own, which JSON and YAML can hold.

    Raises:
        ValueError: If a keyword is unknown, or a value is of the wrong type.
    """
    annotations = _annotations(name, kwargs.get("cache_dir"))
    checked = dict(kwargs)
    for key, value in kwargs.items():
        if key in annotations:
            checked[key] = check_value(key, value, annotations[key])
        elif key not in _TIMM_KEYWORDS:
            known = sorted(annotations)
            near = difflib.get_close_matches(key, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"unknown keyword {key!r} for model {name!r}{hint} Known: {', '.join(known)}")
    return checked


__getattr__ = _moved.getter(__name__)
