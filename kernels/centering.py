"""Kernels of a convolution, each less its mean."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["is_looked_at", "is_plain_pass", "less_means", "scaled_kernels"]


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


def less_means(weight: Tensor, centered: Tensor | None) -> Tensor:
    """Kernels `[D, C, k, k]`, each less its mean times `centered`."""
    return weight if centered is None else weight - centered * weight.mean((1, 2, 3), keepdim=True)


def scaled_kernels(weight: Tensor, centered: Tensor | None, scale: Tensor) -> Tensor:
    """Kernels `[D, C, k, k]`, each less its mean times `centered`, times `scale`. Those two have no gradients."""
    if centered is None or is_looked_at(weight):
        return less_means(weight, centered) * scale
    return _CenteredKernels.apply(weight, centered, scale)


def is_looked_at(*tensors: Tensor) -> bool:
    """Whether something else than a plain call computes with these."""
    return (
        torch.jit.is_tracing()
        or torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    )


def is_plain_pass(grad: Tensor) -> bool:
    """Whether a backward pass computes one gradient, and none of higher order."""
    is_batched = "Batched" in str(torch._C._dispatch_keys(grad))  # by `is_grads_batched`
    return not torch.is_grad_enabled() and not is_batched
