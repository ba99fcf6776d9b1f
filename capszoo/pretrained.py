"""The weights that come with capszoo: where they are, what they are, whether they are whole, and what they fit.

`weights/weights.json` has an entry for every file `weights/MODEL.TAG.safetensors`, with its sha256 and what a model's
`pretrained_cfg` says of it; `recipes/export.py ship` writes both. timm loads a file without looking at its hash, so
the models check it here before timm reads it. Files of users have no entry, and are not checked.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from timm.models import resolve_pretrained_cfg
from torch import nn

from .checkpoint import fit_weights, read_metadata
from .pretrained_cfg import overlay_of_file

__all__ = [
    "check_shipped",
    "check_source",
    "fit_weights",
    "image_statistics",
    "read_table",
    "sha256_of",
    "shipped_cfgs",
    "weights_path",
]

# Inside the package, so that a wheel has them and loading needs no network.
WEIGHTS_DIR = Path(__file__).parent / "weights"

# What an entry must have.
_KINDS = {
    **dict.fromkeys(("sha256", "description", "dataset", "license", "recipe"), str),
    **dict.fromkeys(("input_size", "pool_size", "label_names"), list),
    "num_classes": int,
    "top1": (int, float),
}


def weights_path(name: str) -> Path:
    """Where the file of the weights `name` (``model.tag``) is."""
    return WEIGHTS_DIR / f"{name}.safetensors"


def read_table() -> dict[str, dict[str, Any]]:
    """Read the entries of the shipped weights by name; those without a file are left out.

    Raises:
        ValueError: If the table is damaged.
    """
    path = WEIGHTS_DIR / "weights.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for name, entry in table.items():
            if not re.fullmatch(r"\w+\.\w+", name):  # it becomes part of a path
                raise ValueError(f"no name of weights: {name!r}")
            for key, kind in _KINDS.items():
                if not isinstance(entry[key], kind):
                    raise TypeError(f"{name!r} has {key} {entry[key]!r}")
            if not re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]):
                raise ValueError(f"{name!r} has sha256 {entry['sha256']!r}")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{str(path)!r} is damaged ({what}): install capszoo anew") from None
    return {name: entry for name, entry in table.items() if weights_path(name).is_file()}


def sha256_of(path: str | Path) -> str:
    """Hash a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def shipped_cfgs(models: Iterable[str], cfg: Callable[..., dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Make what `generate_default_cfgs` takes: a configuration for each of the models' shipped weights.

    A model's default are its MNIST weights. Without them it has none: `create_model` must not change its classes and
    image size with the weights that happen to be shipped.

    Args:
        models: Names of the entrypoints.
        cfg: Makes a configuration of those of its fields that differ from the family's.
    """
    table = read_table()
    cfgs: dict[str, dict[str, Any]] = {}
    for model in models:
        names = sorted(name for name in table if name.partition(".")[0] == model)
        for name in sorted(names, key=lambda name: not name.endswith(".mnist")):
            fields = _fields(table[name])
            notes = (*fields.pop("notes"), *cfg().get("notes", ()))  # what the family says of itself stays
            cfgs[name] = cfg(file=str(weights_path(name)), notes=notes, **fields)
        if f"{model}.mnist" not in names:
            cfgs[f"{model}.untrained*"] = cfg()  # timm: the default, whatever stands before it
    return cfgs


def _fields(entry: dict[str, Any]) -> dict[str, Any]:
    """Fields of timm's PretrainedCfg; it has none for a hash or an accuracy, which go into its notes."""
    notes = (f"sha256 {entry['sha256']}", f"test top1 {entry['top1']:.4f}", f"recipe {entry['recipe']}")
    return {
        "num_classes": entry["num_classes"],
        "input_size": tuple(entry["input_size"]),
        "pool_size": tuple(entry["pool_size"]),
        **{key: tuple(entry[key]) for key in ("mean", "std") if key in entry},
        "label_names": tuple(entry["label_names"]),
        "license": entry["license"],
        "description": entry["description"],
        "notes": notes,
    }


def no_weights_for(name: str, known: Sequence[str]) -> str:
    """Say that no weights are shipped for a name, and which of the known ones may have been meant."""
    own = [weights for weights in known if weights.partition(".")[0] == name]
    if own:
        return f"no weights are shipped for {name!r} alone, did you mean {own[0]!r}?"
    return f"no weights are shipped for {name!r} (there are: {', '.join(known) or 'none yet'}): use others, or none"


def image_statistics(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by which the images of a model are normalised, from its `pretrained_cfg`.

    One number a channel, or one for all; a model without a `pretrained_cfg` takes pixels in [0, 1] as they are.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return tuple(cfg.get("mean") or (0.0,)), tuple(cfg.get("std") or (1.0,))


def check_source(
    variant: str, pretrained_cfg: Any = None, pretrained_cfg_overlay: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Check where timm is about to take weights from: a safetensors file, whole if capszoo shipped it.

    timm reads pickles too. Its loader forbids them to run code, but that is one bug of torch away, and none of this
    zoo's weights are pickles.

    Args:
        variant: Name of the model.
        pretrained_cfg: As timm gives it to an entrypoint: a tag, a configuration or None.
        pretrained_cfg_overlay: Fields that take the place of the configuration's.

    Returns:
        The overlay to give to timm.

    Raises:
        ValueError: If the weights are not a safetensors file, or shipped and damaged.
    """
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    overlay = dict(pretrained_cfg_overlay or {})
    remedy = "use a safetensors file, as capszoo, timm's save_for_hf(safe_serialization=True) and safetensors write it"
    # In timm's order.
    if cfg.source == "hf-hub" or (cfg.source != "local-dir" and not (cfg.state_dict or cfg.file) and cfg.hf_hub_id):
        # Named, the file is the one that is read; otherwise a pickle takes the place of a missing one.
        name = cfg.hf_hub_filename or "model.safetensors"
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(f"weights {name!r} on the hub are no safetensors file: {remedy}")
        return {**overlay, "hf_hub_filename": name, "custom_load": False}
    if cfg.source == "local-dir":
        folder = Path(cfg.file or "")
        if not (folder / "model.safetensors").is_file():
            for path in sorted(folder.glob("*")):
                if path.name.endswith((".bin", ".pth", ".pth.tar")):
                    raise ValueError(f"{str(path)!r} is a pickle, which may run code: {remedy}")
    elif not cfg.state_dict:  # tensors in hand come before any file
        if cfg.file:
            if cfg.custom_load or not str(cfg.file).endswith(".safetensors"):
                raise ValueError(f"{str(cfg.file)!r} is no safetensors file: {remedy}")
            check_shipped(variant, pretrained_cfg, pretrained_cfg_overlay)
            if overlay.get("file"):  # which the tag's configuration says nothing of
                overlay = {**overlay_of_file(cfg.file, read_metadata(cfg.file)), **overlay}
        elif cfg.url:
            raise ValueError(f"{str(cfg.url)!r} would be read as a pickle, which may run code: {remedy}")
    return overlay


def check_shipped(
    variant: str, pretrained_cfg: Any = None, pretrained_cfg_overlay: dict[str, Any] | None = None
) -> None:
    """Check the sha256 of the file that timm is about to load, if capszoo shipped it.

    Args:
        variant: Name of the model.
        pretrained_cfg: As timm gives it to an entrypoint: a tag, a configuration or None.
        pretrained_cfg_overlay: Fields that take the place of the configuration's.

    Raises:
        ValueError: If the file is missing, damaged, or holds other weights than its name says.
    """
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    if not cfg.file or cfg.state_dict:  # tensors in hand come before any file
        return
    path = Path(cfg.file)
    name = path.name.removesuffix(".safetensors")
    if path.absolute() != weights_path(name).absolute():
        return
    table = read_table()
    if name not in table:
        if not path.is_file():
            raise ValueError(f"the shipped weights {name!r} are missing ({str(path)!r}): install capszoo anew")
        return
    expected, found = table[name]["sha256"], sha256_of(path)
    if found == expected:
        return
    owner = next((other for other, entry in table.items() if entry["sha256"] == found), None)
    if owner is not None:
        raise ValueError(f"{str(path)!r} holds the weights {owner!r} instead of {name!r}: install capszoo anew")
    raise ValueError(
        f"the shipped weights {name!r} are damaged: {str(path)!r} has sha256 {found[:16]}..., not {expected[:16]}...: "
        f"install capszoo anew"
    )
