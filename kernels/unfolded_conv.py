"""Two-dimensional convolution on a CPU as one matrix product over unfolded images (im2col).

B images of C channels, D output channels, kernels of k x k at stride s, no padding, H' x W' outputs. Of each output the
k k C numbers that it is made of are laid out as a row; then the convolution is a product with the kernels as `[D, k k
C]`, and so are both gradients, that of the images folded back:

    rows [B H' W', k k C]    y = rows w^T    dw = dy^T rows    drows = dy w

Kernels that are to be centred, each less its mean, are left as they are, and the rows are centred, which gives the
same: r . (w - mean(w)) = (r - mean(r)) . w, and there are fewer rows than kernels.

Kernels in channels-last format are read and their gradient is written where they lie. oneDNN's convolutions reorder
both at every step, and first multiply them by a layer's scale: for the 256 to 256 channels of CapsNet and one image
on one core (avx512) a step, forward and both gradients, is 2.9 times as fast so, and 1.5 to 1.8 times at 16 to 64
images. Where kernels have fewer numbers or channels the rows take longer than they save; `plan_for` has the rule.

Rows of bfloat16 are multiplied by kernels of bfloat16, which are centred before they are rounded. As in a convolution
under autocast, sums are float32 and are rounded once.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .centering import less_means
from .products import product
from .scratch import scratch

# Kernels of fewer numbers are reordered in no time.
MIN_KERNELS = 2**16

# The same where PyTorch's own convolution would be of bfloat16 and that is fast.
MIN_HALF_KERNELS = 2**20

# Up to so many rows the kernels are more than the images. At 36 rows of kernels 3 x 3 of 128 channels a step is 2.0
# times as fast, at 144 of 256 channels 1.3 times; at 576 the one is no faster, and the other slower.
FEW_ROWS = 144

# Up to so many products of float32 are as fast as those of bfloat16, for which the kernels are rounded first.
FEW_HALF_ROWS = 96

# From so many channels on, in and out, and taps of a kernel, oneDNN's convolutions are slower at any batch size that
# Fourier transforms leave. At 9 x 9 and 16 images a step is 1.1 times as fast with 128 channels, 1.5 times with 256;
# with 192 to 64 channels it is as fast, with 64 to 64 slower.
MANY_CHANNELS = 128
MANY_TAPS = 49

# The same where PyTorch's own convolution would be of bfloat16 and that is fast. At 16 images a step is 1.5 times as
# fast with 256 channels, 1.3 times with 192; with 128 it is as fast, at 128 images slower.
MANY_HALF_CHANNELS = 192

# Bytes that the rows may take.
MAX_BYTES = 2**28


@dataclass(frozen=True)
class Unfolding:
    """How to unfold images."""

    kernel: int
    stride: int
    dtype: torch.dtype = torch.float32
    """Of the rows, and of the kernels as they are multiplied."""

    def output(self, x: Tensor) -> tuple[int, int]:
        """H', W' of images `[B, C, H, W]`."""
        return tuple((size - self.kernel) // self.stride + 1 for size in x.shape[2:])


def plan_for(x: Tensor, weight: Tensor, stride: int, half: bool = False) -> Unfolding | None:
    """How to unfold for kernels `[D, C, k, k]`; None where PyTorch's own convolution of these shapes is no slower, with
    `half` one of fast bfloat16."""
    D, C, k, _ = weight.shape
    plan = Unfolding(k, stride)
    rows = _num_rows(plan, x)
    few = rows <= (FEW_HALF_ROWS if half else FEW_ROWS)
    many = min(C, D) >= (MANY_HALF_CHANNELS if half else MANY_CHANNELS) and k * k >= MANY_TAPS
    if half and not few:
        plan = replace(plan, dtype=torch.bfloat16)
    is_large = weight.numel() >= (MIN_HALF_KERNELS if half else MIN_KERNELS)
    fits = rows * k * k * C * plan.dtype.itemsize <= MAX_BYTES
    return plan if is_large and (few or many) and fits else None


def _num_rows(plan: Unfolding, x: Tensor) -> int:
    height, width = plan.output(x)
    return len(x) * height * width


def kept_shape(plan: Unfolding, x: Tensor, weight: Tensor) -> tuple[int, ...]:
    """Of what a forward pass keeps for its backward pass: the rows, and kernels that are not the parameters as they
    lie."""
    kernels = 0 if plan.dtype == torch.float32 else len(weight)
    return _num_rows(plan, x) + kernels, plan.kernel**2 * x.shape[1]


def _as_matrix(weight: Tensor) -> Tensor:
    """`[D, k k C]`, not copied where the kernels are in channels-last format."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def _center(rows: Tensor, centered: Tensor | None) -> Tensor:
    """Take the mean times `centered` from each row, in place."""
    return rows if centered is None else rows.sub_(rows.mean(1, keepdim=True).mul_(centered))


def forward(plan: Unfolding, x: Tensor, weight: Tensor, centered: Tensor | None, kept: Tensor | None) -> Tensor:
    """`[B, D, H', W']`, channels last, by kernels each less its mean times `centered`; fills `kept`."""
    k, s, (height, width) = plan.kernel, plan.stride, plan.output(x)
    kept = scratch.take("rows", *kept_shape(plan, x, weight), dtype=plan.dtype) if kept is None else kept
    count = _num_rows(plan, x)
    rows, matrix = kept[:count], kept[count:]
    windows = x.permute(0, 2, 3, 1).unfold(1, k, s).unfold(2, k, s)  # [B, H', W', C, k, k]
    rows.view(len(x), height, width, k, k, -1).copy_(windows.permute(0, 1, 2, 4, 5, 3))
    if len(matrix):
        matrix.copy_(_as_matrix(less_means(weight, centered)))
    else:
        _center(rows, centered)
        matrix = _as_matrix(weight)
    return product(rows, matrix.t()).float().view(len(x), height, width, -1).permute(0, 3, 1, 2)


def backward(
    plan: Unfolding,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    centered: Tensor | None,
    kept: Tensor,
    needs_x: bool,
    needs_w: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients by x and by weight, in channels last."""
    grad = grad.permute(0, 2, 3, 1).reshape(-1, len(weight)).to(plan.dtype)
    rows, matrix = kept[: len(grad)], kept[len(grad) :]
    of_kernels, of_rows = (centered, None) if len(matrix) else (None, centered)  # what is to be centred
    dx = dweight = None
    if needs_w:
        D, C, k, _ = weight.shape
        dweight = _center(product(grad.t(), rows).float(), of_kernels).view(D, k, k, C).permute(0, 3, 1, 2)
    if needs_x:
        drows = scratch.take("rows", *rows.shape, dtype=plan.dtype)
        product(grad, matrix if len(matrix) else _as_matrix(weight), out=drows)
        dx = _fold(plan, _center(drows, of_rows), x)
    return dx, dweight


def _fold(plan: Unfolding, drows: Tensor, x: Tensor) -> Tensor:
    """The transpose of unfolding, first across and then down; x for its shape."""
    k, s, (height, width) = plan.kernel, plan.stride, plan.output(x)
    B, C, H, W = x.shape
    drows = drows.view(B, height, width, k, k, C)
    across = scratch.take("across", B, height, k, W, C).zero_()
    for j in range(width):
        across[:, :, :, j * s : j * s + k] += drows[:, :, j]
    dx = across.new_zeros(B, H, W, C)
    for i in range(height):
        dx[:, i * s : i * s + k] += across[:, i]
    return dx.permute(0, 3, 1, 2)
