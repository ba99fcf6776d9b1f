"""A convolution without padding, which on a CPU takes the fastest of several forms."""

import torch
from torch import Tensor, nn

from capszoo.kernels.large_conv import chosen_plan, large_conv2d

from .config import use_fourier_conv

__all__ = ["LargeConv2d"]


class LargeConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` of square kernels without padding, dilation or groups.

    On a CPU large kernels are convolved by a matrix product or by Fourier transforms where counts speak for it, see
    :class:`capszoo.set_fourier_conv`; the same numbers to rounding.

    Args:
        in_channels: Channels of the incoming map.
        out_channels: Filters.
        kernel_size: Side of the square kernel, in pixels.
        stride: Stride, in pixels.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            y = self._by_plan(x)
            if y is not None:
                return y
        return self._conv_forward(x, self.weight, self.bias)

    @torch.jit.unused
    def _by_plan(self, x: Tensor, scale: Tensor | None = None, centered: Tensor | None = None) -> Tensor | None:
        """The convolution, its sums times `scale`, by kernels that are `centered`, by the form chosen for these shapes;
        None for PyTorch's own."""
        plan = chosen_plan(x, self.weight, self.stride[0]) if use_fourier_conv() else None
        return None if plan is None else large_conv2d(x, self.weight, self.bias, plan, scale, centered)
