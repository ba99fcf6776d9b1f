"""The couplings of self-attention routing, on request: the operator itself never stores them."""

import torch
from torch import Tensor

from ..couplings import softmax_of_agreement
from ..derivatives import compute_dtype
from .ops import check_inputs


@torch.no_grad()
def self_attention_couplings(x: Tensor, weight: Tensor, prior: Tensor, attention: bool = True) -> Tensor:
    """Couplings c_ij of :func:`capszoo.kernels.self_attention_routing` with their priors (its arguments).

    They come from the sums of votes that the operator returns, on whatever device it runs: c is the softmax over the
    classes of u_ij . V_j with V_j = sum over i of u_ij / sqrt(D). Votes are not stored.

    Args:
        x: Input capsules, `[B, I, K]`.
        weight: A matrix for each capsule and class, `[I, K, J, D]`.
        prior: Added to the couplings, `[I, J]`.
        attention: Otherwise the couplings are 1 / J.

    Returns:
        `[B, I, J]`; without derivatives.
    """
    check_inputs(x, weight, prior)
    prior = prior.to(compute_dtype(x, weight))
    if not attention:
        return (prior + 1 / max(1, prior.shape[1])).expand(len(x), -1, -1)
    _, total = torch.ops.capszoo.self_attention_routing(x, weight, prior.to(weight.dtype), True)
    return softmax_of_agreement(x, weight, total) + prior
