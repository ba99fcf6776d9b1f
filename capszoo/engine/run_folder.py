"""The folder of a run: who may use it, and what it holds."""

import contextlib
import itertools
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from capszoo.checkpoint import read_metadata, save_weights
from capszoo.errors import CheckpointError, UnreadableError, UsageError, WriteError
from capszoo.files import read_rows, write_atomically, write_csv, write_json

from .distributed import Ranks
from .run_state import check_resume_state, load_state, save_state

_logger = logging.getLogger(__name__)

SUMMARY_COLUMNS = (
    "epoch",
    "train_loss",
    "train_margin_loss",
    "train_reconstruction_loss",
    "train_top1",
    "eval_loss",
    "eval_top1",
    "lr",
    "batch_size",
    "epoch_seconds",
    "images_per_second",
    "skipped_steps",
)
# The state of a run, and the one before it, for the case that the last is damaged.
STATE_FILES = ("resume.safetensors", "resume-previous.safetensors")


@dataclass
class Position:
    """Where a run stands; all of it goes into the resume state."""

    epoch: int = 0
    step: int = 0  # within the epoch
    seconds: float = 0.0  # of the epoch so far
    total_seconds: float = 0.0
    best: dict[str, Any] | None = None  # the row of the best epoch
    updates: int = 0  # optimizer steps of the whole run
    skipped: int = 0  # steps of the epoch so far that were left out, their loss or gradient not finite
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def best_epoch(self) -> int:
        """The best epoch, counted from 1; 0 before the first."""
        return self.best["epoch"] if self.best else 0


def drop_state(folder: Path) -> None:
    """Delete the resume states of a run that is over: as large as all the rest, and no one resumes."""
    for name in STATE_FILES:
        (folder / name).unlink(missing_ok=True)


def read_summary(folder: Path) -> list[dict[str, str]]:
    """The rows of a run folder's `summary.csv`, none where there is no such file.

    Raises:
        UsageError: If it is damaged.
    """
    path = folder / "summary.csv"
    if not path.exists():
        return []
    rows = read_rows(path, "delete it to go on without its curves")
    if rows and not set(SUMMARY_COLUMNS) - {"skipped_steps"} <= rows[0].keys():
        raise UsageError(f"{str(path)!r} is damaged (columns are missing): delete it to go on without its curves")
    return rows


class RunFolder:
    """What a trainer keeps in its folder: the summary, the weights and the resume state.

    Args:
        path: The folder, which must exist.
        metadata: Facts for the header of the weights' files.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]):
        self.path, self.metadata = path, metadata

    def write(self, model: nn.Module, state: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """Write `summary.csv`, `last.safetensors` and the resume state.

        Raises:
            WriteError: If the folder cannot be written.
        """
        write_csv(self.path / "summary.csv", SUMMARY_COLUMNS, history)
        save_weights(self.path / "last.safetensors", model, self._header(history[-1] if history else None))
        path, previous = (self.path / name for name in STATE_FILES)
        save_state(path, state, previous)

    def write_best(self, model: nn.Module, row: dict[str, Any] | None) -> None:
        """Write `best.safetensors`, with facts of the epoch in its header."""
        save_weights(self.path / "best.safetensors", model, self._header(row))

    def _header(self, row: dict[str, Any] | None) -> dict[str, Any]:
        facts = {} if row is None else {key: row[key] for key in ("epoch", "eval_top1", "eval_loss", "train_loss")}
        return {**self.metadata, **facts}

    def write_nonfinite(self, facts: dict[str, Any]) -> Path:
        """Write `nonfinite.json`: where training broke off."""
        write_json(self.path / "nonfinite.json", facts)
        return self.path / "nonfinite.json"

    def remove_leftovers(self) -> None:
        """Delete what a run left half-written that was killed while it wrote."""
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink()

    def find_state(self) -> tuple[Path | None, dict[str, Any] | None]:
        """The last state that is whole, and its file; one that is damaged is passed over for the one before it.

        Raises:
            CheckpointError: If both are damaged.
        """
        paths = [self.path / name for name in STATE_FILES]
        damage: CheckpointError | None = None
        for path in paths:
            if not path.exists():
                continue
            try:
                state = load_state(path)
                check_resume_state(state, path)
            except UnreadableError:  # perhaps for now alone: the one before must not take its place
                raise
            except CheckpointError as error:
                damage = damage or error
                continue
            if damage is not None:
                _logger.warning(f"going on from the checkpoint before the last: {damage}")
                os.replace(path, paths[0])  # else the next save would keep the damaged one as the one before
                path = paths[0]
            return path, state
        if damage is not None:
            raise damage
        if (self.path / "result.json").exists() or self._has_epochs():
            raise CheckpointError(
                f"run folder {str(self.path)!r} has results but no resume.safetensors, so that its training cannot go "
                f"on: start a new run, such as with --config {self.path / 'args.yaml'} --output FOLDER"
            )
        return None, None

    def _has_epochs(self) -> bool:
        """Whether more epochs were finished than one, after which a run may be killed before its first checkpoint."""
        summary = self.path / "summary.csv"
        return summary.exists() and len(summary.read_text().splitlines()) > 2

    def mend_best(self, position: Position, model: nn.Module) -> None:
        """Make `best.safetensors` and the state agree: a run can end between writing one and the other."""
        path = self.path / "best.safetensors"
        try:
            header = read_metadata(path)
            found = {key: json.loads(header[key]) for key in ("epoch", "eval_top1", "eval_loss", "train_loss")}
        except UnreadableError:
            raise
        except (CheckpointError, KeyError, ValueError) as error:
            found = None
            if position.best is not None and path.exists():
                _logger.warning(f"the best weights so far cannot be used: {error}")
        if found is not None and found["epoch"] == position.best_epoch:
            return
        if found is not None and found["epoch"] > position.epoch:
            position.best = found  # of an epoch that the state has not seen yet; to be beaten all the same
        elif position.best_epoch == position.epoch and position.step == 0 and position.epoch:
            self.write_best(model, position.best)  # what the state holds are these weights
        else:
            position.best = None  # lost: the best of the epochs to come takes its place


def share_state(path: Path | None, state: dict[str, Any] | None, ranks: Ranks, device: Any) -> dict[str, Any] | None:
    """Give all ranks the state of the first, whose folder the others need not see."""
    if ranks.count == 1:
        return state
    data = ranks.share_bytes(None if path is None else path.read_bytes(), device)
    if data is None or ranks.is_first:
        return state
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "resume.safetensors"
        copy.write_bytes(data)
        return load_state(copy)


def start_folder(folder: Path, text: str) -> None:
    """Make the folder of a run with its args.yaml, from which --resume goes on, or leave nothing behind.

    Several processes may do so at once, as those that share an exploration do; see `hold_folder` for one that is alone.

    Raises:
        UsageError: If the folder cannot be made.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "args.yaml", lambda temporary: temporary.write_text(text, encoding="utf-8"))
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
