"""Self-routing: each capsule chooses by itself, from its own pose, to which parents it goes; nothing is iterated.

Poses are vectors of dimension K, and each capsule has an activation a in (0, 1), of which these layers take and give
the logarithm. So log a_j is finite whatever the poses are, where log of a sum of products of sigmoids and softmaxes
becomes log 0 as soon as one of them underflows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import _assert
from torch import Tensor, nn

__all__ = ["PoseCaps", "SelfRouting", "join_capsules", "self_routing_scores", "split_capsules"]

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
    # A product of its own for each capsule, [B, K] by [K, J], in half precision under autocast. Then images come last:
    # a softmax over few classes, each beside the next in memory, takes a CPU 20 times as long.
    logits = torch.bmm(poses.transpose(0, 1), weight.transpose(1, 2)).transpose(1, 2) + bias.unsqueeze(2)
    logits = logits.to(torch.promote_types(weight.dtype, torch.float32))
    shares = log_activations.to(logits.dtype).log_softmax(dim=1).t().contiguous().unsqueeze(1)  # log (a_i / sum_i a_i)
    if couplings == "uniform":
        return (shares.exp() * logits).sum(dim=0).log_softmax(dim=0).t()
    return (shares + logits.log_softmax(dim=1)).logsumexp(dim=0).t()


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
        self.num_types, self.couplings = num_types, couplings
        self.num_capsules = num_types * grid_size[0] * grid_size[1]
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(self.num_capsules, num_classes, caps_dim, **dd))
        self.bias = nn.Parameter(torch.empty(self.num_capsules, num_classes, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set all to zero, as the paper does: at first each capsule goes to all classes alike."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map capsules ``[B, A*(1 + K), H, W]``, see :func:`split_capsules`, to log-probabilities ``[B, J]``."""
        poses, log_activations = split_capsules(x.to(self.weight.dtype), self.num_types)
        poses, log_activations = poses.flatten(1, 3), log_activations.flatten(1)
        _assert(
            poses.shape[1] == self.num_capsules,
            f"class capsules of {self.num_capsules} capsules got {poses.shape[1]}: make the model for this img_size",
        )
        return self_routing_scores(poses, log_activations, self.weight, self.bias, self.couplings)

    def extra_repr(self) -> str:
        num_capsules, num_classes, caps_dim = self.weight.shape
        return (
            f"num_capsules={num_capsules}, caps_dim={caps_dim}, num_classes={num_classes}, couplings={self.couplings!r}"
        )
