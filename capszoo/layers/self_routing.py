"""Self-routing: each capsule chooses by itself, from its own pose, to which parents it goes; nothing is iterated.

Poses are vectors of dimension K, and each capsule has an activation a in (0, 1), of which these layers take and give
the logarithm. So log a_j is finite whatever the poses are, where log of a sum of products of sigmoids and softmaxes
becomes log 0 as soon as one of them underflows.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import _assert
from torch import Tensor, nn

from .functional import weighted_votes

__all__ = [
    "ConvSelfRouting",
    "PoseCaps",
    "SelfRouting",
    "drop_capsules",
    "join_capsules",
    "self_routing_scores",
    "split_capsules",
]

COUPLINGS = ("self", "uniform")


def split_capsules(x: Tensor, num_types: int) -> tuple[Tensor, Tensor]:
    """Take a map apart into its capsules.

    Args:
        x: Map ``[B, A*(1 + K), H, W]``: the logarithms of the activations of A types, then their poses by type.
        num_types: A.

    Returns:
        Poses ``[B, H, W, A, K]`` and logarithms of activations ``[B, H, W, A]``; views, in channels-last memory with K
        innermost.
    """
    x = x.permute(0, 2, 3, 1)
    log_activations, poses = x.split([num_types, x.shape[-1] - num_types], dim=-1)
    return poses.unflatten(-1, (num_types, -1)), log_activations


def join_capsules(poses: Tensor, log_activations: Tensor) -> Tensor:
    """Put capsules together to a map, the inverse of :func:`split_capsules`."""
    return torch.cat([log_activations, poses.flatten(-2)], dim=-1).permute(0, 3, 1, 2)


def drop_capsules(x: Tensor, num_types: int, drop_rate: float, training: bool) -> Tensor:
    """Leave capsules of a map out at random, which then have no share in the classes; the others stay as they are.

    Args:
        x: Map ``[B, A*(1 + K), H, W]``, see :func:`split_capsules`.
        num_types: A.
        drop_rate: Probability of each capsule to be left out, from 0 to 1.
        training: Otherwise the map is returned as it is.
    """
    poses, log_activations = split_capsules(x, num_types)
    left_out = F.dropout(torch.ones_like(log_activations), drop_rate, training) == 0
    # Finite, so that all of them may be left out, and in the range of every type.
    return join_capsules(poses, log_activations.masked_fill(left_out, -1e4))


def check_couplings(couplings: str) -> None:
    """Check the name of couplings.

    Raises:
        ValueError: If it is unknown.
    """
    if couplings not in COUPLINGS:
        raise ValueError(f"unknown couplings {couplings!r}. Known: {', '.join(COUPLINGS)}")


def self_routing_scores(
    poses: Tensor, log_activations: Tensor, weight: Tensor, bias: Tensor, couplings: str = "self"
) -> Tensor:
    """Class scores of capsules that route themselves (Hahn, Pyeon and Kim 2019, equations 4 and 5).

    With r_ij = softmax_j(w_ij . p_i + b_ij), a_j = sum_i a_i r_ij / sum_i a_i. These sum to 1 over the classes.

    Args:
        poses: p ``[B, I, K]``.
        log_activations: log a ``[B, I]``.
        weight: w ``[I, J, K]``.
        bias: b ``[I, J]``.
        couplings: 'self', or 'uniform' for one decision of all capsules together: softmax_j of the mean of their
            logits, weighted by a_i. (Couplings of 1 / J would give each class 1 / J.)

    Returns:
        log a_j ``[B, J]``, in float32 at least.
    """
    logits = routing_logits(poses, weight, bias)
    shares = log_activations.to(logits.dtype).log_softmax(dim=1).t().contiguous().unsqueeze(1)  # log (a_i / sum_i a_i)
    if couplings == "uniform":
        return (shares.exp() * logits).sum(dim=0).log_softmax(dim=0).t()
    return (shares + logits.log_softmax(dim=1)).logsumexp(dim=0).t()


def routing_logits(poses: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The logits w_ij . p_i + b_ij of the couplings of :func:`self_routing_scores`, ``[I, J, B]``."""
    # A product of its own for each capsule, [B, K] by [K, J], in half precision under autocast. Then images come last:
    # a softmax over few classes, each beside the next in memory, takes a CPU 20 times as long.
    logits = torch.bmm(poses.transpose(0, 1), weight.transpose(1, 2)).transpose(1, 2) + bias.unsqueeze(2)
    return logits.to(torch.promote_types(weight.dtype, torch.float32))


class PoseCaps(nn.Module):
    """Primary capsules with a pose and an activation: a convolution, BatchNorm, and a sigmoid of the activations alone.

    Source: Hahn, Pyeon and Kim 2019 (section 3.2). One convolution makes both.

    Args:
        in_chans: Channels of the incoming map.
        num_types: A, the number of capsule types.
        caps_dim: K, the dimension of a pose.
        kernel_size: Side of the square kernel, in pixels; the map is padded to keep its size.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_chans: int,
        num_types: int = 32,
        caps_dim: int = 16,
        kernel_size: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_types = num_types
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        channels = num_types * (1 + caps_dim)
        self.conv = nn.Conv2d(in_chans, channels, kernel_size, padding=kernel_size // 2, bias=False, **dd)
        self.norm = nn.BatchNorm2d(channels, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, in_chans, H, W]`` to capsules ``[B, A*(1 + K), H, W]``, as :func:`split_capsules` takes them."""
        return self.activate(self.conv(x))

    def activate(self, x: Tensor) -> Tensor:
        """Normalise the convolution's map, and take the activations' logarithms."""
        x = self.norm(x)
        logits, poses = x.split([self.num_types, x.shape[1] - self.num_types], dim=1)
        return torch.cat([-F.softplus(-logits), poses], dim=1)  # log sigmoid, by an operation that ONNX has


class ConvSelfRouting(nn.Module):
    """A convolutional layer of capsules that route themselves, with BatchNorm of the poses.

    A capsule of type i at place q of a parent's patch has matrices of its own for each parent type j: with i over
    places and types, r_ij = softmax_j(w_ij . p_i + b_ij), a_j = sum_i a_i r_ij / sum_i a_i, and
    p_j = BatchNorm(sum_i a_i r_ij W_ij p_i / sum_i a_i r_ij). Beyond the border of the map all activations are 0.

    Source: Hahn, Pyeon and Kim 2019, equations 4 to 6. The votes W_ij p_i are not stored, see
    :func:`capszoo.kernels.weighted_votes`.

    Args:
        num_types: A, the types of the capsules below.
        caps_dim: K, the dimension of their poses.
        num_parents: The types of the capsules above.
        parent_dim: The dimension of their poses.
        kernel_size: Side of the square kernel, in capsules; the map is padded to keep its size, but for the stride.
        stride: Stride of the kernel.
        couplings: 'self', or 'uniform' for r_ij = 1 / num_parents, without w and b.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If `couplings` is unknown.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        num_types: int,
        caps_dim: int,
        num_parents: int,
        parent_dim: int,
        kernel_size: int = 3,
        stride: int = 1,
        couplings: str = "self",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_couplings(couplings)
        self.num_types, self.num_parents, self.parent_dim = num_types, num_parents, parent_dim
        self.kernel_size, self.stride, self.couplings = kernel_size, stride, couplings
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        size = kernel_size * kernel_size * num_types
        self.vote_weight = nn.Parameter(torch.empty(size, num_parents, parent_dim, caps_dim, **dd))
        routes = couplings == "self"
        self.register_parameter(
            "weight", nn.Parameter(torch.empty(size, num_parents, caps_dim, **dd)) if routes else None
        )
        self.register_parameter("bias", nn.Parameter(torch.empty(size, num_parents, **dd)) if routes else None)
        self.norm = nn.BatchNorm2d(num_parents * parent_dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the votes' matrices as the paper's code does (BatchNorm undoes their scale); all else is zero."""
        _, num_parents, parent_dim, caps_dim = self.vote_weight.shape
        bound = math.sqrt(6 / (num_parents * parent_dim * caps_dim))
        nn.init.uniform_(self.vote_weight, -bound, bound)
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def _patches(self, x: Tensor, border: float) -> Tensor:
        """What the kernel covers of a map ``[B, C, H, W]`` at each of its positions, ``[k*k, C, H', W', B]``."""
        k, pad, stride = self.kernel_size, self.kernel_size // 2, self.stride
        # Images last from here on: patches are then copied in runs of them, see also `weighted_votes`.
        x = F.pad(x, [pad, pad, pad, pad], value=border).permute(1, 2, 3, 0).contiguous()
        rows, columns = x.shape[1] - k + 1, x.shape[2] - k + 1
        slices = []
        for p in range(k):
            for q in range(k):
                slices.append(x[:, p : p + rows : stride, q : q + columns : stride])
        return torch.stack(slices)

    def forward(self, x: Tensor) -> Tensor:
        """Map capsules ``[B, A*(1 + K), H, W]``, see :func:`split_capsules`, to capsules of the same form above."""
        log_activations, poses = x.to(self.vote_weight.dtype).split(
            [self.num_types, x.shape[1] - self.num_types], dim=1
        )
        poses = self._patches(poses, 0.0).unflatten(1, (self.num_types, -1))  # [k*k, A, K, H', W', B]
        places = poses.shape[3:]
        poses = poses.flatten(3).flatten(0, 1)  # [I, K, N]
        shares = self._patches(log_activations, -math.inf).flatten(2).flatten(0, 1)  # [I, N]
        shares = shares.to(torch.promote_types(shares.dtype, torch.float32)).log_softmax(dim=0).unsqueeze(1)
        weight, bias = self.weight, self.bias  # of which TorchScript knows after the check that they are tensors
        if weight is not None and bias is not None:
            logits = (torch.bmm(weight, poses) + bias.unsqueeze(2)).to(shares.dtype)
            shares = shares + logits.log_softmax(dim=1)  # [I, J, N]
            log_parents = shares.logsumexp(dim=0)
            couplings = (shares - log_parents).exp().to(poses.dtype)
            parents = weighted_votes(couplings, poses, self.vote_weight).flatten(0, 1)
        else:
            log_parents = torch.full_like(shares[0], -math.log(self.num_parents)).expand(self.num_parents, -1)
            # The same for all parents: one product over capsules and dimensions.
            weighted = (shares.exp().to(poses.dtype) * poses).flatten(0, 1)
            parents = self.vote_weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1) @ weighted
        log_parents = log_parents.to(parents.dtype).unflatten(1, places).permute(3, 0, 1, 2)
        parents = parents.unflatten(1, places).permute(3, 0, 1, 2)
        return torch.cat([log_parents, self.norm(parents)], dim=1)

    def extra_repr(self) -> str:
        return (
            f"num_types={self.num_types}, num_parents={self.num_parents}, parent_dim={self.parent_dim}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, couplings={self.couplings!r}"
        )


class SelfRouting(nn.Module):
    """Class scores of all capsules of a map, which route themselves, see :func:`self_routing_scores`.

    Args:
        num_types: A, the number of capsule types.
        caps_dim: K, the dimension of their poses.
        num_classes: J.
        grid_size: Height and width of the map: I = A*H*W capsules, type innermost.
        couplings: 'self', or 'uniform' for the ablation without, see :func:`self_routing_scores`.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If `couplings` is unknown.
    """

    def __init__(
        self,
        num_types: int,
        caps_dim: int,
        num_classes: int,
        grid_size: tuple[int, int],
        couplings: str = "self",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_couplings(couplings)
        self.num_types, self.uniform = num_types, couplings == "uniform"
        self.num_capsules = num_types * grid_size[0] * grid_size[1]
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(self.num_capsules, num_classes, caps_dim, **dd))
        self.bias = nn.Parameter(torch.empty(self.num_capsules, num_classes, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all to zero, as the paper does: at first each capsule goes to all classes alike."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def to_capsules(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[B, A*(1 + K), H, W]`` to its poses ``[B, I, K]`` and logarithms of activations ``[B, I]``."""
        poses, log_activations = split_capsules(x.to(self.weight.dtype), self.num_types)
        return poses.flatten(1, 3), log_activations.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Map capsules ``[B, A*(1 + K), H, W]``, see :func:`split_capsules`, to log-probabilities ``[B, J]``."""
        poses, log_activations = self.to_capsules(x)
        _assert(
            poses.shape[1] == self.num_capsules,
            f"class capsules of {self.num_capsules} capsules got {poses.shape[1]}: make the model for this img_size",
        )
        couplings = "uniform" if self.uniform else "self"
        scores = self_routing_scores(poses, log_activations, self.weight, self.bias, couplings)
        return scores.to(self.weight.dtype)

    @torch.jit.ignore
    @torch.no_grad()
    def couplings(self, x: Tensor) -> Tensor:
        """Couplings r_ij of the capsules of a map to the classes, ``[1, B, I, J]``, 1 / J where they are uniform."""
        poses, _ = self.to_capsules(x)
        if self.uniform:
            return poses.new_full((1, len(poses), *self.bias.shape), 1 / self.bias.shape[1])
        return routing_logits(poses, self.weight, self.bias).softmax(dim=1).permute(2, 0, 1).unsqueeze(0)

    def extra_repr(self) -> str:
        num_capsules, num_classes, caps_dim = self.weight.shape
        couplings = "uniform" if self.uniform else "self"
        return f"num_capsules={num_capsules}, caps_dim={caps_dim}, num_classes={num_classes}, couplings={couplings!r}"
