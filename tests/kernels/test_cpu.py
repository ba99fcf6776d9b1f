"""The tiled algorithm against the reference in float64: outputs, gradients, tiles, memory."""

import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capszoo.kernels import cpu, reference

# Ratios of norms, for the output and for the gradients.
BOUNDS = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 1e-2)}


pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


def error(actual, expected):
    difference = (actual.double() - expected).norm().item()
    return difference / expected.norm().item() if expected.any() else difference


def make_inputs(B, T, P, K, J, D, seed=0, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, T * P, K), (T, K, J, D), (J, D), (B, J, D)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def route(x, weight, bias, grad, num_iters, approximate):
    """Class capsules and the three gradients, by the tiles."""
    v, sums = cpu.dynamic_routing(x, weight, bias, num_iters, approximate)
    return v, *cpu.dynamic_routing_backward(grad, x, weight, sums, approximate)


def route_reference(x, weight, bias, grad, num_iters, approximate):
    inputs = [t.double().requires_grad_() for t in (x, weight, bias)]
    v = reference.dynamic_routing(*inputs, num_iters, approximate)
    return v.detach(), *torch.autograd.grad(v, inputs, grad.double())


def check(results, expected, dtype):
    bounds = BOUNDS[dtype][0], *3 * [BOUNDS[dtype][1]]
    for name, actual, exact, bound in zip(("v", "dx", "dweight", "dbias"), results, expected, bounds, strict=True):
        assert actual.is_contiguous() and actual.shape == exact.shape, name
        assert error(actual, exact) <= bound, name


sizes = st.tuples(
    st.integers(1, 6), st.integers(1, 7), st.integers(1, 5), st.integers(1, 9), st.integers(1, 11), st.integers(1, 17)
)


# Tile sizes from one capsule to all, so that tiles split types, positions and samples, with remainders.
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    sizes=sizes,
    num_iters=st.integers(1, 4),
    approximate=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    tile_bytes=st.sampled_from([1, 3000, 30000, 2**22]),
    tile_samples=st.sampled_from([2, 256]),
    few_samples=st.sampled_from([0, 4, 256]),  # by products of matrices, by either, by votes
    seed=st.integers(0, 2**20),
)
@example((5, 7, 3, 4, 6, 5), 3, False, torch.float64, 2000, 3, 0, 0)
@example((3, 1, 1, 8, 10, 16), 3, False, torch.float32, 2**22, 256, 0, 0)  # one capsule
@example((3, 5, 2, 8, 1, 16), 3, True, torch.float32, 2**22, 256, 0, 0)  # one class
@example((2, 3, 50, 3, 7, 5), 3, False, torch.float64, 5000, 256, 0, 0)  # tiles within a type
def test_output_and_gradients(sizes, num_iters, approximate, dtype, tile_bytes, tile_samples, few_samples, seed):
    inputs = [t.to(dtype) for t in make_inputs(*sizes, seed=seed)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "TILE_BYTES", tile_bytes)
        patch.setattr(cpu, "TILE_SAMPLES", tile_samples)
        patch.setattr(cpu, "FEW_SAMPLES", few_samples)
        results = route(*inputs, num_iters, approximate)
    check(results, route_reference(*inputs, num_iters, approximate), dtype)


@pytest.mark.parametrize("num_types", [288, 8])
@pytest.mark.parametrize("num_samples", [1, 20])
def test_a_size_near_the_real_one(num_samples, num_types):
    inputs = [t.float() for t in make_inputs(num_samples, num_types, 288 // num_types, 8, 10, 16, scale=0.3)]
    check(route(*inputs, 3, False), route_reference(*inputs, 3, False), torch.float32)


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("num_samples", [2, 9])
def test_zero_vectors(num_samples, approximate):
    x, weight, bias, grad = make_inputs(num_samples, 6, 2, 3, 5, 4)
    x[0] = 0  # a sample with nothing to see
    x[1, 2:5] = 0
    bias[:2] = 0  # with x = 0: class capsules of length zero
    results = route(x, weight, bias, grad, 3, approximate)
    check(results, route_reference(x, weight, bias, grad, 3, approximate), torch.float64)

    results = route(*map(torch.zeros_like, (x, weight, bias)), grad, 3, approximate)
    assert all(result.isfinite().all() for result in results)
    assert not results[0].any()


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("dim", [-1, 1])
def test_squash_and_its_gradient(approximate, dim):
    lengths = torch.tensor([0.0, 1e-200, 1e-9, 0.5, 1.0, 1.99, 2.0, 2.01, 40.0], dtype=torch.float64)
    s = (lengths[:, None] * torch.tensor([0.6, 0.0, -0.8], dtype=torch.float64)).requires_grad_()
    grad = torch.linspace(-1, 2, s.numel(), dtype=torch.float64).view_as(s)
    v = reference.squash(s, approximate)
    (expected,) = torch.autograd.grad(v, s, grad)
    s = s.detach()
    torch.testing.assert_close(cpu.squash(s, approximate, dim=dim), v.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(cpu.squash_backward(grad, s, approximate, dim=dim), expected, rtol=1e-12, atol=1e-15)


def test_same_bits_from_run_to_run():
    inputs = [t.float() for t in make_inputs(33, 70, 2, 8, 10, 16)]
    first, second = route(*inputs, 3, False), route(*inputs, 3, False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("num_samples", [2, 9])
def test_huge_logits_do_not_overflow(num_samples):
    x, weight, bias, grad = (t.float() for t in make_inputs(num_samples, 6, 2, 4, 5, 6))
    results = route(300 * x, weight, bias, grad, 3, False)
    assert all(result.isfinite().all() for result in results)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak resident set in KB")
def test_memory_is_a_fraction_of_the_plain_form():
    script = """
import resource, torch
from capszoo.kernels import dynamic_routing, reference
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def step(route, B, I):
    x, weight = torch.randn(B, I, 8, requires_grad=True), torch.randn(I, 8, 10, 16).mul_(0.1).requires_grad_()
    route(x, weight, torch.zeros(10, 16), 3).square().sum().backward()
step(dynamic_routing, 4, 16), step(reference.dynamic_routing, 4, 16)
start = peak()
step(dynamic_routing, 128, 1152)
fused = peak()
step(reference.dynamic_routing, 128, 1152)
print(fused - start, peak() - start)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    fused, plain = map(float, run.stdout.split())
    assert fused <= plain / 5, f"{fused} MB against {plain} MB"
