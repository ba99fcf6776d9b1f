"""Dynamic routing in Triton: votes and logits are never stored, each kernel recomputes what it needs.

Notation: B samples; capsules i = 1..I with poses x_i in R^K; T types of P = I/T consecutive capsules, which share a
matrix W_t in R^(K x J x D); J classes of capsules in R^D; R iterations; V^r = v^1 + ... + v^r. Everything is form (b)
of the design: with G_tj = W_tj V^(r-1)_j and H_tj = W_tj ds^r_j in R^K, which all P capsules of a type share,

    logits_ij = x_i . G_tj          c_ij  = exp(logits_ij - lse_i), lse_i the logarithm of the sum of exp over all j
    dc_ij     = x_i . H_tj          dl_ij = c_ij (dc_ij - delta_i), delta_i = sum over j of c_ij dc_ij

Forward, for r = 1..R:
    statistics   lse_i, a loop over j with a running maximum, so that the softmax is exact for any J; not for r = 1
    sum          s_j = sum over t of (sum over the i of t of c_ij x_i) W_tj, in parts; a plain product for r = 1, where
                 c = 1/J
    finish       adds the parts and the bias: s^r; v^r = squash(s^r); V^r = V^(r-1) + v^r

Backward from g = dL/dv^R. V^1..V^(R-1) and ds^R = (d squash / ds at s^R)^T g come from the saved s. For r = R..2:
    statistics   lse_i and delta_i, kept for the last pass: 8 * (R - 1) * B * I bytes
    sum          sum over t of (sum over the i of t of dl_ij x_i) W_tj, in parts
    finish       adds the parts to Vbar; ds^(r-1) = (d squash / ds at s^(r-1))^T Vbar
and last, with c = 1/J and dl = 0 for r = 1:
    dposes       dx_i  = sum over r and j of c_ij H_tj + dl_ij G_tj
    dweight      dW_tj = sum over r and b of (sum over the i of t of c_ij x_i) ds^r_j^T + (the same, dl_ij) V^(r-1)_j^T

A tile of poses is [BLOCK_B samples, BLOCK_T types, BLOCK_P capsules of a type, BLOCK_K], its matrices for one class
[BLOCK_T * BLOCK_K, BLOCK_D]; what lies outside the tensors is zero. Parts are added by a second kernel in a fixed
order, never by atomics: for given tile sizes results are the same from run to run. Timing chooses these, once for each
problem, unless torch.use_deterministic_algorithms is on. The environment variable CAPSZOO_TILES limits how many are
timed for a kernel: a run starts sooner, and with 1, which times nothing, every process computes the same bits.
"""

import functools
import inspect
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from .squash import squash_tile, squash_tile_backward

# Programs to split a sum for, where the tiles alone are fewer: four for each multiprocessor of a large GPU.
NUM_PROGRAMS = 512

# Numbers in the tile of a program that works on rows of D.
ROWS_SIZE = 512


# ---------------------------------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _poses(
    p_x, i_b, i_t, i_p, B, T, P,
    K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pointers to `[BLOCK_B, BLOCK_T, BLOCK_P, BLOCK_K]` of `[B, T, P, K]`, and which are inside."""
    o_b = tl.arange(0, BLOCK_B)[:, None, None, None]
    o_t = tl.arange(0, BLOCK_T)[None, :, None, None]
    o_p = tl.arange(0, BLOCK_P)[None, None, :, None]
    o_k = tl.arange(0, BLOCK_K)[None, None, None, :]
    start = ((i_b.to(tl.int64) * T + i_t) * P + i_p) * K
    m_x = (i_b + o_b < B) & (i_t + o_t < T) & (i_p + o_p < P) & (o_k < K)
    return p_x + start + (((o_b * T + o_t) * P + o_p) * K + o_k), m_x


@triton.jit
def _matrices(
    p_w, i_t, i_j, T, J,
    K: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pointers to `[BLOCK_T * BLOCK_K, BLOCK_D]` of `[T, K, J, D]` for one class, and which are inside."""
    o_row = tl.arange(0, BLOCK_T * BLOCK_K)[:, None]
    o_t = o_row // BLOCK_K
    o_k = o_row % BLOCK_K
    o_d = tl.arange(0, BLOCK_D)[None, :]
    start = (i_t.to(tl.int64) * K * J + i_j) * D
    return p_w + start + ((o_t * K + o_k) * J * D + o_d), (i_t + o_t < T) & (o_k < K) & (o_d < D)


@triton.jit
def _load_poses(
    p_x, i_b, i_t, i_p, B, T, P,
    K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    p_tile, m_x = _poses(p_x, i_b, i_t, i_p, B, T, P, K, BLOCK_B, BLOCK_T, BLOCK_P, BLOCK_K)
    return tl.load(p_tile, mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def _load_matrices(
    p_w, i_t, i_j, T, J,
    K: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    p_tile, m_w = _matrices(p_w, i_t, i_j, T, J, K, D, BLOCK_T, BLOCK_K, BLOCK_D)
    return tl.load(p_tile, mask=m_w, other=0.0).to(tl.float32)


@triton.jit
def _load_classes(p_v, i_b, i_j, B, J, D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[BLOCK_B, BLOCK_D]` of float32 `[B, J, D]` for one class."""
    o_b = tl.arange(0, BLOCK_B)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    start = (i_b.to(tl.int64) * J + i_j) * D
    return tl.load(p_v + start + o_b * J * D + o_d, mask=(i_b + o_b < B) & (o_d < D), other=0.0)


@triton.jit
def _capsules(i_b, i_t, i_p, B, T, P, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr):
    """Offsets of `[BLOCK_B, BLOCK_T, BLOCK_P]` in `[B, T, P]`, and which are inside."""
    o_b = tl.arange(0, BLOCK_B)[:, None, None]
    o_t = tl.arange(0, BLOCK_T)[None, :, None]
    o_p = tl.arange(0, BLOCK_P)[None, None, :]
    start = (i_b.to(tl.int64) * T + i_t) * P + i_p
    return start + (o_b * T + o_t) * P + o_p, (i_b + o_b < B) & (i_t + o_t < T) & (i_p + o_p < P)


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


# ---------------------------------------------------------------------------------------------------------------------
# Tile sizes
# ---------------------------------------------------------------------------------------------------------------------


def block_t(sizes: dict) -> int:
    """Types in a tile of WIDTH poses: at most all, and at least as many as give the 16 rows that tl.dot wants."""
    fit = sizes["WIDTH"] // (sizes["BLOCK_P"] * sizes["BLOCK_K"])
    return max(1, 16 // sizes["BLOCK_K"], min(fit, triton.next_power_of_2(sizes["T"])))


def _read_max_tiles() -> int | None:
    text = os.environ.get("CAPSZOO_TILES")
    if text is None or (text.isdecimal() and int(text) > 0):
        return None if text is None else int(text)
    raise ValueError(f"CAPSZOO_TILES={text!r} does not say how many tile sizes to time: give 1 or more, or unset it")


MAX_TILES = _read_max_tiles()


def _configs(*sizes: tuple[int, int, int, int]) -> list[triton.Config]:
    """From (BLOCK_B, WIDTH, warps, stages), the smallest tile first. The interpreter does not time: it takes that."""
    configs = [
        triton.Config({"BLOCK_B": block, "WIDTH": width}, num_warps=warps, num_stages=stages)
        for block, width, warps, stages in sizes
    ]
    return configs[:1] if os.environ.get("TRITON_INTERPRET", "0") == "1" else configs


def _candidates(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
    """The tiles to time: of no more samples than there are. A stream that is being captured cannot be timed."""
    max_b = {**named_args, **kwargs}["MAX_B"]
    fitting = [config for config in configs if config.kwargs["BLOCK_B"] <= max_b]
    return fitting[: 1 if torch.cuda.is_current_stream_capturing() else MAX_TILES]


def _tuned(*sizes: tuple[int, int, int, int]):
    """Chooses tile sizes by timing, once for each problem; on disk between runs where this Triton can."""

    def decorate(kernel):
        names = kernel.fn.arg_names
        key = [n for n in ("T", "P", "J", "K", "D", "MAX_B", "R", "UNIFORM", "BACKWARD", "PRECISION") if n in names]
        known = inspect.signature(triton.autotune).parameters
        options = {name: value for name, value in _TUNING.items() if name in known}
        pruning = {"early_config_prune": _candidates}
        return triton.autotune(_configs(*sizes), key, prune_configs_by=pruning, **options)(kernel)

    return decorate


def _measure(call, quantiles):
    """Milliseconds of a call. Tile sizes differ by more than so short a measurement errs."""
    if torch.cuda.is_current_stream_capturing():  # Triton before 3.8 times a single candidate as well
        return [0.0] * len(quantiles)
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)


_TUNING = {"cache_results": True, "do_bench": _measure}


def _launcher(kernel, grid):
    """Launches a tuned kernel over a grid, with its first tile where bits must not depend on timing.

    Tiles differ in the order of their sums, and another process may find another one fastest.
    """
    if MAX_TILES == 1 or torch.are_deterministic_algorithms_enabled():
        return functools.partial(kernel.fn[grid], **kernel.configs[0].all_kwargs())
    return kernel[grid]


# ---------------------------------------------------------------------------------------------------------------------
# Forward and backward: statistics and sum
# ---------------------------------------------------------------------------------------------------------------------


@_tuned((16, 64, 4, 2), (32, 64, 4, 2), (16, 128, 4, 2), (64, 64, 8, 2))
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

    b_x = _load_poses(p_x, i_b, i_t, i_p, B, T, P, K, BLOCK_B, BLOCK_T, BLOCK_P, BLOCK_K)
    b_max = tl.full([BLOCK_B, BLOCK_T, BLOCK_P], float("-inf"), tl.float32)
    b_total = tl.zeros([BLOCK_B, BLOCK_T, BLOCK_P], tl.float32)
    b_agreement = tl.zeros([BLOCK_B, BLOCK_T, BLOCK_P], tl.float32)
    for i_j in range(J):
        b_w = _load_matrices(p_w, i_t, i_j, T, J, K, D, BLOCK_T, BLOCK_K, BLOCK_D)
        b_v = _load_classes(p_v, i_b, i_j, B, J, D, BLOCK_B, BLOCK_D)
        b_logits = tl.sum(b_x * _project(b_v, b_w, BLOCK_B, BLOCK_T, BLOCK_K, PRECISION), axis=3)
        b_new_max = tl.maximum(b_max, b_logits)
        b_rescale = tl.exp(b_max - b_new_max)
        b_exp = tl.exp(b_logits - b_new_max)
        b_total = b_total * b_rescale + b_exp
        b_max = b_new_max
        if BACKWARD:
            b_ds = _load_classes(p_ds, i_b, i_j, B, J, D, BLOCK_B, BLOCK_D)
            b_dc = tl.sum(b_x * _project(b_ds, b_w, BLOCK_B, BLOCK_T, BLOCK_K, PRECISION), axis=3)
            b_agreement = b_agreement * b_rescale + b_exp * b_dc

    offsets, m_i = _capsules(i_b, i_t, i_p, B, T, P, BLOCK_B, BLOCK_T, BLOCK_P)
    tl.store(p_lse + offsets, b_max + tl.log(b_total), mask=m_i)
    if BACKWARD:
        tl.store(p_delta + offsets, b_agreement / b_total, mask=m_i)


@_tuned((16, 64, 4, 2), (32, 64, 4, 2), (16, 128, 4, 2), (32, 128, 8, 2))
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
        b_v = _load_classes(p_v, i_b, i_j, B, J, D, BLOCK_B, BLOCK_D)
    if BACKWARD:
        b_ds = _load_classes(p_ds, i_b, i_j, B, J, D, BLOCK_B, BLOCK_D)
    b_sums = tl.zeros([NUM_S, BLOCK_B, BLOCK_D], tl.float32)
    for i_tile in range(i_part * tiles_per_part, tl.minimum(num_tiles, (i_part + 1) * tiles_per_part)):
        i_t = i_tile // num_p * BLOCK_T
        i_p = i_tile % num_p * BLOCK_P
        b_x = _load_poses(p_x, i_b, i_t, i_p, B, T, P, K, BLOCK_B, BLOCK_T, BLOCK_P, BLOCK_K)
        b_w = _load_matrices(p_w, i_t, i_j, T, J, K, D, BLOCK_T, BLOCK_K, BLOCK_D)
        if UNIFORM:
            b_y = tl.reshape(tl.sum(b_x, axis=2), [BLOCK_B, BLOCK_T * BLOCK_K])
        else:
            offsets, m_i = _capsules(i_b, i_t, i_p, B, T, P, BLOCK_B, BLOCK_T, BLOCK_P)
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


# ---------------------------------------------------------------------------------------------------------------------
# Forward and backward: second stage, on rows of D
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _add_parts(p_parts, offsets, m_row, num_parts, size, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    b_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i_part in range(num_parts):
        b_sum += tl.load(p_parts + i_part * size + offsets, mask=m_row, other=0.0)
    return b_sum


@triton.jit
def finish_kernel(
    p_parts, p_bias, p_total, p_s, p_v, scale, N, J, num_parts,
    D: tl.constexpr, APPROXIMATE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """s^r, and V^r in place of V^(r-1), or v^R if LAST; rows of `[N = B * J, D]`."""
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    i_d = tl.arange(0, BLOCK_D)[None, :]
    m_row = (i_n < N) & (i_d < D)
    offsets = i_n * D + i_d
    size = tl.cast(N, tl.int64) * D
    b_s = _add_parts(p_parts, offsets, m_row, num_parts, size, BLOCK_N, BLOCK_D) * tl.cast(scale, tl.float32)
    b_s += tl.load(p_bias + i_n % J * D + i_d, mask=m_row, other=0.0).to(tl.float32)
    tl.store(p_s + offsets, b_s, mask=m_row)
    b_v = squash_tile(b_s, APPROXIMATE)
    if LAST:
        tl.store(p_v + offsets, b_v.to(p_v.dtype.element_ty), mask=m_row)
    else:
        if not FIRST:
            b_v += tl.load(p_total + offsets, mask=m_row, other=0.0)
        tl.store(p_total + offsets, b_v, mask=m_row)


@triton.jit
def begin_backward_kernel(
    p_grad, p_s, p_total, p_ds, N, R,
    D: tl.constexpr, APPROXIMATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """V^1..V^(R-1) and ds^R, from s `[R, N, D]` and the gradient by v^R."""
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    i_d = tl.arange(0, BLOCK_D)[None, :]
    m_row = (i_n < N) & (i_d < D)
    offsets = i_n * D + i_d
    size = tl.cast(N, tl.int64) * D
    b_total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for r in range(R - 1):
        b_total += squash_tile(tl.load(p_s + r * size + offsets, mask=m_row, other=0.0), APPROXIMATE)
        tl.store(p_total + r * size + offsets, b_total, mask=m_row)
    b_s = tl.load(p_s + (R - 1) * size + offsets, mask=m_row, other=0.0)
    b_grad = tl.load(p_grad + offsets, mask=m_row, other=0.0).to(tl.float32)
    tl.store(p_ds + (R - 1) * size + offsets, squash_tile_backward(b_grad, b_s, APPROXIMATE), mask=m_row)


@triton.jit
def finish_backward_kernel(
    p_parts, p_dtotal, p_s, p_ds, N, num_parts,
    D: tl.constexpr, APPROXIMATE: tl.constexpr, FIRST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds to Vbar, which is zero if FIRST; ds^(r-1) from it and s^(r-1)."""
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    i_d = tl.arange(0, BLOCK_D)[None, :]
    m_row = (i_n < N) & (i_d < D)
    offsets = i_n * D + i_d
    b_dtotal = _add_parts(p_parts, offsets, m_row, num_parts, tl.cast(N, tl.int64) * D, BLOCK_N, BLOCK_D)
    if not FIRST:
        b_dtotal += tl.load(p_dtotal + offsets, mask=m_row, other=0.0)
    tl.store(p_dtotal + offsets, b_dtotal, mask=m_row)
    b_s = tl.load(p_s + offsets, mask=m_row, other=0.0)
    tl.store(p_ds + offsets, squash_tile_backward(b_dtotal, b_s, APPROXIMATE), mask=m_row)


# ---------------------------------------------------------------------------------------------------------------------
# Backward: last pass
# ---------------------------------------------------------------------------------------------------------------------


@_tuned((16, 64, 4, 1), (32, 64, 4, 1), (64, 64, 8, 1))
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

    b_x = _load_poses(p_x, i_b, i_t, i_p, B, T, P, K, BLOCK_B, BLOCK_T, BLOCK_P, BLOCK_K)
    b_dx = tl.zeros([BLOCK_B, BLOCK_T, BLOCK_P, BLOCK_K], tl.float32)
    offsets, m_i = _capsules(i_b, i_t, i_p, B, T, P, BLOCK_B, BLOCK_T, BLOCK_P)
    p_first = p_ds
    for _ in range(R - 1):
        p_ds += tl.cast(B, tl.int64) * J * D
        b_lse = tl.load(p_lse + offsets, mask=m_i, other=0.0)
        b_delta = tl.load(p_delta + offsets, mask=m_i, other=0.0)
        for i_j in range(J):
            b_w = _load_matrices(p_w, i_t, i_j, T, J, K, D, BLOCK_T, BLOCK_K, BLOCK_D)
            b_v = _load_classes(p_v, i_b, i_j, B, J, D, BLOCK_B, BLOCK_D)
            b_g = _project(b_v, b_w, BLOCK_B, BLOCK_T, BLOCK_K, PRECISION)
            b_couplings = tl.exp(tl.sum(b_x * b_g, axis=3) - b_lse)
            b_ds = _load_classes(p_ds, i_b, i_j, B, J, D, BLOCK_B, BLOCK_D)
            b_h = _project(b_ds, b_w, BLOCK_B, BLOCK_T, BLOCK_K, PRECISION)
            b_dlogits = b_couplings * (tl.sum(b_x * b_h, axis=3) - b_delta)
            b_dx += b_couplings[:, :, :, None] * b_h + b_dlogits[:, :, :, None] * b_g
        p_v += tl.cast(B, tl.int64) * J * D
        p_lse += tl.cast(B, tl.int64) * T * P
        p_delta += tl.cast(B, tl.int64) * T * P
    b_first = tl.zeros([BLOCK_B, BLOCK_T, 1, BLOCK_K], tl.float32)
    for i_j in range(J):
        b_w = _load_matrices(p_w, i_t, i_j, T, J, K, D, BLOCK_T, BLOCK_K, BLOCK_D)
        b_ds = _load_classes(p_first, i_b, i_j, B, J, D, BLOCK_B, BLOCK_D)
        b_first += _project(b_ds, b_w, BLOCK_B, BLOCK_T, BLOCK_K, PRECISION)
    b_dx += b_first / J
    p_tile, m_x = _poses(p_dx, i_b, i_t, i_p, B, T, P, K, BLOCK_B, BLOCK_T, BLOCK_P, BLOCK_K)
    tl.store(p_tile, b_dx.to(p_dx.dtype.element_ty), mask=m_x)


@_tuned((16, 64, 8, 1), (32, 64, 4, 1), (16, 128, 4, 1), (64, 64, 8, 1))
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

    b_w = _load_matrices(p_w, i_t, i_j, T, J, K, D, BLOCK_T, BLOCK_K, BLOCK_D)
    b_dw = tl.zeros([BLOCK_T * BLOCK_K, BLOCK_D], tl.float32)
    for i_tile in range(i_part * tiles_per_part, tl.minimum(num_tiles, (i_part + 1) * tiles_per_part)):
        i_b = i_tile // num_p * BLOCK_B
        i_p = i_tile % num_p * BLOCK_P
        b_x = _load_poses(p_x, i_b, i_t, i_p, B, T, P, K, BLOCK_B, BLOCK_T, BLOCK_P, BLOCK_K)
        offsets, m_i = _capsules(i_b, i_t, i_p, B, T, P, BLOCK_B, BLOCK_T, BLOCK_P)
        b_ds = _load_classes(p_ds, i_b, i_j, B, J, D, BLOCK_B, BLOCK_D)
        b_by_type = tl.trans(tl.reshape(tl.sum(b_x, axis=2), [BLOCK_B, BLOCK_T * BLOCK_K]))
        b_dw += tl.dot(b_by_type, b_ds / J, input_precision=PRECISION)
        for r in range(R - 1):
            o_r = r * tl.cast(B, tl.int64)
            b_v = _load_classes(p_v + o_r * J * D, i_b, i_j, B, J, D, BLOCK_B, BLOCK_D)
            b_ds = _load_classes(p_ds + (o_r + B) * J * D, i_b, i_j, B, J, D, BLOCK_B, BLOCK_D)
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
    p_tile, m_w = _matrices(p_parts + i_part * size, i_t, i_j, T, J, K, D, BLOCK_T, BLOCK_K, BLOCK_D)
    tl.store(p_tile, b_dw.to(p_parts.dtype.element_ty), mask=m_w)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------------


def dynamic_routing(
    x: Tensor, weight: Tensor, bias: Tensor, num_iters: int, approximate: bool, tf32: bool = False
) -> tuple[Tensor, Tensor]:
    """Class capsules v^R `[B, J, D]` in the dtype of x, and the sums before squash, s^1..s^R `[R, B, J, D]` in float32.

    Args:
        x: `[B, I, K]`, of any strides, like all tensors here. Each may be float32, bfloat16 or float16.
        weight: `[T, K, J, D]`, T divides I.
        bias: `[J, D]`.
        num_iters: R.
        approximate: The squash variant.
        tf32: Allow products in TF32; torch's own setting allows them as well.
    """
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    B, J, D = x.shape[0], weight.shape[2], weight.shape[3]
    v = x.new_empty(B, J, D)
    sums = x.new_empty(num_iters, B, J, D, dtype=torch.float32)
    if v.numel() == 0:
        return v, sums
    grid, rows = _rows(B * J, D)
    sizes = _sizes(x, weight, tf32)
    with torch.cuda.device_of(x):
        total = torch.empty_like(sums[0])  # V^r
        lse = x.new_empty(x.shape[:2], dtype=torch.float32)
        for r in range(num_iters):
            if r > 0:
                _statistics(x, weight, total, None, lse, None, sizes)
            parts = _sum(x, weight, total, None, lse, None, sizes, uniform=r == 0)
            finish_kernel[grid](
                parts, bias, total, sums[r], v, 1.0 if r > 0 else 1.0 / J,
                J=J, num_parts=len(parts), APPROXIMATE=approximate, FIRST=r == 0, LAST=r == num_iters - 1, **rows,
            )  # fmt: skip
    return v, sums


def dynamic_routing_backward(
    grad: Tensor, x: Tensor, weight: Tensor, sums: Tensor, approximate: bool, tf32: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x and weight in their dtypes and by bias in float32, from `grad` `[B, J, D]` and what
    `dynamic_routing` took and returned."""
    grad, x, weight, sums = grad.contiguous(), x.contiguous(), weight.contiguous(), sums.contiguous()
    R, B, J, D = sums.shape
    if sums.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(weight), sums.new_zeros(J, D)
    grid, rows = _rows(B * J, D)
    sizes = _sizes(x, weight, tf32)
    with torch.cuda.device_of(x):
        totals, dsums = torch.empty_like(sums[1:]), torch.empty_like(sums)  # V^1..V^(R-1) and ds^1..ds^R
        begin_backward_kernel[grid](grad, sums, totals, dsums, R=R, APPROXIMATE=approximate, **rows)
        lse = x.new_empty(R - 1, *x.shape[:2], dtype=torch.float32)
        delta, dtotal = torch.empty_like(lse), torch.empty_like(sums[0])
        for r in range(R - 1, 0, -1):
            tensors = x, weight, totals[r - 1], dsums[r], lse[r - 1], delta[r - 1]
            _statistics(*tensors, sizes)
            parts = _sum(*tensors, sizes)
            finish_backward_kernel[grid](
                parts, dtotal, sums[r - 1], dsums[r - 1],
                num_parts=len(parts), APPROXIMATE=approximate, FIRST=r == R - 1, **rows,
            )  # fmt: skip
        dbias = dsums.sum((0, 1))
        dx = _dposes(x, weight, totals, dsums, lse, delta, sizes)
        dweight = _dweight(x, weight, totals, dsums, lse, delta, sizes)
    return dx, dweight, dbias


def _statistics(
    x: Tensor, weight: Tensor, total: Tensor, dsum: Tensor | None, lse: Tensor, delta: Tensor | None, sizes: dict
) -> None:
    """Writes lse, and delta if there is a ds."""
    backward = dsum is not None
    _launcher(statistics_kernel, _tiles_grid(sizes))(
        x, weight, total, dsum if backward else total, lse, delta if backward else lse, BACKWARD=backward, **sizes
    )


def _sum(
    x: Tensor, weight: Tensor, total: Tensor, dsum: Tensor | None, lse: Tensor, delta: Tensor | None, sizes: dict,
    uniform: bool = False,
) -> Tensor:  # fmt: skip
    """The sum over the capsules of c_ij u_ij, or of dl_ij u_ij if there is a ds, in parts `[parts, B, J, D]`."""
    B, T, P, J, K = (sizes[name] for name in "BTPJK")
    # Sizes of parts and tiles are independent, so that tuning need not know the one to choose the other.
    tiles = triton.cdiv(B, min(sizes["MAX_B"], 32)) * J
    num_parts = max(1, min(triton.cdiv(NUM_PROGRAMS, tiles), triton.cdiv(T * P * K, 256)))
    parts = total.new_empty(num_parts, *total.shape)
    backward = dsum is not None
    _launcher(sum_kernel, lambda meta: (triton.cdiv(B, meta["BLOCK_B"]) * num_parts, J))(
        x, weight, total, dsum if backward else total, lse, delta if backward else lse, parts,
        num_parts=num_parts, UNIFORM=uniform, BACKWARD=backward, **sizes,
    )  # fmt: skip
    return parts


def _dposes(
    x: Tensor, weight: Tensor, totals: Tensor, dsums: Tensor, lse: Tensor, delta: Tensor, sizes: dict
) -> Tensor:
    dx = torch.empty_like(x)
    launch = _launcher(dposes_kernel, _tiles_grid(sizes))
    launch(x, weight, totals, dsums, lse, delta, dx, R=len(dsums), **sizes)
    return dx


def _dweight(
    x: Tensor, weight: Tensor, totals: Tensor, dsums: Tensor, lse: Tensor, delta: Tensor, sizes: dict
) -> Tensor:
    B, T, P, J, K = (sizes[name] for name in "BTPJK")
    tiles = triton.cdiv(T * K, 256) * J
    num_parts = max(1, min(triton.cdiv(NUM_PROGRAMS, tiles), triton.cdiv(B, 16) * triton.cdiv(P, sizes["BLOCK_P"])))
    parts = torch.empty(num_parts, *weight.shape, dtype=weight.dtype if num_parts == 1 else torch.float32,
                        device=x.device)  # fmt: skip
    launch = _launcher(dweight_kernel, lambda meta: (triton.cdiv(T, meta["BLOCK_T"]), J, num_parts))
    launch(x, weight, totals, dsums, lse, delta, parts, R=len(dsums), num_parts=num_parts, **sizes)
    return parts[0] if num_parts == 1 else parts.sum(0).to(weight.dtype)


def _tiles_grid(sizes: dict):
    """A program for each tile of samples and capsules."""
    positions = triton.cdiv(sizes["P"], sizes["BLOCK_P"])
    return lambda meta: (
        triton.cdiv(sizes["B"], meta["BLOCK_B"]) * triton.cdiv(sizes["T"], meta["BLOCK_T"]) * positions,
    )


def _rows(N: int, D: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid of the second stage, and the sizes that its kernels take."""
    BLOCK_D = triton.next_power_of_2(D)
    BLOCK_N = max(1, ROWS_SIZE // BLOCK_D)
    return (triton.cdiv(N, BLOCK_N),), {"N": N, "D": D, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D}


def _sizes(x: Tensor, weight: Tensor, tf32: bool) -> dict[str, int | str]:
    """What all kernels over tiles take."""
    B, T, P = x.shape[0], weight.shape[0], x.shape[1] // weight.shape[0]
    K, J, D = weight.shape[1:]
    return {
        "B": B, "T": T, "P": P, "J": J, "K": K, "D": D,
        "MAX_B": min(64, max(16, triton.next_power_of_2(B))),
        # At most 4, so that the projections of a tile have a share for each warp; little of the last tile empty.
        "BLOCK_P": next(p for p in (4, 2, 1) if p == 1 or triton.cdiv(P, p) * p * 6 <= P * 7),
        "BLOCK_K": triton.next_power_of_2(K),
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "PRECISION": _precision(x, weight, tf32),
    }  # fmt: skip


def _precision(x: Tensor, weight: Tensor, tf32: bool) -> str:
    """Of products in the kernels. bfloat16 and float16 are exact in TF32, which rounds no coarser than they do."""
    if not x.is_cuda or torch.version.hip or torch.cuda.get_device_capability(x.device) < (8, 0):
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # Of the two settings torch raises an error for the older one once the newer has been used.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    half = x.dtype in (torch.bfloat16, torch.float16) and weight.dtype in (torch.bfloat16, torch.float16)
    return "tf32" if tf32 or allowed or half else "ieee"
