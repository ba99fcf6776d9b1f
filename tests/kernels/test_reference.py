"""The reference against loops over plain Python numbers, and its behaviour under autograd and tracing."""

import math

import pytest
import torch

from capszoo.kernels import reference


def squash_by_loops(s, approximate):
    norm = math.sqrt(sum(value * value for value in s))
    if approximate:
        return [value / 2 if norm <= 2 else value / norm for value in s]
    return [norm**2 / (1 + norm**2) * value / norm if norm > 0 else 0.0 for value in s]


def routing_by_loops(x, weight, bias, num_iters, approximate):
    """Procedure 1 of the paper for one sample, on nested lists."""
    per_type = len(x) // len(weight)
    capsules, K, J, D = range(len(x)), len(weight[0]), len(bias), len(bias[0])
    votes = [
        [[sum(x[i][k] * weight[i // per_type][k][j][d] for k in range(K)) for d in range(D)] for j in range(J)]
        for i in capsules
    ]
    logits = [[0.0] * J for _ in capsules]
    for _ in range(num_iters):
        couplings = [[math.exp(b) / sum(map(math.exp, row)) for b in row] for row in logits]
        v = []
        for j in range(J):
            s = [bias[j][d] + sum(couplings[i][j] * votes[i][j][d] for i in capsules) for d in range(D)]
            v.append(squash_by_loops(s, approximate))
        for i in capsules:
            for j in range(J):
                logits[i][j] += sum(votes[i][j][d] * v[j][d] for d in range(D))
    return v


def make_inputs(B, T, P, K, J, D):
    generator = torch.Generator().manual_seed(0)
    shapes = (B, T * P, K), (T, K, J, D), (J, D)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("num_types", [6, 2, 1])
@pytest.mark.parametrize("num_iters", [1, 2, 3, 4])
def test_routing_is_the_procedure_of_the_paper(num_iters, num_types, approximate):
    x, weight, bias = make_inputs(B=2, T=num_types, P=6 // num_types, K=3, J=4, D=5)
    v = reference.dynamic_routing(x, weight, bias, num_iters, approximate)
    for sample, poses in zip(v, x, strict=True):
        by_loops = routing_by_loops(poses.tolist(), weight.tolist(), bias.tolist(), num_iters, approximate)
        torch.testing.assert_close(sample, torch.tensor(by_loops, dtype=torch.float64), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("approximate", [False, True])
def test_squash_is_the_equation_of_the_paper(approximate):
    lengths = torch.tensor([0.0, 1e-3, 0.5, 1.0, 1.999, 2.001, 30.0], dtype=torch.float64)
    x = lengths[:, None] * torch.tensor([0.6, 0.0, -0.8], dtype=torch.float64)
    expected = torch.tensor([squash_by_loops(row, approximate) for row in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(reference.squash(x, approximate), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("approximate, slope", [(False, 0.0), (True, 0.5)])
def test_gradient_at_a_zero_vector(approximate, slope):
    x = torch.zeros(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(reference.squash(x, approximate), x, torch.ones(3, 4))
    assert torch.equal(gradient, torch.full((3, 4), slope))


def derivatives_of_squash(x, approximate, orders):
    """Derivatives along a fixed direction."""
    x = x.clone().requires_grad_()
    results, direction = [reference.squash(x, approximate)], torch.linspace(0.4, 1.2, x.shape[-1], dtype=x.dtype)
    for _ in range(orders):
        results += torch.autograd.grad((results[-1] * direction).sum(), x, create_graph=True)
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("approximate, slope", [(False, 0.0), (True, 0.5)])
def test_higher_derivatives_at_a_zero_vector(approximate, slope, dtype):
    v, first, *higher = derivatives_of_squash(torch.zeros(3, 4, dtype=dtype), approximate, orders=5)
    assert not v.any() and all((result == 0).all() for result in higher)
    torch.testing.assert_close(first, slope * torch.linspace(0.4, 1.2, 4, dtype=dtype).expand(3, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("approximate", [False, True])
def test_zero_is_the_mean_of_second_derivatives_around_a_zero_vector(approximate, dtype):
    x = 1e-6 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    _, _, second = derivatives_of_squash(x, approximate, orders=2)
    _, _, opposite = derivatives_of_squash(-x, approximate, orders=2)
    assert approximate or second.abs().max() > 0.1
    torch.testing.assert_close(second + opposite, torch.zeros_like(x))


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize(
    "length", [1e-42, 1e-30, 1e-20, 1e-18, 1e-14, 1e-12, 1e-6, 0.5, 1.99, 2.01, 1e6, 1e18, 1e30, 1e38]
)
def test_derivatives_at_any_length(length, approximate):
    x = length * torch.tensor([[0.6, 0.0, -0.8]], dtype=torch.float64)
    found = derivatives_of_squash(x.float(), approximate, orders=3)
    expected = derivatives_of_squash(x.float().double(), approximate, orders=3)
    orders = 4 if 1e-18 <= length < 1e18 else 2 if length > 1 else 0  # others underflow, or are those of a zero vector
    for order, (actual, exact) in enumerate(zip(found, expected, strict=True)):
        assert actual.isfinite().all(), order
        if order < orders:
            assert (actual.double() - exact).norm() <= 1e-5 * exact.norm() + 1e-37


@pytest.mark.parametrize("approximate", [False, True])
def test_zero_inputs_give_no_nan(approximate):
    inputs = [torch.zeros_like(t).requires_grad_() for t in make_inputs(B=2, T=6, P=1, K=3, J=4, D=5)]
    v = reference.dynamic_routing(*inputs, 3, approximate)
    assert not v.any()
    result = v.sum()
    for _ in range(3):
        gradients = torch.autograd.grad(result, inputs, create_graph=True)
        assert all(gradient.isfinite().all() for gradient in gradients)
        result = sum((gradient * (i + 1)).sum() for i, gradient in enumerate(gradients))


@pytest.mark.parametrize("approximate", [False, True])
def test_first_and_second_derivatives(approximate):
    inputs = [t.requires_grad_() for t in make_inputs(B=1, T=1, P=2, K=2, J=2, D=2)]

    def route(*inputs):
        return reference.dynamic_routing(*inputs, 3, approximate)

    assert torch.autograd.gradcheck(route, inputs)
    assert torch.autograd.gradgradcheck(route, inputs)


def test_half_precision_is_computed_in_float32():
    inputs = [t.bfloat16() for t in make_inputs(B=2, T=32, P=1, K=8, J=5, D=4)]
    v = reference.dynamic_routing(*inputs)
    assert v.dtype == torch.bfloat16
    assert torch.equal(v, reference.dynamic_routing(*[t.float() for t in inputs]).bfloat16())


class Routing(torch.nn.Module):
    def forward(self, x, weight, bias):
        return reference.dynamic_routing(reference.squash(x), weight, bias)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("trace", [torch.fx.symbolic_trace, lambda module: torch.jit.trace(module, example(2))])
def test_traces_hold_for_other_batch_sizes(trace):
    traced = trace(Routing())
    torch.testing.assert_close(traced(*example(5)), Routing()(*example(5)), rtol=0, atol=0)


def example(num_samples):
    return tuple(make_inputs(B=num_samples, T=2, P=3, K=3, J=4, D=5))
