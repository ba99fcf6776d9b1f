"""References for the convolutions with large kernels."""

import torch
from torch.nn import functional


def inputs(B, C, D, H, W, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, C, H, W), (D, C, k, k), (D,)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def with_gradients(function, *tensors, **kwargs):
    tensors = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    y = function(*tensors, **kwargs)
    return [y.detach(), *torch.autograd.grad(y, tensors, torch.linspace(0.5, 1, y.numel()).view(y.shape).to(y))]


def centered_conv2d(x, weight, bias=None, stride=1, centered=None):
    mean = weight.mean((1, 2, 3), keepdim=True)
    return functional.conv2d(x, weight - mean if centered else weight, bias, stride)


def error(actual, expected):
    return float((actual - expected).norm() / expected.norm())
