"""Layers of the routing operators: what `kernelize` of Hugging Face's `kernels` takes the `forward` of.

They hold no state, as the Hub asks: parameters come as arguments, or belong to the layer whose `forward` is replaced.
"""

from torch import Tensor, nn

from capszoo.kernels import (
    dynamic_routing,
    em_routing,
    inverted_attention_routing,
    self_attention_routing,
    squash,
    vb_routing,
)

__all__ = [
    "DynamicRouting",
    "EMRouting",
    "InvertedAttentionRouting",
    "SelfAttentionRouting",
    "Squash",
    "VBRouting",
]


class Squash(nn.Module):
    """Squash of vectors ``[..., D]``."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor, approximate: bool = False) -> Tensor:
        return squash(x, approximate)


class DynamicRouting(nn.Module):
    """Routing by agreement in place of a layer with `num_iters` and `approximate_squash`, such as capszoo's."""

    can_torch_compile = True
    has_backward = True

    num_iters: int
    approximate_squash: bool

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dynamic_routing(x, weight, bias, self.num_iters, self.approximate_squash)


class SelfAttentionRouting(nn.Module):
    """Sums of votes that self-attention weighs."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor, weight: Tensor, prior: Tensor, attention: bool = True) -> Tensor:
        return self_attention_routing(x, weight, prior, attention)


class InvertedAttentionRouting(nn.Module):
    """Sums of votes for poses of parents, weighed by their agreement with these."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor, weight: Tensor, parents: Tensor, stride: int = 1) -> Tensor:
        return inverted_attention_routing(x, weight, parents, stride)


class EMRouting(nn.Module):
    """Maps of matrix capsules, routed by EM."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        poses: Tensor,
        activations: Tensor,
        weight: Tensor,
        beta_u: Tensor,
        beta_a: Tensor,
        offset: Tensor | None = None,
        stride: int = 1,
        num_iters: int = 3,
        final_lambda: float = 0.01,
    ) -> tuple[Tensor, Tensor]:
        return em_routing(poses, activations, weight, beta_u, beta_a, offset, stride, num_iters, final_lambda)


class VBRouting(nn.Module):
    """Maps of matrix capsules, routed by variational Bayes."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        poses: Tensor,
        activations: Tensor,
        weight: Tensor,
        beta_u: Tensor,
        beta_a: Tensor,
        offset: Tensor | None = None,
        stride: int = 1,
        num_iters: int = 3,
    ) -> tuple[Tensor, Tensor]:
        return vb_routing(poses, activations, weight, beta_u, beta_a, offset, stride, num_iters)
