"""The operator `capszoo::mixture_moments`, its derivatives, and the functions `em_routing` and `vb_routing` made of it.

It is opaque to torch.compile and torch.export, as the operators in `kernels/ops.py` are, and like theirs, second and
higher derivatives, forward mode and the transforms of torch.func are those of the reference, which stores the votes.
"""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from ..derivatives import no_autocast, register_transforms, second_gradients
from ..dispatch import has_tangent, kernel, runs_triton, triton_module
from . import by_moments, cpu, reference

launchers = triton_module(".gaussian_routing.launch")


@kernel
def _moments(
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mean: Tensor | None,
    precision: Tensor | None,
    log_prior: Tensor | None,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return cpu.moments(poses, activations, weight, offset, mean, precision, log_prior, stride)


@kernel
def _moments_backward(
    dmass: Tensor,
    daverage: Tensor,
    dscatter: Tensor,
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mean: Tensor | None,
    precision: Tensor | None,
    log_prior: Tensor | None,
    mass: Tensor,
    average: Tensor,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return cpu.moments_backward(
        dmass, daverage, dscatter, poses, activations, weight, offset, mean, precision, log_prior, mass, average, stride
    )


mixture_moments_op = torch.library.custom_op("capszoo::mixture_moments", _moments, mutates_args=())
mixture_moments_backward_op = torch.library.custom_op(
    "capszoo::mixture_moments_backward", _moments_backward, mutates_args=()
)


@mixture_moments_op.register_kernel("cuda")
@kernel
def _moments_cuda(poses, activations, weight, offset, mean, precision, log_prior, stride):
    if poses.numel() == 0 or not runs_triton(poses.device, poses.dtype):
        return _moments(poses, activations, weight, offset, mean, precision, log_prior, stride)
    return launchers.moments(poses, activations, weight, offset, mean, precision, log_prior, stride)


@mixture_moments_backward_op.register_kernel("cuda")
@kernel
def _moments_backward_cuda(
    dmass, daverage, dscatter, poses, activations, weight, offset, mean, precision, log_prior, mass, average, stride
):
    arguments = (
        dmass, daverage, dscatter, poses, activations, weight, offset, mean, precision, log_prior, mass, average,
        stride,
    )  # fmt: skip
    if poses.numel() == 0 or not runs_triton(poses.device, poses.dtype):
        return _moments_backward(*arguments)
    return launchers.moments_backward(*arguments)


@mixture_moments_op.register_fake
def _(poses, activations, weight, offset, mean, precision, log_prior, stride):
    J, P, B = weight.shape[3], weight.shape[5], poses.shape[3]
    H, W = ((poses.shape[4 + side] - weight.shape[1 + side]) // stride + 1 for side in (0, 1))
    moments = poses.new_empty(J, P, P, B, H, W)
    return poses.new_empty(J, B, H, W), moments, torch.empty_like(moments)


@mixture_moments_backward_op.register_fake
def _(dmass, daverage, dscatter, poses, activations, weight, offset, mean, precision, log_prior, mass, average, stride):
    gradients = [x.new_empty(x.shape) for x in (poses, activations, weight)]
    priors = [poses.new_empty(0 if x is None else x.shape) for x in (mean, precision, log_prior)]
    return *gradients, *priors


def _save_moments(ctx, inputs, output):
    *tensors, ctx.stride = inputs
    mass, average, _ = output
    ctx.save_for_backward(*tensors, mass, average)


def _gradients(ctx, *grads):
    poses, activations, weight, offset, mean, *others = ctx.saved_tensors
    *found, dmean, dprecision, dlog_prior = mixture_moments_backward_op(
        *grads, poses, activations, weight, offset, mean, *others, ctx.stride
    )
    priors = (None, None, None) if mean is None else (dmean, dprecision, dlog_prior)
    return *found, None, *priors, None


def _save_backward(ctx, inputs, output):
    *tensors, _, _, ctx.stride = inputs  # not mass and average: functions of the others, and differentiated as such
    ctx.save_for_backward(*tensors)


def _second_gradients(ctx, *cotangents):
    dmass, daverage, dscatter, poses, activations, weight, offset, *priors = ctx.saved_tensors
    inputs = [poses, activations, weight, *(x for x in priors if x is not None)]

    def moments(poses, activations, weight, *priors):
        return reference.moments(poses, activations, weight, offset, *(priors or (None,) * 3), ctx.stride)

    found = second_gradients(moments, cotangents[: len(inputs)], dmass, daverage, dscatter, *inputs)
    of_priors = found[6:] if len(inputs) > 3 else (None,) * 3
    return *found[:6], None, *of_priors, None, None, None


mixture_moments_op.register_autograd(_gradients, setup_context=_save_moments)
mixture_moments_backward_op.register_autograd(_second_gradients, setup_context=_save_backward)


# What transforms of torch.func get, see the note in `kernels/ops.py`.


def _moments_transformed(poses, activations, weight, offset, mean, precision, log_prior, stride):
    with no_autocast(poses):
        return reference.moments(poses, activations, weight, offset, mean, precision, log_prior, stride)


def _moments_backward_transformed(
    dmass, daverage, dscatter, poses, activations, weight, offset, mean, precision, log_prior, mass, average, stride
):
    priors = [x for x in (mean, precision, log_prior) if x is not None]

    def moments(poses, activations, weight, *priors):
        return _moments_transformed(poses, activations, weight, offset, *(priors or (None,) * 3), stride)

    _, pull_back = torch.func.vjp(moments, poses, activations, weight, *priors)
    found = pull_back((dmass, daverage, dscatter))
    return found if priors else (*found, *(poses.new_empty(0) for _ in range(3)))


register_transforms(mixture_moments=_moments_transformed, mixture_moments_backward=_moments_backward_transformed)


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
    min_variance: float = 5e-4,
) -> tuple[Tensor, Tensor]:
    """Route maps of matrix capsules by expectation maximisation.

    Procedure 1 of Hinton, Sabour and Frosst (2018) for kernels on maps. Each child under a kernel votes for each parent
    type there by its pose times a matrix. In each iteration a parent is a Gaussian with the mean and the variances of
    its votes, weighted by coupling times activation (M step); the couplings of a child are the probabilities of its
    votes under the parents (E step), over *all* parents that it votes for: every type at every position of the kernel
    that covers it. At first they are equal. A parent is the more active, the smaller the variances are and the more
    votes there are: sigmoid(lambda (beta_a - sum over the pose of (beta_u + log sigma) times the votes' mass)), with
    lambda = final_lambda (1 - 0.95^t) in iteration t = 1, 2, ... Gradients flow through every iteration.

    Votes and couplings are never stored: each pass computes them anew, a tile at a time (on a GPU too where Triton
    runs), and between the passes only what is about children or parents is kept. Higher derivatives, forward mode and
    the transforms of torch.func go through `reference.em_routing`'s steps, which store them.

    Args:
        poses: Of the children, `[B, I, P, P, h, w]`, of any strides; I types on a map of h x w.
        activations: Of the children, `[B, I, h, w]`, from 0 to 1.
        weight: Matrices, `[I, Kh, Kw, J, P, P]`, for J types of parents; a vote is `pose @ matrix + offset`.
        beta_u: Cost of a vote that is not explained otherwise, `[J]`.
        beta_a: Reward of an active parent, `[J]`.
        offset: Added to the votes from each place under the kernel, such as its coordinates, `[Kh, Kw, P, P]`. A
            constant: it gets no gradient.
        stride: Of the kernel, which is unpadded.
        num_iters: Iterations R, at least 1; with 1 all couplings are equal.
        final_lambda: See above.
        min_variance: Added to each variance.

    Returns:
        Poses `[B, J, P, P, H, W]`, the means, and activations `[B, J, H, W]` in the dtype of `poses`, with
        H = (h - Kh) // stride + 1. Computed in float64 if `poses` or `weight` is, else in float32, under autocast too.

    Raises:
        ValueError: If a shape, a dtype, a device or `num_iters` does not fit; the message names it and the remedy.
    """
    tensors = (poses, activations, weight, beta_u, beta_a)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            em_routing, tensors, *tensors, offset, stride, num_iters, final_lambda, min_variance
        )
    check_inputs(*tensors, offset, stride, num_iters)
    form = reference if has_tangent(*tensors) else by_moments
    with no_autocast(poses):
        return form.em_routing(*tensors, offset, stride, num_iters, final_lambda, min_variance)


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
    """Route maps of matrix capsules by variational Bayes (Ribeiro, Leontidis and Kollias 2020, algorithm 1).

    As :func:`em_routing`, with a distribution over each parent's mean and precisions and over the mixture's weights
    instead of their values: Dirichlet, Normal and Wishart, from the priors alpha = 1, m = 0, kappa = 1, Psi = 1,
    nu = P * P + 1. No variance can collapse. The score of a parent is beta_a - (exp(E ln pi) H + beta_u), H the entropy
    of its votes; its activation is the sigmoid of this score, which the paper normalises over the batch before.

    Args:
        poses: Of the children, `[B, I, P, P, h, w]`.
        activations: Of the children, `[B, I, h, w]`.
        weight: Matrices, `[I, Kh, Kw, J, P, P]`.
        beta_u: See above, `[J]`.
        beta_a: See above, `[J]`.
        offset: As in :func:`em_routing`.
        stride: Of the kernel.
        num_iters: Iterations R, at least 1; with 1 all couplings are equal.

    Returns:
        Poses `[B, J, P, P, H, W]`, the posterior means, and scores `[B, J, H, W]`, as :func:`em_routing`.

    Raises:
        ValueError: As :func:`em_routing`.
    """
    tensors = (poses, activations, weight, beta_u, beta_a)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(vb_routing, tensors, *tensors, offset, stride, num_iters)
    check_inputs(*tensors, offset, stride, num_iters)
    form = reference if has_tangent(*tensors) else by_moments
    with no_autocast(poses):
        return form.vb_routing(*tensors, offset, stride, num_iters)


def check_inputs(
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    offset: Tensor | None,
    stride: int,
    num_iters: int,
) -> None:
    """Check what the routings take; the errors of `em_routing`."""
    if poses.dim() != 6 or poses.shape[2] != poses.shape[3]:
        raise ValueError(f"poses have shape {list(poses.shape)}: give [B, I, P, P, h, w]")
    B, num_types, P, _, h, w = poses.shape
    if list(activations.shape) != [B, num_types, h, w]:
        raise ValueError(
            f"activations have shape {list(activations.shape)}, poses need [B, I, h, w] = {[B, num_types, h, w]}"
        )
    if weight.dim() != 6 or weight.shape[0] != num_types or list(weight.shape[4:]) != [P, P]:
        raise ValueError(
            f"weight has shape {list(weight.shape)}, poses need [I, Kh, Kw, J, P, P] with I={num_types}, P={P}"
        )
    _, Kh, Kw, J, _, _ = weight.shape
    if min(num_types, P, Kh, Kw, J) < 1:
        raise ValueError(f"weight has shape {list(weight.shape)}: no size of it may be 0")
    for name, beta in (("beta_u", beta_u), ("beta_a", beta_a)):
        if list(beta.shape) != [J]:
            raise ValueError(f"{name} has shape {list(beta.shape)}, weight needs [J] = [{J}]")
    if offset is not None and list(offset.shape) != [Kh, Kw, P, P]:
        raise ValueError(f"offset has shape {list(offset.shape)}, weight needs [Kh, Kw, P, P] = {[Kh, Kw, P, P]}")
    if stride < 1:
        raise ValueError(f"stride={stride} is not possible: give 1 or more")
    if h < Kh or w < Kw:
        raise ValueError(f"a map of {h}x{w} is too small for a kernel of {Kh}x{Kw}: use larger maps or smaller kernels")
    if num_iters < 1:
        raise ValueError(f"num_iters={num_iters}: routing needs at least 1 iteration")
    tensors = {"poses": poses, "activations": activations, "weight": weight, "beta_u": beta_u, "beta_a": beta_a}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"routing needs floating-point tensors, but {name} is {tensor.dtype}: convert with .float()"
            )
        if tensor.device != poses.device:
            raise ValueError(f"poses are on {poses.device}, {name} on {tensor.device}: move them to one device")
