"""Squash in Triton against the reference in float64, through the interpreter."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def test_through_the_interpreter(through_the_interpreter):
    """All tests below."""


interpreted = pytest.mark.skipif(not INTERPRETING, reason="run by test_through_the_interpreter")


pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


def error(actual, expected):
    difference = (actual.double() - expected).norm().item()
    return difference / expected.norm().item() if expected.any() else difference


def check(x, grad, approximate):
    from capszoo.kernels import reference
    from capszoo.kernels.squash import squash_backward, squash_forward

    exact = x.detach().double().requires_grad_()
    v = reference.squash(exact, approximate)
    (dx,) = torch.autograd.grad(v, exact, grad.double())
    for actual, expected in ((squash_forward(x, approximate), v.detach()), (squash_backward(grad, x, approximate), dx)):
        assert actual.is_contiguous() and actual.shape == x.shape and actual.dtype == x.dtype
        assert error(actual, expected) <= BOUNDS[x.dtype]


@interpreted
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 300),
    width=st.one_of(st.integers(1, 33), st.integers(34, 256)),
    scale=st.sampled_from([1e-4, 0.1, 1.0, 30.0]),
    approximate=st.booleans(),
    dtype=st.sampled_from(list(BOUNDS)),
    seed=st.integers(0, 2**20),
)
def test_output_and_gradient(rows, width, scale, approximate, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x, grad = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    x[rows // 2] = 0
    check((scale * x).to(dtype), grad.to(dtype), approximate)


@interpreted
@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e9, 1e18, 1e30])
def test_extremes(scale, approximate):
    from capszoo.kernels import reference
    from capszoo.kernels.squash import squash_backward, squash_forward

    x, grad = torch.randn(2, 20, 7, generator=torch.Generator().manual_seed(0))
    x *= scale
    exact = x.double().requires_grad_()
    v = reference.squash(exact, approximate)
    (dx,) = torch.autograd.grad(v, exact, grad.double())
    torch.testing.assert_close(squash_forward(x, approximate).double(), v.detach(), rtol=1e-5, atol=1e-37)
    assert error(squash_backward(grad, x, approximate), dx) <= 1e-5
    large = max(scale, 1 / scale)
    assert error(squash_backward(large * grad, x, approximate), large * dx) <= 1e-5


@interpreted
@pytest.mark.parametrize("approximate", [False, True])
def test_strides_and_empty(approximate):
    from capszoo.kernels.squash import squash_backward, squash_forward

    x, grad = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    check(x.transpose(1, 2), grad.permute(0, 2, 1), approximate)
    for shape in ((0, 5), (5, 0)):
        assert squash_forward(torch.empty(shape), approximate).shape == shape
        assert squash_backward(torch.empty(shape), torch.empty(shape), approximate).shape == shape
