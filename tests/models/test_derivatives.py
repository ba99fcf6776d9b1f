"""Derivatives of whole models by torch.func and of second order, against first derivatives and the plain form."""

import pytest
import timm
import torch
from families import sizes_of
from timm.optim import create_optimizer_v2
from torch.func import functional_call

import capszoo

every_model = pytest.mark.parametrize("name", capszoo.list_models())


def small(name):
    torch.manual_seed(0)
    sizes = dict(in_chans=1, img_size=18, num_classes=4)
    model = timm.create_model(name, **sizes_of(name), **sizes, dtype=torch.float64).eval()
    for parameter in model.parameters():
        if not parameter.detach().any():  # scores whose matrices start at zero have many derivatives of zero
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def images():
    return torch.rand(3, 1, 18, 18, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def parameters(model):
    """Its parameters, free of its graph, and a direction in their space."""
    params = {key: p.detach() for key, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    return params, {key: torch.randn(p.shape, generator=generator, dtype=p.dtype) for key, p in params.items()}


def energy(model, params, x):
    return functional_call(model, params, (x,)).sin().sum()


def gradients(model, x):
    return torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))


@every_model
def test_gradients_of_each_sample(name):
    model, (params, _) = small(name), parameters(small(name))
    by_sample = torch.vmap(torch.func.grad(lambda p, x: energy(model, p, x[None])), in_dims=(None, 0))(params, images())
    for i, image in enumerate(images()):
        for (key, found), expected in zip(by_sample.items(), gradients(model, image[None]), strict=True):
            torch.testing.assert_close(found[i], expected, msg=key)


@every_model
def test_forward_mode(name):
    model = small(name)
    params, direction = parameters(model)
    value, slope = torch.func.jvp(lambda p: energy(model, p, images()), (params,), (direction,))
    expected = sum((g * d).sum() for g, d in zip(gradients(model, images()), direction.values(), strict=True))
    assert abs(expected) > 0
    torch.testing.assert_close(value, model(images()).sin().sum())
    torch.testing.assert_close(slope, expected)


@every_model
def test_second_derivatives(name):
    """Hessian times direction, in three ways."""
    model = small(name)
    params, direction = parameters(model)

    def twice_backward():
        first = torch.autograd.grad(model(images()).sin().sum(), list(model.parameters()), create_graph=True)
        return torch.autograd.grad(first, list(model.parameters()), list(direction.values()))

    fused = twice_backward()
    with capszoo.set_fused_routing(False):
        plain = twice_backward()
    gradient = torch.func.grad(lambda p: energy(model, p, images()))
    _, forward_over_reverse = torch.func.jvp(gradient, (params,), (direction,))
    for found, expected, other in zip(fused, plain, forward_over_reverse.values(), strict=True):
        assert expected.abs().sum() > 0
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(other, expected)


@every_model
def test_optimizer_of_second_order(name):
    def step():
        model = small(name)
        optimizer = create_optimizer_v2(model, opt="adahessian", lr=0.01)
        assert optimizer.is_second_order
        model(images()).square().sum().backward(create_graph=True)
        optimizer.step()
        hessians = [p.hess for p in model.parameters()]
        model.zero_grad(set_to_none=True)  # the gradients hold the graph, which holds the parameters
        return hessians + [p.detach() for p in model.parameters()]

    fused = step()
    with capszoo.set_fused_routing(False):
        for found, expected in zip(fused, step(), strict=True):
            assert expected.abs().sum() > 0
            torch.testing.assert_close(found, expected)
