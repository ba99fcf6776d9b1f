"""The rows of a grid as a table, the accuracy of each epoch beside it, and the figures of both.

The figures are drawn from the files, so that they can be drawn anew where the study is no more.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from capszoo._version import __version__
from capszoo.errors import UsageError
from capszoo.figures import plot_accuracy, plot_comparison
from capszoo.files import read_rows, write_csv
from capszoo.precision import device_name

from .exploration import Exploration
from .solution import Difference, Solution

_EPOCH_COLUMNS = ("name", "seed", "epoch", "seconds", "accuracy")
_PUBLISHED = Path(__file__).resolve().parents[1] / "recipes/results/paper-published.csv"
_REMEDY = "write it anew with recipes/explore.py --results"


def columns_of(gain: Difference | None) -> dict[str, float | None]:
    """A difference as columns of a table."""
    return {"gain": gain and gain.mean, "gain_low": gain and gain.low, "gain_high": gain and gain.high}


def epochs_table(table: Path) -> Path:
    """Where the epochs of the runs in a table stand."""
    return table.with_name(f"{table.stem}-epochs.csv")


def write_comparison(
    path: Path,
    exploration: Exploration,
    solutions: Sequence[Solution],
    rows: Sequence[Mapping[str, Any]],
    clock: str,
    command: str,
) -> None:
    """Write the rows of a grid, what it takes to make them again, their epochs, and the figures of both.

    Args:
        path: The table, a CSV file; names of the other files begin with its own.
        exploration: The study.
        solutions: Its trials, as they are compared.
        rows: From :func:`capszoo.explore.compare`.
        clock: How their seconds were measured: 'at rest' (here and now), 'wall' or 'cpu' (while they trained).
        command: The command that writes this table.
    """
    complete = [solution for solution in solutions if solution.state == "complete"]
    devices = {solution.machine.partition(" ")[2] for solution in complete} - {""}
    facts = {
        "dataset": exploration.study.user_attrs["facts"]["dataset"],
        "clock": clock,
        "machine": device_name(exploration.device) if clock == "at rest" else ", ".join(sorted(devices)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "capszoo": __version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    table = [{**row, **columns_of(row["gain"]), **facts} for row in rows]
    write_csv(path, list(table[0]), table)
    epochs = [
        dict(zip(_EPOCH_COLUMNS, (solution.name, solution.seed, *point), strict=True))
        for solution in complete
        for point in solution.history
    ]
    write_csv(epochs_table(path), _EPOCH_COLUMNS, epochs)
    if any(row["name"] == "baseline" for row in rows):
        draw_rows(path, path.with_suffix(".png"))
        draw_epochs(path, path.with_name(f"{path.stem}-accuracy.png"))


def draw_rows(table: Path, figure: Path) -> None:
    """Draw what the rows of a table take of the baseline's training time, beside the published figures.

    Args:
        table: From :func:`write_comparison`.
        figure: PNG file to write.

    Raises:
        UsageError: If there is no such table.
        ValueError: If it has no baseline.
    """
    rows = read_rows(table, _REMEDY)
    published = read_rows(_PUBLISHED, "restore it")
    datasets = {row.get("dataset") for row in rows}
    plot_comparison(rows, [row for row in published if {row["dataset"]} == datasets], figure)


def draw_epochs(table: Path, figure: Path) -> None:
    """Draw accuracy over epochs and over training time of the rows of a table, from the table of their epochs.

    Args:
        table: From :func:`write_comparison`.
        figure: PNG file to write.

    Raises:
        UsageError: If there is no table of epochs beside it, or it is none.
    """
    path = epochs_table(table)
    rows = read_rows(path, _REMEDY)
    runs: dict[tuple[str, str], list[list[float]]] = {}
    try:
        for row in rows:
            point = [int(row["epoch"]), float(row["seconds"]), float(row["accuracy"])]
            runs.setdefault((row["name"], row["seed"]), []).append(point)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{str(path)!r} is no table of epochs ({error}): {_REMEDY}") from None
    drawn = [
        Solution(number, name, "complete", options={"seed": seed}, history=history)
        for number, ((name, seed), history) in enumerate(runs.items())
    ]
    plot_accuracy(drawn, figure)
