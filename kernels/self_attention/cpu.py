"""Self-attention routing as matrix products over tiles of capsules that stay in cache. Votes are never all stored.

With votes u_ij = x_i W_ij and V_j = sum over i of u_ij / sqrt(D), the logit of a vote is u_ij . V_j. V is one product
of matrices, and what follows is the second of two iterations of dynamic routing with V for the first's class
capsules: its tiles, and why they are as they are, stand in `capszoo.kernels.cpu`.

Forward:
    V_j  = (x W)_j / sqrt(D), a product over i and k;   c_ij = softmax over j of u_ij . V_j
    s_j  = sum over i of (c_ij + prior_ij) u_ij
Backward from g = dL/ds:
    dc_ij = u_ij . g_j;   dprior_ij = dc_ij summed over the batch;   dl_ij = c_ij (dc_ij - sum over j' of c_ij' dc_ij')
    h_j   = sum over i of dl_ij u_ij / sqrt(D)
    du_ij = (c_ij + prior_ij) g_j + dl_ij V_j + h_j, and from it dx and dW
"""

import math

import torch
from torch import Tensor

from .. import cpu

# Up to here votes are faster, for any number of capsules. At K 8, J 10, D 16 and I 1152 on one core, forward and
# backward took 12 ms at one sample and the products 34, at 12 samples 43 and 45, at 32 samples 44 and 33.
FEW_SAMPLES = 12


def forward(x: Tensor, weight: Tensor, prior: Tensor, attention: bool) -> tuple[Tensor, Tensor]:
    """Sums of weighed votes s, and V, both `[B, J, D]`.

    Args:
        x: `[B, I, K]`.
        weight: `[I, K, J, D]`. All tensors are float32, or all are float64.
        prior: `[I, J]`.
        attention: Otherwise couplings are 1 / J, and V has no samples.
    """
    J, D = weight.shape[2:]
    if not attention:
        return sum_votes(x, weight * _even(prior)[:, None, :, None]), x.new_empty(0, J, D)
    total = sum_votes(x, weight)
    total /= math.sqrt(max(1, D))
    s = torch.zeros_like(total)
    if cpu.has_votes(x, weight):
        for start in range(0, len(x), cpu.TILE_SAMPLES):
            batch = slice(start, start + cpu.TILE_SAMPLES)
            route = _forward_by_votes if len(x[batch]) <= FEW_SAMPLES else _forward
            route(x[batch], weight, prior, total[batch], s[batch])
    return s, total


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, prior: Tensor, total: Tensor, attention: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weight and prior, from `grad` `[B, J, D]` and what `forward` took and returned."""
    if not attention:
        return sum_votes_backward(grad, x, weight, _even(prior))
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    dprior = torch.zeros_like(prior, memory_format=torch.contiguous_format)
    if cpu.has_votes(x, weight):
        for start in range(0, len(x), cpu.TILE_SAMPLES):
            batch = slice(start, start + cpu.TILE_SAMPLES)
            back = _backward_by_votes if len(x[batch]) <= FEW_SAMPLES else _backward
            back(grad[batch], x[batch], weight, prior, total[batch], dx[batch], dweight, dprior)
    return dx, dweight, dprior


def sum_votes(x: Tensor, weight: Tensor) -> Tensor:
    """The sums over i of x_i W_ij, `[B, J, D]`: one product of matrices."""
    return (x.flatten(1) @ weight.flatten(2).flatten(0, 1)).unflatten(1, weight.shape[2:])


def sum_votes_backward(grad: Tensor, x: Tensor, weight: Tensor, couplings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, W and c `[I, J]` of the sums over i of c_ij x_i W_ij, from `grad` `[B, J, D]`."""
    c = couplings[:, None, :, None]
    dx = (grad.flatten(1) @ (c * weight).flatten(2).flatten(0, 1).t()).view_as(x)
    dproducts = (x.flatten(1).t() @ grad.flatten(1)).view_as(weight)
    dcouplings = (dproducts * weight).sum((1, 3))
    return dx, dproducts.mul_(c), dcouplings


def _even(prior: Tensor) -> Tensor:
    return prior + 1 / max(1, prior.shape[1])


def _forward(x: Tensor, weight: Tensor, prior: Tensor, total: Tensor, s: Tensor) -> None:
    matrices = weight.flatten(0, 1).transpose(0, 1)
    poses = cpu.samples_last(x, weight.shape[0])
    sums = s.new_zeros(*weight.shape[2:], len(x))
    tiling = cpu.tiles_of_poses(poses, weight.shape[2], num_factors=1)
    cpu.add_weighted_votes(sums, total.permute(1, 2, 0), poses, matrices, tiling, prior.t())
    s.copy_(sums.permute(2, 0, 1))


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    prior: Tensor,
    total: Tensor,
    dx: Tensor,
    dweight: Tensor,
    dprior: Tensor,
) -> None:
    weight_rows, dweight_rows = weight.flatten(0, 1), dweight.flatten(0, 1)
    poses = cpu.samples_last(x, weight.shape[0])
    dposes, dtotal = torch.zeros_like(poses), poses.new_zeros(*weight.shape[2:], len(x))
    tiling = cpu.tiles_of_poses(poses, weight.shape[2], num_factors=2)
    cpu.add_gradients(
        dtotal,
        dposes,
        dweight_rows.transpose(0, 1),
        total.permute(1, 2, 0),
        grad.permute(1, 2, 0),
        poses,
        weight_rows.transpose(0, 1),
        tiling,
        prior.t(),
        dprior.t(),
    )
    dvotes = dtotal.flatten(0, 1) / math.sqrt(weight.shape[3])  # h
    cpu.add_uniform_gradients(dposes, dweight_rows, dvotes, poses, weight_rows, tiling)
    dx.unsqueeze(2).copy_(dposes.permute(3, 0, 2, 1))


def _forward_by_votes(x: Tensor, weight: Tensor, prior: Tensor, total: Tensor, s: Tensor) -> None:
    """As `_forward`, for few samples."""
    poses = x.transpose(0, 1)
    for capsules in cpu.tiles_of_votes(poses, weight.flatten(2)):
        votes = cpu.votes_of(poses[capsules], weight[capsules], x)
        couplings = (votes * total).sum(3, keepdim=True).softmax(2).add_(prior[capsules, None, :, None])
        s += votes.mul_(couplings).sum(0)


def _backward_by_votes(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    prior: Tensor,
    total: Tensor,
    dx: Tensor,
    dweight: Tensor,
    dprior: Tensor,
) -> None:
    """As `_backward`, for few samples."""
    poses, matrices = x.transpose(0, 1), weight.flatten(2)
    tiles = cpu.tiles_of_votes(poses, matrices)
    dvotes = torch.zeros_like(total)  # h
    factors = []
    for capsules in tiles:
        votes = cpu.votes_of(poses[capsules], weight[capsules], x)
        couplings = (votes * total).sum(3, keepdim=True).softmax(2)
        dcouplings = (votes * grad).sum(3, keepdim=True)
        dprior[capsules] += dcouplings.sum((1, 3))
        dlogits = couplings * (dcouplings - (couplings * dcouplings).sum(2, keepdim=True))
        dvotes += votes.mul_(dlogits).sum(0)
        factors.append((couplings.add_(prior[capsules, None, :, None]), dlogits))
    dvotes /= math.sqrt(weight.shape[3])
    dmatrices = dweight.flatten(2)
    for capsules, (couplings, dlogits) in zip(tiles, factors, strict=True):
        gradient = torch.addcmul(dvotes, couplings, grad).addcmul_(dlogits, total).flatten(2)
        dx[:, capsules] = torch.bmm(gradient, matrices[capsules].transpose(1, 2)).transpose(0, 1)
        dmatrices[capsules].baddbmm_(poses[capsules].transpose(1, 2), gradient)
