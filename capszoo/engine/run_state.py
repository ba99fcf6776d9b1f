"""The state of a run: tensors of model, optimizer and random number generators, and all else as JSON, in one file."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capszoo.checkpoint import load_tensors, save_tensors, storable
from capszoo.data import Split
from capszoo.errors import CheckpointError

_FORMAT = "capszoo.resume.v1"
# By the names that states hold them by.
_TYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


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
    tensors = storable(tensors, path)
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
        "ema": "ema" not in state
        or all(type(key) is str and isinstance(value, Tensor) for key, value in _dict(state["ema"]).items()),
        "optimizer": isinstance(optimizer.get("state"), dict)
        and all(type(key) is int and isinstance(value, dict) for key, value in optimizer["state"].items())
        and isinstance(groups, list)
        and _list_of_dicts(groups)
        and all(isinstance(group.get("params"), list) and _is_rate(group.get("lr")) for group in groups),
        "scaler": isinstance(state.get("scaler"), dict),
        "data": "data" not in state  # of earlier versions
        or (isinstance(images := _dict(state["data"]).get("images"), list) and list(map(type, images)) == [int, int]),
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


def data_facts(*splits: Split | None) -> dict[str, Any]:
    """What a state says of the images of a run: how many each split has, and a checksum of all their labels."""
    digest = hashlib.sha256()
    for split in splits:
        if split is not None:
            digest.update(split.labels.cpu().contiguous().view(torch.uint8).numpy().data)
    return {"images": [0 if split is None else len(split) for split in splits], "labels": digest.hexdigest()}


def check_data_facts(state: dict[str, Any], facts: dict[str, Any]) -> None:
    """Check that a state is of a run on the same images, as far as it says so.

    With others, a validation split would have images that were trained on, and a step within an epoch another meaning.

    Raises:
        CheckpointError: If it is not.
    """
    of_run = state.get("data", facts)
    if of_run == facts:
        return
    (train, val), (train_now, val_now) = of_run["images"], facts["images"]
    now = f"{train_now:,} and {val_now:,}" if of_run["images"] != facts["images"] else "as many with other labels"
    raise CheckpointError(
        f"the run has {train:,} images to train on and {val:,} to validate, and the data set at hand has {now}: give "
        "the images of the run, or start a new one with --checkpoint RUN_DIR"
    )


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


def restore_strides(optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer's state the memory format of its parameters; a checkpoint keeps none, and bits differ."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
