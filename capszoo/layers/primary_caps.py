"""Primary capsules: a convolution whose filters are grouped into capsules, squashed."""

import torch
from torch import Tensor, nn

from capszoo.kernels import reference

from .config import FollowsFusedRouting
from .functional import squash

__all__ = ["PrimaryCaps"]


class PrimaryCaps(FollowsFusedRouting, nn.Module):
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
        approximate_squash: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_types = num_types
        self.caps_dim = caps_dim
        self.approximate_squash = approximate_squash
        self.conv = nn.Conv2d(in_chans, num_types * caps_dim, kernel_size, stride=stride, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_chans, H', W']`` to squashed capsules ``[B, T*K, H, W]``."""
        return self.squash_map(self.conv(x))

    def squash_map(self, x: Tensor) -> Tensor:
        """Squash each capsule of a map ``[B, T*K, H, W]``."""
        # In channels_last memory the permutation is free and K is the innermost dimension already.
        x = x.permute(0, 2, 3, 1).unflatten(-1, (self.num_types, self.caps_dim))
        if torch.jit.is_scripting() and not self.fused:
            x = reference.squash(x, self.approximate_squash)
        else:
            x = squash(x, self.approximate_squash)
        return x.flatten(-2).permute(0, 3, 1, 2)

    def to_capsules(self, x: Tensor) -> Tensor:
        """Reorder a map ``[B, T*K, H, W]`` into capsules ``[B, I, K]``, I = T*H*W, type-major."""
        x = x.unflatten(1, (self.num_types, self.caps_dim))
        return x.permute(0, 1, 3, 4, 2).flatten(1, 3)
