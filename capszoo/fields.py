"""Options as fields of dataclasses: what they take, what their help says, and their values from words and from YAML.

A field made by :func:`option` carries an :class:`Option` in its metadata. Command lines make their options and help
from it, and values of YAML files and of Python are read by it as words of a command line are.
"""

import json
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from .errors import UsageError, first_line, unknown_name
from .files import parse_yaml

__all__ = [
    "Option",
    "OptionError",
    "Range",
    "check_needs",
    "option",
    "options_of",
    "read_pair",
    "read_size",
    "read_values",
    "words",
]


class OptionError(ValueError):
    """A word that an option does not take; the message is for people."""


class Range(NamedTuple):
    """What numbers an option takes, in words and as a test."""

    text: str
    holds: Callable[[Any], bool]


POSITIVE = Range("1 or more, below 2^31", lambda value: 1 <= value < 2**31)
NOT_NEGATIVE = Range("0 or more", lambda value: 0 <= value < math.inf)
BELOW_1 = Range("0 or more, below 1", lambda value: 0 <= value < 1)
MILLION = Range("1 to 1,000,000", lambda value: 1 <= value <= 1_000_000)


@dataclass(frozen=True, kw_only=True)
class Option:
    """What an option takes, and what its help says.

    Attributes:
        help: Its text in `--help`.
        group: Heading in `--help` under which it stands.
        read: Turns a word into a value; raises ValueError, an :class:`OptionError` where its message says it all.
        many: '+' or '*' where it takes a list of words, of at least one or of any number.
        join: Turns the list of words into one value, instead of `read`.
        choices: The values that it may have; empty for all.
        within: The numbers that it may have.
        needs: Options of which one must be given, as it only says how they are done; empty if it stands for itself.
        flag: It is true or false, and takes no word.
        negatable: The flag also has a form that starts with `--no-`.
        positional: It stands on the command line without a name.
        metavar: What help calls its words.
        saved: It belongs to the run, and not to one call of the recipe.
        may_change: It may change when a run is resumed.
    """

    help: str = ""
    group: str = ""
    read: Callable[[str], Any] = str
    many: str = ""
    join: Callable[[Sequence[str]], Any] | None = None
    choices: tuple[Any, ...] = ()
    within: Range | None = None
    needs: tuple[str, ...] = ()
    flag: bool = False
    negatable: bool = False
    positional: bool = False
    metavar: str | tuple[str, ...] | None = None
    saved: bool = True
    may_change: bool = False


CONFIG = Option(
    help="take options from a YAML file of 'option: value' lines", group="what", metavar="FILE.yaml", saved=False
)


def option(default: Any, help: str, group: str, **more: Any) -> Any:
    """A field of a dataclass of options.

    Args:
        default: Its default; a list or dict is copied for each instance.
        help: Its text in `--help`.
        group: Heading under which it stands there.
        **more: More of an :class:`Option`.
    """
    metadata = {"option": Option(help=help, group=group, **more)}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def options_of(options: Any) -> dict[str, Option]:
    """The options of a dataclass by name, in their order."""
    return {field.name: field.metadata["option"] for field in fields(options) if "option" in field.metadata}


def check_needs(options: Any) -> None:
    """Check that no option is given that has no effect, as none of those is given that it needs.

    Args:
        options: A dataclass of options.

    Raises:
        UsageError: If one is.
    """
    defaults = {field.name: field.default for field in fields(options)}
    for name, what in options_of(options).items():
        value = getattr(options, name)
        if what.needs and value != defaults[name] and not any(getattr(options, other) for other in what.needs):
            others = " or ".join(f"--{other.replace('_', '-')}" for other in what.needs)
            given = " ".join(words(name, value, what))
            raise UsageError(f"{given} has no effect without {others}: give one, or leave it out")


def read_values(values: Mapping[str, Any], options: Mapping[str, Option], source: Any) -> dict[str, Any]:
    """Check values of a YAML file or of Python as if they came from a command line.

    Args:
        values: Values by the name of their option; None for those that are not given.
        options: What the options take, by name.
        source: Where the values come from, for errors.

    Returns:
        The values that are given.

    Raises:
        UsageError: For an unknown name, or a value that its option does not take.
    """
    found = {}
    for name, value in values.items():
        try:
            if name not in options or name == "config":
                raise UsageError(f"{source}: " + unknown_name("key", name, list(options), "see --help"))
            if value is not None:
                found[name] = _convert(name, value, options[name], source)
        except UsageError:
            raise
        except ValueError as error:  # also of Python, which writes out no integer of thousands of digits
            raise UsageError(f"{source}: {name}: {first_line(error)}") from None
    return found


def _convert(name: str, value: Any, option: Option, source: Any) -> Any:
    if option.flag:
        if not isinstance(value, bool):
            raise UsageError(f"{source}: {name} must be true or false, not {value!r}")
        return value
    if isinstance(value, (list, tuple, dict)) and not option.many:
        raise UsageError(f"{source}: {name} takes one value, not {reprlib.repr(value)}")
    if isinstance(value, dict) and option.read is read_pair:
        names = [read_pair(f"{key}=")[0] for key in value]
        plain = json.loads(json.dumps(list(value.values()), default=str, skipkeys=True))
        return list(zip(names, plain, strict=True))
    return _read(value if isinstance(value, (list, tuple)) else [value], option)


def _read(values: Sequence[Any], option: Option) -> Any:
    texts = [str(value) for value in values]
    if option.join is not None:
        return option.join(texts)
    items = []
    for text in texts:
        try:
            items.append(option.read(text))
        except OptionError:
            raise
        except (TypeError, ValueError):
            kind = getattr(option.read, "__name__", repr(option.read))
            raise OptionError(f"invalid {kind} value: {text!r}") from None
    for item in items:
        if option.choices and item not in option.choices:
            raise OptionError(f"invalid choice: {item!r} (choose from {', '.join(map(repr, option.choices))})")
    return items if option.many else items[0]


def words(name: str, value: Any, option: Option) -> list[str]:
    """The words of a command line that give an option this value; none where that takes leaving it out."""
    dashed = name.replace("_", "-")
    first = f"the {name}" if option.positional else f"--{dashed}"
    if isinstance(value, bool):
        return [first] if value else [f"--no-{dashed}"] if option.negatable else []
    if option.read is read_pair and value:
        value = [f"{k}={json.dumps(v, default=str, skipkeys=True)}" for k, v in dict(value).items()]
    items = value if isinstance(value, list) else [] if value is None else [value]
    return [first, *map(str, items)] if items else []


def read_pair(text: str) -> tuple[str, Any]:
    """Read `name=value`, the value as YAML reads it (numbers, true, false, lists, else text)."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise OptionError(f"{text!r} is not of the form name=value")
    try:
        return name, parse_yaml(value)
    except ValueError as error:
        raise OptionError(f"the value of {name}= is no YAML ({error})") from None


def read_size(texts: Sequence[str]) -> int | list[int]:
    """Read the size of images: one number of pixels, or height and width. Of a square it is one number in any case."""
    size = [int(text) for text in texts if text.isdecimal() and len(text) < 10]
    if not 1 <= len(size) == len(texts) <= 2:
        text = reprlib.repr(" ".join(texts))
        raise OptionError(f"{text} is no size: give one number, or height and width such as 20 32 (in YAML [20, 32])")
    return size[0] if size[0] == size[-1] else size
