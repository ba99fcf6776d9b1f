"""Command lines with one line per error, near matches for unknown options, and defaults from YAML files."""

import argparse
import json
import reprlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from capszoo.errors import UsageError, first_line, unknown_name
from capszoo.files import parse_yaml, read_yaml
from capszoo.policies import policy_options


class OptionParser(argparse.ArgumentParser):
    """argparse with one line per error, near matches for unknown options, and defaults from YAML files."""

    def __init__(self, *args: Any, old_keys: Mapping[str, str] | None = None, **kwargs: Any):
        """Arguments as of `argparse.ArgumentParser`; `old_keys` are earlier names of options in YAML files."""
        self.old_keys = dict(old_keys or {})
        # Abbreviations would hide typos in scripts.
        kwargs.update(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    @property
    def destinations(self) -> dict[str, argparse.Action]:
        """Options by the name of their value, as YAML files write them."""
        return {action.dest: action for action in self._actions if action.dest != "help"}

    def parse(self, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
        """Parse a command line; where it has `--config FILE`, that file's values become the defaults.

        Returns:
            The values of all options, and the names of those that the command line or the file gave.

        Raises:
            UsageError: For an unknown option or key, or a value of the wrong kind.
        """
        argv = sys.argv[1:] if argv is None else list(argv)
        given = self._given(argv)
        config = getattr(given, "config", None)
        if config:
            values = {self.old_keys.get(key, key): value for key, value in read_yaml(config).items()}
            self.set_values(values, config)
            for key, value in values.items():
                if value is not None:
                    setattr(given, key, True)
        return self.parse_args(argv), set(vars(given))

    def set_values(self, values: Mapping[str, Any], source: str | Path) -> None:
        """Make values, as YAML files hold them, the defaults; null leaves the default as it is.

        Args:
            values: Values by the name of their option.
            source: Where they come from, for errors.

        Raises:
            UsageError: For an unknown option, or a value of the wrong kind.
        """
        for key, value in values.items():
            try:
                if value is None:
                    self._find(key, source)
                else:
                    self.set_defaults(**{key: self._convert(key, value, source)})
            except UsageError:
                raise
            except ValueError as error:  # Python writes out no integer of thousands of digits
                raise UsageError(f"{source}: {key}: {first_line(error)}") from None

    def _given(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse into a namespace that has just the options on the command line."""
        kept = {action: action.default for action in self._actions}
        required = {action: action.required for action in self._actions}
        for action in self._actions:
            action.default = argparse.SUPPRESS
        try:
            given, unknown = self.parse_known_args(argv)
        finally:
            for action, default in kept.items():
                action.default, action.required = default, required[action]
        for argument in unknown:
            options = [option for action in self._actions for option in action.option_strings]
            raise UsageError(unknown_name("option", argument.split("=")[0], options, "see --help"))
        return given

    def words(self, key: str, value: Any) -> list[str]:
        """The words of a command line that give an option this value; none where that takes leaving it out."""
        action = self.destinations[key]
        name, *others = action.option_strings or [f"the {key}"]
        if isinstance(value, bool):
            return [name] if value else others[-1:]
        if action.type is key_value and value:
            value = [f"{k}={json.dumps(v, default=str, skipkeys=True)}" for k, v in dict(value).items()]
        items = value if isinstance(value, list) else [] if value is None else [value]
        return [name, *map(str, items)] if items else []

    def _find(self, key: str, source: str | Path) -> argparse.Action:
        actions = self.destinations
        if key not in actions or key == "config":
            raise UsageError(f"{source}: " + unknown_name("key", key, list(actions), "see --help"))
        return actions[key]

    def _convert(self, key: str, value: Any, source: str | Path) -> Any:
        """Check a value of a YAML file as if it came from the command line."""
        action = self._find(key, source)
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise UsageError(f"{source}: {key} must be true or false, not {value!r}")
            return value
        takes_list = action.nargs in ("*", "+")
        if isinstance(value, (list, tuple, dict)) and not takes_list:
            raise UsageError(f"{source}: {key} takes one value, not {reprlib.repr(value)}")
        items = value if isinstance(value, (list, tuple)) else [value]
        holder = argparse.Namespace()
        try:
            if isinstance(value, dict) and action.type is key_value:
                names = [self._get_value(action, f"{name}=")[0] for name in value]
                plain = json.loads(json.dumps(list(value.values()), default=str, skipkeys=True))
                items = list(zip(names, plain, strict=True))
            else:
                items = [self._get_value(action, str(item)) for item in items]
                for item in items:
                    self._check_value(action, item)
            action(self, holder, items if takes_list else items[0])
        except argparse.ArgumentError as error:
            raise UsageError(f"{source}: {key}: {error.message}") from None
        return getattr(holder, key)


class SizeAction(argparse.Action):
    """The size of images: one number of pixels, or height and width. Of a square it is one number in any case."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, dest, nargs="+", metavar=("HEIGHT", "WIDTH"), **kwargs)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        size = [int(text) for text in values if text.isdecimal() and len(text) < 10]
        if not 1 <= len(size) == len(values) <= 2:
            text = reprlib.repr(" ".join(values))
            raise argparse.ArgumentError(
                self, f"{text} is no size: give one number, or height and width such as 20 32 (in YAML [20, 32])"
            )
        setattr(namespace, self.dest, size[0] if size[0] == size[-1] else size)


def key_value(text: str) -> tuple[str, Any]:
    """Read `name=value`, the value as YAML reads it (numbers, true, false, lists, else text)."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    try:
        return name, parse_yaml(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"the value of {name}= is no YAML ({error})") from None


def add_policy_options(parser: argparse.ArgumentParser, policies: Sequence[str]) -> None:
    """Give a recipe an option for every option of these policies, None where it is not given."""
    add = parser.add_argument_group("policy options (default: the policy's own)").add_argument
    takers: dict[str, list[str]] = {}
    for policy in policies:
        for name in policy_options(policy):
            takers.setdefault(name, []).append(policy)
    for name, names in takers.items():
        default, text = policy_options(names[0])[name]
        # Rates such as "10x" and a cycle of None ("auto") are text that the policy reads.
        kind: dict[str, Any] = {"type": str if default is None or isinstance(default, str) else type(default)}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        text = text.replace("%", "%%")
        add("--" + name.replace("_", "-"), dest=name, default=None, help=f"{', '.join(names)}: {text}", **kind)
