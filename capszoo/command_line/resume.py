"""Options of a run that goes on."""

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from capszoo.data import list_datasets
from capszoo.errors import UsageError

from .parser import OptionParser

# Options whose values may be paths, which have several spellings.
_PATHS = {"checkpoint", "dataset", "grid", "output", "weights"}


def parse_resumable(
    build_parser: Callable[[], OptionParser], may_change: set[str], argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Read the options of a recipe that writes run folders; with --resume, those of the run.

    Args:
        build_parser: Makes the recipe's parser.
        may_change: Names of the options that may differ when a run is resumed.
        argv: The command line.

    Raises:
        UsageError: If the folder is not a run folder, or an option is given that cannot change.
    """
    parser = build_parser()
    args, given = parser.parse(argv)
    if args.resume == "":
        raise UsageError("--resume is empty: give a run folder, or leave it out")
    if not args.resume:
        return args
    folder = Path(args.resume)
    saved = folder / "args.yaml"
    if not saved.is_file():
        raise UsageError(f"--resume {args.resume!r} is no run folder (it has no args.yaml): check the path")
    found, _ = build_parser().parse([f"--config={saved}"])
    resumed = {**vars(found), "output": str(folder)}
    if "dataset" in given and _has_moved(resumed.get("dataset"), args.dataset):
        may_change = may_change | {"dataset"}
    changed = changed_options(vars(args), resumed, given - may_change - {"config"})
    if changed:
        absent = f"no {parser.words(changed[0], True)[0]}"
        values = [options[changed[0]] for options in (vars(args), resumed)]
        ours, theirs = (" ".join(parser.words(changed[0], value)) or absent for value in values)
        raise UsageError(
            f"{ours} cannot change when a run is resumed: the run has {theirs}; leave it out, or start a new run "
            f"with --output"
        )
    return argparse.Namespace(**{**resumed, **{name: getattr(args, name) for name in given & may_change}})


def changed_options(values: Mapping[str, Any], saved: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Compare the options of a command with those of a run; one that has no value is not given.

    Args:
        values: The options of the command, by name.
        saved: Those of the run, whose defaults are filled in.
        names: The options to compare.

    Returns:
        The names of those that differ.
    """
    return [
        name for name in sorted(names) if values[name] is not None and not _is_same(name, values[name], saved[name])
    ]


def _has_moved(before: str | None, now: str) -> bool:
    """Whether an image folder is not where it was, and another is named in its place."""
    if before is None or before in list_datasets() or now in list_datasets():
        return False
    return not os.path.exists(before) and os.path.isdir(now)


def _is_same(name: str, value: Any, other: Any) -> bool:
    if isinstance(value, list) and isinstance(other, list):
        if any(isinstance(item, tuple) for item in value + other):  # of key_value
            return dict(value) == dict(other)
        return len(value) == len(other) and all(_is_same(name, *pair) for pair in zip(value, other, strict=True))
    if value == other or name not in _PATHS or not isinstance(other, str):
        return value == other
    if name == "dataset" and not {value, other}.isdisjoint(list_datasets()):  # a folder may have this name too
        return False
    try:
        return os.path.samefile(value, other)
    except (OSError, ValueError):  # not there any more
        return os.path.abspath(value) == os.path.abspath(other)
