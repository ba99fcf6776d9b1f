"""Capsule layers with inverted dot-product attention routing, against loops over children and parents."""

import math

import pytest
import torch
import torch.nn.functional as F

from capszoo.layers import InvertedAttentionCaps, InvertedAttentionConvCaps, MatrixPrimaryCaps


def route_by_loops(x, weight, parents, stride, norm):
    """Procedure 1 of the paper, one parent position and one child at a time."""
    k, _, num_types, side, _, num_parents = weight.shape
    batch, _, _, _, height, width = x.shape
    out = torch.zeros(
        batch, num_parents, side, side, (height - k) // stride + 1, (width - k) // stride + 1, dtype=x.dtype
    )
    for b in range(batch):
        for h in range(out.shape[4]):
            for w in range(out.shape[5]):
                sums = [torch.zeros(side, side, dtype=x.dtype) for _ in range(num_parents)]
                for p in range(k):
                    for q in range(k):
                        for i in range(num_types):
                            pose = x[b, i, :, :, h * stride + p, w * stride + q]
                            votes = [pose @ weight[p, q, i, :, :, j] for j in range(num_parents)]
                            if parents is None:
                                couplings = [1 / num_parents] * num_parents
                            else:
                                agreement = [
                                    float((votes[j] * parents[b, j, :, :, h, w]).sum()) / math.sqrt(side * side)
                                    for j in range(num_parents)
                                ]
                                total = sum(math.exp(a) for a in agreement)
                                couplings = [math.exp(a) / total for a in agreement]
                            for j in range(num_parents):
                                sums[j] = sums[j] + couplings[j] * votes[j]
                for j in range(num_parents):
                    flat = sums[j].flatten()
                    flat = (flat - flat.mean()) / (flat.var(unbiased=False) + norm.eps).sqrt()
                    out[b, j, :, :, h, w] = (flat * norm.weight + norm.bias).view(side, side)
    return out


def make_layer(cls=InvertedAttentionConvCaps, **kwargs):
    torch.manual_seed(0)
    layer = cls(**kwargs, dtype=torch.float64)
    with torch.no_grad():
        layer.norm.weight.copy_(torch.rand_like(layer.norm.weight) + 0.5)
        layer.norm.bias.copy_(torch.randn_like(layer.norm.bias))
    return layer


def poses(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("kernel_size,stride", [(1, 1), (2, 1), (3, 2)])
@torch.no_grad()
def test_passes_of_convolutional_capsules(kernel_size, stride):
    layer = make_layer(num_types=2, num_parents=3, pose_size=2, kernel_size=kernel_size, stride=stride)
    x = poses(2, 2, 2, 2, 5, 4)
    first = layer(x)
    torch.testing.assert_close(first, route_by_loops(x, layer.weight, None, stride, layer.norm))
    second = layer(x, first)
    torch.testing.assert_close(second, route_by_loops(x, layer.weight, first, stride, layer.norm))
    assert not torch.allclose(first, second, rtol=0.01)


@torch.no_grad()
def test_passes_of_class_capsules():
    layer, x = make_layer(InvertedAttentionCaps, num_capsules=5, num_classes=4, pose_size=3), poses(2, 5, 3, 3, 1, 1)
    weight = layer.weight[None, None]
    first = layer(x)
    torch.testing.assert_close(first, route_by_loops(x, weight, None, 1, layer.norm))
    torch.testing.assert_close(layer(x, first), route_by_loops(x, weight, first, 1, layer.norm))


@torch.no_grad()
def test_a_kernel_as_large_as_the_map_makes_class_capsules():
    conv = make_layer(num_types=3, num_parents=4, pose_size=2, kernel_size=3)
    caps = make_layer(InvertedAttentionCaps, num_capsules=27, num_classes=4, pose_size=2)
    caps.weight.copy_(conv.weight.permute(2, 0, 1, 3, 4, 5).reshape(caps.weight.shape))
    x = poses(2, 3, 2, 2, 3, 3)
    first = conv(x)
    torch.testing.assert_close(caps(x), first)
    torch.testing.assert_close(caps(x, first), conv(x, first))


@torch.no_grad()
def test_positions_move_with_the_input():
    """A kernel of one position commutes with any order of positions, a larger one with shifts: no patch mixes them."""
    layer, x = make_layer(num_types=3, num_parents=4, pose_size=2, kernel_size=1), poses(2, 3, 2, 2, 4, 5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))

    def permuted(t):
        return t.flatten(-2)[..., order].unflatten(-1, (4, 5))

    first = layer(x)
    torch.testing.assert_close(layer(permuted(x)), permuted(first))
    torch.testing.assert_close(layer(permuted(x), permuted(first)), permuted(layer(x, first)))

    layer = make_layer(num_types=3, num_parents=4, pose_size=2, kernel_size=3)
    first = layer(x)
    torch.testing.assert_close(layer(x[..., 1:]), first[..., 1:])
    torch.testing.assert_close(layer(x[..., 1:], first[..., 1:]), layer(x, first)[..., 1:])
    changed = x.clone()
    changed[..., 0, 0] += 1
    differs = (layer(changed, first) - layer(x, first)).abs().amax(dim=(0, 1, 2, 3)) > 1e-9
    assert differs.nonzero().tolist() == [[0, 0]], "only the patch that holds the changed position"


def test_matrices_are_drawn_as_in_the_paper():
    torch.manual_seed(0)
    conv = InvertedAttentionConvCaps(32, 16, pose_size=4, kernel_size=3)
    assert conv.weight.shape == (3, 3, 32, 4, 4, 16)
    torch.testing.assert_close(conv.weight.std().item(), math.sqrt(16 / (4 * 32 * 9)), rtol=0.02, atol=0)
    caps = InvertedAttentionCaps(800, 10)
    assert caps.weight.shape == (800, 4, 4, 10)
    torch.testing.assert_close(caps.weight.std().item(), math.sqrt(10 / (4 * 800)), rtol=0.02, atol=0)
    assert torch.equal(conv.norm.weight, torch.ones(16)) and not conv.norm.bias.any()


@torch.no_grad()
def test_primary_capsules():
    primary = MatrixPrimaryCaps(5, num_types=3, pose_size=2)
    x = torch.randn(2, 5, 4, 6)
    out = primary(x)
    assert out.shape == (2, 12, 4, 6)
    expected = F.layer_norm(primary.conv(x)[:, 4:8, 1, 2], [4])
    torch.testing.assert_close(out[:, 4:8, 1, 2], expected)
    torch.testing.assert_close(primary.to_capsules(out)[:, 1, :, :, 1, 2].flatten(1), expected)


def test_wrong_number_of_capsules():
    layer = InvertedAttentionCaps(5, 4)
    with pytest.raises(AssertionError, match="class capsules of 5 capsules got 6: make the model for this img_size"):
        layer(torch.zeros(1, 6, 4, 4, 1, 1))
