"""The report of an exploration: one HTML file that needs nothing else, no network either.

plotly.js is inside the file, and a content security policy keeps the page from loading anything. plotly and optuna are
imported only when a report is written. Names, options and reasons come from users and are escaped wherever they are
shown; plotly escapes what it writes into scripts, and reads a few tags in the labels of figures.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capszoo.files import write_atomically

from .interactive import draw_figures
from .template import PAGE, SCRIPT, STYLE
from .texts import flat, is_number, percent, seconds_text

if TYPE_CHECKING:
    import optuna

    from capszoo.explore import Solution

__all__ = ["write_report"]

_COLUMNS = (
    "trial", "name", "state", "accuracy", "test", "seconds", "to best, s", "parameters", "best epoch", "options",
    "reason", "folder",
)  # fmt: skip
_FRONT_COLUMNS = ("trial", "name", "accuracy", "test", "seconds", "to best, s", "parameters", "best epoch", "options")
_BETTER = {"accuracy": "high accuracy", "seconds": "short training time", "parameters": "few parameters"}


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
    cautions: Sequence[str] = (),
    compared: Sequence["Solution"] | None = None,
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
        cautions: Why the trials may be too few, too short or too alike to compare, from
            :func:`capszoo.explore.cautions`.
        compared: What the front was found among, where these are means over seeds; None for the trials themselves.

    Raises:
        ImportError: If plotly is not installed.
    """
    try:
        import plotly.io
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ImportError('reports need plotly: pip install "capszoo[explore]"') from None

    figures = draw_figures(solutions, front, objectives, study, compared)
    common = _common(solutions)
    parts = [_head(title, solutions, front, facts, objectives, common)]
    if cautions:
        lines = "".join(f"<li>{escape(line[:1].upper() + line[1:])}.</li>" for line in cautions)
        parts.append(f"<aside class=cautions><h2>Before you compare</h2><ul>{lines}</ul></aside>")
    if front:
        count = f"{len(front)} of the complete trials" if len(front) > 1 else "one complete trial"
        columns, repeated = list(_FRONT_COLUMNS), any(solution.runs > 1 for solution in front)
        if repeated:
            columns[columns.index("test") : columns.index("test")] = ["runs", "above baseline"]
        note = f"No other trial is at least as good in everything that was asked for and better in something: {count}."
        if repeated:
            note += (
                " Figures are means over the runs of different seeds; what lies above the baseline is the mean over "
                "pairs of equal seeds, with its 95 % confidence interval, in percent."
            )
        parts.append(f"<h2>Pareto front</h2><p>{note}</p>{_table(front, columns, common)}")
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
    page = PAGE.format(title=escape(title), style=STYLE, body="\n".join(parts), script=SCRIPT)
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
        options = [pair for pair in flat(next(s.options for s in solutions if s.options)) if pair in common]
        rows.append(f"<tr><th>in all trials</th><td>{_short(options)}</td></tr>")
    return f"<h1>{escape(title)}</h1><table class=facts>{''.join(rows)}</table>"


def _common(solutions: Sequence["Solution"]) -> set[tuple[str, str]]:
    """Options that are the same in all trials that have any: they are said once."""
    options = [set(flat(solution.options)) for solution in solutions if solution.options]
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
        shown = (_short([pair for pair in flat(solution.options) if pair not in left_out]), "")
    elif column == "above baseline":
        shown = (str(solution.gain or ""), solution.gain.mean if solution.gain else "")
    elif column == "reason":
        shown = (escape(solution.reason), solution.reason)
    elif column == "folder":
        shown = (f"<code>{escape(solution.folder)}</code>" if solution.folder else "", solution.folder)
    else:
        key, form = {
            "accuracy": ("accuracy", percent), "test": ("test_top1", percent), "seconds": ("seconds", seconds_text),
            "to best, s": ("seconds_to_best", seconds_text), "parameters": ("parameters", "{:,}".format),
            "best epoch": ("best_epoch", str), "runs": ("runs", str),
        }[column]  # fmt: skip
        value = getattr(solution, key)
        text, value = ("", "") if not is_number(value) else (form(value), value)
        if column == "accuracy" and solution.accuracy_std is not None:
            text += f" ± {100 * solution.accuracy_std:.2f}"
        return f'<td class=number data-value="{value}">{text}</td>'
    kind = f' class="text {column}"' if column in ("options", "reason") else ""
    return f'<td{kind} data-value="{escape(str(shown[1]))}">{shown[0]}</td>'


def _short(options: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{escape(key)}&nbsp;<b>{escape(value)}</b>" for key, value in options)
