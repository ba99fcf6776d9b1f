"""Routing in Triton against the reference in float64, through the interpreter."""

import os

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# Ratios of norms, for the output and for the gradients.
BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 1e-2), torch.float16: (1e-2, 1e-2)}


@pytest.mark.slow
def test_through_the_interpreter(through_the_interpreter):
    """All tests below."""


def interpreted(test):
    asked = pytest.mark.usefixtures("interpreted_loops", "form")(test)
    return pytest.mark.skipif(not INTERPRETING, reason="run by test_through_the_interpreter")(asked)


pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


def error(actual, expected):
    difference = (actual.double() - expected).norm().item()
    return difference / expected.norm().item() if expected.any() else difference


def make_inputs(B, T, P, K, J, D, seed=0, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, T * P, K), (T, K, J, D), (J, D), (B, J, D)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def route(x, weight, bias, grad, num_iters, approximate):
    from capszoo.kernels.dynamic_routing import dynamic_routing, dynamic_routing_backward

    v, sums = dynamic_routing(x, weight, bias, num_iters, approximate)
    assert sums.shape == (num_iters, *v.shape) and sums.dtype == torch.float32
    return v, *dynamic_routing_backward(grad, x, weight, sums, approximate)


def check(inputs, num_iters=3, approximate=False):
    from capszoo.kernels import reference

    exact = [t.double().requires_grad_() for t in inputs[:3]]
    v = reference.dynamic_routing(*exact, num_iters, approximate)
    expected = v.detach(), *torch.autograd.grad(v, exact, inputs[3].double())
    results = route(*inputs, num_iters, approximate)
    bounds = BOUNDS[inputs[0].dtype]
    for name, actual, wanted in zip(("v", "dx", "dweight", "dbias"), results, expected, strict=True):
        assert actual.is_contiguous() and actual.shape == wanted.shape, name
        assert error(actual, wanted) <= bounds[name != "v"], name
    return results


# Types beyond one tile (256 / K), positions beyond one tile (4), samples beyond one tile (16), and remainders.
@interpreted
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (5, 7, 5, 9, 6, 19))),
    num_iters=st.integers(1, 4),
    approximate=st.booleans(),
    dtype=st.sampled_from(list(BOUNDS)),
    seed=st.integers(0, 2**20),
)
@example((17, 3, 1, 5, 3, 7), 2, False, torch.float32, 0)
@example((2, 37, 1, 8, 3, 16), 3, False, torch.float32, 0)
@example((2, 5, 9, 3, 3, 5), 3, True, torch.float32, 0)
@example((1, 1, 1, 1, 1, 1), 2, False, torch.float32, 0)
@example((2, 3, 2, 300, 2, 5), 2, False, torch.float32, 0)  # a pose longer than a tile
@example((3, 5, 2, 4, 7, 5), 3, False, torch.float32, 0)  # classes beside a power of 2
@example((2, 9, 1, 3, 16, 16), 2, False, torch.float32, 0)
def test_output_and_gradients(sizes, num_iters, approximate, dtype, seed):
    check([t.to(dtype) for t in make_inputs(*sizes, seed=seed)], num_iters, approximate)


@interpreted
def test_many_classes():
    check([t.float() for t in make_inputs(2, 3, 2, 4, 130, 3, scale=0.3)], num_iters=2)


@interpreted
def test_large_logits():
    x, weight, bias, grad = [t.float() for t in make_inputs(2, 5, 1, 4, 5, 6)]
    check([40 * x, weight, bias, grad], num_iters=2)


@interpreted
@pytest.mark.parametrize("approximate", [False, True])
def test_extremes(approximate):
    x, weight, bias, grad = [t.float() for t in make_inputs(2, 5, 1, 4, 5, 6)]
    for power in (-30, 20, 30):
        check([10.0**power * x, 0.1**power * weight, bias, grad], approximate=approximate)
        # Rounding chooses the couplings of such logits.
        results = route(10.0 ** abs(power) * x, weight, bias, grad, 3, approximate)
        assert all(result.isfinite().all() for result in results)


@interpreted
@pytest.mark.parametrize("approximate", [False, True])
def test_zero_vectors(approximate):
    x, weight, bias, grad = [t.float() for t in make_inputs(2, 4, 1, 3, 3, 5)]
    x[:, 1:3] = 0
    check([x, weight, bias, grad], approximate=approximate)
    results = route(torch.zeros_like(x), weight, torch.zeros_like(bias), grad, 3, approximate)
    assert all(result.isfinite().all() for result in results) and not results[0].any()


@interpreted
def test_strides_and_repeats():
    inputs = [t.float() for t in make_inputs(3, 4, 2, 5, 3, 6)]
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in inputs]
    first = check(inputs)
    assert all(torch.equal(*pair) for pair in zip(first, check(strided), strict=True))


@interpreted
def test_mixed_dtypes():
    x, weight, bias, grad = [t.float() for t in make_inputs(2, 3, 2, 4, 3, 5)]
    results = route(x.bfloat16(), weight, bias, grad.bfloat16(), 3, False)
    assert [result.dtype for result in results[:3]] == [torch.bfloat16, torch.bfloat16, torch.float32]
    expected = route(x.bfloat16().float(), weight, bias, grad.bfloat16().float(), 3, False)
    assert error(results[2], expected[2].double()) <= 1e-6


@interpreted
def test_what_is_registered_for_cuda(monkeypatch):
    from capszoo.kernels import ops, reference

    monkeypatch.setattr(ops, "runs_triton", lambda device, dtype: dtype == torch.float32)
    for dtype in (torch.float32, torch.float64):
        x, weight, bias, grad = [t.to(dtype) for t in make_inputs(2, 3, 2, 4, 3, 5)]
        v, sums = ops._routing_cuda(x, weight, bias, 3, False, True)
        results = v, *ops._routing_backward_cuda(grad, x, weight, bias, sums, False, True)
        exact = [t.double().requires_grad_() for t in (x, weight, bias)]
        expected = reference.dynamic_routing(*exact)
        wanted = expected.detach(), *torch.autograd.grad(expected, exact, grad.double())
        assert all(r.dtype == dtype and error(r, w) <= 1e-4 for r, w in zip(results, wanted, strict=True))
        squashed = ops._squash_cuda(x, False)
        assert error(squashed, reference.squash(x.double())) <= 1e-6
        assert ops._squash_backward_cuda(x, x, False).dtype == dtype
