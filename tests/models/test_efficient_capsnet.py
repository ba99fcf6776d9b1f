"""Efficient-CapsNet: the paper's numbers, both contracts, the ways out of eager PyTorch, weights, training."""

import json
import warnings

import numpy as np
import pytest
import timm
import torch
from exporting import check_export, run_onnx
from safetensors.torch import save_file
from timm.layers import create_feature_extractor
from timm.models import group_parameters
from timm.utils.onnx import onnx_export
from torch import nn

import capszoo
from capszoo.engine import evaluate
from capszoo.engine.task import CapsuleTask
from capszoo.engine.watch import measure_saturation
from capszoo.errors import UsageError
from capszoo.models import EfficientCapsNet
from capszoo.prune import prune
from capszoo.recipes import benchmark, export, train, validate
from capszoo.testing import check_model

NAME = "efficient_capsnet"
SMALL = dict(conv_dims=[4, 5, 6], num_types=3, caps_dim=4, class_dim=5, img_size=13)


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model(NAME, **{**SMALL, **kwargs})


def images(batch_size=2, in_chans=1, size=(13, 13)):
    return torch.rand(batch_size, in_chans, *size, generator=torch.Generator().manual_seed(1))


def test_parameters_of_the_paper():
    model = capszoo.create_model(NAME)
    parts = {"conv1": 832 + 64, "conv2": 18_496 + 128, "conv3": 36_928 + 128, "conv4": 73_856 + 256}
    parts |= {"primary_caps": 10_496, "class_caps": 20_640}
    assert {key: sum(p.numel() for p in module.parameters()) for key, module in model.named_children()} == parts
    assert capszoo.model_info(NAME).parameters == sum(parts.values()) == 161_824
    assert model.class_caps.weight.shape == (16, 8, 10, 16) and model.class_caps.bias.shape == (16, 10)
    decoder = capszoo.model_info(NAME, decoder=True).parameters - 161_824
    assert decoder == 161 * 512 + 513 * 1024 + 1025 * 784


# From the authors' code; the paper gives 151 K and 154 K.
FORMS = {
    "smallnorb": (dict(in_chans=2, img_size=48, num_classes=5), 151_664, (8, 8)),
    "multimnist": (dict(img_size=36), 154_656, (6, 6)),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_paper(form):
    kwargs, parameters, grid = FORMS[form]
    model = capszoo.create_model(NAME, form=form, **kwargs).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    x = images(in_chans=model.in_chans, size=model.img_size)
    levels = model.forward_intermediates(x, intermediates_only=True)
    assert [level.shape[1:] for level in levels] == [(128, *grid), (128, 1, 1), (128, 1, 1)]
    assert model.primary_caps.conv.weight.shape[2:] == {"smallnorb": (8, 8), "multimnist": (5, 5)}[form]
    assert model(x).shape == (2, model.num_classes)
    first = model.conv1
    assert type(first.norm) is {"smallnorb": nn.InstanceNorm2d, "multimnist": nn.BatchNorm2d}[form]
    assert torch.equal(first(x), first.norm(first.act(first.conv(x)))), "the activation comes first"


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (1, 2)])
@pytest.mark.parametrize("form, least", [("smallnorb", 23), ("multimnist", 13)])
def test_forms_of_any_size(form, least, size):
    size = (least + size[0], least + size[1])
    model = small(form=form, img_size=size).train()
    assert model(images(size=size)).shape == (2, 10) and model.arguments()["form"] == form
    with pytest.raises(ValueError, match=f"img_size={least - 1}x{least} is too small: .* need {least} pixels"):
        small(form=form, img_size=(least - 1, least))


def test_features():
    model = capszoo.create_model(NAME).eval()
    assert isinstance(model, EfficientCapsNet)
    cfg, x = model.pretrained_cfg, images(size=(28, 28))
    assert cfg["pool_size"] == (1, 1) and cfg["paper_ids"] == "arXiv:2101.12491" and "published" in cfg["notes"][-1]
    features = model.forward_features(x)
    assert features.shape == (2, 128, 1, 1) and model.conv4(model.conv3(model.conv2(model.conv1(x)))).shape[2:] == (
        9,
        9,
    )
    capsules = model.primary_capsules(features)
    assert capsules.shape == (2, 16, 8) and torch.equal(capsules.flatten(1), features.flatten(1))
    assert (capsules.norm(dim=2) < 1).all()
    classes, scores = model.forward_capsules(x)
    assert classes.shape == (2, 10, 16)
    torch.testing.assert_close(scores, classes.norm(dim=2))


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(decoder=True, decoder_dims=[6, 7]),
        dict(decoder=True, small_decoder=True, num_classes=3),
        dict(couplings="uniform", in_chans=3),
        dict(img_size=(11, 14), num_classes=1),
        dict(form="smallnorb", in_chans=2, num_classes=5, img_size=24),
        dict(form="multimnist", img_size=17, decoder=True, decoder_dims=[6, 7]),
    ],
    ids=str,
)
def test_contract(kwargs):
    check_model(NAME, **{**SMALL, **kwargs})


@pytest.mark.parametrize("size", [(11, 11), (28, 32), (64, 64)])
def test_any_size(size):
    model = small(img_size=size).eval()
    assert model(images(size=size)).shape == (2, 10) and model.forward_features(images(size=size)).shape == (
        2,
        12,
        1,
        1,
    )
    with pytest.raises(AssertionError, match="class capsules of 3 capsules got .*: make the model for this img_size"):
        model(images(size=(size[0] + 4, size[1] + 4)))


ERRORS = {
    "img_size=10x28 is too small: the four convolutions need 11 pixels each way": dict(img_size=(10, 28)),
    "conv_dims=.* is not possible: give three numbers": dict(conv_dims=[4, 5, 0]),
    "num_types=0 is not possible": dict(num_types=0),
    "decoder_dims=.* is not possible": dict(decoder_dims=[0, 5]),
    "drop_rate=2.0 is not possible": dict(drop_rate=2.0),
    "num_classes=-1 is not possible": dict(num_classes=-1),
    "capsules are not pooled": dict(global_pool="avg"),
    "unknown couplings 'even'. Known: attention, uniform": dict(couplings="even"),
    "unknown form 'norb'. Known: mnist, smallnorb, multimnist": dict(form="norb"),
    "unknown keyword 'num_routing' for model 'efficient_capsnet'": dict(num_routing=3),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message) as caught:
        capszoo.create_model(NAME, **{**SMALL, **ERRORS[message]})
    assert "\n" not in str(caught.value)


def test_pruning_is_refused_in_one_line():
    with pytest.raises(ValueError, match="^efficient_capsnet cannot be pruned: .*$"):
        prune(small(), {"types": 2})
    assert not hasattr(small(), "prunable_parts")


def test_benchmark_compares_dynamic_routing_alone():
    with pytest.raises(UsageError, match="^model 'efficient_capsnet' has no routing to measure: .*$"):
        benchmark.main(["--models", NAME, "--subjects", "routing", "--device", "cpu", "--amp", "none"])


def test_search_space():
    first = {found.keyword: found for found in small(decoder_dims=[6, 9]).search_space()}
    assert list(first) == ["couplings", "decoder", "small_decoder", "decoder_dims"]
    assert first["couplings"].first_choice == "attention" and first["decoder_dims"].values[0.5] == [3, 4]


def test_levels():
    model = small().eval()
    final, levels = model.forward_intermediates(images())
    assert torch.equal(final, model.forward_features(images())) and torch.equal(levels[2], final)
    assert [level.shape[1:] for level in levels] == [(12, 2, 2), (12, 1, 1), (12, 1, 1)]
    assert torch.equal(levels[2], model.primary_caps.squash(levels[1]))
    extractor = small(features_only=True, out_indices=(0, 2)).eval()
    assert all(torch.equal(a, levels[i]) for a, i in zip(extractor(images()), (0, 2), strict=True))
    assert model.prune_intermediate_layers(1, prune_norm=True) == [2]
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert torch.equal(model.forward_features(images()), levels[1])
    assert model.prune_intermediate_layers([0]) == [0] and torch.equal(model(images()), levels[0])


def test_grad_checkpointing_counts_a_batch_once():
    results = []
    for enable in (False, True):
        model = small().train()
        model.set_grad_checkpointing(enable)
        model(images()).square().sum().backward()
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_parameter_groups():
    model = small()
    groups = group_parameters(model, model.group_matcher())
    assert len(groups) >= 3 and model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("couplings", ["attention", "uniform"])
def test_ways_out(couplings, tmp_path):
    model = small(couplings=couplings).eval()
    expected = model(images())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # For few votes the routing is another form than the operator that a graph holds.
        torch.testing.assert_close(torch.jit.script(model)(images()), expected)
        check_export(model, images())
        with capszoo.set_fused_routing(False):
            assert torch.equal(torch.jit.script(model)(images()), expected)
        assert torch.equal(torch.fx.symbolic_trace(model)(images()), expected)
        out = create_feature_extractor(model, {"class_caps": "capsules"})(images())["capsules"]
        assert torch.equal(out, model.forward_capsules(images())[0])
        onnx_export(model, str(tmp_path / "model.onnx"), example_input=images(), check=False)
    found = run_onnx(tmp_path / "model.onnx", images())
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_pretrained_of_other_shapes(tmp_path):
    source = small(decoder=True)
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    overlay = dict(file=str(path), input_size=(1, 13, 13))
    kwargs = dict(pretrained=True, pretrained_cfg_overlay=overlay)
    model = small(**kwargs)
    assert torch.equal(model.eval()(images()), source.eval()(images())) and model.decoder is None
    for other in (dict(num_classes=4), dict(in_chans=3), dict(img_size=20), dict(decoder=True, num_classes=4)):
        model = small(**kwargs, **other)
        assert torch.equal(model.conv2.conv.weight, source.conv2.conv.weight), "what fits is kept"
        assert torch.equal(model.conv4.norm.running_var, source.conv4.norm.running_var)
    with pytest.raises(ValueError, match="these weights do not fit 'efficient_capsnet': 'conv2.conv.weight' has shape"):
        small(**kwargs, conv_dims=[4, 7, 6])


def test_saturation_is_seen():
    model = small().eval()
    assert measure_saturation(model, images(4)).saturated == 0
    with torch.no_grad():
        model.primary_caps.conv.bias.fill_(100)
    assert measure_saturation(model, images(4)).saturated == 1


def test_task_trains():
    torch.manual_seed(0)
    model = small(decoder=True, num_classes=3)
    task, x, target = CapsuleTask(model, verbose=False), images(12), torch.arange(12) % 3
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = task(x, target)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 3
    assert evaluate(task, [(x, target)]).reconstruction_error > 0


def test_recipes(tmp_path, capsys):
    folder = tmp_path / "run"
    argv = ["--model", NAME, "--device", "cpu", "--amp", "none", "--epochs", "2", "--batch-size", "64", "--quiet"]
    assert train.main([*argv, "--model-kwargs", "couplings=uniform", "--output", str(folder)]) == 0
    assert json.loads((folder / "result.json").read_text())["test_top1"] > 0.5
    weights = str(folder / "best.safetensors")
    assert capszoo.load_model(weights).arguments()["couplings"] == "uniform"
    capsys.readouterr()
    assert validate.main([weights, "--device", "cpu"]) == 0
    assert "reconstruction error" in capsys.readouterr().out
    assert export.main(["hub", weights, "--output", str(tmp_path / "hub")]) == 0
    model = capszoo.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    x = images(size=tuple(model.img_size))
    assert torch.equal(model(x), capszoo.load_model(weights).eval()(x))
