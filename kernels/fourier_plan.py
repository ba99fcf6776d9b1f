"""How a convolution is made of small Fourier transforms: sizes, matrices and counts; notation as in fourier_conv.py."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .products import TAKES_ONEDNN

# How many times fewer the multiplications of an image must be: narrow products are slow.
ADVANTAGE = 1.4

# The same, with three products, where the direct convolution would be of bfloat16 and that is fast: 4.3 times fewer,
# for 256 to 256 channels, take 0.5 of its time at 128 images on one core of Zen 5, 3.7 times fewer, for 64 to 64, 1.3
# times as long.
HALF_ADVANTAGE = 4

# How many multiplications of bfloat16 take as long as one of float32. Fourier transforms are faster from some 40 images
# on so.
HALF_RATE = 1.7

# Multiplications that take as long as a number of the kernels' transform does to be written or read: 71 billion a
# second of one core (avx512) against 12 GB. A step does that five times: it writes the transform, reads it forward and
# backward, and writes and reads its gradient. Zen 5 multiplies faster; there unfolded images are as fast at 16, and
# four products as fast as three at some 90.
TRAFFIC = 40 if TAKES_ONEDNN else 24

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
    gauss: bool = True
    """Whether a complex product is three real ones, else four, of fewer numbers."""

    dtype: ClassVar = torch.float32
    """Of the products."""

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
    def numbers(self) -> int:
        """P, of an image and of a kernel."""
        real = 1 if self.size % 2 else 4
        return real + 3 * (self.size**2 - real) // 2 if self.gauss else 2 * -(-(self.size**2) // 2)

    @property
    def parts(self) -> int:
        """How many numbers of an image are multiplied by as many of a kernel, each by each."""
        return 1 if self.gauss else 2

    @property
    def products(self) -> int:
        """Of each pair of channels."""
        return self.parts * self.numbers


@dataclass(frozen=True)
class Matrices:
    """The linear maps of a plan, in float32, and the rows of products that belong together."""

    columns: Tensor
    """`[N, N]`, a transform down each column: its real frequencies, then real and imaginary part of each other."""
    real_rows: Tensor
    """`[P', N]`, numbers of a row that is real."""
    complex_rows: Tensor
    """`[3 N, 2 N]` or `[2 N, 2 N]`, numbers of a row of real and imaginary parts."""
    kernels: Tensor
    """K, `[P, q^2]`."""
    outputs: Tensor
    """F, `[m^2, products]`."""

    def rows(self) -> Iterator[tuple[Tensor, slice, slice]]:
        """Matrix, rows of the columns' transform that it takes, and numbers that it gives."""
        N, taken, given = len(self.columns), 0, 0
        while taken < N:
            matrix = self.real_rows if taken < _num_real(N) else self.complex_rows
            step = matrix.shape[1] // N
            yield matrix, slice(taken, taken + step), slice(given, given + len(matrix))
            taken, given = taken + step, given + len(matrix)


def _pair(waves: Tensor) -> Tensor:
    """One or two rows as a pair `[1, 2, ...]`, the second of zeros if there is none."""
    return torch.cat([waves, torch.zeros_like(waves)])[None, :2]


def _num_real(N: int) -> int:
    """Real frequencies of N real numbers."""
    return 1 if N % 2 else 2


@functools.lru_cache(maxsize=64)
def matrices(plan: Plan) -> Matrices:
    """See :class:`Matrices`."""
    N, q, m = plan.size, plan.taps, plan.tile
    places = torch.arange(N, device="cpu")  # whatever the default is
    transform = torch.exp(-2j * math.pi / N * (places[:, None] * places).double())
    cos, sin = transform.real, transform.imag
    real, pairs = [0, N // 2][: _num_real(N)], list(range(1, (N + 1) // 2))
    columns = torch.cat([cos[real], *(torch.stack([cos[k], sin[k]]) for k in pairs)])
    re, im = torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)
    if plan.gauss:
        real_rows = torch.cat([cos[real], cos[pairs] + sin[pairs], cos[pairs], sin[pairs]])
        complex_rows = torch.cat([re + im, re, im])
    else:
        real_rows = torch.cat([_pair(cos[real]), torch.stack([cos[pairs], sin[pairs]], 1)]).flatten(0, 1)
        complex_rows = torch.stack([re, im], 1).flatten(0, 1)

    # Of kernels and outputs, frequency by frequency in the same order.
    taps = (places[:q, None] * N + places[:q]).flatten()
    tile = (places[:m, None] * N + places[:m]).flatten()
    kernels, outputs = [], []
    for u, alone, others in [*((u, real, pairs) for u in real), *((u, [], list(range(N))) for u in pairs)]:
        for chosen, is_real in ((alone, True), (others, False)):
            if not chosen:
                continue
            waves = torch.stack([torch.outer(transform[u], transform[v]).flatten() for v in chosen])
            v_re, v_im = waves.real[:, taps], -waves.imag[:, taps]  # of conj(W)
            b_re, b_im = waves.real[:, tile], -waves.imag[:, tile]  # of the inverse transform
            if not plan.gauss:
                (v, b) = (_pair(v_re), _pair(b_re)) if is_real else (torch.stack([v_re, v_im], 1), 2 * b_re)
                kernels.append(v)
                if is_real:  # two that have nothing to do with each other
                    outputs.append(torch.diag_embed(b.transpose(1, 2)).permute(0, 2, 3, 1))
                else:
                    outputs.append(torch.stack([b, -2 * b_im, -2 * b_im, -b], 1).unflatten(1, (2, 2)))
            elif is_real:
                kernels.append(v_re)
                outputs.append(b_re)
            else:  # each stands for a pair of conjugates
                kernels += [v_re, v_im - v_re, v_re + v_im]
                outputs += [2 * (b_re - b_im), -2 * b_im, -2 * b_re]
    found = columns, real_rows, complex_rows, torch.cat(kernels), torch.cat(outputs) / N**2
    if not plan.gauss:  # the kernels' parts one after the other
        *found, kernels, outputs = found
        found = *found, kernels.transpose(0, 1).flatten(0, 1), outputs.transpose(0, 1).flatten(0, 2)
    *found, outputs = found
    found = *found, outputs.t()
    return Matrices(*(matrix.float().contiguous() for matrix in found))


def multiplications(plan: Plan, C: int, D: int) -> tuple[int, int, int]:
    """Of an image by the direct convolution, of an image by this, and of the kernels' transform."""
    S, tiles, N = plan.stride**2 * C, math.prod(plan.tiles), plan.size
    direct = math.prod(plan.output) * plan.kernel**2 * C * D
    transform = N**3 + sum(matrix.numel() for matrix, _, _ in matrices(plan).rows())
    image = tiles * (plan.products * S * D + transform * S + plan.products * plan.tile**2 * D)
    return direct, image, plan.numbers * plan.taps**2 * S * D


@functools.lru_cache(maxsize=256)
def best_plan(height: int, width: int, kernel: int, stride: int, C: int, D: int) -> Plan:
    """The size of maps with the fewest multiplications."""
    taps = -(-kernel // stride)
    sizes = range(taps + 1, max(LARGEST_MAP, taps + 1) + 1)
    plans = [Plan(kernel, stride, height, width, size) for size in sizes]
    return min(plans, key=lambda plan: multiplications(plan, C, D)[1])


def cost(plan: Plan, B: int, C: int, D: int) -> int:
    """Of a step of B images, forward and both gradients, in multiplications."""
    _, image, kernels = multiplications(plan, C, D)
    return 3 * B * image + 2 * kernels + 5 * TRAFFIC * plan.numbers * plan.stride**2 * C * D


def cheapest(plan: Plan, B: int, C: int, D: int) -> Plan:
    """The plan, or the same with four products for a complex one: few images do not pay for the numbers of three."""
    return min(plan, replace(plan, gauss=False), key=lambda plan: cost(plan, B, C, D))


def is_faster(plan: Plan, B: int, C: int, D: int, half: bool = False) -> bool:
    """Whether this is faster than products of B unfolded images, or with `half` than fast ones of bfloat16."""
    direct, image, _ = multiplications(replace(plan, gauss=True) if half else plan, C, D)
    advantage, rate = (HALF_ADVANTAGE, HALF_RATE) if half else (ADVANTAGE, 1)
    return direct > advantage * image and 3 * B * direct > rate * cost(plan, B, C, D)
