"""Squash in Triton: one pass over the vectors forward, one backward.

With n = |x|, f = n / (1 + n^2): v = f x. Backward from g = dL/dv:
    dx = f g + (g . x) (1 - n^2) / ((1 + n^2)^2 n) x, of which the second term is 0 at n = 0.
The approximation is v = x / 2 where n <= 2, else x / n, with dx = g / 2, else g / n - (g . x) / n^3 x.

A program takes BLOCK_N of the N vectors, each padded to BLOCK_D numbers. Half precision is computed in float32, float64
in float64. `squash_tile` and `squash_tile_backward` serve the routing kernels as well.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers in the tile of a program of 4 warps: 8 for each thread.
TILE_SIZE = 1024


@triton.jit
def squash_tile(b_x, APPROXIMATE: tl.constexpr):
    """The squashed rows of `[N, D]`."""
    b_square = tl.sum(b_x * b_x, axis=1)
    b_norm = tl.sqrt(b_square)
    if APPROXIMATE:
        b_scale = tl.where(b_square <= 4.0, 0.5, 1.0 / tl.where(b_square <= 4.0, 1.0, b_norm))
    else:
        b_scale = b_norm / (1.0 + b_square)
    return b_x * b_scale[:, None]


@triton.jit
def squash_tile_backward(b_grad, b_x, APPROXIMATE: tl.constexpr):
    """The gradient at the rows of `[N, D]`."""
    b_square = tl.sum(b_x * b_x, axis=1)
    b_along = tl.sum(b_grad * b_x, axis=1)
    b_norm = tl.sqrt(b_square)
    if APPROXIMATE:
        m_inside = b_square <= 4.0
        b_inverse = 1.0 / tl.where(m_inside, 1.0, b_norm)
        b_scale = tl.where(m_inside, 0.5, b_inverse)
        b_across = tl.where(m_inside, 0.0, -b_along * b_inverse * b_inverse * b_inverse)
    else:
        b_scale = b_norm / (1.0 + b_square)
        # (g . x) / n first: it is bounded by |g|, and 1 / n alone is not.
        b_slope = (1.0 - b_square) / ((1.0 + b_square) * (1.0 + b_square))
        b_across = tl.where(b_square > 0.0, b_along / tl.where(b_square > 0.0, b_norm, 1.0) * b_slope, 0.0)
    return b_grad * b_scale[:, None] + b_x * b_across[:, None]


@triton.jit
def squash_kernel(
    p_x, p_v, N, D: tl.constexpr, APPROXIMATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    i_d = tl.arange(0, BLOCK_D)[None, :]
    m_x = (i_n < N) & (i_d < D)
    b_x = tl.load(p_x + i_n * D + i_d, mask=m_x, other=0.0)
    b_x = b_x.to(tl.float64 if b_x.dtype == tl.float64 else tl.float32)
    b_v = squash_tile(b_x, APPROXIMATE)
    tl.store(p_v + i_n * D + i_d, b_v.to(p_v.dtype.element_ty), mask=m_x)


@triton.jit
def squash_backward_kernel(
    p_grad, p_x, p_dx, N, D: tl.constexpr, APPROXIMATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    i_d = tl.arange(0, BLOCK_D)[None, :]
    m_x = (i_n < N) & (i_d < D)
    b_x = tl.load(p_x + i_n * D + i_d, mask=m_x, other=0.0)
    b_x = b_x.to(tl.float64 if b_x.dtype == tl.float64 else tl.float32)
    b_grad = tl.load(p_grad + i_n * D + i_d, mask=m_x, other=0.0).to(b_x.dtype)
    b_dx = squash_tile_backward(b_grad, b_x, APPROXIMATE)
    tl.store(p_dx + i_n * D + i_d, b_dx.to(p_dx.dtype.element_ty), mask=m_x)


def squash_forward(x: Tensor, approximate: bool) -> Tensor:
    """Squashes the last dimension, any number of rows; contiguous, in the dtype of `x`."""
    x = x.contiguous()
    v = torch.empty_like(x)
    if x.numel() > 0:
        grid, sizes = _tiles(x)
        with torch.cuda.device_of(x):
            squash_kernel[grid](x, v, APPROXIMATE=approximate, **sizes)
    return v


def squash_backward(grad: Tensor, x: Tensor, approximate: bool) -> Tensor:
    """The gradient by `x`, from `grad` and `x` of one shape; contiguous, in the dtype of `x`."""
    x, grad = x.contiguous(), grad.contiguous()
    dx = torch.empty_like(x)
    if x.numel() > 0:
        grid, sizes = _tiles(x)
        with torch.cuda.device_of(x):
            squash_backward_kernel[grid](grad, x, dx, APPROXIMATE=approximate, **sizes)
    return dx


def _tiles(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and the sizes that the kernels take."""
    D = x.shape[-1]
    N = x.numel() // D
    BLOCK_D = triton.next_power_of_2(D)
    BLOCK_N = max(1, TILE_SIZE // BLOCK_D)
    return (triton.cdiv(N, BLOCK_N),), {"N": N, "D": D, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D}
