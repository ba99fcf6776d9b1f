"""Networks of inverted dot-product attention routing: the paper's numbers, passes, both contracts, training."""

import warnings

import pytest
import timm
import torch
from exporting import check_export, run_onnx
from safetensors.torch import save_file
from timm.utils.onnx import onnx_export

import capszoo
from capszoo.engine.task import CapsuleTask
from capszoo.losses import CrossEntropyLoss
from capszoo.models import InvertedAttentionCapsNet
from capszoo.testing import check_model

RESNET = dict(stem_dims=[6, 8], stem_depths=[1, 1], num_types=3, pose_size=2, img_size=15)
CONV = dict(stem_dims=[6], num_types=3, pose_size=2, img_size=(13, 16))


def small(name="capsnet_resnet_ia", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**(RESNET if "resnet" in name else CONV), **kwargs})


def images(batch_size=2, in_chans=3, size=(15, 15)):
    return torch.randn(batch_size, in_chans, *size, generator=torch.Generator().manual_seed(1))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_of_the_paper():
    model = capszoo.create_model("capsnet_resnet_ia")
    parts = {"stem": 1_340_224, "primary_caps": 65_568, "caps": 2 * 147_488, "class_caps": 128_032, "fc": 17}
    assert {key: count(module) for key, module in model.named_children()} == parts
    assert capszoo.model_info("capsnet_resnet_ia").parameters == sum(parts.values()) == 1_828_817
    assert model.grid_size == (16, 16) and model.class_caps.weight.shape == (800, 4, 4, 10)
    cifar100 = dict(pose_size=6, num_hidden=20, num_classes=100)
    assert capszoo.model_info("capsnet_resnet_ia", **cifar100).parameters == 2_799_629
    assert capszoo.model_info("capsnet_conv_ia").parameters == 561_297


@pytest.mark.parametrize(
    "name,kwargs",
    [
        ("capsnet_resnet_ia", dict(num_hidden=4, num_passes=3, num_classes=3)),
        ("capsnet_resnet_ia", dict(num_passes=1, in_chans=1)),
        ("capsnet_conv_ia", dict(concurrent=False)),
    ],
    ids=str,
)
def test_contract(name, kwargs):
    check_model(name, **{**(RESNET if "resnet" in name else CONV), **kwargs})


@pytest.mark.parametrize("num_passes", [1, 2, 3, 5])
@torch.no_grad()
def test_concurrent_passes(num_passes):
    """All layers in each pass, as in the paper's procedure 2; the model leaves out what has no effect."""
    model = small(num_hidden=4, num_passes=num_passes).double().eval()
    x = images().double()
    layers = [*model.caps, model.class_caps]
    values = [model.primary_caps.to_capsules(model.forward_features(x))]
    for layer in layers:
        values.append(layer(values[-1]))
    for _ in range(num_passes - 1):
        values = values[:1] + [layer(below, own) for layer, below, own in zip(layers, values, values[1:], strict=False)]
    torch.testing.assert_close(model.forward_capsules(x)[0], values[-1].flatten(4)[..., 0])


@torch.no_grad()
def test_sequential_passes():
    model = small(num_passes=3, concurrent=False).double().eval()
    x = images().double()
    value = model.primary_caps.to_capsules(model.forward_features(x))
    for layer in [*model.caps, model.class_caps]:
        below, value = value, layer(value)
        value = layer(below, layer(below, value))
    capsules, scores = model.forward_capsules(x)
    torch.testing.assert_close(capsules, value.flatten(4)[..., 0])
    torch.testing.assert_close(scores, model.fc(capsules.flatten(2)).squeeze(2))
    assert not torch.allclose(scores, small(num_passes=3).double().eval()(x))


def test_images_of_any_size():
    assert isinstance(small(), InvertedAttentionCapsNet)
    for size in ((13, 13), (16, 40)):
        assert small(img_size=size).eval()(images(size=size)).shape == (2, 10)
    with pytest.raises(ValueError, match="^img_size=12x15 is too small: the convolutions need 13 pixels each way"):
        small(img_size=(12, 15))


def test_normalisation_of_other_channels():
    assert len(small().pretrained_cfg["mean"]) == 3
    cfg = small(in_chans=2).pretrained_cfg
    assert cfg["mean"] == pytest.approx((0.4734,), abs=1e-4) and len(cfg["std"]) == 1


ERRORS = {
    "stem_dims=.* and stem_depths=.* are not possible: give a number": dict(stem_dims=[4, 5, 6]),
    "stem_dims=.* is not possible: backbone='conv' takes one number": dict(backbone="conv"),
    "unknown backbone 'vgg'. Known: resnet, conv": dict(backbone="vgg"),
    "num_passes=0 is not possible": dict(num_passes=0),
    "num_hidden=-1 is not possible": dict(num_hidden=-1),
    "num_types=0 is not possible": dict(num_types=0),
    "pose_size=0 is not possible": dict(pose_size=0),
    "drop_rate=2.0 is not possible": dict(drop_rate=2.0),
    "num_classes=-1 is not possible": dict(num_classes=-1),
    "capsules are not pooled": dict(global_pool="avg"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message) as caught:
        capszoo.create_model("capsnet_resnet_ia", **{**RESNET, **ERRORS[message]})
    assert "\n" not in str(caught.value)


def test_task_trains():
    model = small(num_classes=3, num_passes=3, num_types=6, pose_size=3)
    task, x, target = CapsuleTask(model, verbose=False), images(12), torch.arange(12) % 3
    assert isinstance(task.criterion, CrossEntropyLoss)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = task(x, target)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize("kwargs", [dict(num_passes=3, num_hidden=4), dict(concurrent=False)], ids=str)
def test_ways_out(kwargs, tmp_path):
    model, x = small(**kwargs).eval(), images()
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for fused in (True, False):
            with capszoo.set_fused_routing(fused):
                torch.testing.assert_close(torch.jit.script(model)(x), expected)
        check_export(model, x)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
        onnx_export(model, str(tmp_path / "model.onnx"), example_input=x, check=False)
    torch.testing.assert_close(torch.from_numpy(run_onnx(tmp_path / "model.onnx", x)), expected, rtol=1e-4, atol=1e-5)


def test_new_classes_keep_the_layers_below():
    model = small().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.reset_classifier(3)
    kept = {key for key, value in model.state_dict().items() if value.equal(before[key])}
    assert {key for key in before if not key.startswith(("class_caps", "fc"))} <= kept
    model.reset_classifier(0)
    assert not any(key.startswith(("caps", "class_caps", "fc")) for key in model.state_dict())
    model.reset_classifier(5)
    assert model(images()).shape == (2, 5) and not any(module.training for module in model.modules())


def test_weights_of_other_shapes(tmp_path):
    source = small(num_hidden=4).eval()
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    kwargs = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), input_size=(3, 15, 15)), num_hidden=4)
    assert torch.equal(small(**kwargs).eval()(images()), source(images()))
    for other in (dict(num_classes=4), dict(num_classes=0), dict(in_chans=1), dict(img_size=20)):
        model = small(**kwargs, **other)
        assert torch.equal(model.primary_caps.conv.weight, source.primary_caps.conv.weight), "what fits is kept"
        assert model.num_classes == 0 or torch.equal(model.caps[0].weight, source.caps[0].weight)
