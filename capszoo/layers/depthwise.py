"""A depthwise convolution that is a product of map and kernel, channel by channel, where the kernel covers the map."""

import torch
from timm.layers import is_exportable, register_notrace_function
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_variadic

__all__ = ["DepthwiseConv2d"]


def _covers_map(x: Tensor, weight: Tensor) -> bool:
    """Whether there is one position, and products compute it faster. Other devices than CPUs were not measured."""
    if not torch.jit.is_scripting():
        if torch.onnx.is_in_onnx_export() or is_exportable():
            return False
    return x.device.type == "cpu" and x.shape[2] == weight.shape[2] and x.shape[3] == weight.shape[3]


def _multiply_maps(x: Tensor, weight: Tensor) -> Tensor:
    """Sums over the map, ``[B, C, 1, 1]``, of maps ``[B, C, H, W]`` times kernels ``[C, 1, H, W]``.

    PyTorch's backward pass of such a convolution is far slower: with 128 channels of 9 x 9 at 64 samples on one core,
    forward and backward took 10.5 ms and these products 1.4 in channels-last memory, 10.9 and 1.0 in contiguous memory.
    """
    if x.stride(1) == 1:  # channels last: products along the channels
        sums = (x.permute(0, 2, 3, 1).flatten(1, 2) * weight.flatten(1).t().contiguous()).sum(1)
    else:
        sums = torch.bmm(x.flatten(2).transpose(0, 1), weight.flatten(1).unsqueeze(2)).squeeze(2).t()
    return sums[:, :, None, None]


@register_notrace_function
def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """`torch.nn.functional.conv2d` with a group for each channel, on a CPU by products where one position is left."""
    if has_torch_function_variadic(x, weight, bias):
        return handle_torch_function(depthwise_conv2d, (x, weight, bias), x, weight, bias, stride)
    if _covers_map(x, weight):
        sums = _multiply_maps(x, weight)
        return sums if bias is None else sums + bias[:, None, None]
    return nn.functional.conv2d(x, weight, bias, stride, groups=weight.shape[0])


class DepthwiseConv2d(nn.Conv2d):
    """An unpadded convolution with bias, each channel by itself.

    Args:
        channels: Channels of the map, before and after.
        kernel_size: Height and width of the kernel, in pixels.
        stride: Stride, in pixels.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: tuple[int, int],
        stride: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(channels, channels, kernel_size, stride, groups=channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H', W']`` to ``[B, C, H, W]``, 1 x 1 where the kernel covers the map."""
        return depthwise_conv2d(x, self.weight, self.bias, self.stride[0])
