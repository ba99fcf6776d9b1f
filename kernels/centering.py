"""Kernels of a convolution, each less its mean."""

import torch
from torch import Tensor

from . import dispatch
from .dispatch import is_looked_at, is_plain_pass, triton_module

__all__ = ["less_means", "scaled_kernels"]

triton_filters = triton_module(".centered_filters")


class _CenteredKernels(torch.autograd.Function):
    """By PyTorch's formulas the gradient passes through memory five times, in fresh memory; by this twice."""

    @staticmethod
    def forward(ctx, weight: Tensor, centered: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(centered, scale)
        return less_means(weight, centered).mul_(scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        centered, scale = ctx.saved_tensors
        grad = less_means(grad, centered)
        return grad.mul_(scale) if is_plain_pass(grad) else grad * scale, None, None


class _FusedCenteredKernels(torch.autograd.Function):
    """The same on a GPU, in one launch each way, which also takes the place of autocast's casts."""

    @staticmethod
    def forward(ctx, weight: Tensor, centered: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(centered, scale)
        ctx.dtype = weight.dtype
        return triton_filters.centered(weight, centered, scale, dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        centered, scale = ctx.saved_tensors
        if is_plain_pass(grad):
            return triton_filters.centered(grad, centered, scale, ctx.dtype), None, None, None
        return less_means(grad.to(ctx.dtype), centered) * scale, None, None, None


def less_means(weight: Tensor, centered: Tensor | None) -> Tensor:
    """Kernels `[D, C, k, k]`, each less its mean times `centered`."""
    return weight if centered is None else weight - centered * weight.mean((1, 2, 3), keepdim=True)


def scaled_kernels(weight: Tensor, centered: Tensor | None, scale: Tensor) -> Tensor:
    """Kernels `[D, C, k, k]`, each less its mean times `centered`, times `scale`. Those two have no gradients.

    Fused on a GPU under autocast they have its type, to which it would cast them next.
    """
    if centered is None or is_looked_at(weight):
        return less_means(weight, centered) * scale
    if dispatch.fuses(weight, centered, scale):
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype
        return _FusedCenteredKernels.apply(weight, centered, scale, dtype)
    return _CenteredKernels.apply(weight, centered, scale)
