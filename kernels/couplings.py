"""The couplings that dynamic routing reaches, on request: the operator itself never stores them."""

import torch
from torch import Tensor

from . import cpu
from .derivatives import compute_dtype, no_autocast
from .ops import check_inputs


@torch.no_grad()
def routing_couplings(
    x: Tensor, weight: Tensor, bias: Tensor, num_iters: int = 3, approximate_squash: bool = False
) -> Tensor:
    """Couplings c_ij of each iteration of :func:`capszoo.kernels.dynamic_routing` (its arguments and errors).

    They come from the sums of votes that the operator returns, on whatever device it runs: c^r is the softmax over the
    classes of u_ij . (v^1 + ... + v^(r-1)), and that of the first iteration is 1 / J. Votes are not stored.

    Args:
        x: Input capsules, `[B, I, K]`.
        weight: Vote matrices, `[T, K, J, D]`.
        bias: `[J, D]`.
        num_iters: Iterations R.
        approximate_squash: Use the approximation of `squash`.

    Returns:
        `[R, B, I, J]`, which add up to 1 over the classes; without derivatives.
    """
    check_inputs(x, weight, bias, num_iters)
    _, sums = torch.ops.capszoo.dynamic_routing(x, weight, bias, num_iters, approximate_squash)
    dtype = compute_dtype(x, weight)
    totals = cpu.squash(sums.to(dtype), approximate_squash)[:-1].cumsum(0)
    couplings = x.new_full((num_iters, *x.shape[:2], weight.shape[2]), 1 / max(1, weight.shape[2]), dtype=dtype)
    for iteration, total in enumerate(totals, start=1):
        couplings[iteration] = softmax_of_agreement(x, weight, total)
    return couplings


def softmax_of_agreement(x: Tensor, weight: Tensor, total: Tensor) -> Tensor:
    """Softmax over the classes of u_ij . V_j, `[B, I, J]` in the dtype of V `[B, J, D]`, without the votes u."""
    if not cpu.has_votes(x, weight):
        return total.new_full((*x.shape[:2], weight.shape[2]), 1 / max(1, weight.shape[2]))
    with no_autocast(x):
        projections = torch.einsum("tkjd,bjd->btkj", weight.to(total.dtype), total)
        types = x.to(total.dtype).unflatten(1, (weight.shape[0], -1))
        return (types @ projections).softmax(-1).flatten(1, 2)
