"""Figures of one network: its training, its answers, and what is inside. Each function returns a matplotlib figure."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from capszoo.report.findings import Curve, Shown

__all__ = [
    "draw_calibration",
    "draw_confusion",
    "draw_entropy",
    "draw_images",
    "draw_part_maps",
    "draw_robustness",
    "draw_sweep",
    "draw_training",
]

# More classes than this get no numbers in their confusion table, and only some names.
_MOST_CELLS = 20
# Of the largest coupling: what a picture of couplings shows at least on its scale.
_LEAST_RANGE = 0.005
# A name in the title of a small picture.
_MOST_LETTERS = 14


def draw_training(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Accuracy, loss, learning rate and batch size of each epoch.

    Args:
        rows: Of a run's `summary.csv`.

    Raises:
        ValueError: If there is none.
    """
    if not rows:
        raise ValueError("there is nothing to draw: no epoch is done")
    figure = style.make_figure(width=11.0, height=5.6)
    accuracy, loss, rate, batch = figure.subplots(2, 2, sharex=True).flatten()
    epochs = [style.number(dict(row), "epoch") for row in rows]
    marker = "o" if len(rows) == 1 else None

    def line(axes: "Axes", key: str, label: str | None = None, **how: Any) -> list[float]:
        values = [style.number(dict(row), key) for row in rows]
        if any(value is not None for value in values):
            drawn = [float("nan") if value is None else value for value in values]
            axes.plot(epochs, drawn, marker=marker, label=label, **how)
        return [value for value in values if value is not None]

    shown = line(accuracy, "eval_top1", "validation", color="C0")
    shown += line(accuracy, "train_top1", "training", color="C1", alpha=0.7)
    if shown:
        style.accuracy_axis(accuracy, shown)
    accuracy.set_title("accuracy", loc="left", fontsize=10)
    line(loss, "eval_loss", "validation", color="C0")
    line(loss, "train_margin_loss", "training", color="C1", alpha=0.7)
    loss.set_yscale("log")
    loss.set_title("loss of the scores", loc="left", fontsize=10)
    line(rate, "lr", color="C2")
    rate.set_yscale("log")
    rate.set_title("learning rate", loc="left", fontsize=10)
    line(batch, "batch_size", color="C3", drawstyle="steps-mid")
    batch.set_ylim(bottom=0)
    batch.set_title("images a step", loc="left", fontsize=10)
    for axes in (accuracy, loss):
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
    for axes in (loss, rate, batch):
        axes.grid(alpha=0.3)
    for axes in (rate, batch):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _show(axes: "Axes", pixels: Tensor) -> None:
    """An image ``[C, H, W]`` in [0, 1] without axes; of other numbers of channels than one and three, the first."""
    image = pixels.permute(1, 2, 0) if len(pixels) == 3 else pixels[0]
    axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_frame_on(False)


def draw_images(shown: Sequence["Shown"]) -> "Figure":
    """Images with what the network says of them, and below each what it draws."""
    rows = 2 if any(item.drawn is not None for item in shown) else 1
    figure = style.make_figure(width=max(3.0, 1.12 * len(shown)), height=0.85 + 1.1 * rows)
    grid = figure.subplots(rows, len(shown), squeeze=False)
    for column, item in enumerate(shown):
        _show(grid[0, column], item.pixels)
        answer = f"{_short(item.predicted)}\n{item.score:.2f}"
        wrong = item.truth is not None and item.truth != item.predicted
        title = f"{_short(item.truth)}\n\u2192 {answer}" if wrong and item.truth is not None else answer
        grid[0, column].set_title(title, fontsize=8, color="C3" if wrong else "black")
        if rows == 2:
            if item.drawn is not None:
                _show(grid[1, column], item.drawn)
            else:
                grid[1, column].set_axis_off()
    return figure


def _short(name: str) -> str:
    """A name, or its beginning and its end: such as `species 001` and `species 002` differ there alone."""
    half = _MOST_LETTERS // 2
    return style.literal(name if len(name) <= _MOST_LETTERS else f"{name[:half]}\u2026{name[1 - half :]}")


def draw_sweep(drawn: Tensor, values: Sequence[float]) -> "Figure":
    """Reconstructions of a capsule, each row with another of its numbers changed.

    Args:
        drawn: ``[D, V, C, H, W]``.
        values: The V changes.
    """
    dims, count, _, height, width = drawn.shape
    # One picture, with a line of white between: as many axes would take seconds to lay out.
    bordered = F.pad(drawn, (1, 1, 1, 1), value=1.0)
    mosaic = bordered.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    figure = style.make_figure(width=0.56 * count + 0.6, height=0.56 * dims * height / width + 0.5)
    axes = figure.subplots()
    _show(axes, mosaic)
    centers = (torch.arange(max(dims, count)) + 0.5).tolist()
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8)
    texts = [f"{value:+.2f}" if value else "0" for value in values]
    axes.set_xticks([center * (width + 2) for center in centers[:count]], texts)
    axes.set_yticks([center * (height + 2) for center in centers[:dims]], [*map(str, range(dims))])
    return figure


def draw_part_maps(shown: Sequence["Shown"], maps: Tensor, class_names: Sequence[str]) -> "Figure":
    """For each image and iteration, where the capsules are that vote for the predicted class.

    Args:
        shown: N images.
        maps: ``[R, N, J, H, W]``.
        class_names: Names of the J classes.
    """
    iterations = len(maps)
    figure = style.make_figure(width=1.6 * (iterations + 1) + 0.8, height=1.65 * len(shown) + 0.3)
    grid = figure.subplots(len(shown), iterations + 1, squeeze=False)
    indices = [list(class_names).index(item.predicted) for item in shown]
    looked_at = maps.sum(dim=2) > 0  # elsewhere nothing is laid over the image
    of_classes = [maps[:, number, index].where(looked_at[:, number], torch.nan) for number, index in enumerate(indices)]
    seen = torch.stack(of_classes)
    seen = seen[~seen.isnan()]
    low, high = (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 1.0)
    if high - low < _LEAST_RANGE * high:  # equal ones, of which rounding alone would fill the scale
        low, high = high * (1 - _LEAST_RANGE), high * (1 + _LEAST_RANGE)
    drawn = None
    for number, item in enumerate(shown):
        _show(grid[number, 0], item.pixels)
        grid[number, 0].set_title(f"{_short(item.predicted)} {item.score:.2f}", fontsize=9)
        for iteration in range(iterations):
            axes = grid[number, iteration + 1]
            _show(axes, item.pixels)
            drawn = axes.imshow(of_classes[number][iteration].numpy(), cmap="inferno", alpha=0.7, vmin=low, vmax=high)
            if number == 0:
                axes.set_title(f"iteration {iteration + 1}", fontsize=9)
    if drawn is not None:
        figure.colorbar(drawn, ax=grid, shrink=0.6, label="coupling with the predicted class")
    return figure


def draw_confusion(confusion: Tensor, class_names: Sequence[str]) -> "Figure":
    """Counts of true class by predicted class, each row coloured by its shares."""
    classes = len(class_names)
    side = min(9.0, 1.6 + 0.5 * classes)
    figure = style.make_figure(width=side + 1.0, height=side)
    axes = figure.subplots()
    shares = confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    # Mistakes are rare: on a linear scale all of them would be as white as nothing.
    axes.imshow(shares.sqrt().numpy(), cmap="Blues", vmin=0, vmax=1)
    step = -(-classes // 40)
    ticks = range(0, classes, step)
    names = [_short(class_names[tick]) for tick in ticks]
    axes.set_xticks(list(ticks), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=8)
    axes.set_yticks(list(ticks), names, fontsize=8)
    if classes <= _MOST_CELLS:
        for row in range(classes):
            for column in range(classes):
                if count := int(confusion[row, column]):
                    color = "white" if shares[row, column] > 0.3 else "black"
                    axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=color)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    return figure


def draw_calibration(bins: Sequence[tuple[float, float, int]]) -> "Figure":
    """Accuracy over the score of the predicted class, and how many images have such scores."""
    figure = style.make_figure(width=5.4, height=4.4)
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--", label="score = accuracy")
    scores, accuracies, numbers = zip(*bins, strict=True)
    axes.plot(scores, accuracies, "o-", color="C0", label="this network")
    axes.set_ylabel("accuracy")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.3)
    counts.bar(scores, numbers, width=0.06, color="C0", alpha=0.6)
    counts.set_yscale("log")
    counts.set_ylim(bottom=0.5)  # so that a single image shows
    counts.set_ylabel("images")
    counts.set_xlabel("score of the predicted class")
    counts.set_xlim(0, 1.02)
    return figure


def draw_robustness(robustness: Sequence["Curve"]) -> "Figure":
    """Accuracy over each change of the images."""
    figure = style.make_figure(width=11.0, height=3.2)
    for axes, curve in zip(figure.subplots(1, len(robustness), sharey=True, squeeze=False)[0], robustness, strict=True):
        axes.plot(curve.values, curve.accuracy, "o-", markersize=3.5, color="C0")
        axes.set_xlabel(curve.name)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
        axes.grid(alpha=0.3)
    return figure


def draw_entropy(entropy: Sequence[float]) -> "Figure":
    """Entropy of the couplings of each iteration over that of equal ones."""
    figure = style.make_figure(width=4.6, height=2.8)
    axes = figure.subplots()
    places = range(1, len(entropy) + 1)
    axes.bar(places, entropy, color="C4", alpha=0.7, width=0.6)
    for place, value in zip(places, entropy, strict=True):
        axes.annotate(
            f"{value:.3f}", (place, value), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=9
        )
    axes.set_xticks(list(places))
    axes.set_ylim(0, 1.12)
    axes.set_xlabel("iteration of routing")
    axes.set_ylabel("entropy of the couplings")
    return figure
