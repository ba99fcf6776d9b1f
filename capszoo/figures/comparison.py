"""The rows of a grid against the published figures."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import style

if TYPE_CHECKING:
    pass


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
    theirs = {row["name"]: style.number(row, "epochs") * style.number(row, "epoch_seconds") for row in published}
    ours = {row["name"]: style.number(row, "seconds_to_best") for row in rows}
    if not ours.get("baseline"):
        raise ValueError("there is nothing to draw: no row named 'baseline' with a time to its best accuracy")
    series: list[tuple[str, list[float | None], list[float | None], str]] = [
        ("paper: to its best accuracy", [], [], "0.75"),
        ("ours: to its best accuracy", [], [], "C0"),
        ("ours: to the baseline's best accuracy", [], [], "C2"),
    ]
    for row in rows:
        paper = theirs.get(row["name"])
        saving = style.number(row, "saving")
        values = (
            (None if paper is None or "baseline" not in theirs else paper / theirs["baseline"], None),
            (_share_to_best(row, ours), None),
            (None if saving is None else 1 - saving, style.number(row, "saving_std")),
        )
        for (_, times, spreads, _), (time, spread) in zip(series, values, strict=True):
            times.append(time)
            spreads.append(spread)

    figure = style.make_figure(width=8.5, height=1.4 + 0.62 * len(rows))
    axes = figure.subplots()
    for index, (label, times, spreads, color) in enumerate(series):
        if not any(time is not None for time in times):
            continue
        drawn = [(place, time, spread or 0.0) for place, (time, spread) in enumerate(zip(times, spreads, strict=True))
                 if time is not None]  # fmt: skip
        places = [place + 0.26 * (index - 1) for place, _, _ in drawn]
        errors = [spread for *_, spread in drawn]
        axes.barh(places, [time for _, time, _ in drawn], height=0.24, color=color, label=label,
                  xerr=errors if any(errors) else None, error_kw={"elinewidth": 1})  # fmt: skip
        for middle, (place, time, spread) in zip(places, drawn, strict=True):
            text = f"{100 * time:.0f} %"
            if index == 2 and style.number(rows[place], "reached") != style.number(rows[place], "runs"):
                text += f" ({rows[place]['reached']} of {rows[place]['runs']} runs)"
            axes.annotate(text, (time + spread, middle), xytext=(4, 0), textcoords="offset points", va="center",
                          fontsize=7)  # fmt: skip
        for place, time in enumerate(times):
            if time is None and index == 2:
                axes.annotate("not reached by any run", (0, place + 0.26), xytext=(4, 0), textcoords="offset points",
                              va="center", fontsize=7)  # fmt: skip
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [style.literal(row["name"]) for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.2)  # for the texts behind the bars
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlabel("training time, of the baseline's to its best accuracy")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    style.save(figure, path)


def _share_to_best(row: dict[str, Any], ours: dict[str, Any]) -> float | None:
    """Time to the best of a row over the baseline's with the same seeds."""
    share, time = style.number(row, "share_to_best"), ours[row["name"]]
    return share if share is not None or time is None else time / ours["baseline"]
