"""What recipes print and write, and how they end."""

import errno
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console

from capszoo.errors import UsageError, first_line
from capszoo.files import read_rows, write_csv

_FULL = (errno.ENOSPC, errno.EPIPE, errno.EDQUOT, errno.EFBIG)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a recipe: an error that its user can mend becomes one line and exit code 2, anything else a traceback."""
    try:
        code = main() or 0
    except ValueError as error:
        # All errors for users are ValueErrors with a message of one line; a bug's ValueError keeps its traceback.
        if not type(error).__module__.startswith("capszoo") and not _raised_by_us(error):
            raise
        print(f"error: {first_line(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print(
            f"error: out of memory ({first_line(error)}): give smaller batches (--micro-batch, --batch-size), a "
            "smaller --img-size, or a smaller model",
            file=sys.stderr,
        )
        code = 2
    except PermissionError as error:
        if error.filename is None:
            raise
        print(
            f"error: {str(error.filename)!r}: {error.strerror}: mend its permissions, or choose another",
            file=sys.stderr,
        )
        code = 2
    except OSError as error:
        # Of a write to what print() writes to, and not of a file that was opened by its name.
        if error.errno not in _FULL or error.filename is not None:
            raise
        print(f"error: the output cannot be written ({error.strerror}): write it elsewhere", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again at its end
        code = 2
    sys.exit(code)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is short, of which PyTorch's allocator for CPUs says so in its message alone."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _raised_by_us(error: BaseException) -> bool:
    """Whether the `raise` stands in a file of capszoo."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("capszoo")


def make_console(quiet: bool = False, width: int | None = None) -> Console:
    """Make a console that prints text as it is: no markup, no `:names:` of emoji, and no line is broken.

    Args:
        quiet: Print nothing.
        width: Columns that tables get; None for the terminal's.
    """
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True, quiet=quiet, width=width)


def make_table_console() -> Console:
    """Make a console for tables, which are cut at the edge of a terminal alone: what reads a pipe takes any width."""
    return make_console(width=None if sys.stdout.isatty() else 1000)


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


def results_folder() -> Path:
    """Where tables of results go: recipes/results of a clone, or results in the working folder where there is none."""
    of_clone = Path(__file__).resolve().parents[1] / "recipes" / "results"
    return of_clone if of_clone.is_dir() else Path("results")
