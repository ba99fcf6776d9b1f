"""Filters less their means, times a scale, in Triton: one launch, which reads them from memory once.

A program takes one filter, adds it up, and reads it again from the cache. It is its own adjoint, so that gradients take
the same kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers in a tile of a program of 8 warps: 16 for each thread, which keep a GPU's memory busy.
TILE_SIZE = 4096


@triton.jit
def center_kernel(p_x, p_centered, p_scale, p_y, N, BLOCK: tl.constexpr):
    """y = (x - centered * mean of x) * scale of a row of `[D, N]`."""
    i_row = tl.program_id(0).to(tl.int64) * N
    o = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        b_sum += tl.load(p_x + i_row + first + o, mask=first + o < N, other=0.0).to(tl.float32)
    shift = tl.load(p_centered).to(tl.float32) * (tl.sum(b_sum, axis=0) / N)
    scale = tl.load(p_scale).to(tl.float32)
    for first in range(0, N, BLOCK):
        m_x = first + o < N
        b_x = tl.load(p_x + i_row + first + o, mask=m_x, other=0.0).to(tl.float32)
        tl.store(p_y + i_row + first + o, ((b_x - shift) * scale).to(p_y.dtype.element_ty), mask=m_x)


def centered(filters: Tensor, centered: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Filters `[D, ...]` less their means times `centered`, times `scale`, in the layout of `filters`.

    Args:
        filters: Filters or gradients of them, float32 or half.
        centered: A number on their device.
        scale: A number on their device.
        dtype: Type of the result. Computed is in float32.
    """
    if not filters.is_contiguous(memory_format=torch.channels_last):  # there too the numbers of a filter lie together
        filters = filters.contiguous()
    y = torch.empty_like(filters, dtype=dtype)
    if filters.numel() > 0:
        N = filters[0].numel()
        block = min(TILE_SIZE, triton.next_power_of_2(N))
        with torch.cuda.device_of(filters):
            center_kernel[(len(filters),)](filters, centered, scale, y, N=N, BLOCK=block, num_warps=8)
    return y
