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

# Types of targets that Triton reads everywhere.
_TARGETS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16, torch.float16)


class _Lengths(torch.autograd.Function):
    """Lengths n; and what their derivatives are made of, which the caller does not see: units x / n, and 1 / n."""

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.dtype = x.dtype
        lengths, units, inverses = launchers.lengths(x, dtype)
        ctx.save_for_backward(units, inverses)
        return lengths, units, inverses

    @staticmethod
    def backward(
        ctx, grad: Tensor | None, grad_units: Tensor | None, grad_inverses: Tensor | None
    ) -> tuple[Tensor | None, None]:
        units, inverses = ctx.saved_tensors
        if grad_units is None and grad_inverses is None:
            return None if grad is None else _scaled(units, grad[..., None], ctx.dtype), None
        # Of higher order: d(x / n) = (dx - u (u . dx)) / n, and d(1 / n) = -(u . dx) / n^2.
        along = torch.zeros_like(inverses) if grad is None else grad
        if grad_inverses is not None:
            along = along - grad_inverses * inverses.square()
        dx = units * along[..., None]
        if grad_units is not None:
            across = grad_units - units * (units * grad_units).sum(-1, keepdim=True)
            dx = dx + across * inverses[..., None]
        return dx, None


class _MarginLosses(torch.autograd.Function):
    """Losses, and their derivatives by the lengths. Those of third order are zero."""

    @staticmethod
    def forward(
        ctx, lengths: Tensor, target: Tensor, m_plus: float, m_minus: float, lambda_: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.dtype = lengths.dtype
        losses, slopes, curvatures = launchers.margin_losses(lengths, target, m_plus, m_minus, lambda_)
        ctx.save_for_backward(slopes, curvatures)
        return losses, slopes

    @staticmethod
    def backward(ctx, grad: Tensor | None, grad_slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        slopes, curvatures = ctx.saved_tensors
        dlengths = None if grad is None else _scaled(slopes, grad[:, None], ctx.dtype)
        if grad_slopes is not None:
            change = grad_slopes * curvatures
            dlengths = change if dlengths is None else dlengths + change
        return dlengths, None, None, None, None


def _scaled(derivatives: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Their product, in one launch in the type that autograd would cast it to."""
    if is_plain_pass(grad):
        return torch.mul(derivatives, grad, out=torch.empty_like(derivatives, dtype=dtype))
    return derivatives * grad


def capsule_lengths(x: Tensor) -> Tensor:
    """Euclidean lengths of capsules ``[..., D]``, shape ``[...]``; all derivatives at a zero capsule count as zero."""
    if not torch.jit.is_scripting():
        if dispatch.fuses(x) and 0 < x.dim() and x.shape[-1] <= launchers.MAX_WIDTH:
            # Autocast takes a norm in float32.
            dtype = torch.float32 if torch.is_autocast_enabled("cuda") else x.dtype
            if torch.is_grad_enabled() and x.requires_grad:
                return _Lengths.apply(x, dtype)[0]
            return launchers.lengths(x, dtype, with_units=False)[0]
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
            return _MarginLosses.apply(lengths, target, m_plus, m_minus, lambda_)[0]
    lengths = at_least_float32(lengths)
    present = present_classes(target, lengths)
    too_short = F.relu(m_plus - lengths).square()
    too_long = F.relu(lengths - m_minus).square()
    return (present * too_short + lambda_ * (1 - present) * too_long).sum(dim=1)


def _fuses_margins(lengths: Tensor, target: Tensor) -> bool:
    if not dispatch.fuses(lengths, target) or target.requires_grad or target.dtype not in _TARGETS:
        return False
    return lengths.shape[1] <= launchers.MAX_WIDTH


def present_classes(target: Tensor, scores: Tensor) -> Tensor:
    """Weights of the classes ``[B, J]``, in the type of the scores, of a target of either kind."""
    if target.dim() == 2:
        return target.to(scores.dtype)
    # It has a rule for vmap, which `one_hot` lacks, and fails for indices out of range, where a comparison would not.
    return torch.zeros_like(scores).scatter(1, target.long()[:, None], 1.0)


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x
