"""Time and memory of variants, as recipes/benchmark.py measures them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import style

if TYPE_CHECKING:
    pass


# Variants by the names of recipes/benchmark.py: line style, name in a legend, and marker.
_VARIANTS = {
    "fused": ("-", "capszoo", "o"),
    "plain": ("--", "plain PyTorch", "s"),
    "compiled": ("-.", "torch.compile", "^"),
    "none": (":", "without routing", "x"),
    "direct": ((0, (5, 1)), "direct convolutions", "v"),
    "reference": ((0, (1, 1)), "as public codes have it", "D"),
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
    _plot_by_batch_size(rows, path, "ratio_to_fused", tuple(_VARIANTS)[1:], "time / time of capszoo")


def plot_memory(rows: Iterable[dict[str, Any]], path: str | Path) -> None:
    """Draw the peak memory of each variant of routing, by batch size; arguments and errors as `plot_speedup`."""
    _plot_by_batch_size(rows, path, "peak_mib", tuple(_VARIANTS), "peak memory of a step, MiB")


def plot_layers(rows: Iterable[dict[str, Any]], path: str | Path) -> None:
    """Draw a stacked bar of the time of each layer for each model, with plain and with fused routing.

    Arguments and errors as `plot_speedup`.
    """
    times: dict[str, dict[tuple[str, str], float | None]] = {}
    for row in rows:
        value = style.number(row, "median_ms")
        if row.get("subject") == "layer":
            times.setdefault(row["model"], {})[row["layer"], row["variant"]] = value
    layers = list(dict.fromkeys(layer for found in times.values() for layer, _ in found))
    bars = {}
    for model, found in times.items():
        own = {layer for layer, _ in found}
        for variant in ("plain", "fused") if "routing" in own else ("fused",):
            # The layers around it are the same for every routing, and measured once.
            heights = [
                found.get((layer, variant if layer == "routing" else "fused")) if layer in own else 0.0
                for layer in layers
            ]
            # A bar without one of its layers, of which the optimizer is measured last, would be too short.
            if "optimizer" in own and None not in heights:
                bars[f"{model}\n{_VARIANTS[variant][1]}"] = heights
    if not bars:
        raise ValueError("there is nothing to draw: no rows of the subject 'layer' with all layers of a model")

    figure = style.make_figure(width=max(6.0, 1.3 * len(bars) + 2))
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
    style.save(figure, path)


def _plot_by_batch_size(
    rows: Iterable[dict[str, Any]], path: str | Path, column: str, variants: Sequence[str], label: str
) -> None:
    """A panel for each subject, a colour for each model, a line style for each variant."""
    points: dict[str, dict[tuple[str, str], dict[float, tuple[float, float]]]] = {}
    for row in rows:
        value, batch_size = style.number(row, column), style.number(row, "batch_size")
        subject, variant = row.get("subject"), row.get("variant")
        if subject not in _SUBJECTS or variant not in variants or not value or not batch_size:
            continue
        if subject == "routing" and row.get("precision") != "float32":
            continue
        # Where a step was timed both with and without a CUDA graph, the graph is how models train.
        line = points.setdefault(subject, {}).setdefault((row["model"], variant), {})
        graph = style.number(row, "graph") or 0.0
        if graph >= line.get(batch_size, (0.0, 0.0))[0]:
            line[batch_size] = graph, value
    if not points:
        raise ValueError(f"there is nothing to draw: no rows of {', '.join(_SUBJECTS)} with a value of {column!r}")

    subjects = [subject for subject in _SUBJECTS if subject in points]
    models = list(dict.fromkeys(model for lines in points.values() for model, _ in lines))
    used = [variant for variant in variants if any(variant == v for lines in points.values() for _, v in lines)]
    figure = style.make_figure(width=4.0 * len(subjects) + 2)
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
    style.save(figure, path)


def _legend(models: Sequence[str], variants: Sequence[str]) -> list:
    from matplotlib.lines import Line2D

    colors = [Line2D([], [], color=f"C{index}", label=model) for index, model in enumerate(models)]
    styles = []
    for variant in variants:
        line, label, marker = _VARIANTS[variant]
        styles.append(Line2D([], [], color="grey", linestyle=line, marker=marker, markersize=4, label=label))
    return colors + styles
