"""Criteria of a run: in the headers of weights' files, so that weights are measured by the loss that they were trained
on, and with weights of the classes where some have fewer images than others.
"""

import copy
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capszoo.contract import HasCriterion
from capszoo.errors import CheckpointError, UsageError, first_line
from capszoo.fields import words
from capszoo.losses import CrossEntropyLoss, MarginLoss, SpreadLoss

from .options import DEFAULTS, OPTIONS, TrainingOptions

__all__ = ["class_weights", "criterion_header", "make_criterion", "read_criterion", "weigh_classes", "without_weights"]

# By the name that a header has, what it says of a criterion: its keys, and the keywords and attributes that they are.
_CRITERIA: dict[str, tuple[type[nn.Module], dict[str, str]]] = {
    "margin": (MarginLoss, {"m_plus": "m_plus", "m_minus": "m_minus", "lambda": "lambda_"}),
    "spread": (SpreadLoss, {"margin": "margin", "first_margin": "first_margin"}),
    "cross_entropy": (CrossEntropyLoss, {"label_smoothing": "label_smoothing"}),
}


def criterion_header(criterion: nn.Module) -> dict[str, Any]:
    """What the header of a weights' file says of a criterion; nothing of one that it cannot describe.

    Args:
        criterion: Such as the `criterion` of a :class:`capszoo.engine.CapsuleTask`.
    """
    for name, (kind, keys) in _CRITERIA.items():
        if isinstance(criterion, kind):
            settings = {key: getattr(criterion, keyword) for key, keyword in keys.items()}
            weights = {} if criterion.weight is None else {"class_weights": criterion.weight.tolist()}
            return {"criterion": {"name": name, **settings, **weights}}
    return {}


def read_criterion(path: str | Path, header: Mapping[str, str], model: nn.Module | None = None) -> nn.Module:
    """Make the criterion that the header of a weights' file describes; where it has none, the default.

    Args:
        path: The file, for errors.
        header: The metadata in its header.
        model: The network. The default is its own criterion, if it has one, else the margin loss.

    Raises:
        CheckpointError: If it is damaged, or describes another criterion.
    """
    if "criterion" not in header:
        return model.default_criterion() if isinstance(model, HasCriterion) else MarginLoss()
    try:
        settings = json.loads(header["criterion"])
        if settings["name"] not in _CRITERIA:
            raise ValueError("no criterion of this name is known")
        kind, keys = _CRITERIA[settings["name"]]
        criterion = kind(**{keyword: float(settings[key]) for key, keyword in keys.items()})
        if "class_weights" in settings:
            weight = torch.tensor([float(number) for number in settings["class_weights"]])
            if not (weight > 0).all() or not weight.isfinite().all():
                raise ValueError("its class weights are not numbers above 0")
            if model is not None and len(weight) != model.num_classes:
                raise ValueError(f"it has {len(weight)} class weights for {model.num_classes} classes")
            weigh_classes(criterion, weight)
        return criterion
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} is damaged (its 'criterion' is {reprlib.repr(header['criterion'])}: {first_line(error)}): "
            "use another checkpoint"
        ) from None


def make_criterion(options: TrainingOptions, model: nn.Module, labels: Tensor | None = None) -> nn.Module:
    """Make the loss of the class scores: the model's own, or the margin loss of the options.

    Args:
        options: The options.
        model: The model.
        labels: Labels of the training images, from which --class-weights balanced takes its weights.

    Raises:
        UsageError: If an option of the margin loss is given for a model that trains on another loss, label smoothing
            for one that does not train on the cross-entropy, or class weights that do not fit.
    """
    criterion: Any = MarginLoss(options.m_plus, options.m_minus, options.margin_lambda)
    if isinstance(model, HasCriterion):
        for key in ("m_plus", "m_minus", "margin_lambda"):
            if getattr(options, key) != getattr(DEFAULTS, key):
                raise UsageError(
                    f"{_given(options, key)} is for the margin loss, and {options.model!r} trains on its own: leave it "
                    "out"
                )
        criterion = model.default_criterion()
    if options.smoothing is not None:
        if not isinstance(criterion, CrossEntropyLoss):
            # Its margins are what smoothing is to the cross-entropy: beyond them nothing is asked for.
            raise UsageError(
                f"{_given(options, 'smoothing')} is for the cross-entropy, and {options.model!r} trains on the "
                f"{type(criterion).__name__}: leave it out"
                + (", or give a smaller --m-plus and a larger --m-minus" if isinstance(criterion, MarginLoss) else "")
            )
        criterion.label_smoothing = options.smoothing
    if labels is not None:
        weight = class_weights(options.class_weights, labels, model.num_classes)
        if weight is not None:
            weigh_classes(criterion, weight)
    return criterion


def _given(options: TrainingOptions, key: str) -> str:
    """The words that give an option its value."""
    return " ".join(words(key, getattr(options, key), OPTIONS[key]))


def class_weights(choice: Sequence[Any] | None, labels: Tensor, num_classes: int) -> Tensor | None:
    """The factors of the classes that --class-weights asks for.

    Args:
        choice: 'balanced' for N / (J N_j), as scikit-learn has it, with N_j the images of class j and J the classes
            that have any (the others get 1: no image counts by theirs); 'none'; or the factor of each class.
        labels: Labels of the training images, ``[N]`` or ``[N, J]``.
        num_classes: J.

    Returns:
        float32 ``[J]``; None for no factors.

    Raises:
        UsageError: If they are not one of these.
    """
    words = list(choice or ["none"])
    if words == ["none"]:
        return None
    if words == ["balanced"]:
        counts = labels.sum(dim=0) if labels.ndim == 2 else torch.bincount(labels, minlength=num_classes)
        weight = len(labels) / (int((counts > 0).sum()) * counts.double().cpu())
        return torch.where(weight.isfinite(), weight, 1.0).float()
    given = f"--class-weights {' '.join(map(str, words))}"
    if any(isinstance(word, str) for word in words):
        raise UsageError(f"{given} is unknown: give balanced, none, or a number for each class")
    if len(words) != num_classes:
        raise UsageError(f"{given} has {len(words)} numbers for {num_classes} classes: give one for each, in order")
    if not all(0 < word < math.inf for word in words):
        raise UsageError(f"{given} is out of range: give numbers above 0")
    return torch.tensor(words, dtype=torch.float32)


def weigh_classes(criterion: nn.Module, weight: Tensor) -> None:
    """Have a criterion count images by the factors of their classes.

    Those of :mod:`capszoo.losses` then divide by the batch size: divided by the sum of the factors in the batch, a
    batch of one image would not know them, and small ones hardly, and parts of a batch would count otherwise than the
    whole.

    Args:
        criterion: One with a buffer `weight`, None so far; torch's have it, too.
        weight: Factors ``[J]``.

    Raises:
        UsageError: If it has none.
    """
    if "weight" not in criterion._buffers:
        raise UsageError(f"--class-weights: {type(criterion).__name__}, which the model trains on, takes none")
    criterion.weight = weight
    if isinstance(criterion, tuple(kind for kind, _ in _CRITERIA.values())):
        criterion.reduction = "batchmean"


def without_weights(criterion: Any) -> Any:
    """A criterion by which all classes count alike, for measuring; the same one where they do."""
    if getattr(criterion, "weight", None) is None:
        return criterion
    criterion = copy.deepcopy(criterion)
    criterion.weight = None
    return criterion
