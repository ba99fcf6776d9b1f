"""Dynamic routing as matrix products over tiles of capsules that stay in cache. Votes and logits are never stored.

Notation: B samples; capsules i = 1..I with poses x_i in R^K; T types of P = I/T consecutive capsules, which share a
matrix W_t in R^(K x J x D); R iterations. With votes u_ij = x_i W_tj, V^r = v^1 + ... + v^r and V^0 = 0, the logits
after r iterations are u_ij . V^r_j = x_i . (W_tj V^r_j): no votes are needed, and of earlier iterations nothing but V.

Forward, for r = 1..R, a type at a time:
    G_tj = W_tj V^(r-1)_j                in R^K: a matrix product over the batch for every class
    c_ij = softmax over j of x_i . G_tj
    s_j  = bias_j + sum over t of (sum over the i of t of c_ij x_i) W_tj;   v^r = squash(s);   V^r = V^(r-1) + v^r
The first iteration has c = 1/J and is one matrix product.

Backward from g = dL/dv^R, with Vbar = 0 at first, for r = R..1:
    dv  = g if r = R else Vbar;   ds = (d squash / ds at s^r)^T dv;   dbias += ds summed over the batch
    H_tj = W_tj ds_j;   dc_ij = x_i . H_tj;   dl_ij = c_ij (dc_ij - sum over j' of c_ij' dc_ij')
    Vbar_j += sum over t of (sum over the i of t of dl_ij x_i) W_tj
    dx_i  += sum over j of (c_ij H_tj + dl_ij G_tj)
    dW_tj += (sum over the i of t of c_ij x_i) ds_j^T + (the same with dl_ij) V^(r-1)_j^T
with dl = 0 for r = 1, whose terms are again one product each.

Why this form and not tiles of votes: the matrix products are wide in the batch and waste nothing, G is K/D the size of
the votes and P times smaller still where capsules share a matrix, and softmax and all sums run over leading dimensions,
which vectorises. At B 128, I = T = 1152, K 8, J 10, D 16, R 3 in float32 on two cores, a forward pass took 20 ms so.
Votes took 4.5 ms, then u V and c u in each iteration 12 and 4 ms as products with block-diagonal matrices, which
cost J times the arithmetic, or 7 and 1.3 ms as one small product for each sample and class, but then with a softmax
that has to run along the classes.

For few samples the products are narrow and votes win. `_forward_by_votes` and `_backward_by_votes` are the same steps
with u_ij = x_i W_tj computed for a tile, used and dropped, or kept where there is one tile: dc_ij = u_ij . ds_j,
Vbar_j += sum over i of dl_ij u_ij, du_ij = c_ij ds_j + dl_ij V^(r-1)_j, dx_i += sum over j of W_tj du_ij,
dW_tj += sum over i of x_i du_ij^T.

In the products, samples are the last dimension of everything: poses [T, K, P, B], V and s [J, D, B], couplings
[J, t, P, B].
"""

import math

import torch
from torch import Tensor

# Bytes of a thread's work buffer for the poses times G (and, backward, H); the projections themselves take 1/P of it
# again. At the sizes above, with 2 MB of L2 cache for each core, 1 to 6 MB differ by 4 %.
TILE_BYTES = 3 * 2**20

# Slices of the types, of their rows t * K and of positions, for each tile; and the memory that all tiles use.
Tiling = tuple[list[tuple[slice, slice, slice]], list[Tensor]]

# Samples in a tile: enough to make the matrix products wide, few enough that a tile holds several capsules.
TILE_SAMPLES = 256

# Up to here votes are faster. At one sample and T = I on one core of Zen 5 they took 1.1 + 2.0 ms and the products
# 5.5 + 14 ms, at four samples 2.3 + 6.2 and 8.1 + 20, at six 4.1 + 15 and 10 + 24, at eight 5.3 + 20 and 8.9 + 19.
FEW_SAMPLES = 6
FEW_POSITIONS = 16


def squash(s: Tensor, approximate: bool, dim: int = -1) -> Tensor:
    """v = |s| / (1 + |s|^2) s along `dim`; approximately s / 2 where |s| <= 2, else s / |s|."""
    return s * _squash_factor(_square(s, dim), approximate).to(s.dtype)


def squash_backward(grad: Tensor, s: Tensor, approximate: bool, dim: int = -1) -> Tensor:
    """The gradient at s: f (grad + q (grad . u) u) with n = |s|, u = s / n or 0 at n = 0, f = n / (1 + n^2),
    q = (1 - n^2) / (1 + n^2). Approximately f = 1/2 and q = 0 where n <= 2, else f = 1 / n and q = -1."""
    square = _square(s, dim)
    factor = _squash_factor(square, approximate).to(s.dtype)
    slope = torch.where(square <= 4, 0.0, -1.0) if approximate else (1 - square) / (1 + square)
    unit = s / square.sqrt().to(s.dtype).clamp_(min=torch.finfo(s.dtype).tiny)
    along = (grad * unit).sum(dim, keepdim=True)
    return unit.mul_(along * slope.to(s.dtype)).add_(grad).mul_(factor)


def _square(s: Tensor, dim: int) -> Tensor:
    """|s|^2 along `dim`, in float64: in float32 squares overflow above 2e19 and underflow below 1e-23."""
    # Apple's GPUs have no float64.
    wide = s.dtype if s.device.type == "mps" else torch.float64
    return s.to(wide, copy=True).square_().sum(dim, keepdim=True)


def _squash_factor(square: Tensor, approximate: bool) -> Tensor:
    return torch.where(square <= 4, 0.5, square.rsqrt()) if approximate else square.sqrt() / (1 + square)


def dynamic_routing(
    x: Tensor, weight: Tensor, bias: Tensor, num_iters: int, approximate: bool
) -> tuple[Tensor, Tensor]:
    """Class capsules v^R `[B, J, D]` and the sums before squash, s^1..s^R `[R, B, J, D]`.

    Args:
        x: `[B, I, K]`.
        weight: `[T, K, J, D]`, T divides I. All tensors are float32, or all are float64.
        bias: `[J, D]`.
        num_iters: R.
        approximate: The squash variant.
    """
    num_samples, num_classes, width = x.shape[0], weight.shape[2], weight.shape[3]
    if not has_votes(x, weight):
        sums = bias.repeat(num_iters, num_samples, 1, 1)
        return squash(sums[-1], approximate), sums
    sums = x.new_empty(num_iters, num_samples, num_classes, width)
    if _few(x, weight):
        return _forward_by_votes(x, weight, bias, sums, approximate), sums
    out = x.new_empty(num_samples, num_classes, width)
    for start in range(0, num_samples, TILE_SAMPLES):
        batch = slice(start, start + TILE_SAMPLES)
        out[batch] = _forward(x[batch], weight, bias, sums[:, batch], approximate)
    return out, sums


def dynamic_routing_backward(
    grad: Tensor, x: Tensor, weight: Tensor, sums: Tensor, approximate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weight and bias, from `grad` `[B, J, D]` and what `dynamic_routing` took and returned."""
    if has_votes(x, weight) and _few(x, weight):
        return _backward_by_votes(grad, x, weight, sums, approximate)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    dbias = weight.new_zeros(weight.shape[2:])
    if not has_votes(x, weight):
        return dx.zero_(), dweight, squash_backward(grad, sums[-1], approximate).sum(0)
    for start in range(0, x.shape[0], TILE_SAMPLES):
        batch = slice(start, start + TILE_SAMPLES)
        _backward(grad[batch], x[batch], weight, sums[:, batch], approximate, dx[batch], dweight, dbias)
    return dx, dweight, dbias


def has_votes(x: Tensor, weight: Tensor) -> bool:
    """Whether anything is routed. If one of B, I, K, T, J and D is 0, nothing is: each sum of votes is the bias."""
    return x.numel() > 0 and weight.numel() > 0


def _few(x: Tensor, weight: Tensor) -> bool:
    return x.shape[0] <= FEW_SAMPLES and x.shape[1] <= FEW_POSITIONS * weight.shape[0]


def _forward(x: Tensor, weight: Tensor, bias: Tensor, sums: Tensor, approximate: bool) -> Tensor:
    """Returns v^R, writes sums."""
    weight_rows = weight.flatten(0, 1)  # [T * K, J, D]
    matrices = weight_rows.transpose(0, 1)  # not copied: BLAS takes matrices with gaps between their rows
    poses = samples_last(x, weight.shape[0])
    J, B = weight.shape[2], x.shape[0]
    sums[0] = (over_positions(poses).t() @ weight_rows.flatten(1) / J).view_as(sums[0]) + bias
    total = bias.new_zeros(J, bias.shape[1], B)  # V^r
    tiling = tiles_of_poses(poses, J, num_factors=1)
    for iteration in range(1, len(sums)):
        total += squash(sums[iteration - 1], approximate).permute(1, 2, 0)
        s = bias.unsqueeze(2).repeat(1, 1, B)
        add_weighted_votes(s, total, poses, matrices, tiling)
        sums[iteration] = s.permute(2, 0, 1)
    return squash(sums[-1], approximate)


def add_weighted_votes(
    s: Tensor, total: Tensor, poses: Tensor, matrices: Tensor, tiling: Tiling, prior: Tensor | None = None
) -> None:
    """Add to `s` the sum over i of c_ij u_ij, c from V; `s` and V `[J, D, B]`.

    Args:
        s: Sums.
        total: V.
        poses: `[T, K, P, B]`.
        matrices: `[J, T * K, D]`.
        tiling: From `tiles_of_poses` with one factor.
        prior: Added to the couplings of each type, `[J, T]`.
    """
    J, B = s.shape[0], s.shape[2]
    tiles, buffers = tiling
    for types, rows, positions in tiles:
        poses_tile, matrices_tile = poses[types, :, positions], matrices[:, rows]
        projections, products = _tile_buffers(buffers, 1, J, poses_tile)
        torch.bmm(matrices_tile, total, out=projections.view(J, -1, B))
        torch.mul(projections, poses_tile, out=products)
        couplings = products.sum(3, keepdim=True).softmax(1)
        if prior is not None:
            couplings += prior[:, types, None, None, None]
        torch.mul(couplings, poses_tile, out=products)
        s.baddbmm_(matrices_tile.transpose(1, 2), over_positions(products).view(J, -1, B))


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    sums: Tensor,
    approximate: bool,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
) -> None:
    """Writes dx, adds to dweight and dbias."""
    weight_rows, dweight_rows = weight.flatten(0, 1), dweight.flatten(0, 1)
    matrices, dmatrices = weight_rows.transpose(0, 1), dweight_rows.transpose(0, 1)
    poses = samples_last(x, weight.shape[0])
    dposes = torch.zeros_like(poses)
    J = weight.shape[2]
    s = sums.permute(0, 2, 3, 1)  # [R, J, D, B]
    totals = squash(s[:-1], approximate, dim=2).cumsum(0)  # V^1..V^(R-1)
    dtotal = torch.zeros_like(s[0], memory_format=torch.contiguous_format)  # Vbar
    dv = grad.permute(1, 2, 0)
    tiling = tiles_of_poses(poses, J, num_factors=2)
    for iteration in range(len(sums) - 1, 0, -1):
        ds = squash_backward(dv, s[iteration], approximate, dim=1)
        dbias += ds.sum(2)
        add_gradients(dtotal, dposes, dmatrices, totals[iteration - 1], ds, poses, matrices, tiling)
        dv = dtotal

    ds = squash_backward(dv, s[0], approximate, dim=1)
    dbias += ds.sum(2)
    add_uniform_gradients(dposes, dweight_rows, ds.flatten(0, 1) / J, poses, weight_rows, tiling)
    dx.unflatten(1, (weight.shape[0], -1)).copy_(dposes.permute(3, 0, 2, 1))


def add_gradients(
    dtotal: Tensor,
    dposes: Tensor,
    dmatrices: Tensor,
    total: Tensor,
    ds: Tensor,
    poses: Tensor,
    matrices: Tensor,
    tiling: Tiling,
    prior: Tensor | None = None,
    dprior: Tensor | None = None,
) -> None:
    """Add what `add_weighted_votes` gives back to Vbar, dx, dW and the prior, in their shapes, from ds `[J, D, B]`.

    The tiling is that of two factors.
    """
    J, B = ds.shape[0], ds.shape[2]
    tiles, buffers = tiling
    for types, rows, positions in tiles:
        poses_tile, matrices_tile = poses[types, :, positions], matrices[:, rows]
        projections, products = _tile_buffers(buffers, 2, J, poses_tile)
        torch.bmm(matrices_tile, total, out=projections[0].view(J, -1, B))
        torch.bmm(matrices_tile, ds, out=projections[1].view(J, -1, B))
        torch.mul(projections, poses_tile, out=products)
        factors = products.sum(3, keepdim=True)  # the logits and dc, whose places dl and c take
        dlogits, couplings = factors[0], factors[1]
        dcouplings = couplings.clone()
        torch.softmax(dlogits, 0, out=couplings)
        torch.ops.aten._softmax_backward_data.out(dcouplings, couplings, 0, ds.dtype, grad_input=dlogits)
        if prior is not None:
            dprior[:, types] += dcouplings.sum((2, 3, 4))
            couplings += prior[:, types, None, None, None]

        torch.mul(factors, poses_tile, out=products)
        by_dlogits, by_couplings = over_positions(products).view(2, J, -1, B)
        dtotal.baddbmm_(matrices_tile.transpose(1, 2), by_dlogits)
        dmatrices_tile = torch.bmm(by_dlogits, total.transpose(1, 2))
        dmatrices[:, rows] += dmatrices_tile.baddbmm_(by_couplings, ds.transpose(1, 2))
        torch.mul(factors, projections, out=products)
        dposes[types, :, positions] += products.flatten(0, 1).sum(0)


def add_uniform_gradients(
    dposes: Tensor, dweight_rows: Tensor, dvotes: Tensor, poses: Tensor, weight_rows: Tensor, tiling: Tiling
) -> None:
    """Add to dx and to dW `[T * K, J, D]` what is due to one gradient `[J * D, B]` of all votes of a sample."""
    dweight_rows.flatten(1).addmm_(over_positions(poses), dvotes.t())
    for types, rows, positions in tiling[0]:  # since fresh memory of the size of x costs more than the product
        by_types = (weight_rows[rows].flatten(1) @ dvotes).view(-1, poses.shape[1], 1, poses.shape[3])
        dposes[types, :, positions] += by_types


def _forward_by_votes(x: Tensor, weight: Tensor, bias: Tensor, sums: Tensor, approximate: bool) -> Tensor:
    """As `_forward`, for few samples."""
    poses, matrices = types_first(x, weight.shape[0]), weight.flatten(2)
    tiles = tiles_of_votes(poses, matrices)
    kept = votes_of(poses, weight, x) if len(tiles) == 1 else None
    v = total = sums.new_zeros(sums.shape[1:])  # V^r
    for iteration, s in enumerate(sums):
        s.zero_()
        for types in tiles:
            votes = votes_of(poses[types], weight[types], x) if kept is None else kept
            if iteration > 0:
                votes = (votes * total).sum(3, keepdim=True).softmax(2) * votes
            s += votes.sum(0)
        if iteration == 0:
            s /= len(bias)
        s += bias
        v = squash(s, approximate)
        total = total + v
    return v


def _backward_by_votes(
    grad: Tensor, x: Tensor, weight: Tensor, sums: Tensor, approximate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_backward`, for few samples; returns the gradients."""
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = weight.new_zeros(weight.shape[2:])
    poses, matrices, dmatrices = types_first(x, weight.shape[0]), weight.flatten(2), dweight.flatten(2)
    dposes = torch.empty_like(poses)
    tiles = tiles_of_votes(poses, matrices)
    v = squash(sums, approximate)
    totals = v.cumsum(0) - v  # V^0..V^(R-1)
    # Votes of one tile are kept from iteration to iteration. Else the tiles are gone through again in each.
    kept = votes_of(poses, weight, x) if len(tiles) == 1 and len(sums) > 1 else None
    dvotes, is_first = None, True
    dtotal = torch.zeros_like(v[0])
    for iteration in range(len(sums) - 1, -1, -1):
        total = totals[iteration]
        ds = squash_backward(grad if iteration == len(sums) - 1 else dtotal, sums[iteration], approximate)
        dbias += ds.sum(0)
        for types in tiles:
            if iteration == 0:  # all couplings are the same
                added = (ds / len(ds[0])).expand(len(poses[types]) * poses.shape[1] // len(x), *ds.shape)
            else:
                votes = votes_of(poses[types], weight[types], x) if kept is None else kept
                couplings = (votes * total).sum(3, keepdim=True).softmax(2)
                dcouplings = (votes * ds).sum(3, keepdim=True)
                dlogits = couplings * (dcouplings - (couplings * dcouplings).sum(2, keepdim=True))
                dtotal += (dlogits * votes).sum(0)
                added = (couplings * ds).addcmul_(dlogits, total)
            if len(tiles) == 1:
                dvotes = added if dvotes is None else dvotes.add_(added)
            else:
                _add_products(types, added, poses, matrices, dposes, dmatrices, is_first)
        is_first = False
    if dvotes is not None:
        _add_products(tiles[0], dvotes, poses, matrices, dposes, dmatrices, True)
    return dposes.view(-1, len(x), x.shape[2]).transpose(0, 1).contiguous(), dweight, dbias


def _add_products(
    types: slice,
    dvotes: Tensor,
    poses: Tensor,
    matrices: Tensor,
    dposes: Tensor,
    dmatrices: Tensor,
    is_first: bool,
) -> None:
    """Add to dx and dW what is due to gradients of the votes of some types; write it if it is the first."""
    dvotes, columns = dvotes.reshape(len(poses[types]), poses.shape[1], -1), poses[types].transpose(1, 2)
    beta = 0 if is_first else 1  # with 0 what was there is not read
    dposes[types].baddbmm_(dvotes, matrices[types].transpose(1, 2), beta=beta)
    if is_first and columns.shape[2] == 1:  # several times as fast as BLAS
        torch.mul(columns, dvotes, out=dmatrices[types])
    else:
        dmatrices[types].baddbmm_(columns, dvotes, beta=beta)


def votes_of(poses: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """Votes `[t * P, B, J, D]` of poses `[t, P * B, K]` and matrices `[t, K, J, D]`."""
    return torch.bmm(poses, weight.flatten(2)).view(-1, len(x), *weight.shape[2:])


def _tile_bytes() -> int:
    """Threads divide a tile among them; more than 16 tiles' worth would be more than caches hold that they share."""
    return TILE_BYTES * min(torch.get_num_threads(), 16)


def types_first(x: Tensor, num_types: int) -> Tensor:
    """`[B, I, K]` as `[T, P * B, K]`."""
    return x.transpose(0, 1).reshape(num_types, -1, x.shape[2])


def tiles_of_votes(poses: Tensor, matrices: Tensor) -> list[slice]:
    types = max(1, _tile_bytes() // (poses.shape[1] * matrices.shape[2] * poses.element_size()))
    return [slice(t, t + types) for t in range(0, len(poses), types)]


def samples_last(x: Tensor, num_types: int) -> Tensor:
    """`[B, I, K]` as `[T, K, P, B]`."""
    return x.unflatten(1, (num_types, -1)).permute(1, 3, 2, 0).contiguous()


def over_positions(products: Tensor) -> Tensor:
    """`[..., t, K, P, B]` summed over the capsules of a type: `[..., t * K, B]`."""
    summed = products.squeeze(-2) if products.shape[-2] == 1 else products.sum(-2)
    return summed.flatten(-3, -2)


def tiles_of_poses(poses: Tensor, num_classes: int, num_factors: int) -> Tiling:
    """Slices of the types, of their rows t * K and of positions, and memory for `_tile_buffers`."""
    T, K, P, B = poses.shape
    capsules = max(1, _tile_bytes() // (num_factors * num_classes * K * B * poses.element_size()))
    positions = min(P, capsules)
    types = min(T, max(1, capsules // P))
    tiles = [
        (slice(t, t + types), slice(t * K, (t + types) * K), slice(p, p + positions))
        for t in range(0, T, types)
        for p in range(0, P, positions)
    ]
    size = num_factors * num_classes * types * K * B
    return tiles, [poses.new_empty(size), poses.new_empty(size * positions)]


def _tile_buffers(buffers: list[Tensor], num_factors: int, num_classes: int, poses_tile: Tensor) -> list[Tensor]:
    """Projections `[num_factors, J, t, K, 1, B]` and products `[num_factors, J, t, K, P, B]`, in the same memory for
    every tile: memory that is new to the process is several times slower than memory in cache."""
    types, K, positions, B = poses_tile.shape
    shapes = [(num_factors, num_classes, types, K, width, B) for width in (1, positions)]
    return [buffer[: math.prod(shape)].view(shape) for buffer, shape in zip(buffers, shapes, strict=True)]
