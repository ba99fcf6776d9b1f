"""Lengths of capsules and the margin loss in Triton: one launch each, where PyTorch's operators take dozens.

A program takes BLOCK_N of the N rows, each padded to a power of two. Half precision is computed in float32. Derivatives
come with the results, so that a backward pass is one product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers in the tile of a program of 4 warps: 8 for each thread.
TILE_SIZE = 1024

# Numbers of a row, above which registers are short.
MAX_WIDTH = 4096


@triton.jit
def lengths_kernel(
    p_x, p_lengths, p_units, p_inverses, N, D: tl.constexpr,
    UNITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """|x| of the rows of `[N, D]`; if UNITS also x / |x| and 1 / |x|, and 0 where these are not defined."""
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_x = (i_n < N)[:, None] & (o_d < D)
    b_x = tl.load(p_x + i_n[:, None] * D + o_d, mask=m_x, other=0.0).to(tl.float32)
    # Squares of small numbers underflow: those of numbers up to 1 are summed.
    b_max = tl.max(tl.abs(b_x), axis=1)
    b_max = tl.where((b_max > 0.0) & (b_max < float("inf")), b_max, 1.0)
    b_x = b_x / b_max[:, None]
    b_root = tl.sqrt(tl.sum(b_x * b_x, axis=1))
    tl.store(p_lengths + i_n, (b_max * b_root).to(p_lengths.dtype.element_ty), mask=i_n < N)
    if UNITS:
        b_inverses = tl.where(b_root == 0.0, 0.0, 1.0 / tl.where(b_root == 0.0, 1.0, b_root))
        tl.store(p_units + i_n[:, None] * D + o_d, b_x * b_inverses[:, None], mask=m_x)
        tl.store(p_inverses + i_n, b_inverses / b_max, mask=i_n < N)


@triton.jit
def margin_kernel(
    p_lengths, p_target, p_losses, p_slopes, p_curvatures, N, J, m_plus, m_minus, absent,
    INDICES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Loss of each row of `[N, J]`, and its first and second derivatives by the lengths.

    The target is indices `[N]` if INDICES, of which one out of range makes the numbers of its row NaN; else weights of
    the classes `[N, J]`. `absent` is lambda.
    """
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_j = tl.arange(0, BLOCK_J)[None, :]
    m_row = i_n < N
    m_all = m_row[:, None] & (o_j < J)
    o_all = i_n[:, None] * J + o_j
    b_lengths = tl.load(p_lengths + o_all, mask=m_all, other=0.0).to(tl.float32)
    if INDICES:
        b_index = tl.load(p_target + i_n, mask=m_row, other=0).to(tl.int64)[:, None]
        b_present = tl.where(o_j == b_index, 1.0, 0.0)
        b_present = tl.where((b_index >= 0) & (b_index < J), b_present, float("nan"))
    else:
        b_present = tl.load(p_target + o_all, mask=m_all, other=0).to(tl.float32)
    b_absent = absent * (1.0 - b_present)
    # A length that is NaN stays one.
    b_short = tl.where(b_lengths >= m_plus, 0.0, m_plus - b_lengths)
    b_long = tl.where(b_lengths <= m_minus, 0.0, b_lengths - m_minus)
    b_losses = b_present * b_short * b_short + b_absent * b_long * b_long
    tl.store(p_losses + i_n, tl.sum(tl.where(m_all, b_losses, 0.0), axis=1), mask=m_row)
    tl.store(p_slopes + o_all, 2.0 * (b_absent * b_long - b_present * b_short), mask=m_all)
    b_curvatures = tl.where(b_lengths < m_plus, b_present, 0.0) + tl.where(b_lengths > m_minus, b_absent, 0.0)
    tl.store(p_curvatures + o_all, 2.0 * b_curvatures, mask=m_all)


def lengths(x: Tensor, dtype: torch.dtype, with_units: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Lengths `[...]` of the vectors of `[..., D]`; if asked for, the vectors over them and 1 over them, float32.

    Args:
        x: Vectors, float32 or half.
        dtype: Type of the lengths.
        with_units: Whether the other results have their numbers.
    """
    x, D = x.contiguous(), x.shape[-1]
    found, units = x.new_empty(x.shape[:-1], dtype=dtype), torch.empty_like(x, dtype=torch.float32)
    inverses = torch.empty_like(found, dtype=torch.float32)
    if x.numel() > 0:
        BLOCK_D, N = triton.next_power_of_2(D), found.numel()
        BLOCK_N = max(1, TILE_SIZE // BLOCK_D)
        with torch.cuda.device_of(x):
            lengths_kernel[(triton.cdiv(N, BLOCK_N),)](
                x, found, units, inverses, N=N, D=D, UNITS=with_units, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D
            )
    else:
        found.zero_(), inverses.zero_()
    return found, units, inverses


def margin_losses(
    lengths: Tensor, target: Tensor, m_plus: float, m_minus: float, lambda_: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The margin loss of each image `[B]`, and its first and second derivatives by the lengths `[B, J]`, all float32.

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
    slopes, curvatures = lengths.new_empty(2, N, J, dtype=torch.float32)
    if N > 0:
        BLOCK_J = triton.next_power_of_2(max(1, J))
        BLOCK_N = max(1, min(TILE_SIZE // BLOCK_J, triton.next_power_of_2(N)))
        with torch.cuda.device_of(lengths):
            margin_kernel[(triton.cdiv(N, BLOCK_N),)](
                lengths, target, losses, slopes, curvatures, N=N, J=J,
                m_plus=float(m_plus), m_minus=float(m_minus), absent=float(lambda_),
                INDICES=target.dim() == 1, BLOCK_N=BLOCK_N, BLOCK_J=BLOCK_J,
            )  # fmt: skip
    return losses, slopes, curvatures
