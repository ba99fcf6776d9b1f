"""Couplings on request against plain loops in float64; those of dynamic routing are in tests/test_inspect.py."""

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capszoo.kernels import (
    em_couplings,
    inverted_attention_couplings,
    inverted_attention_routing,
    routing_couplings,
    self_attention_couplings,
    self_attention_routing,
    vb_couplings,
)
from capszoo.kernels.gaussian_routing import cpu as gaussian_cpu
from capszoo.kernels.inverted_attention import cpu


def digamma(x):
    return float(torch.digamma(torch.tensor(x, dtype=torch.float64)))


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


def gaussians_by_loops(poses, activations, weight, offset, method, beta_u, beta_a, num_iters, final_lambda):
    """Couplings of class capsules: one child and one parent at a time, by the two papers' procedures."""
    num_types, height, width, num_parents, side, _ = weight.shape
    dim, iterations = side * side, []
    for b in range(len(poses)):
        children = [(i, y, x) for i in range(num_types) for y in range(height) for x in range(width)]
        votes = [
            [(poses[b, i, :, :, y, x] @ weight[i, y, x, j] + offset[y, x]).flatten() for j in range(num_parents)]
            for i, y, x in children
        ]
        active = [float(activations[b, i, y, x]) for i, y, x in children]
        shares = [[1 / num_parents] * num_parents for _ in children]
        found = [shares]
        for iteration in range(num_iters - 1):
            parents = []
            for j in range(num_parents):
                weights = [share[j] * a for share, a in zip(shares, active, strict=True)]
                mass = sum(weights)
                mean = sum(w * vote[j] for w, vote in zip(weights, votes, strict=True)) / (mass + 1e-8)
                scatter = sum(w * (vote[j] - mean) ** 2 for w, vote in zip(weights, votes, strict=True))
                parents.append((mass, mean, scatter))
            logits = []
            for j, (mass, mean, scatter) in enumerate(parents):
                if method == "em":
                    variance = scatter / (mass + 1e-8) + 5e-4
                    cost = float(((beta_u[j] + variance.sqrt().log()) * mass).sum())
                    score = final_lambda * (1 - 0.95 ** (iteration + 1)) * (float(beta_a[j]) - cost)
                    log_active = -math.log1p(math.exp(-score))
                    normal = torch.distributions.Normal(mean, variance.sqrt())
                    # The density, but for the power of 2 pi that all parents have.
                    logits.append(
                        [
                            log_active + float(normal.log_prob(vote[j]).sum()) + dim * math.log(2 * math.pi) / 2
                            for vote in votes
                        ]
                    )
                else:
                    kappa, nu = 1 + mass, dim + 1 + mass
                    center = mass / kappa * mean
                    inverse = 1 + scatter + mass / kappa * mean**2
                    total = sum(1 + other[0] for other in parents)
                    log_pi = digamma(1 + mass) - digamma(total)
                    halves = sum(digamma((nu - d) / 2) for d in range(dim))
                    log_det = halves + dim * math.log(2) - float(inverse.log().sum())
                    logits.append(
                        [
                            log_pi + (log_det - dim / kappa - float((nu * (vote[j] - center) ** 2 / inverse).sum())) / 2
                            for vote in votes
                        ]
                    )
            shares = [softmax([logits[j][child] for j in range(num_parents)]) for child in range(len(children))]
            found.append(shares)
        iterations.append(torch.tensor(found, dtype=poses.dtype))
    return torch.stack(iterations, dim=1)


@pytest.mark.parametrize("sizes", [(2, 2, 2, 3, 2), (1, 1, 3, 1, 3), (3, 3, 1, 4, 2)])
@pytest.mark.parametrize("method", ["em", "vb"])
def test_couplings_of_mixtures(method, sizes, monkeypatch):
    num_types, height, width, num_parents, side = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = (3, num_types, side, side, height, width), (num_types, height, width, num_parents, side, side)
    poses, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) / 2 for shape in shapes)
    activations = torch.rand(3, num_types, height, width, generator=generator, dtype=torch.float64)
    offset = torch.rand(height, width, side, side, generator=generator, dtype=torch.float64)
    beta_u, beta_a = torch.randn(2, num_parents, generator=generator, dtype=torch.float64)
    expected = gaussians_by_loops(poses, activations, weight, offset, method, beta_u, beta_a, 3, 0.3)
    couplings, more = (em_couplings, (0.3,)) if method == "em" else (vb_couplings, ())
    inputs = (poses, activations, weight, beta_u, beta_a, offset)
    for tile in (1, 2**21):
        monkeypatch.setattr(gaussian_cpu, "TILE_BYTES", tile)
        found = couplings(*inputs, 1, 3, *more)
        torch.testing.assert_close(found.flatten(3), expected, rtol=1e-8, atol=1e-10)
    single = couplings(*(t.float() for t in inputs), 1, 3, *more)
    torch.testing.assert_close(single.double().flatten(3), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("couplings", [em_couplings, vb_couplings])
def test_couplings_of_mixtures_compete_over_space(couplings):
    """Those of a child add up to 1 over all parents at all positions of the kernel that cover it."""
    generator = torch.Generator().manual_seed(0)
    poses, weight = (
        torch.randn(2, 2, 2, 2, 5, 4, generator=generator),
        torch.randn(2, 3, 3, 3, 2, 2, generator=generator),
    )
    activations, beta = torch.rand(2, 2, 5, 4, generator=generator), torch.zeros(3)
    found = couplings(poses, activations, weight, beta, beta, None, 1, 2)
    assert found.shape == (2, 2, 2 * 9, 3, 3, 2)
    for r, b, i in itertools.product(range(2), range(2), range(2)):
        total = torch.zeros(5, 4)
        for tap, (y, x) in itertools.product(range(9), itertools.product(range(3), range(2))):
            total[y + tap // 3, x + tap % 3] += found[r, b, i * 9 + tap, :, y, x].sum()
        torch.testing.assert_close(total, torch.ones(5, 4))
    with pytest.raises(ValueError, match="num_iters=0: routing needs at least 1 iteration"):
        couplings(poses, activations, weight, beta, beta, None, 1, 0)


def test_couplings_under_vmap():
    """What operators return beside their values is as true under a transform."""
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 2, 6, 4), (3, 4, 5, 2), (5, 2)))
    found = torch.vmap(lambda each: routing_couplings(each, weight, bias, 3))(x)
    torch.testing.assert_close(found, torch.stack([routing_couplings(each, weight, bias, 3) for each in x]))
    own, prior = torch.randn(6, 4, 5, 2, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    found = torch.vmap(lambda each: self_attention_couplings(each, own, prior))(x)
    torch.testing.assert_close(found, torch.stack([self_attention_couplings(each, own, prior) for each in x]))


@pytest.mark.parametrize(
    ("couplings", "shapes", "more", "message"),
    [
        (routing_couplings, ((2, 6, 4), (3, 4, 5, 2), (2,)), (), r"bias has shape \[2\]"),
        (routing_couplings, ((2, 6, 4), (3, 4, 5, 2), (5, 2)), (0,), "num_iters=0"),
        (self_attention_couplings, ((2, 6, 4), (6, 4, 5, 2), (1, 5)), (), r"prior has shape \[1, 5\]"),
    ],
)
def test_couplings_refuse_what_routing_refuses(couplings, shapes, more, message):
    with pytest.raises(ValueError, match=message):
        couplings(*map(torch.zeros, shapes), *more)
