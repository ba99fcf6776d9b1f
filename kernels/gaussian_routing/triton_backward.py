"""Gradients by children and by matrices in Triton, see triton.py."""

import triton
import triton.language as tl

from .triton import _parent_scalars, _parents, _residue_children, _votes


@triton.jit
def _vote_gradient(
    b_u, parent, i_j, m_row, b_lse, b_a, b_da,
    p_precision, p_prior, p_dmass, p_ds1, p_ds2, J,
    P: tl.constexpr, EQUAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The couplings times dw, and the gradient by the votes for given da."""
    b_ds1 = _parents(p_ds1, parent, i_j, m_row, J, P, BLOCK_P)
    b_ds2 = _parents(p_ds2, parent, i_j, m_row, J, P, BLOCK_P)
    b_half = b_ds2 * b_u
    b_dw = _parent_scalars(p_dmass, parent, i_j, m_row, J, 0.0) + tl.sum((b_ds1 + b_half) * b_u, axis=2)
    b_logits = tl.zeros([BLOCK_R, BLOCK_J], tl.float32)
    b_precision = tl.zeros_like(b_u)
    if not EQUAL:
        b_precision = _parents(p_precision, parent, i_j, m_row, J, P, BLOCK_P)
        b_logits = _parent_scalars(p_prior, parent, i_j, m_row, J, 0.0) - tl.sum(b_precision * b_u * b_u, axis=2)
    b_r = tl.where(m_row[:, None] & (i_j < J)[None, :], tl.exp(b_logits - b_lse[:, None]), 0.0)
    b_weight = b_r * b_a[:, None]
    b_du = b_weight[:, :, None] * (b_ds1 + 2.0 * b_half)
    if not EQUAL:
        b_dlogits = b_weight * (b_dw - b_da[:, None])
        b_du -= b_dlogits[:, :, None] * (2.0 * b_precision * b_u)
    return b_r * b_dw, b_du


@triton.jit
def dchildren_kernel(
    p_x, p_a, p_w, p_offset, p_mean, p_precision, p_prior, p_lse, p_dmass, p_ds1, p_ds2, p_da, p_dx,
    B, J, h, w, H, W, Kh, Kw, SY, SX,
    P: tl.constexpr, OFFSET: tl.constexpr, EQUAL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """da `[I, B, h, w]` and the gradient by poses `[I, B, h, w, D]`. A program for each tile of children of one type
    and residue."""
    i_i = tl.program_id(1)
    i_b, n_y, n_x, y, x, ry, rx, m_child = _residue_children(h, w, B, SY, SX, BLOCK_R)
    child = ((i_i.to(tl.int64) * B + i_b) * h + y) * w + x
    b_lse = tl.load(p_lse + child, mask=m_child, other=0.0)
    b_a = tl.load(p_a + child, mask=m_child, other=0.0)
    o_p = tl.arange(0, BLOCK_P)
    o_d = tl.arange(0, BLOCK_P * BLOCK_P)
    column = o_d % BLOCK_P
    m_d = (o_d // BLOCK_P < P) & (column < P)
    b_da = tl.zeros([BLOCK_R], tl.float32)
    b_dx = tl.zeros([BLOCK_R, BLOCK_P, BLOCK_P], tl.float32)
    for step in range(2):  # da first, which the gradient by votes needs
        b_sum = tl.zeros([BLOCK_R], tl.float32)
        for t_y in range(0, tl.cdiv(Kh - ry, SY)):
            for t_x in range(0, tl.cdiv(Kw - rx, SX)):
                place = (ry + t_y * SY) * Kw + rx + t_x * SX
                l_y, l_x = n_y - t_y, n_x - t_x
                m_row = m_child & (l_y >= 0) & (l_y < H) & (l_x >= 0) & (l_x < W)
                parent = (i_b.to(tl.int64) * H + l_y) * W + l_x
                for j in range(0, J, BLOCK_J):
                    i_j = j + tl.arange(0, BLOCK_J)
                    b_u = _votes(
                        p_x, p_w, p_offset, child, place, i_i * Kh * Kw + place, i_j, m_row, J,
                        P, OFFSET, BLOCK_R, BLOCK_J, BLOCK_P,
                    )  # fmt: skip
                    b_u -= _parents(p_mean, parent, i_j, m_row, J, P, BLOCK_P)
                    b_products, b_du = _vote_gradient(
                        b_u, parent, i_j, m_row, b_lse, b_a, b_da,
                        p_precision, p_prior, p_dmass, p_ds1, p_ds2, J, P, EQUAL, BLOCK_R, BLOCK_J, BLOCK_P,
                    )  # fmt: skip
                    b_sum += tl.sum(b_products, axis=1)
                    if step == 1:
                        for k in tl.static_range(P):
                            b_w = tl.load(
                                p_w + (tl.cast(i_i * Kh * Kw + place, tl.int64) * J + i_j)[:, None] * (P * P)
                                + (k * P + column)[None, :],
                                mask=(i_j < J)[:, None] & m_d[None, :], other=0.0,
                            )  # fmt: skip
                            b_by_row = tl.reshape(tl.sum(b_du * b_w[None, :, :], axis=1), [BLOCK_R, BLOCK_P, BLOCK_P])
                            b_dx += tl.sum(b_by_row, axis=2)[:, :, None] * tl.where(o_p == k, 1.0, 0.0)[None, None, :]
        if step == 0:
            b_da = b_sum
    tl.store(p_da + child, b_da, mask=m_child)
    offsets = child[:, None, None] * (P * P) + o_p[None, :, None] * P + o_p[None, None, :]
    mask = m_child[:, None, None] & (o_p < P)[None, :, None] & (o_p < P)[None, None, :]
    tl.store(p_dx + offsets, b_dx, mask=mask)


@triton.jit
def dweight_kernel(
    p_x, p_a, p_w, p_offset, p_mean, p_precision, p_prior, p_lse, p_dmass, p_ds1, p_ds2, p_da, p_dw,
    B, num_types, J, h, w, H, W, Kh, Kw, SY, SX, num_parts,
    P: tl.constexpr, OFFSET: tl.constexpr, EQUAL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The gradient by matrices, `[num_parts, I, Kh, Kw, J, D]`. A program for each matrix's place, tile of parent types
    and part of the rows."""
    n = tl.program_id(0)
    i_j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    i_part = tl.program_id(2)
    i_i, place = n // (Kh * Kw), n % (Kh * Kw)
    num_rows = B * H * W
    per_part = tl.cdiv(tl.cdiv(num_rows, num_parts), BLOCK_R) * BLOCK_R
    o_p = tl.arange(0, BLOCK_P)
    o_d = tl.arange(0, BLOCK_P * BLOCK_P)
    row = o_d // BLOCK_P
    m_d = (row < P) & (o_d % BLOCK_P < P)
    b_dw = tl.zeros([BLOCK_J, BLOCK_P, BLOCK_P], tl.float32)  # [j, k, column]
    for start in range(i_part * per_part, tl.minimum(num_rows, (i_part + 1) * per_part), BLOCK_R):
        i_r = start + tl.arange(0, BLOCK_R)
        m_row = i_r < num_rows
        l_x, l_y, i_b = i_r % W, i_r // W % H, i_r // (W * H)
        parent = i_r.to(tl.int64)
        y, x = l_y * SY + place // Kw, l_x * SX + place % Kw
        child = ((i_i.to(tl.int64) * B + i_b) * h + y) * w + x
        b_lse = tl.load(p_lse + child, mask=m_row, other=0.0)
        b_a = tl.load(p_a + child, mask=m_row, other=0.0)
        b_da = tl.load(p_da + child, mask=m_row, other=0.0)
        b_u = _votes(p_x, p_w, p_offset, child, place, n, i_j, m_row, J,
                     P, OFFSET, BLOCK_R, BLOCK_J, BLOCK_P)  # fmt: skip
        b_u -= _parents(p_mean, parent, i_j, m_row, J, P, BLOCK_P)
        _, b_du = _vote_gradient(
            b_u, parent, i_j, m_row, b_lse, b_a, b_da,
            p_precision, p_prior, p_dmass, p_ds1, p_ds2, J, P, EQUAL, BLOCK_R, BLOCK_J, BLOCK_P,
        )  # fmt: skip
        for k in tl.static_range(P):
            b_x = tl.load(
                p_x + child[:, None] * (P * P) + (row * P + k)[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0
            )
            b_by_row = tl.reshape(tl.sum(b_du * b_x[:, None, :], axis=0), [BLOCK_J, BLOCK_P, BLOCK_P])
            b_dw += tl.sum(b_by_row, axis=1)[:, None, :] * tl.where(o_p == k, 1.0, 0.0)[None, :, None]
    offsets = ((tl.cast(i_part, tl.int64) * num_types * Kh * Kw + n) * J + i_j)[:, None, None] * (P * P)
    offsets += o_p[None, :, None] * P + o_p[None, None, :]
    mask = (i_j < J)[:, None, None] & (o_p < P)[None, :, None] & (o_p < P)[None, None, :]
    tl.store(p_dw + offsets, b_dw, mask=mask)
