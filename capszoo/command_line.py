"""What the recipes' command lines have in common: options with near matches, YAML, errors in one line."""

import argparse
import contextlib
import csv
import difflib
import errno
import itertools
import json
import math
import os
import platform
import reprlib
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from .checkpoint import WriteError, write_atomically
from .data import list_datasets
from .engine import write_csv
from .policies import Policy, create_policy, list_policies, policy_options

__all__ = [
    "OptionParser",
    "SizeAction",
    "StopSignal",
    "UsageError",
    "add_policy_options",
    "add_result",
    "changed_options",
    "check_folder",
    "check_kinds",
    "check_ranges",
    "check_results",
    "choose_device",
    "create_optimizer",
    "device_name",
    "format_error",
    "hold_folder",
    "key_value",
    "parse_resumable",
    "policy_from",
    "read_json",
    "read_rows",
    "read_yaml",
    "results_folder",
    "run",
    "start_folder",
    "unknown_name",
]


# Parsing that much takes some seconds.
_LONGEST_YAML = 1 << 17
_DEEPEST_YAML = 20
_FULL = (errno.ENOSPC, errno.EPIPE, errno.EDQUOT, errno.EFBIG)
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("micro_batch", "eval_batch_size", "grace"), ("1 or more, below 2^31", lambda value: 1 <= value < 2**31)
    ),
    **dict.fromkeys(("epochs", "seeds", "trials"), ("1 to 1,000,000", lambda value: 1 <= value <= 1_000_000)),
    **dict.fromkeys(("workers", "save_every", "translate"), ("0 or more", lambda value: value >= 0)),
    "seed": ("0 to 2^63 - 1", lambda value: 0 <= value < 2**63),
    **dict.fromkeys(("drop_rate", "momentum"), ("0 or more, below 1", lambda value: 0 <= value < 1)),
    "clip_grad": ("a number above 0", lambda value: 0 < value < math.inf),
    **dict.fromkeys(("weight_decay", "reconstruction_weight"), ("0 or more", lambda value: 0 <= value < math.inf)),
}
# What recipes write has some kilobytes.
_LONGEST_JSON = 1 << 20
# Options whose values may be paths, which have several spellings.
_PATHS = {"checkpoint", "dataset", "grid", "output", "weights"}


class UsageError(ValueError):
    """A command line or configuration that cannot be run; the message names the value and the remedy."""


class OptionParser(argparse.ArgumentParser):
    """argparse with one line per error, near matches for unknown options, and defaults from YAML files."""

    def __init__(self, *args: Any, **kwargs: Any):
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
            values = read_yaml(config)
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
                raise UsageError(f"{source}: {key}: {format_error(error)}") from None

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


def unknown_name(kind: str, name: str, known: list[str], otherwise: str) -> str:
    """Say that `name` is unknown, with the nearest known one."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown {kind} {name!r}, " + (f"did you mean {near[0]!r}?" if near else otherwise)


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
            values = _parse_yaml(file.read(_LONGEST_YAML + 1))
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(path)!r} is no YAML file ({format_error(error)})") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{str(path)!r} must hold lines of the form 'option: value'")
    return values


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
        raise UsageError(f"{str(path)!r} is damaged ({format_error(error)}): {remedy}") from None
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


def _parse_yaml(text: str) -> Any:
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
        raise ValueError(format_error(error)) from None


def key_value(text: str) -> tuple[str, Any]:
    """Read `name=value`, the value as YAML reads it (numbers, true, false, lists, else text)."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    try:
        return name, _parse_yaml(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"the value of {name}= is no YAML ({error})") from None


def choose_device(name: str) -> torch.device:
    """Turn 'auto' or a device's name into a device that is there.

    Raises:
        UsageError: If it is not.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        float(torch.zeros((), device=device))  # there is something to compute with
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used ({format_error(error)}): use --device auto or cpu") from None
    return device


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor, for tables of results."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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


def policy_from(args: argparse.Namespace, num_images: int) -> Policy:
    """Make the policy of --policy and its options; fill in those whose defaults depend on it or on the data set."""
    if args.batch_size is None:  # of few images there are few steps
        args.batch_size = 128 if num_images >= 10_000 else 16 if num_images >= 1000 else 8
    # The first steps of Adam at batch 1 follow single images, see warmup_steps in capszoo.policies.
    if args.warmup_steps is None and args.policy in ("ada_batch", "warm_ada_batch"):
        args.warmup_steps = 1000
    names = {name for policy in list_policies() for name in policy_options(policy)}
    options = {name: value for name in sorted(names) if (value := getattr(args, name, None)) is not None}
    return create_policy(
        args.policy, lr=args.lr, batch_size=args.batch_size, epochs=args.epochs, num_images=num_images, **options
    )


def parse_resumable(
    build_parser: Callable[[], OptionParser], may_change: set[str], argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Read the options of a recipe that writes run folders; with --resume, those of the run.

    Args:
        build_parser: Makes the recipe's parser.
        may_change: Names of the options that may differ when a run is resumed.
        argv: The command line.

    Raises:
        UsageError: If the folder is no run folder, or an option is given that cannot change.
    """
    parser = build_parser()
    args, given = parser.parse(argv)
    if not args.resume:
        return args
    folder = Path(args.resume)
    saved = folder / "args.yaml"
    if not saved.is_file():
        raise UsageError(f"--resume {args.resume!r} is no run folder (it has no args.yaml): check the path")
    resumed, _ = build_parser().parse([f"--config={saved}"])
    resumed.output = str(folder)
    changed = changed_options(args, resumed, given - may_change - {"config"})
    if changed:
        absent = f"no {parser.words(changed[0], True)[0]}"
        values = [getattr(options, changed[0]) for options in (args, resumed)]
        ours, theirs = (" ".join(parser.words(changed[0], value)) or absent for value in values)
        raise UsageError(
            f"{ours} cannot change when a run is resumed: the run has {theirs}; leave it out, or start a new run "
            f"with --output"
        )
    for name in given & may_change:
        setattr(resumed, name, getattr(args, name))
    return resumed


def changed_options(args: argparse.Namespace, saved: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Compare the options of a command with those of a run; one that has no value is not given.

    Args:
        args: The options of the command.
        saved: Those of the run, whose defaults are filled in.
        names: The options to compare.

    Returns:
        The names of those that differ.
    """
    return [
        name
        for name in sorted(names)
        if getattr(args, name) is not None and not _is_same(name, getattr(args, name), getattr(saved, name))
    ]


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


def create_optimizer(args: argparse.Namespace, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of --opt, --lr, --weight-decay and, where the recipe has it, --momentum.

    Raises:
        UsageError: If there is no such optimizer, or it does not take these options.
    """
    from timm.optim import create_optimizer_v2, list_optimizers

    if args.opt not in list_optimizers():
        raise UsageError(f"unknown optimizer {args.opt!r}: see timm.optim.list_optimizers()")
    extra: dict[str, Any] = {"fused": True} if args.opt in ("adam", "adamw") else {}
    extra.update({"momentum": args.momentum} if "momentum" in args else {})
    try:
        optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay, **extra)
    except (ImportError, AssertionError, TypeError, ValueError) as error:
        raise UsageError(f"optimizer {args.opt!r} cannot be made: {error}") from None
    if getattr(optimizer, "is_second_order", False):
        # timm has one such, Adahessian, whose generator is not in its state_dict.
        raise UsageError(
            f"optimizer {args.opt!r} draws random numbers that no checkpoint holds, so that no run can be resumed: "
            f"use adam, or a loop of your own with backward(create_graph=True)"
        )
    return optimizer


def check_ranges(args: argparse.Namespace) -> None:
    """Check the numbers that options of training give, of those that a recipe has.

    Raises:
        UsageError: If one is out of range.
    """
    for name, (what, right) in _RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not right(value):
            raise UsageError(f"--{name.replace('_', '-')} {value} is out of range: give {what}")


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """0 after SIGTERM, by which a scheduler asks for an orderly end; 130 after Ctrl-C, as shells count it."""
        return 0 if self.received == signal.SIGTERM else 130


def start_folder(folder: Path, text: str) -> None:
    """Make the folder of a run with its args.yaml, from which --resume goes on, or leave nothing behind.

    Several processes may do so at once, as those that share an exploration do; see `hold_folder` for one that is alone.

    Raises:
        UsageError: If the folder cannot be made.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "args.yaml", lambda temporary: temporary.write_text(text))
    except (OSError, WriteError) as error:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, WriteError):
            raise
        raise _cannot_be_made(folder, error) from None


def check_folder(folder: Path) -> None:
    """Refuse a folder that has files other than what a killed run left half-written.

    Raises:
        UsageError: If it has, or has a name that the first line of args.yaml cannot hold.
    """
    _check_name(folder)
    if folder.exists() and (not folder.is_dir() or any(path.suffix != ".tmp" for path in folder.iterdir())):
        raise UsageError(f"run folder {str(folder)!r} is not empty: use --resume, or choose another --output")


def _check_name(folder: Path) -> None:
    if not str(folder).isprintable():
        raise UsageError(f"run folder {str(folder)!r} has characters that cannot be shown: choose another --output")


def _cannot_be_made(folder: Path, error: OSError) -> UsageError:
    return UsageError(f"run folder {str(folder)!r} cannot be made ({error.strerror}): choose another --output")


def default_folder(*parts: str) -> Path:
    """Name the folder of a run that the user gave no --output for, after what it is about and when it began."""
    name = "-".join([*parts, time.strftime("%Y%m%d-%H%M%S")])
    return Path("runs") / "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def make_default_folder(name: Path) -> Path:
    """Make a folder whose name the user did not choose: NAME, or NAME-1, NAME-2 and so on where another run has it.

    Raises:
        UsageError: If it cannot be made.
    """
    folder, numbers = name, itertools.count(1)
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            folder = name.with_name(f"{name.name}-{next(numbers)}")
        except OSError as error:
            raise _cannot_be_made(folder, error) from None


@contextlib.contextmanager
def hold_folder(folder: Path, text: Callable[[Path], str] | None, is_default: bool = False) -> Iterator[Path]:
    """Hold the folder of a run, so that no other process on this machine trains in it meanwhile.

    Args:
        folder: The folder.
        text: Given the folder, the args.yaml of a new run; None goes on with a run that is there.
        is_default: The user did not choose the folder: see `make_default_folder`.

    Yields:
        The folder.

    Raises:
        UsageError: If the folder cannot be made, has files of another run, or another process trains in it.
    """
    made = text is not None and (is_default or not folder.exists())
    if is_default and text is not None:
        folder = make_default_folder(folder)
    elif text is not None:
        _check_name(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            check_folder(folder)  # it is a file
            raise
        except OSError as error:
            raise _cannot_be_made(folder, error) from None
    try:
        # Processes that read images hold what their parent held, and see its end some seconds later.
        lock = _lock(folder, seconds=15 if text is None else 0)
        try:
            if text is not None:
                check_folder(folder)
                start_folder(folder, text(folder))
            made = False
            yield folder
        finally:
            if lock is not None:
                os.close(lock)
    finally:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _lock(folder: Path, seconds: float) -> int | None:
    """Lock a folder; None where its file system or the system has no locks. Leaves nothing in it."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(0.1)
                continue
            os.close(descriptor)
            raise UsageError(
                f"another process trains in {str(folder)!r}: wait for its end, or choose another --output"
            ) from None
        except OSError:
            os.close(descriptor)
            return None


def add_result(path: Path, result: dict[str, Any], launch: str, argv: Sequence[str] | None) -> None:
    """Add a row with a result, the date and the command that made it to a table of results."""
    command = shlex.join([*launch.split(), *(sys.argv[1:] if argv is None else argv)])
    row = {**result, "date": time.strftime("%Y-%m-%d"), "command": command}
    rows = read_rows(path, "mend or delete it") if path.exists() else []
    check_results(path)
    write_csv(path, list({key: None for any_row in (*rows, row) for key in any_row}), [*rows, row])


def check_results(path: Path) -> None:
    """Make the folder of a table of results, and check that the table can be added to.

    Raises:
        UsageError: If it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"no table can be made at {str(path)!r} ({error.strerror}): give another --results") from None
    if path.exists():
        read_rows(path, "mend or delete it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{str(path)!r} cannot be written: give another --results")


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
        raise UsageError(f"{str(path)!r} is no table of results ({format_error(error)}): {remedy}") from None
    return rows


def results_folder() -> Path:
    """Where tables of results go: recipes/results of a clone, or results in the working folder where there is none."""
    of_clone = Path(__file__).resolve().parents[1] / "recipes" / "results"
    return of_clone if of_clone.is_dir() else Path("results")


def format_error(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a recipe: an error that its user can mend becomes one line and exit code 2, anything else a traceback."""
    try:
        code = main() or 0
    except ValueError as error:
        # All errors for users are ValueErrors with a message of one line; a bug's ValueError keeps its traceback.
        if not type(error).__module__.startswith("capszoo") and not _raised_by_us(error):
            raise
        print(f"error: {format_error(error)}", file=sys.stderr)
        code = 2
    except OSError as error:
        # Of a write to what print() writes to, and not of a file that was opened by its name.
        if error.errno not in _FULL or error.filename is not None:
            raise
        print(f"error: the output cannot be written ({error.strerror}): write it elsewhere", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again at its end
        code = 2
    sys.exit(code)


def _raised_by_us(error: BaseException) -> bool:
    """Whether the `raise` stands in a file of capszoo."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("capszoo")
