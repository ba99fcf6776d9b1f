"""The operator of self-attention routing: schema, kernels by device, shapes, autograd, and the function to call.

As with `capszoo.kernels.ops`, first derivatives in reverse mode are an operator too, and all others are those of the
reference, which stores the votes.
"""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..checks import check_capsules, check_types
from ..cpu import has_votes
from ..derivatives import (
    compute_dtype,
    no_autocast,
    register_transforms,
    second_gradients,
    transformed_gradients,
)
from ..dispatch import has_tangent, kernel, runs_triton, triton_module, triton_routing
from . import cpu, reference

launchers = triton_module(".self_attention.triton")

# Numbers in the votes of a batch up to which a CPU is faster with the reference: they fit into cache, and what an
# operator costs to call counts. With 16 capsules of 8 numbers and 10 classes of 16 on one core, forward and backward
# took 0.71 ms at 16 samples and the operator 0.93, at 64 samples 1.9 and 1.6, at 128 samples 8.7 and 2.7. So it is with
# one or two samples of more capsules, whose votes are few beside the matrices: 3.4 and 4.2 ms for one of 1152 capsules.
FEW_VOTES = 2**17
FEW_BESIDE_MATRICES = 0.25


@kernel
def _forward(x: Tensor, weight: Tensor, prior: Tensor, attention: bool, tf32: bool = False) -> tuple[Tensor, Tensor]:
    """Sums of weighed votes `[B, J, D]`, and those of all votes `[B, J, D]` that the backward pass needs.

    Without attention the second has no samples. `tf32` allows products in TF32 where the device has it.
    """
    dtype = compute_dtype(x, weight)
    s, total = cpu.forward(x.to(dtype), weight.to(dtype), prior.to(dtype), attention)
    return s.to(x.dtype), total


@kernel
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, prior: Tensor, total: Tensor, attention: bool, tf32: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = total.dtype
    dx, dweight, dprior = cpu.backward(grad.to(dtype), x.to(dtype), weight.to(dtype), prior.to(dtype), total, attention)
    return dx.to(x.dtype), dweight.to(weight.dtype), dprior.to(prior.dtype)


forward_op = torch.library.custom_op("capszoo::self_attention_routing", _forward, mutates_args=())
backward_op = torch.library.custom_op("capszoo::self_attention_routing_backward", _backward, mutates_args=())


# Without attention the couplings are constants, and all is a product of matrices.
def _in_triton(x: Tensor, weight: Tensor, attention: bool, dtype: torch.dtype) -> bool:
    return attention and has_votes(x, weight) and runs_triton(x.device, dtype) and triton_routing.fits(x, weight, 2)


@forward_op.register_kernel("cuda")
@kernel
def _forward_cuda(x, weight, prior, attention, tf32=False):
    if not _in_triton(x, weight, attention, compute_dtype(x, weight)):
        return _forward(x, weight, prior, attention)
    return launchers.forward(x, weight, prior, attention, tf32)


@backward_op.register_kernel("cuda")
@kernel
def _backward_cuda(grad, x, weight, prior, total, attention, tf32):
    if not _in_triton(x, weight, attention, total.dtype):
        return _backward(grad, x, weight, prior, total, attention, tf32)
    return launchers.backward(grad, x, weight, prior, total, attention, tf32)


@forward_op.register_fake
def _(x, weight, prior, attention, tf32=False):
    s = x.new_empty(x.shape[0], *weight.shape[2:])
    total = s if attention else s[:0]
    return s, torch.empty_like(total, dtype=compute_dtype(x, weight), memory_format=torch.contiguous_format)


@backward_op.register_fake
def _(grad, x, weight, prior, total, attention, tf32):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight, prior))


# Derivatives


def _reference(x: Tensor, weight: Tensor, prior: Tensor, attention: bool) -> Tensor:
    with no_autocast(x):
        return reference.self_attention_routing(x, weight, prior, attention)


def _save(ctx, inputs, output):
    x, weight, prior, ctx.attention, ctx.tf32 = inputs
    _, total = output
    ctx.mark_non_differentiable(total)
    ctx.save_for_backward(x, weight, prior, total)


def _gradients(ctx, grad, _):
    return *backward_op(grad, *ctx.saved_tensors, ctx.attention, ctx.tf32), None, None


def _save_backward(ctx, inputs, output):
    *tensors, _, ctx.attention, _ = inputs
    ctx.save_for_backward(*tensors)  # not the total: it is a function of the others, and differentiated as such


def _second_gradients(ctx, *cotangents):
    def function(x, weight, prior):
        return _reference(x, weight, prior, ctx.attention)

    return *second_gradients(function, cotangents, *ctx.saved_tensors), None, None, None


def _transformed(x, weight, prior, attention, tf32=False):
    s, dtype = _reference(x, weight, prior, attention), compute_dtype(x, weight)
    if not attention:
        return s, s[:0].to(dtype)
    with no_autocast(x):
        return s, reference.total_votes(x.to(dtype), weight.to(dtype))


def _backward_transformed(grad, x, weight, prior, total, attention, tf32):
    return transformed_gradients(lambda *inputs: _reference(*inputs, attention), grad, x, weight, prior)


forward_op.register_autograd(_gradients, setup_context=_save)
backward_op.register_autograd(_second_gradients, setup_context=_save_backward)
register_transforms(self_attention_routing=_transformed, self_attention_routing_backward=_backward_transformed)


def _are_few_votes(x: Tensor, weight: Tensor) -> bool:
    """Whether to store them all. A graph does not ask: its operator is for any batch size."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    votes = x.shape[0] * x.shape[1] * weight.shape[2] * weight.shape[3]
    return votes <= max(FEW_VOTES, FEW_BESIDE_MATRICES * weight.numel())


def self_attention_routing(x: Tensor, weight: Tensor, prior: Tensor, attention: bool = True) -> Tensor:
    """Weigh the votes for each class by their agreement with all of them, and add them up.

    Mazzia, Salvetti and Chiaberge (2021, arXiv 2101.12491), section 3.2. Capsule i votes u_ij = x_i W_ij for class j.
    The logit of a vote is the sum of its agreements <u_ij, u_kj> / sqrt(D) with all votes k for its class, the
    couplings c are the softmax of the logits over the classes, and s_j = sum over i of (c_ij + prior_ij) u_ij. Nothing
    is iterated, the I x I matrix of agreements is never made, and votes are stored a tile at a time, or all where they
    are few: both passes recompute what they need, and keep 4 * B * J * D bytes besides the inputs. Higher derivatives,
    forward mode and the transforms of torch.func go through `reference.self_attention_routing`, which stores them.

    Args:
        x: Input capsules, `[B, I, K]`, of any strides. Any size may be 0, here and below.
        weight: A matrix for each capsule and class, `[I, K, J, D]`.
        prior: Added to the couplings, `[I, J]`.
        attention: Otherwise the couplings are 1 / J, and all is one product of matrices.

    Returns:
        The sums `[B, J, D]` before squash, in the dtype of `x`. Dtypes, autocast and TF32 are as in `dynamic_routing`.

    Raises:
        ValueError: If a shape, a dtype or a device does not fit; the message names it and the remedy.
    """
    if has_torch_function_variadic(x, weight, prior):
        return handle_torch_function(self_attention_routing, (x, weight, prior), x, weight, prior, attention)
    check_inputs(x, weight, prior)
    # Autocast is over when the backward pass runs, so it is told to the operator.
    tf32 = False
    if not torch.jit.is_scripting():
        if has_tangent(x, weight, prior) or _are_few_votes(x, weight):
            return _reference(x, weight, prior, attention)
        tf32 = x.is_cuda and torch.is_autocast_enabled("cuda")
    return torch.ops.capszoo.self_attention_routing(x, weight, prior, attention, tf32)[0]


def check_inputs(x: Tensor, weight: Tensor, prior: Tensor) -> None:
    """Check what `self_attention_routing` takes; its errors."""
    check_capsules(x, weight)
    if weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"weight has matrices for {weight.shape[0]} capsules, x has I={x.shape[1]}: give each capsule its own"
        )
    if prior.dim() != 2 or prior.shape[0] != weight.shape[0] or prior.shape[1] != weight.shape[2]:
        raise ValueError(
            f"prior has shape {list(prior.shape)}, weight needs [I, J] = [{weight.shape[0]}, {weight.shape[2]}]"
        )
    check_types(x, weight, prior, "prior")
