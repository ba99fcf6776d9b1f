"""Networks of matrix capsules: the papers' numbers, both contracts, ways out of eager PyTorch, weights, training."""

import pytest
import timm
import torch

import capszoo
from capszoo.testing import check_model

NAMES = ("capsnet_em", "capsnet_vb")
SMALL = dict(conv_dim=4, num_types=[2, 3, 2], img_size=21, num_classes=3)


def small(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **kwargs})


def images(batch_size=2, in_chans=1, size=(21, 21)):
    return torch.rand(batch_size, in_chans, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "expected"), [("capsnet_vb", 244_682), ("capsnet_vb_small", 68_714), ("capsnet_em", 317_194)]
)
def test_parameters_of_the_papers(name, expected):
    """Those for smallNORB: five classes, stereo images of 32x32 pixels."""
    assert capszoo.model_info(name, num_classes=5, in_chans=2, img_size=32).parameters == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kwargs", [dict(), dict(in_chans=3, img_size=(17, 20), num_routing=1, pose_size=2)], ids=str)
def test_contract(name, kwargs):
    check_model(name, **{**SMALL, **kwargs})
