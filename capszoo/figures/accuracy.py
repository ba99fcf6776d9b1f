"""Accuracy over epochs and over training time, and the time to the best accuracy."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import style
from .texts import is_number, percent

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

    from capszoo.explore import Solution

# Panels side by side in a figure as wide as a page.
_MOST_COLUMNS = 5


class Curve(NamedTuple):
    """Accuracy over the epochs of one training with several seeds: means, and the ends of their range."""

    runs: int
    epoch: list[float]
    seconds: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def plot_accuracy(solutions: Sequence["Solution"], path: str | Path) -> None:
    """Draw accuracy over epochs and over training time, a panel for each name with all others in grey behind.

    It is the mean over the trials of a name, with all of their range shaded, where they are the same training with
    several seeds; otherwise it is the most accurate trial. Triangles are epochs that lie below the axis.

    Args:
        solutions: All trials; failed ones are left out, unfinished ones drawn only for names with no complete trial.
        path: PNG file to write; its folder must exist.

    Raises:
        ValueError: If no trial has an epoch to draw.
        ImportError: If matplotlib is not installed.
    """
    drawn = {name: _curve(runs) for name, runs in curves(solutions).items()}
    if not drawn:
        raise ValueError("there is nothing to draw: no trial has finished an epoch")

    rows = -(-len(drawn) // _MOST_COLUMNS)
    columns = -(-len(drawn) // rows)
    figure = style.make_figure(width=max(2.2 * columns, 4.0) + 2.4, height=2 * (0.5 + 1.75 * rows))
    blocks = figure.subfigures(2, 1)
    _small_multiples(blocks[0], rows, columns, drawn, style.colors_of(solutions), "epoch", "epoch")
    _small_multiples(blocks[1], rows, columns, drawn, style.colors_of(solutions), "seconds", "training time, s")
    style.save(figure, path)


def _curve(runs: Sequence["Solution"]) -> Curve:
    epochs, seconds, accuracies = [], [], []
    for points in zip(*(run.history for run in runs), strict=True):  # an epoch of all runs
        epochs.append(points[0][0])
        seconds.append(sum(point[1] for point in points) / len(points))
        accuracies.append([point[2] for point in points])
    mean = [sum(values) / len(values) for values in accuracies]
    return Curve(len(runs), epochs, seconds, mean, [min(v) for v in accuracies], [max(v) for v in accuracies])


def _small_multiples(
    block: "SubFigure",
    rows: int,
    columns: int,
    drawn: dict[str, Curve],
    colors: dict[str, str],
    over: str,
    label: str,
) -> None:
    """A panel for each name, on shared axes."""
    grid = block.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    bottom = style.accuracy_axis(panels[0], [value for curve in drawn.values() for value in curve.mean])
    for axes, (name, curve) in zip(panels, drawn.items(), strict=False):
        axes.grid(alpha=0.3)
        for other in drawn.values():
            if other is not curve:
                axes.plot(getattr(other, over), other.mean, color="0.8", linewidth=0.8, zorder=1)
        x = getattr(curve, over)
        marker = "o" if len(x) == 1 else ""
        axes.plot(
            x,
            curve.mean,
            color=colors[name],
            linewidth=1.8,
            marker=marker,
            markersize=4,
            label=style.literal(name),
            zorder=3,
        )
        if curve.runs > 1:
            axes.fill_between(x, curve.low, curve.high, color=colors[name], alpha=0.25, linewidth=0, zorder=2)
        below = [place for place, value in zip(x, curve.mean, strict=True) if value < bottom]
        if below:
            axes.plot(below, [bottom] * len(below), "v", color=colors[name], markersize=5, clip_on=False, zorder=4)
        seeds = f", {curve.runs} seeds" if curve.runs > 1 else ""
        axes.set_title(f"{style.literal(name)}{seeds}", fontsize=8, color=colors[name])
        best = max(curve.mean)
        text = f"best {percent(best)}" + (", below the axis" if best < bottom else "")
        axes.annotate(text, (0.96, 0.06), xycoords="axes fraction", ha="right", fontsize=7, zorder=5,
                      bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1})  # fmt: skip
    for place, axes in enumerate(panels):
        axes.tick_params(labelsize=7)
        if place >= len(drawn):
            axes.remove()
        elif place + columns >= len(drawn):  # the lowest of its column
            axes.tick_params(labelbottom=True)
    panels[0].set_xlim(left=0)
    panels[0].xaxis.get_major_locator().set_params(integer=over == "epoch", nbins=5)
    block.supxlabel(label, fontsize=9)
    block.supylabel("validation accuracy", fontsize=9)


def curves(solutions: Sequence["Solution"]) -> dict[str, list["Solution"]]:
    """The trials whose accuracy over time stands for each name.

    Complete ones with the same epochs, and the same options but for the seed, are taken together; otherwise it is the
    most accurate one alone.
    """
    found: dict[str, list[Solution]] = {}
    for solution in sorted(solutions, key=lambda solution: solution.number):
        if solution.history and solution.state not in ("failed", "interrupted"):
            found.setdefault(solution.name, []).append(solution)
    for name, runs in found.items():
        runs = [run for run in runs if run.state == "complete"] or runs
        first, *others = [([point[0] for point in run.history], {**run.options, "seed": None}) for run in runs]
        same = runs[0].state == "complete" and all(other == first for other in others)
        found[name] = runs if same else [max(runs, key=lambda run: max(point[2] for point in run.history))]
    return found


def plot_time_to_best(solutions: Sequence["Solution"], path: str | Path) -> None:
    """Draw the training time until the best epoch: a bar for the mean of each name, a point for each trial.

    Beside each bar stands what accuracy that time led to: of several trials the least and the greatest.

    Args:
        solutions: All trials; complete ones are drawn.
        path: PNG file to write; its folder must exist.

    Raises:
        ValueError: If no trial is complete.
        ImportError: If matplotlib is not installed.
    """
    drawn = style.complete_with(solutions, "seconds_to_best")
    if not drawn:
        raise ValueError("there is nothing to draw: no complete trial with a time to its best accuracy")

    times: dict[str, list[float]] = {}
    for solution in drawn:
        times.setdefault(solution.name, []).append(solution.seconds_to_best)
    means = {name: sum(values) / len(values) for name, values in times.items()}
    names = sorted(means, key=means.get, reverse=True)  # the fastest on top
    colors = style.colors_of(solutions)
    figure = style.make_figure(width=7.5, height=1.2 + 0.42 * len(names))
    axes = figure.subplots()
    bars = axes.barh(
        range(len(names)),
        [means[name] for name in names],
        color=[colors[name] for name in names],
        alpha=0.55,
        height=0.62,
        tick_label=[style.literal(name) for name in names],
    )
    ends = [max(times[name]) for name in names]
    for place, (name, bar) in enumerate(zip(names, bars, strict=True)):
        values = times[name]
        if len(values) > 1:
            axes.plot(values, [place] * len(values), "o", color=colors[name], markersize=4, markeredgecolor="black",
                      markeredgewidth=0.5, clip_on=False)  # fmt: skip
        text = ("mean " if len(values) > 1 else "") + f"{means[name]:,.{0 if means[name] >= 100 else 1}f} s"
        text += _accuracies([solution for solution in drawn if solution.name == name])
        offset = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        axes.annotate(text, (max(ends[place], bar.get_width()), place), **offset)
    axes.set_xlim(0, 1.4 * max(ends))
    axes.set_xlabel("training time to the best validation accuracy, s")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    style.save(figure, path)


def _accuracies(solutions: Sequence["Solution"]) -> str:
    """The accuracy of trials, or its range, to follow their time."""
    values = sorted(s.accuracy for s in solutions if is_number(s.accuracy))
    if not values:
        return ""
    low, high = percent(values[0]), percent(values[-1])
    return f", {high}" if low == high else f", {low.removesuffix(' %')} to {high}"
