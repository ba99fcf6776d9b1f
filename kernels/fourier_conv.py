"""Two-dimensional convolution with large kernels on a CPU, by small Fourier transforms that are matrix products.

Notation: B images of C channels, D output channels, kernels of k x k at stride s, no padding. Stride s splits image and
kernel into s^2 phases: y(i) = sum over phases a of the correlation of x_a(i) = x(s i + a) with w_a(p) = w(s p + a), at
stride 1, with kernels of q = ceil(k / s). So S = s^2 C channels remain. Outputs are made in tiles of m x m from maps of
N x N, N = m + q - 1, on which a circular correlation is exact: X conj(W) at each frequency (the overlap-save method).

Of the N^2 frequencies of a real map some are real and of the others half suffice, since the rest are conjugates. A
complex product is three real ones (Gauss): with V = conj(W), X V from Vr (Xr + Xi), Xr (Vi - Vr), Xi (Vr + Vi). Thus P
real products for each pair of channels, 148 for N = 10. What the products need, and what makes outputs of them, are
linear maps, so that all is five matrix products, and their transposes are the gradients:

    x_products [P, B, S] = T [P, N^2] maps            w_products [P, D, S] = K [P, q^2] kernels
    products   [P, B, D] = x_products w_products^T    y [m^2, B, D] = F [m^2, P] products

T is a transform of the columns of a map and one of its rows, a fourth of the multiplications, made for some images at a
time in cache. x_products and w_products are kept for the backward pass.

For the 9 x 9 kernels of stride 2 in CapsNet, 20 x 20 to 6 x 6, these are 44 million multiplications an image instead of
191 million, and as exact in float32. The transform of the kernels takes as many as 22 images, and as long again to go
through memory. So for up to some 50 images (80 on Zen 5) the complex products are four real ones, of N^2 numbers:
the numbers of an image and a kernel come in pairs (Xr, Xi) and (Vr, Vi), and each of one pair is multiplied by each of
the other, 200 products of 100 numbers for N = 10. A step at 16 images takes 0.78 of the time so, at 128 images 1.12.
Smaller batches are left to unfolded_conv.py: `cost` weighs that up, by counts alone, so that the same shapes give the
same bits.
"""

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .fourier_plan import Plan, is_faster, matrices
from .products import TAKES_ONEDNN, multiply, product
from .scratch import release_scratch, scratch, scratch_bytes

__all__ = ["Plan", "backward", "forward", "is_faster", "kept_shape", "release_scratch", "scratch_bytes"]

# Images for which products are in memory at a time.
CHUNK = 128

# Rows of the kernels' transform that are computed at a time.
ROWS = 40

# Bytes that a thread transforms at a time, read and written. With 6 MB a step of 16 images takes 4 % longer; on Zen 5,
# with 20 MB 14 % longer at 32 images and 10 % at 128.
BLOCK_BYTES = 5_000_000 if TAKES_ONEDNN else 20_000_000


@dataclass
class _TransformedWeights:
    """What a thread's scratch memory for the kernels' transform holds."""

    weight: weakref.ref[Tensor]
    version: int
    plan: Plan
    centered: Tensor | None
    """A copy."""
    copy: Tensor | None
    """The kernels, where a forward pass without gradients made the transform."""

    def belong_to(self, weight: Tensor) -> bool:
        return self.weight() is weight and self.version == _version(weight)

    def is_for(self, plan: Plan, centered: Tensor | None) -> bool:
        if self.centered is None or centered is None:
            same = self.centered is centered
        else:
            same = torch.equal(self.centered, centered)
        return same and self.plan == plan


def _version(weight: Tensor) -> int:
    """How often a tensor was written; those of inference mode do not count it."""
    return -1 if weight.is_inference() else weight._version


def _blocks(count: int, bytes_of_one: int) -> list[slice]:
    """Slices of `count` things whose numbers, in and out, stay in the caches of all threads."""
    size = max(1, BLOCK_BYTES * torch.get_num_threads() // bytes_of_one)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _copy_maps(plan: Plan, x: Tensor, maps: Tensor) -> None:
    """Fill maps `[N, N, B, down, across, s, s, C]` from images `[B, H, W, C]`."""
    s, N, m = plan.stride, plan.size, plan.tile
    height, width = (n * s for n in plan.phase)
    x = x[:, :height, :width]
    if x.shape[1] < height or x.shape[2] < width:
        x = functional.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
    x = x.reshape(len(x), plan.phase[0], s, plan.phase[1], s, x.shape[3])
    tiles = x.unfold(1, N, m).unfold(3, N, m)  # [B, down, s, across, s, C, N, N]
    maps.copy_(tiles.permute(6, 7, 0, 1, 3, 2, 4, 5))


def _add_maps(plan: Plan, maps: Tensor, x: Tensor) -> None:
    """The transpose of `_copy_maps`: fill x, tiles that overlap added up."""
    s, N, m = plan.stride, plan.size, plan.tile
    B, H, W, C = x.shape
    if plan.tiles == (1, 1) and plan.phase[0] * s == H and plan.phase[1] * s == W:
        x.view(B, N, s, N, s, C).copy_(maps[:, :, :, 0, 0].permute(2, 0, 3, 1, 4, 5))
        return
    whole = maps.new_zeros(B, plan.phase[0], s, plan.phase[1], s, C)
    for i in range(plan.tiles[0]):
        for j in range(plan.tiles[1]):
            whole[:, i * m : i * m + N, :, j * m : j * m + N] += maps[:, :, :, i, j].permute(2, 0, 3, 1, 4, 5)
    whole = whole.view(B, plan.phase[0] * s, plan.phase[1] * s, C)[:, :H, :W]
    x[:, whole.shape[1] :].zero_()
    x[:, :, whole.shape[2] :].zero_()
    x[:, : whole.shape[1], : whole.shape[2]] = whole


def _map_blocks(plan: Plan, B: int, C: int) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Images, their tiles, and memory for their maps and for those whose columns are transformed."""
    s, N, tiles = plan.stride, plan.size, math.prod(plan.tiles)
    for images in _blocks(B, 8 * N * N * tiles * s * s * C):
        count = images.stop - images.start
        shape = N, N, count, *plan.tiles, s, s, C
        yield (
            images,
            slice(images.start * tiles, images.stop * tiles),
            scratch.take("maps", *shape),
            scratch.take("columns", N, N * count * tiles * s * s * C),
        )


def _transform_images(plan: Plan, x: Tensor, products: Tensor) -> None:
    """Fill products `[P, B * tiles, S]` from images `[B, H, W, C]`."""
    found = matrices(plan)
    for images, tiles, maps, columns in _map_blocks(plan, len(x), x.shape[3]):
        _copy_maps(plan, x[images], maps)
        product(found.columns, maps.view(plan.size, -1), out=columns)
        for matrix, taken, given in found.rows():
            product(matrix, columns[taken].view(matrix.shape[1], -1), out=products[given, tiles].flatten(1))


def _gradient_of_images(plan: Plan, dproducts: Tensor, dx: Tensor) -> None:
    """The transpose of `_transform_images`: fill dx `[B, H, W, C]`."""
    found = matrices(plan)
    for images, tiles, maps, columns in _map_blocks(plan, len(dx), dx.shape[3]):
        for matrix, taken, given in found.rows():
            product(matrix.t(), dproducts[given, tiles].flatten(1), out=columns[taken].view(matrix.shape[1], -1))
        product(found.columns.t(), columns, out=maps.view(plan.size, -1))
        _add_maps(plan, maps, dx[images])


def _phases(plan: Plan) -> Iterator[tuple[tuple[slice, slice], tuple[int, int, int, int]]]:
    """The taps of each phase in a kernel of k x k; the phase, and how many taps it has down and across."""
    for a in range(plan.stride):
        for b in range(plan.stride):
            down, across = (len(range(start, plan.kernel, plan.stride)) for start in (a, b))
            yield (slice(a, None, plan.stride), slice(b, None, plan.stride)), (a, b, down, across)


def _kernel_blocks(plan: Plan, D: int, C: int) -> Iterator[tuple[slice, Tensor]]:
    """Filters, and memory for their kernels, `[q, q, d, s, s, C]`."""
    s, q = plan.stride, plan.taps
    for filters in _blocks(D, 4 * (q * q + plan.numbers) * s * s * C):
        yield filters, scratch.take("kernels", q, q, filters.stop - filters.start, s, s, C)


def _pieces(rows: int) -> list[slice]:
    """Rows of a matrix, some at a time: MKL takes 1.5 to 1.8 times as long for 148 rows at once."""
    count = -(-rows // ROWS)
    return [slice(rows * piece // count, rows * (piece + 1) // count) for piece in range(count)]


def _transform_kernels(plan: Plan, weight: Tensor, products: Tensor, centered: Tensor | None) -> None:
    """Fill products `[P, D, S]` from kernels `[D, C, k, k]`, each less its mean times `centered`."""
    q = plan.taps
    means = None if centered is None else weight.mean((1, 2, 3)).mul_(centered)[:, None]
    for filters, kernels in _kernel_blocks(plan, *weight.shape[:2]):
        for taps, (a, b, down, across) in _phases(plan):
            phase, part = kernels[:, :, :, a, b], weight[filters][:, :, taps[0], taps[1]].permute(2, 3, 0, 1)
            if means is None:
                phase[:down, :across] = part
            else:
                torch.sub(part, means[filters], out=phase[:down, :across])
            phase[down:].zero_()
            phase[:, across:].zero_()
        for rows in _pieces(plan.numbers):
            into = products[rows, filters].flatten(1)
            product(matrices(plan).kernels[rows], kernels.view(q * q, -1), out=into)


def _gradient_of_kernels(plan: Plan, dproducts: Tensor, dweight: Tensor, centered: Tensor | None) -> None:
    """The transpose of `_transform_kernels`: fill dweight `[D, C, k, k]`."""
    q, fan_in = plan.taps, dweight[0].numel()
    for filters, kernels in _kernel_blocks(plan, *dweight.shape[:2]):
        product(matrices(plan).kernels.t(), dproducts[:, filters].flatten(1), out=kernels.view(q * q, -1))
        parts = [(taps, kernels[:down, :across, :, a, b]) for taps, (a, b, down, across) in _phases(plan)]
        if centered is not None:
            means = torch.stack([part.sum((0, 1, 3)) for _, part in parts]).sum(0).mul_(centered / fan_in)[:, None]
        for taps, part in parts:
            into = dweight[filters][:, :, taps[0], taps[1]].permute(2, 3, 0, 1)
            if centered is None:
                into.copy_(part)
            else:
                torch.sub(part, means, out=into)


def _w_products(
    plan: Plan, weight: Tensor, centered: Tensor | None, made_by_forward: bool = False, has_gradients: bool = True
) -> Tensor:
    """`[P, D, S]` of kernels `[D, C, k, k]`, as the last call left them where that is sure to be the same.

    A backward pass takes what its forward pass made. A forward pass without gradients takes what the one before made,
    if no number of the kernels has changed: they can be written by ways that leave their version as it was, or be
    computed anew from the same weights.
    """
    D, C = weight.shape[:2]
    products = scratch.take("w_products", plan.numbers, D, plan.stride**2 * C)
    last = scratch.weights
    if last is not None and last.is_for(plan, centered):
        if made_by_forward and last.belong_to(weight):
            return products
        is_known = not made_by_forward and not has_gradients and last.copy is not None
        if is_known and torch.equal(last.copy, weight):
            return products
    scratch.weights = None  # should this be interrupted
    _transform_kernels(plan, weight, products, centered)
    copy = None if has_gradients else weight.clone()
    known = None if centered is None else centered.clone()
    scratch.weights = _TransformedWeights(weakref.ref(weight), _version(weight), plan, known, copy)
    return products


def kept_shape(plan: Plan, x: Tensor, weight: Tensor) -> tuple[int, ...]:
    """Of what a forward pass keeps for its backward pass: x_products."""
    return plan.numbers, len(x) * math.prod(plan.tiles), plan.stride**2 * x.shape[1]


def _of_chunk(plan: Plan, kept: Tensor, images: slice) -> Tensor:
    """`[P, b * tiles, S]` of some images: a piece of memory of its own."""
    S, first, last = kept.shape[2], *(n * math.prod(plan.tiles) for n in (images.start, images.stop))
    return kept.view(-1)[plan.numbers * first * S : plan.numbers * last * S].view(plan.numbers, last - first, S)


def _in_groups(plan: Plan, x_products: Tensor) -> Tensor:
    """`[P, n, S]` as `[groups, parts * n, S]`."""
    return x_products.view(plan.numbers // plan.parts, -1, x_products.shape[2])


def _in_parts(plan: Plan, w_products: Tensor) -> Tensor:
    """`[P, D, S]` as `[parts, groups, D, S]`."""
    return w_products.unflatten(0, (plan.parts, -1))


def forward(plan: Plan, x: Tensor, weight: Tensor, centered: Tensor | None, kept: Tensor | None) -> Tensor:
    """`[B, D, H', W']`, channels last, by kernels each less its mean times `centered`; fills `kept`
    `[P, B * tiles, S]` for the backward pass."""
    w_products, D = _w_products(plan, weight, centered, has_gradients=kept is not None), weight.shape[0]
    m, (down, across), (H, W) = plan.tile, plan.tiles, plan.output
    x = x.permute(0, 2, 3, 1)
    y = x.new_empty(x.shape[0], H, W, D)
    for images in _chunks(len(x)):
        part, into = x[images], y[images]
        count = len(part) * down * across
        if kept is None:
            x_products = scratch.take("x_products", plan.numbers, count, w_products.shape[2])
        else:
            x_products = _of_chunk(plan, kept, images)
        _transform_images(plan, part, x_products)
        groups = _in_groups(plan, x_products)
        products = scratch.take("products", plan.parts, len(groups), plan.parts * count, D)
        for w_part, into_part in zip(_in_parts(plan, w_products), products, strict=True):
            multiply(groups, w_part.transpose(1, 2), into_part)
        tiles = scratch.take("tiles", m * m, count, D)
        product(matrices(plan).outputs, products.view(plan.products, -1), out=tiles.view(m * m, -1))
        tiles = tiles.view(m, m, len(part), down, across, D).permute(2, 3, 0, 4, 1, 5)
        if (down, across) == (1, 1):
            into.copy_(tiles[:, 0, :H, 0, :W])
        else:
            into.copy_(tiles.reshape(len(part), down * m, across * m, D)[:, :H, :W])
    return y.permute(0, 3, 1, 2)


def _chunks(B: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, B)) for start in range(0, B, CHUNK)]


def backward(
    plan: Plan,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    centered: Tensor | None,
    kept: Tensor,
    needs_x: bool,
    needs_w: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by x, in channels last, and by weight, in its own format."""
    m, (down, across), (H, W) = plan.tile, plan.tiles, plan.output
    D, S = weight.shape[0], plan.stride**2 * x.shape[1]
    w_products = _w_products(plan, weight, centered, made_by_forward=True) if needs_x else None
    dw_products = scratch.take("dw_products", plan.numbers, D, S) if needs_w else None
    dx = kept.new_empty(x.permute(0, 2, 3, 1).shape) if needs_x else None
    grad = grad.permute(0, 2, 3, 1)
    for images in _chunks(len(x)):
        part = grad[images]
        B, count = len(part), len(part) * down * across
        if down * m > H or across * m > W:
            part = functional.pad(part, (0, 0, 0, across * m - W, 0, down * m - H))
        tiles = scratch.take("tiles", m * m, count, D)
        tiles.view(m, m, B, down, across, D).copy_(part.reshape(B, down, m, across, m, D).permute(2, 4, 0, 1, 3, 5))
        dproducts = scratch.take("products", plan.parts, plan.numbers // plan.parts, plan.parts * count, D)
        product(matrices(plan).outputs.t(), tiles.view(m * m, -1), out=dproducts.view(plan.products, -1))
        if dw_products is not None:
            groups = _in_groups(plan, _of_chunk(plan, kept, images))
            for dpart, into_part in zip(dproducts, _in_parts(plan, dw_products), strict=True):
                multiply(dpart.transpose(1, 2), groups, into_part, adds=images.start > 0)
        if dx is not None:
            dx_products = scratch.take("x_products", plan.numbers, count, S)
            for number, (dpart, w_part) in enumerate(zip(dproducts, _in_parts(plan, w_products), strict=True)):
                multiply(dpart, w_part, _in_groups(plan, dx_products), adds=number > 0)
            _gradient_of_images(plan, dx_products, dx[images])
    dweight = None
    if dw_products is not None:
        dweight = torch.empty_like(weight)
        _gradient_of_kernels(plan, dw_products, dweight, centered)
    return None if dx is None else dx.permute(0, 3, 1, 2), dweight
