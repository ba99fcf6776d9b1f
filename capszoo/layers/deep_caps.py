"""Layers of DeepCaps: convolutional capsules without routing, one that routes, a decoder of transposed convolutions.

Maps are ``[B, T*K, H, W]`` with channel ``t * K + k``, as those of :class:`capszoo.layers.PrimaryCaps`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capszoo.kernels import reference

from .config import FollowsFusedRouting
from .functional import squash
from .primary_caps import SquashMap

__all__ = ["ConvCaps", "ConvDynamicRouting", "DeconvDecoder"]

_MAX_ITERS = 100


class ConvCaps(nn.Module):
    """A 3x3 convolution without bias, whose filters are grouped into capsules and squashed.

    Source: Rajasegaran et al. 2019 (arXiv 1904.09546), section 3.2.

    Args:
        in_chans: Channels of the incoming map.
        in_dim: Dimension of the capsules there; 0 for a map of activations of variance 1.
        num_types: T, the number of capsule types.
        caps_dim: K, the dimension of a capsule.
        stride: Stride of the convolution; the map is padded.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_chans: int,
        in_dim: int,
        num_types: int,
        caps_dim: int,
        stride: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_dim, self.caps_dim = in_dim, caps_dim
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_chans, num_types * caps_dim, 3, stride, padding=1, bias=False, **dd)
        self.squash = SquashMap(num_types, caps_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights of which capsules of length 1/2 make capsules of length 1/2.

        squash is quadratic near zero: started as other convolutions are, each layer would halve them and more.
        """
        fan_in = self.conv.in_channels * 9
        std = 2 * math.sqrt(self.in_dim / self.caps_dim) if self.in_dim else 1 / math.sqrt(self.caps_dim)
        nn.init.normal_(self.conv.weight, std=std / math.sqrt(fan_in))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_chans, H, W]`` to squashed capsules ``[B, T*K, H', W']``."""
        return self.squash(self.conv(x))


class ConvDynamicRouting(FollowsFusedRouting, nn.Module):
    """Routing by agreement between maps of capsules, whose votes are a convolution (the paper's 3-D convolution).

    A 3x3 kernel slides over the map of each type below, the same for all types, and gives its votes for all types above
    at each position. Couplings of a type below are a softmax over types above *and* positions. With b = 0 at first:
    c = softmax(b), v = squash(sum over types below of c votes + bias), b += <votes, v>.

    Source: Rajasegaran et al. 2019 (arXiv 1904.09546), section 3.1. squash is over the capsule's dimensions as in the
    paper's equation; the authors' code takes the length over dimensions and positions together.

    The votes, T*J*D numbers a position, are stored once for all iterations: 0.5 MB an image for 4x4 positions of 32
    types and 8 dimensions, a fourth of the network's first map. The other iterations store their couplings, a D-th.

    Args:
        num_types: T, the types below.
        caps_dim: K, their dimension.
        num_parents: J, the types above.
        parent_dim: D, their dimension.
        num_iters: R, the number of iterations; 1 for uniform couplings.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If num_iters is not a whole number from 1 to 100.
    """

    def __init__(
        self,
        num_types: int,
        caps_dim: int,
        num_parents: int,
        parent_dim: int,
        num_iters: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_iters not in range(1, _MAX_ITERS + 1):
            raise ValueError(
                f"num_routing={num_iters} is not possible: routing takes 1 to {_MAX_ITERS} whole iterations"
            )
        self.num_types, self.num_parents, self.parent_dim = num_types, num_parents, parent_dim
        self.num_iters = int(num_iters)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_parents * parent_dim, caps_dim, 3, 3, **dd))
        self.bias = nn.Parameter(torch.empty(num_parents, parent_dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the kernel from He et al.'s normal distribution, set the bias to 0.1, as the authors' code does."""
        nn.init.kaiming_normal_(self.weight)
        nn.init.constant_(self.bias, 0.1)

    def _squash(self, s: Tensor) -> Tensor:
        """Squash ``[B, J, D, P]`` along D."""
        s = s.transpose(2, 3)
        v = reference.squash(s, False) if torch.jit.is_scripting() and not self.fused else squash(s)
        return v.transpose(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Route capsules ``[B, T*K, H, W]`` to capsules ``[B, J*D, H, W]``."""
        height, width = x.shape[2:]
        x = x.to(self.weight.dtype).unflatten(1, (self.num_types, -1))
        bias = self.bias.unsqueeze(2)
        uniform = 1 / (self.num_parents * height * width)
        if self.num_iters == 1:  # votes are linear: their sum is the vote of the sum
            total = F.conv2d(x.sum(dim=1), self.weight, padding=1).to(self.weight.dtype)
            v = self._squash(uniform * total.flatten(2).unflatten(1, (self.num_parents, self.parent_dim)) + bias)
            return v.flatten(1, 2).unflatten(2, (height, width))
        votes = F.conv2d(x.flatten(0, 1), self.weight, padding=1).to(self.weight.dtype)
        votes = votes.flatten(2).unflatten(1, (self.num_parents, self.parent_dim))
        votes = votes.unflatten(0, (-1, self.num_types))  # [B, T, J, D, P]
        v = self._squash(uniform * votes.sum(dim=1) + bias)
        logits = (votes * v.unsqueeze(1)).sum(dim=3)  # [B, T, J, P]
        for iteration in range(1, self.num_iters):
            couplings = logits.flatten(2).softmax(dim=2).view_as(logits)
            v = self._squash((couplings.unsqueeze(3) * votes).sum(dim=1) + bias)
            if iteration < self.num_iters - 1:
                logits = logits + (votes * v.unsqueeze(1)).sum(dim=3)
        return v.flatten(1, 2).unflatten(2, (height, width))

    def extra_repr(self) -> str:
        return (
            f"num_types={self.num_types}, num_parents={self.num_parents}, parent_dim={self.parent_dim}, "
            f"num_iters={self.num_iters}"
        )


class DeconvDecoder(nn.Module):
    """Draw the image that a class capsule stands for, by transposed convolutions, the same for all classes.

    Source: Rajasegaran et al. 2019 (arXiv 1904.09546), section 3.3. There are ReLUs between the convolutions, which the
    authors' code leaves out, and a sigmoid at the end instead of a ReLU.

    Args:
        class_dim: D, the dimension of a class capsule.
        image_shape: (C, H, W) of the images to draw.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        class_dim: int,
        image_shape: tuple[int, int, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        chans, self.height, self.width = image_shape
        self.grid_size = (-(-self.height // 8), -(-self.width // 8))
        self.fc = nn.Linear(class_dim, 16 * self.grid_size[0] * self.grid_size[1], **dd)
        self.norm = nn.BatchNorm2d(16, momentum=0.2, **dd)
        dims = [(16, 64, 1), (64, 32, 2), (32, 16, 2), (16, 8, 2), (8, chans, 1)]
        layers: list[nn.Module] = []
        for in_dim, out_dim, stride in dims:
            layers += [nn.ConvTranspose2d(in_dim, out_dim, 3, stride, padding=1, output_padding=stride - 1, **dd)]
            layers += [nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Draw images from class capsules.

        Args:
            x: Class capsules ``[B, J, D]``.
            target: Class whose capsule is drawn, ``[B]``, int64.

        Returns:
            Images ``[B, C, H, W]`` with values in [0, 1].
        """
        chosen = x.gather(1, target[:, None, None].expand(-1, 1, x.shape[2])).squeeze(1)
        x = self.norm(self.fc(chosen).relu().unflatten(1, (16, self.grid_size[0], self.grid_size[1])))
        return self.layers(x)[:, :, : self.height, : self.width].sigmoid()
