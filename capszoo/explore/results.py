"""What a search writes: tables, figures, the page and the chosen solution."""

import json
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from capszoo._version import __version__
from capszoo.figures import plot_accuracy, plot_front, plot_time_to_best, plot_tradeoff, write_report
from capszoo.files import write_atomically, write_csv, yaml_text

from .caution import cautions
from .comparison import columns_of
from .exploration import Exploration
from .solution import Solution

_SOLUTION_COLUMNS = (
    "number", "name", "state", "accuracy", "seconds", "parameters", "seconds_to_best", "best_epoch", "test_top1",
    "policy", "epochs", "batch_size", "lr", "seed", "repeat_of", "runs", "accuracy_std", "gain", "gain_low",
    "gain_high", "options", "reason", "machine", "folder",
)  # fmt: skip


def write_solutions(path: str | Path, solutions: Sequence[Solution]) -> None:
    """Write solutions as CSV, the options as JSON and the commonest of them as columns too."""
    rows = []
    for solution in solutions:
        row = {**solution.options, **asdict(solution), "options": json.dumps(solution.options)}
        row |= columns_of(solution.gain)
        rows.append({key: row.get(key) for key in _SOLUTION_COLUMNS})
    write_csv(Path(path), _SOLUTION_COLUMNS, rows)


def write_reports(exploration: Exploration, folder: Path, chosen: Solution | None) -> tuple[list[str], list[str]]:
    """Write tables, figures and the page; return what could not be drawn, and why the trials may not compare."""
    solutions, front = exploration.solutions(), exploration.front()
    write_solutions(folder / "trials.csv", solutions)
    write_solutions(folder / "front.csv", front)
    command = ""
    if chosen is not None:
        words = ["python", "recipes/train.py", "--config", str(folder / "chosen.yaml")]
        command, text = shlex.join(words), yaml_text(words, chosen.options)
        write_atomically(folder / "chosen.yaml", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    else:
        (folder / "chosen.yaml").unlink(missing_ok=True)  # of a call that chose
    facts = exploration.study.user_attrs["facts"]
    shown = {
        "model": str(facts["model"]),
        "data set": f"{facts['dataset']} ({facts['images'][0]:,} train, {facts['images'][1]:,} validation)",
        "seconds": {"wall": "by the clock", "cpu": "of the processor"}[facts["clock"]],
        "machines": ", ".join(sorted({re.sub(r":\d+", "", s.machine) for s in solutions if s.machine})),
        "torch": torch.__version__,
        "capszoo": __version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    # Where solutions were repeated the front is one of means, and single runs lie elsewhere.
    candidates = exploration.candidates()
    compared = candidates if any(candidate.runs > 1 for candidate in candidates) else None
    title = f"{facts['model']} on {facts['dataset']}"
    doubts = cautions(solutions, facts["images"][1], searched=facts["grid"] is None, seeds=exploration.seeds)
    if facts["grid"] is None and front and exploration.baseline() is None:
        doubts.append("no baseline is complete: a loss of accuracy is one against the most accurate trial")
    missing = []
    try:
        write_report(
            folder / "report.html", solutions, front, title=title, facts=shown, objectives=exploration.objectives,
            study=exploration.study, command=command, cautions=doubts, compared=compared,
        )  # fmt: skip
    except ImportError as error:
        missing.append(f"report.html: {error}")
    for name, draw in (
        ("front", lambda path: plot_front(solutions, front, path, exploration.objectives, compared)),
        ("tradeoff", lambda path: plot_tradeoff(solutions, front, path, compared)),
        ("accuracy", lambda path: plot_accuracy(solutions, path)),
        ("time_to_best", lambda path: plot_time_to_best(solutions, path)),
    ):
        try:
            draw(folder / f"{name}.png")
        except ValueError as error:
            missing.append(f"{name}.png: {error}")
    return missing, doubts
