"""Figures of measurements and of explorations, as PNG files.

Figures of measurements take the rows of a CSV as `csv.DictReader` or the recipe that wrote it gives them, those of
explorations the solutions of :mod:`capszoo.explore`; values that are missing are skipped. matplotlib is imported only
when a figure is drawn, and without its global state.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .explore import Solution

__all__ = [
    "accuracy_limits",
    "curves",
    "plot_accuracy",
    "plot_comparison",
    "plot_front",
    "plot_layers",
    "plot_memory",
    "plot_speedup",
    "plot_time_to_best",
    "plot_tradeoff",
]

# Variants of routing by the names of recipes/benchmark.py: line style, name in a legend, and marker.
_VARIANTS = {
    "fused": ("-", "capszoo", "o"),
    "plain": ("--", "plain PyTorch", "s"),
    "compiled": ("-.", "torch.compile", "^"),
    "none": (":", "without routing", "x"),
}
_SUBJECTS = ("routing", "training step", "inference")


def plot_speedup(rows: Iterable[dict[str, Any]], path: str | Path) -> None:
    """Draw the time of each variant of routing over that of the fused one, by batch size.

    Args:
        rows: Rows of recipes/benchmark.py.
        path: PNG file to write; its folder must exist.

    Raises:
        ValueError: If no row has a ratio to draw.
        ImportError: If matplotlib is not installed.
    """
    _plot_by_batch_size(rows, path, "ratio_to_fused", ("plain", "compiled", "none"), "time / time of capszoo")


def plot_memory(rows: Iterable[dict[str, Any]], path: str | Path) -> None:
    """Draw the peak memory of each variant of routing, by batch size; arguments and errors as `plot_speedup`."""
    _plot_by_batch_size(rows, path, "peak_mib", tuple(_VARIANTS), "peak memory of a step, MiB")


def plot_layers(rows: Iterable[dict[str, Any]], path: str | Path) -> None:
    """Draw a stacked bar of the time of each layer for each model, with plain and with fused routing.

    Arguments and errors as `plot_speedup`.
    """
    times: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        value = _number(row, "median_ms")
        if row.get("subject") == "layer" and value is not None:
            times.setdefault(row["model"], {})[row["layer"], row["variant"]] = value
    layers = list(dict.fromkeys(layer for found in times.values() for layer, _ in found))
    bars = {}
    for model, found in times.items():
        for variant in ("plain", "fused"):
            # The layers around it are the same for every routing, and measured once.
            heights = [found.get((layer, variant if layer == "routing" else "fused")) for layer in layers]
            if None not in heights:  # a bar without one of its layers would be too short, and look fast
                bars[f"{model}\n{_VARIANTS[variant][1]}"] = heights
    if not bars:
        raise ValueError("there is nothing to draw: no rows of the subject 'layer' with all layers of a model")

    figure = _figure(width=max(6.0, 1.3 * len(bars) + 2))
    axes = figure.subplots()
    bottoms = [0.0] * len(bars)
    for index, layer in enumerate(layers):
        heights = [values[index] for values in bars.values()]
        axes.bar(list(bars), heights, bottom=bottoms, label=layer, color=f"C{index}", width=0.7)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for place, total in enumerate(bottoms):
        text = f"{total:,.0f} ms" if total >= 100 else f"{total:.3g} ms"
        axes.annotate(text, (place, total), ha="center", va="bottom", fontsize=8)
    axes.set_ylabel("forward and backward pass, ms")
    axes.tick_params(axis="x", labelsize=8)
    axes.margins(y=0.08)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)
    _save(figure, path)


def plot_front(
    solutions: Sequence["Solution"], front: Sequence["Solution"], path: str | Path, objectives: Sequence[str]
) -> None:
    """Draw accuracy against each cost that was an objective, with the Pareto front marked and numbered.

    The grey steps are what is best for the two values of their panel alone: a solution off them may be on the front for
    its third value.

    Args:
        solutions: All trials; complete ones are drawn.
        front: Those of them that are Pareto-optimal.
        path: PNG file to write; its folder must exist.
        objectives: Names of the objectives; training time is drawn if no cost is among them.

    Raises:
        ValueError: If no trial is complete.
        ImportError: If matplotlib is not installed.
    """
    labels = {"seconds": "training time, s", "parameters": "parameters"}
    costs = [name for name in labels if name in objectives] or ["seconds"]
    drawn = _complete(solutions, "accuracy", *costs)
    if not drawn:
        raise ValueError(f"there is nothing to draw: no complete trial with accuracy and {' and '.join(costs)}")

    colors, marked = _colors(solutions), {solution.number for solution in front}
    figure = _figure(width=4.6 * len(costs) + 1.8, height=4.4)
    for axes, cost in zip(figure.subplots(1, len(costs), sharey=True, squeeze=False)[0], costs, strict=True):
        values = [getattr(solution, cost) for solution in drawn]
        _log_axis(axes, values, _in_millions if cost == "parameters" else _plainly)
        bottom = _accuracy_axis(axes, [solution.accuracy for solution in drawn])
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
    handles = _name_legend(drawn, colors, marked, bottom)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    _save(figure, path)


def plot_tradeoff(solutions: Sequence["Solution"], front: Sequence["Solution"], path: str | Path) -> None:
    """Draw the three-way trade-off: training time, accuracy and, as area, parameters; the front is outlined.

    Arguments and errors as `plot_front`.
    """
    drawn = _complete(solutions, "accuracy", "seconds", "parameters")
    if not drawn:
        raise ValueError("there is nothing to draw: no complete trial with accuracy, seconds and parameters")

    colors, marked = _colors(solutions), {solution.number for solution in front}
    largest = max(solution.parameters for solution in drawn) or 1

    def area(parameters: float) -> float:
        return max(420 * parameters / largest, 8.0)

    figure = _figure(width=8.6, height=5.0)
    axes = figure.subplots()
    _log_axis(axes, [solution.seconds for solution in drawn], _plainly)
    bottom = _accuracy_axis(axes, [solution.accuracy for solution in drawn])
    _scatter(axes, drawn, "seconds", colors, marked, lambda solution: area(solution.parameters))
    axes.set(xlabel="training time, s", ylabel="validation accuracy")
    handles = _name_legend(drawn, colors, marked, bottom)
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    sizes = sorted(solution.parameters for solution in drawn)
    sizes = sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]})
    spots = [axes.scatter([], [], s=area(size), color="lightgrey", label=_in_millions(size)) for size in sizes]
    style = {"labelspacing": 1.4, "borderpad": 1.0, "handletextpad": 1.2, "fontsize": 9, "frameon": False}
    figure.legend(handles=spots, loc="outside right lower", title="parameters", **style)
    _save(figure, path)


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

    colors = _colors(solutions)
    figure = _figure(width=11.0, height=4.4)
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
        _accuracy_axis(axes, means)
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
    over_epochs.xaxis.get_major_locator().set_params(integer=True)
    over_epochs.set_ylabel("validation accuracy")
    figure.legend(handles=over_epochs.lines, loc="outside right upper", frameon=False, fontsize=9)
    _save(figure, path)


def plot_time_to_best(solutions: Sequence["Solution"], path: str | Path) -> None:
    """Draw the training time until the best epoch: a bar for the mean of each name, a point for each trial.

    Args:
        solutions: All trials; complete ones are drawn.
        path: PNG file to write; its folder must exist.

    Raises:
        ValueError: If no trial is complete.
        ImportError: If matplotlib is not installed.
    """
    drawn = _complete(solutions, "seconds_to_best")
    if not drawn:
        raise ValueError("there is nothing to draw: no complete trial with a time to its best accuracy")

    times: dict[str, list[float]] = {}
    for solution in drawn:
        times.setdefault(solution.name, []).append(solution.seconds_to_best)
    means = {name: sum(values) / len(values) for name, values in times.items()}
    names = sorted(means, key=means.get, reverse=True)  # the fastest on top
    colors = _colors(solutions)
    figure = _figure(width=7.5, height=1.2 + 0.42 * len(names))
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
    _save(figure, path)


def plot_comparison(rows: Iterable[dict[str, Any]], published: Iterable[dict[str, Any]], path: str | Path) -> None:
    """Draw what each row of a grid takes of the baseline's training time, beside the published figures.

    Three bars a row, each a ratio to the baseline's time to its own best accuracy: the published time to the row's
    best, ours, and our time to the baseline's best accuracy (with the standard deviation over seeds).

    Args:
        rows: Rows of `capszoo.explore.compare`.
        published: Rows with name, epochs and epoch_seconds, of the same data set.
        path: PNG file to write; its folder must exist.

    Raises:
        ValueError: If there is no row named 'baseline' with a time.
        ImportError: If matplotlib is not installed.
    """
    rows = list(rows)
    theirs = {row["name"]: _number(row, "epochs") * _number(row, "epoch_seconds") for row in published}
    ours = {row["name"]: _number(row, "seconds_to_best") for row in rows}
    if not ours.get("baseline"):
        raise ValueError("there is nothing to draw: no row named 'baseline' with a time to its best accuracy")
    series: list[tuple[str, list[float | None], list[float | None], str]] = [
        ("paper: to its best accuracy", [], [], "0.75"),
        ("ours: to its best accuracy", [], [], "C0"),
        ("ours: to the baseline's best accuracy", [], [], "C2"),
    ]
    for row in rows:
        paper = theirs.get(row["name"])
        saving = _number(row, "saving")
        values = (
            (None if paper is None or "baseline" not in theirs else paper / theirs["baseline"], None),
            (ours[row["name"]] / ours["baseline"], None),
            (None if saving is None else 1 - saving, _number(row, "saving_std")),
        )
        for (_, times, spreads, _), (time, spread) in zip(series, values, strict=True):
            times.append(time)
            spreads.append(spread)

    figure = _figure(width=8.5, height=1.4 + 0.62 * len(rows))
    axes = figure.subplots()
    for index, (label, times, spreads, color) in enumerate(series):
        drawn = [(place, time, spread or 0.0) for place, (time, spread) in enumerate(zip(times, spreads, strict=True))
                 if time is not None]  # fmt: skip
        places = [place + 0.26 * (index - 1) for place, _, _ in drawn]
        errors = [spread for *_, spread in drawn]
        axes.barh(places, [time for _, time, _ in drawn], height=0.24, color=color, label=label,
                  xerr=errors if any(errors) else None, error_kw={"elinewidth": 1})  # fmt: skip
        for middle, (place, time, spread) in zip(places, drawn, strict=True):
            text = f"{100 * time:.0f} %"
            if index == 2 and _number(rows[place], "reached") != _number(rows[place], "runs"):
                text += f" ({rows[place]['reached']} of {rows[place]['runs']} runs)"
            axes.annotate(text, (time + spread, middle), xytext=(4, 0), textcoords="offset points", va="center",
                          fontsize=7)  # fmt: skip
        for place, time in enumerate(times):
            if time is None and index == 2:
                axes.annotate("not reached by any run", (0, place + 0.26), xytext=(4, 0), textcoords="offset points",
                              va="center", fontsize=7)  # fmt: skip
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.margins(x=0.08)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlabel("training time, of the baseline's to its best accuracy")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    _save(figure, path)


def accuracy_limits(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis for accuracies.

    It begins a little below the lower quartile: a few poor trials, or the first epochs, would squash what is compared.
    """
    ordered = sorted(values)
    quartile, best = ordered[len(ordered) // 4], ordered[-1]
    low = max(ordered[0], quartile - (best - quartile) / 2)
    margin = max(0.06 * (best - low), 0.001)
    return low - margin, best + margin


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


def _plot_by_batch_size(
    rows: Iterable[dict[str, Any]], path: str | Path, column: str, variants: Sequence[str], label: str
) -> None:
    """A panel for each subject, a colour for each model, a line style for each variant."""
    points: dict[str, dict[tuple[str, str], dict[float, tuple[float, float]]]] = {}
    for row in rows:
        value, batch_size = _number(row, column), _number(row, "batch_size")
        subject, variant = row.get("subject"), row.get("variant")
        if subject not in _SUBJECTS or variant not in variants or not value or not batch_size:
            continue
        if subject == "routing" and row.get("precision") != "float32":
            continue
        # Where a step was timed both with and without a CUDA graph, the graph is how models train.
        line = points.setdefault(subject, {}).setdefault((row["model"], variant), {})
        graph = _number(row, "graph") or 0.0
        if graph >= line.get(batch_size, (0.0, 0.0))[0]:
            line[batch_size] = graph, value
    if not points:
        raise ValueError(f"there is nothing to draw: no rows of {', '.join(_SUBJECTS)} with a value of {column!r}")

    subjects = [subject for subject in _SUBJECTS if subject in points]
    models = list(dict.fromkeys(model for lines in points.values() for model, _ in lines))
    used = [variant for variant in variants if any(variant == v for lines in points.values() for _, v in lines)]
    figure = _figure(width=4.0 * len(subjects) + 2)
    from matplotlib.ticker import LogLocator

    for axes, subject in zip(figure.subplots(1, len(subjects), squeeze=False)[0], subjects, strict=True):
        for (model, variant), line in points[subject].items():
            sizes = sorted(line)
            axes.plot(
                sizes,
                [line[size][1] for size in sizes],
                color=f"C{models.index(model)}",
                linestyle=_VARIANTS[variant][0],
                marker=_VARIANTS[variant][2],
                markersize=4,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda size, _: f"{size:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.3)
        axes.set(title=subject, xlabel="batch size")
        if column == "ratio_to_fused":
            axes.axhline(1, color="black", linewidth=1)
    figure.axes[0].set_ylabel(label)
    figure.legend(handles=_legend(models, used), loc="outside right upper", frameon=False)
    _save(figure, path)


def _legend(models: Sequence[str], variants: Sequence[str]) -> list:
    from matplotlib.lines import Line2D

    colors = [Line2D([], [], color=f"C{index}", label=model) for index, model in enumerate(models)]
    styles = []
    for variant in variants:
        line, label, marker = _VARIANTS[variant]
        styles.append(Line2D([], [], color="grey", linestyle=line, marker=marker, markersize=4, label=label))
    return colors + styles


def _complete(solutions: Iterable["Solution"], *keys: str) -> list["Solution"]:
    """The complete trials that have all these values."""
    return [s for s in solutions if s.state == "complete" and all(_number(vars(s), key) is not None for key in keys)]


def _colors(solutions: Iterable["Solution"]) -> dict[str, str]:
    """A colour for each name, the same in all figures of an exploration."""
    names = dict.fromkeys(solution.name for solution in sorted(solutions, key=lambda solution: solution.number))
    return {name: f"C{index % 10}" for index, name in enumerate(names)}


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

    bottom = axes.get_ylim()[0]
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


def _accuracy_axis(axes: "Axes", values: Sequence[float]) -> float:
    """Set up the axis of accuracies; return its lower end."""
    axes.set_ylim(*accuracy_limits(values))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    axes.grid(alpha=0.3)
    return axes.get_ylim()[0]


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


def _log_axis(axes: "Axes", values: Sequence[float], write: Callable[[float], str]) -> None:
    """Set up a logarithmic axis with ticks at plain numbers, over a part of a decade too."""
    from matplotlib.ticker import MaxNLocator

    low, high = (max(value, 1e-3) for value in (min(values), max(values)))
    low, high = low / (high / low * 1.2) ** 0.06, high * (high / low * 1.2) ** 0.06
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) < 3:
        ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
    axes.set_xticks(ticks, [write(tick) for tick in ticks])
    axes.set_xticks([], minor=True)


def _plainly(value: float) -> str:
    return f"{value:,.12g}"


def _in_millions(value: float) -> str:
    return f"{value / 1e6:.3g} M" if value >= 1e6 else f"{value / 1e3:.3g} k" if value >= 1e3 else f"{value:.3g}"


def _name_legend(solutions: Sequence["Solution"], colors: dict[str, str], marked: set[int], bottom: float) -> list:
    from matplotlib.lines import Line2D

    used = {solution.name for solution in solutions}
    spot = {"marker": "o", "linestyle": "", "markersize": 6}
    handles = [Line2D([], [], color=colors[name], label=name or "(no name)", **spot) for name in colors if name in used]
    if any(solution.number in marked for solution in solutions):
        handles.append(Line2D([], [], color="none", markeredgecolor="black", label="Pareto front", **spot))
    if any(solution.accuracy < bottom for solution in solutions):
        handles.append(Line2D([], [], color="grey", label="below the axis", **{**spot, "marker": "v"}))
    return handles


def _number(row: dict[str, Any], key: str) -> float | None:
    """A value as a number, None where it is missing."""
    try:
        value = float(row.get(key, ""))
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _figure(width: float, height: float = 4.0) -> "Figure":
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('figures need matplotlib: pip install "capszoo[train]"') from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: str | Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
