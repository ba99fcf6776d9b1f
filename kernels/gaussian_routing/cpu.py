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

Equal couplings, those of the first iteration, take the same steps around the average, which is a matrix product over
the rows, the matrices and the child types: as votes are linear in poses, those weighted by the shares have it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Added to the mass that moments are divided by, as in the reference.
EPSILON = 1e-8

# Bytes of the votes of a tile; a few buffers of this size are at work.
TILE_BYTES = 2**21


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
        if mean is None:
            equal = active.equal_couplings(J)
            center = _equal_average(poses[:, :, :, batch], active, equal, matrices, J)
        else:
            center, factor = _by_rows(mean, batch), _by_rows(precision, batch)
            prior = log_prior[:, batch].reshape(J, -1)
        first, second, total = torch.zeros_like(center), torch.zeros_like(center), center.new_zeros(J, center.shape[3])
        u, work = center.new_empty(2, matrices.shape[1], *center.shape)
        for i in range(num_types):
            torch.bmm(matrices[i], active.seen(poses[i][:, :, batch]), out=u.view(len(u), matrices.shape[2], -1))
            u -= center
            if mean is None:
                w = equal * active.values[i].unsqueeze(1)
            else:
                w = active.couplings(_logits(u, prior, factor, work)).mul_(active.values[i].unsqueeze(1))
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


def couplings(
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mean: Tensor | None,
    precision: Tensor | None,
    log_prior: Tensor | None,
    stride: int,
) -> Tensor:
    """Couplings `[I, Kh * Kw, J, B, H, W]` by which `moments`, whose arguments these are, weighs votes."""
    poses, weight = _with_offset(poses, weight, offset)
    num_types, B, J = poses.shape[0], poses.shape[3], weight.shape[3]
    H, W = _map_size(activations, weight, stride)
    matrices = _rows_of_columns(weight)
    found = poses.new_zeros(num_types, matrices.shape[1], J, B, H, W)
    for batch in _tiles(B, weight, H * W, poses):
        active = _Places(activations[:, batch], weight, stride)
        if mean is None or precision is None or log_prior is None:
            found[:, :, :, batch] = active.equal_couplings(J).unflatten(2, (-1, H, W))
            continue
        center, factor, prior = _by_rows(mean, batch), _by_rows(precision, batch), log_prior[:, batch].reshape(J, -1)
        u, work = center.new_empty(2, matrices.shape[1], *center.shape)
        for i in range(num_types):
            torch.bmm(matrices[i], active.seen(poses[i][:, :, batch]), out=u.view(len(u), matrices.shape[2], -1))
            u -= center
            found[i, :, :, batch] = active.couplings(_logits(u, prior, factor, work)).unflatten(2, (-1, H, W))
    return found


def _logits(u: Tensor, prior: Tensor, factor: Tensor, work: Tensor) -> Tensor:
    """Logits of the couplings of votes less the mean; `work` is memory as large as these."""
    return prior - torch.mul(u, u, out=work).mul_(factor).sum(dim=(2, 3))


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
    # An average of no mass is no constant: EPSILON takes a part of it.
    inverse = 1 / (mass + EPSILON)
    by_average = (daverage - 2 * EPSILON * average * dscatter) * inverse[:, None, None]
    for batch in _tiles(B, weight, H * W, poses):
        active = _Places(activations[:, batch], weight, stride)
        shift, ds1, ds2 = (_by_rows(x, batch) for x in (average, by_average, dscatter))
        dtotal = dmass[:, batch].reshape(J, -1)
        if mean is None:
            center, equal = shift, active.equal_couplings(J)
        else:
            center, factor, prior = (
                _by_rows(mean, batch),
                _by_rows(precision, batch),
                log_prior[:, batch].reshape(J, -1),
            )
            shift -= center
            dtotal = dtotal + (shift * (ds2 * shift - ds1)).sum(dim=(1, 2))
            ds1.addcmul_(ds2, shift, value=-2)
            twice_factor = 2 * factor
            by_u, by_square, by_prior = torch.zeros_like(center), torch.zeros_like(center), torch.zeros_like(prior)
        u, du, work, half = center.new_empty(4, matrices.shape[1], *center.shape)  # fresh memory costs more than a pass
        factors = du.view(len(u), matrices.shape[2], -1)
        for i in range(num_types):
            seen = active.seen(poses[i][:, :, batch])
            torch.bmm(matrices[i], seen, out=u.view_as(factors))
            u -= center
            if mean is None:
                r = equal
            else:
                r = active.couplings(_logits(u, prior, factor, work))
            w = r * active.values[i].unsqueeze(1)
            torch.mul(u, ds2, out=half)
            torch.add(half, ds1, out=du)
            dw = torch.mul(du, u, out=work).sum(dim=(2, 3)).add_(dtotal)
            du += half
            du *= w[:, :, None, None]
            dactive = active.add_up((r * dw).sum(1))
            dactivations[i, batch] = dactive
            if mean is not None:
                dlogits = (dw - active.at_places(dactive).unsqueeze(1)).mul_(w)
                by_prior += dlogits.sum(0)
                torch.mul(u, dlogits[:, :, None, None], out=work)
                by_u += work.sum(0)
                by_square += u.mul_(work).sum(0)
                du -= work.mul_(twice_factor)
            dmatrices[i].baddbmm_(factors, seen.transpose(1, 2))
            active.add_poses(torch.bmm(matrices[i].transpose(1, 2), factors), dposes[i][:, :, batch])
        if mean is None:
            continue
        shape = (J, P, P, -1, H, W)
        dlog_prior[:, batch] = by_prior.view(J, -1, H, W)
        dprecision[..., batch, :, :] = -by_square.view(shape).transpose(1, 2)
        dmean[..., batch, :, :] = by_u.mul_(twice_factor).view(shape).transpose(1, 2)
    dweight = dmatrices.unflatten(2, (J, P)).transpose(3, 4).unflatten(1, weight.shape[1:3])
    return (
        dposes[:, :, :num_columns].contiguous(), dactivations, dweight[..., :num_columns, :].contiguous(),
        dmean, dprecision, dlog_prior,
    )  # fmt: skip


def _equal_average(poses: Tensor, active: "_Places", equal: Tensor, matrices: Tensor, num_types: int) -> Tensor:
    """Average of the votes with equal couplings, `[J, q, p, rows]`."""
    size = matrices.shape[2] // num_types
    average = 0
    shares = equal.squeeze(1) * active.values
    for pose, share, columns in zip(poses, shares, matrices, strict=True):
        seen = active.seen(pose).unflatten(2, (size, -1)) * share[:, None, None]
        average = average + torch.bmm(columns, seen.flatten(2)).sum(0)
    average = average.view(num_types, size, size, -1)
    return average / (shares.sum(dim=(0, 1)) + EPSILON)


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

    def equal_couplings(self, num_types: int) -> Tensor:
        """The coupling of each child with each of its parents where all are equal, `[T, 1, rows]`."""
        ones = torch.ones_like(self.values[0])
        return 1 / (num_types * self.at_places(self.add_up(ones))).unsqueeze(1)

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
