"""Inverted dot-product attention routing in Triton: neither votes nor logits are stored.

Notation as in cpu.py: N parent positions, of patches of k x k positions of a map; C = k * k * T children of each;
poses of S x S numbers; J parent types. A program takes BLOCK_N parent positions with all types, and a part of the
children one after the other; what a tile holds is [n, row, column, type], each but the first padded to a power of two.

Forward: votes V_c = X_c W_c by S outer products; r = softmax over J of (sum over rows and columns of V p) / S; the sum
of r V over the children of the part. Parts are added by PyTorch in a fixed order, never by atomics.

Backward from ds, with V and r computed again and dl = r (dr - sum over J of r dr) / S, dr = sum of V ds:
    poses_kernel    dp += dl V, in parts; dX_c = (r ds + dl p) W_c^T, a row for each child and parent position, which
                    PyTorch adds into the map place by place of the kernel, few samples at a time
    weight_kernel   a program for each child and part of the positions: dW_c += X_c^T (r ds + dl p)

Inner dimensions of S are too short for matrix units, which would be three quarters empty at 4 x 4: all products are
those of float32 units, and exact as such.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cpu import add_children

# Numbers in a tile of a program of 4 warps forward, of 8 backward, where five such tiles are held.
TILE_SIZE = 2048

# Numbers that the poses of all types at one position may have, padded: beyond, registers are short.
MAX_POSES = 16384

# Programs of a launch that children or positions are divided for: enough for every GPU.
NUM_PROGRAMS = 1024

# Bytes of what goes back to children that is held at a time, before it is added into the map.
GROUP_BYTES = 2**26


@triton.jit
def _load_poses(p_poses, o_n, N, J, S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr):
    """Poses `[N, J, S, S]` of some positions as `[n, row, column, type]`."""
    o_row = tl.arange(0, BLOCK_S)[None, :, None, None]
    o_column = tl.arange(0, BLOCK_S)[None, None, :, None]
    o_j = tl.arange(0, BLOCK_J)[None, None, None, :]
    o_n = o_n[:, None, None, None]
    mask = (o_n < N) & (o_row < S) & (o_column < S) & (o_j < J)
    return tl.load(p_poses + ((o_n * J + o_j) * S + o_row) * S + o_column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_poses(p_poses, b_poses, o_n, N, J, S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr):
    o_row = tl.arange(0, BLOCK_S)[None, :, None, None]
    o_column = tl.arange(0, BLOCK_S)[None, None, :, None]
    o_j = tl.arange(0, BLOCK_J)[None, None, None, :]
    o_n = o_n[:, None, None, None]
    mask = (o_n < N) & (o_row < S) & (o_column < S) & (o_j < J)
    tl.store(p_poses + ((o_n * J + o_j) * S + o_row) * S + o_column, b_poses, mask=mask)


@triton.jit
def _patches(o_n, H, W, T, height, width, stride):
    """The first capsule of each patch, in the map `[B, H, W, T]`."""
    i_h = o_n // width % height
    return ((o_n // (width * height) * H + i_h * stride) * W + o_n % width * stride) * T


@triton.jit
def _child(o_patch, i_c, W, T, KERNEL: tl.constexpr):
    """The child's capsule in each patch."""
    place = i_c // T
    return o_patch + (place // KERNEL * W + place % KERNEL) * T + i_c % T


@triton.jit
def _column_of_poses(p_x, o_capsule, m_n, i_x, S: tl.constexpr, BLOCK_S: tl.constexpr):
    """Column i_x of the children's poses, `[n, row]`."""
    o_row = tl.arange(0, BLOCK_S)[None, :]
    mask = m_n[:, None] & (o_row < S)
    return tl.load(p_x + (o_capsule[:, None] * S + o_row) * S + i_x, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _row_of_matrices(p_w, i_c, i_x, J, S: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr):
    """Row i_x of the child's matrices, `[column, type]`."""
    o_column = tl.arange(0, BLOCK_S)[:, None]
    o_j = tl.arange(0, BLOCK_J)[None, :]
    start = (tl.cast(i_c, tl.int64) * S + i_x) * S
    return tl.load(p_w + (start + o_column) * J + o_j, mask=(o_column < S) & (o_j < J), other=0.0).to(tl.float32)


@triton.jit
def _votes(
    p_x, p_w, o_capsule, m_n, i_c, J,
    S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    b_votes = tl.zeros([BLOCK_N, BLOCK_S, BLOCK_S, BLOCK_J], tl.float32)
    for i_x in tl.static_range(S):
        b_x = _column_of_poses(p_x, o_capsule, m_n, i_x, S, BLOCK_S)
        b_w = _row_of_matrices(p_w, i_c, i_x, J, S, BLOCK_S, BLOCK_J)
        b_votes += b_x[:, :, None, None] * b_w[None, None, :, :]
    return b_votes


@triton.jit
def _agreement(b_votes, b_poses):
    """Inner products `[n, type]`."""
    return tl.sum(tl.sum(b_votes * b_poses, axis=1), axis=1)


@triton.jit
def _couplings(b_votes, b_poses, J, S: tl.constexpr, BLOCK_J: tl.constexpr):
    m_j = tl.arange(0, BLOCK_J)[None, :] < J
    b_logits = tl.where(m_j, _agreement(b_votes, b_poses) * (1.0 / S), float("-inf"))
    b_exp = tl.exp(b_logits - tl.max(b_logits, axis=1)[:, None])
    return b_exp / tl.sum(b_exp, axis=1)[:, None]


@triton.jit
def _dlogits(b_votes, b_dsums, b_couplings, S: tl.constexpr):
    b_dcouplings = _agreement(b_votes, b_dsums)
    return b_couplings * (b_dcouplings - tl.sum(b_couplings * b_dcouplings, axis=1)[:, None]) * (1.0 / S)


@triton.jit
def sum_kernel(
    p_x, p_w, p_parents, p_parts, N, H, W, T, C, J, height, width, stride, children_per_part,
    KERNEL: tl.constexpr, S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Parts `[part, N, J, S, S]` of the sums of weighed votes."""
    i_part = tl.program_id(1)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_patch = _patches(o_n, H, W, T, height, width, stride)
    b_poses = _load_poses(p_parents, o_n, N, J, S, BLOCK_S, BLOCK_J)
    b_sums = tl.zeros([BLOCK_N, BLOCK_S, BLOCK_S, BLOCK_J], tl.float32)
    first = i_part * children_per_part
    for i_c in range(first, tl.minimum(first + children_per_part, C)):
        o_capsule = _child(o_patch, i_c, W, T, KERNEL)
        b_votes = _votes(p_x, p_w, o_capsule, m_n, i_c, J, S, BLOCK_N, BLOCK_S, BLOCK_J)
        b_sums += _couplings(b_votes, b_poses, J, S, BLOCK_J)[:, None, None, :] * b_votes
    p_part = p_parts + tl.cast(i_part, tl.int64) * N * J * S * S
    _store_poses(p_part, b_sums, o_n, N, J, S, BLOCK_S, BLOCK_J)


@triton.jit
def poses_kernel(
    p_x, p_w, p_parents, p_dsums, p_dparts, p_dchildren,
    N, H, W, T, C, J, height, width, stride, children_per_part,
    KERNEL: tl.constexpr, S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Parts `[part, N, J, S, S]` of the gradient by the parents' poses, and that by the children's `[C, N, S, S]`."""
    i_part = tl.program_id(1)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_patch = _patches(o_n, H, W, T, height, width, stride)
    o_row = tl.arange(0, BLOCK_S)[None, :]
    b_poses = _load_poses(p_parents, o_n, N, J, S, BLOCK_S, BLOCK_J)
    b_dsums = _load_poses(p_dsums, o_n, N, J, S, BLOCK_S, BLOCK_J)
    b_dposes = tl.zeros([BLOCK_N, BLOCK_S, BLOCK_S, BLOCK_J], tl.float32)
    first = i_part * children_per_part
    for i_c in range(first, tl.minimum(first + children_per_part, C)):
        o_capsule = _child(o_patch, i_c, W, T, KERNEL)
        b_votes = _votes(p_x, p_w, o_capsule, m_n, i_c, J, S, BLOCK_N, BLOCK_S, BLOCK_J)
        b_couplings = _couplings(b_votes, b_poses, J, S, BLOCK_J)
        b_dlogits = _dlogits(b_votes, b_dsums, b_couplings, S)[:, None, None, :]
        b_dposes += b_dlogits * b_votes
        b_dvotes = b_couplings[:, None, None, :] * b_dsums + b_dlogits * b_poses
        o_child = (tl.cast(i_c, tl.int64) * N + o_n[:, None]) * S + o_row
        for i_x in tl.static_range(S):
            b_w = _row_of_matrices(p_w, i_c, i_x, J, S, BLOCK_S, BLOCK_J)
            b_dx = tl.sum(tl.sum(b_dvotes * b_w[None, None, :, :], axis=3), axis=2)
            tl.store(p_dchildren + o_child * S + i_x, b_dx, mask=m_n[:, None] & (o_row < S))
    p_part = p_dparts + tl.cast(i_part, tl.int64) * N * J * S * S
    _store_poses(p_part, b_dposes, o_n, N, J, S, BLOCK_S, BLOCK_J)


@triton.jit
def weight_kernel(
    p_x, p_w, p_parents, p_dsums, p_dw, N, H, W, T, C, J, height, width, stride, positions_per_part,
    KERNEL: tl.constexpr, S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Parts `[part, C, S, S, J]` of the gradient by the matrices."""
    i_c, i_part = tl.program_id(0), tl.program_id(1)
    o_x = tl.arange(0, BLOCK_S)[:, None, None]
    b_dw = tl.zeros([BLOCK_S, BLOCK_S, BLOCK_J], tl.float32)
    first = i_part * positions_per_part
    end = tl.minimum(first + positions_per_part, N)
    for i_n in range(first, end, BLOCK_N):
        o_n = tl.cast(i_n, tl.int64) + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        o_capsule = _child(_patches(o_n, H, W, T, height, width, stride), i_c, W, T, KERNEL)
        b_poses = _load_poses(p_parents, o_n, end, J, S, BLOCK_S, BLOCK_J)
        b_dsums = _load_poses(p_dsums, o_n, end, J, S, BLOCK_S, BLOCK_J)
        b_votes = _votes(p_x, p_w, o_capsule, m_n, i_c, J, S, BLOCK_N, BLOCK_S, BLOCK_J)
        b_couplings = _couplings(b_votes, b_poses, J, S, BLOCK_J)
        b_dlogits = _dlogits(b_votes, b_dsums, b_couplings, S)[:, None, None, :]
        b_dvotes = b_couplings[:, None, None, :] * b_dsums + b_dlogits * b_poses
        for i_x in tl.static_range(S):
            b_x = _column_of_poses(p_x, o_capsule, m_n, i_x, S, BLOCK_S)
            b_row = tl.sum(tl.sum(b_x[:, :, None, None] * b_dvotes, axis=0), axis=0)
            b_dw += tl.where(o_x == i_x, b_row[None, :, :], 0.0)
    o_d = tl.arange(0, BLOCK_S)[None, :, None]
    o_j = tl.arange(0, BLOCK_J)[None, None, :]
    start = (tl.cast(i_part, tl.int64) * C + i_c) * S
    tl.store(p_dw + ((start + o_x) * S + o_d) * J + o_j, b_dw, mask=(o_x < S) & (o_d < S) & (o_j < J))


def fits(weight: Tensor) -> bool:
    """Whether the poses of all parents at a position fit into registers."""
    side, num_parents = weight.shape[4:]
    return triton.next_power_of_2(side) ** 2 * triton.next_power_of_2(num_parents) <= MAX_POSES


def forward(x: Tensor, weight: Tensor, parents: Tensor, stride: int) -> Tensor:
    """Sums of weighed votes `[B, H', W', J, S, S]`, in the dtype of x.

    Args:
        x: `[B, H, W, T, S, S]`, of any strides, like all tensors here. Each may be float32, bfloat16 or float16. No
            size is 0.
        weight: `[k, k, T, S, S, J]`.
        parents: `[B, H', W', J, S, S]`.
        stride: Stride of the kernel.
    """
    x, weight, parents = x.contiguous(), weight.contiguous(), parents.contiguous()
    grid, parts, sizes = launch(x, weight, parents, stride)
    sums = parents.new_empty(parts["parts"], *parents.shape, dtype=torch.float32)
    with torch.cuda.device_of(x):
        sum_kernel[grid](x, weight, parents, sums, children_per_part=parts["children"], **sizes)
    return _add(sums).to(x.dtype)


def backward(grad: Tensor, x: Tensor, weight: Tensor, parents: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weight and parents in their dtypes, from `grad` by the sums and what `forward` took."""
    grad, x, weight, parents = grad.contiguous(), x.contiguous(), weight.contiguous(), parents.contiguous()
    dx = torch.zeros_like(x, dtype=torch.float32)
    dparents = torch.empty_like(parents)
    bytes_each = 4 * weight.shape[:5].numel() * parents.shape[1] * parents.shape[2]
    step = max(1, GROUP_BYTES // bytes_each)
    with torch.cuda.device_of(x):
        for first in range(0, len(x), step):
            batch = slice(first, first + step)
            grid, parts, sizes = launch(x[batch], weight, parents[batch], stride, backward=True)
            dparts = dx.new_empty(parts["parts"], *parents[batch].shape)
            dchildren = dx.new_empty(sizes["C"], sizes["N"], *x.shape[4:])
            poses_kernel[grid](
                x[batch], weight, parents[batch], grad[batch], dparts, dchildren,
                children_per_part=parts["children"], **sizes,
            )  # fmt: skip
            dparents[batch] = _add(dparts)
            add_children(dx[batch], dchildren, weight.shape[0], stride)
        _, _, sizes = launch(x, weight, parents, stride, backward=True)
        num_parts = min(triton.cdiv(sizes["N"], 4 * sizes["BLOCK_N"]), triton.cdiv(NUM_PROGRAMS, sizes["C"]))
        positions = triton.cdiv(sizes["N"], num_parts)
        dweight = dx.new_empty(triton.cdiv(sizes["N"], positions), *weight.shape)
        grid = (sizes["C"], len(dweight))
        weight_kernel[grid](x, weight, parents, grad, dweight, positions_per_part=positions, **sizes)
    return dx.to(x.dtype), _add(dweight).to(weight.dtype), dparents


def _add(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


def launch(
    x: Tensor, weight: Tensor, parents: Tensor, stride: int, backward: bool = False
) -> tuple[tuple[int, int], dict, dict]:
    """The grid over positions and parts of the children, how many parts and children of each, and what kernels take."""
    k, num_children, side, num_parents = weight.shape[0], weight.shape[:3].numel(), *weight.shape[4:]
    BLOCK_S, BLOCK_J = triton.next_power_of_2(side), triton.next_power_of_2(num_parents)
    N = parents.shape[:3].numel()
    at_one = BLOCK_S**2 * BLOCK_J
    BLOCK_N = min(triton.next_power_of_2(N), max(1, TILE_SIZE // at_one))
    tiles = triton.cdiv(N, BLOCK_N)
    children = triton.cdiv(num_children, max(1, NUM_PROGRAMS // tiles))
    parts = triton.cdiv(num_children, children)
    sizes = {
        "N": N, "H": x.shape[1], "W": x.shape[2], "T": x.shape[3], "C": num_children, "J": num_parents,
        "height": parents.shape[1], "width": parents.shape[2], "stride": stride, "KERNEL": k, "S": side,
        "BLOCK_N": BLOCK_N, "BLOCK_S": BLOCK_S, "BLOCK_J": BLOCK_J,
        "num_warps": min(8, max(4, BLOCK_N * at_one // (256 if backward else 1024))),
    }  # fmt: skip
    return (tiles, parts), {"parts": parts, "children": children}, sizes
