"""Class capsules: the layer that routes primary capsules to one capsule per class."""

import difflib
from typing import Any

import torch
from timm.layers import _assert
from torch import Tensor, nn

from capszoo.kernels import reference, routing_couplings

from .config import FollowsFusedRouting
from .functional import dynamic_routing
from .memory_format import apply_contiguously

__all__ = ["ClassCaps", "DynamicRouting", "create_routing", "list_routings"]

# Far above what any paper uses, and a bound to what the header of a file can make a forward pass cost.
_MAX_ITERS = 100


class DynamicRouting(FollowsFusedRouting, nn.Module):
    """Routing by agreement with a softmax over the classes (Sabour, Frosst and Hinton 2017, procedure 1).

    Args:
        num_iters: R, the number of routing iterations.
        approximate_squash: Use the paper's cheap approximation of squash.

    Raises:
        ValueError: If num_iters is not a whole number from 1 to 100.
    """

    def __init__(self, num_iters: int = 3, approximate_squash: bool = False):
        super().__init__()
        if num_iters not in range(1, _MAX_ITERS + 1):
            raise ValueError(
                f"num_routing={num_iters} is not possible: routing takes 1 to {_MAX_ITERS} whole iterations"
            )
        self.num_iters = int(num_iters)
        self.approximate_squash = approximate_squash

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Route capsules ``[B, I, K]`` with ``weight [T, K, J, D]`` and ``bias [J, D]`` to ``[B, J, D]``."""
        if torch.jit.is_scripting() and not self.fused:
            return reference.dynamic_routing(x, weight, bias, self.num_iters, self.approximate_squash)
        return dynamic_routing(x, weight, bias, self.num_iters, self.approximate_squash)

    @torch.jit.ignore
    def couplings(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Couplings of each iteration, ``[R, B, I, J]``, see :func:`capszoo.kernels.routing_couplings`."""
        compute = routing_couplings if self.fused else reference.dynamic_routing_couplings
        return compute(x, weight, bias, self.num_iters, self.approximate_squash)

    def extra_repr(self) -> str:
        return f"num_iters={self.num_iters}, approximate_squash={self.approximate_squash}"


_ROUTINGS = {"dynamic": DynamicRouting}


def list_routings() -> list[str]:
    """Names that models take as ``routing=``."""
    return sorted(_ROUTINGS)


def create_routing(name: str, num_iters: int = 3, approximate_squash: bool = False) -> nn.Module:
    """Make a routing module by name; every one takes ``(x [B, I, K], weight [T, K, J, D], bias [J, D])``.

    Raises:
        ValueError: If no routing has this name.
    """
    if name not in _ROUTINGS:
        near = difflib.get_close_matches(str(name), _ROUTINGS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown routing {name!r}{hint} Known: {', '.join(list_routings())}")
    return _ROUTINGS[name](num_iters, approximate_squash)


class ClassCaps(nn.Module):
    """Votes by a learned matrix per capsule (or per capsule type), routed to one capsule per class.

    Source: Sabour, Frosst and Hinton 2017, section 4 ("DigitCaps"); weight sharing after FasTrCaps section III.

    Args:
        num_capsules: I, the number of incoming capsules.
        caps_dim: K, their dimension.
        num_classes: J, the number of class capsules.
        class_dim: D, their dimension.
        num_weights: T, the number of vote matrices. T = I gives each capsule its own; where T < I, the I/T
            consecutive capsules of a type share one.
        num_routing: R, the number of routing iterations.
        routing: Name of the routing, see :func:`capszoo.layers.list_routings`.
        approximate_squash: Use the paper's cheap approximation of squash.
        init_std: Standard deviation of fresh vote matrices, which are normally distributed.
        init_bias: Value of a fresh bias. Not zero by default: class capsules near zero have near-zero gradients, since
            squash is quadratic there.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    _apply = apply_contiguously

    def __init__(
        self,
        num_capsules: int,
        caps_dim: int,
        num_classes: int,
        class_dim: int = 16,
        num_weights: int | None = None,
        num_routing: int = 3,
        routing: str = "dynamic",
        approximate_squash: bool = False,
        init_std: float = 0.1,
        init_bias: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        num_weights = num_capsules if num_weights is None else num_weights
        if num_capsules % num_weights:
            raise ValueError(f"num_weights={num_weights} does not divide the {num_capsules} capsules")
        self.num_capsules = num_capsules
        self.init_std, self.init_bias = init_std, init_bias
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_weights, caps_dim, num_classes, class_dim, **dd))
        self.bias = nn.Parameter(torch.empty(num_classes, class_dim, **dd))
        self.routing = create_routing(routing, num_routing, approximate_squash)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the vote matrices from a normal distribution, set the bias to one value."""
        nn.init.normal_(self.weight, std=self.init_std)
        nn.init.constant_(self.bias, self.init_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Route capsules ``[B, I, K]`` to class capsules ``[B, J, D]``, in the type of the parameters."""
        # The matrices would also fit a multiple of their number, from larger images, and give wrong numbers silently.
        _assert(
            x.shape[1] == self.num_capsules,
            f"class capsules of {self.num_capsules} capsules got {x.shape[1]}: make the model for this img_size",
        )
        # Under autocast x comes in half precision; lengths near the margins 0.1 and 0.9 need more than 8 bits.
        return self.routing(x.to(self.weight.dtype), self.weight, self.bias)

    @torch.jit.ignore
    def couplings(self, x: Tensor) -> Tensor:
        """Couplings of capsules ``[B, I, K]`` to the classes in each iteration, ``[R, B, I, J]``."""
        routing: Any = self.routing
        return routing.couplings(x.to(self.weight.dtype), self.weight, self.bias)

    def extra_repr(self) -> str:
        num_weights, caps_dim, num_classes, class_dim = self.weight.shape
        return (
            f"num_capsules={self.num_capsules}, caps_dim={caps_dim}, num_classes={num_classes}, "
            f"class_dim={class_dim}, num_weights={num_weights}"
        )
