"""The operator of inverted dot-product attention routing: schema, kernels by device, shapes, autograd, the function.

As with `capszoo.kernels.ops`, first derivatives in reverse mode are an operator too, and all others are those of the
reference, which stores the votes. The operators take maps with their positions first, `[B, H, W, I, P, P]`, so that
the poses of a position lie together, as layer normalisation leaves and takes them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..checks import check_types
from ..derivatives import compute_dtype, no_autocast, register_transforms, second_gradients, transformed_gradients
from ..dispatch import has_tangent, kernel, runs_triton, triton_module
from . import cpu, reference

launchers = triton_module(".inverted_attention.triton")


@kernel
def _forward(x: Tensor, weight: Tensor, parents: Tensor, stride: int) -> Tensor:
    """Sums of weighed votes `[B, H', W', J, P, P]`."""
    dtype = compute_dtype(x, weight)
    return cpu.forward(x.to(dtype), weight.to(dtype), parents.to(dtype), stride).to(x.dtype)


@kernel
def _backward(grad: Tensor, x: Tensor, weight: Tensor, parents: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x, weight)
    dx, dweight, dparents = cpu.backward(grad.to(dtype), x.to(dtype), weight.to(dtype), parents.to(dtype), stride)
    return dx.to(x.dtype), dweight.to(weight.dtype), dparents.to(parents.dtype)


forward_op = torch.library.custom_op("capszoo::inverted_attention_routing", _forward, mutates_args=())
backward_op = torch.library.custom_op("capszoo::inverted_attention_routing_backward", _backward, mutates_args=())


def _in_triton(x: Tensor, weight: Tensor, parents: Tensor) -> bool:
    if not cpu.has_votes(x, weight, parents) or not runs_triton(x.device, compute_dtype(x, weight)):
        return False
    return launchers.fits(weight)


@forward_op.register_kernel("cuda")
@kernel
def _forward_cuda(x, weight, parents, stride):
    if not _in_triton(x, weight, parents):
        return _forward(x, weight, parents, stride)
    return launchers.forward(x, weight, parents, stride)


@backward_op.register_kernel("cuda")
@kernel
def _backward_cuda(grad, x, weight, parents, stride):
    if not _in_triton(x, weight, parents):
        return _backward(grad, x, weight, parents, stride)
    return launchers.backward(grad, x, weight, parents, stride)


@forward_op.register_fake
def _(x, weight, parents, stride):
    return x.new_empty(parents.shape)


@backward_op.register_fake
def _(grad, x, weight, parents, stride):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight, parents))


# Derivatives


def _positions_first(x: Tensor) -> Tensor:
    """`[B, I, P, P, H, W]` as `[B, H, W, I, P, P]`."""
    return x.permute(0, 4, 5, 1, 2, 3)


def _positions_last(x: Tensor) -> Tensor:
    """`[B, H, W, I, P, P]` as `[B, I, P, P, H, W]`."""
    return x.permute(0, 3, 4, 5, 1, 2)


def _reference(x: Tensor, weight: Tensor, parents: Tensor, stride: int) -> Tensor:
    with no_autocast(x):
        maps = _positions_last(x), weight, _positions_last(parents)
        return _positions_first(reference.inverted_attention_routing(*maps, stride)).contiguous()


def _save(ctx, inputs, output):
    *tensors, ctx.stride = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad):
    return *backward_op(grad, *ctx.saved_tensors, ctx.stride), None


def _save_backward(ctx, inputs, output):
    *tensors, ctx.stride = inputs
    ctx.save_for_backward(*tensors)


def _second_gradients(ctx, *cotangents):
    def function(x, weight, parents):
        return _reference(x, weight, parents, ctx.stride)

    return *second_gradients(function, cotangents, *ctx.saved_tensors), None


def _backward_transformed(grad, x, weight, parents, stride):
    return transformed_gradients(lambda *inputs: _reference(*inputs, stride), grad, x, weight, parents)


forward_op.register_autograd(_gradients, setup_context=_save)
backward_op.register_autograd(_second_gradients, setup_context=_save_backward)
register_transforms(inverted_attention_routing=_reference, inverted_attention_routing_backward=_backward_transformed)


def uniform_routing(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Sums of votes by couplings of 1 / J, without votes: a convolution whose samples are the rows of the poses.

    Made of PyTorch's operators alone, in the precision that autocast gives to convolutions.

    Args:
        x: Poses of the children, `[B, I, P, P, H, W]`.
        weight: `[k, k, I, P, P, J]`.
        stride: Stride of the kernel.

    Returns:
        `[B, J, P, P, H', W']`.
    """
    k, side, num_parents = weight.shape[0], weight.shape[3], weight.shape[5]
    rows = x.transpose(1, 2)  # [B, P, I, P, H, W]: rows of poses, then channels: types and columns
    if x.shape[4] == k and x.shape[5] == k:  # a parent of the whole map: a matrix product
        rows = rows.permute(0, 1, 4, 5, 2, 3).flatten(2)
        sums = (rows @ weight.flatten(0, 3).flatten(1) / num_parents).unflatten(2, [side, num_parents])
        return sums.permute(0, 3, 1, 2).unsqueeze(4).unsqueeze(5)
    filters = weight.permute(5, 4, 2, 3, 0, 1).flatten(2, 3).flatten(0, 1)
    sums = F.conv2d(rows.flatten(2, 3).flatten(0, 1), filters, stride=[stride, stride]) / num_parents
    return sums.unflatten(0, [x.shape[0], side]).unflatten(2, [num_parents, side]).transpose(1, 2)


def check_inputs(x: Tensor, weight: Tensor, parents: Tensor | None, stride: int) -> None:
    """Check what `inverted_attention_routing` takes; its errors."""
    if x.dim() != 6:
        raise ValueError(f"x must have shape [B, I, P, P, H, W], but it has {x.dim()} dimensions: reshape it")
    if weight.dim() != 6 or weight.shape[0] != weight.shape[1]:
        raise ValueError(f"weight has shape {list(weight.shape)}, it must be [k, k, I, P, P, J]: reshape it")
    k, num_types, side, num_parents = weight.shape[0], weight.shape[2], weight.shape[3], weight.shape[5]
    if list(x.shape[1:4]) != [num_types, side, side] or weight.shape[4] != side:
        raise ValueError(
            f"x has poses [I, P, P] = {list(x.shape[1:4])}, weight takes {list(weight.shape[2:5])}: make them equal"
        )
    if stride < 1:
        raise ValueError(f"stride={stride}: it must be 1 or more")
    if k < 1 or x.shape[4] < k or x.shape[5] < k:
        raise ValueError(f"x has a map of {x.shape[4]}x{x.shape[5]} positions, the kernel needs {k}x{k}: enlarge it")
    check_types(x, weight, x if parents is None else parents, "parents")
    if parents is None:
        return
    height, width = (x.shape[4] - k) // stride + 1, (x.shape[5] - k) // stride + 1
    expected = [x.shape[0], num_parents, side, side, height, width]
    if list(parents.shape) != expected:
        raise ValueError(f"parents have shape {list(parents.shape)}, x and weight need {expected}")


def inverted_attention_routing(x: Tensor, weight: Tensor, parents: Tensor | None = None, stride: int = 1) -> Tensor:
    """Weigh the votes of children by their agreement with the parents' poses of the pass before, and add them up.

    Procedure 1 of Tsai, Srivastava, Goh and Salakhutdinov (arXiv 2002.04764) without its layer normalisation: votes
    V_ij = P_i W_ij, agreements a_ij = <V_ij, P_j> / P, couplings r_ij = softmax over j of a_ij, and the sums over i of
    r_ij V_ij. The children of a parent are the capsules of a patch of k x k positions. Class capsules, whose children
    are those of the whole map, take it as a map of one position, with k = 1. Neither votes nor agreements are stored:
    both passes compute them by tiles, and keep nothing but the inputs. Higher derivatives, forward mode and the
    transforms of torch.func go through `reference.inverted_attention_routing`, which stores them.

    Args:
        x: Poses of the children, matrices of P x P: `[B, I, P, P, H, W]`, of any strides. Any size may be 0.
        weight: Vote matrices, `[k, k, I, P, P, J]`: for each place in the kernel, child type and parent type.
        parents: Poses of the parents after the pass before, `[B, J, P, P, H', W']`. None for the first pass, whose
            couplings are 1 / J; see `uniform_routing`.
        stride: Stride of the kernel, which is not padded.

    Returns:
        The sums `[B, J, P, P, H', W']`, in the dtype of `x`. Computed in float64 if `x` or `weight` is, else in
        float32, under autocast too; dtypes may differ, and each gradient has the dtype of its input.

    Raises:
        ValueError: If a shape, a dtype, a device or `stride` does not fit; the message names it and the remedy.
    """
    if has_torch_function_variadic(x, weight):
        return handle_torch_function(inverted_attention_routing, (x, weight), x, weight, parents, stride)
    check_inputs(x, weight, parents, stride)
    if parents is None:
        dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        if torch.jit.is_scripting():
            return uniform_routing(x.to(dtype), weight.to(dtype), stride).to(x.dtype)
        with no_autocast(x):
            return uniform_routing(x.to(dtype), weight.to(dtype), stride).to(x.dtype)
    inputs = x.permute(0, 4, 5, 1, 2, 3), weight, parents.permute(0, 4, 5, 1, 2, 3)
    if not torch.jit.is_scripting():
        if has_tangent(x, weight, parents):
            return _positions_last(_reference(inputs[0], weight, inputs[2], stride))
    sums = torch.ops.capszoo.inverted_attention_routing(inputs[0], weight, inputs[2], stride)
    return sums.permute(0, 3, 4, 5, 1, 2)
