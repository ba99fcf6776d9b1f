"""Files of people and recipes: written whole or not at all, read with one line about what is wrong."""

import contextlib
import csv
import io
import json
import math
import os
import reprlib
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import UsageError, WriteError, first_line

# Parsing that much takes some seconds.
_LONGEST_YAML = 1 << 17
_DEEPEST_YAML = 20
# What recipes write has some kilobytes.
_LONGEST_JSON = 1 << 20


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
        with open(temporary, "wb"):  # with the permissions that the user's umask gives
            permissions = temporary.stat().st_mode
        write(temporary)
        os.chmod(temporary, permissions)  # safetensors makes a file that nobody else may read
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
        reason = getattr(error, "strerror", None) or first_line(error)
        raise WriteError(
            f"{str(path)!r} cannot be written ({reason}): free some space or mend the folder, then start "
            f"again; what was there before is kept"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_target(path: str | Path, option: str) -> None:
    """Check that a file can be written, before minutes are spent on what goes into it.

    Args:
        path: The file.
        option: What names it, for the message.

    Raises:
        UsageError: If its folder is not there, or may not be written to.
    """
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{option} {str(path)!r} is in a folder that is not there: make it first")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{option} {str(path)!r} is in a folder that may not be written to: choose another")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as CSV, atomically; None and missing values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8", newline=""))


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def yaml_text(command: Sequence[str], values: Mapping[str, Any]) -> str:
    """Options as the text of a YAML file, whose first line is the command, by its words, that takes them from there."""
    import yaml

    return f"# {shlex.join(command)}\n" + yaml.safe_dump(dict(values), sort_keys=False)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a flat YAML file.

    Raises:
        UsageError: If there is no such file, or it is not a flat mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no configuration file at {str(path)!r}: check the path")
    try:
        with open(path, encoding="utf-8") as file:
            values = parse_yaml(file.read(_LONGEST_YAML + 1))
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(path)!r} is no YAML file ({first_line(error)})") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{str(path)!r} must hold lines of the form 'option: value'")
    return values


def parse_yaml(text: str) -> Any:
    """Read YAML of plain values, without aliases: nested, a few lines of them stand for gigabytes.

    Raises:
        ValueError: If it is no YAML, or longer than any configuration.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it has an alias (*name): write the value out")
            if self.depth == _DEEPEST_YAML:  # PyYAML takes seconds to run out of stack
                raise ValueError("it is nested too deeply")
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    if len(text) > _LONGEST_YAML:
        raise ValueError(f"it is longer than {_LONGEST_YAML:,} characters")
    try:
        return yaml.load(text, Loader)
    except Exception as error:  # values such as `!!timestamp x` or the date 2001-13-01 raise anything
        raise ValueError(first_line(error)) from None


def read_json(path: str | Path, kinds: Mapping[str, Any], remedy: str) -> dict[str, Any]:
    """Read a JSON file that a recipe wrote into its run folder.

    Args:
        path: The file.
        kinds: Types of the values by key, as `check_kinds` takes them.
        remedy: What to do if the file is damaged, the end of the message.

    Raises:
        UsageError: If there is no such file, or it does not hold such values.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_LONGEST_JSON + 1)
        if len(text) > _LONGEST_JSON:
            raise ValueError(f"longer than {_LONGEST_JSON:,} characters")
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("no mapping")
        check_kinds(values, kinds)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{str(path)!r} is damaged ({first_line(error)}): {remedy}") from None
    return values


def check_kinds(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Check the types of values from a file.

    Args:
        values: What the file holds.
        kinds: For each key a type or a tuple of types, of which `type(None)` means that the key may be missing; float
            stands for any finite number.

    Raises:
        ValueError: If a value is of another type; it names the first.
    """
    for key, kind in kinds.items():
        value, allowed = values.get(key), kind if isinstance(kind, tuple) else (kind,)
        number = float in allowed and type(value) is int and abs(value) < 2**63
        if not number and (type(value) not in allowed or (type(value) is float and not math.isfinite(value))):
            raise ValueError(f"{key} is {reprlib.repr(value)}" if key in values else f"it has no {key}")


def read_rows(path: Path, remedy: str) -> list[dict[str, str]]:
    """Read a table that a recipe wrote.

    Args:
        path: A CSV file.
        remedy: What to do if it is none, the end of the message.

    Raises:
        UsageError: If there is no such file, or it is no table.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        if any(None in row for row in rows):
            raise ValueError("rows longer than the first line")
    except (csv.Error, OSError, ValueError) as error:
        raise UsageError(f"{str(path)!r} is no table of results ({first_line(error)}): {remedy}") from None
    return rows
