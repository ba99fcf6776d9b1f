"""Moments of the votes of matrix capsules over tiles that stay in cache. Votes and couplings are never stored.

Notation: B samples; I child types on maps of h x w; kernels of Kh x Kw, T places; J parent types on maps of H x W;
poses are P x P. Everywhere samples and positions are the last dimensions, "rows" in what follows: poses
`[I, P, P, B, h, w]`, activations `[I, B, h, w]`, what is about parents `[J, P, P, B, H, W]` or `[J, B, H, W]`.

Forward, with votes V = pose times matrix, for one child type and a tile of samples at a time. A child's couplings
compete over parents at all positions, but never with those of another child, so a tile of whole children is complete:
    u = V - mean;  logits = log_prior - sum over the pose of precision u^2;  r = softmax for each child;  w = r a
    mass = sum of w;  average = sum of w V / (mass + EPSILON);  scatter = sum of w (V - average)^2
Sums are taken of u, not of V, so that nothing cancels when a cluster is small and far from zero.

Backward, from the gradients by mass, average and scatter, which are turned into those by the sums R = sum of w,
s1 = sum of w u and s2 = sum of w u^2 first:
    dw = dR + sum over the pose of (ds1 + ds2 u) u;  da = sum over a child's couplings of r dw
    dlogits = w (dw - da)
    du = w ds1 + 2 u (w ds2 - dlogits precision);  dpose = matrix times du, dmatrix = pose times du over the rows
    dlog_prior = sum of dlogits;  dprecision = - sum of dlogits u^2;  dmean = 2 precision sum of dlogits u

Equal couplings, those of the first iteration, need no votes: the first moment is a product of the poses and the
matrices over the rows, the second one of the poses' products of two numbers and the matrices'. In float64, since here
it is V that is squared.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Added to the mass that moments are divided by, as in the reference.
EPSILON = 1e-8

# Bytes of the votes of a tile; a few buffers of this size are at work.
TILE_BYTES = 2**19


def moments(
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mean: Tensor | None,
    precision: Tensor | None,
    log_prior: Tensor | None,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mass `[J, B, H, W]`, average and scatter `[J, P, P, B, H, W]` of the votes for each parent.

    Args:
        poses: `[I, P, P, B, h, w]`; all tensors are float32, or all are float64.
        activations: `[I, B, h, w]`.
        weight: `[I, Kh, Kw, J, P, P]`.
        offset: Added to the votes from each place in the kernel, `[Kh, Kw, P, P]`.
        mean: Of each parent's Gaussian, `[J, P, P, B, H, W]`; None for equal couplings, as the next two then.
        precision: Half the inverse variances.
        log_prior: Logit of a vote at the mean, `[J, B, H, W]`.
        stride: Stride of the kernel.
    """
    poses, weight = _with_offset(poses, weight, offset)
    num_types, P, K, B = poses.shape[:4]
    J = weight.shape[3]
    H, W = _map_size(activations, weight, stride)
    mass = poses.new_zeros(J, B, H, W)
    average, scatter = poses.new_zeros(J, P, P, B, H, W), poses.new_zeros(J, P, P, B, H, W)
    matrices = _rows_of_columns(weight)
    for batch in _tiles(B, weight, H * W, poses):
        active = _Places(activations[:, batch], weight, stride)
        if precision is None:
            outputs = (mass[:, batch], average[..., batch, :, :], scatter[..., batch, :, :])
            _equal_moments(poses[:, :, :, batch], active, weight, *outputs)
            continue
        center, factor = _by_rows(mean, batch), _by_rows(precision, batch)
        prior = log_prior[:, batch].reshape(J, -1)
        first, second, total = torch.zeros_like(center), torch.zeros_like(center), torch.zeros_like(prior)
        for i in range(num_types):
            u = torch.bmm(matrices[i], active.seen(poses[i][:, :, batch])).view(len(matrices[i]), *center.shape)
            u -= center
            work = u.square().mul_(factor)
            w = active.couplings(prior - work.sum(dim=(2, 3))).mul_(active.values[i].unsqueeze(1))
            total += w.sum(0)
            torch.mul(u, w[:, :, None, None], out=work)
            first += work.sum(0)
            second += work.mul_(u).sum(0)
        shift = (first - EPSILON * center) / (total + EPSILON)[:, None, None]
        second.addcmul_(shift, first, value=-2).addcmul_(shift.square(), total[:, None, None])
        shape = (J, P, P, -1, H, W)
        mass[:, batch] = total.view(J, -1, H, W)
        average[..., batch, :, :] = (center + shift).view(shape).transpose(1, 2)
        scatter[..., batch, :, :] = second.clamp_(min=0).view(shape).transpose(1, 2)
    return mass, average, scatter


def moments_backward(
    dmass: Tensor,
    daverage: Tensor,
    dscatter: Tensor,
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mean: Tensor | None,
    precision: Tensor | None,
    log_prior: Tensor | None,
    mass: Tensor,
    average: Tensor,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by poses, activations, weight, mean, precision and log_prior, which are empty where these are None."""
    num_columns = poses.shape[2]
    poses, weight = _with_offset(poses, weight, offset)
    num_types, P, K, B = poses.shape[:4]
    J = weight.shape[3]
    H, W = _map_size(activations, weight, stride)
    dposes, dactivations = torch.zeros_like(poses), torch.zeros_like(activations)
    dmean = torch.empty_like(average) if mean is not None else average.new_empty(0)
    dprecision, dlog_prior = torch.empty_like(dmean), torch.empty_like(mass) if mean is not None else mass.new_empty(0)
    matrices = _rows_of_columns(weight)
    dmatrices = torch.zeros_like(matrices)
    dweight = torch.zeros_like(weight)
    # An average of no mass is no constant: EPSILON takes a part of it.
    inverse = 1 / (mass + EPSILON)
    by_average = (daverage - 2 * EPSILON * average * dscatter) * inverse[:, None, None]
    for batch in _tiles(B, weight, H * W, poses):
        active = _Places(activations[:, batch], weight, stride)
        shift, ds1, ds2 = (_by_rows(x, batch) for x in (average, by_average, dscatter))
        center = 0 if mean is None else _by_rows(mean, batch)
        if mean is None:
            shift, ds1, ds2 = shift.double(), ds1.double(), ds2.double()
        shift -= center
        dtotal = dmass[:, batch].reshape(J, -1) + (shift * (ds2 * shift - ds1)).sum(dim=(1, 2))
        ds1.addcmul_(ds2, shift, value=-2)
        if mean is None:
            tile = (poses[:, :, :, batch], active, weight, dposes[:, :, :, batch], dactivations[:, batch], dweight)
            _equal_moments_backward(dtotal, ds1, ds2, *tile)
            continue
        factor, prior = _by_rows(precision, batch), log_prior[:, batch].reshape(J, -1)
        twice_factor = 2 * factor
        by_u, by_square, by_prior = torch.zeros_like(center), torch.zeros_like(center), torch.zeros_like(prior)
        for i in range(num_types):
            seen = active.seen(poses[i][:, :, batch])
            u = torch.bmm(matrices[i], seen).view(len(matrices[i]), *center.shape)
            u -= center
            work = u.square().mul_(factor)
            r = active.couplings(prior - work.sum(dim=(2, 3)))
            w = r * active.values[i].unsqueeze(1)
            half = torch.mul(u, ds2, out=work)
            du = half + ds1
            dw = (du * u).sum(dim=(2, 3)).add_(dtotal)
            du += half
            dactive = active.add_up((r * dw).sum(1))
            dactivations[i, batch] = dactive
            dlogits = (dw - active.at_places(dactive).unsqueeze(1)).mul_(w)
            by_prior += dlogits.sum(0)
            torch.mul(u, dlogits[:, :, None, None], out=work)
            by_u += work.sum(0)
            by_square += u.mul_(work).sum(0)
            du.mul_(w[:, :, None, None]).sub_(work.mul_(twice_factor))
            du = du.view(len(u), -1, seen.shape[2])
            dmatrices[i].baddbmm_(du, seen.transpose(1, 2))
            active.add_poses(torch.bmm(matrices[i].transpose(1, 2), du), dposes[i][:, :, batch])
        shape = (J, P, P, -1, H, W)
        dlog_prior[:, batch] = by_prior.view(J, -1, H, W)
        dprecision[..., batch, :, :] = -by_square.view(shape).transpose(1, 2)
        dmean[..., batch, :, :] = by_u.mul_(twice_factor).view(shape).transpose(1, 2)
    if precision is not None:
        dweight = dmatrices.unflatten(2, (J, P)).transpose(3, 4).unflatten(1, weight.shape[1:3]).contiguous()
    return (
        dposes[:, :, :num_columns].contiguous(), dactivations, dweight[..., :num_columns, :].contiguous(),
        dmean, dprecision, dlog_prior,
    )  # fmt: skip


def _equal_moments(
    poses: Tensor, active: "_Places", weight: Tensor, mass: Tensor, average: Tensor, scatter: Tensor
) -> None:
    """Writes the moments for equal couplings, those of the first iteration."""
    J, P = weight.shape[3], weight.shape[5]
    shares = active.equal_shares(J)  # [I * T, rows]
    first, second = _features(poses, active, shares)
    by_first, by_second = _matrix_features(weight)
    total = shares.sum(0)
    s1 = (by_first.t() @ first).view(J, P, P, -1)  # [J, q, p, rows]
    s2 = (by_second.t() @ second).view(J, P, P, -1)
    mean = s1 / (total + EPSILON)
    s2 -= 2 * mean * s1 - total * mean.square()
    mass.copy_(total.view(mass.shape[1:]).expand_as(mass))
    average.copy_(mean.view(J, P, P, *mass.shape[1:]).transpose(1, 2))
    scatter.copy_(s2.clamp_(min=0).view(J, P, P, *mass.shape[1:]).transpose(1, 2))


def _equal_moments_backward(
    dtotal: Tensor,
    ds1: Tensor,
    ds2: Tensor,
    poses: Tensor,
    active: "_Places",
    weight: Tensor,
    dposes: Tensor,
    dactivations: Tensor,
    dweight: Tensor,
) -> None:
    """From the gradients by sums of w, of w V and of w V^2, by rows; adds to the last three."""
    num_types, Kh, Kw, J, K, P = weight.shape
    ds1, ds2 = ds1.flatten(0, 1).flatten(1), ds2.flatten(0, 1).flatten(1)  # [J * q, p * rows]
    by_first, by_second = _matrix_features(weight)
    share, factor = active.equal_shares(J), active.equal_factor(J)
    seen = torch.stack([active.seen(poses[i]) for i in range(num_types)]).double()  # [I, T, K, p * rows]
    seen = seen.view(num_types * Kh * Kw, K, P, -1)
    dfirst = (by_first @ ds1).view(-1, K, P, seen.shape[3])
    dsecond = (by_second @ ds2).view(len(seen), -1, P, seen.shape[3])
    products = _products_of_pairs(seen, seen)
    dshare = (dfirst * seen).sum(dim=(1, 2)) + (dsecond * products).sum(dim=(1, 2)) + dtotal.double().sum(0)
    dseen = _add_pairs(dfirst, dsecond, seen)
    dseen *= share[:, None, None]
    dseen = dseen.view(num_types, Kh * Kw, K, -1).to(poses.dtype)
    dvalues = (dshare.view(num_types, Kh * Kw, -1) * factor).to(poses.dtype)
    for i in range(num_types):
        active.add_poses(dseen[i], dposes[i])
        dactivations[i] = active.add_up(dvalues[i])
    weighted, products = seen * share[:, None, None], products.mul_(share[:, None, None])
    dby_first = weighted.flatten(2).flatten(0, 1) @ ds1.t()  # [N * K, J * q]
    dby_second = (products.flatten(2).flatten(0, 1) @ ds2.t()).view(len(seen), -1, J, P)
    columns = weight.flatten(0, 2).transpose(1, 2).double()  # [N, K, J, q]
    dcolumns = _add_pairs(dby_first.view_as(columns), dby_second.mul_(_pair_counts(K, weight)), columns)
    dweight += dcolumns.transpose(1, 2).reshape(weight.shape).to(weight.dtype)


def _features(poses: Tensor, active: "_Places", shares: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the poses, `[N * K, P * rows]`, and products of two of a row, `[N * pairs, P * rows]`, times shares."""
    seen = torch.stack([active.seen(pose) for pose in poses])  # [I, T, K, P * rows]
    K, P = poses.shape[2], poses.shape[1]
    seen = seen.view(len(shares), K, P, -1).double()
    weighted = seen * shares[:, None, None]
    return weighted.flatten(2).flatten(0, 1), _products_of_pairs(weighted, seen).flatten(2).flatten(0, 1)


def _matrix_features(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the matrices and products of two of a column: `[N * K, J * P]`, `[N * pairs, J * P]`, in float64."""
    columns = weight.flatten(0, 2).transpose(1, 2).double()  # [N, K, J, q]
    products = _products_of_pairs(columns, columns).mul_(_pair_counts(weight.shape[4], weight))
    return columns.flatten(2).flatten(0, 1), products.flatten(2).flatten(0, 1)


def _products_of_pairs(x: Tensor, y: Tensor) -> Tensor:
    """Products x_k y_l, k <= l, of two `[N, K, ...]` (one a multiple of the other) as `[N, K (K + 1) / 2, ...]`."""
    return torch.cat([x[:, k : k + 1] * y[:, k:] for k in range(x.shape[1])], dim=1)


def _add_pairs(dx: Tensor, dproducts: Tensor, x: Tensor) -> Tensor:
    """Adds to the gradient by x that through its products of pairs."""
    sizes = list(range(x.shape[1], 0, -1))
    for k, dpairs in enumerate(dproducts.split(sizes, dim=1)):
        dx[:, k] += (dpairs * x[:, k:]).sum(1)
        dx[:, k:] += dpairs * x[:, k : k + 1]
    return dx


def _pair_counts(size: int, like: Tensor) -> Tensor:
    """How often each pair occurs among the ordered ones, `[pairs, 1, 1]`."""
    counts = [1.0 if k == other else 2.0 for k in range(size) for other in range(k, size)]
    return torch.tensor(counts, dtype=torch.float64, device=like.device)[:, None, None]


class _Places:
    """Where children of a tile of samples meet their parents: rows of (sample, parent position) for each place in the
    kernel, of the activations and of what is about children."""

    def __init__(self, activations: Tensor, weight: Tensor, stride: int):
        self.grid, self.kernel, self.stride = activations.shape[2:], weight.shape[1:3], stride
        self.size = _map_size(activations, weight, stride)
        self.values = self.at_places(activations)  # [I, T, rows]

    def at_places(self, x: Tensor) -> Tensor:
        """`[..., B, h, w]`, about children, as `[..., T, rows]`."""
        x = x.unfold(-2, self.kernel[0], self.stride).unfold(-2, self.kernel[1], self.stride)
        return x.movedim((-2, -1), (-5, -4)).flatten(-3).flatten(-3, -2)

    def seen(self, poses: Tensor) -> Tensor:
        """Poses `[P, K, B, h, w]` as factors `[T, K, P * rows]`."""
        return self.at_places(poses.transpose(0, 1)).permute(2, 0, 1, 3).flatten(2)

    def add_up(self, x: Tensor) -> Tensor:
        """Sums over each child's parents: `[T, rows]` as `[B, h, w]`."""
        return self._fold(x, torch.add, 0.0)

    def add_poses(self, x: Tensor, dposes: Tensor) -> None:
        """Adds `[T, K, P * rows]` to `[P, K, B, h, w]`."""
        x = x.view(x.shape[0], -1, dposes.shape[0], *dposes.shape[2:3], *self.size)
        for t, part in enumerate(x.transpose(1, 2)):
            dposes[self._covered(t)] += part

    def couplings(self, logits: Tensor) -> Tensor:
        """Softmax for each child over all its parents, of `[T, J, rows]`."""
        if self.size == (1, 1):
            return logits.softmax(1)
        largest = self._fold(logits.amax(1), torch.maximum, float("-inf"))
        couplings = (logits - self.at_places(largest).unsqueeze(1)).exp_()
        total = self._fold(couplings.sum(1), torch.add, 0.0)
        return couplings.div_(self.at_places(total).unsqueeze(1))

    def equal_factor(self, num_types: int) -> Tensor:
        """The coupling of each child with each of its parents where all are equal, `[T, rows]`, in float64."""
        ones = self.values.new_ones(self.values.shape[1:], dtype=torch.float64)
        return 1 / (num_types * self.at_places(self.add_up(ones)))

    def equal_shares(self, num_types: int) -> Tensor:
        """Activations times equal couplings, `[I * T, rows]`, in float64."""
        return (self.values * self.equal_factor(num_types)).flatten(0, 1)

    def _fold(self, x: Tensor, combine: Callable[..., Tensor], start: float) -> Tensor:
        """Combine what is about the places of each child: `[T, rows]` to `[B, h, w]`."""
        x = x.view(len(x), -1, *self.size)
        folded = x.new_full((x.shape[1], *self.grid), start)
        for t, part in enumerate(x):
            covered = folded[self._covered(t)]
            combine(covered, part, out=covered)
        return folded

    def _covered(self, t: int) -> tuple:
        """Where in a map of children the kernel's place `t` falls."""
        (y, x), (H, W), s = divmod(t, self.kernel[1]), self.size, self.stride
        return ..., slice(y, y + s * (H - 1) + 1, s), slice(x, x + s * (W - 1) + 1, s)


def _with_offset(poses: Tensor, weight: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """The offset as further rows of the matrices, which the unit matrix picks as further columns of the poses."""
    if offset is None:
        return poses, weight
    num_types, P, _, B, h, w = poses.shape
    unit = torch.eye(P, dtype=poses.dtype, device=poses.device)[:, :, None, None, None].expand(num_types, P, P, B, h, w)
    rows = offset[:, :, None].expand(*weight.shape[:4], P, P)
    return torch.cat((poses, unit), dim=2), torch.cat((weight, rows), dim=4)


def _rows_of_columns(weight: Tensor) -> Tensor:
    """`[I, Kh, Kw, J, K, P]` as factors of the poses, `[I, T, J * P, K]`."""
    return weight.transpose(4, 5).flatten(3, 4).flatten(1, 2).contiguous()


def _by_rows(x: Tensor, batch: slice) -> Tensor:
    """A copy of `[J, P, P, B, H, W]` as `[J, q, p, rows]`: products with the matrices have columns first."""
    return x[:, :, :, batch].transpose(1, 2).flatten(3).clone(memory_format=torch.contiguous_format)


def _map_size(activations: Tensor, weight: Tensor, stride: int) -> tuple[int, int]:
    h, w = activations.shape[-2:]
    return (h - weight.shape[1]) // stride + 1, (w - weight.shape[2]) // stride + 1


def _tiles(num_samples: int, weight: Tensor, num_positions: int, like: Tensor) -> list[slice]:
    places = weight.shape[1] * weight.shape[2]
    votes = places * weight.shape[3] * weight.shape[5] ** 2 * num_positions * like.element_size()
    size = max(1, TILE_BYTES * min(torch.get_num_threads(), 16) // votes)
    return [slice(start, min(start + size, num_samples)) for start in range(0, num_samples, size)]
