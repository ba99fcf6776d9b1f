"""Squash in Triton: one pass over the vectors forward, one backward.

With n = |x| and u = x / n: v = f x. Backward from g = dL/dv:
    dx = f (g + q (g . u) u), of which the second term is 0 at n = 0.
Exactly f = n / (1 + n^2) and q = (1 - n^2) / (1 + n^2); approximately f = 1/2 and q = 0 where n <= 2, else f = 1 / n
and q = -1. No factor here is above 1 but n and 1 / n, so that nothing overflows while n does not.

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
def _norms(b_x):
    """|x| and 1 / |x| of the rows of `[N, D]`; instead of inf a large number, which turns the zero vector into zero."""
    # Squares of float32 overflow above 2e19 and underflow below 1e-23: those of numbers up to 1 are summed.
    b_max = tl.maximum(tl.max(tl.abs(b_x), axis=1), 1e-37)
    b_scaled = b_x * (1.0 / b_max)[:, None]
    b_norm = b_max * tl.sqrt(tl.sum(b_scaled * b_scaled, axis=1))
    return b_norm, 1.0 / tl.maximum(b_norm, 1e-37)


@triton.jit
def _factor(b_norm, b_inverse, APPROXIMATE: tl.constexpr):
    """f, as above."""
    if APPROXIMATE:
        return tl.where(b_norm <= 2.0, 0.5, b_inverse)
    else:
        b_least = tl.minimum(b_norm, b_inverse)  # n / (1 + n^2) is the same of n and of 1 / n
        return b_least / (1.0 + b_least * b_least)


@triton.jit
def squash_tile(b_x, APPROXIMATE: tl.constexpr):
    """The squashed rows of `[N, D]`."""
    b_norm, b_inverse = _norms(b_x)
    return b_x * _factor(b_norm, b_inverse, APPROXIMATE)[:, None]


@triton.jit
def squash_tile_backward(b_grad, b_x, APPROXIMATE: tl.constexpr):
    """The gradient at the rows of `[N, D]`."""
    b_norm, b_inverse = _norms(b_x)
    b_factor = _factor(b_norm, b_inverse, APPROXIMATE)
    b_unit = b_x * b_inverse[:, None]
    b_along = tl.sum(b_grad * b_unit, axis=1)
    if APPROXIMATE:
        b_along = tl.where(b_norm <= 2.0, 0.0, -b_along)
    else:
        b_along *= 1.0 - 2.0 * b_norm * b_factor
    return (b_grad + b_unit * b_along[:, None]) * b_factor[:, None]


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
