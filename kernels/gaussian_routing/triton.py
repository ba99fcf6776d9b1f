"""Moments of the votes of matrix capsules in Triton: votes and couplings are never stored.

Symbols as in cpu.py. Each kernel computes the votes that it needs anew, as tiles `[rows, parent types, D]`:

    children     lse_c, the logarithm of the sum of exp(logits) over all parents of a child
    moments      mass, sum of w u and of w u^2 for each parent, in parts, with w = exp(logits - lse) a; with dlogits
                 instead of w if BACKWARD: then what the gradients by prior, mean and precision are made of
    dchildren    da_c = sum over a child's parents of exp(logits - lse) dw, and then the gradient by its pose
    dweight      the gradient by a matrix, summed over rows, in parts

Children know their parents by residue: those at (y, x) with the same y mod stride and x mod stride lie under the same
places of the kernel, so a program takes children of one residue, and loops over these places. Nothing is added up by
atomics; parts are added by torch, so that results are the same from run to run. Here capsules are the last dimension:
poses `[I, B, h, w, D]`, means and precisions `[B, H, W, J, D]`.

D is padded to BLOCK_P * BLOCK_P; what lies outside is zero in poses and matrices, and so in votes and gradients.
"""

import triton
import triton.language as tl


@triton.jit
def _votes(
    p_x, p_w, p_offset, child, place, type_place, i_j, m_row, J,
    P: tl.constexpr, OFFSET: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Votes `[BLOCK_R, BLOCK_J, BLOCK_P * BLOCK_P]` of children for parent types."""
    o_d = tl.arange(0, BLOCK_P * BLOCK_P)
    row, column = o_d // BLOCK_P, o_d % BLOCK_P
    m_d = (row < P) & (column < P)
    b_votes = tl.zeros([BLOCK_R, BLOCK_J, BLOCK_P * BLOCK_P], tl.float32)
    if OFFSET:
        b_offset = tl.load(p_offset + place * (P * P) + row * P + column, mask=m_d, other=0.0)
        b_votes += b_offset[None, None, :]
    for k in tl.static_range(P):
        b_x = tl.load(
            p_x + child[:, None] * (P * P) + (row * P + k)[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0
        )
        b_w = tl.load(
            p_w + (type_place.to(tl.int64) * J + i_j)[:, None] * (P * P) + (k * P + column)[None, :],
            mask=(i_j < J)[:, None] & m_d[None, :], other=0.0,
        )  # fmt: skip
        b_votes += b_x[:, None, :] * b_w[None, :, :]
    return b_votes


@triton.jit
def _parents(p, parent, i_j, m_row, J, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """What `[B, H, W, J, D]` has for parents, `[BLOCK_R, BLOCK_J, BLOCK_P * BLOCK_P]`."""
    o_d = tl.arange(0, BLOCK_P * BLOCK_P)
    row, column = o_d // BLOCK_P, o_d % BLOCK_P
    offsets = (parent[:, None] * J + i_j[None, :])[:, :, None] * (P * P) + (row * P + column)[None, None, :]
    mask = (m_row[:, None] & (i_j < J)[None, :])[:, :, None] & ((row < P) & (column < P))[None, None, :]
    return tl.load(p + offsets, mask=mask, other=0.0)


@triton.jit
def _parent_scalars(p, parent, i_j, m_row, J, other):
    """What `[B, H, W, J]` has for parents, `[BLOCK_R, BLOCK_J]`."""
    mask = m_row[:, None] & (i_j < J)[None, :]
    return tl.load(p + parent[:, None] * J + i_j[None, :], mask=mask, other=other)


@triton.jit
def _residue_children(h, w, B, SY, SX, BLOCK_R: tl.constexpr):
    """Sample, place in the grid of the residue, child's position, and which there are, of a program's children."""
    ry, rx = tl.program_id(2) // SX, tl.program_id(2) % SX
    num_y, num_x = tl.cdiv(h, SY), tl.cdiv(w, SX)
    i_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    n_x, n_y, i_b = i_r % num_x, i_r // num_x % num_y, i_r // (num_x * num_y)
    y, x = n_y * SY + ry, n_x * SX + rx
    return i_b, n_y, n_x, y, x, ry, rx, (i_b < B) & (y < h) & (x < w)


@triton.jit
def children_kernel(
    p_x, p_w, p_offset, p_mean, p_precision, p_prior, p_lse, B, J, h, w, H, W, Kh, Kw, SY, SX,
    P: tl.constexpr, OFFSET: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """lse `[I, B, h, w]`. A program for each tile of children of one type and residue."""
    i_i = tl.program_id(1)
    i_b, n_y, n_x, y, x, ry, rx, m_child = _residue_children(h, w, B, SY, SX, BLOCK_R)
    child = ((i_i.to(tl.int64) * B + i_b) * h + y) * w + x
    b_max = tl.full([BLOCK_R], -1e30, tl.float32)
    b_total = tl.zeros([BLOCK_R], tl.float32)
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
                b_precision = _parents(p_precision, parent, i_j, m_row, J, P, BLOCK_P)
                b_logits = _parent_scalars(p_prior, parent, i_j, m_row, J, 0.0) - tl.sum(
                    b_precision * b_u * b_u, axis=2
                )
                b_logits = tl.where(m_row[:, None] & (i_j < J)[None, :], b_logits, -1e30)
                b_new_max = tl.maximum(b_max, tl.max(b_logits, axis=1))
                b_total = b_total * tl.exp(b_max - b_new_max) + tl.sum(tl.exp(b_logits - b_new_max[:, None]), axis=1)
                b_max = b_new_max
    tl.store(p_lse + child, b_max + tl.log(b_total), mask=m_child)


@triton.jit
def moments_kernel(
    p_x, p_a, p_w, p_offset, p_mean, p_precision, p_prior, p_lse, p_dmass, p_ds1, p_ds2, p_da,
    p_mass, p_first, p_second, B, num_types, J, h, w, H, W, Kh, Kw, SY, SX, num_parts,
    P: tl.constexpr, OFFSET: tl.constexpr, EQUAL: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums of w, w u and w u^2, `[num_parts, B, H, W, J]` and `[..., D]`; of dlogits instead of w if BACKWARD. A
    program for each tile of parents and part of the child types."""
    i_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    i_part = tl.program_id(2)
    m_row = i_r < B * H * W
    l_x, l_y, i_b = i_r % W, i_r // W % H, i_r // (W * H)
    parent = i_r.to(tl.int64)
    b_mean = _parents(p_mean, parent, i_j, m_row, J, P, BLOCK_P)
    b_precision = tl.zeros_like(b_mean)
    b_prior = tl.zeros([BLOCK_R, BLOCK_J], tl.float32)
    if not EQUAL:
        b_precision = _parents(p_precision, parent, i_j, m_row, J, P, BLOCK_P)
        b_prior = _parent_scalars(p_prior, parent, i_j, m_row, J, 0.0)
    b_dmass = b_prior
    b_ds1, b_ds2 = b_mean, b_mean
    if BACKWARD:
        b_dmass = _parent_scalars(p_dmass, parent, i_j, m_row, J, 0.0)
        b_ds1 = _parents(p_ds1, parent, i_j, m_row, J, P, BLOCK_P)
        b_ds2 = _parents(p_ds2, parent, i_j, m_row, J, P, BLOCK_P)
    b_mass = tl.zeros([BLOCK_R, BLOCK_J], tl.float32)
    b_first, b_second = tl.zeros_like(b_mean), tl.zeros_like(b_mean)
    num_votes = num_types * Kh * Kw
    per_part = tl.cdiv(num_votes, num_parts)
    for n in range(i_part * per_part, tl.minimum(num_votes, (i_part + 1) * per_part)):
        i_i, place = n // (Kh * Kw), n % (Kh * Kw)
        y, x = l_y * SY + place // Kw, l_x * SX + place % Kw
        child = ((tl.cast(i_i, tl.int64) * B + i_b) * h + y) * w + x
        b_u = _votes(p_x, p_w, p_offset, child, place, tl.cast(n, tl.int64), i_j, m_row, J,
                     P, OFFSET, BLOCK_R, BLOCK_J, BLOCK_P)  # fmt: skip
        b_u -= b_mean
        b_logits = b_prior
        if not EQUAL:
            b_logits -= tl.sum(b_precision * b_u * b_u, axis=2)
        b_lse = tl.load(p_lse + child, mask=m_row, other=0.0)
        b_a = tl.load(p_a + child, mask=m_row, other=0.0)
        b_weight = tl.exp(b_logits - b_lse[:, None]) * b_a[:, None]
        if BACKWARD:
            b_dw = b_dmass + tl.sum((b_ds1 + b_ds2 * b_u) * b_u, axis=2)
            b_weight *= b_dw - tl.load(p_da + child, mask=m_row, other=0.0)[:, None]
        b_mass += b_weight
        b_weighted = b_weight[:, :, None] * b_u
        b_first += b_weighted
        b_second += b_weighted * b_u
    o_d = tl.arange(0, BLOCK_P * BLOCK_P)
    row, column = o_d // BLOCK_P, o_d % BLOCK_P
    scalars = (tl.cast(i_part, tl.int64) * (B * H * W) + parent)[:, None] * J + i_j[None, :]
    mask = m_row[:, None] & (i_j < J)[None, :]
    tl.store(p_mass + scalars, b_mass, mask=mask)
    offsets = scalars[:, :, None] * (P * P) + (row * P + column)[None, None, :]
    mask = mask[:, :, None] & ((row < P) & (column < P))[None, None, :]
    tl.store(p_first + offsets, b_first, mask=mask)
    tl.store(p_second + offsets, b_second, mask=mask)
