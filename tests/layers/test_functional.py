"""The operators as models call them: fused or reference by the switch, scriptable, leaves of a traced graph."""

import pytest
import torch
from timm.layers import is_notrace_function
from torch import nn

from capszoo import kernels
from capszoo.layers import capsule_lengths, dynamic_routing, set_fused_routing, squash


@pytest.fixture(params=[True, False], ids=["fused", "reference"])
def fused(request):
    set_fused_routing(request.param)
    yield request.param
    set_fused_routing(True)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 6, 3), (3, 3, 4, 5), (4, 5)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("approximate", [False, True])
def test_numbers(fused, approximate):
    x, weight, bias = inputs(torch.float64)
    torch.testing.assert_close(squash(x, approximate), kernels.reference.squash(x, approximate))
    for num_iters in 1, 2, 3:
        expected = kernels.reference.dynamic_routing(x, weight, bias, num_iters, approximate)
        torch.testing.assert_close(dynamic_routing(x, weight, bias, num_iters, approximate), expected)


def test_the_switch_chooses(fused, monkeypatch):
    called = []
    for module in kernels, kernels.reference:
        for name in "squash", "dynamic_routing":
            original = getattr(module, name)
            tag = (module is kernels, name)
            monkeypatch.setattr(module, name, lambda *a, f=original, tag=tag: called.append(tag) or f(*a))
    x, weight, bias = inputs()
    dynamic_routing(squash(x), weight, bias)
    assert (fused, "squash") in called and (fused, "dynamic_routing") in called
    assert (not fused, "dynamic_routing") not in called


@pytest.mark.parametrize("approximate", [False, True])
def test_script(approximate):
    class Module(nn.Module):
        def __init__(self, approximate: bool):
            super().__init__()
            self.approximate = approximate

        def forward(self, x, weight, bias):
            return capsule_lengths(dynamic_routing(squash(x, self.approximate), weight, bias, 2, self.approximate))

    module = Module(approximate)
    assert torch.equal(torch.jit.script(module)(*inputs()), module(*inputs()))


def test_leaves_of_a_traced_graph():
    assert is_notrace_function(squash) and is_notrace_function(dynamic_routing)


def test_lengths():
    x = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]], requires_grad=True)
    lengths = capsule_lengths(x)
    assert lengths.tolist() == [[5.0, 0.0]]
    lengths.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[[0.6, 0.8], [0.0, 0.0]]]))


def test_higher_derivatives_of_lengths():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(capsule_lengths, x[1:].detach().requires_grad_())
    result = capsule_lengths(x).sum()
    for _ in range(3):
        (gradient,) = torch.autograd.grad(result, x, create_graph=True)
        assert not gradient[0].any() and gradient[1].all()
        result = (gradient * torch.tensor([1.0, -0.5])).sum()


def test_lengths_of_any_shape_and_value():
    for shape in (2, 0, 3), (2, 3, 0), (4,):
        x = torch.ones(shape, requires_grad=True)
        torch.testing.assert_close(capsule_lengths(x), torch.linalg.vector_norm(x.detach(), dim=-1))
        assert torch.autograd.grad(capsule_lengths(x).sum(), x)[0].shape == shape
    assert capsule_lengths(torch.tensor([[float("nan"), 0.0], [0.0, float("inf")]])).isnan().tolist() == [True, False]
    assert capsule_lengths(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
