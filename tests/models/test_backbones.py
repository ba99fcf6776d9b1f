"""Networks with a backbone: shapes, both contracts, the ways out, files, pruning, memory, training."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from exporting import check_export, run_onnx
from timm.layers import create_feature_extractor
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils.onnx import onnx_export

import capszoo
from capszoo.engine.task import CapsuleTask
from capszoo.errors import UsageError
from capszoo.prune import prune, scores
from capszoo.recipes import prune as prune_recipe
from capszoo.recipes import train
from capszoo.testing import check_model

slow = pytest.mark.slow

# timm's networks for tests: a residual network, and a transformer by the other kind of extractor.
SMALL = dict(backbone="test_resnet", img_size=64, in_chans=3, num_classes=4, num_types=3, caps_dim=4, conv_dim=8)


def small(name="capsnet_tiny", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **kwargs})


def images(batch_size=2, size=64, chans=3, seed=1):
    return torch.rand(batch_size, chans, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(name="capsnet_tiny", decoder=True),
        dict(name="capsnet", backbone="stem", keep_types=[0, 2], decoder_dims=[5, 6], decoder=True, start="paper"),
        pytest.param(dict(name="capsnet_ws", backbone="test_vit", in_chans=1, keep_capsules=[0, 3, 5]), marks=slow),
        dict(name="capsnet_pruned", backbone="test_efficientnet", keep_types=2, backbone_level=-3, primary_stride=1),
        dict(name="capsnet_tiny", backbone="stem", backbone_kwargs={"dims": [5, 6, 7]}, img_size=(48, 64)),
    ],
    ids=lambda kwargs: f"{kwargs['name']}-{kwargs.get('backbone')}",
)
def test_contract(kwargs):
    check_model(**{**SMALL, **kwargs})


def test_shapes_on_large_images():
    plain, model = (
        capszoo.model_info("capsnet_tiny", img_size=224, in_chans=3, **kwargs)
        for kwargs in ({}, {"backbone": "resnet18"})
    )
    assert (plain.capsules, model.capsules) == (86_528, 288), "8 types of 104x104 and of 6x6"
    assert model.backbone == "resnet18" and plain.backbone is None and model.weights == ()
    # resnet18 to its third stage, 1x1 to 64 filters, 3x3 to 64, matrices of 8 types.
    stages = sum(
        p.numel()
        for key, p in timm.create_model("resnet18", device="meta").named_parameters()
        if key[:2] != "fc" and "layer4" not in key
    )
    assert model.parameters == stages + 257 * 64 + (64 * 9 + 1) * 64 + 8 * 8 * 160 + 160
    assert (
        str(model) == f"capsnet_tiny with resnet18: {model.parameters:,} parameters, 1,407.7 M MACs, 288 capsules, "
        "images of 3x224x224"
    )
    assert model.warning() is None
    assert (
        plain.warning().startswith("warning: 86,528 capsules of 224x224 images")
        and "--backbone resnet18" in plain.warning()
    )


@pytest.mark.parametrize(
    "size, grid", [(28, 6), (32, 7), (64, 7), (96, 5), (128, 7), (160, 6), (224, 6), (256, 7), (384, 5)]
)
def test_map_of_about_6x6(size, grid):
    model = capszoo.create_model("capsnet_tiny", backbone="resnet18", img_size=size, device="meta")
    assert model.grid_size == (grid, grid)


def test_first_layers():
    model = small().eval()
    features = model.backbone(images())
    assert features.shape == (2, 32, 16, 16) and model.backbone.level == 1
    torch.testing.assert_close(model.convolve(images()), torch.relu(model.conv1(features)))
    assert model.conv1.weight.shape == (8, 32, 1, 1)
    assert model.primary_caps.conv.weight.shape == (12, 8, 3, 3) and model.primary_caps.conv.stride == (2, 2)
    assert model.forward_features(images()).shape == (2, 12, 7, 7)


def test_arguments_are_what_was_chosen():
    arguments = small().arguments()
    chosen = {
        "backbone": "test_resnet",
        "backbone_level": 1,
        "backbone_kwargs": None,
        "kernel_size": 3,
        "primary_stride": 2,
    }
    assert arguments.items() >= chosen.items() and "backbone_pretrained" not in arguments
    assert not [
        key for key in capszoo.create_model("capsnet").arguments() if key.startswith(("backbone", "primary_stride"))
    ]
    # At another size of images the layers stay.
    other = timm.create_model("capsnet_tiny", **{**arguments, "img_size": 224})
    assert other.backbone.level == 1 and other.primary_caps.conv.weight.shape == (12, 8, 3, 3)


def test_levels():
    model = small().eval()
    final, levels = model.forward_intermediates(images())
    assert torch.equal(final, model.forward_features(images())) and [level.shape[1:] for level in levels] == [
        (8, 16, 16),
        (12, 7, 7),
        (12, 7, 7),
    ]
    assert [(info["num_chs"], info["reduction"]) for info in model.feature_info] == [(8, 4), (12, 9), (12, 9)]
    extractor = small(features_only=True, out_indices=(0, 2)).eval()
    assert all(torch.equal(a, levels[i]) for a, i in zip(extractor(images()), (0, 2), strict=True))
    assert model.prune_intermediate_layers([0]) == [0] and torch.equal(model(images()), levels[0])


def test_layer_decay_follows_the_stages():
    model = small(backbone_level=2, decoder=True)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    order = [
        "backbone.net.conv1.0.weight",
        "backbone.net.layer1.0.conv1.weight",
        "backbone.net.layer2.0.conv1.weight",
        "backbone.net.layer3.0.conv1.weight",
    ]
    order = [key for key in order if key in groups] + ["conv1.weight", "primary_caps.conv.weight", "class_caps.weight"]
    assert [groups[key] for key in order] == list(range(len(order))) and len(order) == 6
    assert groups["decoder.fc1.weight"] == groups["class_caps.weight"]
    assert group_parameters(model, model.group_matcher(coarse=True), reverse=True).keys() == groups.keys()
    rates = {param["lr_scale"] for param in param_groups_layer_decay(model, 0.05, layer_decay=0.5)}
    assert {0.5**n for n in range(6)} <= rates
    assert create_optimizer_v2(model, "adamw", lr=0.1, layer_decay=0.5)


def test_grad_checkpointing_reaches_the_backbone():
    gradients = []
    for enable in (False, True):
        model = small(backbone_level=3).train()
        model.set_grad_checkpointing(enable)
        assert model.backbone.net.grad_checkpointing == enable
        model(images(4)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "backbone", ["test_resnet", *(pytest.param(n, marks=slow) for n in ("stem", "test_efficientnet"))]
)
def test_ways_out(backbone, tmp_path):
    model = small(backbone=backbone).eval()
    expected = model(images())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if backbone != "test_efficientnet":  # timm's getter takes no script
            assert torch.equal(torch.jit.script(model)(images()), expected)
        check_export(model, images())
        if backbone != "test_efficientnet":
            assert torch.equal(torch.fx.symbolic_trace(model)(images()), expected)
        out = create_feature_extractor(model, {"class_caps": "capsules"})(images())["capsules"]
        torch.testing.assert_close(out, model.forward_capsules(images())[0])
        onnx_export(model, str(tmp_path / "model.onnx"), example_input=images(), check=False)
    found = run_onnx(tmp_path / "model.onnx", images())
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    fast = small(backbone=backbone).eval().to(memory_format=torch.channels_last)
    torch.testing.assert_close(fast(images().to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), expected, rtol=1e-4, atol=1e-5)


class Hub:
    """What timm gets from Hugging Face's hub: weights, counted."""

    def __init__(self):
        torch.manual_seed(3)
        self.net, self.calls = timm.create_model("test_resnet"), 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return {key: value.clone() for key, value in self.net.state_dict().items()}


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", hub)
    return hub


def test_files_never_download(hub, tmp_path):
    model = small(backbone_pretrained=True).eval()
    assert hub.calls == 1 and torch.equal(model.backbone.net.layer1[0].conv1.weight, hub.net.layer1[0].conv1.weight)
    cfg = timm.get_pretrained_cfg("test_resnet")
    assert model.pretrained_cfg["mean"] == cfg.mean and model.pretrained_cfg["std"] == cfg.std
    assert model.pretrained_cfg["first_conv"] == "backbone.net.conv1.0" and model.pretrained_cfg["input_size"] == (
        3,
        64,
        64,
    )
    path = tmp_path / "model.safetensors"
    capszoo.save_model(path, model)
    loaded = capszoo.load_model(path).eval()
    assert torch.equal(loaded(images()), model(images())) and loaded.pretrained_cfg["mean"] == tuple(cfg.mean)
    asked = capszoo.load_model(path, backbone_pretrained=True).eval()
    assert torch.equal(asked(images()), model(images()))
    hostile = {**model.arguments(), "backbone_pretrained": True}
    capszoo.checkpoint.save_weights(path, model, {"model": "capsnet_tiny", "model_args": hostile})
    capszoo.load_model(path)
    assert hub.calls == 1
    nested = {**model.arguments(), "backbone_kwargs": {"pretrained": True}}
    capszoo.checkpoint.save_weights(path, model, {"model": "capsnet_tiny", "model_args": nested})
    with pytest.raises(ValueError, match="backbone_kwargs has 'pretrained'"):
        capszoo.load_model(path)
    assert hub.calls == 1
    gray = small(backbone_pretrained=True, in_chans=1)
    assert gray.pretrained_cfg["mean"] == pytest.approx((sum(cfg.mean) / 3,), abs=1e-4)


def test_pretrained_weights_of_other_shapes(tmp_path):
    source = small(decoder=True)
    path = tmp_path / "weights.safetensors"
    capszoo.checkpoint.save_tensors(path, source.state_dict(), {})
    overlay = dict(file=str(path), input_size=(3, 64, 64), num_classes=4)
    model = small(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=1)
    assert torch.equal(model.conv1.weight, source.conv1.weight) and model.class_caps.weight.shape[2] == 5
    torch.testing.assert_close(
        model.backbone.net.conv1[0].weight, source.backbone.net.conv1[0].weight.sum(1, keepdim=True)
    )
    with pytest.raises(ValueError, match="the weights of 'capsnet_tiny' are of the network without backbone"):
        small(pretrained=True)


def test_seeds_do_not_depend_on_what_was_planned_before():
    models = [small(backbone="test_efficientnet", img_size=61) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


ERRORS = {
    "unknown backbone 'resnet81'": dict(backbone="resnet81"),
    "backbone_level=1 needs a backbone": dict(backbone=None, backbone_level=1),
    "backbone_pretrained=True needs a backbone": dict(backbone=None, backbone_pretrained=True),
    "img_size=64x64 is too small: level 4 of 'test_resnet' leaves a map of 2x2": dict(backbone_level=4),
    "primary_stride=0 is not possible": dict(primary_stride=0),
    "backbone_kwargs=3 is not possible: give a mapping of names to values": dict(backbone_kwargs=3),
    "img_size=20x20 is too small: two 11x11 convolutions need 21": dict(backbone=None, img_size=20, kernel_size=11),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message) as caught:
        capszoo.create_model("capsnet_tiny", **{**SMALL, **ERRORS[message]})
    assert "\n" not in str(caught.value)


def test_pruning():
    # From this start the 30 capsules are of both types.
    model = small(decoder=True, decoder_dims=[6, 8], share_weights=False, start="plain").train()
    assert list(model.prunable_parts()) == ["types", "capsules", "decoder"]
    with pytest.raises(
        ValueError, match="the filters of backbone 'test_resnet' .* cannot be pruned: prune types, capsules, decoder$"
    ):
        prune(model, {"conv1": 0.5}, "magnitude")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    data = [(images(4), torch.arange(4))]
    smaller, report = prune(model, {"types": 2, "capsules": 30, "decoder": 0.5}, "taylor", data)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "batches are not counted"
    assert model.backbone.training and report.after.parameters < report.before.parameters
    assert smaller.prunable_parts() == {"types": 2, "capsules": 30, "decoder": (3, 4)}
    kept = list(report.kept["capsules"])
    model.eval(), smaller.eval()
    found = smaller.forward_capsules(images())[0]
    expected = model.class_caps.routing(
        model.to_capsules(model.forward_features(images()))[:, kept],
        model.class_caps.weight[kept],
        model.class_caps.bias,
    )
    torch.testing.assert_close(found, expected)
    for score in ("look_ahead", "coupling", "magnitude"):
        assert scores(model, "types", score, data).shape == (3,)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_pruned_network_has_all_buffers(backbone):
    swin = backbone.startswith("swin")
    kwargs = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]} if swin else None
    model = small(backbone=backbone, backbone_kwargs=kwargs, img_size=224 if swin else 64).eval()
    smaller, _ = prune(model, {"types": [0, 1, 2]}, "magnitude")
    assert not any(buffer.is_meta for buffer in smaller.buffers())
    x = images(size=model.img_size[0])
    torch.testing.assert_close(smaller.eval()(x), model(x))


def test_task_trains():
    torch.manual_seed(0)
    model = small(decoder=True, num_classes=3)
    task, x, target = CapsuleTask(model, verbose=False), images(12), torch.arange(12) % 3
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = task(x, target)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


def test_recipes(tmp_path, capsys):
    folder, argv = (
        tmp_path / "run",
        ["--device", "cpu", "--amp", "none", "--epochs", "1", "--batch-size", "64", "--no-decoder"],
    )
    own = [
        "--backbone",
        "stem",
        "--backbone-level",
        "0",
        "--model-kwargs",
        "backbone_kwargs={dims: [12, 16]}",
        "num_types=4",
    ]
    assert train.main([*argv, "--img-size", "16", *own, "--output", str(folder)]) == 0
    out = capsys.readouterr().out
    info = capszoo.model_info(capszoo.load_model(folder / "best.safetensors"))
    assert out.startswith(f"{info}\n") and info.capsules == 4 * 36 and "capsnet_tiny with stem: " in out
    pruned = [str(folder / "best.safetensors"), "--keep", "types=2", "--output", str(tmp_path / "pruned"), *argv[:6]]
    assert prune_recipe.main([*pruned, "--score", "magnitude"]) == 0
    assert "round 1/1: 2 types, 72 capsules" in capsys.readouterr().out
    assert json.loads((tmp_path / "pruned" / "result.json").read_text())["conv1"] is None
    with pytest.raises(UsageError, match="--model-kwargs backbone=stem contradicts --backbone test_resnet"):
        train.main([*argv, "--backbone", "test_resnet", "--model-kwargs", "backbone=stem"])


def test_example_of_the_docs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "timm.md").read_text()
    section = re.search(r"^## Large images and backbones\n(.*?)^## ", page, re.MULTILINE | re.DOTALL)[1]
    example, head = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    space = {}
    exec(example, space)
    assert space["scores"].shape == (2, 5) and space["model"].class_caps.num_capsules == 288
    printed, said = capsys.readouterr().out, re.search(r"# (capsnet_tiny with .*), \.\.\.", example)[1]
    assert printed.startswith(said)
    exec(head, space)
    assert space["model"].returns_logits


# A step of batch 16 at 224x224, in a process of its own: its peak over what the process had before. Not getrusage's,
# which begins with that of the process that started it.
STEP = """
import sys, torch, capszoo
from capszoo.engine.task import CapsuleTask
torch.set_num_threads(1)
torch.manual_seed(0)
model = capszoo.create_model("capsnet_tiny", backbone=sys.argv[1], img_size=224, in_chans=3, num_classes=10)
task, x, target = CapsuleTask(model, verbose=False), torch.rand(16, 3, 224, 224), torch.arange(16) % 10
status = lambda key: int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
before = status("VmRSS")
optimizer = torch.optim.Adam(model.parameters())
task(x, target)["loss"].backward()
optimizer.step()
print(sum(p.numel() for p in model.parameters()), status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux says of a process")
@pytest.mark.parametrize("backbone, parameters", [("resnet18", 2_846_560), ("stem", 452_672)])
def test_memory_of_a_step_on_large_images(backbone, parameters):
    done = subprocess.run([sys.executable, "-c", STEP, backbone], capture_output=True, text=True, check=True)
    found, kilobytes = map(int, done.stdout.split())
    print(f"{backbone}: {found:,} parameters, {kilobytes / 1e6:.2f} GB")
    assert found == parameters and 1e5 < kilobytes < 2e6
