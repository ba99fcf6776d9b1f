"""Saturated networks are told from those that can learn."""

import pytest
import torch

import capszoo
from capszoo.engine.watch import Saturation, measure_saturation


def images(count=16):
    return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["capsnet_tiny", "cnn_baseline_tiny"])
def test_a_fresh_network_can_learn(name):
    torch.manual_seed(0)
    model = capszoo.create_model(name, drop_rate=0.5).train()
    state = torch.get_rng_state()
    found = measure_saturation(model, images())
    assert not found.is_stuck and model.training and torch.equal(torch.get_rng_state(), state)
    assert found.saturated == (None if name.startswith("cnn") else 0.0)
    scores = model.eval()(images())
    assert found.spread == pytest.approx(float(scores.std(dim=0).max()))


def test_long_capsules_of_every_image_are_seen():
    model = capszoo.create_model("capsnet_tiny")
    with torch.no_grad():
        model.primary_caps.conv.weight.zero_()
        model.primary_caps.conv.bias.fill_(100.0)
    found = measure_saturation(model, images())
    assert found.saturated == 1.0 and found.spread == 0.0 and found.is_stuck


@pytest.mark.parametrize(
    ("saturated", "spread", "stuck"),
    [
        (1.0, 0.001, True),
        (1.0, 0.3, False),
        (0.5, 0.001, False),
        (0.0, 0.0, True),
        (None, 0.0, True),
        (None, 0.1, False),
    ],
)
def test_both_signs_are_needed(saturated, spread, stuck):
    assert Saturation(saturated, spread).is_stuck is stuck
