"""Capsule layers with inverted dot-product attention routing, convolutional and for classes, and their passes."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import _assert
from torch import Tensor, nn

from capszoo.kernels import inverted_attention_couplings
from capszoo.kernels.inverted_attention import reference

from .config import FollowsFusedRouting
from .functional import inverted_attention_routing
from .memory_format import apply_contiguously

__all__ = ["InvertedAttentionCaps", "InvertedAttentionConvCaps", "MatrixPrimaryCaps"]


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
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.flatten(-2).permute(0, 3, 1, 2)


class _InvertedAttention(FollowsFusedRouting, nn.Module):
    """What both layers are: vote matrices, a pass of routing, and the layer normalisation of its sums."""

    _apply = apply_contiguously

    def __init__(self, children: tuple[int, ...], num_parents: int, pose_size: int, stride: int, **dd: Any):
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(*children, pose_size, pose_size, num_parents, **dd))
        self.norm = nn.LayerNorm(pose_size**2, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices so that the sums of the first pass, which divides them by J, have a variance of 1 / J."""
        *children, side, _, num_parents = self.weight.shape
        nn.init.normal_(self.weight, std=math.sqrt(num_parents / max(1, side * math.prod(children))))
        self.norm.reset_parameters()

    def _route(self, x: Tensor, weight: Tensor, parents: Tensor | None) -> Tensor:
        """One pass; `weight` is ``[k, k, I, P, P, J]``."""
        # Under autocast x may come in half precision; agreements need more than its 8 bits.
        x = x.to(weight.dtype)
        if parents is not None:
            parents = parents.to(weight.dtype)
        if torch.jit.is_scripting() and not self.fused and parents is not None:
            sums = reference.inverted_attention_routing(x, weight, parents, self.stride)
        else:
            sums = inverted_attention_routing(x, weight, parents, self.stride)
        poses = self.norm(sums.permute(0, 4, 5, 1, 2, 3).flatten(4))
        return poses.unflatten(4, [weight.shape[3], weight.shape[4]]).permute(0, 3, 4, 5, 1, 2)


class InvertedAttentionConvCaps(_InvertedAttention):
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
        children = (kernel_size, kernel_size, num_types)
        super().__init__(children, num_parents, pose_size, stride, device=device, dtype=dtype)

    def forward(self, x: Tensor, parents: Tensor | None = None) -> Tensor:
        """Route poses ``[B, I, P, P, H, W]`` to parents ``[B, J, P, P, H', W']``.

        Args:
            x: Poses of the map below.
            parents: Poses of this layer after the pass before; None in the first, whose couplings are 1 / J.
        """
        return self._route(x, self.weight, parents)

    def extra_repr(self) -> str:
        kernel_size, _, num_types, pose_size, _, num_parents = self.weight.shape
        return (
            f"num_types={num_types}, num_parents={num_parents}, pose_size={pose_size}, kernel_size={kernel_size}, "
            f"stride={self.stride}"
        )


class InvertedAttentionCaps(_InvertedAttention):
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
        super().__init__((num_capsules,), num_classes, pose_size, 1, device=device, dtype=dtype)
        self.num_capsules = num_capsules

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
        return self._route(x.unsqueeze(4).unsqueeze(5), self.weight.unsqueeze(0).unsqueeze(0), parents)

    @torch.jit.ignore
    def couplings(self, x: Tensor, parents: Tensor | None = None) -> Tensor:
        """Couplings ``[B, I, J]`` of a pass of :meth:`forward`, by the operator's own arithmetic."""
        x = x.permute(0, 1, 4, 5, 2, 3).flatten(1, 3).to(self.weight.dtype)
        parents = None if parents is None else parents.to(self.weight.dtype)
        found = inverted_attention_couplings(x[..., None, None], self.weight[None, None], parents)
        return found.squeeze(4).squeeze(3)

    def extra_repr(self) -> str:
        num_capsules, pose_size, _, num_classes = self.weight.shape
        return f"num_capsules={num_capsules}, num_classes={num_classes}, pose_size={pose_size}"
