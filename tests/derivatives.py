"""What tests of operators share: derivatives of every order and mode, and how double backward passes give the same."""

from functools import partial

import torch
from torch.autograd import forward_ad
from torch.autograd import functional as F

X = (2, 4, 3)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DIRECTION = draw(*X, seed=3)


def scalar(function):
    return lambda x: function(x).sin().sum()


def penalty(f, x):
    """The gradient of a gradient penalty."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scalar(f)(x), x, create_graph=True)
    return torch.autograd.grad((gradient.norm() - 1).square(), x)[0]


def third(f, x):
    x = x.clone().requires_grad_()
    result = scalar(f)(x)
    for _ in range(3):
        (result,) = torch.autograd.grad((result * result).sum(), x, create_graph=True)
    return result


def jvp_by_dual_numbers(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, DIRECTION))).tangent


def hvp_forward_over_reverse(f, x):
    return torch.func.jvp(torch.func.grad(scalar(f)), (x,), (DIRECTION,))[1]


def hvp_forward_over_reverse_by_dual_numbers(f, x):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), DIRECTION)
        return forward_ad.unpack_dual(torch.autograd.grad(scalar(f)(dual), dual)[0]).tangent


def hvp_reverse_over_forward(f, x):
    return torch.func.grad(lambda x: torch.func.jvp(scalar(f), (x,), (DIRECTION,))[1])(x)


def gradient(f, x):
    return F.vjp(scalar(f), x)[1]


def jvp(f, x):
    return F.jvp(f, x, DIRECTION)[1]


def hvp(f, x):
    return F.hvp(scalar(f), x, DIRECTION)[1]


def hessian(f, x):
    return F.hessian(scalar(f), x)


# What to compute, and how the reference gives the same by double backward passes alone.
DERIVATIVES = {
    "grad": (lambda f, x: torch.func.grad(scalar(f))(x), gradient),
    "vjp": (lambda f, x: torch.func.vjp(scalar(f), x)[1](torch.ones((), dtype=x.dtype))[0], gradient),
    "jvp": (lambda f, x: torch.func.jvp(f, (x,), (DIRECTION,))[1], jvp),
    "linearize": (lambda f, x: torch.func.linearize(f, x)[1](DIRECTION), jvp),
    "dual numbers": (jvp_by_dual_numbers, jvp),
    "jacfwd": (lambda f, x: torch.func.jacfwd(f)(x), F.jacobian),
    "jacrev": (lambda f, x: torch.func.jacrev(f)(x), F.jacobian),
    "jacobian in one pass": (partial(F.jacobian, vectorize=True), F.jacobian),
    "jacobian by dual numbers": (partial(F.jacobian, vectorize=True, strategy="forward-mode"), F.jacobian),
    "reverse over reverse": (hvp, hvp),
    "forward over reverse": (hvp_forward_over_reverse, hvp),
    "forward over reverse by dual numbers": (hvp_forward_over_reverse_by_dual_numbers, hvp),
    "reverse over forward": (hvp_reverse_over_forward, hvp),
    "torch.func.hessian": (lambda f, x: torch.func.hessian(scalar(f))(x), hessian),
    "hessian": (hessian, hessian),
    "gradient penalty": (penalty, penalty),
    "third order": (third, third),
    "vmap": (lambda f, x: torch.vmap(f)(torch.stack([x, -x])), lambda f, x: torch.stack([f(x), f(-x)])),
    "vmap of grad": (
        lambda f, x: torch.vmap(torch.func.grad(lambda x: scalar(f)(x[None])))(x),
        gradient,
    ),
}
