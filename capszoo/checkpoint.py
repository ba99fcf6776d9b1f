"""Checkpoints: safetensors in, safetensors out, written so that a killed run never leaves half a file.

A model's file holds its weights under their own names and readable metadata in the header. Loading a file never runs
code of it.
"""

import json
import reprlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import CheckpointError, UnreadableError, WriteError, first_line
from .files import write_atomically
from .layers import unfold_scales

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


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file into CPU tensors and its header metadata.

    Raises:
        CheckpointError: If there is no such file, or it is damaged or no safetensors file.
        UnreadableError: If it cannot be read, and may be sound.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {str(path)!r}: check the path")
    try:
        with open(path, "rb") as file:
            file.read(8)
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            return {key: file.get_tensor(key) for key in file.keys()}, metadata
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UnreadableError(
            f"{str(path)!r} cannot be read ({reason}): mend its permissions, the disk or the memory"
        ) from None
    except Exception as error:  # torch refuses odd types and shapes with any exception
        raise CheckpointError(
            f"{str(path)!r} is damaged or no safetensors file ({first_line(error)}): use another checkpoint"
        ) from None


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the header metadata of a safetensors file alone."""
    return load_tensors(path)[1]


def save_weights(path: str | Path, model: nn.Module, metadata: dict[str, Any]) -> None:
    """Write a model's weights to a safetensors file.

    Args:
        path: File to write; its folder must exist.
        model: The model, not wrapped.
        metadata: Facts for people and programs (model, data set, accuracy); values that are no strings become JSON.

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


def load_weights(model: nn.Module, path: str | Path) -> dict[str, str]:
    """Load a model's weights from a safetensors file; a decoder that the model does not have is left out.

    The `mean` and `std` of the images that they were trained on, if the header has them, go into the model's
    `pretrained_cfg`.

    Returns:
        The file's header metadata.

    Raises:
        CheckpointError: If the file is missing or damaged, or the weights are those of another model.
    """
    tensors, metadata = load_tensors(path)
    fitting = _fitting(model, tensors, metadata, path)
    normalisation = _read_normalisation(path, metadata, getattr(model, "in_chans", 1))
    model.load_state_dict(fitting)
    if normalisation:
        cfg: Any = {**(getattr(model, "pretrained_cfg", None) or {}), **normalisation}
        model.pretrained_cfg = model.default_cfg = cfg
    return metadata


def _read_normalisation(path: str | Path, header: dict[str, str], in_chans: int) -> dict[str, tuple[float, ...]]:
    """Read `mean` and `std` from the header of a model's file: for each channel, or one number for all."""
    found: dict[str, tuple[float, ...]] = {}
    for key in ("mean", "std"):
        if key not in header:
            continue
        try:
            values = json.loads(header[key])
        except (ValueError, RecursionError):
            values = None
        numbers = isinstance(values, list) and all(type(v) in (int, float) and abs(v) < 1e30 for v in values)
        if not numbers or len(values) not in (1, in_chans) or (key == "std" and min(values) <= 0):
            raise CheckpointError(
                f"{str(path)!r} is damaged (its {key!r} is {reprlib.repr(header[key])}, not a number for each "
                "channel): use another checkpoint"
            )
        found[key] = tuple(float(value) for value in values)
    return found


def check_weights(model: nn.Module, path: str | Path) -> None:
    """Raise the CheckpointError of :func:`load_weights` without loading; `model` may be on the meta device."""
    _fitting(model, *load_tensors(path), path)


def _fitting(
    model: nn.Module, tensors: dict[str, Tensor], metadata: dict[str, str], path: str | Path
) -> dict[str, Tensor]:
    """Return the tensors of a file that the model takes, after a check that they are all it needs."""
    own, tensors = model.state_dict(), unfold_scales(tensors, model)
    wanted_by = f"the model {metadata['model']!r}" if "model" in metadata else "another model"
    for key, value in own.items():
        if key not in tensors:
            if key.startswith("decoder."):
                raise CheckpointError(f"{str(path)!r} holds no decoder: make the model without decoder=True")
            raise CheckpointError(f"{str(path)!r} holds weights of {wanted_by}: it lacks {key!r}")
        if tensors[key].shape != value.shape:
            raise CheckpointError(
                f"{str(path)!r} holds weights of {wanted_by}: {key!r} has shape {tuple(tensors[key].shape)}, this "
                f"model needs {tuple(value.shape)} (other num_classes, in_chans, img_size or architecture)"
            )
        if tensors[key].dtype not in _WEIGHT_TYPES:
            raise CheckpointError(
                f"{str(path)!r} holds {key!r} as {tensors[key].dtype}, no type of weights: use another checkpoint"
            )
    for key in tensors:
        if key not in own and not key.startswith("decoder."):
            raise CheckpointError(f"{str(path)!r} holds weights of {wanted_by}: this model has no {key!r}")
    return {key: value for key, value in tensors.items() if key in own}
