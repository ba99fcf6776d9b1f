"""What families share of looking into their routing."""

from typing import Any

import torch
from torch import Tensor

from ._builder import check_classes


@torch.jit.ignore
@torch.no_grad()
def couplings(self: Any, x: Tensor, iteration: int | None = -1) -> Tensor:
    """How capsules divide their votes among the classes, by the operators' own arithmetic; a method of such models.

    Args:
        self: The model.
        x: Images ``[B, C, H, W]``.
        iteration: Of routing, from 0; -1 for the last, None for all.

    Returns:
        Couplings ``[B, I, J]``, or ``[R, B, I, J]`` of all iterations; without derivatives.

    Raises:
        RuntimeError: If the model has no class capsules (`num_classes=0`).
        IndexError: If there are fewer iterations.
    """
    check_classes(self)
    found = self.class_caps.couplings(self.to_capsules(self.forward_features(x)))
    if iteration is not None and not -len(found) <= iteration < len(found):
        raise IndexError(f"iteration={iteration} is not possible: there are {len(found)}, counted from 0")
    return found if iteration is None else found[iteration]
