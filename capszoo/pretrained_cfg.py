"""What a model's `pretrained_cfg` says of images and classes, and the same in the headers of weights' files."""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointError

# Of timm's configuration, what is said of weights, and where they come from.
_NAMES_OF_CLASSES = ("label_descriptions", "label_names")
_SAID_OF_WEIGHTS = ("description", *_NAMES_OF_CLASSES, "notes", "tag")
_SOURCE_OF_WEIGHTS = ("file", "hf_hub_filename", "hf_hub_id", "license", "origin_url", "paper_name", "source",
                      "state_dict", "url")  # fmt: skip


def trained_otherwise(model: Any) -> tuple[bool, bool, bool]:
    """Whether the weights of a configuration are of other classes, other channels and another image size."""
    cfg = model.pretrained_cfg
    source_chans, *source_size = cfg["input_size"]
    return (
        model.num_classes != cfg["num_classes"],
        model.in_chans != source_chans,
        tuple(model.img_size) != tuple(source_size),
    )


def cfg_of_model(model: Any, cfg: Mapping[str, Any], same_source: bool) -> dict[str, Any]:
    """The configuration of a model that is not as the weights that it names: what is said of these is left out, but for
    the names of classes that are the same; classes and images are the model's.

    Args:
        model: The model.
        cfg: Its `pretrained_cfg`.
        same_source: Whether the model's weights were made from those; else where they come from is left out, too.
    """
    left_out = {*_SAID_OF_WEIGHTS, *(() if same_source else _SOURCE_OF_WEIGHTS)}
    if same_source and cfg.get("num_classes") == model.num_classes:
        left_out.difference_update(_NAMES_OF_CLASSES)
    cfg = {key: value for key, value in cfg.items() if key not in left_out}
    if len(cfg.get("mean") or (0.0,)) not in (1, model.in_chans):
        # One for all channels: which of them stand for which colours is not known.
        cfg |= {key: (round(sum(cfg[key]) / len(cfg[key]), 4),) for key in ("mean", "std")}
    if hasattr(model, "grid_size"):
        cfg["pool_size"] = tuple(model.grid_size)
    return {**cfg, "num_classes": model.num_classes, "input_size": (model.in_chans, *model.img_size)}


def forget_classes(model: Any) -> None:
    """Leave the names of classes out of the configuration of a model whose head has not learnt them."""
    cfg = getattr(model, "pretrained_cfg", None)
    if cfg:
        kept = {key: value for key, value in cfg.items() if key not in _NAMES_OF_CLASSES}
        model.pretrained_cfg = model.default_cfg = kept


def overlay_of_file(path: str | Path, header: dict[str, str]) -> dict[str, Any]:
    """What takes the place, in timm's configuration, of what it says of other weights than those of a file.

    Raises:
        CheckpointError: If the header has a `mean` or `std` that is none.
    """
    names = class_names_in(header)
    return {
        **dict.fromkeys(("description", *_NAMES_OF_CLASSES, "notes")),
        **read_normalisation(path, header),
        **({"label_names": tuple(names)} if names else {}),
    }


def header_facts(model: Any) -> dict[str, list[Any]]:
    """What the header of a model's file says of images and classes: `mean`, `std` and `class_names`, where known."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    facts = {key: list(cfg[key]) for key in ("mean", "std") if cfg.get(key) is not None}
    names = cfg.get("label_names") or ()
    if names and len(names) == getattr(model, "num_classes", None):
        facts["class_names"] = list(names)
    return facts


def class_names_in(metadata: Mapping[str, str]) -> list[str]:
    """The names of the classes that a header has; none where it has no list of texts."""
    try:
        names = json.loads(metadata.get("class_names", "null"))
    except (ValueError, RecursionError):
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def read_normalisation(
    path: str | Path, header: Mapping[str, str], in_chans: int | None = None
) -> dict[str, tuple[float, ...]]:
    """Read `mean` and `std` from the header of a model's file: for each channel, or one number for all."""
    found: dict[str, tuple[float, ...]] = {}
    for key in ("mean", "std"):
        if key not in header:
            continue
        try:
            values = json.loads(header[key])
        except (ValueError, RecursionError):
            values = None
        numbers = isinstance(values, list) and values and all(type(v) in (int, float) and abs(v) < 1e30 for v in values)
        if not numbers or len(values) not in (1, in_chans or len(values)) or (key == "std" and min(values) <= 0):
            raise CheckpointError(
                f"{str(path)!r} is damaged (its {key!r} is {reprlib.repr(header[key])}, not a number for each "
                "channel): use another checkpoint"
            )
        found[key] = tuple(float(value) for value in values)
    return found
