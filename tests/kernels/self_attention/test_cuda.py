"""Self-attention routing on a CUDA GPU: numbers against float64, repeated bits, graphs, autocast."""

import pytest
import torch

from capszoo.kernels import self_attention_routing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# Ratios of norms, for the output and for the gradients.
EXACT, TF32, HALF = (1e-5, 1e-4), (3e-3, 1e-2), (1e-2, 2e-2)


def draw_inputs(B, N, K, J, D, dtype=torch.float32, scale=0.1):
    # N capsules: I in the kernels.
    generator = torch.Generator().manual_seed(0)
    shapes = (B, N, K), (N, K, J, D), (N, J), (B, J, D)
    return [(scale * torch.randn(shape, generator=generator)).to("cuda", dtype) for shape in shapes]


def with_gradients(x, weight, prior, grad):
    inputs = [t.detach().requires_grad_() for t in (x, weight, prior)]
    s = self_attention_routing(*inputs)
    return s.detach(), *torch.autograd.grad(s, inputs, grad.to(s.dtype))


def error(actual, expected):
    difference = (actual.double() - expected).norm().item()
    return difference / expected.norm().item() if expected.any() else difference


def check(inputs, bounds):
    results = with_gradients(*inputs)
    # In float64 the operator is the PyTorch algorithm, which tests on a CPU compare with the reference.
    expected = with_gradients(*(t.double() for t in inputs))
    for name, actual, wanted in zip(("s", "dx", "dweight", "dprior"), results, expected, strict=True):
        assert actual.isfinite().all() and actual.shape == wanted.shape, name
        assert error(actual, wanted) <= bounds[name != "s"], (name, error(actual, wanted))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (16, 16, 8, 10, 16), (5, 37, 3, 7, 5), (3, 20, 8, 40, 16)])
def test_numbers(sizes, dtype):
    check(draw_inputs(*sizes, dtype), EXACT if dtype == torch.float32 else HALF)


def test_autocast_allows_tf32_and_no_less():
    with torch.autocast("cuda", torch.bfloat16):
        results = check(draw_inputs(16, 64, 8, 10, 16), TF32)
    assert results[0].dtype == torch.float32


def test_repeated_bits_and_cuda_graph():
    inputs = draw_inputs(16, 16, 8, 10, 16)
    expected = with_gradients(*inputs)
    assert all(torch.equal(*pair) for pair in zip(expected, with_gradients(*inputs), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradients(*inputs)
    inputs[0].mul_(2)
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, with_gradients(*inputs), strict=True))
