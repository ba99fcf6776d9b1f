"""Convolutions with a scale: what they compute, how far a step of Adam moves them, and weights from before."""

import math

import pytest
import torch
from torch import nn

import capszoo
from capszoo.layers import ScaledConv2d, fan_in_scale, fold_scales, unfold_scales


def make(scale=None, **kwargs):
    torch.manual_seed(0)
    return ScaledConv2d(5, 7, 3, 2, scale, **kwargs)


def test_the_scale_is_a_power_of_two_near_32_over_the_fan_in():
    assert [fan_in_scale(fan_in) for fan_in in (1, 32, 81, 243, 5184, 20736)] == [1, 1, 1 / 2, 1 / 8, 1 / 128, 1 / 512]


@pytest.mark.parametrize("scale", [None, 1.0, 1 / 8, 0.3])
def test_sum_times_scale_plus_bias(scale):
    layer, x = make(scale), torch.randn(2, 5, 9, 8)
    factor = fan_in_scale(45) if scale is None else scale
    expected = nn.functional.conv2d(x, layer.weight * factor, layer.bias, stride=2)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("gain", [1.0, 2.0])
def test_fresh_weights_compute_what_a_plain_convolution_does(gain):
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 7, 3, 2)
    layer, x = make(1 / 64, init_gain=gain), torch.randn(2, 5, 9, 8)
    for _ in range(2):
        bias = plain.bias[:, None, None]
        torch.testing.assert_close(layer(x), gain * (plain(x) - bias) + bias)
        for module in (plain, layer):
            torch.manual_seed(1)
            module.reset_parameters()


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_scales_that_are_not_possible(scale):
    with pytest.raises(ValueError, match=f"scale={scale} "):
        make(scale)


def test_a_step_of_adam_moves_the_sum_by_its_rate_whatever_the_fan_in():
    for channels in (4, 64, 256):
        layer = ScaledConv2d(channels, 3, 9)
        x = torch.ones(1, channels, 9, 9)
        before = layer(x).detach()
        layer(x).sum().backward()
        torch.optim.Adam(layer.parameters(), lr=1e-3).step()
        moved = float((layer(x) - before).abs().mean())
        assert 0.02 < moved < 0.05, (channels, moved)  # 32 * lr, a power of two about it, and lr of the bias


def test_folded_scales_compute_the_same_and_unfold_again():
    model = capszoo.create_model("capsnet_tiny")
    images = torch.rand(3, 1, 28, 28)
    before, weights = model(images), {key: value.clone() for key, value in model.state_dict().items()}
    assert fold_scales(model) is model
    assert float(model.conv1.scale) == float(model.primary_caps.conv.scale) == 1
    torch.testing.assert_close(model(images), before)
    plain = {key: value for key, value in model.state_dict().items() if not key.endswith(".scale")}
    restored = unfold_scales(plain, capszoo.create_model("capsnet_tiny"))
    assert all(torch.equal(restored[key], weights[key]) for key in weights)  # a power of two loses no bit


def test_a_state_dict_without_scales_is_that_of_plain_convolutions():
    model = capszoo.create_model("capsnet_tiny", start="plain")
    images = torch.rand(3, 1, 28, 28)
    old = {key: value for key, value in model.state_dict().items() if not key.endswith(".scale")}
    for options in ({}, {"device": "meta"}):
        other = capszoo.create_model("capsnet_tiny", **options)
        other.load_state_dict(old, assign=bool(options))
        torch.testing.assert_close(other(images), model(images))


def test_half_precision_under_autocast():
    layer, x = make(1 / 8), torch.randn(2, 5, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer(x), rtol=0.03, atol=0.03)
