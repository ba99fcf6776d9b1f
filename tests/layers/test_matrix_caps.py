"""Layers of matrix capsules: their maps, coordinates, and parameters."""

import pytest
import torch

from capszoo import set_fused_routing
from capszoo.layers import ClassMatrixCaps, ConvMatrixCaps, PosePrimaryCaps, join_matrix_capsules, split_matrix_capsules

both = pytest.mark.parametrize("method", ["em", "vb"])


def capsules(num_types=2, pose_size=3, size=(5, 6), batch_size=2):
    generator = torch.Generator().manual_seed(0)
    poses = torch.randn(batch_size, num_types, pose_size, pose_size, *size, generator=generator)
    return join_matrix_capsules(poses, torch.rand(batch_size, num_types, *size, generator=generator))


def test_maps():
    x = capsules()
    poses, activations = split_matrix_capsules(x, 2, 3)
    assert poses.shape == (2, 2, 3, 3, 5, 6) and activations.shape == (2, 2, 5, 6)
    assert torch.equal(poses[:, 1, 2, 0], x[:, (1 * 3 + 2) * 3 + 0]) and torch.equal(activations[:, 1], x[:, -1])
    assert torch.equal(join_matrix_capsules(poses, activations), x)


@pytest.mark.parametrize("norm", [True, False])
def test_primary(norm):
    torch.manual_seed(0)
    layer = PosePrimaryCaps(4, 3, 2, norm)
    x = 5 * torch.randn(8, 4, 3, 3)
    poses, activations = split_matrix_capsules(layer(x), 3, 2)
    assert ((activations > 0) & (activations < 1)).all()
    if norm:  # one mean and variance for all numbers of a type
        torch.testing.assert_close(poses.mean(dim=(0, 2, 3, 4, 5)), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(poses.square().mean(dim=(0, 2, 3, 4, 5)), torch.ones(3), atol=1e-3, rtol=0)
    else:
        torch.testing.assert_close(poses.flatten(1, 3), layer.conv(x)[:, :12])


@both
def test_convolution(method):
    torch.manual_seed(0)
    layer = ConvMatrixCaps(2, 4, 3, 2, 3, method)
    out = layer(capsules())
    assert out.shape == (2, 4 * 9 + 4, 2, 2)
    assert ((out[:, -4:] > 0) & (out[:, -4:] < 1)).all()
    with set_fused_routing(False):
        torch.testing.assert_close(layer(capsules()), out, rtol=1e-4, atol=1e-5)
    if method == "vb":
        torch.testing.assert_close(out[:, :36].view(2, 4, -1).mean(dim=(0, 2)), torch.zeros(4), atol=1e-5, rtol=0)


@both
def test_coordinates(method):
    """Class capsules see where a capsule is, by two numbers of the last column."""
    torch.manual_seed(0)
    layer = ClassMatrixCaps(2, 3, 3, method, num_routing=1).eval()
    assert layer.weight.shape == (2, 3, 3, 3)
    x = torch.zeros(1, 2 * 9 + 2, 2, 4)
    x[:, -2:] = 1
    poses, activations = layer(x)
    assert poses.shape == (1, 3, 3, 3) and activations.shape == (1, 3)
    # All votes are the coordinates alone, on average in the middle; VB draws the mean towards 0 by R / (1 + R).
    mass = 2 * 8 / 3
    expected = torch.zeros(3, 3)
    expected[:2, 2] = 0.5 * (1 if method == "em" else mass / (1 + mass))
    torch.testing.assert_close(poses[0, 0], expected, rtol=1e-4, atol=1e-5)
    moved = x.clone()
    moved[:, -2:, :, 0] = 0
    assert layer(moved)[0][0, 0, 1, 2] > poses[0, 0, 1, 2]


def test_errors():
    with pytest.raises(ValueError, match="unknown routing 'dynamic'. Known: em, vb"):
        ConvMatrixCaps(2, 3, method="dynamic")
    with pytest.raises(ValueError, match="num_routing=0 is not possible"):
        ClassMatrixCaps(2, 3, num_routing=0)
