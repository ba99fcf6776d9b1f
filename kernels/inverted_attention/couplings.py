"""The couplings of inverted dot-product attention, on request: the operator itself never stores them."""

import torch
from torch import Tensor

from ..derivatives import compute_dtype, no_autocast
from . import cpu
from .ops import check_inputs


@torch.no_grad()
def inverted_attention_couplings(x: Tensor, weight: Tensor, parents: Tensor | None = None, stride: int = 1) -> Tensor:
    """Couplings r_ij of a pass of :func:`capszoo.kernels.inverted_attention_routing` (its arguments and errors).

    They are those that the operator's tiles weigh votes by; votes are stored a tile at a time.

    Args:
        x: Poses of the children, `[B, I, P, P, H, W]`.
        weight: Vote matrices, `[k, k, I, P, P, J]`.
        parents: Poses of the parents after the pass before, `[B, J, P, P, H', W']`; None for couplings of 1 / J.
        stride: Stride of the kernel.

    Returns:
        `[B, k * k * I, J, H', W']`, children by place in the kernel, then by type. They add up to 1 over J; without
        derivatives.
    """
    check_inputs(x, weight, parents, stride)
    dtype = compute_dtype(x, weight)
    k, num_parents = weight.shape[0], weight.shape[5]
    if parents is None:
        sizes = ((size - k) // stride + 1 for size in x.shape[4:])
        return x.new_full((len(x), weight.shape[:3].numel(), num_parents, *sizes), 1 / max(1, num_parents), dtype=dtype)
    maps = x.permute(0, 4, 5, 1, 2, 3).to(dtype), weight.to(dtype), parents.permute(0, 4, 5, 1, 2, 3).to(dtype)
    with no_autocast(x):
        return cpu.couplings(*maps, stride).permute(1, 0, 4, 2, 3)
