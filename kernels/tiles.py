"""Pointers to the tiles that the routing kernels load and store, and which of their places are inside the tensors."""

import triton
import triton.language as tl

# ---------------------------------------------------------------------------------------------------------------------
# One capsule, all classes
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def samples(i_b, B, BLOCK_B: tl.constexpr):
    """The samples of a tile from its first on, `[BLOCK_B, 1]`, and which there are.

    Where there are no more, the last is read again: loads need no mask then, and nothing of it is stored.
    """
    o_b = tl.arange(0, BLOCK_B)[:, None]
    return tl.minimum(o_b, B - 1 - i_b), i_b + o_b < B


@triton.jit
def classes_tile(p_v, i_b, o_b, j_first, J: tl.constexpr, D: tl.constexpr, NUM_J: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to `[BLOCK_B, NUM_J * BLOCK_D]` of `[B, J, D]` from a class on, and which columns are inside."""
    o_column = tl.arange(0, NUM_J * BLOCK_D)[None, :]
    o_j = j_first + o_column // BLOCK_D
    o_d = o_column % BLOCK_D
    return p_v + i_b.to(tl.int64) * (J * D) + (o_b * (J * D) + o_j * D + o_d), (o_j < J) & (o_d < D)


@triton.jit
def matrix_tile(
    p_w, i_t, j_first, J: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    NUM_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pointers to `[BLOCK_K, NUM_J * BLOCK_D]` of `[T, K, J, D]` for one type, and which are inside."""
    o_k = tl.arange(0, BLOCK_K)[:, None]
    o_column = tl.arange(0, NUM_J * BLOCK_D)[None, :]
    o_j = j_first + o_column // BLOCK_D
    o_d = o_column % BLOCK_D
    start = i_t.to(tl.int64) * K * J * D
    return p_w + start + (o_k * (J * D) + o_j * D + o_d), (o_k < K) & (o_j < J) & (o_d < D)


@triton.jit
def pose_tile(p_x, i_b, o_b, i, num_i, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Pointers to `[BLOCK_B, BLOCK_K]` of `[B, I, K]` for one capsule, and which columns are inside."""
    o_k = tl.arange(0, BLOCK_K)[None, :]
    return p_x + (i_b.to(tl.int64) * num_i + i) * K + (o_b * (num_i * K) + o_k), o_k < K


@triton.jit
def coupling_tile(p_c, i_b, o_b, i, j_first, num_i, J: tl.constexpr, NUM_J: tl.constexpr):
    """Pointers to `[BLOCK_B, NUM_J]` of `[B, I, J]` for one capsule, and which columns are inside."""
    o_j = j_first + tl.arange(0, NUM_J)[None, :]
    return p_c + (i_b.to(tl.int64) * num_i + i) * J + (o_b * (num_i * J) + o_j), o_j < J


# ---------------------------------------------------------------------------------------------------------------------
# Several types and capsules of each, one class
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def type_poses(
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
def class_matrices(
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
def load_type_poses(
    p_x, i_b, i_t, i_p, B, T, P,
    K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    p_tile, m_x = type_poses(p_x, i_b, i_t, i_p, B, T, P, K, BLOCK_B, BLOCK_T, BLOCK_P, BLOCK_K)
    return tl.load(p_tile, mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def load_class_matrices(
    p_w, i_t, i_j, T, J,
    K: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    p_tile, m_w = class_matrices(p_w, i_t, i_j, T, J, K, D, BLOCK_T, BLOCK_K, BLOCK_D)
    return tl.load(p_tile, mask=m_w, other=0.0).to(tl.float32)


@triton.jit
def load_class(p_v, i_b, i_j, B, J, D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[BLOCK_B, BLOCK_D]` of float32 `[B, J, D]` for one class."""
    o_b = tl.arange(0, BLOCK_B)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    start = (i_b.to(tl.int64) * J + i_j) * D
    return tl.load(p_v + start + o_b * J * D + o_d, mask=(i_b + o_b < B) & (o_d < D), other=0.0)


@triton.jit
def capsules(i_b, i_t, i_p, B, T, P, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr):
    """Offsets of `[BLOCK_B, BLOCK_T, BLOCK_P]` in `[B, T, P]`, and which are inside."""
    o_b = tl.arange(0, BLOCK_B)[:, None, None]
    o_t = tl.arange(0, BLOCK_T)[None, :, None]
    o_p = tl.arange(0, BLOCK_P)[None, None, :]
    start = (i_b.to(tl.int64) * T + i_t) * P + i_p
    return start + (o_b * T + o_t) * P + o_p, (i_b + o_b < B) & (i_t + o_t < T) & (i_p + o_p < P)
