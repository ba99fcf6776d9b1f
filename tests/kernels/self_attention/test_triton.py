"""Self-attention routing in Triton against the reference in float64, through the interpreter."""

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


def make_inputs(B, N, K, J, D, seed=0, scale=0.5):
    # N capsules: I in the kernels.
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, N, K), (N, K, J, D), (N, J), (B, J, D)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def route(x, weight, prior, grad):
    from capszoo.kernels.self_attention import ops

    s, total = ops.launchers.forward(x, weight, prior, True)
    assert total.shape == s.shape and total.dtype == torch.float32
    return s, *ops.launchers.backward(grad, x, weight, prior, total, True)


def check(inputs):
    from capszoo.kernels.self_attention import reference

    exact = [t.double().requires_grad_() for t in inputs[:3]]
    s = reference.self_attention_routing(*exact)
    expected = s.detach(), *torch.autograd.grad(s, exact, inputs[3].double())
    results = route(*inputs)
    for name, actual, wanted in zip(("s", "dx", "dweight", "dprior"), results, expected, strict=True):
        assert actual.is_contiguous() and actual.shape == wanted.shape, name
        assert actual.dtype == inputs[0].dtype, name
        assert error(actual, wanted) <= BOUNDS[actual.dtype][name != "s"], name
    return results


@interpreted
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (5, 19, 9, 6, 19))),
    dtype=st.sampled_from(list(BOUNDS)),
    seed=st.integers(0, 2**20),
)
@example((17, 16, 8, 10, 16), torch.float32, 0)  # more samples than a tile has
@example((2, 37, 8, 3, 16), torch.float32, 0)
@example((1, 1, 1, 1, 1), torch.float32, 0)
def test_output_and_gradients(sizes, dtype, seed):
    check([t.to(dtype) for t in make_inputs(*sizes, seed=seed, scale=0.3)])


@interpreted
def test_extremes_and_strides():
    x, weight, prior, grad = (t.float() for t in make_inputs(3, 5, 4, 5, 6))
    x[:, 1:3] = 0
    first = check([x, weight, prior, grad])
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, weight, prior, grad)]
    assert all(torch.equal(*pair) for pair in zip(first, check(strided), strict=True))
    check([10 * x, weight, prior, grad])
    for factor in (0, 1e4):
        assert all(result.isfinite().all() for result in route(factor * x, weight, prior, grad))


@interpreted
def test_what_is_registered_for_cuda(monkeypatch):
    from capszoo.kernels.self_attention import ops, reference

    monkeypatch.setattr(ops, "runs_triton", lambda device, dtype: dtype == torch.float32)
    for dtype in (torch.float32, torch.float64):
        x, weight, prior, grad = (t.to(dtype) for t in make_inputs(2, 3, 4, 3, 5))
        s, total = ops._forward_cuda(x, weight, prior, True, True)
        results = s, *ops._backward_cuda(grad, x, weight, prior, total, True, True)
        exact = [t.double().requires_grad_() for t in (x, weight, prior)]
        expected = reference.self_attention_routing(*exact)
        wanted = expected.detach(), *torch.autograd.grad(expected, exact, grad.double())
        assert all(r.dtype == dtype and error(r, w) <= 1e-4 for r, w in zip(results, wanted, strict=True))
