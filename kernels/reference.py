"""The operators in plain PyTorch, written for reading: what every other implementation is compared with.

Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017): squash is its equation 1, routing its procedure 1.
Notation: B samples, I input capsules of K numbers, J classes with capsules of D numbers, T weight matrices.

Everything is differentiated by autograd and made of standard operators without a branch on data, so that it can be
traced, exported to ONNX and differentiated twice. It stores the votes and the logits, as the public PyTorch codes do.
Half precision is computed in float32, float64 in float64.
"""

import torch
from torch import Tensor


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)


def squash(x: Tensor, approximate: bool = False) -> Tensor:
    """v = |x|^2 / (1 + |x|^2) x / |x| along the last dimension.

    Args:
        x: Vectors, `[..., D]`.
        approximate: Use x / 2 where |x| <= 2, else x / |x|.

    Returns:
        Vectors no longer than 1, shaped as `x`. A zero vector gives zero, and its gradient is finite: zero, or
        half the incoming one in the approximation.
    """
    poses = x.to(_compute_dtype(x, x))
    # Squares overflow in float32 from lengths of 2e19 on: those of numbers up to 1 are taken.
    largest = poses.detach().abs().amax(dim=-1, keepdim=True).clamp(min=1)
    scaled, one = poses / largest, largest.reciprocal().square()  # 1 in the scale of `square`
    square = scaled.square().sum(dim=-1, keepdim=True)
    # A square root has no gradient at 0, and 0 * inf is NaN: zero vectors take the root of 1 and meet a factor 0.
    unit = scaled / torch.where(square > 0, square, 1.0).sqrt()
    if approximate:
        v = torch.where(square <= 4 * one, poses / 2, unit)
    else:
        v = square / (one + square) * unit
    return v.to(x.dtype)


def dynamic_routing(
    x: Tensor, weight: Tensor, bias: Tensor, num_iters: int = 3, approximate_squash: bool = False
) -> Tensor:
    """Routing by agreement, with stored votes and logits.

    Args:
        x: Input capsules, `[B, I, K]`.
        weight: One matrix per capsule type, `[T, K, J, D]`; T divides I, and the I/T consecutive capsules of a type
            share its matrix.
        bias: Added to every sum of votes, `[J, D]`.
        num_iters: Routing iterations R.
        approximate_squash: See `squash`.

    Returns:
        Class capsules, `[B, J, D]`, in the dtype of `x`.
    """
    dtype = _compute_dtype(x, weight)
    num_types = weight.shape[0]
    per_type = x.shape[1] // num_types
    poses = x.to(dtype).unflatten(1, [num_types, per_type])
    votes = torch.einsum("btpk,tkjd->btpjd", poses, weight.to(dtype)).flatten(1, 2).to(dtype)

    # Broadcasts to [B, I, J]. Made of sizes that an ONNX file may fix: never of the batch's.
    logits = votes.new_zeros(1, 1, votes.shape[2])
    for _ in range(num_iters - 1):
        v = squash(_weighted_sum(votes, logits, bias), approximate_squash)
        agreement = (votes * v.unsqueeze(1)).sum(dim=3)
        logits = logits + agreement
    return squash(_weighted_sum(votes, logits, bias), approximate_squash).to(x.dtype)


def _weighted_sum(votes: Tensor, logits: Tensor, bias: Tensor) -> Tensor:
    couplings = logits.softmax(dim=2)
    return (couplings.unsqueeze(3) * votes).sum(dim=1) + bias.to(votes.dtype)
