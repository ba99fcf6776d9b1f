"""Self-attention routing by tiles against the reference in float64; the reference against the paper's equations."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capszoo.kernels import cpu as dynamic_routing
from capszoo.kernels.self_attention import cpu, reference

# Ratios of norms, for the output and for the gradients.
BOUNDS = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-4)}


pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


def error(actual, expected):
    difference = (actual.double() - expected).norm().item()
    return difference / expected.norm().item() if expected.any() else difference


def make_inputs(B, N, K, J, D, seed=0, scale=0.5):
    # N capsules: I in the kernels.
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, N, K), (N, K, J, D), (N, J), (B, J, D)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def route(x, weight, prior, grad, attention=True):
    """The sums and the three gradients, by the tiles."""
    s, total = cpu.forward(x, weight, prior, attention)
    assert total.shape == (s.shape if attention else (0, *s.shape[1:]))
    return s, *cpu.backward(grad, x, weight, prior, total, attention)


def route_reference(x, weight, prior, grad, attention=True):
    inputs = [t.double().requires_grad_() for t in (x, weight, prior)]
    s = reference.self_attention_routing(*inputs, attention)
    return s.detach(), *torch.autograd.grad(s, inputs, grad.double())


def check(results, expected, dtype):
    for name, actual, exact in zip(("s", "dx", "dweight", "dprior"), results, expected, strict=True):
        assert actual.is_contiguous() and actual.shape == exact.shape, name
        assert error(actual, exact) <= BOUNDS[dtype][name != "s"], name


def test_reference_is_the_papers_matrix_of_agreements():
    """Equations 4 to 6, with the I x I matrix, one class after the other."""
    x, weight, prior, _ = make_inputs(2, 7, 5, 3, 4)
    for attention in (True, False):
        expected = []
        votes = torch.einsum("bik,ikjd->bjid", x, weight)
        agreements = votes @ votes.transpose(2, 3) / 4**0.5  # [B, J, I, I]
        couplings = (agreements.sum(dim=3) * attention).softmax(dim=1) + prior.T
        expected = (couplings.unsqueeze(3) * votes).sum(2)
        found = reference.self_attention_routing(x, weight, prior, attention)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


# Tile sizes from one capsule to all, so that tiles split capsules and samples, with remainders.
@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (6, 19, 9, 11, 17))),
    attention=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    tile_bytes=st.sampled_from([1, 3000, 30000, 2**22]),
    tile_samples=st.sampled_from([2, 256]),
    few_samples=st.sampled_from([0, 4, 256]),  # by products of matrices, by either, by votes
    seed=st.integers(0, 2**20),
)
@example((5, 17, 4, 6, 5), True, torch.float64, 2000, 3, 0, 0)
@example((5, 17, 4, 6, 5), True, torch.float64, 1, 3, 256, 0)
@example((3, 1, 8, 10, 16), True, torch.float32, 2**22, 256, 0, 0)  # one capsule
@example((3, 5, 8, 1, 16), True, torch.float32, 2**22, 256, 0, 0)  # one class
def test_output_and_gradients(sizes, attention, dtype, tile_bytes, tile_samples, few_samples, seed):
    inputs = [t.to(dtype) for t in make_inputs(*sizes, seed=seed)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_routing, "TILE_BYTES", tile_bytes)
        patch.setattr(dynamic_routing, "TILE_SAMPLES", tile_samples)
        patch.setattr(cpu, "FEW_SAMPLES", few_samples)
        results = route(*inputs, attention)
    check(results, route_reference(*inputs, attention), dtype)


@pytest.mark.parametrize("num_capsules", [16, 288])
@pytest.mark.parametrize("num_samples", [1, 40])
def test_sizes_near_the_real_ones(num_samples, num_capsules):
    inputs = [t.float() for t in make_inputs(num_samples, num_capsules, 8, 10, 16, scale=0.1)]
    check(route(*inputs), route_reference(*inputs), torch.float32)


@pytest.mark.parametrize("few_samples", [0, 256])
def test_extremes(few_samples, monkeypatch):
    """Zeros, ones and large numbers, whose logits leave one class to each capsule."""
    monkeypatch.setattr(cpu, "FEW_SAMPLES", few_samples)
    x, weight, prior, grad = (t.float() for t in make_inputs(3, 6, 4, 5, 7))
    x[0], x[1, 2:5] = 0, 0
    check(route(x, weight, prior, grad), route_reference(x, weight, prior, grad), torch.float32)
    for number in (0.0, 1.0):
        filled = [torch.full_like(t, number) for t in (x, weight, prior)]
        check(route(*filled, grad), route_reference(*filled, grad), torch.float32)
    for tensors in ((1e4 * x, weight), (x, 1e4 * weight), (1e4 * x, 1e4 * weight)):
        assert all(result.isfinite().all() for result in route(*tensors, prior, grad))


def test_same_bits_from_run_to_run():
    inputs = [t.float() for t in make_inputs(33, 140, 8, 10, 16, scale=0.1)]
    assert all(torch.equal(a, b) for a, b in zip(route(*inputs), route(*inputs), strict=True))
