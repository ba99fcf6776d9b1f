"""Vote matrices stay as routing reads them, whatever memory format a network is converted to."""

import copy

import pytest
import torch

import capszoo
from capszoo.layers import ClassCaps, ClassMatrixCaps, InvertedAttentionCaps, SelfAttentionRouting

VOTES = (ClassCaps, ClassMatrixCaps, InvertedAttentionCaps, SelfAttentionRouting)


@pytest.mark.parametrize("name", ["capsnet_tiny", "efficient_capsnet", "capsnet_em", "capsnet_conv_ia"])
def test_channels_last_is_for_convolutions(name):
    model = capszoo.create_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.to(memory_format=torch.channels_last)
    converted = copy.deepcopy(model)
    votes = [module.weight for module in converted.modules() if isinstance(module, VOTES)]
    assert votes and all(weight.dim() == 4 and weight.is_contiguous() for weight in votes)
    kernels = [m.weight for m in converted.modules() if isinstance(m, torch.nn.Conv2d)]
    assert kernels and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)
    for key, value in converted.state_dict().items():
        assert torch.equal(value, before[key])


def test_other_conversions_go_on_as_before():
    caps = ClassCaps(6, 4, 3, 5)
    weight = caps.weight
    assert caps.float().weight is weight and caps.double().weight.dtype == torch.float64
    assert caps.to("meta").weight.is_meta and caps.to_empty(device="cpu").weight.shape == (6, 4, 3, 5)
