"""The capsule operators as models call them: fused or reference, opaque to torch.fx, scriptable.

``torch.fx`` cannot trace a choice that depends on where and how a model runs, so each such function here is a leaf of
the traced graph: it hands the tracer's proxies back to the tracer, as PyTorch's own functions do, and is registered
with timm, whose tracers ask by name.
"""

import torch
from timm.layers import register_notrace_function
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from capszoo import kernels
from capszoo.kernels.class_scores import capsule_lengths
from capszoo.kernels.derivatives import no_autocast
from capszoo.kernels.gaussian_routing import by_moments
from capszoo.kernels.gaussian_routing import reference as gaussian_reference
from capszoo.kernels.self_attention import reference as self_attention
from capszoo.kernels.weighted_votes import weighted_votes_reference

from .config import use_fused_routing

__all__ = [
    "capsule_lengths",
    "dynamic_routing",
    "em_routing",
    "inverted_attention_routing",
    "route_by_self_attention",
    "squash",
    "vb_routing",
    "weighted_votes",
]


@register_notrace_function
def squash(x: Tensor, approximate: bool = False) -> Tensor:
    """Squash the vectors of the last dimension, see :func:`capszoo.kernels.squash`."""
    if has_torch_function_unary(x):
        return handle_torch_function(squash, (x,), x, approximate)
    if torch.jit.is_scripting():
        return torch.ops.capszoo.squash(x, approximate)
    if use_fused_routing():
        return kernels.squash(x, approximate)
    return kernels.reference.squash(x, approximate)


@register_notrace_function
def dynamic_routing(
    x: Tensor, weight: Tensor, bias: Tensor, num_iters: int = 3, approximate_squash: bool = False
) -> Tensor:
    """Route capsules ``[B, I, K]`` to class capsules ``[B, J, D]``, see :func:`capszoo.kernels.dynamic_routing`."""
    if has_torch_function_variadic(x, weight, bias):
        return handle_torch_function(dynamic_routing, (x, weight, bias), x, weight, bias, num_iters, approximate_squash)
    if torch.jit.is_scripting():
        return torch.ops.capszoo.dynamic_routing(x, weight, bias, num_iters, approximate_squash)[0]
    if use_fused_routing():
        return kernels.dynamic_routing(x, weight, bias, num_iters, approximate_squash)
    return kernels.reference.dynamic_routing(x, weight, bias, num_iters, approximate_squash)


@register_notrace_function
def inverted_attention_routing(x: Tensor, weight: Tensor, parents: Tensor | None = None, stride: int = 1) -> Tensor:
    """Route poses ``[B, I, P, P, H, W]`` to sums of votes ``[B, J, P, P, H', W']``, see
    :func:`capszoo.kernels.inverted_attention_routing`."""
    if has_torch_function_variadic(x, weight):
        return handle_torch_function(inverted_attention_routing, (x, weight), x, weight, parents, stride)
    if parents is None:  # without votes in every form
        return kernels.inverted_attention.uniform_routing(x, weight, stride)
    if torch.jit.is_scripting():
        maps = x.permute(0, 4, 5, 1, 2, 3), parents.permute(0, 4, 5, 1, 2, 3)
        sums = torch.ops.capszoo.inverted_attention_routing(maps[0], weight, maps[1], stride)
        return sums.permute(0, 3, 4, 5, 1, 2)
    if use_fused_routing():
        return kernels.inverted_attention_routing(x, weight, parents, stride)
    return kernels.inverted_attention.reference.inverted_attention_routing(x, weight, parents, stride)


@register_notrace_function
def route_by_self_attention(x: Tensor, weight: Tensor, prior: Tensor, attention: bool = True) -> Tensor:
    """Sums of weighed votes ``[B, J, D]``, see :func:`capszoo.kernels.self_attention_routing`."""
    if has_torch_function_variadic(x, weight, prior):
        return handle_torch_function(route_by_self_attention, (x, weight, prior), x, weight, prior, attention)
    if torch.jit.is_scripting():
        return torch.ops.capszoo.self_attention_routing(x, weight, prior, attention)[0]
    if use_fused_routing():
        return kernels.self_attention_routing(x, weight, prior, attention)
    return self_attention.self_attention_routing(x, weight, prior, attention)


@register_notrace_function
def weighted_votes(couplings: Tensor, poses: Tensor, weight: Tensor) -> Tensor:
    """Sum votes under given couplings ``[I, J, N]``, see :func:`capszoo.kernels.weighted_votes`."""
    if has_torch_function_variadic(couplings, poses, weight):
        return handle_torch_function(weighted_votes, (couplings, poses, weight), couplings, poses, weight)
    if torch.jit.is_scripting():
        return weighted_votes_reference(couplings, poses, weight)
    if use_fused_routing():
        return kernels.weighted_votes(couplings, poses, weight)
    return weighted_votes_reference(couplings, poses, weight)


@register_notrace_function
def em_routing(
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
    """Route maps of matrix capsules by EM, see :func:`capszoo.kernels.em_routing`."""
    if has_torch_function_variadic(poses, activations, weight, beta_u, beta_a):
        tensors = (poses, activations, weight, beta_u, beta_a)
        return handle_torch_function(
            em_routing, tensors, poses, activations, weight, beta_u, beta_a, offset, stride, num_iters, final_lambda
        )
    if torch.jit.is_scripting():
        return by_moments.em_routing(
            poses, activations, weight, beta_u, beta_a, offset, stride, num_iters, final_lambda
        )
    if use_fused_routing():
        return kernels.em_routing(poses, activations, weight, beta_u, beta_a, offset, stride, num_iters, final_lambda)
    with no_autocast(poses):
        return gaussian_reference.em_routing(
            poses, activations, weight, beta_u, beta_a, offset, stride, num_iters, final_lambda
        )


@register_notrace_function
def vb_routing(
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    offset: Tensor | None = None,
    stride: int = 1,
    num_iters: int = 3,
) -> tuple[Tensor, Tensor]:
    """Route maps of matrix capsules by variational Bayes, see :func:`capszoo.kernels.vb_routing`."""
    if has_torch_function_variadic(poses, activations, weight, beta_u, beta_a):
        tensors = (poses, activations, weight, beta_u, beta_a)
        return handle_torch_function(
            vb_routing, tensors, poses, activations, weight, beta_u, beta_a, offset, stride, num_iters
        )
    if torch.jit.is_scripting():
        return by_moments.vb_routing(poses, activations, weight, beta_u, beta_a, offset, stride, num_iters)
    if use_fused_routing():
        return kernels.vb_routing(poses, activations, weight, beta_u, beta_a, offset, stride, num_iters)
    with no_autocast(poses):
        return gaussian_reference.vb_routing(poses, activations, weight, beta_u, beta_a, offset, stride, num_iters)
