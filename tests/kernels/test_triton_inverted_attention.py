"""Inverted dot-product attention in Triton against the reference in float64, through the interpreter."""

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
    asked = pytest.mark.usefixtures("interpreted_loops")(test)
    return pytest.mark.skipif(not INTERPRETING, reason="run by test_through_the_interpreter")(asked)


pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


def error(actual, expected):
    difference = (actual.double() - expected).norm().item()
    # With one parent the couplings are 1, and the gradient of its pose is zero but for rounding.
    return difference / expected.norm().item() if expected.norm() > 1e-6 else difference


def check(B, T, P, H, W, k, J, stride, dtype=torch.float32, seed=0):
    from capszoo.kernels.inverted_attention import ops

    generator = torch.Generator().manual_seed(seed)
    parents = B, (H - k) // stride + 1, (W - k) // stride + 1, J, P, P
    shapes = (B, H, W, T, P, P), (k, k, T, P, P, J), parents, parents
    x, weight, parents, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    exact = [t.double().requires_grad_() for t in (x, weight, parents)]
    sums = ops._reference(*exact, stride)
    expected = sums.detach(), *torch.autograd.grad(sums, exact, grad.double())
    results = (
        ops.launchers.forward(x, weight, parents, stride),
        *ops.launchers.backward(grad, x, weight, parents, stride),
    )
    for name, actual, wanted in zip(("s", "dx", "dweight", "dparents"), results, expected, strict=True):
        assert actual.is_contiguous() and actual.shape == wanted.shape and actual.dtype == dtype, name
        assert error(actual, wanted) <= BOUNDS[dtype][name != "s"], name
    return results


@interpreted
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (4, 5, 4, 5, 5, 3, 6, 3))),
    dtype=st.sampled_from(list(BOUNDS)),
    seed=st.integers(0, 99),
)
@example((40, 5, 2, 1, 1, 1, 3, 1), torch.float32, 0)  # class capsules, more samples than a tile has
@example((1, 1, 1, 1, 1, 1, 1, 1), torch.float32, 0)
@example((2, 2, 6, 4, 3, 3, 2, 1), torch.float32, 0)
def test_output_and_gradients(sizes, dtype, seed):
    B, T, P, H, W, k, J, stride = sizes
    check(B, T, P, max(H, k), max(W, k), k, J, stride, dtype, seed)


@interpreted
def test_groups_of_samples_and_repeats(monkeypatch):
    from capszoo.kernels.inverted_attention import ops

    sizes = 3, 4, 2, 5, 4, 2, 5, 1
    first = check(*sizes)
    assert all(map(torch.equal, first, check(*sizes)))
    monkeypatch.setattr(ops.launchers, "GROUP_BYTES", 1)
    monkeypatch.setattr(ops.launchers, "NUM_PROGRAMS", 1)
    check(*sizes)


@interpreted
def test_large_and_zero_poses():
    from capszoo.kernels.inverted_attention import ops

    x, weight, parents = torch.randn(2, 3, 3, 2, 2, 2), torch.randn(2, 2, 2, 2, 2, 3), torch.randn(2, 2, 2, 3, 2, 2)
    for scale in (0.0, 1e4):
        results = ops.launchers.backward(torch.ones_like(parents), scale * x, weight, scale * parents, 1)
        assert all(t.isfinite().all() for t in (ops.launchers.forward(scale * x, weight, parents, 1), *results))


@interpreted
def test_what_is_registered_for_cuda(monkeypatch):
    from capszoo.kernels.inverted_attention import ops

    monkeypatch.setattr(ops, "runs_triton", lambda device, dtype: dtype == torch.float32)
    for dtype, most in ((torch.float32, 2**14), (torch.float32, 1), (torch.float64, 2**14)):
        monkeypatch.setattr(ops.launchers, "MAX_POSES", most)  # beyond, PyTorch computes
        x, weight, parents = (
            torch.randn(2, 3, 3, 2, 2, 2),
            torch.randn(2, 2, 2, 2, 2, 3),
            torch.randn(2, 2, 2, 3, 2, 2),
        )
        inputs = x.to(dtype), weight.to(dtype), parents.to(dtype)
        assert ops._in_triton(*inputs) == (dtype == torch.float32 and most > 1)
        torch.testing.assert_close(ops._forward_cuda(*inputs, 1), ops._forward(*inputs, 1))
        grad = torch.ones_like(inputs[2])
        torch.testing.assert_close(ops._backward_cuda(grad, *inputs, 1), ops._backward(grad, *inputs, 1))
