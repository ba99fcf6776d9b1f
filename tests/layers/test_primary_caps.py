"""Primary capsules: the map that timm wants, and the type-major capsules that routing wants."""

import pytest
import torch

from capszoo.kernels import reference
from capszoo.layers import PrimaryCaps


def make(**kwargs):
    torch.manual_seed(0)
    return PrimaryCaps(5, num_types=3, caps_dim=4, kernel_size=3, **kwargs)


def maps():
    return torch.randn(2, 5, 9, 11, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_capsule_is_squashed(approximate, memory_format):
    layer = make(approximate_squash=approximate)
    x = maps().to(memory_format=memory_format)
    raw, squashed = layer.conv(x), layer(x)
    assert raw.shape == squashed.shape == (2, 12, 4, 5)
    for t in range(3):
        for row in range(4):
            for column in range(5):
                capsule = raw[:, t * 4 : (t + 1) * 4, row, column]
                found = squashed[:, t * 4 : (t + 1) * 4, row, column]
                torch.testing.assert_close(found, reference.squash(capsule, approximate))
    assert torch.equal(layer.squash_map(raw), squashed)


def test_type_major_order():
    layer, (T, K, H, W) = make(), (3, 4, 4, 5)
    x = torch.arange(2 * T * K * H * W, dtype=torch.float32).view(2, T * K, H, W)
    capsules = layer.to_capsules(x)
    assert capsules.shape == (2, T * H * W, K)
    for t in range(T):
        for row in range(H):
            for column in range(W):
                i = t * H * W + row * W + column
                assert torch.equal(capsules[:, i], x[:, t * K : (t + 1) * K, row, column])


def test_stride_and_parameters():
    layer = make(stride=1, dtype=torch.float64)
    assert layer(maps().double()).shape == (2, 12, 7, 9)
    assert {key: tuple(p.shape) for key, p in layer.named_parameters()} == {
        "conv.weight": (12, 5, 3, 3),
        "conv.bias": (12,),
    }
    assert make(device="meta").conv.weight.is_meta
    assert make()(torch.rand(0, 5, 9, 9)).shape == (0, 12, 4, 4)
