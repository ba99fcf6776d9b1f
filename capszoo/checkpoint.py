"""Checkpoints: safetensors in, safetensors out, written so that a killed run never leaves half a file.

A model's file holds its weights under their own names and readable metadata in the header. Loading a file never runs
code of it.
"""

import contextlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.layers import to_2tuple
from torch import Tensor, nn

from . import _moved
from .contract import Resizable, auxiliary_modules
from .errors import CheckpointError, UnreadableError, WriteError, first_line
from .files import write_atomically
from .layers import unfold_scales
from .pretrained_cfg import cfg_of_model, class_names_in, read_normalisation

_logger = logging.getLogger(__name__)

# Keywords of models that say how they compute: weights have the same shapes with any values of them.
COMPUTING = ("num_routing", "num_passes", "concurrent", "routing", "couplings", "squash", "form", "head", "head_kwargs",
             "keep_capsules")  # fmt: skip

# Others cannot be copied into a model's weights, or lose most of their values there.
_WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save_tensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str], previous: str | Path | None = None
) -> None:
    """Write tensors and header metadata to a safetensors file, atomically.

    Tensors that share memory, as tied weights do, are each written: every reader of the file finds all names.

    Raises:
        WriteError: If the file cannot be written, or a tensor has no values or none that safetensors holds.
    """
    stored = storable(tensors, path)
    header = {"format": "pt", **metadata}

    def write(temporary: Path) -> None:
        try:
            save_file(stored, temporary, metadata=header)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise WriteError(
                f"{str(path)!r} cannot be written: safetensors does not hold such tensors ({first_line(error)}): "
                "convert them to floating or integer ones"
            ) from error

    write_atomically(path, write, previous)


def storable(tensors: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Return tensors as safetensors takes them: on the CPU, contiguous whatever their strides, none sharing memory."""
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in tensors.items():
        try:
            copy = value.detach().cpu().contiguous()
        except (NotImplementedError, RuntimeError) as error:
            raise WriteError(
                f"{str(path)!r} cannot be written: {key!r} has no values to store, it is {value.layout} on "
                f"{value.device}: make it dense, on a device that is not meta"
            ) from error
        storage = copy.untyped_storage().data_ptr()
        stored[key] = copy.clone() if storage in storages else copy
        storages.add(storage)
    return stored


@dataclass(frozen=True)
class WeightsFile:
    """What a safetensors file holds, read once.

    Attributes:
        path: The file.
        tensors: Its tensors by name, on the CPU.
        metadata: The metadata in its header.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_file(path: "str | Path | WeightsFile") -> WeightsFile:
    """Read a safetensors file; one that has been read is given back as it is.

    Raises:
        CheckpointError: If there is no such file, or it is damaged or no safetensors file.
        UnreadableError: If it cannot be read, and may be sound.
    """
    if isinstance(path, WeightsFile):
        return path
    with _opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return WeightsFile(Path(path), tensors, dict(file.metadata() or {}))


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file into CPU tensors and its header metadata; raises as :func:`read_file`."""
    file = read_file(path)
    return file.tensors, file.metadata


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the header metadata of a safetensors file alone; raises as :func:`read_file`."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """Open a safetensors file; whatever goes wrong in the block is an error of the file."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {str(path)!r}: check the path")
    try:
        with open(path, "rb") as bare:
            bare.read(8)
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UnreadableError(
            f"{str(path)!r} cannot be read ({reason}): mend its permissions, the disk or the memory"
        ) from None
    except Exception as error:  # torch refuses odd types and shapes with any exception
        raise CheckpointError(
            f"{str(path)!r} is damaged or no safetensors file ({first_line(error)}): use another checkpoint"
        ) from None


def save_weights(path: str | Path, model: nn.Module, metadata: dict[str, Any]) -> None:
    """Write a model's weights to a safetensors file.

    Args:
        path: File to write; its folder must exist.
        model: The model, not wrapped.
        metadata: Facts for people and programs (model, data set, accuracy); other values than strings become JSON.

    Raises:
        WriteError: As :func:`save_tensors`, and if JSON cannot hold a value.
    """
    header = {}
    for key, value in metadata.items():
        try:
            header[key] = value if isinstance(value, str) else json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise WriteError(
                f"{str(path)!r} cannot be written: its header cannot hold this {key!r} ({first_line(error)}): give "
                "text, numbers, and lists or dicts of them"
            ) from error
    save_tensors(path, model.state_dict(), header)


def load_weights(model: nn.Module, path: str | Path | WeightsFile) -> dict[str, str]:
    """Load a model's weights from a safetensors file; a decoder that the model does not have is left out.

    The model's `pretrained_cfg` then describes them: size of the images and number of classes, and of the header what
    it has of `mean`, `std`, `class_names` and `dataset`. What it said of other weights goes.

    Args:
        model: The model, not wrapped.
        path: The file, or what :func:`read_file` gave.

    Returns:
        The file's header metadata.

    Raises:
        CheckpointError: If the file is missing or damaged, or the weights are those of another model.
    """
    file = read_file(path)
    fitting = check_weights(model, file)
    fitting = _resized(model, fitting, file)
    normalisation = read_normalisation(file.path, file.metadata, getattr(model, "in_chans", 1))
    model.load_state_dict(fitting)
    _describe(model, file, normalisation)
    return file.metadata


def _resized(model: Any, tensors: dict[str, Tensor], file: "WeightsFile") -> dict[str, Tensor]:
    """Weights as they are at the size of the model's images, where the file says that they are of another."""
    try:
        size = to_2tuple(json.loads(file.metadata["model_args"]).get("img_size") or 28)
        if tuple(size) == tuple(model.img_size) or not isinstance(model, Resizable):
            return tensors
        return model.resize_weights(tensors, tuple(size))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):  # which says nothing of a size
        return tensors


def _describe(model: Any, file: "WeightsFile", normalisation: dict[str, tuple[float, ...]]) -> None:
    """Let the `pretrained_cfg` of a model describe the weights of a file."""
    cfg: Any = getattr(model, "pretrained_cfg", None)
    if not cfg or not hasattr(model, "img_size"):
        if normalisation:
            model.pretrained_cfg = model.default_cfg = {**(cfg or {}), **normalisation}
        return
    cfg = {**cfg_of_model(model, cfg, same_source=False), **normalisation}
    names = class_names_in(file.metadata)
    if names and len(names) == model.num_classes:
        cfg["label_names"] = tuple(names)
    if file.metadata.get("dataset"):
        cfg["description"] = f"trained on {file.metadata['dataset']}"
    model.pretrained_cfg = model.default_cfg = cfg


def check_weights(model: nn.Module, path: str | Path | WeightsFile) -> dict[str, Tensor]:
    """Return the tensors of a file that a model takes, after a check that they are all it needs.

    Args:
        model: The model; it may be on the meta device.
        path: The file, or what :func:`read_file` gave.

    Raises:
        CheckpointError: As :func:`load_weights`.
    """
    file = read_file(path)
    tensors, named = unfold_scales(file.tensors, model), repr(str(file.path))
    wanted_by = f"the model {file.metadata['model']!r}" if "model" in file.metadata else "another model"
    own, misfit = model.state_dict(), compare_weights(tensors, model)
    for key in own:
        if key in misfit.missing:
            part = _auxiliary_part(key, model)
            if part is not None:
                raise CheckpointError(f"{named} holds no {part}: make the model without {part}=True")
            raise CheckpointError(f"{named} holds weights of {wanted_by}: it lacks {key!r}")
        if key in misfit.reshaped:
            raise CheckpointError(
                f"{named} holds weights of {wanted_by}: {key!r} has shape {tuple(tensors[key].shape)}, this "
                f"model needs {tuple(own[key].shape)} (other num_classes, in_chans, img_size or architecture)"
            )
        if key in misfit.mistyped:
            raise CheckpointError(
                f"{named} holds {key!r} as {tensors[key].dtype}, no type of weights: use another checkpoint"
            )
    for key in misfit.unknown:
        raise CheckpointError(f"{named} holds weights of {wanted_by}: this model has no {key!r}")
    return {key: value for key, value in tensors.items() if key in own}


@dataclass(frozen=True)
class Misfit:
    """Names of the tensors by which weights and a model differ, in their order.

    Attributes:
        missing: Those that the model has and the weights have not.
        unknown: Those of the weights that the model has not, those of auxiliary modules such as a decoder left out.
        reshaped: Those of another shape.
        mistyped: Those whose values the model cannot take: of no floating-point type, or for a buffer of integers not
            of its own type.
    """

    missing: list[str]
    unknown: list[str]
    reshaped: list[str]
    mistyped: list[str]


def _auxiliary_part(key: str, model: nn.Module) -> str | None:
    """The auxiliary module of a model, which need not be there, to which a tensor belongs."""
    part = key.partition(".")[0]
    return part if part in auxiliary_modules(model) else None


def compare_weights(tensors: Mapping[str, Tensor], model: nn.Module) -> Misfit:
    """Say in what weights differ from those that a model holds: the one place that decides whether they fit."""
    own = model.state_dict()
    shared = {key: (tensors[key], value) for key, value in own.items() if key in tensors}
    return Misfit(
        missing=[key for key in own if key not in tensors],
        unknown=[key for key in tensors if key not in own and _auxiliary_part(key, model) is None],
        reshaped=[key for key, (given, value) in shared.items() if given.shape != value.shape],
        mistyped=[
            key
            for key, (given, value) in shared.items()
            if given.dtype not in (_WEIGHT_TYPES if value.is_floating_point() else (value.dtype,))
        ],
    )


def computing_arguments(model_args: Mapping[str, Any], img_size: Any) -> dict[str, Any]:
    """Of a file's keywords of its model those that say how it computes, for images of a size.

    Weights of any values of them have the same shapes, and are of no use with others than they were trained with.
    """
    same = to_2tuple(model_args.get("img_size") or 28) == to_2tuple(img_size or 28)
    return {key: model_args[key] for key in COMPUTING if key in model_args and (same or key != "keep_capsules")}


def fit_weights(state_dict: dict[str, Tensor], model: nn.Module, may_differ: Collection[str]) -> dict[str, Tensor]:
    """Fit weights to a model of other classes, channels or image size; keep all that can be kept.

    What has another shape keeps the model's own initialisation, and a log line says so. The bias of the classifier
    and the first convolution are left to timm, which drops the one and adapts the other.

    Args:
        state_dict: The weights.
        model: The model.
        may_differ: Names of the weights whose shape may be another one in this model.

    Raises:
        ValueError: If the weights are those of another architecture.
    """
    cfg = model.pretrained_cfg
    says = f"these weights do not fit {cfg['architecture']!r}"
    convs = [cfg["first_conv"]] if isinstance(cfg["first_conv"], str) else cfg["first_conv"]
    of_convs = [f"{conv}.weight" for conv in convs]
    # timm drops the bias of other classes; one with a row for each capsule differs with the image size, too.
    left_to_timm = [*of_convs, *([] if model.num_classes == cfg["num_classes"] else [f"{cfg['classifier']}.bias"])]
    own, misfit = model.state_dict(), compare_weights(state_dict, model)
    for key in misfit.unknown:
        if model.num_classes or not key.startswith(f"{cfg['classifier']}."):
            raise ValueError(f"{says}: it has no {key!r}")
    for key in misfit.reshaped:
        if key not in may_differ:
            raise ValueError(
                f"{says}: {key!r} has shape {tuple(state_dict[key].shape)}, the model needs {tuple(own[key].shape)}"
            )
    for key in misfit.missing:
        if _auxiliary_part(key, model) is None:
            raise ValueError(f"{says}: they lack {key!r}")
    fresh = [key for key in misfit.reshaped if key not in left_to_timm] + misfit.missing
    if fresh:
        # Those of a classifier that timm makes anew, too.
        named = [*(key for key in misfit.reshaped if key not in of_convs), *misfit.missing]
        _logger.warning(
            f"The weights are of other classes, images or parts than the model, and have nothing for "
            f"{', '.join(named)}: initialised anew."
        )
    kept = {key: value for key, value in state_dict.items() if key in own or key in misfit.unknown}
    return {**kept, **{key: own[key] for key in fresh}}


__getattr__ = _moved.getter(__name__)
