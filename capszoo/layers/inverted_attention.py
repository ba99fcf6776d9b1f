"""Capsule layers with inverted dot-product attention routing, convolutional and for classes, and their passes."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import _assert
from timm.models import checkpoint
from torch import Tensor, nn

from capszoo.kernels.derivatives import no_autocast
from capszoo.kernels.inverted_attention import reference

__all__ = ["InvertedAttentionCaps", "InvertedAttentionConvCaps", "MatrixPrimaryCaps"]

# Bytes of votes that are computed at a time.
_TILE_BYTES = 16 * 2**20


def _uniform_routing(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The first pass, where all couplings are 1 / J: a convolution of the rows of the poses, without votes."""
    k, _, num_types, side, _, num_parents = weight.shape
    rows = x.transpose(1, 2)  # [B, P, I, P, H, W]: the rows of a pose are samples, its columns channels
    if x.shape[4] == k and x.shape[5] == k:
        rows = rows.permute(0, 1, 4, 5, 2, 3).reshape(-1, k * k * num_types * side)
        sums = rows @ weight.reshape(k * k * num_types * side, side * num_parents)
        sums = sums.unflatten(0, (-1, side)).unflatten(2, (side, num_parents))  # [B, P, P, J]
        return sums.permute(0, 3, 1, 2)[..., None, None] / num_parents
    rows = rows.reshape(-1, num_types * side, x.shape[4], x.shape[5])
    filters = weight.permute(5, 4, 2, 3, 0, 1).reshape(num_parents * side, num_types * side, k, k)
    sums = F.conv2d(rows, filters, stride=stride).unflatten(0, (-1, side)).unflatten(2, (num_parents, side))
    return sums.transpose(1, 2) / num_parents


def _attention_routing(x: Tensor, weight: Tensor, parents: Tensor, stride: int) -> Tensor:
    """Later passes, with the votes of few samples at a time, which the backward pass computes again."""
    batch = x.shape[0]
    bytes_each = weight.numel() * weight.shape[3] * parents.shape[4] * parents.shape[5] * weight.element_size()
    step = max(1, _TILE_BYTES // max(1, bytes_each))
    if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling() or batch <= step:
        return reference.inverted_attention_routing(x, weight, parents, stride)
    tiles = [
        checkpoint(reference.inverted_attention_routing, *tile, stride)
        for tile in ((x, weight, parents) for x, parents in zip(x.split(step), parents.split(step), strict=True))
    ]
    return torch.cat(tiles)


def _normalise(sums: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Layer normalisation of each pose of a map `[B, J, P, P, H, W]`."""
    poses = norm(sums.permute(0, 4, 5, 1, 2, 3).flatten(4))
    return poses.unflatten(4, (sums.shape[2], sums.shape[3])).permute(0, 3, 4, 5, 1, 2)


class MatrixPrimaryCaps(nn.Module):
    """Primary capsules with matrix poses: a 1x1 convolution and a layer normalisation of each pose.

    The map keeps timm's layout ``[B, C, H, W]`` with channel ``(t * P + row) * P + column``.

    Args:
        in_chans: Channels of the incoming map.
        num_types: Capsule types.
        pose_size: P, the side of a pose.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_chans: int,
        num_types: int = 32,
        pose_size: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_types, self.pose_size = num_types, pose_size
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_chans, num_types * pose_size**2, 1, bias=False, **dd)
        # A module, so that a network cut before it can put nn.Identity in its place.
        self.norm: nn.Module = PoseNorm(num_types, pose_size**2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to normalised poses ``[B, T*P*P, H, W]``."""
        return self.norm(self.conv(x))

    def to_capsules(self, x: Tensor) -> Tensor:
        """Reorder a map ``[B, T*P*P, H, W]`` into capsules ``[B, T, P, P, H, W]``."""
        return x.unflatten(1, (self.num_types, self.pose_size, self.pose_size))


class PoseNorm(nn.LayerNorm):
    """Layer normalisation of each pose of a map ``[B, T*K, H, W]``, affine, one for all types."""

    def __init__(self, num_types: int, dim: int, **dd: Any):
        super().__init__(dim, **dd)
        self.num_types, self.dim = num_types, dim

    def forward(self, x: Tensor) -> Tensor:
        # In channels_last memory both permutations are free.
        x = x.permute(0, 2, 3, 1).unflatten(-1, (self.num_types, self.dim))
        return super().forward(x).flatten(-2).permute(0, 3, 1, 2)


class InvertedAttentionConvCaps(nn.Module):
    """Convolutional capsules with matrix poses, routed by inverted dot-product attention.

    Each child in a parent's patch votes by a matrix of its place, its type and the parent's type. Couplings are a
    softmax over the parent types of the agreement of the vote with the parent's pose of the pass before; sums of votes
    are layer-normalised.

    Source: Tsai, Srivastava, Goh and Salakhutdinov 2020 (arXiv 2002.04764), section 3 and procedure 1.

    Args:
        num_types: I, the capsule types of the map below.
        num_parents: J, those of this layer.
        pose_size: P, the side of a pose.
        kernel_size: k, the side of the kernel, in positions.
        stride: Stride of the kernel.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        num_types: int,
        num_parents: int,
        pose_size: int = 4,
        kernel_size: int = 3,
        stride: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.stride = stride
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (kernel_size, kernel_size, num_types, pose_size, pose_size, num_parents)
        self.weight = nn.Parameter(torch.empty(*shape, **dd))
        self.norm = nn.LayerNorm(pose_size**2, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices so that the sums of the first pass, which divides them by J, have a variance of 1 / J."""
        _reset_matrices(self.weight)
        self.norm.reset_parameters()

    def forward(self, x: Tensor, parents: Tensor | None = None) -> Tensor:
        """Route poses ``[B, I, P, P, H, W]`` to parents ``[B, J, P, P, H', W']``.

        Args:
            x: Poses of the map below.
            parents: Poses of this layer after the pass before; None in the first, whose couplings are 1 / J.
        """
        return _route(x, self.weight, parents, self.stride, self.norm)

    def extra_repr(self) -> str:
        kernel_size, _, num_types, pose_size, _, num_parents = self.weight.shape
        return (
            f"num_types={num_types}, num_parents={num_parents}, pose_size={pose_size}, kernel_size={kernel_size}, "
            f"stride={self.stride}"
        )


class InvertedAttentionCaps(nn.Module):
    """Capsules of a whole map with matrix poses, such as class capsules, routed by inverted dot-product attention.

    Each capsule of the map has a matrix for each of this layer, see :class:`InvertedAttentionConvCaps`.

    Args:
        num_capsules: I, the number of incoming capsules.
        num_classes: J, the number of capsules of this layer.
        pose_size: P, the side of a pose.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        num_capsules: int,
        num_classes: int,
        pose_size: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_capsules = num_capsules
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_capsules, pose_size, pose_size, num_classes, **dd))
        self.norm = nn.LayerNorm(pose_size**2, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As :class:`InvertedAttentionConvCaps`."""
        _reset_matrices(self.weight)
        self.norm.reset_parameters()

    def forward(self, x: Tensor, parents: Tensor | None = None) -> Tensor:
        """Route poses ``[B, T, P, P, H, W]``, I = T*H*W, to capsules ``[B, J, P, P, 1, 1]``.

        Args:
            x: Poses of the map below; its capsules are ordered by type, then by position.
            parents: Poses of this layer after the pass before; None in the first, whose couplings are 1 / J.
        """
        x = x.permute(0, 1, 4, 5, 2, 3).flatten(1, 3)
        _assert(
            x.shape[1] == self.num_capsules,
            f"class capsules of {self.num_capsules} capsules got {x.shape[1]}: make the model for this img_size",
        )
        # They are the capsules of a map of one position.
        return _route(x[..., None, None], self.weight[None, None], parents, 1, self.norm)

    def extra_repr(self) -> str:
        num_capsules, pose_size, _, num_classes = self.weight.shape
        return f"num_capsules={num_capsules}, num_classes={num_classes}, pose_size={pose_size}"


def _reset_matrices(weight: Tensor) -> None:
    *children, side, _, num_parents = weight.shape
    nn.init.normal_(weight, std=math.sqrt(num_parents / max(1, side * math.prod(children))))


def _route(x: Tensor, weight: Tensor, parents: Tensor | None, stride: int, norm: nn.LayerNorm) -> Tensor:
    # Under autocast x may come in half precision; agreements need more than its 8 bits.
    x = x.to(weight.dtype)
    if parents is None:
        sums = _uniform_routing(x, weight, stride)
    else:
        with no_autocast(x):
            sums = _attention_routing(x, weight, parents.to(weight.dtype), stride)
    return _normalise(sums, norm)
