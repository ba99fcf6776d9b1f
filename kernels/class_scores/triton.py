"""Lengths of capsules and the margin loss in Triton: one launch each, where PyTorch's operators take dozens.

A program takes BLOCK_N of the N rows, each padded to a power of two. Half precision is computed in float32.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers in the tile of a program of 4 warps: 8 for each thread.
TILE_SIZE = 1024

# Classes above which a row does not fit into the registers of a program.
MAX_CLASSES = 8192


@triton.jit
def lengths_kernel(p_x, p_lengths, N, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """|x| of the rows of `[N, D]`."""
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    b_x = tl.load(p_x + i_n[:, None] * D + o_d, mask=(i_n < N)[:, None] & (o_d < D), other=0.0).to(tl.float32)
    b_lengths = tl.sqrt(tl.sum(b_x * b_x, axis=1))
    tl.store(p_lengths + i_n, b_lengths.to(p_lengths.dtype.element_ty), mask=i_n < N)


@triton.jit
def lengths_backward_kernel(p_grad, p_x, p_dx, N, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """dx = g x / |x|, and 0 where that is not defined."""
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_x = (i_n < N)[:, None] & (o_d < D)
    b_x = tl.load(p_x + i_n[:, None] * D + o_d, mask=m_x, other=0.0).to(tl.float32)
    b_grad = tl.load(p_grad + i_n, mask=i_n < N, other=0.0).to(tl.float32)
    b_length = tl.sqrt(tl.sum(b_x * b_x, axis=1))
    b_factor = tl.where(b_length == 0.0, 0.0, b_grad / tl.where(b_length == 0.0, 1.0, b_length))
    tl.store(p_dx + i_n[:, None] * D + o_d, (b_x * b_factor[:, None]).to(p_dx.dtype.element_ty), mask=m_x)


@triton.jit
def margin_kernel(
    p_lengths, p_target, p_losses, p_slopes, N, J, m_plus, m_minus, absent,
    INDICES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Loss of each row of `[N, J]`, and its derivatives by the lengths.

    The target is indices `[N]` if INDICES, of which one out of range makes the loss of its row NaN; else weights of the
    classes `[N, J]`. `absent` is lambda.
    """
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_j = tl.arange(0, BLOCK_J)[None, :]
    m_row = i_n < N
    m_all = m_row[:, None] & (o_j < J)
    b_lengths = tl.load(p_lengths + i_n[:, None] * J + o_j, mask=m_all, other=0.0).to(tl.float32)
    if INDICES:
        b_index = tl.load(p_target + i_n, mask=m_row, other=0).to(tl.int64)
        b_present = (o_j == b_index[:, None]).to(tl.float32)
    else:
        b_present = tl.load(p_target + i_n[:, None] * J + o_j, mask=m_all, other=0).to(tl.float32)
    # A length that is NaN stays one.
    b_short = tl.where(b_lengths >= m_plus, 0.0, m_plus - b_lengths)
    b_long = tl.where(b_lengths <= m_minus, 0.0, b_lengths - m_minus)
    b_absent = absent * (1.0 - b_present)
    b_losses = tl.where(m_all, b_present * b_short * b_short + b_absent * b_long * b_long, 0.0)
    b_loss = tl.sum(b_losses, axis=1)
    if INDICES:
        b_loss = tl.where((b_index >= 0) & (b_index < J), b_loss, float("nan"))
    tl.store(p_losses + i_n, b_loss, mask=m_row)
    tl.store(p_slopes + i_n[:, None] * J + o_j, 2.0 * (b_absent * b_long - b_present * b_short), mask=m_all)


def lengths(x: Tensor) -> Tensor:
    """Lengths `[...]` of the vectors of `[..., D]`, in their type."""
    x = x.contiguous()
    found = x.new_empty(x.shape[:-1])
    if found.numel() > 0:
        grid, sizes = _tiles(x)
        with torch.cuda.device_of(x):
            lengths_kernel[grid](x, found, **sizes)
    return found


def lengths_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient by `x` `[..., D]`, from that by its lengths; contiguous, in the type of `x`."""
    x, grad = x.contiguous(), grad.contiguous()
    dx = torch.empty_like(x)
    if x.numel() > 0:
        grid, sizes = _tiles(x)
        with torch.cuda.device_of(x):
            lengths_backward_kernel[grid](grad, x, dx, **sizes)
    return dx


def margin_losses(
    lengths: Tensor, target: Tensor, m_plus: float, m_minus: float, lambda_: float
) -> tuple[Tensor, Tensor]:
    """The margin loss of each image `[B]`, and its derivatives by the lengths `[B, J]`, both float32.

    Args:
        lengths: Lengths of the class capsules `[B, J]`.
        target: Class indices `[B]` or weights of the classes `[B, J]`.
        m_plus: m+.
        m_minus: m-.
        lambda_: Weight of the absent classes.
    """
    lengths, target = lengths.contiguous(), target.contiguous()
    if target.dtype == torch.bool:
        target = target.view(torch.uint8)
    N, J = lengths.shape
    losses = lengths.new_empty(N, dtype=torch.float32)
    slopes = torch.empty_like(lengths, dtype=torch.float32)
    if N > 0:
        BLOCK_J = triton.next_power_of_2(max(1, J))
        BLOCK_N = max(1, min(TILE_SIZE // BLOCK_J, triton.next_power_of_2(N)))
        with torch.cuda.device_of(lengths):
            margin_kernel[(triton.cdiv(N, BLOCK_N),)](
                lengths, target, losses, slopes, N=N, J=J,
                m_plus=float(m_plus), m_minus=float(m_minus), absent=float(lambda_),
                INDICES=target.dim() == 1, BLOCK_N=BLOCK_N, BLOCK_J=BLOCK_J,
            )  # fmt: skip
    return losses, slopes


def _tiles(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and the sizes that the kernels of vectors take."""
    D = x.shape[-1]
    N = math.prod(x.shape[:-1])
    BLOCK_D = triton.next_power_of_2(max(1, D))
    BLOCK_N = max(1, TILE_SIZE // BLOCK_D)
    return (triton.cdiv(N, BLOCK_N),), {"N": N, "D": D, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D}
