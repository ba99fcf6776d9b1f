"""The interactive figures of the page of an exploration; plotly is imported when they are drawn."""

import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from .style import accuracy_limits
from .texts import flat, is_number, percent, seconds_text

if TYPE_CHECKING:
    import optuna
    import plotly.graph_objects as go

    from capszoo.explore import Solution

# matplotlib's colours, so that a name looks the same here and in the figures of capszoo.figures.
_COLORS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
)  # fmt: skip
# Bars that are wide enough for an accuracy above each.
_MOST_TEXTS = 20
_MARKED = "Triangles lie below the axis, and a double-click shows all"
# Readable on white and on black, until the page's script knows which it is.
_INK, _GRID = "#777", "rgba(128, 128, 128, 0.25)"


def draw_figures(
    solutions: Sequence["Solution"],
    front: Sequence["Solution"],
    objectives: Sequence[str],
    study: "optuna.Study | None",
    compared: Sequence["Solution"] | None = None,
) -> dict[str, tuple[str, str, "go.Figure"]]:
    """The figures with something to show, each with a heading and a line of explanation."""
    complete = [solution for solution in solutions if solution.state == "complete"]
    if not complete:
        return {}
    colors = {solution.name: "" for solution in sorted(solutions, key=lambda solution: solution.number)}
    colors = {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(colors)}
    found = {}
    if study is not None and len(objectives) in (2, 3) and compared is None:  # Optuna knows of single runs alone
        measured = [(s.name, s.accuracy) for s in complete if is_number(s.accuracy)]
        note = "Optuna's figure of the study." + (
            _below(measured, "Below the axis") if "accuracy" in objectives else ""
        )
        found["pareto"] = "The front over all objectives", note, _pareto(study, solutions, objectives)
    shown_points = complete if compared is None else compared
    points = [s for s in shown_points if is_number(s.accuracy) and is_number(s.seconds) and s.seconds > 0]
    if points:
        note = (
            "The area of a point is the number of parameters; points with an outline are on the front."
            f"{'' if compared is None else ' They are means over the runs of different seeds.'}"
            f"{_below([(point.name, point.accuracy) for point in points], _MARKED)}"
        )
        found["tradeoff"] = "Accuracy, time and size", note, _tradeoff(points, front, colors)
    runs = [solution for solution in solutions if solution.history and solution.state not in ("failed", "interrupted")]
    if runs:
        note = "The best trial of each name in bold; the other ones can be switched on and off in the legend."
        best = _best_of_names(runs, colors)
        shown = [accuracy for run in best.values() for _, _, accuracy in run.history]
        note += _below([(name, _best(run)) for name, run in best.items()], _MARKED, shown)
        found["epochs"] = "Accuracy over epochs", note, _curves(runs, colors, 0, "epoch")
        found["time"] = "Accuracy over training time", note, _curves(runs, colors, 1, "training time, s")
    timed = [solution for solution in complete if is_number(solution.seconds_to_best)]
    if timed:
        note = "Training time until the epoch with the best accuracy, a bar for each complete trial with its number."
        found["best"] = "Time to the best accuracy", note, _time_to_best(timed, colors)
    return found


def _pareto(study: "optuna.Study", solutions: Sequence["Solution"], objectives: Sequence[str]) -> "go.Figure":
    """Optuna's figure, in the dress of the others, its hover text without the histories that its trials carry."""
    from optuna.visualization import plot_pareto_front

    figure = plot_pareto_front(study, target_names=list(objectives))
    hovers = {str(solution.number): _hover(solution) for solution in solutions}
    for trace in figure.data:
        numbers = [re.search(r'"number": (\d+)', text) for text in trace.text or ()]
        trace.text = [hovers.get(number[1], "") if number else "" for number in numbers]
        is_front = "Best" in (trace.hovertemplate or "")
        trace.hovertemplate = "%{text}<extra></extra>"
        # Optuna's colours are the numbers of the trials, and the bars that explain them half as wide as a phone.
        size = 6 if trace.type == "scatter3d" else 10
        trace.marker = {"size": size, "color": _COLORS[3] if is_front else "#8795a8", "opacity": 1 if is_front else 0.6}
        trace.name = "Pareto front" if is_front else "complete trials"
        trace.showlegend = True
    _dress(figure, height=600 if len(objectives) == 3 else 480)
    figure.update_layout(title=None, showlegend=True)
    complete = [solution for solution in solutions if solution.state == "complete"]
    accuracies = [solution.accuracy for solution in complete if is_number(solution.accuracy)]
    times = [solution.seconds for solution in complete if is_number(solution.seconds) and solution.seconds > 0]
    for letter, objective in zip("xyz", objectives, strict=False):
        axis: dict[str, Any] = {"title": {"text": objective}}
        if objective == "accuracy" and accuracies:
            axis |= {"range": accuracy_limits(accuracies), "tickformat": ".4~p"}
        if objective == "seconds" and times:
            axis |= {"type": "log", **_time_ticks(times)}
        if len(objectives) == 3:
            wall = {"showbackground": False, "gridcolor": "#9b9b9b", "zeroline": False, "color": _INK}
            figure.update_layout({f"scene.{letter}axis": {**wall, **axis}})
        else:
            figure.update_layout({f"{letter}axis": axis})
    camera = {"eye": {"x": 1.55, "y": 1.55, "z": 0.75}, "center": {"x": 0, "y": 0, "z": -0.12}}
    figure.update_scenes(aspectmode="cube", camera=camera)
    return figure


def _tradeoff(points: Sequence["Solution"], front: Sequence["Solution"], colors: dict[str, str]) -> "go.Figure":
    import plotly.graph_objects as go

    marked = {solution.number for solution in front}
    largest = max((s.parameters for s in points if is_number(s.parameters)), default=0) or 1
    figure = go.Figure()
    sizes = []
    for name in colors:
        # Large ones first: small ones must not lie beneath them.
        group = [solution for solution in points if solution.name == name]
        group.sort(key=lambda solution: (solution.number in marked, -(solution.parameters or 0)))
        if not group:
            continue
        sizes.append([solution.parameters if is_number(solution.parameters) else None for solution in group])
        figure.add_scatter(
            x=[solution.seconds for solution in group],
            y=[solution.accuracy for solution in group],
            mode="markers",
            legendgroup=_label(name),
            showlegend=False,
            hovertext=[_hover(solution) for solution in group],
            hoverinfo="text",
            marker={
                "color": colors[name],
                "size": [max(30 * math.sqrt((size or 0) / largest), 7) for size in sizes[-1]],
                "opacity": [0.9 if solution.number in marked else 0.35 for solution in group],
                "line": {"color": _INK, "width": [2.5 if solution.number in marked else 0 for solution in group]},
            },
        )
    names, drawn = [trace.marker.color for trace in figure.data], list(range(len(figure.data)))
    # A legend takes the first point's opacity: it gets points of its own.
    for trace in list(figure.data):
        spot = {"size": 10, "color": trace.marker.color}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=trace.legendgroup, marker=spot,
                           legendgroup=trace.legendgroup)  # fmt: skip
    scale = {"colorscale": "Viridis", "colorbar": {"title": {"text": "parameters"}, "thickness": 12, "outlinewidth": 0}}
    buttons = [
        {"label": "colour: name", "method": "update",
         "args": [{"marker.color": names, "marker.coloraxis": [None] * len(names)}, {"coloraxis.showscale": False},
                  drawn]},
        {"label": "colour: parameters", "method": "update",
         "args": [{"marker.color": sizes, "marker.coloraxis": ["coloraxis"] * len(names)},
                  {"coloraxis.showscale": True}, drawn]},
    ]  # fmt: skip
    _dress(figure, height=520)
    place = {"x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"}
    figure.update_layout(
        margin_t=72,  # the buttons under plotly's own
        coloraxis={**scale, "showscale": False},
        updatemenus=[{"type": "buttons", "direction": "right", "buttons": buttons, "showactive": False, **place,
                      "font": {"size": 12}, "bordercolor": _GRID}],
    )  # fmt: skip
    figure.update_xaxes(type="log", title_text="training time, s", **_time_ticks([point.seconds for point in points]))
    accuracies = [point.accuracy for point in points]
    _accuracy_axis(figure, accuracies)
    bottom = accuracy_limits(accuracies)[0]
    for name in colors:
        below = [point for point in points if point.name == name and point.accuracy < bottom]
        _mark_below(figure, colors[name], [(math.log10(point.seconds), _hover(point)) for point in below])
    return figure


def _curves(runs: Sequence["Solution"], colors: dict[str, str], column: int, label: str) -> "go.Figure":
    """Accuracy over one column of the histories, a line for each trial."""
    import plotly.graph_objects as go

    figure, best = go.Figure(), _best_of_names(runs, colors)
    # Lines that are drawn later lie on top: all others first.
    legend = True
    for name in colors:
        for run in runs:
            if run.name == name and run is not best[name]:
                shown = {"legendgroup": "others", "name": "other trials", "showlegend": legend, "opacity": 0.3}
                _add_curve(figure, run, column, colors[name], 1, **shown)
                legend = False
    for name, run in best.items():
        _add_curve(figure, run, column, colors[name], 3, name=_label(name))
    _dress(figure, height=460)
    figure.update_xaxes(title_text=label, rangemode="tozero")
    shown = [accuracy for run in best.values() for _, _, accuracy in run.history]
    _accuracy_axis(figure, shown)
    bottom = accuracy_limits(shown)[0]
    for name, run in best.items():
        points = [(point[column], point[2]) for point in run.history if point[2] < bottom]
        _mark_below(figure, colors[name], [(x, f"{_label(name)}: {percent(value)}") for x, value in points])
    return figure


def _best_of_names(runs: Sequence["Solution"], names: Iterable[str]) -> dict[str, "Solution"]:
    """The trial that stands for each name: an unfinished one only where nothing else can."""
    groups = {name: [run for run in runs if run.name == name] for name in names}
    return {
        name: max(group, key=lambda run: (run.state == "complete", _best(run), -run.number))
        for name, group in groups.items()
        if group
    }


def _mark_below(figure: "go.Figure", color: str, points: Sequence[tuple[float, str]]) -> None:
    """Triangles at the lower end of the axis of accuracies: places, and what is shown of them."""
    for x, text in points:
        figure.add_annotation(
            x=x, y=0, yref="y domain", text="\u25bc", showarrow=False, yanchor="bottom", font={"color": color},
            hovertext=text, captureevents=True,
        )  # fmt: skip


def _below(accuracies: Sequence[tuple[str, float]], lead: str, shown: Sequence[float] | None = None) -> str:
    """A sentence that names what lies below an axis of accuracies, escaped; empty where nothing does."""
    if not accuracies:
        return ""
    bottom = accuracy_limits([value for _, value in accuracies] if shown is None else shown)[0]
    lowest: dict[str, list[float]] = {}
    for name, value in accuracies:
        if value < bottom:
            lowest.setdefault(name, []).append(value)
    if not lowest:
        return ""
    named = [
        f"{escape(name) or '(no name)'} ({', '.join(map(percent, sorted(values)[:3]))}{', ...' * (len(values) > 3)})"
        for name, values in lowest.items()
    ]
    return f" {lead}: {'; '.join(named)}."


def _add_curve(figure: "go.Figure", run: "Solution", column: int, color: str, width: int, **options: Any) -> None:
    figure.add_scatter(
        x=[point[column] for point in run.history],
        y=[point[2] for point in run.history],
        mode="lines" if len(run.history) > 1 else "markers",
        line={"color": color, "width": width},
        marker={"color": color, "size": 3 + 2 * width},
        hovertext=[
            f"<b>trial {run.number}</b> {_label(run.name)}<br>"
            f"epoch {epoch}, {seconds_text(seconds)} s: {percent(accuracy)}"
            for epoch, seconds, accuracy in run.history
        ],
        hoverinfo="text",
        **options,
    )


def _time_to_best(timed: Sequence["Solution"], colors: dict[str, str]) -> "go.Figure":
    """Bars side by side, grouped by name; numbers beside them only as long as they can be read."""
    import plotly.graph_objects as go

    figure, ticks, start = go.Figure(), {}, 0
    for name in colors:
        group = sorted((s for s in timed if s.name == name), key=lambda solution: solution.seconds_to_best)
        if group:
            accuracies = [solution.accuracy for solution in group if is_number(solution.accuracy)]
            best = f"<br>best {percent(max(accuracies))}" if accuracies and len(timed) > _MOST_TEXTS else ""
            ticks[start + (len(group) - 1) / 2] = _label(name) + best
            figure.add_bar(
                x=[start + index for index in range(len(group))],
                y=[solution.seconds_to_best for solution in group],
                marker={"color": colors[name], "line": {"width": 0}},
                name=_label(name),
                text=[_above_bar(solution, len(timed)) for solution in group] if len(timed) <= 40 else None,
                textposition="outside",
                textangle=0,
                cliponaxis=False,
                hovertext=[_hover(solution) for solution in group],
                hoverinfo="text",
            )
            start += len(group) + 1
    _dress(figure, height=460)
    figure.update_layout(showlegend=False, bargap=0.15)
    figure.update_xaxes(tickvals=list(ticks), ticktext=list(ticks.values()), showgrid=False, zeroline=False)
    figure.update_xaxes(ticklabeloverflow="allow")
    figure.update_yaxes(title_text="training time, s", rangemode="tozero")
    return figure


def _above_bar(solution: "Solution", count: int) -> str:
    """Number of a trial, and its accuracy where bars are wide enough for that."""
    if count > _MOST_TEXTS or not is_number(solution.accuracy):
        return str(solution.number)
    return f"{solution.number}<br>{100 * solution.accuracy:.4g}&#8239;%"


def _dress(figure: "go.Figure", height: int) -> None:
    """Make a figure fit the page, light or dark, wide or narrow."""
    import plotly.graph_objects as go

    clear = "rgba(0, 0, 0, 0)"
    figure.update_layout(
        template=go.layout.Template(),
        height=height,
        autosize=True,
        font={"family": "system-ui, sans-serif", "size": 13, "color": _INK},
        paper_bgcolor=clear,
        plot_bgcolor=clear,
        margin={"l": 60, "r": 12, "t": 40, "b": 50},
        hovermode="closest",
        hoverlabel={"align": "left", "font": {"size": 12}},
        legend={"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "x": 0, "itemsizing": "constant"},
        modebar={"bgcolor": clear, "color": _INK, "activecolor": _COLORS[0]},
    )
    axis = {"gridcolor": _GRID, "zerolinecolor": _GRID, "linecolor": _GRID, "automargin": True}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)


def _accuracy_axis(figure: "go.Figure", values: Sequence[float]) -> None:
    values = [value for value in values if is_number(value)]
    figure.update_yaxes(title_text="validation accuracy", tickformat=".4~p")
    if values:
        figure.update_yaxes(range=accuracy_limits(values))


def _time_ticks(values: Sequence[float]) -> dict[str, Any]:
    """Ticks of a logarithmic axis of times at 1, 2 and 5; plotly's own where these would be too few."""
    low, high = min(values) / 1.2, max(values) * 1.2
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) < 3:
        return {}
    return {"tickvals": ticks, "ticktext": [f"{tick:,.12g}" for tick in ticks]}


def _hover(solution: "Solution") -> str:
    lines = [f"<b>trial {solution.number}</b> {_label(solution.name)}"]
    if is_number(solution.accuracy):
        lines.append(f"accuracy {percent(solution.accuracy)}")
    if is_number(solution.seconds):
        best = f", best after {seconds_text(solution.seconds_to_best)} s" if is_number(solution.seconds_to_best) else ""
        lines.append(f"{seconds_text(solution.seconds)} s{best}")
    if is_number(solution.parameters):
        lines.append(f"{solution.parameters:,} parameters")
    lines += [f"{_escape_label(key)}: {_escape_label(value)}" for key, value in flat(solution.options)]
    return "<br>".join(lines)


def _label(name: str) -> str:
    return _escape_label(name) if name else "(no name)"


def _escape_label(text: str) -> str:
    """Escape text for a label of plotly, which reads some tags and turns newlines into breaks."""
    return escape(" ".join(text.split()), quote=False)


def _best(run: "Solution") -> float:
    return max(point[2] for point in run.history)
