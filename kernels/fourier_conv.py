"""Two-dimensional convolution with large kernels on a CPU, by small Fourier transforms that are matrix products.

Notation: B images of C channels, D output channels, kernels of k x k at stride s, no padding. Stride s splits image and
kernel into s^2 phases: y(i) = sum over phases a of the correlation of x_a(i) = x(s i + a) with w_a(p) = w(s p + a), at
stride 1, with kernels of q = ceil(k / s). So S = s^2 C channels remain. Outputs are made in tiles of m x m from maps of
N x N, N = m + q - 1, on which a circular correlation is exact: X conj(W) at each frequency (the overlap-save method).

Of the N^2 frequencies of a real map some are real and of the others half suffice, since the rest are conjugates. A
complex product is three real ones (Gauss): with V = conj(W), X V from Vr (Xr + Xi), Xr (Vi - Vr), Xi (Vr + Vi). Thus P
real products for each pair of channels, 148 for N = 10. What the products need, and what makes outputs of them, are
linear maps, so that all is five matrix products, and their transposes are the gradients:

    x_products [P, B, S] = T [P, N^2] maps          w_products [P, S, D] = K [P, q^2] kernels
    products   [P, B, D] = x_products w_products    y [m^2, B, D] = F [m^2, P] products

For the 9 x 9 kernels of stride 2 in CapsNet, 20 x 20 to 6 x 6, these are 55 million multiplications an image instead of
191 million, and as exact in float32. The transform of the kernels takes as many as 18 images, so small batches stay
with the direct convolution: `is_faster` weighs that up, by counts alone, so that the same shapes give the same bits.
"""

import functools
import math
import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

# How many times fewer the multiplications must be. On one core (avx512) a step of the convolution above, forward and
# both gradients, is 2.8 times as fast at batch 128, where there are 3.0 times fewer, and no faster at 16, with 1.65:
# oneDNN's are blocked for the cache, these go through memory.
ADVANTAGE = 2.0

# Images for which maps and products are in memory at a time.
CHUNK = 128

LARGEST_MAP = 16


@dataclass(frozen=True)
class Plan:
    """How to convolve images of one size: see the module."""

    kernel: int
    stride: int
    height: int
    width: int
    size: int
    """N, of a map."""

    @property
    def taps(self) -> int:
        """q, of a phase's kernel."""
        return -(-self.kernel // self.stride)

    @property
    def tile(self) -> int:
        """m, of a tile of outputs."""
        return self.size - self.taps + 1

    @property
    def output(self) -> tuple[int, int]:
        return tuple((n - self.kernel) // self.stride + 1 for n in (self.height, self.width))

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles down and across."""
        return tuple(-(-n // self.tile) for n in self.output)

    @property
    def phase(self) -> tuple[int, int]:
        """Height and width of a phase, from which all tiles can be cut."""
        return tuple((n - 1) * self.tile + self.size for n in self.tiles)

    @property
    def products(self) -> int:
        """P."""
        real = 1 if self.size % 2 else 4
        return real + 3 * (self.size**2 - real) // 2


@functools.lru_cache(maxsize=64)
def matrices(plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """T `[P, N^2]`, K `[P, q^2]` and F `[m^2, P]` in float32."""
    N, q, m = plan.size, plan.taps, plan.tile
    places = torch.arange(N)
    transform = torch.exp(-2j * math.pi / N * places[:, None] * places[None, :].double())
    transform = torch.kron(transform, transform)
    real, half = [], []
    for u in range(N):
        for v in range(N):
            partner = -u % N * N + -v % N
            if partner == u * N + v:
                real.append(partner)
            elif u * N + v < partner:
                half.append(u * N + v)
    re, im, alone = transform[half].real, transform[half].imag, transform[real].real
    taps = torch.tensor([i * N + j for i in range(q) for j in range(q)])
    v_re, v_im = re[:, taps], -im[:, taps]  # of conj(W)
    outputs = torch.tensor([i * N + j for i in range(m) for j in range(m)])
    b_re, b_im = re[:, outputs].t() * 2, -im[:, outputs].t() * 2  # of the inverse transform, for a pair of conjugates
    to_x = torch.cat([re + im, re, im, alone])
    to_w = torch.cat([v_re, v_im - v_re, v_re + v_im, alone[:, taps]])
    to_y = torch.cat([b_re - b_im, -b_im, -b_re, alone[:, outputs].t()], 1) / N**2
    return to_x.float(), to_w.float(), to_y.float().contiguous()


def multiplications(plan: Plan, C: int, D: int) -> tuple[int, int, int]:
    """Of an image by the direct convolution, of an image by this, and of the kernels' transform."""
    S, tiles = plan.stride**2 * C, math.prod(plan.tiles)
    direct = math.prod(plan.output) * plan.kernel**2 * C * D
    image = tiles * plan.products * (S * D + plan.size**2 * S + plan.tile**2 * D)
    return direct, image, plan.products * plan.taps**2 * S * D


@functools.lru_cache(maxsize=256)
def best_plan(height: int, width: int, kernel: int, stride: int, C: int, D: int) -> Plan:
    """The size of maps with the fewest multiplications."""
    taps = -(-kernel // stride)
    sizes = range(taps + 1, max(LARGEST_MAP, taps + 1) + 1)
    plans = [Plan(kernel, stride, height, width, size) for size in sizes]
    return min(plans, key=lambda plan: multiplications(plan, C, D)[1])


def is_faster(plan: Plan, B: int, C: int, D: int) -> bool:
    """Whether this has few enough multiplications for B images."""
    direct, image, kernels = multiplications(plan, C, D)
    return B * direct > ADVANTAGE * (B * image + kernels)


class _Scratch(threading.local):
    """Memory for what a call throws away, kept for the next: fresh memory takes as long as products."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self.kept or self.kept[name].numel() < size:
            self.kept[name] = torch.empty(size)
        return self.kept[name][:size].view(shape)


_scratch = _Scratch()


def _maps(plan: Plan, x: Tensor) -> Tensor:
    """`[N^2, B * tiles, S]` of `[B, C, H, W]`."""
    s, N, m = plan.stride, plan.size, plan.tile
    (B, C), (down, across) = x.shape[:2], plan.tiles
    height, width = (n * s for n in plan.phase)
    x = x.permute(0, 2, 3, 1)[:, :height, :width]
    if x.shape[1] < height or x.shape[2] < width:
        x = functional.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
    x = x.reshape(B, plan.phase[0], s, plan.phase[1], s, C)
    tiles = x.unfold(1, N, m).unfold(3, N, m)  # [B, down, s, across, s, C, N, N]
    maps = _scratch.take("maps", N * N, B * down * across, s * s * C)
    maps.view(N, N, B, down, across, s, s, C).copy_(tiles.permute(6, 7, 0, 1, 3, 2, 4, 5))
    return maps


def _images(plan: Plan, maps: Tensor, shape: torch.Size) -> Tensor:
    """The transpose of `_maps`: `[B, C, H, W]`, channels last, tiles that overlap added up."""
    s, N, m = plan.stride, plan.size, plan.tile
    (B, C, H, W), (down, across) = shape, plan.tiles
    maps = maps.view(N, N, B, down, across, s, s, C)
    x = maps.new_zeros(B, plan.phase[0], s, plan.phase[1], s, C)
    for i in range(down):
        for j in range(across):
            x[:, i * m : i * m + N, :, j * m : j * m + N] += maps[:, :, :, i, j].permute(2, 0, 3, 1, 4, 5)
    x = x.view(B, plan.phase[0] * s, plan.phase[1] * s, C)
    if x.shape[1] < H or x.shape[2] < W:
        x = functional.pad(x, (0, 0, 0, max(0, W - x.shape[2]), 0, max(0, H - x.shape[1])))
    return x[:, :H, :W].permute(0, 3, 1, 2)


def _w_products(plan: Plan, weight: Tensor) -> Tensor:
    """`[P, S, D]` of kernels `[D, C, k, k]`."""
    (D, C, k, _), s, q = weight.shape, plan.stride, plan.taps
    if s * q > k:
        weight = functional.pad(weight, (0, s * q - k, 0, s * q - k))
    kernels = _scratch.take("kernels", q * q, s * s * C * D)
    kernels.view(q, q, s, s, C, D).copy_(weight.reshape(D, C, q, s, q, s).permute(2, 4, 3, 5, 1, 0))
    products = _scratch.take("w_products", plan.products, s * s * C * D)
    return torch.mm(matrices(plan)[1], kernels, out=products).view(-1, s * s * C, D)


def _kernels(plan: Plan, dw_products: Tensor, shape: torch.Size) -> Tensor:
    """The transpose of `_w_products`: `[D, C, k, k]`."""
    (D, C, k, _), s, q = shape, plan.stride, plan.taps
    kernels = _scratch.take("kernels", q * q, s * s * C * D)
    torch.mm(matrices(plan)[1].t(), dw_products.view(plan.products, -1), out=kernels)
    weight = kernels.view(q, q, s, s, C, D).permute(5, 4, 0, 2, 1, 3).reshape(D, C, q * s, q * s)
    return weight[:, :, :k, :k]


def _x_products(plan: Plan, x: Tensor) -> Tensor:
    """`[P, B * tiles, S]` of images `[B, C, H, W]`."""
    maps = _maps(plan, x)
    products = _scratch.take("x_products", plan.products, *maps.shape[1:])
    torch.mm(matrices(plan)[0], maps.view(len(maps), -1), out=products.view(plan.products, -1))
    return products


def _forward(plan: Plan, x: Tensor, weight: Tensor) -> Tensor:
    """`[B, D, H', W']`, channels last."""
    w_products, D = _w_products(plan, weight), weight.shape[0]
    m, (down, across), (H, W) = plan.tile, plan.tiles, plan.output
    y = x.new_empty(x.shape[0], H, W, D)
    for part, into in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        x_products = _x_products(plan, part)
        products = torch.bmm(x_products, w_products, out=_scratch.take("products", *x_products.shape[:2], D))
        tiles = _scratch.take("tiles", m * m, *products.shape[1:])
        torch.mm(matrices(plan)[2], products.view(plan.products, -1), out=tiles.view(m * m, -1))
        tiles = tiles.view(m, m, len(part), down, across, D).permute(2, 3, 0, 4, 1, 5)
        into.copy_(tiles.reshape(len(part), down * m, across * m, D)[:, :H, :W])
    return y.permute(0, 3, 1, 2)


def _backward(plan: Plan, grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_w: bool) -> list[Tensor | None]:
    """Gradients by x and weight, of which the first is in channels last."""
    to_x, _, to_y = matrices(plan)
    m, (down, across), (H, W) = plan.tile, plan.tiles, plan.output
    D, S = weight.shape[0], plan.stride**2 * x.shape[1]
    w_products = _w_products(plan, weight).transpose(1, 2) if needs_x else None
    dw_products = _scratch.take("dw_products", plan.products, S, D) if needs_w else None
    dx: list[Tensor] = []
    for place, (part, images) in enumerate(zip(grad.split(CHUNK), x.split(CHUNK), strict=True)):
        B = len(part)
        part = functional.pad(part.permute(0, 2, 3, 1), (0, 0, 0, across * m - W, 0, down * m - H))
        tiles = _scratch.take("tiles", m * m, B * down * across, D)
        tiles.view(m, m, B, down, across, D).copy_(part.reshape(B, down, m, across, m, D).permute(2, 4, 0, 1, 3, 5))
        dproducts = _scratch.take("products", plan.products, *tiles.shape[1:])
        torch.mm(to_y.t(), tiles.view(m * m, -1), out=dproducts.view(plan.products, -1))
        if needs_w:
            x_products = _x_products(plan, images).transpose(1, 2)
            torch.baddbmm(dw_products, x_products, dproducts, beta=min(place, 1), out=dw_products)
        if needs_x:
            dx_products = _scratch.take("x_products", plan.products, tiles.shape[1], S)
            torch.bmm(dproducts, w_products, out=dx_products)
            dmaps = _scratch.take("maps", plan.size**2, tiles.shape[1] * S)
            dx.append(_images(plan, torch.mm(to_x.t(), dx_products.view(plan.products, -1), out=dmaps), images.shape))
    return [torch.cat(dx) if needs_x else None, _kernels(plan, dw_products, weight.shape) if needs_w else None]


class _FourierConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.plan = plan
        with torch.autocast("cpu", enabled=False):
            return _forward(plan, x.float(), weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        with torch.autocast("cpu", enabled=False):
            if torch.is_grad_enabled():  # higher derivatives are those of the direct convolution
                sides = [ctx.plan.stride] * 2, [0, 0], [1, 1], False, [0, 0], 1
                dx, dw, _ = torch.ops.aten.convolution_backward(grad, x.float(), weight, None, *sides, [*needs, False])
            else:
                dx, dw = _backward(ctx.plan, grad, x.float(), weight, *needs)
        return dx if dx is None else dx.to(x.dtype), dw, None


def chosen_plan(x: Tensor, weight: Tensor, stride: int) -> Plan | None:
    """How to convolve these by Fourier transforms, or None where the direct convolution is to be taken.

    That is so on other devices and in other types, for small kernels and batches, where bfloat16 has matrix units, and
    where something else than a plain call looks on: torch.compile, torch.export, torch.jit, torch.fx, torch.func and
    forward mode.
    """
    if type(x) is not Tensor or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return None
    if x.device.type != "cpu" or weight.dtype != torch.float32 or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    half = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if half and _has_matrix_units() or torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    (D, C, k, width), (B, _, H, W) = weight.shape, x.shape
    if k != width or k <= stride or H < k or W < k or B == 0:
        return None
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in (x, weight)):
        return None
    plan = best_plan(H, W, k, stride, C, D)
    return plan if is_faster(plan, B, C, D) else None


@functools.cache
def _has_matrix_units() -> bool:
    """Whether this processor multiplies bfloat16 matrices (AMX)."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def fourier_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """Convolve `[B, C, H, W]` with kernels `[D, C, k, k]` of float32, as `plan` says: `[B, D, H', W']`, channels last.

    Products and sums are float32, under autocast too; the result has the type that a convolution there would have.
    """
    y = _FourierConv.apply(x, weight, plan)
    if bias is not None:
        y = y + bias.view(-1, 1, 1)
    return y.to(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype)
