"""Adam in one pass over the memory of each parameter, in whatever memory format, on a CPU too."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["FusedAdam", "FusedAdamW"]


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
            if grads[place].stride() != parameter.stride():
                grads[place] = torch.empty_like(parameter).copy_(grads[place])
            together = [tensors[place] for tensors in (params, grads, *moments)]
            if not all(_is_channels_last(tensor) for tensor in together):
                continue
            for tensors in (params, grads, *moments):
                tensors[place] = tensors[place].permute(0, 2, 3, 1)
        return has_complex


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


class FusedAdam(_InMemoryOrder):
    """`torch.optim.Adam` with `fused=True`, whose states it reads and writes."""


class FusedAdamW(_InMemoryOrder, torch.optim.AdamW):
    """`torch.optim.AdamW` with `fused=True`, whose states it reads and writes."""
