"""The plain CNN: timm's model contract, the ways out of eager PyTorch, weights, and the parts that train it."""

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import timm
import torch
from exporting import check_export, run_onnx
from safetensors.torch import save_file
from timm.layers import create_feature_extractor
from timm.models import group_parameters, save_for_hf
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.task import ClassificationTask
from timm.utils.onnx import onnx_export

import capszoo
from capszoo.engine import evaluate
from capszoo.engine.task import CapsuleTask
from capszoo.losses import margin_loss
from capszoo.models import CNNBaseline

NAMES = ["cnn_baseline", "cnn_baseline_tiny"]
every_model = pytest.mark.parametrize("name", NAMES)


def small(name="cnn_baseline", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**dict(conv_dim=8, img_size=20), **kwargs})


def images(batch_size=2, in_chans=1, size=(20, 20)):
    return torch.rand(batch_size, in_chans, *size, generator=torch.Generator().manual_seed(1))


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_of_like_size():
    assert capszoo.list_models("cnn*") == NAMES and timm.list_models("cnn_baseline*") == NAMES
    for name, capsules in (("cnn_baseline", "capsnet_ws"), ("cnn_baseline_tiny", "capsnet_tiny")):
        info, other = capszoo.model_info(name), capszoo.model_info(capsules)
        assert info.name == name and info.input_size == (1, 28, 28)
        assert info.parameters == pytest.approx(other.parameters, rel=0.05)
        assert info.macs == pytest.approx(other.macs, rel=0.05)
    assert capszoo.model_info("cnn_baseline").parameters == 20_992 + 5_308_672 + 92_170
    model, capsnet = capszoo.create_model("cnn_baseline"), capszoo.create_model("capsnet")
    assert model.conv1.weight.shape == capsnet.conv1.weight.shape
    assert model.conv2.weight.shape == capsnet.primary_caps.conv.weight.shape and model.grid_size == capsnet.grid_size


@every_model
def test_default_cfg(name):
    model = timm.create_model(name).eval()
    assert isinstance(model, CNNBaseline) and timm.models.model_entrypoint(name).__doc__
    cfg = model.default_cfg
    assert cfg["architecture"] == name and cfg["tag"] == "untrained" and cfg["fixed_input_size"]
    x = images(1, 1, (28, 28))
    features = model.forward_features(x)
    assert features.shape == (1, model.num_features, *cfg["pool_size"]) and (features >= 0).all()
    flat = model.forward_head(features, pre_logits=True)
    assert torch.equal(flat, features.flatten(1)) and flat.shape == (1, model.head_hidden_size)
    assert f"{cfg['first_conv']}.weight" in model.state_dict()
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    model.reset_classifier(0)
    assert torch.equal(model(x), flat) and not list(model.get_classifier().parameters())
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    model.reset_classifier(3, "flat")
    assert model(x).shape == (1, 3) and model.num_classes == 3


@pytest.mark.parametrize("batch_size", [0, 1, 3])
def test_forward(batch_size):
    model = small(num_classes=7).eval()
    x = images(batch_size)
    scores = model(x)
    assert scores.shape == (batch_size, 7) and ((scores > 0) & (scores < 1)).all()
    by_hand = torch.nn.functional.conv2d(x, model.conv1.weight, model.conv1.bias).relu()
    by_hand = torch.nn.functional.conv2d(by_hand, model.conv2.weight, model.conv2.bias, stride=2).relu()
    expected = torch.sigmoid(by_hand.flatten(1) @ model.fc.weight.T + model.fc.bias)
    torch.testing.assert_close(scores, expected)
    assert torch.equal(model.forward_head(model.forward_features(x)), scores)


@pytest.mark.parametrize("global_pool", ["flat", ""])
def test_no_classes(global_pool):
    model = small(num_classes=0, global_pool=global_pool)
    features = model.forward_features(images())
    assert torch.equal(model(images()), features.flatten(1) if global_pool == "flat" else features)


@pytest.mark.parametrize("feature_cls", ["getter", "hook", "fx"])
@pytest.mark.parametrize(
    "indices, levels", [((0, 1, 2), [0, 1, 2]), ((1,), [1]), ((-1,), [2]), ((0, 2), [0, 2]), ((0,), [0])]
)
def test_features_only(feature_cls, indices, levels):
    model = small()
    first = model.act1(model.conv1(images()))
    expected = [first, model.conv2(first), model.forward_features(images())]
    assert (expected[1] < 0).any() and torch.equal(expected[1].relu(), expected[2])
    extractor = small(features_only=True, feature_cls=feature_cls, out_indices=indices)
    features = extractor(images())
    assert extractor.feature_info.channels() == [8] * len(levels)
    assert extractor.feature_info.reduction() == [20 // f.shape[2] for f in features]
    assert all(torch.equal(f, expected[i]) for f, i in zip(features, levels, strict=True))
    assert [f.shape[2:] for f in small(features_only=True)(images(size=(24, 40)))] == [(16, 32), (4, 12), (4, 12)]


def test_forward_intermediates():
    model, x = small(), images()
    final, intermediates = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x)) and torch.equal(intermediates[2], final)
    assert torch.equal(intermediates[0], model.act1(model.conv1(x)))
    assert torch.equal(intermediates[1], model.conv2(intermediates[0])) and (intermediates[1] < 0).any()
    for level in range(3):
        (found,) = model.forward_intermediates(x, indices=[level], stop_early=True, intermediates_only=True)
        assert torch.equal(found, intermediates[level])
    with pytest.raises(AssertionError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NHWC")
    with pytest.raises(AssertionError, match="intermediates_only"):
        model.forward_intermediates(x, stop_early=True)


def test_prune_intermediate_layers():
    expected = small(features_only=True)(images())
    for indices, kept in ([1], [1]), (1, [2]), ([0], [0]):
        model = small()
        assert model.prune_intermediate_layers(indices) == kept and model.num_classes == 0
        assert ("conv2.weight" in model.state_dict()) == (kept != [0])
        assert torch.equal(
            model.forward_intermediates(images(), indices=kept, intermediates_only=True)[0], expected[kept[0]]
        )
        assert model(images()).shape[1] == model.num_features
    model = small()
    model.prune_intermediate_layers([1], prune_head=False)
    assert torch.equal(model(images()), small()(images()))


def test_prune_norm_takes_the_second_activation_away():
    x, expected = images(), small(features_only=True)(images())
    for level, left in (0, 1), (1, 2), (2, 3):
        model = small()
        model.prune_intermediate_layers([level], prune_norm=True)
        assert torch.equal(model.forward_features(x), expected[level])
        final, intermediates = model.forward_intermediates(x)
        assert len(intermediates) == left and torch.equal(final, expected[level])
        assert all(map(torch.equal, intermediates, expected))
        with pytest.raises(AssertionError, match="out of range"):
            model.forward_intermediates(x, indices=[left])
        whole = small(num_classes=0)
        whole.load_state_dict(model.state_dict(), strict=level > 0)
        assert torch.equal(whole.conv1.weight, model.conv1.weight)


def test_grad_checkpointing():
    def saved_values_and_gradients(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model.zero_grad()
            model(images()).square().sum().backward()
        return sum(sizes), [p.grad.clone() for p in model.parameters()]

    model = small().train()
    stored, expected = saved_values_and_gradients(model)
    model.set_grad_checkpointing()
    stored_now, found = saved_values_and_gradients(model)
    assert stored_now < stored and all(map(torch.equal, found, expected))
    _, intermediates = model.forward_intermediates(images())
    assert torch.equal(intermediates[2], model.forward_features(images()))


def test_groups_and_optimizer():
    model = small()
    groups = group_parameters(model, model.group_matcher())
    assert sorted(key for group in groups.values() for key in group) == sorted(k for k, _ in model.named_parameters())
    scales = {p: g["lr_scale"] for g in param_groups_layer_decay(model, layer_decay=0.5) for p in g["params"]}
    assert scales[model.conv1.weight] < scales[model.conv2.weight] < scales[model.fc.weight] == 1.0
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    decayed = {p for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    assert decayed == {p for key, p in model.named_parameters() if key.endswith("weight")}
    assert ClassificationTask(model, verbose=False)(images(), torch.tensor([3, 5]))["loss"].isfinite()


def test_meta_device_and_types():
    model = small(device="meta")
    assert all(p.is_meta for p in model.parameters()) and model(images().to("meta")).shape == (2, 10)
    model.to_empty(device="cpu").load_state_dict(small().state_dict())
    assert torch.equal(model(images()), small()(images()))
    for dtype in (torch.float64, torch.bfloat16):
        assert small(dtype=dtype)(images().to(dtype)).dtype == dtype


def test_reset_classifier_keeps_its_state():
    model = small(dtype=torch.float64).eval()
    model.fc.requires_grad_(False)
    model.reset_classifier(4)
    assert model.fc.weight.dtype == torch.float64 and not model.fc.training and not model.fc.weight.requires_grad
    model = small(device="meta")
    model.reset_classifier(4)
    assert model.fc.weight.is_meta and model.fc.training and model.fc.weight.requires_grad


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("size", [17, (18, 25), [20, 31]])
def test_input_variants(in_chans, size):
    model = small(in_chans=in_chans, img_size=size, num_classes=5)
    height, width = (size, size) if isinstance(size, int) else size
    assert model(images(2, in_chans, (height, width))).shape == (2, 5)
    assert model.arguments()["img_size"] == [height, width]
    with pytest.raises(AssertionError, match="make the model for this img_size"):
        model(images(2, in_chans, (height + 4, width)))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(global_pool="avg"), "global_pool='avg' is not possible"),
        (dict(img_size=(28, 9)), "img_size=28x9 is too small: two 9x9 convolutions need 17 pixels"),
        (dict(num_classes=-1), "num_classes=-1 is not possible"),
        (dict(in_chans=0), "in_chans=0 is not possible"),
        (dict(conv_dim=0), "conv_dim=0 is not possible"),
        (dict(kernel_size=0), "kernel_size=0 is not possible"),
        (dict(drop_rate=100), "drop_rate=100 is not possible"),
        (dict(drop_rate=math.nan), "drop_rate=nan is not possible"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        CNNBaseline(device="meta", **kwargs)
    assert "\n" not in str(error.value)


def test_unknown_keywords():
    with pytest.raises(TypeError, match="num_routing"):
        small(num_routing=3)
    with pytest.raises(ValueError, match="unknown keyword 'decoder' for model 'cnn_baseline'"):
        capszoo.create_model("cnn_baseline", decoder=True)


def test_copies_and_dropout():
    model = small(drop_rate=0.5).eval()
    expected = model(images())
    assert torch.equal(copy.deepcopy(model)(images()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images()), expected)
    assert not torch.equal(model.train()(images()), model(images()))


def test_script_trace_and_fx(tmp_path):
    model = small().eval()
    expected = model(images())
    torch.jit.save(torch.jit.script(model), tmp_path / "model.pt")
    assert torch.equal(torch.jit.load(tmp_path / "model.pt")(images()), expected)
    assert torch.equal(torch.jit.trace(model, images())(images(3)), model(images(3)))
    found = create_feature_extractor(model, {"act2": "features", "sigmoid": "scores"})(images())
    assert torch.equal(found["features"], model.forward_features(images())) and torch.equal(found["scores"], expected)


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(strict):
    model = small().eval()
    check_export(model, images(), strict=strict)


def test_onnx(tmp_path):
    model, path = small(exportable=True).eval(), str(tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx_export(model, path, input_size=(1, 20, 20), batch_size=2, use_dynamo=True, check_forward=True)
    found = run_onnx(path, images(5))
    np.testing.assert_allclose(found, model(images(5)).detach().numpy(), rtol=0, atol=1e-5)


def test_compile_in_one_graph():
    model = small().train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), model(images()))
    compiled(images()).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    "change, anew",
    [
        ({}, set()),
        (dict(num_classes=4), {"fc.weight", "fc.bias"}),
        (dict(num_classes=0), set()),
        (dict(in_chans=3), {"conv1.weight"}),
        (dict(img_size=20), {"fc.weight"}),
        (dict(num_classes=4, in_chans=3, img_size=20), {"conv1.weight", "fc.weight", "fc.bias"}),
    ],
)
def test_weights_for_another_task(change, anew, tmp_path):
    source = small(img_size=28)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.manual_seed(1)
    overlay = dict(file=str(tmp_path / "w.safetensors"))
    model = timm.create_model("cnn_baseline", pretrained=True, conv_dim=8, pretrained_cfg_overlay=overlay, **change)
    same = {
        k
        for k, v in model.state_dict().items()
        if torch.equal(v, source.state_dict().get(k, v - 1)[: len(v)]) and v.shape == source.state_dict()[k].shape
    }
    assert same == set(model.state_dict()) - anew
    if change == dict(in_chans=3):
        gray = images(size=(28, 28))
        torch.testing.assert_close(model(gray.repeat(1, 3, 1, 1)), source(gray), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="these weights do not fit 'cnn_baseline': 'conv1.*has shape"):
        timm.create_model("cnn_baseline", pretrained=True, conv_dim=9, pretrained_cfg_overlay=overlay)


def test_folder(tmp_path):
    source = small(num_classes=7, in_chans=3, img_size=(20, 22)).eval()
    save_for_hf(source, tmp_path, safe_serialization=True)
    for create in timm.create_model, capszoo.create_model:
        model = create(f"local-dir:{tmp_path}", pretrained=True).eval()
        x = images(2, 3, (20, 22))
        assert model.num_classes == 7 and torch.equal(model(x), source(x))


def test_task_and_evaluation():
    """The recipe's own parts take it: margin loss on the scores, no reconstruction."""
    model = small()
    labels = torch.tensor([3, 5])
    result = CapsuleTask(model, verbose=False)(images(), labels)
    torch.testing.assert_close(result["loss"], margin_loss(model(images()), labels))
    assert result["reconstruction_loss"] == 0
    measured = evaluate(model, [(images(), labels)])
    assert measured.reconstruction_error is None and measured.margin_loss == pytest.approx(result["loss"].item())
