"""What figures share: colours, axes, legends, and how they are written. matplotlib is imported when they are drawn."""

import functools
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capszoo.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from capszoo.explore import Solution

_logger = logging.getLogger(__name__)


def accuracy_limits(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis for accuracies.

    It begins a little below the lower quartile: a few poor trials, or the first epochs, would squash what is compared.
    """
    ordered = sorted(values)
    quartile, best = ordered[len(ordered) // 4], ordered[-1]
    low = max(ordered[0], quartile - (best - quartile) / 2)
    margin = max(0.06 * (best - low), 0.001)
    return low - margin, best + margin


def make_figure(width: float, height: float = 4.0) -> "Figure":
    """An empty figure of so many inches, without pyplot's global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('figures need matplotlib: pip install "capszoo[train]"') from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: str | Path) -> None:
    """Write a figure as a PNG file."""
    data = png(figure, dpi=150)
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def png(figure: "Figure", dpi: int) -> bytes:
    """A figure as the bytes of a PNG file; its texts take what matplotlib's own font lacks from installed ones."""
    from matplotlib import font_manager
    from matplotlib.text import Text

    known = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    texts: list[Any] = figure.findobj(Text)
    lacking = {c for text in texts for c in text.get_text() if c.isprintable() and not known.get_char_index(ord(c))}
    families = _families_with(frozenset(lacking)) if lacking else []
    for text in texts:
        if lacking.intersection(text.get_text()):
            text.set_fontfamily([*text.get_fontfamily(), *families])
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # told by `_families_with`
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


@functools.cache
def _families_with(characters: frozenset[str]) -> list[str]:
    """Families of installed fonts that have these characters, as far as there are any."""
    from matplotlib import font_manager

    families, left = [], {ord(c) for c in characters}
    for entry in font_manager.fontManager.ttflist:
        if not left:
            break
        try:
            font = font_manager.get_font(entry.fname)
        except (OSError, RuntimeError):
            continue
        found = {c for c in left if font.get_char_index(c)}
        if found and "last resort" not in entry.name.lower():  # which has a box for each
            families.append(entry.name)
            left -= found
    if left:
        shown = "".join(sorted(map(chr, left)))[:20]
        _logger.warning(f"no font here has {shown}: figures show boxes; install one, such as Noto Sans CJK")
    return families


def number(row: dict[str, Any], key: str) -> float | None:
    """A value as a number, None where it is missing."""
    try:
        value = float(row.get(key, ""))
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def literal(name: str) -> str:
    """A name as matplotlib shows it: what stands between two dollar signs would be typeset as mathematics."""
    return (name or "(no name)").replace("$", r"\$")


def complete_with(solutions: Iterable["Solution"], *keys: str) -> list["Solution"]:
    """The complete trials that have all these values."""
    return [s for s in solutions if s.state == "complete" and all(number(vars(s), key) is not None for key in keys)]


def colors_of(solutions: Iterable["Solution"]) -> dict[str, str]:
    """A colour for each name, the same in all figures of an exploration."""
    names = dict.fromkeys(solution.name for solution in sorted(solutions, key=lambda solution: solution.number))
    return {name: f"C{index % 10}" for index, name in enumerate(names)}


def accuracy_axis(axes: "Axes", values: Sequence[float]) -> float:
    """Set up the axis of accuracies; return its lower end."""
    axes.set_ylim(*accuracy_limits(values))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.6g} %")
    axes.grid(alpha=0.3)
    return axes.get_ylim()[0]


def log_axis(axes: "Axes", values: Sequence[float], write: Callable[[float], str]) -> None:
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


def plainly(value: float) -> str:
    """A number for a tick."""
    return f"{value:,.12g}"


def in_millions(value: float) -> str:
    """A count for a tick, in thousands or millions."""
    return f"{value / 1e6:.4g} M" if value >= 1e6 else f"{value / 1e3:.4g} k" if value >= 1e3 else f"{value:.4g}"


def name_legend(solutions: Sequence["Solution"], colors: dict[str, str], marked: set[int], bottom: float) -> list:
    """Handles of a legend: a colour for each name, and what outlines and triangles mean."""
    from matplotlib.lines import Line2D

    used = {solution.name for solution in solutions}
    spot = {"marker": "o", "linestyle": "", "markersize": 6}
    handles = [Line2D([], [], color=colors[name], label=literal(name), **spot) for name in colors if name in used]
    if any(solution.number in marked for solution in solutions):
        handles.append(Line2D([], [], color="none", markeredgecolor="black", label="Pareto front", **spot))
    if any(solution.accuracy < bottom for solution in solutions):
        handles.append(Line2D([], [], color="grey", label="below the axis", **{**spot, "marker": "v"}))
    return handles
