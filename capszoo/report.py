"""The report of an exploration: one HTML file that needs nothing else, no network either.

plotly.js is inside the file, and a content security policy keeps the page from loading anything. plotly and optuna are
imported only when a report is written. Names, options and reasons come from users and are escaped wherever they are
shown; plotly escapes what it writes into scripts, and reads a few tags in the labels of figures.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_atomically
from .plots import accuracy_limits

if TYPE_CHECKING:
    import optuna
    import plotly.graph_objects as go

    from .explore import Solution

__all__ = ["write_report"]

# matplotlib's colours, so that a name looks the same here and in the figures of capszoo.plots.
_COLORS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
)  # fmt: skip
# Readable on white and on black, until the page's script knows which it is.
_INK, _GRID = "#777", "rgba(128, 128, 128, 0.25)"
_BETTER = {"accuracy": "high accuracy", "seconds": "short training time", "parameters": "few parameters"}
_COLUMNS = (
    "trial", "name", "state", "accuracy", "test", "seconds", "to best, s", "parameters", "best epoch", "options",
    "reason", "folder",
)  # fmt: skip
_FRONT_COLUMNS = ("trial", "name", "accuracy", "test", "seconds", "to best, s", "parameters", "best epoch", "options")


def write_report(
    path: str | Path,
    solutions: Sequence["Solution"],
    front: Sequence["Solution"],
    *,
    title: str,
    facts: dict[str, str],
    objectives: Sequence[str],
    study: "optuna.Study | None" = None,
    command: str = "",
) -> None:
    """Write what an exploration found as one HTML file: the front, interactive figures, every trial.

    Args:
        path: HTML file to write; its folder must exist.
        solutions: All trials.
        front: Those of them that are Pareto-optimal, in the order to list them.
        title: Heading of the page.
        facts: Names and values to show on top: the model, the data set, the machine.
        objectives: Names of the objectives, in the study's order.
        study: The Optuna study, for Optuna's own figure of the front where there are two or three objectives.
        command: What trains the chosen solution.

    Raises:
        ImportError: If plotly is not installed.
    """
    try:
        import plotly.io
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ImportError('reports need plotly: pip install "capszoo[explore]"') from None

    figures = _figures(solutions, front, objectives, study)
    common = _common(solutions)
    parts = [_head(title, solutions, front, facts, objectives, common)]
    if front:
        count = f"{len(front)} of the complete trials" if len(front) > 1 else "one complete trial"
        note = f"No other trial is at least as good in everything that was asked for and better in something: {count}."
        parts.append(f"<h2>Pareto front</h2><p>{note}</p>{_table(front, _FRONT_COLUMNS, common)}")
    if command:
        parts.append(f"<h2>Train the chosen solution</h2><pre><code>{escape(command)}</code></pre>")
    if figures:
        parts.append(f"<script>{get_plotlyjs()}</script>")
    if not any(solution.state == "complete" for solution in solutions):
        parts.append("<p class=empty>No trial is complete yet: there is nothing to draw.</p>")
    for name, (heading, note, figure) in figures.items():
        drawn = plotly.io.to_html(
            figure, full_html=False, include_plotlyjs=False, div_id=name, default_height=f"{figure.layout.height}px",
            config={"responsive": True, "displaylogo": False},
        )  # fmt: skip
        parts.append(f"<h2>{heading}</h2><p>{note}</p><div class=figure>{drawn}</div>")
    parts.append("<h2>All trials</h2>")
    if solutions:
        marked = {solution.number for solution in front}
        parts.append("<p>A click on a heading sorts by it. Trials of the front have a bar at their left.</p>")
        parts.append(_table(sorted(solutions, key=lambda solution: solution.number), _COLUMNS, common, marked))
    else:
        parts.append("<p class=empty>There is no trial yet.</p>")
    page = _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(parts), script=_SCRIPT)
    # Names of files may hold what is no UTF-8.
    data = page.encode("utf-8", "backslashreplace")
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(data))


def _head(
    title: str,
    solutions: Sequence["Solution"],
    front: Sequence["Solution"],
    facts: dict[str, str],
    objectives: Sequence[str],
    common: set[tuple[str, str]],
) -> str:
    rows = [f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>" for name, value in facts.items()]
    wanted = ", ".join(_BETTER.get(objective, escape(objective)) for objective in objectives)
    rows.append(f"<tr><th>objectives</th><td>{wanted}</td></tr>")
    states = [solution.state for solution in solutions]
    counts = [f"{states.count(state)} {escape(state)}" for state in dict.fromkeys(sorted(states))]
    trials = f"{len(states)} ({', '.join(counts)}), {len(front)} on the front" if states else "0"
    rows.append(f"<tr><th>trials</th><td>{trials}</td></tr>")
    if common:
        options = [pair for pair in _flat(next(s.options for s in solutions if s.options)) if pair in common]
        rows.append(f"<tr><th>in all trials</th><td>{_short(options)}</td></tr>")
    return f"<h1>{escape(title)}</h1><table class=facts>{''.join(rows)}</table>"


def _common(solutions: Sequence["Solution"]) -> set[tuple[str, str]]:
    """Options that are the same in all trials that have any: they are said once."""
    options = [set(_flat(solution.options)) for solution in solutions if solution.options]
    return set.intersection(*options) if len(options) > 1 else set()


def _table(
    solutions: Sequence["Solution"],
    columns: Sequence[str],
    common: set[tuple[str, str]],
    marked: set[int] | None = None,
) -> str:
    """Trials as a table; the one of all trials is given what to mark, and its rows are what the page can point to."""
    rows = []
    for solution in solutions:
        cells = "".join(_cell(solution, column, common, link=marked is None) for column in columns)
        if marked is None:
            rows.append(f"<tr>{cells}</tr>")
        else:
            number, kind = solution.number, " class=front" if solution.number in marked else ""
            rows.append(f'<tr id="trial-{number}" data-trial="{number}"{kind}>{cells}</tr>')
    heads = "".join(f"<th scope=col><button type=button>{column}</button></th>" for column in columns)
    return (
        f"<div class=wide><table class=sortable><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(solution: "Solution", column: str, common: set[tuple[str, str]], link: bool) -> str:
    """A cell: as text what is read, as data-value what is sorted by."""
    number, name = solution.number, escape(solution.name)
    shown: tuple[str, Any]
    if column == "trial":
        shown = (f'<a href="#trial-{number}">{number}</a>' if link else str(number), number)
    elif column == "name":
        shown = (name, solution.name)
    elif column == "state":
        shown = (f'<span class="state {escape(solution.state)}">{escape(solution.state)}</span>', solution.state)
    elif column == "options":
        # What all trials have is said above, and the policy mostly in the name.
        left_out = common | {("policy", solution.name)}
        shown = (_short([pair for pair in _flat(solution.options) if pair not in left_out]), "")
    elif column == "reason":
        shown = (escape(solution.reason), solution.reason)
    elif column == "folder":
        shown = (f"<code>{escape(solution.folder)}</code>" if solution.folder else "", solution.folder)
    else:
        key, form = {
            "accuracy": ("accuracy", _percent), "test": ("test_top1", _percent), "seconds": ("seconds", _seconds),
            "to best, s": ("seconds_to_best", _seconds), "parameters": ("parameters", "{:,}".format),
            "best epoch": ("best_epoch", str),
        }[column]  # fmt: skip
        value = getattr(solution, key)
        text, value = ("", "") if not _is_number(value) else (form(value), value)
        return f'<td class=number data-value="{value}">{text}</td>'
    kind = f' class="text {column}"' if column in ("options", "reason") else ""
    return f'<td{kind} data-value="{escape(str(shown[1]))}">{shown[0]}</td>'


def _figures(
    solutions: Sequence["Solution"],
    front: Sequence["Solution"],
    objectives: Sequence[str],
    study: "optuna.Study | None",
) -> dict[str, tuple[str, str, "go.Figure"]]:
    """The figures with something to show, each with a heading and a line of explanation."""
    complete = [solution for solution in solutions if solution.state == "complete"]
    if not complete:
        return {}
    colors = {solution.name: "" for solution in sorted(solutions, key=lambda solution: solution.number)}
    colors = {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(colors)}
    found = {}
    if study is not None and len(objectives) in (2, 3):
        note = "Optuna's figure of the study. The axis leaves out trials that are far less accurate than the others."
        found["pareto"] = "The front over all objectives", note, _pareto(study, solutions, objectives)
    points = [s for s in complete if _is_number(s.accuracy) and _is_number(s.seconds) and s.seconds > 0]
    if points:
        note = (
            "The area of a point is the number of parameters; points with an outline are on the front. The axis leaves "
            "out trials that are far less accurate than the others: a double-click shows all."
        )
        found["tradeoff"] = "Accuracy, time and size", note, _tradeoff(points, front, colors)
    runs = [solution for solution in solutions if solution.history and solution.state != "failed"]
    if runs:
        note = "The best trial of each name in bold; the other ones can be switched on and off in the legend."
        found["epochs"] = "Accuracy over epochs", note, _curves(runs, colors, 0, "epoch")
        found["time"] = "Accuracy over training time", note, _curves(runs, colors, 1, "training time, s")
    timed = [solution for solution in complete if _is_number(solution.seconds_to_best)]
    if timed:
        note = "Training time until the epoch with the best accuracy, a bar for each complete trial."
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
    accuracies = [solution.accuracy for solution in complete if _is_number(solution.accuracy)]
    times = [solution.seconds for solution in complete if _is_number(solution.seconds) and solution.seconds > 0]
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
    largest = max((s.parameters for s in points if _is_number(s.parameters)), default=0) or 1
    figure = go.Figure()
    sizes = []
    for name in colors:
        # Large ones first: small ones must not lie beneath them.
        group = [solution for solution in points if solution.name == name]
        group.sort(key=lambda solution: (solution.number in marked, -(solution.parameters or 0)))
        if not group:
            continue
        sizes.append([solution.parameters if _is_number(solution.parameters) else None for solution in group])
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
    _accuracy_axis(figure, [point.accuracy for point in points])
    return figure


def _curves(runs: Sequence["Solution"], colors: dict[str, str], column: int, label: str) -> "go.Figure":
    """Accuracy over one column of the histories, a line for each trial."""
    import plotly.graph_objects as go

    figure = go.Figure()
    best: dict[str, Solution] = {}
    for name in colors:
        group = [run for run in runs if run.name == name]
        # An unfinished trial stands for its name only where nothing else can.
        leader = max(group, key=lambda run: (run.state == "complete", _best(run), -run.number), default=None)
        if leader is not None:
            best[name] = leader
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
    _accuracy_axis(figure, [accuracy for run in best.values() for _, _, accuracy in run.history])
    return figure


def _add_curve(figure: "go.Figure", run: "Solution", column: int, color: str, width: int, **options: Any) -> None:
    figure.add_scatter(
        x=[point[column] for point in run.history],
        y=[point[2] for point in run.history],
        mode="lines" if len(run.history) > 1 else "markers",
        line={"color": color, "width": width},
        marker={"color": color, "size": 3 + 2 * width},
        hovertext=[
            f"<b>trial {run.number}</b> {_label(run.name)}<br>"
            f"epoch {epoch}, {_seconds(seconds)} s: {_percent(accuracy)}"
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
            ticks[start + (len(group) - 1) / 2] = _label(name)
            figure.add_bar(
                x=[start + index for index in range(len(group))],
                y=[solution.seconds_to_best for solution in group],
                marker={"color": colors[name], "line": {"width": 0}},
                name=_label(name),
                text=[str(solution.number) for solution in group] if len(timed) <= 40 else None,
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
    values = [value for value in values if _is_number(value)]
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
    if _is_number(solution.accuracy):
        lines.append(f"accuracy {_percent(solution.accuracy)}")
    if _is_number(solution.seconds):
        best = f", best after {_seconds(solution.seconds_to_best)} s" if _is_number(solution.seconds_to_best) else ""
        lines.append(f"{_seconds(solution.seconds)} s{best}")
    if _is_number(solution.parameters):
        lines.append(f"{solution.parameters:,} parameters")
    lines += [f"{_escape_label(key)}: {_escape_label(value)}" for key, value in _flat(solution.options)]
    return "<br>".join(lines)


def _short(options: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{escape(key)}&nbsp;<b>{escape(value)}</b>" for key, value in options)


def _flat(options: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Options as pairs of strings, those of the model among the others."""
    for key, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value)
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield str(key), text if len(text) <= 80 else text[:79] + "…"


def _label(name: str) -> str:
    return _escape_label(name) if name else "(no name)"


def _escape_label(text: str) -> str:
    """Escape text for a label of plotly, which reads some tags and turns newlines into breaks."""
    return escape(" ".join(text.split()), quote=False)


def _best(run: "Solution") -> float:
    return max(point[2] for point in run.history)


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)


# The policy is what keeps the promise of a file that loads nothing; plotly saves its images through blob: and data:.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
 script-src 'unsafe-inline'; img-src data: blob:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root { --ink: #1c1e21; --soft: #5f6570; --line: #d9dde3; --page: #fff; --band: #f5f6f8; --accent: #1f77b4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e5e8; --soft: #9aa1ac; --line: #363b43; --page: #16181c; --band: #1f2228; --accent: #6db3e8; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .3rem; }
p { margin: 0 0 .7rem; color: var(--soft); }
p.empty { padding: 1rem; background: var(--band); border-radius: 6px; margin-top: 2rem; }
a { color: var(--accent); }
pre { overflow-x: auto; padding: .8rem 1rem; background: var(--band); border-radius: 6px; }
code { font: .9em ui-monospace, Menlo, Consolas, monospace; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.facts th { text-align: left; font-weight: 500; color: var(--soft); padding: .1rem 1.2rem .1rem 0; }
.facts th, .facts td { vertical-align: top; }
.facts td { overflow-wrap: anywhere; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
.sortable { width: 100%; font-size: 13px; line-height: 1.4; }
.sortable th { padding: 0; background: var(--band); text-align: left; white-space: nowrap; }
.sortable th button { all: unset; cursor: pointer; padding: .45rem .6rem; font-weight: 600; }
.sortable th button:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
.sortable th[aria-sort=ascending] button::after { content: " \\25B2"; font-size: .7em; }
.sortable th[aria-sort=descending] button::after { content: " \\25BC"; font-size: .7em; }
.sortable td { padding: .35rem .6rem; border-top: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
.sortable td.number { text-align: right; }
.sortable td.text { white-space: normal; overflow-wrap: anywhere; color: var(--soft); }
.sortable td.options { min-width: 20rem; }
.sortable td.reason:not(:empty) { min-width: 10rem; }
.sortable td.text b { font-weight: 500; color: var(--ink); }
tr.front td:first-child { box-shadow: inset 4px 0 var(--accent); font-weight: 600; }
tr:target td { background: var(--band); }
.state { padding: .05rem .5rem; border-radius: 1rem; background: var(--band); }
.state.complete { color: #2f8f4e; } .state.failed { color: #d64545; } .state.stopped { color: #b9770e; }
"""

_SCRIPT = """
"use strict";
for (const table of document.querySelectorAll(".sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const value = row => row.cells[column].dataset.value || row.cells[column].textContent;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // what is missing comes last, either way
      return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
    };
    body.append(...[...body.rows].sort(compare));
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  }));
}
const dark = matchMedia("(prefers-color-scheme: dark)");
function paint() {
  const style = getComputedStyle(document.documentElement);
  const [ink, page] = ["--ink", "--page"].map(name => style.getPropertyValue(name).trim());
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    const change = {"font.color": ink};
    if (plot.layout.scene) for (const axis of ["xaxis", "yaxis", "zaxis"]) change[`scene.${axis}.color`] = ink;
    if (plot.layout.updatemenus) change["updatemenus[0].bgcolor"] = page;
    Plotly.relayout(plot, change);
    if (plot.id === "tradeoff") Plotly.restyle(plot, {"marker.line.color": ink});
  }
}
if (window.Plotly) {
  paint();
  dark.addEventListener("change", paint);
}
"""
