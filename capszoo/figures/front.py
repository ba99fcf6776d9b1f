"""The Pareto front of an exploration: accuracy against time and size."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from capszoo.explore import Solution


def plot_front(
    solutions: Sequence["Solution"],
    front: Sequence["Solution"],
    path: str | Path,
    objectives: Sequence[str],
    compared: Sequence["Solution"] | None = None,
) -> None:
    """Draw accuracy against each cost that was an objective, with the Pareto front marked and numbered.

    The grey steps are what is best for the two values of their panel alone: a solution off them may be on the front for
    its third value.

    Args:
        solutions: All trials; complete ones are drawn.
        front: Those of them that are Pareto-optimal.
        path: PNG file to write; its folder must exist.
        objectives: Names of the objectives; training time is drawn if no cost is among them.
        compared: What the front was found among, where it is drawn in place of the trials: means over seeds, with their
            standard deviation.

    Raises:
        ValueError: If no trial is complete.
        ImportError: If matplotlib is not installed.
    """
    labels = {"seconds": "training time, s", "parameters": "parameters"}
    costs = [name for name in labels if name in objectives] or ["seconds"]
    drawn = style.complete_with(solutions if compared is None else compared, "accuracy", *costs)
    if not drawn:
        raise ValueError(f"there is nothing to draw: no complete trial with accuracy and {' and '.join(costs)}")

    colors, marked = style.colors_of(solutions), {solution.number for solution in front}
    figure = style.make_figure(width=4.6 * len(costs) + 1.8, height=4.4)
    for axes, cost in zip(figure.subplots(1, len(costs), sharey=True, squeeze=False)[0], costs, strict=True):
        values = [getattr(solution, cost) for solution in drawn]
        style.log_axis(axes, values, style.in_millions if cost == "parameters" else style.plainly)
        bottom = style.accuracy_axis(axes, [solution.accuracy for solution in drawn])
        best, steps = 0.0, []
        for value, accuracy in sorted((getattr(s, cost), -s.accuracy) for s in drawn):
            if -accuracy > best:
                best = -accuracy
                steps.append((value, best))
        steps.append((max(values), best))
        axes.step(*zip(*steps, strict=True), where="post", color="grey", linewidth=1, linestyle="--", zorder=1)
        _scatter(axes, drawn, cost, colors, marked, lambda solution: 36)
        points = {s.number: (getattr(s, cost), max(s.accuracy, bottom)) for s in drawn if s.number in marked}
        _label_points(axes, points)
        axes.set_xlabel(labels[cost])
    figure.axes[0].set_ylabel("validation accuracy")
    handles = style.name_legend(drawn, colors, marked, bottom)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    style.save(figure, path)


def plot_tradeoff(
    solutions: Sequence["Solution"],
    front: Sequence["Solution"],
    path: str | Path,
    compared: Sequence["Solution"] | None = None,
) -> None:
    """Draw the three-way trade-off: training time, accuracy and, as area, parameters; the front is outlined.

    Arguments and errors as `plot_front`.
    """
    drawn = style.complete_with(solutions if compared is None else compared, "accuracy", "seconds", "parameters")
    if not drawn:
        raise ValueError("there is nothing to draw: no complete trial with accuracy, seconds and parameters")

    colors, marked = style.colors_of(solutions), {solution.number for solution in front}
    largest = max(solution.parameters for solution in drawn) or 1

    def area(parameters: float) -> float:
        return max(420 * parameters / largest, 8.0)

    figure = style.make_figure(width=8.6, height=5.0)
    axes = figure.subplots()
    style.log_axis(axes, [solution.seconds for solution in drawn], style.plainly)
    bottom = style.accuracy_axis(axes, [solution.accuracy for solution in drawn])
    _scatter(axes, drawn, "seconds", colors, marked, lambda solution: area(solution.parameters))
    axes.set(xlabel="training time, s", ylabel="validation accuracy")
    handles = style.name_legend(drawn, colors, marked, bottom)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    sizes = sorted(solution.parameters for solution in drawn)
    sizes = sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]})
    spots = [axes.scatter([], [], s=area(size), color="lightgrey", label=style.in_millions(size)) for size in sizes]
    look = {"labelspacing": 1.4, "borderpad": 1.0, "handletextpad": 1.2, "fontsize": 9, "frameon": False}
    figure.legend(handles=spots, loc="outside right lower", title="parameters", **look)
    style.save(figure, path)


def _scatter(
    axes: "Axes",
    solutions: Sequence["Solution"],
    cost: str,
    colors: dict[str, str],
    marked: set[int],
    area: Callable[["Solution"], float],
) -> None:
    """A point for each trial, those of the front strong and outlined; a triangle where it is below the axis."""
    from matplotlib.colors import to_rgba

    bottom, top = axes.get_ylim()
    axes.set_ylim(top=max(top, *(s.accuracy + 1.2 * (s.accuracy_std or 0) for s in solutions)))
    for solution in solutions:
        if solution.accuracy_std:
            place = getattr(solution, cost), solution.accuracy
            axes.errorbar(*place, yerr=solution.accuracy_std, color=colors[solution.name], linewidth=1, zorder=2)
    order = sorted(solutions, key=lambda solution: (solution.number in marked, -area(solution)))
    for marker, is_below in (("o", False), ("v", True)):
        points = [solution for solution in order if (solution.accuracy < bottom) == is_below]
        axes.scatter(
            [getattr(solution, cost) for solution in points],
            [max(solution.accuracy, bottom) for solution in points],
            s=[36 if is_below else area(solution) for solution in points],
            c=[to_rgba(colors[s.name], 0.9 if s.number in marked else 0.3) for s in points],
            edgecolors=["black" if s.number in marked else "none" for s in points],
            linewidths=1.2,
            marker=marker,
            clip_on=not is_below,
            zorder=3,
        )


def _label_points(axes: "Axes", points: dict[int, tuple[float, float]]) -> None:
    """Write its number beside each point, on the first of four sides where no other number is."""
    corners = ((-5, 2), (5, 2), (-5, -8), (5, -8))
    taken: list[tuple[float, float]] = []
    for number, point in points.items():
        x, y = (axes.transScale + axes.transLimits).transform(point)  # parts of the axes
        spots = {(dx, dy): (x + 0.006 * dx, y + 0.005 * dy) for dx, dy in corners}
        free = [
            corner for corner, (a, b) in spots.items() if all(abs(a - c) > 0.05 or abs(b - d) > 0.03 for c, d in taken)
        ]
        corner = (free or corners)[0]
        taken.append(spots[corner])
        side = "right" if corner[0] < 0 else "left"
        axes.annotate(str(number), point, corner, textcoords="offset points", ha=side, fontsize=7, zorder=4)
