"""Command lines with one line per error, near matches for unknown options, and defaults from YAML files."""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from capszoo.errors import UsageError, unknown_name
from capszoo.fields import Option, OptionError, read_pair, read_size, read_values, words
from capszoo.files import read_yaml


class _HelpFormatter(argparse.HelpFormatter):
    """With the defaults, where there is one and the text does not speak of it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default, text = action.default, action.help or ""
        if re.search(r"(^|; |\()default", text) or any(default is no for no in (None, False, argparse.SUPPRESS)):
            return text
        if isinstance(default, list | tuple):
            default = " ".join(map(str, default))
        if default == "":
            return text
        return f"{text} (default: {str(default).replace('%', '%%')})".lstrip()


class OptionParser(argparse.ArgumentParser):
    """argparse with one line per error, near matches for unknown options, and defaults from YAML files."""

    def __init__(self, *args: Any, old_keys: Mapping[str, str] | None = None, **kwargs: Any):
        """Arguments as of `argparse.ArgumentParser`; `old_keys` are earlier names of options in YAML files."""
        self.old_keys = dict(old_keys or {})
        # Abbreviations would hide typos in scripts.
        kwargs.update(allow_abbrev=False, formatter_class=_HelpFormatter)
        super().__init__(*args, **kwargs)
        self._hidden_defaults: dict[argparse.Action, Any] = {}  # of options, while those that are given are looked for

    def format_help(self) -> str:
        for action, default in self._hidden_defaults.items():
            action.default = default
        return super().format_help()

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
        return self._parse_known(argv)[0], set(vars(given))

    def set_values(self, values: Mapping[str, Any], source: str | Path) -> None:
        """Make values, as YAML files hold them, the defaults; null leaves the default as it is.

        Args:
            values: Values by the name of their option.
            source: Where they come from, for errors.

        Raises:
            UsageError: For an unknown option, or a value of the wrong kind.
        """
        options = {key: self._option(action) for key, action in self.destinations.items()}
        self.set_defaults(**read_values(values, options, source))

    def _given(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse into a namespace that has just the options on the command line."""
        kept = self._hidden_defaults = {action: action.default for action in self._actions}
        required = {action: action.required for action in self._actions}
        for action in self._actions:
            action.default = argparse.SUPPRESS
        try:
            given, unknown = self._parse_known(argv)
        finally:
            for action, default in kept.items():
                action.default, action.required = default, required[action]
            self._hidden_defaults = {}
        for argument in unknown:
            options = [option for action in self._actions for option in action.option_strings]
            if not argument.startswith("-"):
                remedy = f": did you mean --dataset {argument}?" if "--dataset" in options else ": see --help"
                raise UsageError(f"{argument!r} has no option before it{remedy}")
            raise UsageError(unknown_name("option", argument.split("=")[0], options, "see --help"))
        return given

    def _parse_known(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        # A list that may be empty is taken for empty at the first option, unless words are read after all options.
        if any(action.nargs == "*" and not action.option_strings for action in self._actions):
            return self.parse_known_intermixed_args(argv)
        return self.parse_known_args(argv)

    def words(self, key: str, value: Any) -> list[str]:
        """The words of a command line that give an option this value; none where that takes leaving it out."""
        return words(key, value, self._option(self.destinations[key]))

    def _option(self, action: argparse.Action) -> Option:
        """What an option takes, as :func:`capszoo.fields.read_values` has it."""

        def read(text: str) -> Any:
            try:
                return self._get_value(action, text)
            except argparse.ArgumentError as error:
                raise OptionError(error.message) from None

        return Option(
            read=read_pair if action.type is key_value else read,
            many=action.nargs if action.nargs in ("*", "+") else "",
            join=read_size if isinstance(action, SizeAction) else None,
            choices=tuple(action.choices or ()),
            flag=action.nargs == 0,
            negatable=isinstance(action, argparse.BooleanOptionalAction),
            positional=not action.option_strings,
        )


class SizeAction(argparse.Action):
    """The size of images: one number of pixels, or height and width. Of a square it is one number in any case."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, dest, nargs="+", metavar=("HEIGHT", "WIDTH"), **kwargs)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        try:
            setattr(namespace, self.dest, read_size(values))
        except OptionError as error:
            raise argparse.ArgumentError(self, str(error)) from None


class ExtendAction(argparse.Action):
    """Values of an option that may be given several times: each adds to those before, and the first replaces defaults.

    argparse's own `extend` adds to the defaults.
    """

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        before = getattr(namespace, self.dest, None)
        again = before is not None and before is not self.default
        setattr(namespace, self.dest, [*(before or []), *(values or [])] if again else values)


def key_value(text: str) -> tuple[str, Any]:
    """Read `name=value` for argparse, see :func:`capszoo.fields.read_pair`."""
    try:
        return read_pair(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_options(parser: argparse.ArgumentParser, options: Mapping[str, Option], defaults: Mapping[str, Any]) -> None:
    """Give a parser these options, under the headings that they name.

    Args:
        parser: The parser.
        options: What the options take, by name.
        defaults: Their defaults by name; None where it has none.
    """
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(o.group for o in options.values())}
    for name, option in options.items():
        default = defaults.get(name)
        if option.read is read_pair:
            default = list(dict(default or {}).items())
        kind: dict[str, Any] = {"help": option.help.replace("%", "%%"), "default": default}
        if option.flag:
            kind["action"] = argparse.BooleanOptionalAction if option.negatable else "store_true"
        elif option.join is read_size:
            kind["action"] = SizeAction
        else:
            kind["type"] = key_value if option.read is read_pair else None if option.read is str else option.read
            kind.update(choices=list(option.choices) or None, nargs=option.many or None, metavar=option.metavar)
            if option.read is read_pair:
                kind["action"] = ExtendAction
        if option.positional:
            groups[option.group].add_argument(name, **{**kind, "nargs": "?"})
        else:
            groups[option.group].add_argument("--" + name.replace("_", "-"), dest=name, **kind)
