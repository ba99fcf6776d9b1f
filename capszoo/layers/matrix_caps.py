"""Matrix capsules: a pose of P x P numbers and an activation each, routed by EM or by variational Bayes.

A map of T types of them is one tensor ``[B, T * P * P + T, H, W]``: first the poses (channel ``(t * P + row) * P +
column``), then the activations. So layers stack as convolutions do, and features keep timm's form.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, register_notrace_module
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from capszoo.kernels import em_couplings, vb_couplings
from capszoo.kernels.gaussian_routing import reference

from .config import FollowsFusedRouting
from .functional import em_routing, vb_routing
from .memory_format import apply_contiguously

__all__ = ["ClassMatrixCaps", "ConvMatrixCaps", "PosePrimaryCaps", "join_matrix_capsules", "split_matrix_capsules"]

METHODS = ("em", "vb")


def split_matrix_capsules(x: Tensor, num_types: int, pose_size: int) -> tuple[Tensor, Tensor]:
    """A map ``[B, T * P * P + T, H, W]`` as poses ``[B, T, P, P, H, W]`` and activations ``[B, T, H, W]``."""
    channels = num_types * pose_size * pose_size
    return x[:, :channels].unflatten(1, (num_types, pose_size, pose_size)), x[:, channels:]


def join_matrix_capsules(poses: Tensor, activations: Tensor) -> Tensor:
    """The inverse of :func:`split_matrix_capsules`."""
    return torch.cat((poses.flatten(1, 3), activations.to(poses.dtype)), dim=1)


@register_notrace_function
def map_coordinates(x: Tensor, pose_size: int) -> Tensor:
    """Where on a map ``[B, C, h, w]`` a capsule is, from 0 to 1, in the last column of poses: ``[h, w, P, P]``."""
    if has_torch_function_unary(x):  # torch.fx records the call
        return handle_torch_function(map_coordinates, (x,), x, pose_size)
    h, w = x.shape[2], x.shape[3]
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = (torch.arange(h, device=x.device, dtype=dtype) + 0.5) / h
    columns = (torch.arange(w, device=x.device, dtype=dtype) + 0.5) / w
    coordinates = torch.stack((rows[:, None].expand(h, w), columns.expand(h, w)), dim=-1).unsqueeze(-1)
    return F.pad(coordinates, (pose_size - 1, 0, 0, pose_size - 2))


class PosePrimaryCaps(nn.Module):
    """Primary capsules: a 1x1 convolution to poses and to the logits of activations.

    Source: Hinton, Sabour and Frosst 2018, section 4; with `norm` Ribeiro et al. 2020, where poses and logits go
    through BatchNorm (one mean and variance for all numbers of a type's poses) and the convolution has no bias.

    Args:
        in_chans: Channels of the incoming map.
        num_types: T, the number of capsule types.
        pose_size: P, the side of a pose matrix.
        norm: BatchNorm instead of the bias.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_chans: int,
        num_types: int,
        pose_size: int = 4,
        norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_types, self.pose_size = num_types, pose_size
        channels = num_types * (pose_size * pose_size + 1)
        self.conv = nn.Conv2d(in_chans, channels, 1, bias=not norm, **dd)
        self.norm_poses = nn.BatchNorm3d(num_types, **dd) if norm else nn.Identity()
        self.norm_activations = nn.BatchNorm2d(num_types, **dd) if norm else nn.Identity()
        nn.init.xavier_uniform_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_chans, H, W]`` to capsules ``[B, T * P * P + T, H, W]``."""
        poses, activations = split_matrix_capsules(self.conv(x), self.num_types, self.pose_size)
        shape = poses.shape
        poses = self.norm_poses(poses.flatten(2, 3)).view(shape)
        return join_matrix_capsules(poses, self.norm_activations(activations).sigmoid())


@register_notrace_module
class ScoreNorm(nn.Module):
    """BatchNorm without parameters, by its running statistics where a batch has but one score of a type."""

    def __init__(self, num_types: int, **dd: Any):
        super().__init__()
        self.norm = nn.BatchNorm2d(num_types, affine=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:  # which has no variance
            return F.batch_norm(x, self.norm.running_mean, self.norm.running_var, training=False, eps=self.norm.eps)
        return self.norm(x)


class _MatrixRouting(FollowsFusedRouting, nn.Module):
    """Matrices and routing parameters of a layer whose children compete for parents, by EM or variational Bayes."""

    _apply = apply_contiguously

    def __init__(
        self,
        in_types: int,
        out_types: int,
        kernel_shape: tuple[int, ...],
        stride: int,
        pose_size: int,
        method: str,
        num_routing: int,
        final_lambda: float,
        **dd: Any,
    ):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"unknown routing {method!r}. Known: {', '.join(METHODS)}")
        if num_routing < 1:
            raise ValueError(f"num_routing={num_routing} is not possible: give 1 (uniform couplings) or more")
        self.in_types, self.out_types, self.pose_size, self.stride = in_types, out_types, pose_size, stride
        self.method, self.num_routing, self.final_lambda = method, num_routing, final_lambda
        # Lambda in the last iteration of EM. Divided by it, beta_a is a part of the logit of an activation: itself it
        # would have to become thousands, for which an optimizer's steps are too small. From -2 on: without votes a
        # parent starts nearly inactive, and not at one half.
        self.last_lambda = final_lambda * (1 - 0.95**num_routing)
        self.weight = nn.Parameter(torch.empty(in_types, *kernel_shape, out_types, pose_size, pose_size, **dd))
        self.beta_u = nn.Parameter(torch.empty(out_types, **dd))
        self.beta_a = nn.Parameter(torch.empty(out_types, **dd))
        vb = method == "vb"
        self.norm_poses = nn.BatchNorm3d(out_types, affine=False, **dd) if vb else nn.Identity()
        self.norm_scores = ScoreNorm(out_types, **dd) if vb else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices as Ribeiro et al. do: Glorot's uniform, whose fans count all numbers of poses."""
        fans = self.weight.numel() // (self.in_types * self.out_types) * (self.in_types + self.out_types)
        bound = math.sqrt(6 / fans)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.beta_u)
        nn.init.zeros_(self.beta_a)

    def route(self, poses: Tensor, activations: Tensor, weight: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
        """Route poses ``[B, I, P, P, h, w]`` and activations ``[B, I, h, w]`` by matrices ``[I, Kh, Kw, J, P, P]``."""
        if self.method == "em":
            beta_a = (self.beta_a - 2) / self.last_lambda
            num_routing, final_lambda = self.num_routing, self.final_lambda
            if torch.jit.is_scripting() and not self.fused:
                return reference.em_routing(
                    poses, activations, weight, self.beta_u, beta_a, offset, self.stride, num_routing, final_lambda
                )
            return em_routing(
                poses, activations, weight, self.beta_u, beta_a, offset, self.stride, num_routing, final_lambda
            )
        if torch.jit.is_scripting() and not self.fused:
            poses, scores = reference.vb_routing(
                poses, activations, weight, self.beta_u, self.beta_a, offset, self.stride, self.num_routing
            )
        else:
            poses, scores = vb_routing(
                poses, activations, weight, self.beta_u, self.beta_a, offset, self.stride, self.num_routing
            )
        shape = poses.shape
        return self.norm_poses(poses.flatten(2, 3)).view(shape), self.norm_scores(scores).sigmoid()

    def extra_repr(self) -> str:
        return (
            f"in_types={self.in_types}, out_types={self.out_types}, stride={self.stride}, pose_size={self.pose_size}, "
            f"method={self.method!r}, num_routing={self.num_routing}"
        )


class ConvMatrixCaps(_MatrixRouting):
    """A convolution of matrix capsules: each votes by a matrix for every type above, at every position it reaches.

    Sources: Hinton, Sabour and Frosst 2018, section 4 ('em'); Ribeiro, Leontidis and Kollias 2020 ('vb'), whose poses
    and scores go through a BatchNorm without parameters.

    Args:
        in_types: I, types of the incoming capsules.
        out_types: J, types of the outgoing capsules.
        kernel_size: Side of the square kernel.
        stride: Its stride.
        pose_size: P, the side of a pose matrix.
        method: 'em' or 'vb'.
        num_routing: Iterations; with 1 the couplings are uniform, which is the layer without routing.
        final_lambda: What lambda tends to in 'em': the weight of the votes' cost in the logit of an activation.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If `method` is unknown, or `num_routing` below 1.
    """

    def __init__(
        self,
        in_types: int,
        out_types: int,
        kernel_size: int = 3,
        stride: int = 1,
        pose_size: int = 4,
        method: str = "em",
        num_routing: int = 3,
        final_lambda: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        kernel = (kernel_size, kernel_size)
        super().__init__(
            in_types,
            out_types,
            kernel,
            stride,
            pose_size,
            method,
            num_routing,
            final_lambda,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map capsules ``[B, I * P * P + I, h, w]`` to capsules ``[B, J * P * P + J, H, W]``."""
        poses, activations = split_matrix_capsules(x, self.in_types, self.pose_size)
        poses, activations = self.route(poses, activations, self.weight, None)
        return join_matrix_capsules(poses, activations)


class ClassMatrixCaps(_MatrixRouting):
    """Class capsules: a kernel as large as the map, whose matrices are the same at all places, and coordinates.

    The place of a capsule is added to its votes, in the first two numbers of the last column, where an affine
    transformation has its translation (Hinton et al. 2018, section 4.1, "coordinate addition").

    Args:
        in_types: I, types of the incoming capsules.
        num_classes: J.
        pose_size: P, at least 2.
        method: 'em' or 'vb'.
        num_routing: Iterations; with 1 the couplings are uniform.
        final_lambda: As in `ConvMatrixCaps`.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_types: int,
        num_classes: int,
        pose_size: int = 4,
        method: str = "em",
        num_routing: int = 3,
        final_lambda: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_types, num_classes, (), 1, pose_size, method, num_routing, final_lambda, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map capsules ``[B, I * P * P + I, h, w]`` to poses ``[B, J, P, P]`` and activations ``[B, J]`` of classes."""
        poses, activations = split_matrix_capsules(x, self.in_types, self.pose_size)
        poses, activations = self.route(poses, activations, self._matrices(x), map_coordinates(x, self.pose_size))
        return poses.squeeze(5).squeeze(4), activations.squeeze(3).squeeze(2)

    def _matrices(self, x: Tensor) -> Tensor:
        return self.weight[:, None, None].expand(-1, x.shape[2], x.shape[3], -1, -1, -1)

    def to_capsules(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A map as poses ``[B, I * h * w, P, P]`` and activations ``[B, I * h * w]``, by type, then by position."""
        poses, activations = split_matrix_capsules(x, self.in_types, self.pose_size)
        return poses.permute(0, 1, 4, 5, 2, 3).flatten(1, 3), activations.flatten(1)

    @torch.jit.ignore
    def couplings(self, x: Tensor) -> Tensor:
        """Couplings of the capsules of a map to the classes in each iteration, ``[R, B, I * h * w, J]``."""
        poses, activations = split_matrix_capsules(x, self.in_types, self.pose_size)
        inputs = (poses, activations, self._matrices(x), self.beta_u)
        offset = map_coordinates(x, self.pose_size)
        if self.method == "em":
            beta_a = (self.beta_a - 2) / self.last_lambda
            found = em_couplings(*inputs, beta_a, offset, 1, self.num_routing, self.final_lambda)
        else:
            found = vb_couplings(*inputs, self.beta_a, offset, 1, self.num_routing)
        return found.flatten(3)
