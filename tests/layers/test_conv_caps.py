"""Patches of maps of capsules: whole capsules of neighbouring positions, never mixed."""

import pytest
import torch

from capszoo.layers import capsule_patches, conv_caps_size


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)], ids=["activations", "vectors", "matrices"])
@pytest.mark.parametrize("kernel_size,stride", [(1, 1), (3, 1), (3, 2), (2, 3)])
def test_patches_hold_what_the_kernel_covers(shape, kernel_size, stride):
    height, width = 7, 5
    x = torch.arange(6 * torch.Size(shape).numel() * height * width).view(2, 3, *shape, height, width)
    patches = capsule_patches(x, kernel_size, stride)
    size = conv_caps_size((height, width), kernel_size, stride)
    assert patches.shape == (2, 3, *shape, *size, kernel_size, kernel_size)
    assert patches.untyped_storage().data_ptr() == x.untyped_storage().data_ptr(), "a view"
    for h in range(size[0]):
        for w in range(size[1]):
            rows, columns = slice(h * stride, h * stride + kernel_size), slice(w * stride, w * stride + kernel_size)
            assert torch.equal(patches[..., h, w, :, :], x[..., rows, columns])


def test_size_of_a_map_that_is_too_small():
    assert conv_caps_size((16, 16), 3, 2) == (7, 7) and conv_caps_size((7, 8), 3, 1) == (5, 6)
    assert conv_caps_size((3, 2), 3, 1) == (1, 0)
