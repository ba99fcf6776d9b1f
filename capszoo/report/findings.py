"""What is measured for a report, in one pass over the images and some more over a few of them."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from capszoo import inspect
from capszoo.contract import HasCapsules, decoder_of, has_couplings, to_probabilities
from capszoo.data import Loader, Split
from capszoo.engine.robustness import transform
from capszoo.engine.task import Normalization
from capszoo.errors import InspectionError
from capszoo.modes import evaluation_mode

__all__ = ["Curve", "Findings", "find", "first_batches"]

# Images that are shown: of right and of wrong answers each, and those that are looked into.
SHOWN = 10
LOOKED_INTO = 4
# Images that are turned, moved and resized.
CHANGED = 500
BINS = 10


@dataclass(frozen=True)
class Curve:
    """Accuracy over a change of the images.

    Attributes:
        name: What is changed, with its unit.
        values: By how much.
        accuracy: Fraction of right answers at each.
    """

    name: str
    values: tuple[float, ...]
    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class Shown:
    """An image in a report.

    Attributes:
        pixels: ``[C, H, W]`` in [0, 1].
        drawn: Its reconstruction, None without a decoder.
        truth: Name of its class, None where that is not known.
        predicted: Name of the predicted class.
        score: Its score, from 0 to 1.
    """

    pixels: Tensor
    drawn: Tensor | None
    truth: str | None
    predicted: str
    score: float


@dataclass
class Findings:
    """What is known of a network and some images.

    Attributes:
        count: Images that were measured.
        top1: Fraction of right answers; None where the classes of the images are not known.
        confusion: Counts ``[J, J]``, true class by predicted class; None likewise.
        confused: The most frequent mistakes: true class, predicted class, how often.
        calibration: Mean score, accuracy and number of images of each bin of scores; None likewise.
        calibration_error: Mean over images of the gap of score and accuracy in their bin (Naeini et al. 2015).
        right: Images that were recognised, one of each class first.
        wrong: Images that were not, the surest mistakes first.
        sweep: Reconstructions ``[N, D, V, C, H, W]`` of perturbed capsules, see :func:`capszoo.inspect.perturb`.
        sweep_values: What was added to them.
        looked: The images of `sweep` and of the maps.
        part_maps: ``[R, N, J, H, W]``, see :func:`capszoo.inspect.part_maps`.
        entropy: Of the couplings of each iteration, see :func:`capszoo.inspect.coupling_entropy`.
        robustness: Accuracy over turns, shifts and sizes.
    """

    count: int
    class_names: list[str]
    top1: float | None = None
    confusion: Tensor | None = None
    confused: list[tuple[str, str, int]] = field(default_factory=list)
    calibration: list[tuple[float, float, int]] | None = None
    calibration_error: float | None = None
    right: list[Shown] = field(default_factory=list)
    wrong: list[Shown] = field(default_factory=list)
    sweep: Tensor | None = None
    sweep_values: tuple[float, ...] = ()
    looked: list[Shown] = field(default_factory=list)
    part_maps: Tensor | None = None
    entropy: tuple[float, ...] = ()
    robustness: list[Curve] = field(default_factory=list)


def first_batches(split: Split, count: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of so many images of a split, normalised as it says, and their classes.

    They are drawn at random, the same each time: image folders lie class by class.
    """
    for images, labels in Loader(split, 250, device, shuffle=True):
        yield images[:count], labels[:count]
        count -= len(labels)
        if count <= 0:
            return


@torch.inference_mode()
def find(
    model: Any,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    class_names: list[str],
    *,
    looks_inside: bool = True,
    changes: bool = True,
) -> Findings:
    """Measure a network on images.

    Args:
        model: The network, on the images' device; put into evaluation mode for the call.
        batches: Images ``[B, C, H, W]``, normalised as the model takes them, and their classes ``[B]``, None where they
            are not known.
        class_names: Names of the classes.
        looks_inside: Also look into the capsules of a few of the images.
        changes: Also measure the accuracy on changed images.

    Raises:
        InspectionError: If there are no images.
    """
    with evaluation_mode(model):
        normalization = Normalization(model, next(model.parameters()).device)
        kept: list[Tensor] = []
        rows: list[Tensor] = []
        truths: list[Tensor] = []
        known = True
        for images, labels in batches:
            rows.append(to_probabilities(model, model(images).float()))
            kept.append(images)
            if labels is None:
                known = False
            else:
                truths.append(labels)
        if not rows:
            raise InspectionError("there are no images to look at: give some, or a data set")
        x, scores = torch.cat(kept), torch.cat(rows)
        labels = torch.cat(truths) if known else None
        found = Findings(count=len(x), class_names=class_names)
        predicted = scores.argmax(dim=1)
        surest = scores.amax(dim=1)
        if labels is not None:
            _measure(found, scores, labels)
            right = predicted == labels
            places = [int(place) for j in range(scores.shape[1]) for place in (right & (labels == j)).nonzero()[:1, 0]]
            places += [place for place in right.nonzero().flatten().tolist() if place not in places]
            found.right = _shown(model, normalization, x, scores, labels, places[:SHOWN], class_names)
            mistakes = (~right).nonzero().flatten()
            order = mistakes[surest[mistakes].argsort(descending=True)].tolist()
            found.wrong = _shown(model, normalization, x, scores, labels, order[:SHOWN], class_names)
            looked = [*places[: LOOKED_INTO - min(1, len(order))], *order[:1]]
        else:
            found.right = _shown(model, normalization, x, scores, None, list(range(min(len(x), SHOWN))), class_names)
            looked = list(range(min(len(x), LOOKED_INTO)))
        if looks_inside and looked:
            found.looked = _shown(model, normalization, x, scores, labels, looked, class_names)
            _look_inside(found, model, x[looked])
        if changes and labels is not None:
            found.robustness = _robustness(model, normalization, x[:CHANGED], labels[:CHANGED])
    return found


def _measure(found: Findings, scores: Tensor, labels: Tensor) -> None:
    """Accuracy, confusion and calibration."""
    predicted, classes = scores.argmax(dim=1), scores.shape[1]
    right = predicted == labels
    found.top1 = float(right.double().mean())
    confusion = torch.zeros(classes * classes, dtype=torch.int64)
    confusion.index_add_(0, (labels * classes + predicted).cpu(), torch.ones(len(labels), dtype=torch.int64))
    found.confusion = confusion.view(classes, classes)
    mistakes = found.confusion.clone().fill_diagonal_(0)
    for place in mistakes.flatten().argsort(descending=True, stable=True)[:SHOWN].tolist():
        row, column = divmod(place, classes)
        if mistakes[row, column]:
            found.confused.append((found.class_names[row], found.class_names[column], int(mistakes[row, column])))
    surest = scores.amax(dim=1).clamp(0, 1).double()
    bins = (surest * BINS).long().clamp(max=BINS - 1)
    found.calibration, gap = [], 0.0
    for index in range(BINS):
        inside = bins == index
        if count := int(inside.sum()):
            mean, accuracy = float(surest[inside].mean()), float(right[inside].double().mean())
            found.calibration.append((mean, accuracy, count))
            gap += count * abs(mean - accuracy)
    found.calibration_error = gap / len(labels)


def _shown(
    model: Any,
    normalization: Normalization,
    x: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    places: list[int],
    names: list[str],
) -> list[Shown]:
    if not places:
        return []
    images, chosen = x[places], scores[places].argmax(dim=1)
    drawn = None
    if decoder_of(model) is not None and isinstance(model, HasCapsules):
        capsules, _ = model.forward_capsules(images)
        drawn = decoder_of(model)(capsules, chosen).clamp(0, 1).cpu()
    pixels = normalization.undo(images).clamp(0, 1).cpu()
    return [
        Shown(
            pixels[number],
            None if drawn is None else drawn[number],
            None if labels is None else names[int(labels[place])],
            names[int(chosen[number])],
            float(scores[place, chosen[number]]),
        )
        for number, place in enumerate(places)
    ]


def _look_inside(found: Findings, model: Any, x: Tensor) -> None:
    """Perturbed capsules, part maps and entropy, as far as the model has them."""
    with torch.inference_mode(False), torch.no_grad():
        x = x.clone()
        if decoder_of(model) is not None and isinstance(model, HasCapsules):
            found.sweep_values = tuple(value / 20 for value in range(-5, 6))
            found.sweep = inspect.perturb(model, x[:2], values=found.sweep_values).cpu()
        if has_couplings(model):
            found.entropy = tuple(inspect.coupling_entropy(model, x).tolist())
            with contextlib.suppress(InspectionError):  # capsules of the whole image have no place in it
                if len(inspect.place_centers(model)) > 1:  # from a single place all pixels look alike
                    found.part_maps = inspect.part_maps(model, x, iteration=None).cpu()


def _robustness(model: Any, normalization: Normalization, x: Tensor, labels: Tensor) -> list[Curve]:
    pixels = normalization.undo(x)
    size = min(pixels.shape[2:])

    def accuracy(changed: Tensor) -> float:
        right = [model(normalization(part)).argmax(dim=1) for part in changed.split(250)]
        return float((torch.cat(right) == labels).double().mean())

    angles = tuple(float(angle) for angle in range(-90, 91, 15))
    shifts = tuple(float(shift) for shift in range(0, max(2, size // 3), max(1, size // 28)))
    scales = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5)

    def shifted(pixels: Tensor, by: float) -> float:
        """The mean over the four directions."""
        moves = [(by, 0), (-by, 0), (0, by), (0, -by)] if by else [(0, 0)]
        found = [accuracy(transform(pixels, shifts=torch.tensor([move]).expand(len(pixels), 2))) for move in moves]
        return sum(found) / len(found)

    return [
        Curve("rotation, degrees", angles, tuple(accuracy(transform(pixels, angle)) for angle in angles)),
        Curve("shift, pixels", shifts, tuple(shifted(pixels, shift) for shift in shifts)),
        Curve("size", scales, tuple(accuracy(transform(pixels, scale=scale)) for scale in scales)),
    ]
