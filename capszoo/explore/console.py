"""A search on the console: a live table on a terminal, a line a trial elsewhere."""

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from capszoo.engine import Trainer

from .exploration import Exploration
from .solution import Solution


class Report:
    """Shows a search: a live table on a terminal, a line a trial elsewhere."""

    def __init__(self, console: Console, quiet: bool, budget: float | None):
        self.console, self.quiet, self.budget = console, quiet, budget
        self.live = Live(console=console, refresh_per_second=2) if console.is_terminal and not quiet else None
        self.start = time.monotonic()
        self.exploration: Exploration | None = None
        self.printed: set[int] = set()

    def change(self, trainer: Trainer | None) -> None:
        """Called after each epoch and trial."""
        if self.quiet or self.exploration is None or (self.live is None and trainer is not None):
            return
        solutions = self.exploration.solutions()
        if self.live is not None:
            waited = sum(solution.state == "waiting" for solution in solutions)
            seen = [solution for solution in solutions if solution.state != "waiting"]
            of = "" if self.budget is None else f" of {self.budget:.0f}"
            head = f"{time.monotonic() - self.start:.0f}{of} s, {len(seen)} trials, {waited} waiting"
            front = solutions_table(self.exploration.front(), "Pareto-optimal so far")
            self.live.update(Group(head, solutions_table(seen[-8:], "trials"), "", front))
            return
        for s in solutions:
            if s.state in ("complete", "stopped", "failed", "interrupted") and s.number not in self.printed:
                self.printed.add(s.number)
                why = f" ({s.reason})" if s.reason else ""
                self.console.print(
                    f"trial {s.number:>3} {s.name:<14} {s.state:<8} accuracy {percent(s.accuracy):>8}  "
                    f"{seconds_text(s.seconds):>8}  {s.parameters or 0:>10,} parameters  {short_options(s)}{why}"
                )

    def __enter__(self) -> "Report":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.live is not None:
            self.live.stop()


def solutions_table(solutions: list[Solution], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    repeated = any(solution.gain is not None or solution.runs > 1 for solution in solutions)
    columns = ["trial", "name", "accuracy", *(["runs", "above baseline"] if repeated else []), "time", "parameters"]
    for column in columns:
        table.add_column(column, justify="left" if column == "name" else "right", no_wrap=True)
    table.add_column("options", overflow="fold")
    for s in solutions:
        parameters = "" if s.parameters is None else f"{s.parameters:,}"
        name = s.name if s.state in ("complete", "running") else f"{s.name} ({s.state})"
        gain = str(s.gain or "-")
        accuracy = percent(s.accuracy) + ("" if s.accuracy_std is None else f" ±{100 * s.accuracy_std:.2f}")
        over_seeds = [str(s.runs), gain] if repeated else []
        table.add_row(str(s.number), name, accuracy, *over_seeds, seconds_text(s.seconds), parameters, short_options(s))
    return table


def comparison_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="rows over seeds, mean ± standard deviation", title_justify="left", box=None, pad_edge=False)
    columns = ("row", "runs", "validation", "test", "epochs to best", "s an epoch", "time to baseline's best", "saved",
               "above baseline")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "row" else "right", no_wrap=True)

    def cell(row: dict[str, Any], key: str, scale: float, form: str) -> str:
        if row[key] is None:
            return "-"
        spread = "" if row[key + "_std"] is None else f" ±{scale * row[key + '_std']:{form}}"
        return f"{scale * row[key]:{form}}{spread}"

    for row in rows:
        table.add_row(
            row["name"], str(row["runs"]), cell(row, "accuracy", 100, ".2f"), cell(row, "test_top1", 100, ".2f"),
            cell(row, "best_epoch", 1, ".1f"), cell(row, "epoch_seconds", 1, ".1f"),
            f"{cell(row, 'seconds_to_baseline', 1, '.0f')} s ({row['reached']}/{row['runs']})",
            f"{cell(row, 'saving', 100, '.0f')} %", str(row["gain"] or "-"),
        )  # fmt: skip
    return table


def short_options(solution: Solution) -> str:
    """What sets a trial apart, in a line."""
    shown = {**solution.options, **solution.options.get("model_kwargs", {})}
    names = ("epochs", "batch_size", "lr", "max_lr", "share_weights", "small_decoder", "keep_types", "num_routing")
    values = {
        name: f"{shown[name]:.2g}" if isinstance(shown[name], float) else shown[name] for name in names if name in shown
    }
    return " ".join(f"{name}={value}" for name, value in values.items())


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def seconds_text(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"
