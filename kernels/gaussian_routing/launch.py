"""Launches of the kernels of triton.py and triton_backward.py; the same functions as in cpu.py."""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .cpu import EPSILON
from .triton import children_kernel, moments_kernel
from .triton_backward import dchildren_kernel, dweight_kernel

# Numbers in a tile of votes, and the most parent types in it.
TILE_SIZE = 1024
MAX_BLOCK_J = 16

# Programs to split sums for, where the tiles alone are fewer: four for each multiprocessor of a large GPU.
NUM_PROGRAMS = 512

# Of each program.
NUM_WARPS = 4


class Problem:
    """Sizes that the kernels take, and tensors as they take them: capsules last, contiguous."""

    def __init__(self, poses: Tensor, activations: Tensor, weight: Tensor, offset: Tensor | None, stride: int):
        self.num_types, self.P, _, self.B, self.h, self.w = poses.shape
        _, self.Kh, self.Kw, self.J, _, _ = weight.shape
        self.H, self.W = (self.h - self.Kh) // stride + 1, (self.w - self.Kw) // stride + 1
        # With one position of the kernel any stride is the same, and this one gives a child one place to look at.
        self.SY = self.Kh if self.H == 1 else stride
        self.SX = self.Kw if self.W == 1 else stride
        self.x = poses.permute(0, 3, 4, 5, 1, 2).contiguous()
        self.a, self.weight = activations.contiguous(), weight.contiguous()
        self.offset = weight if offset is None else offset.contiguous()
        BLOCK_P, BLOCK_J = triton.next_power_of_2(self.P), min(MAX_BLOCK_J, triton.next_power_of_2(self.J))
        BLOCK_R = max(1, TILE_SIZE // (BLOCK_J * BLOCK_P**2))
        self.sizes = {
            "B": self.B, "J": self.J, "h": self.h, "w": self.w, "H": self.H, "W": self.W, "Kh": self.Kh, "Kw": self.Kw,
            "SY": self.SY, "SX": self.SX, "P": self.P, "OFFSET": offset is not None,
            "BLOCK_R": BLOCK_R, "BLOCK_J": BLOCK_J, "BLOCK_P": BLOCK_P,
        }  # fmt: skip
        self.rows = triton.cdiv(self.B * self.H * self.W, BLOCK_R)
        self.types = triton.cdiv(self.J, BLOCK_J)
        children = self.B * triton.cdiv(self.h, self.SY) * triton.cdiv(self.w, self.SX)
        self.by_child = (triton.cdiv(children, BLOCK_R), self.num_types, self.SY * self.SX)

    def parents(self, x: Tensor) -> Tensor:
        """`[J, P, P, B, H, W]` or `[J, B, H, W]` with capsules last."""
        return (x.permute(3, 4, 5, 0, 1, 2) if x.dim() == 6 else x.permute(1, 2, 3, 0)).contiguous()

    def lse(self, mean: Tensor, precision: Tensor | None, prior: Tensor | None) -> Tensor:
        """Logarithm of the sum of exp(logits) of each child."""
        if precision is None:
            ones = self.x.new_ones(1, 1, self.H, self.W)
            counts = F.conv_transpose2d(ones, ones.new_ones(1, 1, self.Kh, self.Kw), stride=(self.SY, self.SX))[0, 0]
            counts = F.pad(counts, (0, self.w - counts.shape[1], 0, self.h - counts.shape[0]))
            return (self.J * counts).log().expand(self.a.shape).contiguous()
        lse = torch.empty_like(self.a)
        children_kernel[self.by_child](
            self.x, self.weight, self.offset, mean, precision, prior, lse, num_warps=NUM_WARPS, **self.sizes
        )
        return lse

    def sums(self, mean: Tensor, precision: Tensor | None, prior: Tensor | None, lse: Tensor, *backward: Tensor):
        """Of w or dlogits, by those times u and u^2: `[B, H, W, J]`, twice `[B, H, W, J, P, P]`."""
        num_votes = self.num_types * self.Kh * self.Kw
        num_parts = max(1, min(num_votes, NUM_PROGRAMS // max(1, self.rows * self.types)))
        mass = self.x.new_empty(num_parts, *mean.shape[:4])
        first, second = self.x.new_empty(2, num_parts, *mean.shape)
        unused = (mean,) * 4
        moments_kernel[(self.rows, self.types, num_parts)](
            self.x, self.a, self.weight, self.offset, mean, mean if precision is None else precision,
            mean if prior is None else prior, lse, *(backward or unused), mass, first, second,
            num_types=self.num_types, num_parts=num_parts, EQUAL=precision is None, BACKWARD=bool(backward),
            num_warps=NUM_WARPS, **self.sizes,
        )  # fmt: skip
        return mass.sum(0), first.sum(0), second.sum(0)


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
    """See `cpu.moments`; all tensors are float32, and no size is 0."""
    problem = Problem(poses, activations, weight, offset, stride)
    with torch.cuda.device_of(poses):
        if mean is None:  # around the average, which a first pass around zero finds
            center = poses.new_zeros(problem.B, problem.H, problem.W, problem.J, problem.P, problem.P)
            lse = problem.lse(center, None, None)
            mass, first, _ = problem.sums(center, None, None, lse)
            center = first / (mass + EPSILON)[..., None, None]
            mass, first, second = problem.sums(center, None, None, lse)
        else:
            center, factor, prior = (problem.parents(x) for x in (mean, precision, log_prior))
            lse = problem.lse(center, factor, prior)
            mass, first, second = problem.sums(center, factor, prior, lse)
        wide = mass[..., None, None]
        shift = (first - EPSILON * center) / (wide + EPSILON)
        scatter = (second - 2 * shift * first + shift.square() * wide).clamp_(min=0)
        average = center + shift
    return _samples_last(mass), _samples_last(average), _samples_last(scatter)


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
    """See `cpu.moments_backward`."""
    problem = Problem(poses, activations, weight, offset, stride)
    equal = mean is None
    with torch.cuda.device_of(poses):
        center = problem.parents(average if mean is None else mean)
        factor, prior = (None, None) if equal else (problem.parents(precision), problem.parents(log_prior))
        lse = problem.lse(center, factor, prior)
        ds1 = (daverage - 2 * EPSILON * average * dscatter) / (mass + EPSILON)[:, None, None]
        dtotal, ds2 = dmass, dscatter
        if mean is not None:
            shift = average - mean
            dtotal = dmass + (shift * (ds2 * shift - ds1)).sum(dim=(1, 2))
            ds1 = ds1 - 2 * ds2 * shift
        dtotal, ds1, ds2 = (problem.parents(x) for x in (dtotal, ds1, ds2))
        da, dx = torch.empty_like(problem.a), torch.empty_like(problem.x)
        inputs = (problem.x, problem.a, problem.weight, problem.offset, center, center if equal else factor,
                  center if equal else prior, lse, dtotal, ds1, ds2, da)  # fmt: skip
        sizes = dict(EQUAL=equal, num_warps=NUM_WARPS, **problem.sizes)
        dchildren_kernel[problem.by_child](*inputs, dx, **sizes)
        places = problem.num_types * problem.Kh * problem.Kw
        num_parts = max(1, min(problem.rows, NUM_PROGRAMS // (places * problem.types)))
        dweight = poses.new_empty(num_parts, *weight.shape)
        dweight_kernel[(places, problem.types, num_parts)](
            *inputs, dweight, num_types=problem.num_types, num_parts=num_parts, **sizes
        )
        priors = (poses.new_empty(0) for _ in range(3))
        if not equal:
            by_prior, by_u, by_square = problem.sums(center, factor, prior, lse, dtotal, ds1, ds2, da)
            priors = (_samples_last(2 * factor * by_u), _samples_last(-by_square), _samples_last(by_prior))
    return dx.permute(0, 4, 5, 1, 2, 3).contiguous(), da, dweight.sum(0), *priors


def _samples_last(x: Tensor) -> Tensor:
    return (x.permute(3, 4, 5, 0, 1, 2) if x.dim() == 6 else x.permute(3, 0, 1, 2)).contiguous()
