"""Convolution as a product of unfolded images against PyTorch's in float64, and where it is taken."""

import pytest
import torch
from convolutions import centered_conv2d, inputs, with_gradients
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional

import capszoo
from capszoo.kernels import large_conv, unfolded_conv
from capszoo.kernels.fourier_plan import best_plan, matrices
from capszoo.kernels.large_conv import chosen_plan, large_conv2d
from capszoo.kernels.processor import has_matrix_units
from capszoo.kernels.scratch import release_scratch
from capszoo.kernels.unfolded_conv import Unfolding, plan_for
from capszoo.layers import ScaledConv2d

FORMATS = [torch.channels_last, torch.contiguous_format]


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (4, 3, 4))),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    kernel=st.integers(1, 9),
    stride=st.integers(1, 4),
    layout=st.sampled_from(FORMATS),
    centered=st.sampled_from([None, 0.0, 1.0]),
    seed=st.integers(0, 99),
)
@example(sizes=(2, 3, 4), height=20, width=20, kernel=9, stride=2, layout=torch.channels_last, centered=1.0, seed=0)
@example(sizes=(1, 1, 1), height=9, width=9, kernel=9, stride=2, layout=FORMATS[1], centered=None, seed=0)
def test_exact(sizes, height, width, kernel, stride, layout, centered, seed):
    x, weight, bias = inputs(*sizes, max(height, kernel), max(width, kernel), kernel, seed)
    expected = with_gradients(centered_conv2d, x, weight, bias, stride=stride, centered=centered)
    sizes = with_gradients(functional.conv2d, x.abs(), weight.abs(), bias.abs(), stride=stride)  # before they cancel
    x, weight = (t.float().to(memory_format=layout) for t in (x, weight))
    centered = None if centered is None else torch.tensor(centered)
    found = with_gradients(large_conv2d, x, weight, bias.float(), plan=Unfolding(kernel, stride), centered=centered)
    assert [t.shape for t in found] == [t.shape for t in expected]
    for actual, wanted, size in zip(found, expected, sizes, strict=True):
        assert (actual - wanted).norm() <= 1e-6 * size.norm()


@pytest.mark.parametrize("centered", [None, torch.ones(())])
def test_one_gradient_alone_and_higher_derivatives(centered):
    x, weight = torch.randn(2, 2, 9, 9), torch.randn(3, 2, 5, 5)
    for tensor in (x, weight):
        tensor.requires_grad_()
        y = large_conv2d(x, weight, None, Unfolding(5, 2), centered=centered)
        (gradient,) = torch.autograd.grad(y.square().sum(), tensor)
        y = centered_conv2d(x, weight, stride=2, centered=centered)
        (expected,) = torch.autograd.grad(y.square().sum(), tensor)
        assert (gradient - expected).norm() <= 1e-5 * expected.norm()
        tensor.requires_grad_(False)

    def penalty(function):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        gradients = torch.autograd.grad(function(a, b).square().sum(), (a, b), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), (a, b))

    found = penalty(lambda a, b: large_conv2d(a, b, None, Unfolding(5, 2), centered=centered))
    expected = penalty(lambda a, b: centered_conv2d(a, b, stride=2, centered=centered))
    for actual, wanted in zip(found, expected, strict=True):
        assert (actual - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("centered", [None, torch.ones(())])
def test_bfloat16_is_as_exact_as_the_convolution_that_autocast_has(layout, centered):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((3, 16, 12, 12), (8, 16, 5, 5)))
    x, weight, bias = (x + 1).to(memory_format=layout), weight.to(memory_format=layout) + 0.3, torch.ones(8)
    scale = torch.tensor(0.25)

    def plain(x, weight, bias):
        return centered_conv2d(x, weight, None, 2, centered) * scale + bias.view(-1, 1, 1)

    expected = with_gradients(plain, x.double(), weight.double(), bias.double())
    with torch.autocast("cpu", torch.bfloat16):
        wanted = with_gradients(plain, x, weight, bias)
        plan = Unfolding(5, 2, torch.bfloat16)
        found = with_gradients(large_conv2d, x, weight, bias, plan=plan, scale=scale, centered=centered)
    assert [t.dtype for t in found] == [torch.bfloat16] + 3 * [torch.float32]
    for actual, other, exact in zip(found, wanted, expected, strict=True):
        error, least = ((t - exact).norm() / exact.norm() for t in (actual, other))
        assert error <= max(1.2 * least, 2**-9)


FLOAT, HALF = Unfolding(9, 2), Unfolding(9, 2, torch.bfloat16)


@pytest.mark.parametrize(
    ("shape", "channels", "kernel", "chosen", "chosen_of_half"),
    [
        ((1, 256, 20, 20), 256, 9, FLOAT, FLOAT),
        ((8, 256, 20, 20), 256, 9, FLOAT, HALF),
        ((1, 64, 20, 20), 64, 9, FLOAT, None),
        ((16, 64, 20, 20), 64, 9, None, None),
        ((16, 192, 20, 20), 64, 9, None, None),
        ((8, 128, 20, 20), 128, 9, FLOAT, None),
        ((8, 192, 20, 20), 256, 9, FLOAT, HALF),
        ((16, 256, 14, 14), 256, 3, None, None),
        ((1, 8, 20, 20), 16, 9, None, None),
        ((1, 1, 28, 28), 256, 9, None, None),
        ((128, 256, 20, 20), 256, 9, None, HALF),
        ((1000, 256, 20, 20), 256, 9, None, None),
    ],
)
def test_where_it_is_faster(shape, channels, kernel, chosen, chosen_of_half):
    x, weight = torch.empty(shape, device="meta"), torch.empty(channels, shape[1], kernel, kernel, device="meta")
    assert plan_for(x, weight, 2) == chosen
    assert plan_for(x, weight, 2, half=True) == chosen_of_half


@pytest.fixture
def counted(monkeypatch):
    """The plans of the convolutions that were such products."""
    plans = []
    forward = unfolded_conv.forward
    monkeypatch.setattr(unfolded_conv, "forward", lambda plan, *rest: plans.append(plan) or forward(plan, *rest))
    return plans


def test_layer_takes_it_for_small_batches(counted, monkeypatch):
    monkeypatch.setattr(large_conv, "has_fast_vectors", lambda: False)
    torch.manual_seed(0)
    conv, x = ScaledConv2d(64, 64, 9, 2), torch.randn(2, 64, 20, 20)
    with capszoo.set_fourier_conv(False):
        expected = with_gradients(conv, x)
    assert not counted
    for found, wanted in zip(with_gradients(conv, x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert len(counted) == 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(conv(x).float(), expected[0], rtol=2e-2, atol=2e-2)
    assert len(counted) == (1 if has_matrix_units() else 2)
    assert chosen_plan(x.double(), conv.weight.double(), 2) is None
    counted.clear()
    for other in (torch.fx.symbolic_trace(conv), torch.export.export(conv, (x,)).module()):
        torch.testing.assert_close(other(x), expected[0], rtol=1e-4, atol=1e-5)
    assert not counted


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, None])
def test_rows_of_bfloat16_where_that_is_fast(counted, monkeypatch, precision):
    monkeypatch.setattr(large_conv, "has_fast_vectors", lambda: True)
    monkeypatch.setattr(large_conv, "has_matrix_units", lambda: False)
    torch.manual_seed(0)
    conv, x = ScaledConv2d(192, 192, 9, 2, centered=True), torch.randn(4, 192, 20, 20)
    with capszoo.set_fourier_conv(False):
        expected = with_gradients(conv, x)
    with torch.autocast("cpu", precision, enabled=precision is not None):
        found = with_gradients(conv, x)
    for actual, wanted in zip(found, expected, strict=True):
        assert (actual - wanted).norm() <= (1e-5 if precision is None else 1e-2) * wanted.norm()
    assert [plan.dtype for plan in counted] == [torch.bfloat16 if precision == torch.bfloat16 else torch.float32]
    if precision == torch.bfloat16:
        with torch.no_grad(), torch.autocast("cpu", precision):
            assert torch.equal(conv(x.bfloat16()), found[0])


def test_gradient_of_kernels_is_in_channels_last_format():
    weight = torch.randn(64, 64, 9, 9).to(memory_format=torch.channels_last).requires_grad_()
    x = torch.randn(1, 64, 20, 20)
    y = large_conv2d(x, weight, None, chosen_plan(x, weight, 2))
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert gradient.stride() == weight.stride()


PLANS = [Unfolding(5, 2), Unfolding(5, 2, torch.bfloat16), best_plan(12, 12, 5, 2, 2, 3)]


@pytest.mark.parametrize("plan", PLANS, ids=["float32", "bfloat16", "fourier"])
def test_passes_in_any_order(plan):
    """Memory that is used again holds what is still needed."""
    x, weight = torch.randn(2, 4, 2, 12, 12), torch.randn(3, 2, 5, 5).requires_grad_()
    centered = torch.ones(())

    def convolve(images):
        return large_conv2d(images, weight, None, plan, centered=centered)

    expected = [torch.autograd.grad(convolve(images).square().sum(), weight)[0] for images in x]
    first, second = map(convolve, x)
    with torch.no_grad():
        assert torch.equal(convolve(x[0]), first)
    with torch.inference_mode():
        assert torch.equal(convolve(x[1]), second)
    for _ in range(2):
        for y, wanted in zip((first, second), expected, strict=True):
            assert torch.equal(torch.autograd.grad(y.square().sum(), weight, retain_graph=True)[0], wanted)
    images = x[0].clone().requires_grad_()
    (alone,) = torch.autograd.grad(convolve(images).square().sum(), images)
    both = torch.autograd.grad(convolve(images).square().sum(), (images, weight))
    assert torch.equal(alone, both[0]) and torch.equal(both[1], expected[0])


@pytest.mark.parametrize("plan", PLANS, ids=["float32", "bfloat16", "fourier"])
def test_gradients_of_many_at_once_and_other_defaults(plan):
    x, weight = torch.randn(2, 2, 12, 12), torch.randn(3, 2, 5, 5)
    centered, grads = torch.ones(()), torch.randn(4, 2, 3, 4, 4)
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    tolerance = 3e-2 if plan.dtype == torch.bfloat16 else 1e-5
    y = large_conv2d(x, weight, None, plan, centered=centered)
    expected = [torch.autograd.grad(y, inputs, grad, retain_graph=True) for grad in grads]
    at_once = torch.autograd.grad(y, inputs, grads, is_grads_batched=True)
    for found, wanted in zip(at_once, map(torch.stack, zip(*expected, strict=True)), strict=True):
        assert (found - wanted).norm() <= tolerance * wanted.norm()
    matrices.cache_clear()
    release_scratch()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            y = large_conv2d(x, weight, None, plan, centered=centered)
            found = torch.autograd.grad(y, inputs, grads[0])
    finally:
        torch.set_default_dtype(default)
    assert all(torch.equal(*pair) for pair in zip(found, expected[0], strict=True))
