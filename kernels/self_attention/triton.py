"""Self-attention routing in Triton, by the kernels of dynamic routing: votes and logits are never stored.

With votes u_ij = x_i W_ij and V_j = sum over i of u_ij / sqrt(D), the logits are u_ij . V_j, so that this is the second
of two iterations of dynamic routing, with V in the place of the first's class capsules and no squash:

    V     = a uniform sum;   sum over i of c_ij u_ij = a weighted sum with V
    sum over i of prior_ij u_ij = a uniform sum with the matrices prior_ij W_ij

Backward from g = dL/ds, with h_j = sum over i of dl_ij u_ij / sqrt(D), what dynamic routing calls its gradients with
ds^2 = g and ds^1 = J h, as its first iteration has couplings of 1 / J, and by plain products those of the priors' sum.

Which kernels these are, dynamic_routing.py chooses: all_classes.py or per_class.py.
"""

import math

import torch
from torch import Tensor

from ..dynamic_routing import form_for, problem_sizes
from .cpu import sum_votes_backward


def forward(x: Tensor, weight: Tensor, prior: Tensor, attention: bool, tf32: bool = False) -> tuple[Tensor, Tensor]:
    """Sums of weighed votes s in the dtype of x, and V in float32, both `[B, J, D]`.

    Args:
        x: `[B, I, K]`, of any strides, like all tensors here. Each may be float32, bfloat16 or float16. No size is 0.
        weight: `[I, K, J, D]`.
        prior: `[I, J]`.
        attention: True: without it nothing is left but a product of matrices.
        tf32: Allow products in TF32; torch's own setting allows them as well.
    """
    x, weight = x.contiguous(), weight.contiguous()
    sizes = problem_sizes(x, weight, tf32)
    form = form_for(sizes)
    with torch.cuda.device_of(x):
        total = form.uniform_sum(x, weight, sizes).sum(0).div_(math.sqrt(weight.shape[3]))
        weighed = weight.float() * prior.float()[:, None, :, None]
        s = form.uniform_sum(x, weighed, problem_sizes(x, weighed, tf32)).sum(0)
        s += form.weighted_sum(x, weight, total, sizes).sum(0)
    return s.to(x.dtype), total


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, prior: Tensor, total: Tensor, attention: bool, tf32: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weight and prior in their dtypes, from g `[B, J, D]` and what `forward` took and returned."""
    x, weight, total = x.contiguous(), weight.contiguous(), total.contiguous()
    J, D = weight.shape[2:]
    sizes = problem_sizes(x, weight, tf32)
    form = form_for(sizes, 2)
    with torch.cuda.device_of(x):
        dsums = total.new_empty(2, *total.shape)
        dsums[1] = grad
        kept = form.keep_for_gradients(x, 2, sizes)
        parts = form.gradient_sum(x, weight, total, dsums[1], *(t[0] for t in kept), sizes)
        torch.mul(parts.sum(0), J / math.sqrt(D), out=dsums[0])
        dx, dweight = form.gradients(x, weight, total.unsqueeze(0), dsums, *kept, sizes)
    of_prior = sum_votes_backward(dsums[1], x.float(), weight.float(), prior.float())
    dx, dweight = (one.add_(other) for one, other in zip((dx, dweight), of_prior, strict=False))
    return dx, dweight, of_prior[2].to(prior.dtype)
