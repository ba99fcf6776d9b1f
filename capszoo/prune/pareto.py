"""Accuracy over size, before and after the training of each round."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capszoo.figures import style

PARETO_COLUMNS = (
    "round",
    "conv1",
    "types",
    "capsules",
    "decoder_1",
    "decoder_2",
    "parameters",
    "parameters_with_decoder",
    "macs",
    "routing_macs",
    "float32_bytes",
    "float16_bytes",
    "val_top1_before",  # after pruning, before the training of the round
    "val_loss_before",
    "val_top1",
    "val_loss",
    "best_epoch",
    "train_seconds",
)


def parameters_text(row: Mapping[str, Any]) -> str:
    """The parameters of a row, for people: those of the class scores, and all, as other commands count them."""
    own, everything = row["parameters"], row.get("parameters_with_decoder") or row["parameters"]
    return f"{own:,}" if own == everything else f"{own:,} ({everything:,} with the decoder)"


def plot_pareto(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw validation accuracy over size, a point a round, before and after its training.

    Args:
        rows: Rows of pareto.csv, of which round 0 is the given network, as numbers or as their texts.
        path: PNG file to write.

    Raises:
        ValueError: If a row lacks its size or accuracy.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    sizes = [float(row["float32_bytes"]) / 1e6 for row in rows]
    trained = [100 * float(row["val_top1"]) for row in rows]
    axes.plot(sizes, trained, "o-", label="trained after pruning")
    pruned = [100 * float(row["val_top1_before"]) for row in rows[1:]]
    axes.plot(sizes[1:], pruned, "x:", label="pruned")
    for row, *point in zip(rows, sizes, trained, strict=True):
        axes.annotate(str(row["round"]), point, xytext=(0, 6), textcoords="offset points", ha="center")
    if max(sizes) > 3 * min(sizes):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 4, 6, 8)))
        axes.xaxis.set_major_formatter(lambda size, _: f"{size:g}")
        axes.xaxis.set_minor_formatter(lambda size, _: f"{size:g}")
    axes.set_xlabel("weights without decoder, float32, MB")
    axes.set_ylabel("validation accuracy, %")
    axes.margins(y=0.15)
    axes.grid(alpha=0.3)
    axes.legend()
    style.save(figure, path)
