"""The memory format of vote matrices, which is the same whatever a network is converted to."""

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["apply_contiguously"]


def apply_contiguously(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` that leaves tensors contiguous, for modules that have vote matrices.

    `model.to(memory_format=torch.channels_last)` takes every tensor of four dimensions for the kernels of a
    convolution. Routing reads vote matrices in their own order, and would copy them and their gradients at every step.
    """
    return nn.Module._apply(self, lambda tensor: fn(tensor).contiguous(), recurse)
