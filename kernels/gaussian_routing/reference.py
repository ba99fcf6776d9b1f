"""Routing of matrix capsules by mixtures of Gaussians in plain PyTorch, with stored votes: written to be read.

Sizes: B samples; I child types on a map of h x w; kernels of Kh x Kw; N = I * Kh * Kw children of a parent; J parent
types on a map of H x W, L = H * W; poses are P x P matrices, D = P * P. Votes are `[B, N, J, D, L]`. Everything is
computed in float32, or in float64 if an input is.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cast_votes", "compute_dtype", "couplings", "em_routing", "patches", "vb_routing"]


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
    """EM routing (Hinton, Sabour and Frosst 2018, procedure 1), see `capszoo.kernels.em_routing`."""
    dtype = compute_dtype(poses, weight)
    grid, kernel = (activations.shape[2], activations.shape[3]), (weight.shape[1], weight.shape[2])
    votes = cast_votes(poses.to(dtype), weight.to(dtype), offset, stride)
    active = at_votes(activations.to(dtype), kernel, stride)  # [B, N, 1, L]
    beta_u, beta_a = beta_u.to(dtype)[:, None], beta_a.to(dtype)[:, None]
    logits = torch.zeros_like(votes[:, :, :, 0])  # [B, N, J, L]
    mean, score = votes[:, 0], votes[:, 0, :, 0]
    for iteration in range(num_iters):
        assigned = couplings(logits, grid, kernel, stride) * active
        # M step
        mass = assigned.sum(dim=1)  # [B, J, L]
        shares = (assigned / not_zero(mass).unsqueeze(1)).unsqueeze(3)
        mean = (shares * votes).sum(dim=1)  # [B, J, D, L]
        deviations = (votes - mean.unsqueeze(1)).square()
        variance = (shares * deviations).sum(dim=1) + min_variance
        log_sigma = 0.5 * variance.log()
        cost = ((beta_u.unsqueeze(1) + log_sigma) * mass.unsqueeze(2)).sum(dim=2)
        score = final_lambda * (1 - 0.95 ** (iteration + 1)) * (beta_a - cost)
        # E step
        exponents = (deviations / (2 * variance).unsqueeze(1)).sum(dim=3)
        logits = (F.logsigmoid(score) - log_sigma.sum(dim=2)).unsqueeze(1) - exponents
    H, W = map_size(grid, kernel, stride)
    mean = mean.unflatten(3, (H, W)).unflatten(2, (poses.shape[2], poses.shape[3]))
    return mean.to(poses.dtype), score.sigmoid().unflatten(2, (H, W)).to(poses.dtype)


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
    """Variational-Bayes routing (Ribeiro, Leontidis and Kollias 2020), see `capszoo.kernels.vb_routing`."""
    dtype = compute_dtype(poses, weight)
    grid, kernel = (activations.shape[2], activations.shape[3]), (weight.shape[1], weight.shape[2])
    votes = cast_votes(poses.to(dtype), weight.to(dtype), offset, stride)
    active = at_votes(activations.to(dtype), kernel, stride)
    beta_u, beta_a = beta_u.to(dtype)[:, None], beta_a.to(dtype)[:, None]
    D = votes.shape[3]
    degrees = torch.arange(D, device=votes.device, dtype=dtype)[:, None]
    logits = torch.zeros_like(votes[:, :, :, 0])
    mean, score = votes[:, 0], votes[:, 0, :, 0]
    for _ in range(num_iters):
        assigned = couplings(logits, grid, kernel, stride) * active
        # Posteriors: Dirichlet(alpha) of the mixture, Normal(mean, 1 / kappa) and Wishart(Psi, nu) of each parent, from
        # the priors alpha = 1, mean = 0, kappa = 1, Psi = 1, nu = D + 1.
        mass = assigned.sum(dim=1)
        alpha, kappa, nu = 1 + mass, 1 + mass, D + 1 + mass
        average = (assigned.unsqueeze(3) * votes).sum(dim=1) / not_zero(mass).unsqueeze(2)
        scatter = (assigned.unsqueeze(3) * (votes - average.unsqueeze(1)).square()).sum(dim=1)
        mean = (mass / kappa).unsqueeze(2) * average
        inverse_scale = 1 + scatter + (mass / kappa).unsqueeze(2) * average.square()
        # Expectations of the logarithms of the mixture's weights and of the determinants of the precisions.
        log_pi = digamma(alpha) - digamma(alpha.sum(dim=1, keepdim=True))
        log_det = digamma((nu.unsqueeze(2) - degrees) / 2).sum(dim=2) + D * math.log(2)
        log_det = log_det - inverse_scale.log().sum(dim=2)
        entropy = (D * math.log(2 * math.pi * math.e) - log_det) / 2
        score = beta_a - (log_pi.exp() * entropy + beta_u)
        distances = ((votes - mean.unsqueeze(1)).square() / inverse_scale.unsqueeze(1)).sum(dim=3)
        log_density = (log_det - D / kappa).unsqueeze(1) - nu.unsqueeze(1) * distances
        logits = log_pi.unsqueeze(1) + log_density / 2
    H, W = map_size(grid, kernel, stride)
    mean = mean.unflatten(3, (H, W)).unflatten(2, (poses.shape[2], poses.shape[3]))
    return mean.to(poses.dtype), score.unflatten(2, (H, W)).to(poses.dtype)


def moments(
    poses: Tensor,
    activations: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    mean: Tensor | None,
    precision: Tensor | None,
    log_prior: Tensor | None,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The part of an iteration that works on votes, the operator of which both routings are made, see `cpu.moments`."""
    B, J, P = poses.shape[3], weight.shape[3], weight.shape[5]
    grid, kernel = (poses.shape[4], poses.shape[5]), (weight.shape[1], weight.shape[2])
    H, W = map_size(grid, kernel, stride)
    votes = cast_votes(poses.permute(3, 0, 1, 2, 4, 5), weight, offset, stride)
    active = at_votes(activations.transpose(0, 1), kernel, stride)
    logits = torch.zeros_like(votes[:, :, :, 0])
    if mean is not None and precision is not None and log_prior is not None:
        center, factor = [x.permute(3, 0, 1, 2, 4, 5).flatten(4).flatten(2, 3).unsqueeze(1) for x in (mean, precision)]
        prior = log_prior.transpose(0, 1).flatten(2).unsqueeze(1)
        logits = prior - (factor * (votes - center).square()).sum(dim=3)
    assigned = couplings(logits, grid, kernel, stride) * active
    mass = assigned.sum(dim=1)
    average = (assigned.unsqueeze(3) * votes).sum(dim=1) / not_zero(mass).unsqueeze(2)
    scatter = (assigned.unsqueeze(3) * (votes - average.unsqueeze(1)).square()).sum(dim=1)
    average, scatter = [x.view(B, J, P, P, H, W).permute(1, 2, 3, 0, 4, 5) for x in (average, scatter)]
    return mass.view(B, J, H, W).transpose(0, 1), average, scatter


def cast_votes(poses: Tensor, weight: Tensor, offset: Tensor | None, stride: int) -> Tensor:
    """Votes `[B, N, J, D, L]`: pose of the child times the matrix of child type, place in the kernel and parent type.

    Args:
        poses: `[B, I, P, P, h, w]`.
        weight: `[I, Kh, Kw, J, P, P]`.
        offset: Added to the votes from each place in the kernel, `[Kh, Kw, P, P]`, a constant.
        stride: Stride of the kernel.
    """
    seen = patches(poses, (weight.shape[1], weight.shape[2]), stride)
    votes = torch.einsum("biyxpkhw,iyxjkq->biyxjpqhw", seen, weight).to(weight.dtype)
    if offset is not None:
        votes = votes + offset.detach().to(votes.dtype)[:, :, None, :, :, None, None]
    B, num_types, Kh, Kw, J, P, _, H, W = votes.shape
    return votes.reshape(B, num_types * Kh * Kw, J, P * P, H * W)


def at_votes(activations: Tensor, kernel: tuple[int, int], stride: int) -> Tensor:
    """What is about children, `[B, I, h, w]`, for each of their votes, `[B, N, 1, L]`."""
    seen = patches(activations, kernel, stride)
    B, num_types, Kh, Kw, H, W = seen.shape
    return seen.reshape(B, num_types * Kh * Kw, 1, H * W)


def patches(x: Tensor, kernel: tuple[int, int], stride: int) -> Tensor:
    """What a kernel covers: `[B, I, h, w]` as `[B, I, Kh, Kw, H, W]`, `[B, I, P, P, h, w]` likewise."""
    x = x.unfold(x.dim() - 2, kernel[0], stride)
    x = x.unfold(x.dim() - 2, kernel[1], stride)
    if x.dim() == 6:
        return x.permute(0, 1, 4, 5, 2, 3)
    return x.permute(0, 1, 6, 7, 2, 3, 4, 5)


def couplings(logits: Tensor, grid: tuple[int, int], kernel: tuple[int, int], stride: int) -> Tensor:
    """Softmax for each child over all parents that it votes for: every type, at every position that it reaches.

    Args:
        logits: `[B, N, J, L]`.
        grid: (h, w), the map of the children.
        kernel: (Kh, Kw).
        stride: Stride of the kernel.

    Returns:
        The couplings `[B, N, J, L]`; those of a child add up to 1.
    """
    index, reached = reached_positions(grid, kernel, stride, logits.device)
    taps = kernel[0] * kernel[1]
    by_child = (
        logits.unflatten(1, (logits.shape[1] // taps, taps)).transpose(2, 3).flatten(3).index_select(3, index.flatten())
    )
    by_child = by_child.unflatten(3, (grid[0], grid[1], reached.shape[2]))  # [B, I, J, h, w, G]
    by_child = torch.where(reached, by_child, -1e30)  # finite, so that a child without parents has a finite sum
    total = at_votes(by_child.logsumexp(dim=(2, 5)), kernel, stride)  # [B, N, 1, L]
    return (logits - total).exp()


def reached_positions(
    grid: tuple[int, int], kernel: tuple[int, int], stride: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which places of the kernel, at which of its positions, cover each child.

    Returns:
        Indices into `[Kh * Kw * L]`, `[h, w, G]`, and which of the G are there, of the same shape.
    """
    kernel_y, parent_y, there_y, H = _reached_on_side(grid[0], kernel[0], stride, device)
    kernel_x, parent_x, there_x, W = _reached_on_side(grid[1], kernel[1], stride, device)
    rows = (kernel_y * kernel[1])[:, None, :, None] + kernel_x[None, :, None, :]
    columns = (parent_y * W)[:, None, :, None] + parent_x[None, :, None, :]
    there = there_y[:, None, :, None] & there_x[None, :, None, :]
    return torch.where(there, rows * (H * W) + columns, 0).flatten(2), there.flatten(2)


def _reached_on_side(size: int, kernel: int, stride: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    num_parents = (size - kernel) // stride + 1
    child = torch.arange(size, device=device)[:, None]
    tap = torch.arange((kernel + stride - 1) // stride, device=device)[None, :]
    place = child % stride + stride * tap
    parent = torch.div(child, stride, rounding_mode="floor") - tap
    return place, parent, (place < kernel) & (parent >= 0) & (parent < num_parents), num_parents


def map_size(grid: tuple[int, int], kernel: tuple[int, int], stride: int) -> tuple[int, int]:
    """(H, W), the positions of a kernel on a map of (h, w)."""
    return (grid[0] - kernel[0]) // stride + 1, (grid[1] - kernel[1]) // stride + 1


def digamma(x: Tensor) -> Tensor:
    """psi(x) for x >= 1. ONNX has none: it gets the asymptotic series at x + 8, right to 12 digits."""
    if not torch.jit.is_scripting():
        if torch.onnx.is_in_onnx_export():
            y = x + 8
            square = 1 / (y * y)
            series = square * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square * (1 / 240 - square / 132))))
            steps = 1 / x
            for step in range(1, 8):
                steps = steps + 1 / (x + step)
            return y.log() - 0.5 / y - series - steps
    return torch.digamma(x)


def not_zero(mass: Tensor) -> Tensor:
    """What moments are divided by: a parent that nobody votes for stays without moments, and without NaN."""
    return mass + 1e-8


def compute_dtype(poses: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(poses.dtype, weight.dtype), torch.float32)
