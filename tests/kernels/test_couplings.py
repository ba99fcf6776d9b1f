"""Couplings on request, against plain loops in float64: inverted attention and self-attention."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capszoo.kernels import (
    inverted_attention_couplings,
    inverted_attention_routing,
    self_attention_couplings,
    self_attention_routing,
)
from capszoo.kernels.inverted_attention import cpu


def softmax(logits):
    total = sum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


def inverted_attention_by_loops(x, weight, parents, stride):
    """Procedure 1 of Tsai et al. 2020, one parent position and one child at a time; `[B, k * k * I, J, H', W']`."""
    k, _, num_types, side, _, num_parents = weight.shape
    found = torch.zeros(len(x), k * k * num_types, num_parents, *parents.shape[4:], dtype=x.dtype)
    for b in range(len(x)):
        for h in range(parents.shape[4]):
            for w in range(parents.shape[5]):
                for p in range(k):
                    for q in range(k):
                        for i in range(num_types):
                            pose = x[b, i, :, :, h * stride + p, w * stride + q]
                            agreements = [
                                float((pose @ weight[p, q, i, :, :, j] * parents[b, j, :, :, h, w]).sum()) / side
                                for j in range(num_parents)
                            ]
                            found[b, (p * k + q) * num_types + i, :, h, w] = torch.tensor(
                                softmax(agreements), dtype=x.dtype
                            )
    return found


sizes = st.tuples(*(st.integers(1, n) for n in (3, 3, 3, 3, 3, 2, 4, 2)))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(sizes=sizes, tile=st.sampled_from([1, 2**8, 2**19]))
@example((3, 5, 4, 1, 1, 1, 10, 1), 2**9)  # class capsules, in several tiles
@example((2, 2, 2, 6, 5, 3, 3, 2), 2**10)
def test_couplings_of_inverted_attention(sizes, tile):
    B, T, P, H, W, k, J, stride = sizes
    H, W = max(H, k), max(W, k)
    generator = torch.Generator().manual_seed(0)
    shapes = (B, T, P, P, H, W), (k, k, T, P, P, J), (B, J, P, P, (H - k) // stride + 1, (W - k) // stride + 1)
    x, weight, parents = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    expected = inverted_attention_by_loops(x, weight, parents, stride)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "TILE_BYTES", tile)
        patch.setattr(cpu, "GROUP_BYTES", 4 * tile)
        found = inverted_attention_couplings(x, weight, parents, stride)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        half = inverted_attention_couplings(x.bfloat16(), weight.float(), parents.bfloat16(), stride)
        torch.testing.assert_close(half.double(), expected, rtol=0.1, atol=0.02)
        assert half.dtype == torch.float32
    uniform = inverted_attention_couplings(x, weight, None, stride)
    torch.testing.assert_close(uniform, torch.full_like(expected, 1 / J))


def test_couplings_weigh_the_votes_of_the_operator():
    """Of class capsules: votes weighed by them add up to what the operator returns."""
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 6, 2, 2, 1, 1), (1, 1, 6, 2, 2, 4), (3, 4, 2, 2, 1, 1)
    x, weight, parents = (torch.randn(shape, generator=generator) for shape in shapes)
    votes = torch.einsum("bixy,iyzj->bijxz", x.flatten(4).squeeze(4), weight[0, 0])
    found = inverted_attention_couplings(x, weight, parents)
    sums = torch.einsum("bij,bijxz->bjxz", found.flatten(3).squeeze(3), votes)
    torch.testing.assert_close(sums, inverted_attention_routing(x, weight, parents).flatten(4).squeeze(4))


@pytest.mark.parametrize("sizes", [(0, 2, 2, 3), (2, 0, 2, 3), (2, 2, 2, 0)])
def test_nothing_to_route(sizes):
    B, T, P, J = sizes
    x, weight, parents = torch.rand(B, T, P, P, 1, 1), torch.rand(1, 1, T, P, P, J), torch.rand(B, J, P, P, 1, 1)
    for given_parents in (parents, None):
        assert inverted_attention_couplings(x, weight, given_parents).shape == (B, T, J, 1, 1)
    assert self_attention_couplings(torch.rand(B, T, P), torch.rand(T, P, J, 3), torch.zeros(T, J)).shape == (B, T, J)


def test_wrong_shapes():
    x, weight = torch.rand(2, 3, 2, 2, 1, 1), torch.rand(1, 1, 3, 2, 2, 4)
    with pytest.raises(ValueError, match=r"^parents have shape \[2, 5, 2, 2, 1, 1\], x and weight need"):
        inverted_attention_couplings(x, weight, torch.rand(2, 5, 2, 2, 1, 1))
    with pytest.raises(ValueError, match="^stride=0: it must be 1 or more"):
        inverted_attention_couplings(x, weight, None, 0)


def self_attention_by_loops(x, weight, prior, attention):
    """Equations 4 to 6 of Mazzia, Salvetti and Chiaberge 2021, with the agreement of each pair of votes."""
    num_capsules, _, num_classes, dim = weight.shape
    found = torch.zeros(len(x), num_capsules, num_classes, dtype=x.dtype)
    for b in range(len(x)):
        votes = [[x[b, i] @ weight[i, :, j] for j in range(num_classes)] for i in range(num_capsules)]
        for i in range(num_capsules):
            logits = [
                sum(float(votes[i][j] @ votes[other][j]) for other in range(num_capsules)) / math.sqrt(dim)
                for j in range(num_classes)
            ]
            shares = softmax(logits) if attention else [1 / num_classes] * num_classes
            found[b, i] = torch.tensor(shares, dtype=x.dtype) + prior[i]
    return found


@settings(max_examples=15, deadline=None, derandomize=True)
@given(sizes=st.tuples(*(st.integers(1, n) for n in (14, 5, 4, 5, 6))), attention=st.booleans())
def test_couplings_of_self_attention(sizes, attention):
    B, N, K, J, D = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = (B, N, K), (N, K, J, D), (N, J)
    x, weight, prior = (torch.randn(shape, generator=generator, dtype=torch.float64) / 2 for shape in shapes)
    expected = self_attention_by_loops(x, weight, prior, attention)
    found = self_attention_couplings(x, weight, prior, attention)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    single = self_attention_couplings(x.float(), weight.float(), prior.float(), attention)
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)
    votes = torch.einsum("bik,ikjd->bijd", x, weight)
    sums = self_attention_routing(x, weight, prior, attention)
    torch.testing.assert_close((found.unsqueeze(3) * votes).sum(1), sums)
