"""Optimizers by name: an Adam that is one pass over memory on a CPU too, an SGD whose steps a GPU can replay."""

from typing import Any

import torch
from torch import Tensor

from capszoo.errors import UsageError

from .options import TrainingOptions

__all__ = ["FusedAdam", "FusedAdamW", "FusedSGD", "create_optimizer"]


class _InMemoryOrder(torch.optim.Adam):
    """Hands torch's fused step tensors that are contiguous.

    On a CPU that step goes through memory, whatever the strides: a gradient in another memory format than its
    parameter would move the wrong numbers. And of each gradient that is not contiguous it makes a contiguous copy,
    which it never reads: of kernels in channels-last format that takes as long as the update. As views whose
    dimensions are in memory's order they are contiguous.
    """

    def _init_group(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *states: Any) -> bool:
        has_complex = super()._init_group(group, params, grads, *states)
        moments = [tensors for tensors in states[:-1] if tensors]  # the last are the counts of steps
        for place, parameter in enumerate(params):
            if parameter.device.type != "cpu" or not group["fused"]:
                continue
            grads[place] = _in_format_of(parameter, grads[place])
            together = [tensors[place] for tensors in (params, grads, *moments)]
            if not all(_is_channels_last(tensor) for tensor in together):
                continue
            for tensors in (params, grads, *moments):
                tensors[place] = tensors[place].permute(0, 2, 3, 1)
        return has_complex


def _in_format_of(parameter: Tensor, grad: Tensor) -> Tensor:
    return grad if grad.stride() == parameter.stride() else torch.empty_like(parameter).copy_(grad)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


class FusedAdam(_InMemoryOrder):
    """`torch.optim.Adam` with `fused=True`, whose states it reads and writes."""


class FusedAdamW(_InMemoryOrder, torch.optim.AdamW):
    """`torch.optim.AdamW` with `fused=True`, whose states it reads and writes."""


class FusedSGD(torch.optim.SGD):
    """`torch.optim.SGD` with `fused=True`, for GPUs: it reads the learning rate from memory, so that its steps can be
    captured."""

    def _init_group(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *states: Any) -> bool:
        has_sparse = super()._init_group(group, params, grads, *states)
        if not has_sparse:
            grads[:] = map(_in_format_of, params, grads)
        return has_sparse


_FUSED = {"adam": FusedAdam, "adamw": FusedAdamW}
_FUSED_ON_GPU = {"sgd": FusedSGD, "nesterov": FusedSGD, "momentum": FusedSGD}


def create_optimizer(options: TrainingOptions, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of --opt, --lr, --weight-decay and --momentum.

    Raises:
        UsageError: If there is no such optimizer, or it does not take these options.
    """
    from timm.optim import create_optimizer_v2, list_optimizers

    if options.opt not in list_optimizers():
        raise UsageError(f"unknown optimizer {options.opt!r}: see timm.optim.list_optimizers()")
    on_gpu = next(model.parameters()).device.type == "cuda"
    fused = (_FUSED | _FUSED_ON_GPU if on_gpu else _FUSED).get(options.opt)
    extra: dict[str, Any] = {"fused": True} if fused else {}
    values = {"lr": options.lr, "weight_decay": options.weight_decay, "momentum": options.momentum}
    try:
        optimizer = create_optimizer_v2(model, opt=options.opt, **values, **extra)
    except (ImportError, AssertionError, TypeError, ValueError) as error:
        hint = " (timm's sgd is Nesterov's): use --opt momentum" if "Nesterov" in str(error) else ""
        raise UsageError(f"optimizer {options.opt!r} cannot be made: {error}{hint}") from None
    if getattr(optimizer, "is_second_order", False):
        # timm has one such, Adahessian, whose generator is not in its state_dict.
        raise UsageError(
            f"optimizer {options.opt!r} draws random numbers that no checkpoint holds, so that no run can be resumed: "
            f"use adam, or a loop of your own with backward(create_graph=True)"
        )
    # Each group has all settings.
    return fused(optimizer.param_groups, options.lr, fused=True) if fused else optimizer
