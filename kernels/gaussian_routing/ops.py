"""The operator `capszoo::mixture_moments`, its derivatives, and the functions `em_routing` and `vb_routing` made of it.

It is opaque to torch.compile and torch.export, as the operators in `kernels/ops.py` are, and like theirs, second and
higher derivatives, forward mode and the transforms of torch.func are those of the reference, which stores the votes.
"""

import torch
from torch import Tensor

from ..derivatives import no_autocast
from ..dispatch import kernel
from . import cpu


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
    with no_autocast(poses):
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
    with no_autocast(poses):
        return cpu.moments_backward(
            dmass, daverage, dscatter, poses, activations, weight, offset, mean, precision, log_prior, mass, average,
            stride,
        )  # fmt: skip


mixture_moments_op = torch.library.custom_op("capszoo::mixture_moments", _moments, mutates_args=())
mixture_moments_backward_op = torch.library.custom_op(
    "capszoo::mixture_moments_backward", _moments_backward, mutates_args=()
)


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


mixture_moments_op.register_autograd(_gradients, setup_context=_save_moments)
