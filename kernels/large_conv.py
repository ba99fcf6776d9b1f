"""Convolutions with large kernels on a CPU, each by the form that takes least time: autograd, and which that is."""

import torch
from torch import Tensor

from . import fourier_conv, unfolded_conv
from .centering import less_means
from .dispatch import is_looked_at, is_plain_pass
from .fourier_plan import Plan, best_plan, cheapest
from .processor import has_fast_vectors, has_matrix_units
from .scratch import lend
from .unfolded_conv import Unfolding


def _form(plan: Plan | Unfolding):
    """The module that computes by a plan."""
    return fourier_conv if isinstance(plan, Plan) else unfolded_conv


class _LargeConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, centered: Tensor | None, plan: Plan | Unfolding, is_trained: bool
    ) -> Tensor:
        kept = lend(*_form(plan).kept_shape(plan, x, weight), dtype=plan.dtype) if is_trained else None
        ctx.save_for_backward(x, weight, centered, kept)
        ctx.plan = plan
        with torch.autocast("cpu", enabled=False):
            return _form(plan).forward(plan, x.to(plan.dtype), weight, centered, kept)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, centered, kept = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        with torch.autocast("cpu", enabled=False):
            if is_plain_pass(grad):
                dx, dw = _form(ctx.plan).backward(ctx.plan, grad, x, weight, centered, kept, *needs)
            else:  # others are those of PyTorch's own convolution
                sides = [ctx.plan.stride] * 2, [0, 0], [1, 1], False, [0, 0], 1
                kernels = less_means(weight, centered)
                dx, dw, _ = torch.ops.aten.convolution_backward(grad, x.float(), kernels, None, *sides, [*needs, False])
                dw = dw if dw is None else less_means(dw, centered)
        return dx if dx is None else dx.to(x.dtype), dw, None, None, None


def _type_of_result(x: Tensor) -> torch.dtype:
    """The type that PyTorch's own convolution of `x` would have."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def chosen_plan(x: Tensor, weight: Tensor, stride: int) -> Plan | Unfolding | None:
    """How to convolve these, by counts alone so that the same shapes give the same bits; None for PyTorch's own way.

    That is taken on other devices and in other types, for small kernels, where bfloat16 has matrix units, and where
    something else than a plain call looks on: torch.compile, torch.export, torch.jit, torch.fx, torch.func, forward
    mode and dispatch modes, such as the one that counts multiplications.
    """
    if type(x) is not Tensor or x.device.type != "cpu" or is_looked_at(x, weight):
        return None
    if weight.dtype != torch.float32 or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    dtype = _type_of_result(x)
    if dtype != torch.float32 and has_matrix_units():
        return None
    half = dtype == torch.bfloat16 and has_fast_vectors()
    (D, C, k, width), (B, _, H, W) = weight.shape, x.shape
    if k != width or k <= stride or H < k or W < k or B == 0:
        return None
    plan = cheapest(best_plan(H, W, k, stride, C, D), B, C, D)
    if fourier_conv.is_faster(plan, B, C, D, half):
        return plan
    return unfolded_conv.plan_for(x, weight, stride, half)


def large_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: Plan | Unfolding,
    scale: Tensor | float | None = None,
    centered: Tensor | None = None,
) -> Tensor:
    """Convolve `[B, C, H, W]` with kernels `[D, C, k, k]` of float32, as `plan` says: `[B, D, H', W']`, channels last.

    Each kernel's mean times `centered` is taken from it, if that is given, and the sums are multiplied by `scale`
    before the bias is added. Products and sums are float32, under autocast too, unless the plan has rows of bfloat16.
    The result has the type that a convolution there would have.
    """
    is_trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    y = _LargeConv.apply(x, weight, centered, plan, is_trained)
    if scale is not None:
        y = y * scale
    if bias is not None:
        y = y + bias.view(-1, 1, 1)
    return y.to(_type_of_result(x))
