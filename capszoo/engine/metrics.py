"""What a model's scores are worth, for images of one class and for images of several.

Labels are class indices ``[B]`` or, where an image may show several classes or none, weights of the classes ``[B, J]``.
A class counts as present from a weight of 0.5 on, and as predicted from a score of 0.5 on: scores of this zoo are
lengths in [0, 1], which stand for probabilities (Sabour, Frosst and Hinton 2017, section 2).
"""

import torch
from torch import Tensor

__all__ = ["average_precision", "right_answers", "right_sets", "shows"]

_THRESHOLD = 0.5


def shows(values: Tensor) -> Tensor:
    """Which classes weights or scores ``[B, J]`` say are there, bool ``[B, J]``."""
    return values >= _THRESHOLD


def right_answers(scores: Tensor, labels: Tensor) -> Tensor:
    """Whether each image is classified right, bool ``[B]``.

    Args:
        scores: Scores of the classes ``[B, J]``.
        labels: Class indices ``[B]``: right is where the highest score is that of the class. Weights of the classes
            ``[B, J]``: right is where just the classes that are present are predicted (exact match).
    """
    if labels.ndim == 2:
        return (shows(scores) == shows(labels)).all(dim=1)
    return scores.argmax(dim=1) == labels


def right_sets(scores: Tensor, labels: Tensor) -> Tensor:
    """Whether the k highest scores of each image are those of the k classes that it shows, bool ``[B]``.

    That is how the two digits of MultiMNIST are measured (Sabour, Frosst and Hinton 2017, section 6): how many there
    are is known, and no threshold is needed. Equal scores on both sides are wrong.

    Args:
        scores: Scores of the classes ``[B, J]``.
        labels: Weights of the classes ``[B, J]``.
    """
    present = shows(labels)
    least = scores.masked_fill(~present, torch.inf).amin(dim=1)
    return least > scores.masked_fill(present, -torch.inf).amax(dim=1)


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Average precision of each class: the mean, over the images that show it, of the precision at their score.

    Images of equal score stand or fall together, as in scikit-learn's `average_precision_score`.

    Args:
        scores: Scores of the classes ``[N, J]``.
        labels: Weights of the classes ``[N, J]``.

    Returns:
        float64 ``[J]``; NaN for a class that no image shows.
    """
    result = []
    for column, present in zip(scores.T, shows(labels).T, strict=True):
        all_scores, of_present = column.sort().values, column[present].sort().values
        above = len(all_scores) - torch.searchsorted(all_scores, of_present)
        hits = len(of_present) - torch.searchsorted(of_present, of_present)
        result.append((hits.double() / above).mean())
    return torch.stack(result) if result else scores.new_zeros(0, dtype=torch.float64)
