"""The operators of the `capszoo` namespace: schema, kernels by device, shapes, autograd, and the functions to call.

Each operator is opaque to torch.compile and torch.export: they record one call and do not look into its tiles. The
kernel registered first serves every device by PyTorch operators alone; a device with a kernel of its own adds it with
`dynamic_routing_op.register_kernel("cuda")`, and no caller changes. On CUDA that is Triton, except in float64, and
where Triton or the GPU is missing or too old, which one warning tells.

First derivatives in reverse mode are operators too. All others are those of the reference: second and higher ones by
autograd, whatever the transforms of torch.func ask for, and forward mode. They store the votes, as the reference does.
"""

from functools import partial

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from . import cpu
from .checks import check_capsules, check_types
from .derivatives import (
    compute_dtype,
    register_transforms,
    routing_backward_transformed,
    routing_reference,
    routing_transformed,
    second_gradients,
    squash_backward_transformed,
    squash_reference,
)
from .dispatch import has_tangent, kernel, runs_triton, triton_routing, triton_squash

# An operator may not return memory of its inputs. None does below: `to` passes on a tensor that has the dtype already,
# but only computed ones are returned.


@kernel
def _squash(x: Tensor, approximate: bool) -> Tensor:
    return cpu.squash(x.to(compute_dtype(x, x)), approximate).to(x.dtype).contiguous()


@kernel
def _squash_backward(grad: Tensor, x: Tensor, approximate: bool) -> Tensor:
    dtype = compute_dtype(x, x)
    return cpu.squash_backward(grad.to(dtype), x.to(dtype), approximate).to(x.dtype).contiguous()


@kernel
def _routing(
    x: Tensor, weight: Tensor, bias: Tensor, num_iters: int, approximate_squash: bool, tf32: bool = False
) -> tuple[Tensor, Tensor]:
    """Class capsules `[B, J, D]`, and the sums before squash `[R, B, J, D]` that the backward pass needs.

    `tf32` allows products in TF32 where the device has it; the PyTorch algorithm leaves that to torch's own setting.
    """
    dtype = compute_dtype(x, weight)
    v, sums = cpu.dynamic_routing(x.to(dtype), weight.to(dtype), bias.to(dtype), num_iters, approximate_squash)
    return v.to(x.dtype), sums


@kernel
def _routing_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, sums: Tensor, approximate_squash: bool, tf32: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = sums.dtype
    dx, dweight, dbias = cpu.dynamic_routing_backward(
        grad.to(dtype), x.to(dtype), weight.to(dtype), sums, approximate_squash
    )
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(bias.dtype)


squash_op = torch.library.custom_op("capszoo::squash", _squash, mutates_args=())
squash_backward_op = torch.library.custom_op("capszoo::squash_backward", _squash_backward, mutates_args=())
dynamic_routing_op = torch.library.custom_op("capszoo::dynamic_routing", _routing, mutates_args=())
dynamic_routing_backward_op = torch.library.custom_op(
    "capszoo::dynamic_routing_backward", _routing_backward, mutates_args=()
)


@squash_op.register_kernel("cuda")
@kernel
def _squash_cuda(x, approximate):
    if not runs_triton(x.device, compute_dtype(x, x)):
        return _squash(x, approximate)
    return triton_squash.squash_forward(x, approximate)


@squash_backward_op.register_kernel("cuda")
@kernel
def _squash_backward_cuda(grad, x, approximate):
    if not runs_triton(x.device, compute_dtype(x, x)):
        return _squash_backward(grad, x, approximate)
    return triton_squash.squash_backward(grad, x, approximate)


def _in_triton(x: Tensor, weight: Tensor, num_iters: int, dtype: torch.dtype) -> bool:
    if not cpu.has_votes(x, weight) or not runs_triton(x.device, dtype):
        return False
    return triton_routing.fits(x, weight, num_iters)


@dynamic_routing_op.register_kernel("cuda")
@kernel
def _routing_cuda(x, weight, bias, num_iters, approximate_squash, tf32=False):
    if not _in_triton(x, weight, 1, compute_dtype(x, weight)):
        return _routing(x, weight, bias, num_iters, approximate_squash)
    return triton_routing.dynamic_routing(x, weight, bias, num_iters, approximate_squash, tf32)


@dynamic_routing_backward_op.register_kernel("cuda")
@kernel
def _routing_backward_cuda(grad, x, weight, bias, sums, approximate_squash, tf32):
    if not _in_triton(x, weight, len(sums), sums.dtype):
        return _routing_backward(grad, x, weight, bias, sums, approximate_squash, tf32)
    dx, dweight, dbias = triton_routing.dynamic_routing_backward(grad, x, weight, sums, approximate_squash, tf32)
    return dx, dweight, dbias.to(bias.dtype)


@squash_op.register_fake
def _(x, approximate):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@squash_backward_op.register_fake
def _(grad, x, approximate):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@dynamic_routing_op.register_fake
def _(x, weight, bias, num_iters, approximate_squash, tf32=False):
    v = x.new_empty(x.shape[0], *weight.shape[2:])
    return v, x.new_empty(num_iters, *v.shape, dtype=compute_dtype(x, weight))


@dynamic_routing_backward_op.register_fake
def _(grad, x, weight, bias, sums, approximate_squash, tf32):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight, bias))


# Derivatives


def _save_squash(ctx, inputs, output):
    x, ctx.approximate = inputs
    ctx.save_for_backward(x)


def _squash_gradients(ctx, grad):
    (x,) = ctx.saved_tensors
    return squash_backward_op(grad, x, ctx.approximate), None


def _save_squash_backward(ctx, inputs, output):
    grad, x, ctx.approximate = inputs
    ctx.save_for_backward(grad, x)


def _squash_second_gradients(ctx, *cotangents):
    function = partial(squash_reference, approximate=ctx.approximate)
    return *second_gradients(function, cotangents, *ctx.saved_tensors), None


def _save_routing(ctx, inputs, output):
    x, weight, bias, _, ctx.approximate_squash, ctx.tf32 = inputs
    _, sums = output
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(x, weight, bias, sums)


def _routing_gradients(ctx, grad, _):
    grads = dynamic_routing_backward_op(grad, *ctx.saved_tensors, ctx.approximate_squash, ctx.tf32)
    return *grads, None, None, None


def _save_routing_backward(ctx, inputs, output):
    *tensors, sums, approximate, _ = inputs
    ctx.options = {"num_iters": sums.shape[0], "approximate_squash": approximate}
    ctx.save_for_backward(*tensors)  # not the sums: they are functions of the others, and differentiated as such


def _routing_second_gradients(ctx, *cotangents):
    function = partial(routing_reference, **ctx.options)
    return *second_gradients(function, cotangents, *ctx.saved_tensors), None, None, None


squash_op.register_autograd(_squash_gradients, setup_context=_save_squash)
squash_backward_op.register_autograd(_squash_second_gradients, setup_context=_save_squash_backward)
dynamic_routing_op.register_autograd(_routing_gradients, setup_context=_save_routing)
dynamic_routing_backward_op.register_autograd(_routing_second_gradients, setup_context=_save_routing_backward)


register_transforms(
    squash=squash_reference,
    squash_backward=squash_backward_transformed,
    dynamic_routing=routing_transformed,
    dynamic_routing_backward=routing_backward_transformed,
)


def squash(x: Tensor, approximate: bool = False) -> Tensor:
    """Shorten each vector of the last dimension to a length below 1, and keep its direction.

    ``v = |x|^2 / (1 + |x|^2) x / |x|``: equation 1 of Sabour, Frosst and Hinton (2017). The approximation is that of
    FasTrCaps (arXiv 1905.10142): ``x / 2`` where ``|x| <= 2``, else ``x / |x|``.

    Args:
        x: Vectors, `[..., D]`, of any floating dtype and any strides. Half precision is computed in float32.
        approximate: Use the approximation.

    Returns:
        Vectors in the shape and dtype of `x`, contiguous. Any size may be 0. A zero vector gives zero, and so are all
        derivatives there, never NaN (but for the first with `approximate`, which is 1/2); see `reference.squash`.

    Raises:
        ValueError: If `x` is not floating, or has no dimension.
    """
    if has_torch_function_unary(x):  # torch.fx records the call
        return handle_torch_function(squash, (x,), x, approximate)
    if not x.is_floating_point():
        raise ValueError(f"squash needs floating-point vectors, but x is {x.dtype}: convert it with x.float()")
    if x.dim() < 1:
        raise ValueError("squash works along the last dimension, but x is a scalar: give it shape [..., D]")
    if not torch.jit.is_scripting():
        if has_tangent(x):
            return squash_reference(x, approximate)
    return torch.ops.capszoo.squash(x, approximate)


def dynamic_routing(
    x: Tensor, weight: Tensor, bias: Tensor, num_iters: int = 3, approximate_squash: bool = False
) -> Tensor:
    """Route input capsules to class capsules by agreement.

    Procedure 1 of Sabour, Frosst and Hinton (2017), with the shared weights and the squash approximation of FasTrCaps
    (arXiv 1905.10142). Capsule i votes u_ij = x_i W_ij for class j. From logits of zero, each iteration takes
    couplings c = softmax over j of the logits, v_j = squash(bias_j + sum over i of c_ij u_ij), and adds the agreement
    u_ij . v_j to the logits. Gradients flow through every iteration. Neither votes nor logits are stored: both
    passes recompute what they need, and keep 4 * R * B * J * D bytes besides the inputs. Higher derivatives, forward
    mode and the transforms of torch.func go through `reference.dynamic_routing`, which stores them.

    Args:
        x: Input capsules, `[B, I, K]`, of any strides. Any size may be 0, here and below: without capsules (I) or
            numbers in them (K) each class capsule is its squashed bias.
        weight: Vote matrices, `[T, K, J, D]`. T = I gives each capsule its own; otherwise T divides I, and the I/T
            consecutive capsules of a type share a matrix.
        bias: Added to each sum of votes, `[J, D]`.
        num_iters: Routing iterations R, at least 1.
        approximate_squash: Use the approximation of `squash`.

    Returns:
        Class capsules, `[B, J, D]`, in the dtype of `x`. Computed in float64 if `x` or `weight` is, else in float32,
        under autocast too; dtypes may differ, and each gradient has the dtype of its input. On a GPU the factors of
        products are rounded to TF32 if torch.backends.cuda.matmul allows it, under autocast, and where `x` and
        `weight` are of half precision; sums are float32 always.

    Raises:
        ValueError: If a shape, a dtype, a device or `num_iters` does not fit; the message names it and the remedy.
    """
    if has_torch_function_variadic(x, weight, bias):
        return handle_torch_function(dynamic_routing, (x, weight, bias), x, weight, bias, num_iters, approximate_squash)
    check_inputs(x, weight, bias, num_iters)
    # Autocast asks for speed at 8 or 11 bits. It is over when the backward pass runs, so it is told to the operator.
    tf32 = False
    if not torch.jit.is_scripting():
        if has_tangent(x, weight, bias):
            return routing_reference(x, weight, bias, num_iters, approximate_squash)
        tf32 = x.is_cuda and torch.is_autocast_enabled("cuda")
    return torch.ops.capszoo.dynamic_routing(x, weight, bias, num_iters, approximate_squash, tf32)[0]


def check_inputs(x: Tensor, weight: Tensor, bias: Tensor, num_iters: int) -> None:
    """Check what `dynamic_routing` takes; its errors."""
    check_capsules(x, weight)
    if x.shape[1] != 0 and (weight.shape[0] == 0 or x.shape[1] % weight.shape[0] != 0):
        raise ValueError(
            f"weight has T={weight.shape[0]} types, which does not divide the I={x.shape[1]} capsules of x: "
            "use one matrix per capsule, or as many capsules for each type"
        )
    if bias.dim() != 2 or bias.shape[0] != weight.shape[2] or bias.shape[1] != weight.shape[3]:
        raise ValueError(
            f"bias has shape {list(bias.shape)}, weight needs [J, D] = [{weight.shape[2]}, {weight.shape[3]}]"
        )
    if num_iters < 1:
        raise ValueError(f"num_iters={num_iters}: routing needs at least 1 iteration")
    check_types(x, weight, bias, "bias")
