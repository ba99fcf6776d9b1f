"""Checkpoints: safetensors in, safetensors out, written so that a killed run never leaves half a file.

A model's file holds its weights under their own names and readable metadata in the header. The resume state of a run
is one safetensors file too: tensors of model, optimizer and random number generators, and everything else as JSON in
the header. Loading a file never runs code of it.
"""

import contextlib
import hashlib
import json
import math
import os
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .layers import unfold_scales

__all__ = [
    "CheckpointError",
    "UnreadableError",
    "WriteError",
    "load_state",
    "load_tensors",
    "load_weights",
    "read_metadata",
    "save_state",
    "save_weights",
]

_FORMAT = "capszoo.resume.v1"

# Others cannot be copied into a model's weights, or lose most of their values there.
_WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# By the names that states hold them by.
_TYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the remedy."""


class UnreadableError(CheckpointError):
    """A checkpoint that may be sound, but cannot be read: its permissions, the disk or the memory are at fault."""


class WriteError(ValueError):
    """A file that cannot be written; the message names it, the reason and the remedy."""


def write_atomically(path: str | Path, write: Callable[[Path], Any], previous: str | Path | None = None) -> None:
    """Call `write(temporary_path)` beside `path`, flush it to disk and rename it, so that `path` is whole or absent.

    Args:
        path: The file.
        write: Writes it.
        previous: Where to keep the file that was at `path` before. Killed in between, it is there and `path` is absent.

    Raises:
        WriteError: If it cannot be written (full disk, read-only folder); what was at `path` stays.
    """
    path = Path(path)
    # Renamed over a device such as /dev/null, a file would take its place.
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise WriteError(f"{str(path)!r} cannot be written (it is not a file): give another path")
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"  # which a folder such as '.' has too
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        if os.name == "posix":  # the rename itself must reach the disk too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise WriteError(
            f"{str(path)!r} cannot be written ({reason}): free some space or mend the folder, then start "
            f"again; what was there before is kept"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_tensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str], previous: str | Path | None = None
) -> None:
    """Write tensors and header metadata to a safetensors file, atomically.

    Tensors that share memory, as tied weights do, are each written: every reader of the file finds all names.

    Raises:
        WriteError: If the file cannot be written, or a tensor has no values or none that safetensors holds.
    """
    stored = _storable(tensors, path)
    header = {"format": "pt", **metadata}

    def write(temporary: Path) -> None:
        try:
            save_file(stored, temporary, metadata=header)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise WriteError(
                f"{str(path)!r} cannot be written: safetensors does not hold such tensors ({_first_line(error)}): "
                "convert them to floating or integer ones"
            ) from error

    write_atomically(path, write, previous)


def _storable(tensors: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
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
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise UnreadableError(
            f"{str(path)!r} cannot be read ({reason}): mend its permissions, the disk or the memory"
        ) from None
    except Exception as error:  # torch refuses odd types and shapes with any exception
        raise CheckpointError(
            f"{str(path)!r} is damaged or no safetensors file ({_first_line(error)}): use another checkpoint"
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
                f"{str(path)!r} cannot be written: its header cannot hold this {key!r} ({_first_line(error)}): give "
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


def save_state(path: str | Path, state: dict[str, Any], previous: str | Path | None = None) -> None:
    """Write a nested state of dicts, lists, tuples, tensors, dtypes, numbers, strings, bools and None to one file.

    Its header has a checksum of all that it holds.

    Args:
        path: The file.
        state: The state.
        previous: Where to keep the file that was at `path` before.

    Raises:
        WriteError: As :func:`save_tensors`.
        TypeError: If the state holds anything else.
    """
    tensors: dict[str, Tensor] = {}

    def strip(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value
            return {"__tensor__": name}
        if isinstance(value, dict):
            # JSON keys are strings; optimizer states are keyed by integers.
            return {"__dict__": [[key, strip(item, f"{name}.{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            items = [strip(item, f"{name}.{i}") for i, item in enumerate(value)]
            return {"__tuple__": items} if isinstance(value, tuple) else items
        if isinstance(value, torch.dtype):
            return {"__dtype__": str(value).removeprefix("torch.")}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"cannot store {type(value).__name__} at {name!r} in a checkpoint")

    tree = json.dumps(strip(state, ""))
    tensors = _storable(tensors, path)
    header = {"capszoo": _FORMAT, "state": tree, "sha256": _checksum(tensors, tree)}
    save_tensors(path, tensors, header, previous)


def load_state(path: str | Path) -> dict[str, Any]:
    """Read back what :func:`save_state` wrote.

    Raises:
        CheckpointError: If the file is missing, damaged or no resume state.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("capszoo") != _FORMAT:
        raise CheckpointError(f"{str(path)!r} is no resume state of capszoo: resume from a folder that train.py wrote")
    if metadata.get("sha256") != _checksum(tensors, metadata.get("state", "")):
        raise CheckpointError(f"{str(path)!r} is damaged (its checksum is another): use another checkpoint")

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            if "__tensor__" in value:
                return tensors[value["__tensor__"]]
            if "__tuple__" in value:
                return tuple(restore(item) for item in value["__tuple__"])
            if "__dtype__" in value:
                return _TYPES[value["__dtype__"]]
            return {key: restore(item) for key, item in value["__dict__"]}
        if isinstance(value, list):
            return [restore(item) for item in value]
        return value

    try:
        state = restore(json.loads(metadata["state"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{str(path)!r} is damaged ({type(error).__name__} in its state): use another checkpoint"
        ) from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{str(path)!r} is damaged (its state is no mapping): use another checkpoint")
    return state


def check_resume_state(state: dict[str, Any], path: str | Path) -> None:
    """Check that a state has all that a training run goes on from, each part of its kind.

    Whether model and optimizer are those of the run is left to their `load_state_dict`.

    Raises:
        CheckpointError: If a part is missing or of another kind.
    """
    number, natural = (lambda v: _is_number(v) and v >= 0), (lambda v: type(v) is int and v >= 0)
    fields = {"epoch": natural, "step": natural, "skipped": natural, "seconds": number, "total_seconds": number}
    position, random, optimizer = (_dict(state.get(key)) for key in ("position", "random", "optimizer"))
    history, groups = position.get("history"), optimizer.get("param_groups")
    checks = {
        "position": all(check(position.get(key)) for key, check in fields.items())
        and _list_of_dicts(history)
        and (position.get("best") is None or type(_dict(position["best"]).get("epoch")) is int),
        "sums": isinstance(state.get("sums"), Tensor) and state["sums"].shape == (5,),
        "lr": _is_number(state.get("lr")),
        "model": bool(_dict(state.get("model")))
        and all(type(key) is str and isinstance(value, Tensor) for key, value in state["model"].items()),
        "optimizer": isinstance(optimizer.get("state"), dict)
        and all(type(key) is int and isinstance(value, dict) for key, value in optimizer["state"].items())
        and isinstance(groups, list)
        and _list_of_dicts(groups)
        and all(isinstance(group.get("params"), list) and _is_rate(group.get("lr")) for group in groups),
        "scaler": isinstance(state.get("scaler"), dict),
        "random": "cpu" in random
        and all(isinstance(value, Tensor) and value.dtype == torch.uint8 for value in random.values()),
    }
    for key, right in checks.items():
        if not right:
            raise CheckpointError(f"{str(path)!r} has no {key!r} of a training run: use another checkpoint")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_rate(value: Any) -> bool:
    return _is_number(value) or isinstance(value, Tensor)  # a tensor where steps are captured


def _dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _list_of_dicts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _checksum(tensors: dict[str, Tensor], tree: str) -> str:
    """Hash a state. safetensors checks its header alone: a flipped bit in a tensor would go unnoticed."""
    digest = hashlib.sha256(tree.encode())
    for key in sorted(tensors):
        value = tensors[key].contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def random_state() -> dict[str, Tensor]:
    """States of torch's random number generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Set torch's random number generators to states of :func:`random_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
