"""The operators in plain PyTorch, written for reading: what every other implementation is compared with.

Sabour, Frosst, Hinton, "Dynamic Routing Between Capsules" (2017): squash is its equation 1, routing its procedure 1.
Notation: B samples, I input capsules of K numbers, J classes with capsules of D numbers, T weight matrices.

Everything is differentiated by autograd and made of standard operators without a branch on data, so that it can be
traced, exported to ONNX and differentiated twice. It stores the votes and the logits, as the public PyTorch codes do.
Half precision is computed in float32, float64 in float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)


def squash(x: Tensor, approximate: bool = False) -> Tensor:
    """``v = |x|^2 / (1 + |x|^2) x / |x|`` along the last dimension.

    Args:
        x: Vectors, `[..., D]`.
        approximate: Use ``x / 2`` where ``|x| <= 2``, else ``x / |x|``.

    Returns:
        Vectors no longer than 1, shaped as `x`. At a zero vector the result is zero and so are all derivatives (but for
        the first of the approximation, 1/2): from the second on they have no limit there, since they depend on the
        direction, and the mean of the second over opposite directions is zero.
    """
    poses = x.to(_compute_dtype(x, x))
    # Squares overflow in float32 from lengths of 2e19 on and vanish below 1e-23: those of numbers from -1 to 1 are
    # summed. What they are divided by cancels out, and is a constant to autograd. The pad gives D = 0 a largest number.
    largest = F.pad(poses.detach().abs(), (0, 1)).amax(dim=-1, keepdim=True)
    small, large = largest.clamp(max=1), largest.clamp(min=1)
    # Vectors shorter than about 1e-19, the square of which float32 cannot invert, count as zero vectors too.
    nonzero = largest.pow(-2) < float("inf")
    scaled = poses / torch.where(nonzero, largest, 1.0)
    # A square root has no derivative at 0: vectors that count as zero take a constant for theirs.
    norm = torch.where(nonzero, scaled.square().sum(dim=-1, keepdim=True), 1.0).sqrt()
    constant = (poses.detach() / torch.where(largest > 0, largest, 1.0)).square().sum(dim=-1, keepdim=True).sqrt()
    norm = torch.where(nonzero, norm, constant)
    length = small * norm  # |x| / large
    if approximate:
        v = torch.where(length <= 2 / large, poses / 2, scaled / torch.where(nonzero, norm, 1.0))
    else:
        v = length / (large.reciprocal().square() + length.square()) * (poses / large)
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
        Class capsules, `[B, J, D]`, in the dtype of `x`. Any size may be 0; without votes they are the squashed bias.
    """
    sums, _ = _iterate(_votes(x, weight), bias, num_iters, approximate_squash)
    return squash(sums[-1], approximate_squash).to(x.dtype)


def dynamic_routing_sums(
    x: Tensor, weight: Tensor, bias: Tensor, num_iters: int = 3, approximate_squash: bool = False
) -> Tensor:
    """Sums before squash of each iteration of `dynamic_routing` (its arguments), `[R, B, J, D]`, float32 at least."""
    return torch.stack(_iterate(_votes(x, weight), bias, num_iters, approximate_squash)[0])


def dynamic_routing_couplings(
    x: Tensor, weight: Tensor, bias: Tensor, num_iters: int = 3, approximate_squash: bool = False
) -> Tensor:
    """Couplings of each iteration of `dynamic_routing` (its arguments), `[R, B, I, J]`, which add up to 1 over J."""
    votes = _votes(x, weight)
    _, logits = _iterate(votes, bias, num_iters, approximate_squash)
    return torch.stack([each.softmax(dim=2).expand_as(votes[..., 0]) for each in logits])


def _votes(x: Tensor, weight: Tensor) -> Tensor:
    dtype = _compute_dtype(x, weight)
    num_types = weight.shape[0]
    no_types = isinstance(num_types, int) and num_types == 0  # a traced graph asks nothing about its sizes
    per_type = 0 if no_types else x.shape[1] // num_types
    poses = x.to(dtype).unflatten(1, [num_types, per_type])
    return torch.einsum("btpk,tkjd->btpjd", poses, weight.to(dtype)).flatten(1, 2).to(dtype)


def _iterate(
    votes: Tensor, bias: Tensor, num_iters: int, approximate_squash: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Sums `[B, J, D]` of each iteration, and its logits, which broadcast to `[B, I, J]`."""
    # Made of sizes that an ONNX file may fix: never of the batch's.
    logits = [votes.new_zeros(1, 1, votes.shape[2])]
    sums = [_weighted_sum(votes, logits[0], bias)]
    for _ in range(num_iters - 1):
        v = squash(sums[-1], approximate_squash)
        agreement = (votes * v.unsqueeze(1)).sum(dim=3)
        logits.append(logits[-1] + agreement)
        sums.append(_weighted_sum(votes, logits[-1], bias))
    return sums, logits


def _weighted_sum(votes: Tensor, logits: Tensor, bias: Tensor) -> Tensor:
    couplings = logits.softmax(dim=2)
    return (couplings.unsqueeze(3) * votes).sum(dim=1) + bias.to(votes.dtype)
