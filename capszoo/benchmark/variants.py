"""The variants that are compared: ours, and others of routing, of convolutions, and of the whole step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from capszoo.errors import UsageError
from capszoo.kernels import dynamic_routing
from capszoo.layers import ClassCaps
from capszoo.registry import create_model

__all__ = [
    "Routing",
    "no_routing",
    "plain_bytes",
    "plain_dynamic_routing",
    "require_memory",
    "routing_function",
    "routes_dynamically",
    "routing_shape",
]


def plain_dynamic_routing(x: Tensor, weight: Tensor, bias: Tensor, num_iters: int = 3) -> Tensor:
    """Routing as public PyTorch codes write it, with their [B, I, K, J*D] product in memory.

    Shapes as in :func:`capszoo.kernels.dynamic_routing`.
    """
    num_types, _, num_classes, class_dim = weight.shape
    matrices = weight.repeat_interleave(x.shape[1] // num_types, dim=0).flatten(2)
    votes = (x[:, :, :, None] * matrices[None]).sum(dim=2).unflatten(2, (num_classes, class_dim))
    logits = torch.zeros_like(votes[..., 0])
    for iteration in range(num_iters):
        couplings = logits.softmax(dim=2)
        s = (couplings[..., None] * votes).sum(dim=1) + bias
        square = s.square().sum(dim=2, keepdim=True)
        v = square / (1 + square) * s / (square.sqrt() + 1e-8)
        if iteration < num_iters - 1:
            logits = logits + (votes * v[:, None]).sum(dim=3)
    return v


def plain_bytes(batch_size: int, shape: tuple[int, ...], backward: bool = True, size: int = 4) -> int:
    """About the peak of :func:`plain_dynamic_routing`: its products, K times the size of the votes, and votes."""
    capsules, _, caps_dim, num_classes, class_dim = shape
    votes = batch_size * capsules * num_classes * class_dim * size
    return votes * (2 * caps_dim + 3 if backward else caps_dim + 1)


def no_routing(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Class capsules cut from the primary capsules."""
    num_classes, class_dim = bias.shape
    return x.flatten(1)[:, : num_classes * class_dim].unflatten(1, (num_classes, class_dim)) + bias


class Routing(nn.Module):
    """A routing function in the place of a model's routing."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.function(x, weight, bias)


@dataclass(frozen=True)
class Variant:
    """How a network and its step are made."""

    routing: str = "fused"
    """'fused', as models use it; 'unfused', the reference of the same operator; 'uniform', its family's form without;
    else a name of :func:`routing_function`."""
    fourier_conv: bool = True
    channels_last: bool = True
    fused_optimizer: bool = True
    keeps_memory: bool = True
    """Whether freed memory stays with the process, as in the recipes."""
    low_precision: bool = True
    """Whether it runs in the precision that the benchmark is asked for, else in float32."""


VARIANTS = {
    "fused": Variant(),
    "direct": Variant(fourier_conv=False),
    "plain": Variant(routing="plain"),
    "compiled": Variant(routing="compiled"),
    "none": Variant(routing="none"),
    "unfused": Variant(routing="unfused"),
    "uniform": Variant(routing="uniform"),
    # As public codes train the network: FasTrCaps's, and those of 2017.
    "reference": Variant(
        "plain",
        fourier_conv=False,
        channels_last=False,
        fused_optimizer=False,
        keeps_memory=False,
        low_precision=False,
    ),
}


def routing_function(variant: str) -> Callable:
    """The routing of a variant."""
    routing = VARIANTS[variant].routing
    if routing == "compiled":
        return torch.compile(plain_dynamic_routing, fullgraph=True, dynamic=False)
    return {"fused": dynamic_routing, "plain": plain_dynamic_routing, "none": no_routing}[routing]


def routes_dynamically(name: str) -> bool:
    """Whether a model's class capsules are reached by dynamic routing, which alone has other forms to compare."""
    return isinstance(getattr(create_model(name, device="meta"), "class_caps", None), ClassCaps)


def routing_shape(name: str) -> tuple[int, ...]:
    """I, T, K, J, D of a model.

    Raises:
        UsageError: If it has no dynamic routing.
    """
    caps = getattr(create_model(name, device="meta"), "class_caps", None)
    if not isinstance(caps, ClassCaps):
        raise UsageError(f"model {name!r} has no routing to measure: choose one of capsnet*")
    return caps.num_capsules, *caps.weight.shape


def require_memory(variant: str, bytes_needed: int, device: torch.device) -> None:
    """Fail before the plain form fills the device; a CPU, whose free memory is not known, is left to try."""
    if VARIANTS[variant].routing != "plain" or device.type != "cuda":
        return
    free = torch.cuda.mem_get_info(device)[0]
    if bytes_needed > free:
        raise torch.OutOfMemoryError(f"needs some {bytes_needed >> 30} GiB, {free >> 30} GiB are free")
