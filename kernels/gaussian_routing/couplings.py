"""The couplings of EM and variational-Bayes routing, on request: the operators themselves never store them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..derivatives import no_autocast
from . import by_moments, cpu
from .ops import check_inputs


@torch.no_grad()
def em_couplings(
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
) -> Tensor:
    """Couplings of each iteration of :func:`capszoo.kernels.em_routing` (its arguments and errors).

    They come from the moments that the operator returns, on whatever device it runs; votes are stored a tile at a time.

    Returns:
        `[R, B, I * Kh * Kw, J, H, W]`, children by type, then by place in the kernel. Those of a child add up to 1 over
        all parents that it votes for, of every type and at every position; without derivatives.
    """
    check_inputs(poses, activations, weight, beta_u, beta_a, offset, stride, num_iters)
    inputs = by_moments.of_one_dtype(poses, activations, weight, offset)
    beta_u = beta_u.to(inputs[0].dtype)[:, None, None, None, None, None]
    beta_a = beta_a.to(inputs[0].dtype)[:, None, None, None]
    parents: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    found = []
    with no_autocast(poses):
        for iteration in range(num_iters):
            found.append(_samples_first(cpu.couplings(*inputs, *parents, stride)))
            if iteration < num_iters - 1:
                mass, average, scatter = torch.ops.capszoo.mixture_moments(*inputs, *parents, stride)
                strength = final_lambda * (1 - 0.95 ** (iteration + 1))
                score, variance, log_sigma = by_moments.em_scores(mass, scatter, beta_u, beta_a, strength, min_variance)
                parents = average, 0.5 / variance, F.logsigmoid(score) - log_sigma.sum(dim=(1, 2))
    return torch.stack(found)


@torch.no_grad()
def vb_couplings(
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    offset: Tensor | None = None,
    stride: int = 1,
    num_iters: int = 3,
) -> Tensor:
    """Couplings of each iteration of :func:`capszoo.kernels.vb_routing` (its arguments), as :func:`em_couplings`."""
    check_inputs(poses, activations, weight, beta_u, beta_a, offset, stride, num_iters)
    inputs = by_moments.of_one_dtype(poses, activations, weight, offset)
    parents: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    found = []
    with no_autocast(poses):
        for iteration in range(num_iters):
            found.append(_samples_first(cpu.couplings(*inputs, *parents, stride)))
            if iteration < num_iters - 1:
                mass, average, scatter = torch.ops.capszoo.mixture_moments(*inputs, *parents, stride)
                center, *posterior = by_moments.vb_posterior(mass, average, scatter)
                parents = center, *by_moments.vb_logits(mass, *posterior)
    return torch.stack(found)


def _samples_first(couplings: Tensor) -> Tensor:
    """`[I, Kh * Kw, J, B, H, W]` as `[B, I * Kh * Kw, J, H, W]`."""
    return couplings.flatten(0, 1).permute(2, 0, 1, 3, 4)
