"""Inverted dot-product attention routing over tiles of votes that stay in cache; neither votes nor logits are stored.

Notation: N = B * H' * W' parent positions n of all samples; C = k * k * I children c of each, which are the I types at
the k * k places of its patch; poses of P x P numbers, in this file S rows of S; J parent types. A child's matrix is
that of its place and type, for all positions, so its votes are one product of the rows of its poses [N * S, S] with
[S, S * J].

Forward, a tile of children and positions at a time, with p the parents' poses of the pass before:
    V = X W                         [c, n, S * S, J]: a batch of matrix products
    l = (sum over S * S of V p) / S;  r = softmax over J of l
    s += sum over c of r V

Backward from ds, with V and r computed again:
    dr = sum over S * S of V ds;  dl = r (dr - sum over J of r dr) / S
    dp += sum over c of dl V;  dV = r ds + dl p
    dX = dV W^T;  dW += X^T dV

J is the last dimension of everything, so that the softmax and all sums are over rows that vectorise and the matrices
need not be reordered. The children of a few samples are gathered from the map at a time, and what goes back to them is
added into the map place by place of the kernel.
"""

import torch
from torch import Tensor

from ..patches import capsule_patches

# Bytes of the votes in a tile; as many again hold their products. At CIFAR-10's first layer a forward pass took 8.2 to
# 8.5 ms of one core's time an image with 512 KB and 9.2 with 1 MB, where each core has 2 MB of L2 cache. Votes that
# lie so that agreements and sums are products too, by matrices P times as large, took 9.4 ms at best.
TILE_BYTES = 2**19

# Parent positions in a tile: enough to make the products worth a call, few enough that a tile holds many children.
TILE_POSITIONS = 8

# Bytes of the children that are gathered at a time.
GROUP_BYTES = 2**22


def has_votes(x: Tensor, weight: Tensor, sums: Tensor) -> bool:
    """Whether anything is routed. If a size is 0, nothing is: each sum of votes is zero."""
    return x.numel() > 0 and weight.numel() > 0 and sums.numel() > 0


def forward(x: Tensor, weight: Tensor, parents: Tensor, stride: int) -> Tensor:
    """Sums of votes `[B, H', W', J, S, S]`.

    Args:
        x: `[B, H, W, I, S, S]`. All tensors are float32, or all are float64.
        weight: `[k, k, I, S, S, J]`.
        parents: `[B, H', W', J, S, S]`.
        stride: Stride of the kernel.
    """
    if not has_votes(x, weight, parents):
        return parents.new_zeros(parents.shape)
    side, matrices, poses = weight.shape[3], _matrices(weight), _types_last(parents)
    sums = torch.zeros_like(poses)
    tiles = _Tiles(x, weight, parents)
    for batch in tiles.groups:
        children = _children(x[batch], weight, stride)
        group, group_sums = poses[batch].flatten(0, 2), sums[batch].flatten(0, 2)
        for positions, types in tiles.of(children):
            votes, products = tiles.votes(children[types, positions], matrices[types])
            couplings = _sum_of_products(votes, group[positions], products).div_(side).softmax(3)
            torch.mul(votes, couplings, out=products)
            group_sums[positions] += products.sum(0)
    return _types_first(sums, side)


def backward(grad: Tensor, x: Tensor, weight: Tensor, parents: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weight and parents, from `grad` by the sums and what `forward` took."""
    dx, dweight = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (x, weight))
    if not has_votes(x, weight, parents):
        return dx, dweight, parents.new_zeros(parents.shape)
    side, matrices, dmatrices = weight.shape[3], _matrices(weight), _matrices(dweight)
    poses, dsums = _types_last(parents), _types_last(grad)
    dposes = torch.zeros_like(poses)
    tiles = _Tiles(x, weight, parents)
    for batch in tiles.groups:
        children = _children(x[batch], weight, stride)
        dchildren = torch.zeros_like(children)
        group, group_dsums, group_dposes = (t[batch].flatten(0, 2) for t in (poses, dsums, dposes))
        for positions, types in tiles.of(children):
            pose, dsum = group[positions], group_dsums[positions]
            rows, tile_matrices = children[types, positions], matrices[types]
            votes, products = tiles.votes(rows, tile_matrices)
            couplings = _sum_of_products(votes, pose, products).div_(side).softmax(3)
            dcouplings = _sum_of_products(votes, dsum, products)
            dlogits = torch._softmax_backward_data(dcouplings, couplings, 3, couplings.dtype).div_(side)
            torch.mul(votes, dlogits, out=products)
            group_dposes[positions] += products.sum(0)

            dvotes = torch.mul(couplings, dsum, out=votes).addcmul_(dlogits, pose)
            dvotes = dvotes.view(len(rows), -1, tile_matrices.shape[2])
            torch.bmm(dvotes, tile_matrices.transpose(1, 2), out=products.view(-1)[: rows.numel()].view(_rows(rows)))
            dchildren[types, positions] = products.view(-1)[: rows.numel()].view(rows.shape)
            dmatrices[types] += torch.bmm(rows.reshape(_rows(rows)).transpose(1, 2), dvotes)
        add_children(dx[batch], dchildren, weight.shape[0], stride)
    return dx, dweight, _types_first(dposes, side)


def _sum_of_products(votes: Tensor, poses: Tensor, products: Tensor) -> Tensor:
    """Inner products `[c, n, 1, J]` of votes `[c, n, S * S, J]` and poses `[n, S * S, J]`."""
    return torch.mul(votes, poses, out=products).sum(2, keepdim=True)


def _rows(children: Tensor) -> tuple[int, int, int]:
    """The shape in which the rows of all positions stand below each other."""
    return len(children), children.shape[1] * children.shape[2], children.shape[3]


def _matrices(weight: Tensor) -> Tensor:
    """`[k, k, I, S, S, J]` as `[C, S, S * J]`; a view of contiguous matrices."""
    return weight.flatten(4).flatten(0, 2)


def _types_last(poses: Tensor) -> Tensor:
    """`[B, H', W', J, S, S]` as `[B, H', W', S * S, J]`, a copy where types are many."""
    return poses.flatten(4).transpose(3, 4).contiguous()


def _types_first(sums: Tensor, side: int) -> Tensor:
    """`[B, H', W', S * S, J]` as `[B, H', W', J, S, S]`, contiguous."""
    return sums.transpose(3, 4).contiguous().unflatten(4, (side, side))


def _map(x: Tensor) -> Tensor:
    """`[B, H, W, I, S, S]` as `[B, I, S, S, H, W]`."""
    return x.permute(0, 3, 4, 5, 1, 2)


def _children(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Children `[C, N, S, S]` of the parents of some samples, a copy."""
    patches = capsule_patches(_map(x), weight.shape[0], stride)  # [B, I, S, S, H', W', k, k]
    return patches.permute(6, 7, 1, 0, 4, 5, 2, 3).flatten(3, 5).flatten(0, 2)


def add_children(dx: Tensor, dchildren: Tensor, kernel_size: int, stride: int) -> None:
    """Adds what goes back to the children to the map that they were gathered from."""
    patches = capsule_patches(_map(dx), kernel_size, stride)
    sizes = (kernel_size, kernel_size, dx.shape[3], len(dx), *patches.shape[4:6], *dx.shape[4:])
    dchildren = dchildren.view(sizes)
    for row in range(kernel_size):
        for column in range(kernel_size):
            # Patches overlap; what one place of the kernel covers does not.
            patches[..., row, column] += dchildren[row, column].permute(1, 0, 4, 5, 2, 3)


class _Tiles:
    """Which samples, positions and children are worked on together, and memory for their votes and the products of
    these: new to the process, it would be several times slower than memory in cache."""

    def __init__(self, x: Tensor, weight: Tensor, parents: Tensor):
        num_children, side, num_parents = weight.shape[:3].numel(), weight.shape[3], weight.shape[5]
        places = parents.shape[1] * parents.shape[2]
        of_sample = num_children * places * side * side * x.element_size()
        samples = min(len(x), max(1, GROUP_BYTES // of_sample, -(-TILE_POSITIONS // places)))
        self.groups = [slice(b, b + samples) for b in range(0, len(x), samples)]
        # Threads divide a tile among them.
        vectors = TILE_BYTES * min(torch.get_num_threads(), 16) // (side * side * num_parents * x.element_size())
        self.positions = min(samples * places, TILE_POSITIONS)
        self.children = min(num_children, max(1, vectors // self.positions))
        self.positions = min(samples * places, max(self.positions, vectors // self.children))
        self.buffers = x.new_empty(2, self.children * self.positions * side * side * num_parents)

    def of(self, children: Tensor) -> list[tuple[slice, slice]]:
        """Slices of the positions and of the children."""
        return [
            (slice(n, n + self.positions), slice(c, c + self.children))
            for n in range(0, children.shape[1], self.positions)
            for c in range(0, children.shape[0], self.children)
        ]

    def votes(self, children: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
        """Votes `[c, n, S * S, J]` and memory for as many products; the next call takes the same."""
        count, positions, side, _ = children.shape
        shape = (count, positions, side * side, matrices.shape[2] // side)
        votes, products = (buffer[: torch.Size(shape).numel()].view(shape) for buffer in self.buffers)
        torch.bmm(children.reshape(_rows(children)), matrices, out=votes.view(count, positions * side, -1))
        return votes, products
