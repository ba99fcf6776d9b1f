"""Accuracy over epochs and over training time, and the time to the best accuracy."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import style

if TYPE_CHECKING:
    from capszoo.explore import Solution


def plot_accuracy(solutions: Sequence["Solution"], path: str | Path) -> None:
    """Draw accuracy over epochs and over training time, a line for each name.

    It is the mean over the trials of a name, with all of their range shaded, where they are the same training with
    several seeds; otherwise it is the most accurate trial.

    Args:
        solutions: All trials; failed ones are left out, unfinished ones drawn only for names with no complete trial.
        path: PNG file to write; its folder must exist.

    Raises:
        ValueError: If no trial has an epoch to draw.
        ImportError: If matplotlib is not installed.
    """
    lines = curves(solutions)
    if not lines:
        raise ValueError("there is nothing to draw: no trial has finished an epoch")

    colors = style.colors_of(solutions)
    figure = style.make_figure(width=11.0, height=4.4)
    over_epochs, over_time = figure.subplots(1, 2, sharey=True)
    means = []
    for name, runs in lines.items():
        epochs, seconds, accuracies = [], [], []
        for points in zip(*(run.history for run in runs), strict=True):  # an epoch of all runs
            epochs.append(points[0][0])
            seconds.append(sum(point[1] for point in points) / len(points))
            accuracies.append([point[2] for point in points])
        mean = [sum(values) / len(values) for values in accuracies]
        means += mean
        label = f"{name or '(no name)'}, {len(runs)} seeds" if len(runs) > 1 else name or "(no name)"
        for axes, x in ((over_epochs, epochs), (over_time, seconds)):
            marker = "o" if len(x) == 1 else ""
            axes.plot(x, mean, color=colors[name], linewidth=1.6, marker=marker, markersize=4, label=label)
            if len(runs) > 1:
                low, high = [min(values) for values in accuracies], [max(values) for values in accuracies]
                axes.fill_between(x, low, high, color=colors[name], alpha=0.18, linewidth=0)
    for axes, label in ((over_epochs, "epoch"), (over_time, "training time, s")):
        style.accuracy_axis(axes, means)
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
    over_epochs.xaxis.get_major_locator().set_params(integer=True)
    over_epochs.set_ylabel("validation accuracy")
    figure.legend(handles=over_epochs.lines, loc="outside right upper", frameon=False, fontsize=9)
    style.save(figure, path)


def curves(solutions: Sequence["Solution"]) -> dict[str, list["Solution"]]:
    """The trials whose accuracy over time stands for each name.

    Complete ones with the same epochs, and the same options but for the seed, are taken together; otherwise it is the
    most accurate one alone.
    """
    found: dict[str, list[Solution]] = {}
    for solution in sorted(solutions, key=lambda solution: solution.number):
        if solution.history and solution.state != "failed":
            found.setdefault(solution.name, []).append(solution)
    for name, runs in found.items():
        runs = [run for run in runs if run.state == "complete"] or runs
        first, *others = [([point[0] for point in run.history], {**run.options, "seed": None}) for run in runs]
        same = runs[0].state == "complete" and all(other == first for other in others)
        found[name] = runs if same else [max(runs, key=lambda run: max(point[2] for point in run.history))]
    return found


def plot_time_to_best(solutions: Sequence["Solution"], path: str | Path) -> None:
    """Draw the training time until the best epoch: a bar for the mean of each name, a point for each trial.

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
        tick_label=[name or "(no name)" for name in names],
    )
    ends = [max(times[name]) for name in names]
    for place, (name, bar) in enumerate(zip(names, bars, strict=True)):
        values = times[name]
        if len(values) > 1:
            axes.plot(values, [place] * len(values), "o", color=colors[name], markersize=4, markeredgecolor="black",
                      markeredgewidth=0.5, clip_on=False)  # fmt: skip
        text = ("mean " if len(values) > 1 else "") + f"{means[name]:,.{0 if means[name] >= 100 else 1}f} s"
        offset = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        axes.annotate(text, (max(ends[place], bar.get_width()), place), **offset)
    axes.set_xlim(0, 1.14 * max(ends))
    axes.set_xlabel("training time to the best validation accuracy, s")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    style.save(figure, path)
