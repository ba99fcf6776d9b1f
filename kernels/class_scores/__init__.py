"""Lengths of class capsules, and their margin loss: PyTorch operators, on a GPU fused into one launch each way.

Fused are plain calls alone. Where a compiler, a tracer or a transform of torch.func looks on, it gets PyTorch's
operators, and does with them what it is for.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..dispatch import is_plain_pass, triton_module

__all__ = ["at_least_float32", "capsule_lengths", "margin_losses", "present_classes"]

launchers = triton_module(".class_scores.triton")


class _Lengths(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return launchers.lengths(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if is_plain_pass(grad):
            return launchers.lengths_backward(grad, x)
        zero = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True) == 0
        other = torch.where(zero, 1.0, x)
        return grad[..., None] * torch.where(zero, 0.0, other / torch.linalg.vector_norm(other, dim=-1, keepdim=True))


class _MarginLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lengths: Tensor, target: Tensor, m_plus: float, m_minus: float, lambda_: float) -> Tensor:
        losses, slopes = launchers.margin_losses(lengths, target, m_plus, m_minus, lambda_)
        ctx.save_for_backward(lengths, target, slopes)
        ctx.settings = m_plus, m_minus, lambda_
        return losses

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        lengths, target, slopes = ctx.saved_tensors
        m_plus, m_minus, lambda_ = ctx.settings
        if is_plain_pass(grad):
            dlengths = torch.mul(slopes, grad[:, None], out=torch.empty_like(slopes, dtype=lengths.dtype))
        else:
            scores = at_least_float32(lengths)
            present = present_classes(target, scores)
            slopes = 2 * (lambda_ * (1 - present) * F.relu(scores - m_minus) - present * F.relu(m_plus - scores))
            dlengths = (slopes * grad[:, None]).to(lengths.dtype)
        return dlengths, None, None, None, None


def capsule_lengths(x: Tensor) -> Tensor:
    """Euclidean lengths of capsules ``[..., D]``, shape ``[...]``; all derivatives at a zero capsule count as zero."""
    if not torch.jit.is_scripting():
        if dispatch.fuses(x):
            return _Lengths.apply(x)
    zero = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True) == 0
    lengths = torch.linalg.vector_norm(torch.where(zero, 1.0, x), dim=-1)
    return torch.where(zero.squeeze(-1), 0.0, lengths)


def margin_losses(lengths: Tensor, target: Tensor, m_plus: float, m_minus: float, lambda_: float) -> Tensor:
    """The margin loss of each image ``[B]``, in float32 at least, see :func:`capszoo.losses.margin_loss`.

    Args:
        lengths: Lengths of the class capsules ``[B, J]``, floating.
        target: Class indices ``[B]`` or weights of the classes ``[B, J]``, both checked.
        m_plus: m+.
        m_minus: m-.
        lambda_: Weight of the absent classes.
    """
    if not torch.jit.is_scripting():
        if _fuses_margins(lengths, target):
            return _MarginLosses.apply(lengths, target, m_plus, m_minus, lambda_)
    lengths = at_least_float32(lengths)
    present = present_classes(target, lengths)
    too_short = F.relu(m_plus - lengths).square()
    too_long = F.relu(lengths - m_minus).square()
    return (present * too_short + lambda_ * (1 - present) * too_long).sum(dim=1)


def _fuses_margins(lengths: Tensor, target: Tensor) -> bool:
    if not dispatch.fuses(lengths) or type(target) is not Tensor or target.dtype == torch.float64:
        return False
    return lengths.shape[1] <= launchers.MAX_CLASSES and not target.requires_grad and not dispatch.has_tangent(target)


def present_classes(target: Tensor, scores: Tensor) -> Tensor:
    """Weights of the classes ``[B, J]``, in the type of the scores, of a target of either kind."""
    if target.dim() == 2:
        return target.to(scores.dtype)
    # It has a rule for vmap, which `one_hot` lacks, and fails for indices out of range, where a comparison would not.
    return torch.zeros_like(scores).scatter(1, target.long()[:, None], 1.0)


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x
