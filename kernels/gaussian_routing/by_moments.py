"""EM and variational-Bayes routing as what they do with moments; the moments of votes are an operator.

An iteration looks at votes once: it couples them by the Gaussians of the iteration before and takes their mass, average
and scatter for each parent (`cpu.moments`). All else is about parents alone, a hundredth of the numbers, and written
here in plain PyTorch, with autograd's derivatives. Samples and positions are the last dimensions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["em_routing", "em_scores", "of_one_dtype", "vb_logits", "vb_posterior", "vb_routing"]


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
    """See `capszoo.kernels.em_routing`; inputs are checked."""
    children, active, matrices, places = of_one_dtype(poses, activations, weight, offset)
    beta_u = beta_u.to(children.dtype)[:, None, None, None, None, None]
    beta_a = beta_a.to(children.dtype)[:, None, None, None]
    mean: Tensor | None = None
    precision: Tensor | None = None
    log_prior: Tensor | None = None
    for iteration in range(num_iters):
        mass, average, scatter = torch.ops.capszoo.mixture_moments(
            children, active, matrices, places, mean, precision, log_prior, stride
        )
        score, variance, log_sigma = em_scores(
            mass, scatter, beta_u, beta_a, final_lambda * (1 - 0.95 ** (iteration + 1)), min_variance
        )
        if iteration == num_iters - 1:
            return _samples_first(average).to(poses.dtype), score.sigmoid().transpose(0, 1).to(poses.dtype)
        mean = average
        precision = 0.5 / variance
        log_prior = F.logsigmoid(score) - log_sigma.sum(dim=(1, 2))
    return poses, activations  # not reached: there is an iteration


def em_scores(
    mass: Tensor, scatter: Tensor, beta_u: Tensor, beta_a: Tensor, strength: float, min_variance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The M step after the moments: logits of the parents' activations, variances, logarithms of their roots.

    Args:
        mass: `[J, B, H, W]`.
        scatter: `[J, P, P, B, H, W]`.
        beta_u: `[J, 1, 1, 1, 1, 1]`.
        beta_a: `[J, 1, 1, 1]`.
        strength: Lambda of this iteration.
        min_variance: Added to each variance.
    """
    variance = scatter / (mass + 1e-8)[:, None, None] + min_variance
    log_sigma = 0.5 * variance.log()
    cost = ((beta_u + log_sigma) * mass[:, None, None]).sum(dim=(1, 2))
    return strength * (beta_a - cost), variance, log_sigma


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
    """See `capszoo.kernels.vb_routing`; inputs are checked."""
    children, active, matrices, places = of_one_dtype(poses, activations, weight, offset)
    beta_u = beta_u.to(children.dtype)[:, None, None, None]
    beta_a = beta_a.to(children.dtype)[:, None, None, None]
    D = poses.shape[2] * poses.shape[3]
    mean: Tensor | None = None
    precision: Tensor | None = None
    log_prior: Tensor | None = None
    for iteration in range(num_iters):
        mass, average, scatter = torch.ops.capszoo.mixture_moments(
            children, active, matrices, places, mean, precision, log_prior, stride
        )
        center, inverse_scale, log_pi, log_det = vb_posterior(mass, average, scatter)
        if iteration == num_iters - 1:
            entropy = (D * math.log(2 * math.pi * math.e) - log_det) / 2
            score = beta_a - (log_pi.exp() * entropy + beta_u)
            return _samples_first(center).to(poses.dtype), score.transpose(0, 1).to(poses.dtype)
        mean = center
        precision, log_prior = vb_logits(mass, inverse_scale, log_pi, log_det)
    return poses, activations  # not reached: there is an iteration


def vb_posterior(mass: Tensor, average: Tensor, scatter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Posterior after the moments of votes: means, inverse scales Psi^-1 `[J, P, P, B, H, W]`, E ln pi and E ln |L|.

    Args:
        mass: `[J, B, H, W]`.
        average: `[J, P, P, B, H, W]`.
        scatter: `[J, P, P, B, H, W]`.
    """
    D = average.shape[1] * average.shape[2]
    degrees = torch.arange(D, device=mass.device, dtype=mass.dtype)[:, None, None, None]
    alpha, kappa, nu = 1 + mass, 1 + mass, D + 1 + mass
    shrink = (mass / kappa)[:, None, None]
    inverse_scale = 1 + scatter + shrink * average.square()
    log_pi = torch.digamma(alpha) - torch.digamma(alpha.sum(dim=0, keepdim=True))
    log_det = torch.digamma((nu[:, None] - degrees) / 2).sum(dim=1) + D * math.log(2)
    log_det = log_det - inverse_scale.log().sum(dim=(1, 2))
    return shrink * average, inverse_scale, log_pi, log_det


def vb_logits(mass: Tensor, inverse_scale: Tensor, log_pi: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
    """What the next iteration's couplings are made of: half the precisions, and the logit of a vote at the mean."""
    D = inverse_scale.shape[1] * inverse_scale.shape[2]
    kappa, nu = 1 + mass, D + 1 + mass
    return nu[:, None, None] / (2 * inverse_scale), log_pi + (log_det - D / kappa) / 2


def of_one_dtype(
    poses: Tensor, activations: Tensor, weight: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What the operator takes: maps with samples and positions last, all of one type."""
    dtype = torch.promote_types(torch.promote_types(poses.dtype, weight.dtype), torch.float32)
    places = offset
    if places is not None:
        places = places.to(dtype)
    children = poses.to(dtype).permute(1, 2, 3, 0, 4, 5).contiguous()
    return children, activations.to(dtype).transpose(0, 1).contiguous(), weight.to(dtype), places


def _samples_first(x: Tensor) -> Tensor:
    return x.permute(3, 0, 1, 2, 4, 5)
