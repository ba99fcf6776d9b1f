"""Inverted dot-product attention routing in plain PyTorch, written for reading.

Tsai, Srivastava, Goh and Salakhutdinov, "Capsules with Inverted Dot-Product Attention Routing" (ICLR 2020,
arXiv 2002.04764), section 3 and procedure 1. Notation: B samples; a map of I capsule types at H x W positions, poses of
P x P numbers; kernels of k x k positions; J types of parents at H' x W' positions. The children of a parent are the
I k^2 capsules of its patch. Class capsules are the case of a map of one position.

Everything is differentiated by autograd and made of standard operators without a branch on data. Half precision is
computed in float32, float64 in float64. It stores the votes, as the public code does: 4 H' W' k^2 I J P^2 bytes a
sample in float32.
"""

import torch
from torch import Tensor


def capsule_votes(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Votes V_ij = P_i W_ij of the children of each parent.

    Args:
        x: Poses of the children, `[B, I, P, P, H, W]`.
        weight: `[k, k, I, P, P, J]`, a matrix for each place in the kernel, child type and parent type.
        stride: Stride of the kernel.

    Returns:
        `[k * k * I, B, H', W', P, P, J]`.
    """
    k, num_types, side, num_parents = weight.shape[0], weight.shape[2], weight.shape[3], weight.shape[5]
    height, width = (x.shape[4] - k) // stride + 1, (x.shape[5] - k) // stride + 1
    places = []  # slices, where ONNX has no views of patches
    for row in range(k):
        of_row = x[:, :, :, :, row : row + (height - 1) * stride + 1 : stride]
        for column in range(k):
            places.append(of_row[:, :, :, :, :, column : column + (width - 1) * stride + 1 : stride])
    children = torch.stack(places).permute(0, 2, 1, 5, 6, 3, 4)  # [k * k, I, B, H', W', P, P]
    batch = x.shape[0]
    rows = children.reshape(k * k * num_types, batch * height * width * side, side)
    # Under autocast the product comes in half precision.
    votes = (rows @ weight.reshape(k * k * num_types, side, side * num_parents)).to(x.dtype)
    return votes.reshape(k * k * num_types, batch, height, width, side, side, num_parents)


def inverted_attention_routing(x: Tensor, weight: Tensor, parents: Tensor | None = None, stride: int = 1) -> Tensor:
    """Sum of the votes for each parent, weighed by their agreement with its pose of the pass before.

    a_ij = <V_ij, P_j> / P, r_ij = softmax over the parents j of a child's a_ij, s_j = sum over i of r_ij V_ij. The
    agreement is divided by the square root of the P^2 numbers in a pose.

    Args:
        x: Poses of the children, `[B, I, P, P, H, W]`.
        weight: `[k, k, I, P, P, J]`.
        parents: Poses of the parents, `[B, J, P, P, H', W']`; None for couplings of 1 / J, as in the first pass.
        stride: Stride of the kernel.

    Returns:
        The sums s before layer normalisation, `[B, J, P, P, H', W']`, in the dtype of `x`.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    votes = capsule_votes(x.to(dtype), weight.to(dtype), stride)
    if parents is None:
        sums = votes.sum(0) / weight.shape[5]
    else:
        poses = parents.to(dtype).permute(0, 4, 5, 2, 3, 1)
        agreement = (votes * poses).sum(dim=(4, 5), keepdim=True) / weight.shape[3]
        sums = (agreement.softmax(dim=6) * votes).sum(0)
    return sums.permute(0, 5, 3, 4, 1, 2).to(x.dtype)
