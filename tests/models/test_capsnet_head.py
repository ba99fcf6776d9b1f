"""Any backbone under any capsule head: the contract, the layers of the families, the ways out, files, training."""

import json
import warnings

import numpy as np
import pytest
import timm
import torch
from exporting import check_export, run_onnx
from timm.models import group_parameters
from timm.utils.onnx import onnx_export

import capszoo
from capszoo.contract import HasCriterion
from capszoo.engine.task import CapsuleTask
from capszoo.losses import CrossEntropyLoss, MarginLoss
from capszoo.models import CapsNetHead, list_heads
from capszoo.recipes import train
from capszoo.testing import check_model

NAME = "capsnet_head"
SMALL = dict(backbone="stem", backbone_level=1, img_size=32, num_classes=4, num_types=3, caps_dim=4)
every_head = pytest.mark.parametrize("head", list_heads())


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model(NAME, **{**SMALL, **kwargs})


def images(batch_size=2, in_chans=3, size=32):
    return torch.rand(batch_size, in_chans, size, size, generator=torch.Generator().manual_seed(1))


def test_heads():
    assert list_heads() == ["dynamic", "inverted_attention", "self_attention", "self_routing"]


@every_head
def test_contract(head):
    check_model(NAME, head=head, **SMALL)


@pytest.mark.slow
@every_head
def test_contract_on_a_network_of_timm(head):
    kwargs = {**SMALL, "backbone": "test_resnet", "backbone_level": None, "in_chans": 1, "img_size": (64, 72)}
    check_model(NAME, head=head, **kwargs)


# Levels, maps of primary capsules and capsules that class capsules are made of, at 224x224 on resnet18.
SHAPES = {
    "dynamic": (3, (256, 6, 6), 32 * 36),
    "inverted_attention": (3, (512, 14, 14), 32 * 16),
    "self_attention": (4, (128, 1, 1), 16),
    "self_routing": (4, (32 * 17, 7, 7), 32 * 49),
}


@every_head
def test_shapes_on_large_images(head):
    level, features, capsules = SHAPES[head]
    model = capszoo.create_model(NAME, head=head, device="meta")
    assert isinstance(model, CapsNetHead) and model.backbone.name == "resnet18" and model.backbone.level == level
    assert (model.num_features, *model.grid_size) == features
    assert model.forward_features(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, *features)
    info = capszoo.model_info(model)
    assert info.capsules == capsules and str(info).startswith("capsnet_head with resnet18: ")


@every_head
def test_losses_follow_the_head(head):
    model = small(head=head)
    logits = head in ("inverted_attention", "self_routing")
    assert model.returns_logits == logits == isinstance(model, HasCriterion)
    assert isinstance(CapsuleTask(model, verbose=False).criterion, CrossEntropyLoss if logits else MarginLoss)
    capsules, scores = model.eval().forward_capsules(images())
    expected = {
        "dynamic": lambda: capsules.norm(dim=2),
        "self_attention": lambda: capsules.norm(dim=2),
        "inverted_attention": lambda: model.head.fc(capsules).squeeze(2),
        "self_routing": lambda: capsules.squeeze(2).log_softmax(dim=1),
    }[head]()
    torch.testing.assert_close(scores, expected)


def test_layers_are_those_of_the_families():
    """The same primary capsules, by the head and by the layer of the family."""
    model = small(head="dynamic", head_kwargs={"share_weights": True, "num_routing": 2}).eval()
    caps, features = model.head.class_caps, model.forward_features(images())
    assert caps.weight.shape[0] == 3 and caps.routing.num_iters == 2
    torch.testing.assert_close(model.forward_capsules(images())[0], caps(model.primary_caps.to_capsules(features)))
    model = small(head="self_attention", head_kwargs={"couplings": "uniform"}).eval()
    caps, features = model.head.class_caps, model.forward_features(images())
    assert not caps.attention and features.shape == (2, 12, 1, 1)
    torch.testing.assert_close(model.forward_capsules(images())[0], caps(model.primary_caps.caps.to_capsules(features)))
    model = small(head="inverted_attention", head_kwargs={"num_passes": 1}).eval()
    x = model.primary_caps.to_capsules(model.forward_features(images()))
    for layer in (*model.head.caps, model.head.class_caps):
        x = layer(x)
    torch.testing.assert_close(model.forward_capsules(images())[0], x.flatten(2))


@pytest.mark.slow
@every_head
def test_ways_out(head, tmp_path):
    model = small(head=head).eval()
    expected = model(images())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.jit.script(model)(images()), expected)
        check_export(model, images())
        onnx_export(model, str(tmp_path / "model.onnx"), example_input=images(), check=False)
    found = run_onnx(tmp_path / "model.onnx", images())
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


@every_head
def test_levels_and_groups(head):
    model = small(head=head).eval()
    final, levels = model.forward_intermediates(images())
    assert torch.equal(final, model.forward_features(images())) and len(levels) == len(model.feature_info) == 3
    assert torch.equal(levels[0], model.backbone(images())) and torch.equal(levels[2], final)
    assert [level.shape[1] for level in levels] == [info["num_chs"] for info in model.feature_info]
    extractor = small(head=head, features_only=True).eval()
    assert all(torch.equal(a, b) for a, b in zip(extractor(images()), levels, strict=True))
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {key for key, _ in model.named_parameters()} and len(set(groups.values())) == 4
    assert {number for key, number in groups.items() if key.startswith("head.")} == {3}
    for last in (1, 0):
        assert model.prune_intermediate_layers([last]) == [last]
        assert torch.equal(model(images()), levels[last]) and model.num_features == levels[last].shape[1]


def test_weights_adapt(tmp_path):
    source, path = small(), tmp_path / "weights.safetensors"
    capszoo.checkpoint.save_tensors(path, source.state_dict(), {})
    kwargs = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), input_size=(3, 32, 32), num_classes=4))
    assert torch.equal(small(**kwargs).eval()(images()), source.eval()(images()))
    for other in (dict(num_classes=6), dict(in_chans=1), dict(img_size=40)):
        model = small(**kwargs, **other)
        assert torch.equal(model.primary_caps.conv.weight, source.primary_caps.conv.weight), "what fits is kept"
    with pytest.raises(ValueError, match="these weights do not fit 'capsnet_head': "):
        small(**kwargs, num_types=5)


ERRORS = {
    "unknown head 'dynamc', did you mean 'dynamic'": dict(head="dynamc"),
    "unknown backbone 'resnt18'": dict(backbone="resnt18"),
    "head_kwargs=.* of head='self_attention': unknown keyword 'coupling', did you mean 'couplings'": dict(
        head="self_attention", head_kwargs={"coupling": "uniform"}
    ),
    "unknown couplings 'none'": dict(head="self_routing", head_kwargs={"couplings": "none"}),
    "caps_dim=8 is not possible: poses of 'inverted_attention' are squares": dict(
        head="inverted_attention", caps_dim=8
    ),
    "head='inverted_attention' needs a map of 7x7, the backbone's is 2x2": dict(
        head="inverted_attention", backbone_level=3
    ),
    "num_passes=0 is not possible": dict(head="inverted_attention", head_kwargs={"num_passes": 0}),
    "num_routing=0 is not possible": dict(head_kwargs={"num_routing": 0}),
    "num_classes=-1 is not possible": dict(num_classes=-1),
    "capsules are not pooled": dict(global_pool="avg"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message) as caught:
        capszoo.create_model(NAME, **{**SMALL, **ERRORS[message]})
    assert "\n" not in str(caught.value)


@every_head
def test_trains(head):
    torch.manual_seed(0)
    model = small(head=head, num_classes=3)
    task, x, target = CapsuleTask(model, verbose=False), images(12), torch.arange(12) % 3
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = task(x, target)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


@pytest.mark.slow
def test_recipe(tmp_path, capsys):
    folder, argv = tmp_path / "run", ["--model", NAME, "--device", "cpu", "--amp", "none", "--epochs", "1"]
    own = ["--model-kwargs", "head=self_routing", "backbone_kwargs={dims: [12]}", "num_types=4", "caps_dim=4"]
    assert train.main([*argv, "--backbone", "stem", *own, "--batch-size", "64", "--output", str(folder)]) == 0
    assert "capsnet_head with stem: " in capsys.readouterr().out
    assert json.loads((folder / "result.json").read_text())["test_top1"] > 0.3
    loaded = capszoo.load_model(folder / "best.safetensors")
    assert loaded.arguments()["head"] == "self_routing" and loaded.backbone.num_features == 12
