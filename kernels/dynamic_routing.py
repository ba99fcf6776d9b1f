"""Dynamic routing in Triton: votes and logits are never stored.

Notation: B samples; capsules i = 1..I with poses x_i in R^K; T types of P = I/T consecutive capsules, which share a
matrix W_t in R^(K x J x D); J classes of capsules in R^D; R iterations; votes u_ij = x_i W_tj; V^r = v^1 + ... + v^r.

Forward, for r = 1..R:
    c_i          = softmax over j of u_ij . V^(r-1)_j, which is 1/J for r = 1
    sum          sum over i of c_ij u_ij, in parts
    finish       adds the parts and the bias: s^r; v^r = squash(s^r); V^r = V^(r-1) + v^r

Backward from g = dL/dv^R. V^1..V^(R-1) and ds^R = (d squash / ds at s^R)^T g come from the saved s. For r = R..2:
    dc_ij        = u_ij . ds^r_j,  dl_ij = c_ij (dc_ij - sum over j of c_ij dc_ij)
    sum          sum over i of dl_ij u_ij, in parts
    finish       adds the parts to Vbar; ds^(r-1) = (d squash / ds at s^(r-1))^T Vbar
and last, with c = 1/J and dl = 0 for r = 1:
    gradients    du_ij = sum over r of c_ij ds^r_j + dl_ij V^(r-1)_j; dx_i = sum over j of W_tj du_ij;
                 dW_tj = sum over b and the i of t of x_i du_ij^T

This file has what works on class capsules, rows of D. Sums and gradients come in two forms with the same functions:
all_classes.py for few classes, which is several times faster on an H100, and per_class.py for any number. Parts are
added by a second kernel in a fixed order, never by atomics: for given tile sizes results are the same from run to run.
Timing chooses these, once for each problem, unless torch.use_deterministic_algorithms is on; see tuning.py.
"""

from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import all_classes, per_class
from .squash import squash_tile, squash_tile_backward

# Numbers in the tile of a program that works on rows of D; where it adds parts, that of each part, of which it takes
# NUM_ADDED at a time: what it waits for is memory.
ROWS_SIZE = 512
ROWS_SIZE_OF_PARTS = 64
NUM_ADDED = 16


@triton.jit
def _add_parts(
    p_parts, offsets, m_row, num_parts, size,
    NUM_ADDED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_part = tl.arange(0, NUM_ADDED)[:, None, None]
    b_sums = tl.zeros([NUM_ADDED, BLOCK_N, BLOCK_D], tl.float32)
    for i_part in range(0, num_parts, NUM_ADDED):
        m_part = (i_part + o_part < num_parts) & m_row[None, :, :]
        b_sums += tl.load(p_parts + (i_part + o_part) * size + offsets[None, :, :], mask=m_part, other=0.0)
    return tl.sum(b_sums, axis=0)


@triton.jit
def finish_kernel(
    p_parts, p_bias, p_total, p_s, p_v, scale, N, J, num_parts,
    D: tl.constexpr, APPROXIMATE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    NUM_ADDED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """s^r, and V^r in place of V^(r-1), or v^R if LAST; rows of `[N = B * J, D]`."""
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    i_d = tl.arange(0, BLOCK_D)[None, :]
    m_row = (i_n < N) & (i_d < D)
    offsets = i_n * D + i_d
    size = tl.cast(N, tl.int64) * D
    b_s = _add_parts(p_parts, offsets, m_row, num_parts, size, NUM_ADDED, BLOCK_N, BLOCK_D) * tl.cast(scale, tl.float32)
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
    D: tl.constexpr, APPROXIMATE: tl.constexpr, FIRST: tl.constexpr,
    NUM_ADDED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds to Vbar, which is zero if FIRST; ds^(r-1) from it and s^(r-1)."""
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    i_d = tl.arange(0, BLOCK_D)[None, :]
    m_row = (i_n < N) & (i_d < D)
    offsets = i_n * D + i_d
    b_dtotal = _add_parts(p_parts, offsets, m_row, num_parts, tl.cast(N, tl.int64) * D, NUM_ADDED, BLOCK_N, BLOCK_D)
    if not FIRST:
        b_dtotal += tl.load(p_dtotal + offsets, mask=m_row, other=0.0)
    tl.store(p_dtotal + offsets, b_dtotal, mask=m_row)
    b_s = tl.load(p_s + offsets, mask=m_row, other=0.0)
    tl.store(p_ds + offsets, squash_tile_backward(b_dtotal, b_s, APPROXIMATE), mask=m_row)


@triton.jit
def dbias_kernel(p_ds, p_dbias, N, J, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sum of ds `[N = R * B, J, D]` over its rows, a program for each class."""
    i_j = tl.program_id(0)
    o_n = tl.arange(0, BLOCK_N)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    b_sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i_n in range(0, N, BLOCK_N):
        offsets = ((i_n + o_n).to(tl.int64) * J + i_j) * D + o_d
        b_sums += tl.load(p_ds + offsets, mask=(i_n + o_n < N) & (o_d < D), other=0.0)
    o_d = tl.arange(0, BLOCK_D)
    tl.store(p_dbias + i_j * D + o_d, tl.sum(b_sums, axis=0), mask=o_d < D)


def dynamic_routing(
    x: Tensor, weight: Tensor, bias: Tensor, num_iters: int, approximate: bool, tf32: bool = False
) -> tuple[Tensor, Tensor]:
    """Class capsules v^R `[B, J, D]` in the dtype of x, and the sums before squash, s^1..s^R `[R, B, J, D]` in float32.

    Args:
        x: `[B, I, K]`, of any strides, like all tensors here. Each may be float32, bfloat16 or float16. No size is 0.
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
    grid, rows = _rows(B * J, D, ROWS_SIZE_OF_PARTS)
    sizes = problem_sizes(x, weight, tf32)
    form = form_for(sizes)
    with torch.cuda.device_of(x):
        total = torch.empty_like(sums[0])  # V^r
        for r in range(num_iters):
            parts = form.weighted_sum(x, weight, total, sizes) if r > 0 else form.uniform_sum(x, weight, sizes)
            finish_kernel[grid](
                parts, bias, total, sums[r], v, 1.0 if r > 0 else 1.0 / J, J=J, num_parts=len(parts),
                APPROXIMATE=approximate, FIRST=r == 0, LAST=r == num_iters - 1, NUM_ADDED=NUM_ADDED, **rows,
            )  # fmt: skip
    return v, sums


def dynamic_routing_backward(
    grad: Tensor, x: Tensor, weight: Tensor, sums: Tensor, approximate: bool, tf32: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x and weight in their dtypes and by bias in float32, from `grad` `[B, J, D]` and what
    `dynamic_routing` took and returned."""
    grad, x, weight, sums = grad.contiguous(), x.contiguous(), weight.contiguous(), sums.contiguous()
    R, B, J, D = sums.shape
    sizes = problem_sizes(x, weight, tf32)
    form = form_for(sizes, R)
    with torch.cuda.device_of(x):
        totals, dsums = torch.empty_like(sums[1:]), torch.empty_like(sums)  # V^1..V^(R-1) and ds^1..ds^R
        grid, rows = _rows(B * J, D, ROWS_SIZE)
        begin_backward_kernel[grid](grad, sums, totals, dsums, R=R, APPROXIMATE=approximate, **rows)
        kept = form.keep_for_gradients(x, R, sizes)
        dtotal = torch.empty_like(sums[0])
        grid, rows = _rows(B * J, D, ROWS_SIZE_OF_PARTS)
        for r in range(R - 1, 0, -1):
            parts = form.gradient_sum(x, weight, totals[r - 1], dsums[r], *(t[r - 1] for t in kept), sizes)
            finish_backward_kernel[grid](
                parts, dtotal, sums[r - 1], dsums[r - 1], num_parts=len(parts),
                APPROXIMATE=approximate, FIRST=r == R - 1, NUM_ADDED=NUM_ADDED, **rows,
            )  # fmt: skip
        dbias = sums.new_empty(J, D)
        BLOCK_D = triton.next_power_of_2(D)
        dbias_kernel[(J,)](dsums, dbias, R * B, J, D=D, BLOCK_N=max(1, 2048 // BLOCK_D), BLOCK_D=BLOCK_D)
        dx, dweight = form.gradients(x, weight, totals, dsums, *kept, sizes)
    return dx, dweight, dbias


def fits(x: Tensor, weight: Tensor, num_iters: int) -> bool:
    """Whether one of the forms takes these on their GPU: `num_iters` where gradients are to come."""
    sizes = problem_sizes(x, weight, tf32=False)
    return all_classes.fits(sizes, num_iters) or per_class.fits(sizes, _shared_memory(x.device))


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take there."""
    if device.type != "cuda":  # of the interpreter
        return 2**31
    # PyTorch tells since 2.6; the least of a GPU that Triton has code for is that of Turing.
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 2**16)


def form_for(sizes: dict, num_iters: int = 1) -> ModuleType:
    """Whose kernels take sums and gradients: `num_iters` where gradients are to come."""
    return all_classes if all_classes.fits(sizes, num_iters) else per_class


def _rows(N: int, D: int, size: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid of programs on rows of D, each of some `size` numbers, and the sizes that its kernels take."""
    BLOCK_D = triton.next_power_of_2(D)
    BLOCK_N = max(1, size // BLOCK_D)
    return (triton.cdiv(N, BLOCK_N),), {"N": N, "D": D, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D}


def problem_sizes(x: Tensor, weight: Tensor, tf32: bool) -> dict[str, int | str]:
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
    """Of products in the kernels. bfloat16 and float16 are exact in TF32, which rounds no coarser than they do.

    Where float32 is asked for, each factor is a sum of two numbers of TF32, of whose products three are taken: as
    exact as float32 (Ootomo and Yokota, 2022), and on matrix units.
    """
    if not x.is_cuda or torch.version.hip or torch.cuda.get_device_capability(x.device) < (8, 0):
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # Of the two settings torch raises an error for the older one once the newer has been used.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    half = x.dtype in (torch.bfloat16, torch.float16) and weight.dtype in (torch.bfloat16, torch.float16)
    return "tf32" if tf32 or allowed or half else "tf32x3"
