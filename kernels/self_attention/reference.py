"""Self-attention routing in plain PyTorch, written for reading: what every other implementation is compared with.

Mazzia, Salvetti, Chiaberge, "Efficient-CapsNet: Capsule Network with Self-Attention Routing" (2021), section 3.2.
Notation: B samples, I capsules of K numbers, J classes with capsules of D numbers.

Made of standard operators without a branch on data, as `capszoo.kernels.reference`. It stores the votes, but never the
I x I matrix of their agreements.
"""

import math

import torch
from torch import Tensor


def self_attention_routing(x: Tensor, weight: Tensor, prior: Tensor, attention: bool = True) -> Tensor:
    """Sums of votes, each weighed by its agreement with all votes for its class.

    Args:
        x: Input capsules, `[B, I, K]`.
        weight: A matrix for each capsule and class, `[I, K, J, D]`.
        prior: Added to the couplings after the softmax over the classes, `[I, J]`.
        attention: Otherwise the couplings are 1 / J.

    Returns:
        The sums before squash, `[B, J, D]`, in the dtype of `x`. Any size may be 0.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    votes = torch.einsum("bik,ikjd->bijd", x.to(dtype), weight.to(dtype)).to(dtype)
    return weigh_votes(votes, prior.to(dtype), attention).to(x.dtype)


def total_votes(x: Tensor, weight: Tensor) -> Tensor:
    """V_j = sum over i of u_ij / sqrt(D), `[B, J, D]`, of which <u_ij, V_j> are the logits."""
    return torch.einsum("bik,ikjd->bjd", x, weight) / math.sqrt(max(1, weight.shape[3]))


def weigh_votes(votes: Tensor, prior: Tensor, attention: bool = True) -> Tensor:
    """The same from votes u `[B, I, J, D]`.

    With the agreements A_ik = <u_i, u_k> / sqrt(D) of a class's votes, the logit of vote i is sum_k A_ik. That is
    <u_i, sum_k u_k> / sqrt(D), and the work grows as I.
    """
    if attention:
        logits = (votes * votes.sum(dim=1, keepdim=True)).sum(dim=3) / math.sqrt(max(1, votes.shape[3]))
        couplings = logits.softmax(dim=2) + prior
    else:
        couplings = prior + 1 / max(1, votes.shape[2])
    return (couplings.unsqueeze(-1) * votes).sum(dim=1)
