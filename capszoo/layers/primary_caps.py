"""Primary capsules: a convolution whose filters are grouped into capsules, squashed."""

import torch
from torch import Tensor, nn

from capszoo.kernels import reference

from .config import FollowsFusedRouting
from .functional import squash
from .scaled_conv import ScaledConv2d

__all__ = ["PrimaryCaps"]


class SquashMap(FollowsFusedRouting, nn.Module):
    """Squash each capsule of a map ``[B, T*K, H, W]``, see :func:`capszoo.kernels.squash`."""

    def __init__(self, num_types: int, caps_dim: int, approximate: bool = False):
        super().__init__()
        self.num_types, self.caps_dim, self.approximate = num_types, caps_dim, approximate

    def forward(self, x: Tensor) -> Tensor:
        # In channels_last memory the permutation is free and K is the innermost dimension already.
        x = x.permute(0, 2, 3, 1).unflatten(-1, (self.num_types, self.caps_dim))
        if torch.jit.is_scripting() and not self.fused:
            x = reference.squash(x, self.approximate)
        else:
            x = squash(x, self.approximate)
        return x.flatten(-2).permute(0, 3, 1, 2)


class PrimaryCaps(nn.Module):
    """Convolution to ``num_types`` capsule types of dimension ``caps_dim`` at every position, squashed.

    The map keeps timm's ``[B, C, H, W]`` layout with channel ``t * K + k``; :meth:`to_capsules` orders the capsules
    type-major (``i = t * H * W + position``), so that the capsules of one type are consecutive and can share weights.

    Source: Sabour, Frosst and Hinton 2017, section 4; FasTrCaps (arXiv 1905.10142).

    Args:
        in_chans: Channels of the incoming map.
        num_types: T, the number of capsule types.
        caps_dim: K, the dimension of a capsule.
        kernel_size: Side of the square kernel, in pixels.
        stride: Stride of the convolution, in pixels.
        scale: Factor of the convolution's sum, before the bias is added; None for that of
            :func:`capszoo.layers.fan_in_scale`. Where capsules are made by one routing iteration over zero logits, as
            in the codes of Sabour and of FasTrCaps, it is 1 / num_types.
        centered: Centre the filters, see :class:`capszoo.layers.ScaledConv2d`; None for where no scale is given.
        init_gain: Gain of the convolution's fresh weights over those of `torch.nn.Conv2d`, with which squash, quadratic
            near zero, would shorten fresh capsules of normalised images to about a tenth; with 2 it is a quarter.
        approximate_squash: Use the paper's cheap approximation of squash.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_chans: int,
        num_types: int = 32,
        caps_dim: int = 8,
        kernel_size: int = 9,
        stride: int = 2,
        scale: float | None = None,
        init_gain: float = 2.0,
        centered: bool | None = None,
        approximate_squash: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_types = num_types
        self.caps_dim = caps_dim
        if centered is None:
            centered = scale is None and in_chans * kernel_size**2 > 1
        self.conv = ScaledConv2d(
            in_chans, num_types * caps_dim, kernel_size, stride, scale, init_gain, centered, device=device, dtype=dtype
        )
        # A module, so that a network cut before it can put nn.Identity in its place.
        self.squash: nn.Module = SquashMap(num_types, caps_dim, approximate_squash)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_chans, H', W']`` to squashed capsules ``[B, T*K, H, W]``."""
        return self.squash_map(self.conv(x))

    def squash_map(self, x: Tensor) -> Tensor:
        """Squash each capsule of a map ``[B, T*K, H, W]``."""
        return self.squash(x)

    def to_capsules(self, x: Tensor) -> Tensor:
        """Reorder a map ``[B, T*K, H, W]`` into capsules ``[B, I, K]``, I = T*H*W, type-major."""
        x = x.unflatten(1, (self.num_types, self.caps_dim))
        return x.permute(0, 1, 3, 4, 2).flatten(1, 3)
