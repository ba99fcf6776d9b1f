"""Criteria in the headers of weights' files, so that weights are measured by the loss that they were trained on."""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from capszoo.contract import HasCriterion
from capszoo.errors import CheckpointError, first_line
from capszoo.losses import CrossEntropyLoss, MarginLoss, SpreadLoss

__all__ = ["criterion_header", "read_criterion"]

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
        if isinstance(criterion, kind) and criterion.weight is None:
            return {"criterion": {"name": name, **{key: getattr(criterion, keyword) for key, keyword in keys.items()}}}
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
        return kind(**{keyword: float(settings[key]) for key, keyword in keys.items()})
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} is damaged (its 'criterion' is {reprlib.repr(header['criterion'])}: {first_line(error)}): "
            "use another checkpoint"
        ) from None
