"""Whether a network can still learn: saturated primary capsules pass no gradient on, and all images score alike."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layers import PrimaryCaps, capsule_lengths

__all__ = ["Saturation", "measure_saturation"]

# Squash has a slope of 0.002 at this length.
_LONG = 0.99


class Saturation(NamedTuple):
    """What :func:`measure_saturation` finds.

    Attributes:
        saturated: Share of the primary capsules longer than 0.99, over all images; None for models without any.
        spread: Standard deviation over the images of the score that differs most between them.
    """

    saturated: float | None
    spread: float

    @property
    def is_stuck(self) -> bool:
        """Whether hardly any gradient is left, and nothing to tell images by."""
        return self.spread < 1e-4 or (self.saturated is not None and self.saturated > 0.9 and self.spread < 0.02)


@torch.no_grad()
def measure_saturation(model: Any, images: Tensor) -> Saturation:
    """Look at the primary capsules and the scores of some images.

    Args:
        model: A model of this zoo; left in the mode it was in.
        images: ``[B, C, H, W]``, normalised as the model takes them, two or more.
    """
    was_training = model.training
    model.eval()
    features = model.forward_features(images)
    scores = model.forward_head(features).float()
    model.train(was_training)
    saturated = None
    primary = getattr(model, "primary_caps", None)
    if isinstance(primary, PrimaryCaps):
        saturated = float((capsule_lengths(primary.to_capsules(features).float()) > _LONG).float().mean())
    return Saturation(saturated, float(scores.std(dim=0).max()))
