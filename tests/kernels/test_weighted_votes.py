"""Sums of votes that are not stored, against all votes at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capszoo.kernels import weighted_votes
from capszoo.kernels.weighted_votes import weighted_votes_reference


def inputs(sizes, dtype=torch.float64, seed=0):
    capsules, parents, dim, parent_dim, places = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = (capsules, parents, places), (capsules, dim, places), (capsules, parents, parent_dim, dim)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def by_einsum(couplings, poses, weight):
    return torch.einsum("ijn,ikn,ijdk->jdn", couplings, poses, weight)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sizes=st.tuples(*[st.integers(1, 5)] * 4, st.integers(0, 6)), seed=st.integers(0, 99), reference=st.booleans())
def test_votes_and_gradients(sizes, seed, reference):
    args = inputs(sizes, seed=seed)
    found, expected = (weighted_votes_reference if reference else weighted_votes)(*args), by_einsum(*args)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    towards = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, args, towards) for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_types(dtype, tolerance):
    args = inputs((7, 3, 4, 5, 9))
    found = weighted_votes(*(t.to(dtype) for t in args))
    assert found.dtype == dtype
    expected = by_einsum(*args)
    assert (found - expected).norm() < tolerance * expected.norm()


def test_derivatives():
    args = inputs((3, 2, 2, 2, 2))
    assert torch.autograd.gradcheck(weighted_votes, args, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(weighted_votes, args)
    batched = [torch.stack([t, 2 * t]).detach() for t in args]
    gradient = torch.func.grad(lambda *a: weighted_votes(*a).sin().sum(), argnums=(0, 1, 2))
    expected = [gradient(*(t[i] for t in batched)) for i in range(2)]
    for found, *each in zip(torch.vmap(gradient)(*batched), *expected, strict=True):
        torch.testing.assert_close(found, torch.stack(each))


def test_compiled():
    args = inputs((3, 2, 2, 2, 4))
    compiled = torch.compile(weighted_votes, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), by_einsum(*args))


def test_a_jacobian_in_one_pass():
    args = tuple(t.detach() for t in inputs((2, 2, 2, 2, 3)))
    found = torch.autograd.functional.jacobian(weighted_votes, args, vectorize=True)
    expected = torch.autograd.functional.jacobian(by_einsum, args)
    torch.testing.assert_close(found, expected)


def test_no_capsules():
    args = inputs((0, 2, 3, 2, 4))
    weighted_votes(*args).sum().backward()
    assert [t.grad.shape for t in args] == [t.shape for t in args]
