"""Convolutions with a scale: what they compute, how far a step of Adam moves them, and weights from before."""

import copy
import math

import pytest
import torch
from torch import nn

import capszoo
from capszoo.layers import PrimaryCaps, ScaledConv2d, fan_in_scale, fold_scales, unfold_scales
from capszoo.prune import prune


def make(scale=None, **kwargs):
    torch.manual_seed(0)
    return ScaledConv2d(5, 7, 3, 2, scale, **kwargs)


def test_the_scale_is_a_power_of_two_near_32_over_the_fan_in():
    assert [fan_in_scale(fan_in) for fan_in in (1, 32, 81, 243, 5184, 20736)] == [1, 1, 1 / 2, 1 / 8, 1 / 128, 1 / 512]
    assert [fan_in_scale(fan_in, centered=True) for fan_in in (128, 243, 5184, 20736)] == [1, 1 / 2, 1 / 32, 1 / 128]


@pytest.mark.parametrize("scale", [None, 1.0, 1 / 8, 0.3])
def test_sum_times_scale_plus_bias(scale):
    layer, x = make(scale), torch.randn(2, 5, 9, 8)
    factor = fan_in_scale(45) if scale is None else scale
    expected = nn.functional.conv2d(x, layer.weight * factor, layer.bias, stride=2)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("scale", [None, 1 / 8])
def test_centred_kernels(scale):
    """What all inputs have in common gives nothing, and all else does as before."""
    layer, x = make(scale, centered=True).double(), torch.randn(2, 5, 9, 8, dtype=torch.float64)
    layer.weight.data += 3 * torch.randn(7, 1, 1, 1)
    kernels = layer.weight - layer.weight.mean((1, 2, 3), keepdim=True)
    expected = nn.functional.conv2d(x, kernels * layer.scale, layer.bias, stride=2)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x + torch.randn(2, 1, 1, 1)), expected)
    assert torch.autograd.gradcheck(
        lambda w: torch.func.functional_call(layer, {"weight": w}, x), layer.weight.detach().requires_grad_()
    )
    layer(x).square().sum().backward()
    assert layer.weight.grad.sum((1, 2, 3)).abs().max() < 1e-9


def test_a_step_of_adam_does_not_drive_all_sums_of_a_centred_filter_to_one_side():
    """Of maps with a common brightness, as those after a ReLU have."""
    torch.manual_seed(0)
    moved = {}
    for centered in (False, True):
        layer, x = ScaledConv2d(64, 3, 9, scale=1 / 32, centered=centered), 5 + torch.rand(4, 64, 16, 16)
        before = layer(x).detach()
        layer(x).sum().backward()
        torch.optim.Adam(layer.parameters(), lr=1e-2).step()
        moved[centered] = float((layer(x) - before).detach().mean().abs())
    assert moved[False] > 5 and moved[True] < 0.2


def test_which_filters_are_centred():
    with pytest.raises(ValueError, match="centered=True of filters of one weight leaves nothing of them"):
        ScaledConv2d(1, 7, 1, centered=True)
    assert PrimaryCaps(4, 2, 3, kernel_size=5).conv.centered
    assert not capszoo.create_model("capsnet_tiny").conv1.centered
    assert not PrimaryCaps(4, 2, 3, kernel_size=5, scale=0.5).conv.centered


def test_centring_is_part_of_the_weights(tmp_path):
    """It goes to other models with them, and weights from before it have none."""
    torch.manual_seed(0)
    centered, plain = capszoo.create_model("capsnet_tiny"), capszoo.create_model("capsnet_tiny", start="plain")
    images = torch.rand(3, 1, 28, 28)
    for source, other in ((centered, plain), (plain, centered)):
        expected, target = source(images), copy.deepcopy(other)
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(target(images), expected)
        assert bool(target.primary_caps.conv.centered) == (source is centered)
        again = copy.deepcopy(target)
        torch.testing.assert_close(again(images), expected)
        capszoo.save_model(tmp_path / "m.safetensors", source)
        torch.testing.assert_close(
            capszoo.load_model(tmp_path / "m.safetensors").train(source.training)(images), expected
        )
    # By those who set tensors and ask no module, too.
    target = copy.deepcopy(plain)
    for key, value in centered.state_dict().items():
        owner, _, name = key.rpartition(".")
        tensors = target.get_submodule(owner)
        getattr(tensors, name).data = value.clone()
    torch.testing.assert_close(target(images), centered(images))
    before = {key: value for key, value in centered.state_dict().items() if not key.endswith(".centered")}
    target = copy.deepcopy(plain)
    target.load_state_dict(before)
    assert not target.primary_caps.conv.centered
    assert float(target.primary_caps.conv.scale) == float(centered.primary_caps.conv.scale)


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
        moved = float((layer(x) - before).detach().abs().mean())
        assert 0.02 < moved < 0.05, (channels, moved)  # 32 * lr, a power of two about it, and lr of the bias


def test_folded_scales_compute_the_same_and_unfold_again():
    model = capszoo.create_model("capsnet_tiny")
    images = torch.rand(3, 1, 28, 28)
    before, first = model(images), model.conv1.weight.detach().clone()
    kernels = model.primary_caps.conv.kernels().detach() * model.primary_caps.conv.scale
    assert fold_scales(model) is model
    assert float(model.conv1.scale) == float(model.primary_caps.conv.scale) == 1
    assert not model.primary_caps.conv.centered and torch.equal(model.primary_caps.conv.weight, kernels)
    torch.testing.assert_close(model(images), before)
    plain = {key: value for key, value in model.state_dict().items() if not key.endswith((".scale", ".centered"))}
    other = capszoo.create_model("capsnet_tiny")
    restored = unfold_scales(plain, other)
    assert torch.equal(restored["conv1.weight"], first)  # a power of two loses no bit
    # Weights that are not made for centred kernels get the scale of those that are not.
    assert float(restored["primary_caps.conv.scale"]) == fan_in_scale(5184) == 1 / 128
    other.load_state_dict(restored)
    torch.testing.assert_close(other(images), before)


def test_a_state_dict_without_scales_is_that_of_plain_convolutions():
    model = capszoo.create_model("capsnet_tiny", start="plain")
    images = torch.rand(3, 1, 28, 28)
    old = {key: value for key, value in model.state_dict().items() if not key.endswith((".scale", ".centered"))}
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


def test_pruned_filters_of_a_centred_convolution_compute_the_same():
    """What is left of a filter has another mean: it is stored centred, at the scale of those that are not."""
    torch.manual_seed(0)
    model = capszoo.create_model("capsnet_tiny", conv_dim=8, num_types=2).double()
    with torch.no_grad():
        model.primary_caps.conv.weight += 3
        model.conv1.weight[3:] = 0
        model.conv1.bias[3:] = -1e-3  # filters that never fire
    smaller, report = prune(model, {"conv1": 3}, "magnitude")
    images = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    assert report.kept["conv1"] == (0, 1, 2)
    torch.testing.assert_close(smaller(images), model(images))
    conv = smaller.primary_caps.conv
    assert not conv.centered and float(conv.scale) == fan_in_scale(3 * 81)


@pytest.mark.parametrize("spoil", ["fold", "plain weights", "empty memory"])
def test_reset_parameters_makes_a_fresh_module(spoil):
    conv = ScaledConv2d(32, 6, 9, centered=True, init_gain=2.0)
    fresh = {key: value.clone() for key, value in conv.state_dict().items()}
    if spoil == "fold":
        fold_scales(conv)
    elif spoil == "plain weights":
        conv.load_state_dict({"weight": torch.randn(6, 32, 9, 9), "bias": torch.zeros(6)})
    else:
        conv = ScaledConv2d(32, 6, 9, centered=True, init_gain=2.0, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            conv.scale.fill_(math.nan)
    conv.reset_parameters()
    assert conv.scale == fresh["scale"] and conv.centered == 1 and conv.may_center
    assert float(conv.weight.detach().std() / fresh["weight"].std()) == pytest.approx(1, rel=0.05)
