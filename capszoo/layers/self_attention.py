"""Class capsules reached by self-attention routing: every vote is weighed once, and nothing is iterated."""

import math

import torch
from timm.layers import _assert
from torch import Tensor, nn

from capszoo.kernels import self_attention_couplings
from capszoo.kernels.self_attention import reference

from .config import FollowsFusedRouting
from .functional import route_by_self_attention
from .memory_format import apply_contiguously

__all__ = ["SelfAttentionRouting", "exponential_squash", "self_attention_routing"]

COUPLINGS = ("attention", "uniform")


def exponential_squash(x: Tensor) -> Tensor:
    """``v = (1 - exp(-|x|)) x / |x|`` along the last dimension (Mazzia, Salvetti and Chiaberge 2021, equation 2).

    Unlike the squash of Sabour et al. it is linear near zero, where its derivative is the identity.

    Args:
        x: Vectors ``[..., D]``.

    Returns:
        Vectors no longer than 1, shaped and typed as `x`; computed in float32 at least.
    """
    s = x.to(torch.promote_types(x.dtype, torch.float32))
    # Squares of large numbers would overflow. What they are divided by cancels out, and is a constant to autograd.
    largest = s.detach().abs().amax(dim=-1, keepdim=True).clamp(min=1)
    scaled = s / largest
    squares = scaled.square().sum(dim=-1, keepdim=True)
    # A square root has no derivative at 0. Where squares vanish in float32, (1 - exp(-n)) / n is 1 in float64 too.
    tiny = squares < 1e-32
    length = torch.where(tiny, 1.0, squares).sqrt()
    half = torch.tanh(largest * length / 2)  # 1 - exp(-n) = 2 t / (1 + t), without the difference; ONNX has no expm1
    return torch.where(tiny, scaled, 2 * half / (1 + half) / length * scaled).to(x.dtype)


def self_attention_routing(votes: Tensor, bias: Tensor, attention: bool = True) -> Tensor:
    """Weigh votes by their agreement with all votes for the class, and add them up (Mazzia et al. 2021, section 3.2).

    With the agreements A_ik = <u_i, u_k> / sqrt(D) of a class's votes, the logit of vote i is sum_k A_ik, which is
    <u_i, sum_k u_k> / sqrt(D). `capszoo.kernels.self_attention_routing` does the same from capsules and matrices.

    Args:
        votes: u ``[B, I, J, D]``.
        bias: Priors, added to the couplings after the softmax over the classes, ``[I, J]``.
        attention: Otherwise the couplings are 1 / J.

    Returns:
        The sums of votes ``[B, J, D]``, not squashed.
    """
    return reference.weigh_votes(votes, bias, attention)


class SelfAttentionRouting(FollowsFusedRouting, nn.Module):
    """Votes by a matrix per capsule and class, weighed by self-attention, summed and squashed.

    Source: Mazzia, Salvetti and Chiaberge 2021 (arXiv 2101.12491), section 3.2.

    Args:
        num_capsules: I, the number of incoming capsules.
        caps_dim: K, their dimension.
        num_classes: J, the number of class capsules.
        class_dim: D, their dimension.
        couplings: 'attention', or 'uniform' for couplings of 1 / J, to measure what the attention brings.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If `couplings` is unknown.
    """

    _apply = apply_contiguously

    def __init__(
        self,
        num_capsules: int,
        caps_dim: int,
        num_classes: int,
        class_dim: int = 16,
        couplings: str = "attention",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if couplings not in COUPLINGS:
            raise ValueError(f"unknown couplings {couplings!r}. Known: {', '.join(COUPLINGS)}")
        self.num_capsules = num_capsules
        self.attention = couplings == "attention"
        shape = (num_capsules, caps_dim, num_classes, class_dim)
        self.weight = nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_capsules, num_classes, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices as the paper's code does: He et al.'s normal, its fan-in counted as Keras does."""
        num_capsules, caps_dim, num_classes, _ = self.weight.shape
        # Keras divides by the deviation that a normal truncated at two has.
        std = math.sqrt(2 / max(1, num_classes * num_capsules * caps_dim)) / 0.87962566103423978
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Route capsules ``[B, I, K]`` to class capsules ``[B, J, D]``."""
        _assert(
            x.shape[1] == self.num_capsules,
            f"class capsules of {self.num_capsules} capsules got {x.shape[1]}: make the model for this img_size",
        )
        # Under autocast x comes in half precision; the sums and lengths need more than its 8 bits.
        x = x.to(self.weight.dtype)
        if torch.jit.is_scripting() and not self.fused:
            s = reference.self_attention_routing(x, self.weight, self.bias, self.attention)
        else:
            s = route_by_self_attention(x, self.weight, self.bias, self.attention)
        return exponential_squash(s)

    @torch.jit.ignore
    def couplings(self, x: Tensor) -> Tensor:
        """Couplings of capsules ``[B, I, K]`` to the classes, with their priors, ``[1, B, I, J]``."""
        found = self_attention_couplings(x.to(self.weight.dtype), self.weight, self.bias, self.attention)
        return found.unsqueeze(0)

    def extra_repr(self) -> str:
        num_capsules, caps_dim, num_classes, class_dim = self.weight.shape
        return (
            f"num_capsules={num_capsules}, caps_dim={caps_dim}, num_classes={num_classes}, class_dim={class_dim}, "
            f"couplings={'attention' if self.attention else 'uniform'!r}"
        )
