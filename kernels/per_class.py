"""Dynamic routing in Triton class by class, for any number of classes: a program has one class at a time in registers.

Notation as in dynamic_routing.py. Votes and logits are never stored, each kernel recomputes what it needs by form (b)
of the design: with G_tj = W_tj V^(r-1)_j and H_tj = W_tj ds^r_j in R^K, which all P capsules of a type share,

    logits_ij = x_i . G_tj          c_ij  = exp(logits_ij - lse_i), lse_i the logarithm of the sum of exp over all j
    dc_ij     = x_i . H_tj          dl_ij = c_ij (dc_ij - delta_i), delta_i = sum over j of c_ij dc_ij

    statistics   lse_i, a loop over j with a running maximum, so that the softmax is exact for any J; delta_i if
                 BACKWARD; both are kept for the last pass then: 8 * (R - 1) * B * I bytes
    sum          s_j = sum over t of (sum over the i of t of c_ij x_i) W_tj, in parts; a plain product if UNIFORM, where
                 c = 1/J; sum over t of (sum over the i of t of dl_ij x_i) W_tj if BACKWARD
    dposes       dx_i  = sum over r and j of c_ij H_tj + dl_ij G_tj, with c = 1/J and dl = 0 for r = 1
    dweight      dW_tj = sum over r and b of (sum over the i of t of c_ij x_i) ds^r_j^T + (the same, dl_ij) V^(r-1)_j^T

A tile of poses is [BLOCK_B samples, BLOCK_T types, BLOCK_P capsules of a type, BLOCK_K], its matrices for one class
[BLOCK_T * BLOCK_K, BLOCK_D]; what lies outside the tensors is zero.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import capsules, class_matrices, load_class, load_class_matrices, load_type_poses, type_poses
from .tuning import launcher, tuned

# Programs to split a sum for, where the tiles alone are fewer: four for each multiprocessor of a large GPU.
NUM_PROGRAMS = 512


@triton.jit
def _project(
    b_v, b_w,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """G, or H, of one class: W_tj V_j, `[BLOCK_B, BLOCK_T, 1, BLOCK_K]`."""
    b_g = tl.dot(b_v, tl.trans(b_w), input_precision=PRECISION)
    return tl.reshape(b_g, [BLOCK_B, BLOCK_T, 1, BLOCK_K])


@triton.jit
def _gather(
    b_factor, b_x,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sum over the capsules of each type of factor times pose, `[BLOCK_B, BLOCK_T * BLOCK_K]`."""
    return tl.reshape(tl.sum(b_factor[:, :, :, None] * b_x, axis=2), [BLOCK_B, BLOCK_T * BLOCK_K])


def block_t(sizes: dict) -> int:
    """Types in a tile of WIDTH poses: at most all, and at least as many as give the 16 rows that tl.dot wants."""
    fit = sizes["WIDTH"] // (sizes["BLOCK_P"] * sizes["BLOCK_K"])
    return max(1, 16 // sizes["BLOCK_K"], min(fit, triton.next_power_of_2(sizes["T"])))


def fits(sizes: dict, shared_memory: int) -> bool:
    """Whether the smallest tiles fit into so many bytes of shared memory, and their offsets into 32 bits."""
    # Of compilations for sm_86 and sm_90 with K from 8 to 256 and D from 16 to 256: what the largest kernel took.
    rows = max(64, sizes["BLOCK_K"])
    taken = 12 * rows * sizes["BLOCK_D"] + 64 * sizes["BLOCK_K"]
    return taken <= shared_memory and 64 * sizes["T"] * sizes["P"] * sizes["K"] < 2**31


@tuned(
    dict(BLOCK_B=16, WIDTH=64, warps=4, stages=2),
    dict(BLOCK_B=32, WIDTH=64, warps=4, stages=2),
    dict(BLOCK_B=16, WIDTH=128, warps=4, stages=2),
    dict(BLOCK_B=64, WIDTH=64, warps=8, stages=2),
)
@triton.heuristics({"BLOCK_T": block_t})
@triton.jit
def statistics_kernel(
    p_x, p_w, p_v, p_ds, p_lse, p_delta, B, T, P, J, MAX_B,
    K: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """lse `[B, I]`, and delta `[B, I]` if BACKWARD. A program for each tile of samples and capsules."""
    num_b = tl.cdiv(B, BLOCK_B)
    num_p = tl.cdiv(P, BLOCK_P)
    i_b = tl.program_id(0) % num_b * BLOCK_B
    i_tile = tl.program_id(0) // num_b
    i_t = i_tile // num_p * BLOCK_T
    i_p = i_tile % num_p * BLOCK_P

    b_x = load_type_poses(p_x, i_b, i_t, i_p, B, T, P, K, BLOCK_B, BLOCK_T, BLOCK_P, BLOCK_K)
    b_max = tl.full([BLOCK_B, BLOCK_T, BLOCK_P], float("-inf"), tl.float32)
    b_total = tl.zeros([BLOCK_B, BLOCK_T, BLOCK_P], tl.float32)
    b_agreement = tl.zeros([BLOCK_B, BLOCK_T, BLOCK_P], tl.float32)
    for i_j in range(J):
        b_w = load_class_matrices(p_w, i_t, i_j, T, J, K, D, BLOCK_T, BLOCK_K, BLOCK_D)
        b_v = load_class(p_v, i_b, i_j, B, J, D, BLOCK_B, BLOCK_D)
        b_logits = tl.sum(b_x * _project(b_v, b_w, BLOCK_B, BLOCK_T, BLOCK_K, PRECISION), axis=3)
        b_new_max = tl.maximum(b_max, b_logits)
        b_rescale = tl.exp(b_max - b_new_max)
        b_exp = tl.exp(b_logits - b_new_max)
        b_total = b_total * b_rescale + b_exp
        b_max = b_new_max
        if BACKWARD:
            b_ds = load_class(p_ds, i_b, i_j, B, J, D, BLOCK_B, BLOCK_D)
            b_dc = tl.sum(b_x * _project(b_ds, b_w, BLOCK_B, BLOCK_T, BLOCK_K, PRECISION), axis=3)
            b_agreement = b_agreement * b_rescale + b_exp * b_dc

    offsets, m_i = capsules(i_b, i_t, i_p, B, T, P, BLOCK_B, BLOCK_T, BLOCK_P)
    tl.store(p_lse + offsets, b_max + tl.log(b_total), mask=m_i)
    if BACKWARD:
        tl.store(p_delta + offsets, b_agreement / b_total, mask=m_i)


@tuned(
    dict(BLOCK_B=16, WIDTH=64, warps=4, stages=2),
    dict(BLOCK_B=32, WIDTH=64, warps=4, stages=2),
    dict(BLOCK_B=16, WIDTH=128, warps=4, stages=2),
    dict(BLOCK_B=32, WIDTH=128, warps=8, stages=2),
)
@triton.heuristics({"BLOCK_T": block_t})
@triton.jit
def sum_kernel(
    p_x, p_w, p_v, p_ds, p_lse, p_delta, p_parts, B, T, P, J, MAX_B, num_parts,
    K: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    UNIFORM: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The sum over i of c_ij u_ij, of u_ij if UNIFORM, of dl_ij u_ij if BACKWARD, in parts `[num_parts, B, J, D]`.

    A program for each tile of samples, part of the capsules and class. It may have no capsules, and writes zeros then.
    """
    # The long sum goes over NUM_S slices, each a product of its own, so that all warps have a share and short operands.
    SLICE: tl.constexpr = BLOCK_T * BLOCK_K if BLOCK_T * BLOCK_K < 32 else 32
    NUM_S: tl.constexpr = BLOCK_T * BLOCK_K // SLICE
    num_b = tl.cdiv(B, BLOCK_B)
    num_p = tl.cdiv(P, BLOCK_P)
    i_b = tl.program_id(0) % num_b * BLOCK_B
    i_part = tl.program_id(0) // num_b
    i_j = tl.program_id(1)
    num_tiles = tl.cdiv(T, BLOCK_T) * num_p
    tiles_per_part = tl.cdiv(num_tiles, num_parts)

    if not UNIFORM:
        b_v = load_class(p_v, i_b, i_j, B, J, D, BLOCK_B, BLOCK_D)
    if BACKWARD:
        b_ds = load_class(p_ds, i_b, i_j, B, J, D, BLOCK_B, BLOCK_D)
    b_sums = tl.zeros([NUM_S, BLOCK_B, BLOCK_D], tl.float32)
    for i_tile in range(i_part * tiles_per_part, tl.minimum(num_tiles, (i_part + 1) * tiles_per_part)):
        i_t = i_tile // num_p * BLOCK_T
        i_p = i_tile % num_p * BLOCK_P
        b_x = load_type_poses(p_x, i_b, i_t, i_p, B, T, P, K, BLOCK_B, BLOCK_T, BLOCK_P, BLOCK_K)
        b_w = load_class_matrices(p_w, i_t, i_j, T, J, K, D, BLOCK_T, BLOCK_K, BLOCK_D)
        if UNIFORM:
            b_y = tl.reshape(tl.sum(b_x, axis=2), [BLOCK_B, BLOCK_T * BLOCK_K])
        else:
            offsets, m_i = capsules(i_b, i_t, i_p, B, T, P, BLOCK_B, BLOCK_T, BLOCK_P)
            b_lse = tl.load(p_lse + offsets, mask=m_i, other=0.0)
            b_logits = tl.sum(b_x * _project(b_v, b_w, BLOCK_B, BLOCK_T, BLOCK_K, PRECISION), axis=3)
            b_factor = tl.exp(b_logits - b_lse)
            if BACKWARD:
                b_delta = tl.load(p_delta + offsets, mask=m_i, other=0.0)
                b_dc = tl.sum(b_x * _project(b_ds, b_w, BLOCK_B, BLOCK_T, BLOCK_K, PRECISION), axis=3)
                b_factor *= b_dc - b_delta
            b_y = _gather(b_factor, b_x, BLOCK_B, BLOCK_T, BLOCK_K)
        b_y = tl.permute(tl.reshape(b_y, [BLOCK_B, NUM_S, SLICE]), [1, 0, 2])
        b_sums += tl.dot(b_y, tl.reshape(b_w, [NUM_S, SLICE, BLOCK_D]), input_precision=PRECISION)

    b_sum = tl.sum(b_sums, axis=0)
    o_b = tl.arange(0, BLOCK_B)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    start = ((i_part.to(tl.int64) * B + i_b) * J + i_j) * D
    tl.store(p_parts + start + o_b * J * D + o_d, b_sum, mask=(i_b + o_b < B) & (o_d < D))


@tuned(
    dict(BLOCK_B=16, WIDTH=64, warps=4, stages=1),
    dict(BLOCK_B=32, WIDTH=64, warps=4, stages=1),
    dict(BLOCK_B=64, WIDTH=64, warps=8, stages=1),
)
@triton.heuristics({"BLOCK_T": block_t})
@triton.jit
def dposes_kernel(
    p_x, p_w, p_v, p_ds, p_lse, p_delta, p_dx, B, T, P, J, MAX_B, R,
    K: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dx `[B, I, K]`, from ds of r = 1..R and V^(r-1), lse and delta of r = 2..R."""
    num_b = tl.cdiv(B, BLOCK_B)
    num_p = tl.cdiv(P, BLOCK_P)
    i_b = tl.program_id(0) % num_b * BLOCK_B
    i_tile = tl.program_id(0) // num_b
    i_t = i_tile // num_p * BLOCK_T
    i_p = i_tile % num_p * BLOCK_P

    b_x = load_type_poses(p_x, i_b, i_t, i_p, B, T, P, K, BLOCK_B, BLOCK_T, BLOCK_P, BLOCK_K)
    b_dx = tl.zeros([BLOCK_B, BLOCK_T, BLOCK_P, BLOCK_K], tl.float32)
    offsets, m_i = capsules(i_b, i_t, i_p, B, T, P, BLOCK_B, BLOCK_T, BLOCK_P)
    p_first = p_ds
    for _ in range(R - 1):
        p_ds += tl.cast(B, tl.int64) * J * D
        b_lse = tl.load(p_lse + offsets, mask=m_i, other=0.0)
        b_delta = tl.load(p_delta + offsets, mask=m_i, other=0.0)
        for i_j in range(J):
            b_w = load_class_matrices(p_w, i_t, i_j, T, J, K, D, BLOCK_T, BLOCK_K, BLOCK_D)
            b_v = load_class(p_v, i_b, i_j, B, J, D, BLOCK_B, BLOCK_D)
            b_g = _project(b_v, b_w, BLOCK_B, BLOCK_T, BLOCK_K, PRECISION)
            b_couplings = tl.exp(tl.sum(b_x * b_g, axis=3) - b_lse)
            b_ds = load_class(p_ds, i_b, i_j, B, J, D, BLOCK_B, BLOCK_D)
            b_h = _project(b_ds, b_w, BLOCK_B, BLOCK_T, BLOCK_K, PRECISION)
            b_dlogits = b_couplings * (tl.sum(b_x * b_h, axis=3) - b_delta)
            b_dx += b_couplings[:, :, :, None] * b_h + b_dlogits[:, :, :, None] * b_g
        p_v += tl.cast(B, tl.int64) * J * D
        p_lse += tl.cast(B, tl.int64) * T * P
        p_delta += tl.cast(B, tl.int64) * T * P
    b_first = tl.zeros([BLOCK_B, BLOCK_T, 1, BLOCK_K], tl.float32)
    for i_j in range(J):
        b_w = load_class_matrices(p_w, i_t, i_j, T, J, K, D, BLOCK_T, BLOCK_K, BLOCK_D)
        b_ds = load_class(p_first, i_b, i_j, B, J, D, BLOCK_B, BLOCK_D)
        b_first += _project(b_ds, b_w, BLOCK_B, BLOCK_T, BLOCK_K, PRECISION)
    b_dx += b_first / J
    p_tile, m_x = type_poses(p_dx, i_b, i_t, i_p, B, T, P, K, BLOCK_B, BLOCK_T, BLOCK_P, BLOCK_K)
    tl.store(p_tile, b_dx.to(p_dx.dtype.element_ty), mask=m_x)


@tuned(
    dict(BLOCK_B=16, WIDTH=64, warps=8, stages=1),
    dict(BLOCK_B=32, WIDTH=64, warps=4, stages=1),
    dict(BLOCK_B=16, WIDTH=128, warps=4, stages=1),
    dict(BLOCK_B=64, WIDTH=64, warps=8, stages=1),
)
@triton.heuristics({"BLOCK_T": block_t})
@triton.jit
def dweight_kernel(
    p_x, p_w, p_v, p_ds, p_lse, p_delta, p_parts, B, T, P, J, MAX_B, R, num_parts,
    K: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dW in parts `[num_parts, T, K, J, D]`, from the same as dposes.

    A program for each tile of types, class and part of the tiles of samples and of capsules of a type.
    """
    num_p = tl.cdiv(P, BLOCK_P)
    i_t = tl.program_id(0) * BLOCK_T
    i_j = tl.program_id(1)
    i_part = tl.program_id(2)
    num_tiles = tl.cdiv(B, BLOCK_B) * num_p
    tiles_per_part = tl.cdiv(num_tiles, num_parts)

    b_w = load_class_matrices(p_w, i_t, i_j, T, J, K, D, BLOCK_T, BLOCK_K, BLOCK_D)
    b_dw = tl.zeros([BLOCK_T * BLOCK_K, BLOCK_D], tl.float32)
    for i_tile in range(i_part * tiles_per_part, tl.minimum(num_tiles, (i_part + 1) * tiles_per_part)):
        i_b = i_tile // num_p * BLOCK_B
        i_p = i_tile % num_p * BLOCK_P
        b_x = load_type_poses(p_x, i_b, i_t, i_p, B, T, P, K, BLOCK_B, BLOCK_T, BLOCK_P, BLOCK_K)
        offsets, m_i = capsules(i_b, i_t, i_p, B, T, P, BLOCK_B, BLOCK_T, BLOCK_P)
        b_ds = load_class(p_ds, i_b, i_j, B, J, D, BLOCK_B, BLOCK_D)
        b_by_type = tl.trans(tl.reshape(tl.sum(b_x, axis=2), [BLOCK_B, BLOCK_T * BLOCK_K]))
        b_dw += tl.dot(b_by_type, b_ds / J, input_precision=PRECISION)
        for r in range(R - 1):
            o_r = r * tl.cast(B, tl.int64)
            b_v = load_class(p_v + o_r * J * D, i_b, i_j, B, J, D, BLOCK_B, BLOCK_D)
            b_ds = load_class(p_ds + (o_r + B) * J * D, i_b, i_j, B, J, D, BLOCK_B, BLOCK_D)
            b_lse = tl.load(p_lse + o_r * T * P + offsets, mask=m_i, other=0.0)
            b_delta = tl.load(p_delta + o_r * T * P + offsets, mask=m_i, other=0.0)
            b_logits = tl.sum(b_x * _project(b_v, b_w, BLOCK_B, BLOCK_T, BLOCK_K, PRECISION), axis=3)
            b_dc = tl.sum(b_x * _project(b_ds, b_w, BLOCK_B, BLOCK_T, BLOCK_K, PRECISION), axis=3)
            b_couplings = tl.exp(b_logits - b_lse)
            b_dlogits = b_couplings * (b_dc - b_delta)
            b_by_couplings = tl.trans(_gather(b_couplings, b_x, BLOCK_B, BLOCK_T, BLOCK_K))
            b_by_dlogits = tl.trans(_gather(b_dlogits, b_x, BLOCK_B, BLOCK_T, BLOCK_K))
            b_dw += tl.dot(b_by_couplings, b_ds, input_precision=PRECISION)
            b_dw += tl.dot(b_by_dlogits, b_v, input_precision=PRECISION)

    size = tl.cast(T, tl.int64) * K * J * D
    p_tile, m_w = class_matrices(p_parts + i_part * size, i_t, i_j, T, J, K, D, BLOCK_T, BLOCK_K, BLOCK_D)
    tl.store(p_tile, b_dw.to(p_parts.dtype.element_ty), mask=m_w)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------------


def uniform_sum(x: Tensor, weight: Tensor, sizes: dict) -> Tensor:
    """The sum of u_ij over the capsules, in parts `[parts, B, J, D]` of float32."""
    return _sum(x, weight, None, None, None, None, sizes)


def weighted_sum(x: Tensor, weight: Tensor, total: Tensor, sizes: dict) -> Tensor:
    """The sum of c_ij u_ij over the capsules, c from V^(r-1) `[B, J, D]`, in parts."""
    lse = x.new_empty(x.shape[:2], dtype=torch.float32)
    _statistics(x, weight, total, None, lse, None, sizes)
    return _sum(x, weight, total, None, lse, None, sizes)


def keep_for_gradients(x: Tensor, num_iters: int, sizes: dict) -> tuple[Tensor, Tensor]:
    """Memory for what `gradient_sum` finds of each iteration and `gradients` reads: lse and delta, `[R - 1, B, I]`."""
    lse = x.new_empty(num_iters - 1, *x.shape[:2], dtype=torch.float32)
    return lse, torch.empty_like(lse)


def gradient_sum(
    x: Tensor, weight: Tensor, total: Tensor, dsum: Tensor, lse: Tensor, delta: Tensor, sizes: dict
) -> Tensor:
    """The sum of dl_ij u_ij over the capsules, from V^(r-1) and ds^r `[B, J, D]`, in parts; writes lse and delta."""
    _statistics(x, weight, total, dsum, lse, delta, sizes)
    return _sum(x, weight, total, dsum, lse, delta, sizes)


def gradients(
    x: Tensor, weight: Tensor, totals: Tensor, dsums: Tensor, lse: Tensor, delta: Tensor, sizes: dict
) -> tuple[Tensor, Tensor]:
    """dx and dW in the dtypes of x and weight, from V^1..V^(R-1) and ds^1..ds^R."""
    B, T, P, J, K = (sizes[name] for name in "BTPJK")
    dx = torch.empty_like(x)
    launcher(dposes_kernel, _tiles_grid(sizes))(x, weight, totals, dsums, lse, delta, dx, R=len(dsums), **sizes)

    tiles = triton.cdiv(T * K, 256) * J
    num_parts = max(1, min(triton.cdiv(NUM_PROGRAMS, tiles), triton.cdiv(B, 16) * triton.cdiv(P, sizes["BLOCK_P"])))
    parts = torch.empty(num_parts, *weight.shape, dtype=weight.dtype if num_parts == 1 else torch.float32,
                        device=x.device)  # fmt: skip
    launch = launcher(dweight_kernel, lambda meta: (triton.cdiv(T, meta["BLOCK_T"]), J, num_parts))
    launch(x, weight, totals, dsums, lse, delta, parts, R=len(dsums), num_parts=num_parts, **sizes)
    return dx, parts[0] if num_parts == 1 else parts.sum(0).to(weight.dtype)


def _statistics(
    x: Tensor, weight: Tensor, total: Tensor, dsum: Tensor | None, lse: Tensor, delta: Tensor | None, sizes: dict
) -> None:
    """Writes lse, and delta if there is a ds."""
    backward = dsum is not None
    launcher(statistics_kernel, _tiles_grid(sizes))(
        x, weight, total, dsum if backward else total, lse, delta if backward else lse, BACKWARD=backward, **sizes
    )


def _sum(
    x: Tensor, weight: Tensor, total: Tensor | None, dsum: Tensor | None, lse: Tensor | None, delta: Tensor | None,
    sizes: dict,
) -> Tensor:  # fmt: skip
    """The sum over the capsules of u_ij, of c_ij u_ij if there is a total, of dl_ij u_ij if there is a ds, in parts."""
    B, T, P, J, K, D = (sizes[name] for name in "BTPJKD")
    # Sizes of parts and tiles are independent, so that tuning need not know the one to choose the other.
    tiles = triton.cdiv(B, min(sizes["MAX_B"], 32)) * J
    num_parts = max(1, min(triton.cdiv(NUM_PROGRAMS, tiles), triton.cdiv(T * P * K, 256)))
    parts = x.new_empty(num_parts, B, J, D, dtype=torch.float32)
    uniform, backward = total is None, dsum is not None
    unread = parts  # a kernel takes all pointers
    launcher(sum_kernel, lambda meta: (triton.cdiv(B, meta["BLOCK_B"]) * num_parts, J))(
        x, weight, unread if uniform else total, dsum if backward else unread, unread if uniform else lse,
        delta if backward else unread, parts, num_parts=num_parts, UNIFORM=uniform, BACKWARD=backward, **sizes,
    )  # fmt: skip
    return parts


def _tiles_grid(sizes: dict):
    """A program for each tile of samples and capsules."""
    positions = triton.cdiv(sizes["P"], sizes["BLOCK_P"])
    return lambda meta: (
        triton.cdiv(sizes["B"], meta["BLOCK_B"]) * triton.cdiv(sizes["T"], meta["BLOCK_T"]) * positions,
    )
