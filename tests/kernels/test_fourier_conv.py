"""Convolution by Fourier transforms against PyTorch's in float64, and where it is taken."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
from convolutions import centered_conv2d, error, inputs, with_gradients
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import capszoo
from capszoo.kernels import fourier_conv, fourier_plan, large_conv
from capszoo.kernels.fourier_conv import is_faster
from capszoo.kernels.fourier_plan import Plan, best_plan, cheapest, matrices, multiplications
from capszoo.kernels.large_conv import chosen_plan, large_conv2d
from capszoo.kernels.processor import has_matrix_units
from capszoo.layers import ScaledConv2d


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (4, 3, 4))),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    kernel=st.integers(2, 11),
    stride=st.integers(1, 4),
    gauss=st.booleans(),
    centered=st.sampled_from([None, 0.0, 1.0]),
    seed=st.integers(0, 99),
)
@example(sizes=(2, 3, 4), height=20, width=20, kernel=9, stride=2, gauss=True, centered=1.0, seed=0)
@example(sizes=(2, 3, 4), height=20, width=20, kernel=9, stride=2, gauss=False, centered=None, seed=0)
@example(sizes=(1, 1, 1), height=9, width=9, kernel=9, stride=2, gauss=False, centered=1.0, seed=0)
@example(sizes=(2, 2, 3), height=41, width=17, kernel=5, stride=1, gauss=True, centered=None, seed=0)
def test_exact(sizes, height, width, kernel, stride, gauss, centered, seed):
    stride = min(stride, kernel - 1)
    B, C, D = sizes
    x, weight, bias = inputs(B, C, D, max(height, kernel), max(width, kernel), kernel, seed)
    expected = with_gradients(centered_conv2d, x, weight, bias, stride=stride, centered=centered)
    sizes = with_gradients(functional.conv2d, x.abs(), weight.abs(), bias.abs(), stride=stride)  # before they cancel
    plan = replace(best_plan(*x.shape[2:], kernel, stride, C, D), gauss=gauss)
    centered = None if centered is None else torch.tensor(centered)
    found = with_gradients(large_conv2d, *(t.float() for t in (x, weight, bias)), plan=plan, centered=centered)
    assert [t.shape for t in found] == [t.shape for t in expected]
    for actual, wanted, size in zip(found, expected, sizes, strict=True):
        assert (actual - wanted).norm() <= 1e-6 * size.norm()


@pytest.mark.parametrize("gauss", [True, False])
@pytest.mark.parametrize("size", [6, 7, 10, 13, 16])
def test_any_size_of_maps(size, gauss):
    x, weight, bias = inputs(2, 3, 4, 20, 23, 9)
    expected = with_gradients(functional.conv2d, x, weight, bias, stride=2)
    found = with_gradients(large_conv2d, *(t.float() for t in (x, weight, bias)), plan=Plan(9, 2, 20, 23, size, gauss))
    assert all(error(a, b) <= 2e-6 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("gauss", [True, False])
def test_more_images_than_a_chunk(gauss, monkeypatch):
    x, weight, bias = inputs(11, 2, 3, 12, 12, 5)
    expected = with_gradients(functional.conv2d, x, weight, bias, stride=2)
    monkeypatch.setattr(fourier_conv, "CHUNK", 4)
    plan = replace(best_plan(12, 12, 5, 2, 2, 3), gauss=gauss)
    found = with_gradients(large_conv2d, *(t.float() for t in (x, weight, bias)), plan=plan)
    assert all(error(a, b) <= 2e-6 for a, b in zip(found, expected, strict=True))


def test_counts_of_the_standard_convolution(monkeypatch):
    monkeypatch.setattr(fourier_plan, "TRAFFIC", 24)
    plan = best_plan(20, 20, 9, 2, 256, 256)
    assert (plan.size, plan.tile, plan.tiles, plan.products) == (10, 6, (1, 1), 148)
    direct, image, kernels = multiplications(plan, 256, 256)
    # Columns of 10 by a matrix of 10 x 10; two rows that are real to 14 products, four pairs of rows to 30.
    transform = 10 * 10 * 10 + 2 * 14 * 10 + 4 * 30 * 20
    assert direct == 36 * 81 * 256 * 256 and image == 148 * (1024 * 256 + 36 * 256) + transform * 1024
    assert kernels == 148 * 25 * 1024 * 256
    assert is_faster(plan, 16, 256, 256) and not is_faster(plan, 8, 256, 256)
    few = cheapest(plan, 16, 256, 256)
    assert (few.gauss, few.numbers, few.products) == (False, 100, 200)
    _, image, kernels = multiplications(few, 256, 256)
    transform = 10 * 10 * 10 + 2 * 10 * 10 + 4 * 20 * 20
    assert image == 200 * (1024 * 256 + 36 * 256) + transform * 1024 and kernels == 100 * 25 * 1024 * 256
    assert cheapest(plan, 128, 256, 256) == plan
    assert [is_faster(cheapest(plan, B, 256, 256), B, 256, 256) for B in (8, 11, 12, 128)] == [False, False, True, True]


def test_choices_on_zen_5(monkeypatch):
    monkeypatch.setattr(fourier_plan, "TRAFFIC", 40)
    plan = best_plan(20, 20, 9, 2, 256, 256)
    chosen = {B: cheapest(plan, B, 256, 256) for B in (12, 16, 24, 32, 48, 64, 96, 128)}
    assert [plan.gauss for plan in chosen.values()] == [False] * 6 + [True] * 2
    assert [is_faster(plan, B, 256, 256) for B, plan in chosen.items()] == [False] * 2 + [True] * 6
    assert [is_faster(plan, B, 256, 256, half=True) for B, plan in chosen.items()] == [False] * 4 + [True] * 4
    assert not is_faster(best_plan(20, 20, 9, 2, 64, 64), 128, 64, 64, half=True)


@pytest.mark.parametrize("centered", [None, torch.ones(())])
def test_higher_derivatives_are_those_of_the_direct_convolution(centered):
    x, weight, _ = inputs(2, 2, 3, 9, 9, 5)

    def penalty(function):
        a, b = x.float().requires_grad_(), weight.float().requires_grad_()
        gradients = torch.autograd.grad(function(a, b).square().sum(), (a, b), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), (a, b))

    plan = best_plan(9, 9, 5, 2, 2, 3)
    found = penalty(lambda a, b: large_conv2d(a, b, None, plan, centered=centered))
    expected = penalty(lambda a, b: centered_conv2d(a, b, stride=2, centered=centered))
    assert all(error(a, b) <= 1e-5 for a, b in zip(found, expected, strict=True))


def test_one_gradient_alone():
    x, weight, bias = (t.float() for t in inputs(2, 2, 3, 9, 9, 5))
    plan = best_plan(9, 9, 5, 2, 2, 3)
    for tensor in (x, weight):
        tensor.requires_grad_()
        (gradient,) = torch.autograd.grad(large_conv2d(x, weight, bias, plan).sum(), tensor)
        (expected,) = torch.autograd.grad(functional.conv2d(x, weight, bias, stride=2).sum(), tensor)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
        tensor.requires_grad_(False)


@pytest.fixture
def counted(monkeypatch):
    """The plans of the convolutions that went through Fourier transforms."""
    plans = []
    forward = fourier_conv.forward
    monkeypatch.setattr(fourier_conv, "forward", lambda plan, *rest: plans.append(plan) or forward(plan, *rest))
    return plans


def make_conv():
    torch.manual_seed(0)
    return ScaledConv2d(128, 128, 9, 2)


def test_layer_takes_it_for_large_batches_alone(counted):
    conv, x = make_conv(), torch.randn(60, 128, 20, 20)
    found = conv(x)
    assert len(counted) == 1
    with capszoo.set_fourier_conv(False):
        torch.testing.assert_close(found, conv(x), rtol=1e-4, atol=1e-5)
    conv(x[:8])
    conv.double()(x.double())
    assert len(counted) == 1


def test_layer_under_autocast(counted, monkeypatch):
    monkeypatch.setattr(large_conv, "has_fast_vectors", lambda: False)
    conv, x = make_conv(), torch.randn(60, 128, 20, 20)
    expected = conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = conv(x)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
        halves = x.bfloat16()
        assert conv(halves).dtype == torch.bfloat16
    found.sum().backward()
    assert conv.weight.grad.dtype == torch.float32
    assert len(counted) == (1 if has_matrix_units() else 3)


@pytest.mark.parametrize(("images", "count"), [(30, 0), (128, 1)])
def test_layer_where_bfloat16_is_fast(counted, monkeypatch, images, count):
    monkeypatch.setattr(large_conv, "has_matrix_units", lambda: False)
    monkeypatch.setattr(large_conv, "has_fast_vectors", lambda: True)
    conv, x = ScaledConv2d(256, 256, 9, 2), torch.randn(images, 256, 20, 20)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = conv(x)
    assert len(counted) == count
    torch.testing.assert_close(found.float(), conv(x).detach(), rtol=2e-2, atol=2e-2)


def test_who_looks_on_sees_the_direct_convolution(counted):
    conv, x = make_conv(), torch.randn(60, 128, 20, 20)
    expected = conv(x).detach()
    counted.clear()
    traced = torch.jit.trace(conv, x, check_trace=False)
    assert not counted
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(traced(x), expected, **close)
    torch.testing.assert_close(torch.jit.script(conv)(x), expected, **close)
    torch.testing.assert_close(torch.fx.symbolic_trace(conv)(x), expected, **close)
    exported = torch.export.export(conv, (x,)).module()
    torch.testing.assert_close(exported(x), expected, **close)
    _, tangent = torch.func.jvp(conv, (x,), (x,))
    assert tangent.shape == expected.shape
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        conv(x)
    assert counter.get_total_flops() == 2 * 60 * 36 * 81 * 128 * 128
    assert not counted


def test_same_bits_again_and_in_another_thread():
    conv, x = make_conv(), torch.randn(60, 128, 20, 20)
    found = [with_gradients(conv, x)]
    conv(torch.randn(70, 128, 20, 20))  # other numbers in the memory that is kept
    found.append(with_gradients(conv, x))
    thread = threading.Thread(target=lambda: found.append(with_gradients(conv, x)))
    thread.start()
    thread.join()
    assert len(found) == 3
    for again in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], again, strict=True))


def test_weights_changed_before_the_backward_pass_are_noticed():
    conv, x = make_conv(), torch.randn(60, 128, 20, 20, requires_grad=True)
    weight = conv.weight.detach().clone().requires_grad_()
    plan = chosen_plan(x, weight, 2)
    y = large_conv2d(x, weight, None, plan)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("change", "stride"),
    [
        (lambda x, w: (x[:8], w), 2),
        (lambda x, w: (x.double(), w.double()), 2),
        (lambda x, w: (x.half(), w), 2),
        (lambda x, w: (x, w[..., :5]), 2),
        (lambda x, w: (x[..., :8], w), 2),
        (lambda x, w: (x[:0], w), 2),
        (lambda x, w: (x, w[..., :2, :2]), 2),
        (lambda x, w: (x.to("meta"), w.to("meta")), 2),
    ],
)
def test_direct_where_it_does_not_fit(change, stride):
    x, weight = torch.randn(60, 128, 20, 20), torch.randn(128, 128, 9, 9)
    assert isinstance(chosen_plan(x, weight, stride), Plan)
    assert not isinstance(chosen_plan(*change(x, weight), stride), Plan)


def test_network_trains_alike():
    torch.manual_seed(0)
    model = capszoo.create_model("capsnet", conv_dim=128, num_types=16)
    images = torch.rand(60, 1, 28, 28)
    gradients = {}
    for enable in (True, False):
        again = copy.deepcopy(model)
        with capszoo.set_fourier_conv(enable):
            again(images).square().sum().backward()
        gradients[enable] = [p.grad for p in again.parameters()]
    for fourier, direct in zip(gradients[True], gradients[False], strict=True):
        assert error(fourier, direct) <= 1e-4


def test_transform_of_columns_and_rows_is_the_transform():
    """Of any map, the products at all frequencies: conj(W) X of two random maps is their circular correlation."""
    for size in (6, 7, 10, 13):
        plan = Plan(5, 2, 20, 20, size)
        found = matrices(plan)
        maps = torch.randn(size * size, 3, generator=torch.Generator().manual_seed(size))
        columns = found.columns @ maps.view(size, -1)
        products = torch.empty(plan.products, 3)
        for matrix, taken, filled in found.rows():
            products[filled] = matrix @ columns[taken].view(matrix.shape[1], -1)
        kernels = torch.randn(plan.taps**2, 3, generator=torch.Generator().manual_seed(1))
        actual = found.outputs @ (products * (found.kernels @ kernels))
        as_images, as_weights = maps.t().view(1, 3, size, size), kernels.t().view(3, 1, plan.taps, plan.taps)
        expected = functional.conv2d(as_images.double(), as_weights.double(), groups=3).view(3, -1).t()
        assert error(actual, expected) <= 1e-6
