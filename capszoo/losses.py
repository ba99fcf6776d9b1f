"""Losses of capsule networks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MarginLoss", "ReconstructionLoss", "SpreadLoss", "margin_loss", "reconstruction_loss", "spread_loss"]


def margin_loss(
    lengths: Tensor, target: Tensor, m_plus: float = 0.9, m_minus: float = 0.1, lambda_: float = 0.5
) -> Tensor:
    """Margin loss (Sabour, Frosst and Hinton 2017, equation 4), summed over classes, mean over the batch.

    Per class k: T_k max(0, m+ - |v_k|)^2 + lambda (1 - T_k) max(0, |v_k| - m-)^2.

    Args:
        lengths: Lengths of the class capsules ``[B, J]``.
        target: Class indices ``[B]``, int64, or weights of the classes ``[B, J]`` in [0, 1] (mixed labels).
        m_plus: m+, the length above which a present class costs nothing.
        m_minus: m-, the length below which an absent class costs nothing.
        lambda_: Weight of the absent classes.

    Returns:
        The loss, a scalar, in float32 at least.
    """
    lengths = _at_least_float32(lengths)
    present = _one_hot(target, lengths)
    too_short = F.relu(m_plus - lengths).square()
    too_long = F.relu(lengths - m_minus).square()
    return (present * too_short + lambda_ * (1 - present) * too_long).sum(dim=1).mean()


def spread_loss(lengths: Tensor, target: Tensor, margin: float = 0.9) -> Tensor:
    """Spread loss (Hinton, Sabour and Frosst 2018, equation 3): sum over i != t of max(0, m - (a_t - a_i))^2.

    Args:
        lengths: Activations of the class capsules ``[B, J]``.
        target: Class indices ``[B]``, int64.
        margin: m; its schedule (0.2 growing to 0.9 in the paper) is the caller's.

    Returns:
        The loss, a scalar, mean over the batch.
    """
    lengths = _at_least_float32(lengths)
    wanted = lengths.gather(1, target[:, None])
    gaps = F.relu(margin - (wanted - lengths)).square()
    return gaps.scatter(1, target[:, None], 0.0).sum(dim=1).mean()  # the target itself is not part of the sum


def reconstruction_loss(images: Tensor, target: Tensor) -> Tensor:
    """Sum of squared pixel differences, mean over the batch (Sabour, Frosst and Hinton 2017, section 4.1).

    Args:
        images: Reconstructed images ``[B, C, H, W]``.
        target: Images to reconstruct, same shape.

    Returns:
        The loss, a scalar; the paper weighs it by 0.0005.
    """
    return (_at_least_float32(images) - target).square().flatten(1).sum(dim=1).mean()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _one_hot(target: Tensor, like: Tensor) -> Tensor:
    if target.ndim == 2:
        return target.to(like.dtype)
    return F.one_hot(target, like.shape[1]).to(like.dtype)


class MarginLoss(nn.Module):
    """Module form of :func:`margin_loss`."""

    def __init__(self, m_plus: float = 0.9, m_minus: float = 0.1, lambda_: float = 0.5):
        super().__init__()
        if not 0 <= m_minus < m_plus:
            raise ValueError(f"m_minus={m_minus} and m_plus={m_plus} are not possible: need 0 <= m_minus < m_plus")
        self.m_plus, self.m_minus, self.lambda_ = m_plus, m_minus, lambda_

    def forward(self, lengths: Tensor, target: Tensor) -> Tensor:
        return margin_loss(lengths, target, self.m_plus, self.m_minus, self.lambda_)

    def extra_repr(self) -> str:
        return f"m_plus={self.m_plus}, m_minus={self.m_minus}, lambda_={self.lambda_}"


class SpreadLoss(nn.Module):
    """Module form of :func:`spread_loss`; set `margin` while training to follow a schedule."""

    def __init__(self, margin: float = 0.9):
        super().__init__()
        self.margin = margin

    def forward(self, lengths: Tensor, target: Tensor) -> Tensor:
        return spread_loss(lengths, target, self.margin)

    def extra_repr(self) -> str:
        return f"margin={self.margin}"


class ReconstructionLoss(nn.Module):
    """Module form of :func:`reconstruction_loss`."""

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        return reconstruction_loss(images, target)
