"""Dynamic routing in Triton for few classes: a program has the votes of a capsule for all of them in registers.

Notation as in dynamic_routing.py. Votes are never stored, but computed for each use by form (a) of the design,
u_ij = x_i W_tj: one small product for all j, from which logits, softmax and weighted sum follow at once, so that x is
read once for each iteration.

    uniform     sum over i of u_ij, in parts: one product with the poses that share a matrix added up
    route       sum over i of c_ij u_ij, in parts; if BACKWARD of dl_ij u_ij, and c and dl are kept for the gradients:
                8 * (R - 1) * B * I * J bytes
    gradients   du_ij from these; dx_i = du_i W_t^T, dW_t = sum over b and the i of t of x_i^T du_i, in parts

The classes are in two groups, since tiles have sizes of powers of 2: JA, the largest that fits, and the JB that are
left. A tile of votes is [BLOCK_B samples, J_ * BLOCK_D], one of couplings [BLOCK_B, J_], for one capsule.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import classes_tile, coupling_tile, matrix_tile, pose_tile, samples
from .tuning import launcher, tuned

# Numbers of a sample's votes for all classes, above which they do not fit into registers, and of a capsule's matrix,
# above which its tiles do not fit into shared memory.
MAX_VOTES = 256
MAX_MATRIX = 8192

# Bytes to keep for gradients, above which per_class.py, which keeps J times less, takes gradients.
MAX_KEPT = 2**30

# Warps to have at work: two for each scheduler of a large GPU.
NUM_WARPS = 1056

# Poses in a row of a product for the uniform sum.
WIDTH = 64


@triton.jit
def load_votes(
    b_x, p_w, i_t, j_first, J: tl.constexpr, K: tl.constexpr, D: tl.constexpr, NUM_J: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    p_tile, m_w = matrix_tile(p_w, i_t, j_first, J, K, D, NUM_J, BLOCK_K, BLOCK_D)
    b_w = tl.load(p_tile, mask=m_w, other=0.0).to(tl.float32)
    return tl.dot(b_x, b_w, input_precision=PRECISION)


@triton.jit
def agreement(b_u, b_v, NUM_J: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """u_j . v_j, `[BLOCK_B, NUM_J]`."""
    return tl.sum(tl.reshape(b_u * b_v, [BLOCK_B, NUM_J, BLOCK_D]), axis=2)


@triton.jit
def weighted(b_c, b_u, NUM_J: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """c_j u_j, `[BLOCK_B, NUM_J * BLOCK_D]`."""
    b_product = b_c[:, :, None] * tl.reshape(b_u, [BLOCK_B, NUM_J, BLOCK_D])
    return tl.reshape(b_product, [BLOCK_B, NUM_J * BLOCK_D])


# ---------------------------------------------------------------------------------------------------------------------
# Sums
# ---------------------------------------------------------------------------------------------------------------------


@tuned(
    dict(BLOCK_B=16, warps=2, stages=2),
    dict(BLOCK_B=16, warps=1, stages=2),
    dict(BLOCK_B=32, warps=2, stages=2),
    dict(BLOCK_B=64, warps=8, stages=2),
)
@triton.jit
def route_kernel(
    p_x, p_w, p_v, p_ds, p_c, p_dl, p_parts, B, T, P, MAX_B, capsules_per_part,
    J: tl.constexpr, K: tl.constexpr, D: tl.constexpr, JA: tl.constexpr, JB: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BACKWARD: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The sum over i of c_ij u_ij, of dl_ij u_ij if BACKWARD, in parts `[num_parts, B, J, D]`; c and dl then.

    A program for each tile of samples and part of the capsules. PADDED if JA + JB is more than J.
    """
    i_b = tl.program_id(0) * BLOCK_B
    o_b, m_b = samples(i_b, B, BLOCK_B)
    i_part = tl.program_id(1)
    num_i = T * P
    p_first, m_first = classes_tile(p_v, i_b, o_b, 0, J, D, JA, BLOCK_D)
    b_va = tl.load(p_first, mask=m_first, other=0.0)
    b_sa = tl.zeros([BLOCK_B, JA * BLOCK_D], tl.float32)
    if BACKWARD:
        p_first, m_first = classes_tile(p_ds, i_b, o_b, 0, J, D, JA, BLOCK_D)
        b_ga = tl.load(p_first, mask=m_first, other=0.0)
    if JB > 0:
        p_rest, m_rest = classes_tile(p_v, i_b, o_b, JA, J, D, JB, BLOCK_D)
        b_vb = tl.load(p_rest, mask=m_rest, other=0.0)
        b_sb = tl.zeros([BLOCK_B, JB * BLOCK_D], tl.float32)
        if BACKWARD:
            p_rest, m_rest = classes_tile(p_ds, i_b, o_b, JA, J, D, JB, BLOCK_D)
            b_gb = tl.load(p_rest, mask=m_rest, other=0.0)

    first = i_part * capsules_per_part
    for i in range(first, tl.minimum(num_i, first + capsules_per_part)):
        p_tile, m_x = pose_tile(p_x, i_b, o_b, i, num_i, K, BLOCK_K)
        b_x = tl.load(p_tile, mask=m_x, other=0.0).to(tl.float32)
        b_ua = load_votes(b_x, p_w, i // P, 0, J, K, D, JA, BLOCK_K, BLOCK_D, PRECISION)
        b_la = agreement(b_ua, b_va, JA, BLOCK_B, BLOCK_D)
        b_max = tl.max(b_la, axis=1)
        if JB > 0:
            b_ub = load_votes(b_x, p_w, i // P, JA, J, K, D, JB, BLOCK_K, BLOCK_D, PRECISION)
            b_lb = agreement(b_ub, b_vb, JB, BLOCK_B, BLOCK_D)
            if PADDED:
                b_lb = tl.where(JA + tl.arange(0, JB)[None, :] < J, b_lb, float("-inf"))
            b_max = tl.maximum(b_max, tl.max(b_lb, axis=1))
        b_ca = tl.exp(b_la - b_max[:, None])
        b_total = tl.sum(b_ca, axis=1)
        if JB > 0:
            b_cb = tl.exp(b_lb - b_max[:, None])
            b_total += tl.sum(b_cb, axis=1)
        b_inverse = 1.0 / b_total
        b_ca *= b_inverse[:, None]
        if JB > 0:
            b_cb *= b_inverse[:, None]
        if BACKWARD:
            p_tile, m_c = coupling_tile(p_c, i_b, o_b, i, 0, num_i, J, JA)
            tl.store(p_tile, b_ca, mask=m_b & m_c)
            b_dca = agreement(b_ua, b_ga, JA, BLOCK_B, BLOCK_D)
            b_delta = tl.sum(b_ca * b_dca, axis=1)
            if JB > 0:
                p_tile, m_c = coupling_tile(p_c, i_b, o_b, i, JA, num_i, J, JB)
                tl.store(p_tile, b_cb, mask=m_b & m_c)
                b_dcb = agreement(b_ub, b_gb, JB, BLOCK_B, BLOCK_D)
                b_delta += tl.sum(b_cb * b_dcb, axis=1)
            b_ca *= b_dca - b_delta[:, None]
            p_tile, m_c = coupling_tile(p_dl, i_b, o_b, i, 0, num_i, J, JA)
            tl.store(p_tile, b_ca, mask=m_b & m_c)
            if JB > 0:
                b_cb *= b_dcb - b_delta[:, None]
                p_tile, m_c = coupling_tile(p_dl, i_b, o_b, i, JA, num_i, J, JB)
                tl.store(p_tile, b_cb, mask=m_b & m_c)
        b_sa += weighted(b_ca, b_ua, JA, BLOCK_B, BLOCK_D)
        if JB > 0:
            b_sb += weighted(b_cb, b_ub, JB, BLOCK_B, BLOCK_D)

    p_parts += i_part.to(tl.int64) * B * J * D
    p_first, m_first = classes_tile(p_parts, i_b, o_b, 0, J, D, JA, BLOCK_D)
    tl.store(p_first, b_sa, mask=m_b & m_first)
    if JB > 0:
        p_rest, m_rest = classes_tile(p_parts, i_b, o_b, JA, J, D, JB, BLOCK_D)
        tl.store(p_rest, b_sb, mask=m_b & m_rest)


@tuned(dict(BLOCK_B=16, warps=4, stages=2))
@triton.jit
def uniform_kernel(
    p_x, p_w, p_parts, B, T, P, MAX_B, tiles_per_part,
    J: tl.constexpr, K: tl.constexpr, D: tl.constexpr, JA: tl.constexpr, JB: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The sum over i of u_ij, in parts `[num_parts, B, J, D]`.

    A program for each tile of samples and part of the tiles of types and their capsules. A tile of poses is [BLOCK_B,
    BLOCK_P capsules of a type, BLOCK_T * BLOCK_K], added up over these capsules.
    """
    i_b = tl.program_id(0) * BLOCK_B
    o_b, m_b = samples(i_b, B, BLOCK_B)
    i_part = tl.program_id(1)
    num_p = tl.cdiv(P, BLOCK_P)
    num_tiles = tl.cdiv(T, BLOCK_T) * num_p
    o_row = tl.arange(0, BLOCK_T * BLOCK_K)
    o_k = o_row % BLOCK_K
    o_p = tl.arange(0, BLOCK_P)
    o_a = tl.arange(0, JA * BLOCK_D)[None, :]
    m_a = o_a % BLOCK_D < D
    o_a = o_a // BLOCK_D * D + o_a % BLOCK_D
    b_sa = tl.zeros([BLOCK_B, JA * BLOCK_D], tl.float32)
    if JB > 0:
        o_c = tl.arange(0, JB * BLOCK_D)[None, :]
        m_c = (o_c % BLOCK_D < D) & (JA + o_c // BLOCK_D < J)
        o_c = (JA + o_c // BLOCK_D) * D + o_c % BLOCK_D
        b_sb = tl.zeros([BLOCK_B, JB * BLOCK_D], tl.float32)
    first = i_part * tiles_per_part
    for i_tile in range(first, tl.minimum(num_tiles, first + tiles_per_part)):
        o_t = i_tile // num_p * BLOCK_T + o_row // BLOCK_K
        o_i = i_tile % num_p * BLOCK_P + o_p
        m_row = (o_t < T) & (o_k < K)
        if BLOCK_P == 1:
            offsets = i_b.to(tl.int64) * T * P * K + o_b * (T * P * K) + ((o_t * P + i_tile % num_p) * K + o_k)[None, :]
            b_x = tl.load(p_x + offsets, mask=m_row[None, :], other=0.0).to(tl.float32)
        else:
            offsets = (
                i_b.to(tl.int64) * T * P * K
                + o_b[:, :, None] * (T * P * K)
                + ((o_t * P * K + o_k)[None, None, :] + (o_i * K)[None, :, None])
            )
            m_x = m_row[None, None, :] & (o_i < P)[None, :, None]
            b_x = tl.sum(tl.load(p_x + offsets, mask=m_x, other=0.0).to(tl.float32), axis=1)
        p_row = p_w + ((o_t.to(tl.int64) * K + o_k) * J * D)[:, None]
        b_w = tl.load(p_row + o_a, mask=m_row[:, None] & m_a, other=0.0).to(tl.float32)
        b_sa = tl.dot(b_x, b_w, b_sa, input_precision=PRECISION)
        if JB > 0:
            b_w = tl.load(p_row + o_c, mask=m_row[:, None] & m_c, other=0.0).to(tl.float32)
            b_sb = tl.dot(b_x, b_w, b_sb, input_precision=PRECISION)

    p_parts += i_part.to(tl.int64) * B * J * D
    p_first, m_first = classes_tile(p_parts, i_b, o_b, 0, J, D, JA, BLOCK_D)
    tl.store(p_first, b_sa, mask=m_b & m_first)
    if JB > 0:
        p_rest, m_rest = classes_tile(p_parts, i_b, o_b, JA, J, D, JB, BLOCK_D)
        tl.store(p_rest, b_sb, mask=m_b & m_rest)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def vote_gradients(
    p_c, p_dl, p_v, p_ds, i_b, o_b, i, j_first, B, num_i, R: tl.constexpr, J: tl.constexpr, D: tl.constexpr,
    NUM_J: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """du of one capsule and group of classes, `[BLOCK_B, NUM_J * BLOCK_D]`."""
    p_v, m_v = classes_tile(p_v, i_b, o_b, j_first, J, D, NUM_J, BLOCK_D)
    p_ds, m_v = classes_tile(p_ds, i_b, o_b, j_first, J, D, NUM_J, BLOCK_D)
    p_c, m_c = coupling_tile(p_c, i_b, o_b, i, j_first, num_i, J, NUM_J)
    p_dl, m_c = coupling_tile(p_dl, i_b, o_b, i, j_first, num_i, J, NUM_J)
    b_du = tl.load(p_ds, mask=m_v, other=0.0) * (1.0 / J)
    for r in tl.static_range(R - 1):
        b_ds = tl.load(p_ds + (r + 1) * (tl.cast(B, tl.int64) * J * D), mask=m_v, other=0.0)
        b_c = tl.load(p_c + r * (tl.cast(B, tl.int64) * num_i * J), mask=m_c, other=0.0)
        b_du += weighted(b_c, b_ds, NUM_J, BLOCK_B, BLOCK_D)
        b_v = tl.load(p_v + r * (tl.cast(B, tl.int64) * J * D), mask=m_v, other=0.0)
        b_dl = tl.load(p_dl + r * (tl.cast(B, tl.int64) * num_i * J), mask=m_c, other=0.0)
        b_du += weighted(b_dl, b_v, NUM_J, BLOCK_B, BLOCK_D)
    return b_du


@tuned(
    dict(BLOCK_B=16, warps=4, stages=2),
    dict(BLOCK_B=16, warps=2, stages=2),
    dict(BLOCK_B=16, warps=1, stages=2),
    dict(BLOCK_B=32, warps=4, stages=2),
)
@triton.jit
def gradients_kernel(
    p_x, p_w, p_c, p_dl, p_v, p_ds, p_dx, p_parts, B, T, P, MAX_B, tiles_per_part,
    R: tl.constexpr, J: tl.constexpr, K: tl.constexpr, D: tl.constexpr, JA: tl.constexpr, JB: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """dx `[B, I, K]` and dW in parts `[num_parts, T, K, J, D]`, from ds of r = 1..R and V^(r-1), c and dl of r = 2..R.

    A program for each type and part of the tiles of samples of its capsules.
    """
    i_t = tl.program_id(0)
    i_part = tl.program_id(1)
    num_i = T * P
    p_first, m_first = matrix_tile(p_w, i_t, 0, J, K, D, JA, BLOCK_K, BLOCK_D)
    b_wa = tl.trans(tl.load(p_first, mask=m_first, other=0.0).to(tl.float32))
    b_dwa = tl.zeros([BLOCK_K, JA * BLOCK_D], tl.float32)
    if JB > 0:
        p_rest, m_rest = matrix_tile(p_w, i_t, JA, J, K, D, JB, BLOCK_K, BLOCK_D)
        b_wb = tl.trans(tl.load(p_rest, mask=m_rest, other=0.0).to(tl.float32))
        b_dwb = tl.zeros([BLOCK_K, JB * BLOCK_D], tl.float32)
    num_tiles = tl.cdiv(B, BLOCK_B) * P
    first = i_part * tiles_per_part
    for i_tile in range(first, tl.minimum(num_tiles, first + tiles_per_part)):
        i_b = i_tile // P * BLOCK_B
        o_b, m_b = samples(i_b, B, BLOCK_B)
        i = i_t * P + i_tile % P
        p_tile, m_x = pose_tile(p_x, i_b, o_b, i, num_i, K, BLOCK_K)
        b_x = tl.trans(tl.load(p_tile, mask=m_b & m_x, other=0.0).to(tl.float32))
        b_du = vote_gradients(p_c, p_dl, p_v, p_ds, i_b, o_b, i, 0, B, num_i, R, J, D, JA, BLOCK_B, BLOCK_D)
        b_dx = tl.dot(b_du, b_wa, input_precision=PRECISION)
        b_dwa = tl.dot(b_x, b_du, b_dwa, input_precision=PRECISION)
        if JB > 0:
            b_dub = vote_gradients(p_c, p_dl, p_v, p_ds, i_b, o_b, i, JA, B, num_i, R, J, D, JB, BLOCK_B, BLOCK_D)
            b_dx = tl.dot(b_dub, b_wb, b_dx, input_precision=PRECISION)
            b_dwb = tl.dot(b_x, b_dub, b_dwb, input_precision=PRECISION)
        p_tile, m_x = pose_tile(p_dx, i_b, o_b, i, num_i, K, BLOCK_K)
        tl.store(p_tile, b_dx.to(p_dx.dtype.element_ty), mask=m_b & m_x)

    p_parts += i_part.to(tl.int64) * T * K * J * D
    p_first, m_first = matrix_tile(p_parts, i_t, 0, J, K, D, JA, BLOCK_K, BLOCK_D)
    tl.store(p_first, b_dwa.to(p_parts.dtype.element_ty), mask=m_first)
    if JB > 0:
        p_rest, m_rest = matrix_tile(p_parts, i_t, JA, J, K, D, JB, BLOCK_K, BLOCK_D)
        tl.store(p_rest, b_dwb.to(p_parts.dtype.element_ty), mask=m_rest)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers: the functions of per_class.py
# ---------------------------------------------------------------------------------------------------------------------


def fits(sizes: dict, num_iters: int) -> bool:
    """Whether registers, shared memory and the bytes to keep allow this form."""
    JA, JB = _groups(sizes["J"])
    votes = (JA + JB) * sizes["BLOCK_D"]
    kept = 8 * (num_iters - 1) * sizes["B"] * sizes["T"] * sizes["P"] * sizes["J"]
    # Offsets in a tile of samples are 32-bit numbers.
    in_tile = 64 * sizes["T"] * sizes["P"] * max(sizes["K"], sizes["J"])
    matrix = votes * max(16, sizes["BLOCK_K"])
    return votes <= MAX_VOTES and matrix <= MAX_MATRIX and kept <= MAX_KEPT and in_tile < 2**31


def uniform_sum(x: Tensor, weight: Tensor, sizes: dict) -> Tensor:
    B, T, P, J, K, D = (sizes[name] for name in "BTPJKD")
    BLOCK_K, BLOCK_P = sizes["BLOCK_K"], sizes["BLOCK_P"]
    BLOCK_T = max(1, 16 // BLOCK_K, min(WIDTH // BLOCK_K, triton.next_power_of_2(T)))
    num_tiles = triton.cdiv(T, BLOCK_T) * triton.cdiv(P, BLOCK_P)
    per_part, num_parts = _split(num_tiles, NUM_WARPS // (2 * triton.cdiv(B, 16)))
    parts = x.new_empty(num_parts, B, J, D, dtype=torch.float32)
    launcher(uniform_kernel, lambda meta: (triton.cdiv(B, meta["BLOCK_B"]), num_parts))(
        x, weight, parts, tiles_per_part=per_part, BLOCK_T=BLOCK_T, BLOCK_P=BLOCK_P, **_sizes(sizes, BLOCK_K)
    )
    return parts


def weighted_sum(x: Tensor, weight: Tensor, total: Tensor, sizes: dict) -> Tensor:
    return _route(x, weight, total, None, None, None, sizes)


def keep_for_gradients(x: Tensor, num_iters: int, sizes: dict) -> tuple[Tensor, Tensor]:
    """c and dl, `[R - 1, B, I, J]`."""
    c = x.new_empty(num_iters - 1, *x.shape[:2], sizes["J"], dtype=torch.float32)
    return c, torch.empty_like(c)


def gradient_sum(x: Tensor, weight: Tensor, total: Tensor, dsum: Tensor, c: Tensor, dl: Tensor, sizes: dict) -> Tensor:
    return _route(x, weight, total, dsum, c, dl, sizes)


def gradients(
    x: Tensor, weight: Tensor, totals: Tensor, dsums: Tensor, c: Tensor, dl: Tensor, sizes: dict
) -> tuple[Tensor, Tensor]:
    B, T, P = (sizes[name] for name in "BTP")
    dx = torch.empty_like(x)
    # The tiles of tuning have 16 samples or more; of larger ones some parts have none, and are zero.
    per_part, num_parts = _split(triton.cdiv(B, 16) * P, 2 * NUM_WARPS // T)
    one = num_parts == 1
    parts = torch.empty(num_parts, *weight.shape, dtype=weight.dtype if one else torch.float32, device=x.device)
    launcher(gradients_kernel, (T, num_parts))(
        x, weight, c, dl, totals, dsums, dx, parts, tiles_per_part=per_part, R=len(dsums), **_sizes(sizes)
    )
    return dx, parts[0] if one else parts.sum(0).to(weight.dtype)


def _route(
    x: Tensor, weight: Tensor, total: Tensor, dsum: Tensor | None, c: Tensor | None, dl: Tensor | None, sizes: dict
) -> Tensor:
    """The sum over the capsules of c_ij u_ij, or of dl_ij u_ij if there is a ds, in parts `[parts, B, J, D]`."""
    B = sizes["B"]
    num_i = sizes["T"] * sizes["P"]
    # No more parts than have four capsules each: they are added up after this.
    per_part, num_parts = _split(num_i, min(NUM_WARPS // triton.cdiv(B, 16), triton.cdiv(num_i, 4)))
    parts = total.new_empty(num_parts, *total.shape)
    backward = dsum is not None
    unread = parts  # a kernel takes all pointers
    given = _sizes(sizes)
    launcher(route_kernel, lambda meta: (triton.cdiv(B, meta["BLOCK_B"]), num_parts))(
        x, weight, total, dsum if backward else unread, c if backward else unread, dl if backward else unread, parts,
        capsules_per_part=per_part, BACKWARD=backward, PADDED=given["JA"] + given["JB"] > given["J"], **given,
    )  # fmt: skip
    return parts


def _groups(J: int) -> tuple[int, int]:
    """JA and JB."""
    JA = 1 << (J.bit_length() - 1)
    return JA, triton.next_power_of_2(J - JA) if J > JA else 0


def _split(count: int, most: int) -> tuple[int, int]:
    """How many each part takes, and the number of parts, at most `most` where that is 1 or more."""
    per_part = triton.cdiv(count, max(1, most))
    return per_part, triton.cdiv(count, per_part)


def _sizes(sizes: dict, least: int = 16) -> dict[str, int | str]:
    """What the kernels take. The least length of a product is 16, of poses of one capsule too."""
    JA, JB = _groups(sizes["J"])
    names = ("B", "T", "P", "J", "MAX_B", "K", "D", "BLOCK_D", "PRECISION")
    return {**{name: sizes[name] for name in names}, "JA": JA, "JB": JB, "BLOCK_K": max(least, sizes["BLOCK_K"])}
