"""Depthwise convolutions by products against PyTorch's, numbers and gradients, and where they are chosen."""

import pytest
import torch
import torch.nn.functional as F

from capszoo.layers import DepthwiseConv2d, depthwise


def conv2d(layer, x):
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, groups=layer.groups)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "size, kernel, stride", [((5, 5), (5, 5), 1), ((3, 4), (3, 4), 2), ((6, 7), (5, 6), 2), ((1, 1), (1, 1), 1)]
)
def test_numbers_and_gradients(size, kernel, stride, memory_format):
    torch.manual_seed(0)
    layer = DepthwiseConv2d(6, kernel, stride, dtype=torch.float64).to(memory_format=memory_format)
    x = torch.randn(3, 6, *size, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    found, expected = layer(x), conv2d(layer, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    inputs = [x, layer.weight, layer.bias]
    grad = torch.randn_like(expected)
    for one, other in zip(*(torch.autograd.grad(v, inputs, grad) for v in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradgradcheck(layer, x)


def test_products_are_for_whole_maps_on_a_cpu(monkeypatch):
    calls = []
    monkeypatch.setattr(depthwise, "_multiply_maps", lambda *tensors: calls.append(1) or tensors[0][:, :, :1, :1])
    layer = DepthwiseConv2d(2, (3, 3))
    layer(torch.zeros(1, 2, 3, 3))
    assert calls == [1]
    assert layer(torch.zeros(1, 2, 4, 4)).shape == (1, 2, 2, 2)
    layer.to("meta")(torch.zeros(1, 2, 3, 3, device="meta"))
    assert calls == [1]


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_graphs():
    layer, x = DepthwiseConv2d(2, (3, 3)), torch.rand(1, 2, 3, 3)
    assert torch.equal(torch.jit.script(layer)(x), layer(x))
    assert torch.equal(torch.fx.symbolic_trace(layer)(x), layer(x))
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), conv2d(layer, x).float(), rtol=2e-2, atol=2e-2)
