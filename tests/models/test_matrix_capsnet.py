"""Networks of matrix capsules: the papers' numbers, both contracts, ways out of eager PyTorch, weights, training."""

import warnings

import numpy as np
import pytest
import timm
import torch
from exporting import check_export, run_onnx
from safetensors.torch import save_file
from timm.models import group_parameters
from timm.utils.onnx import onnx_export

import capszoo
from capszoo.engine.task import CapsuleTask
from capszoo.losses import CrossEntropyLoss, SpreadLoss
from capszoo.models import MatrixCapsNet
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


def test_family():
    em, vb = (small(name).eval() for name in NAMES)
    assert isinstance(em, MatrixCapsNet) and isinstance(vb, MatrixCapsNet)
    criterion = em.default_criterion()
    assert isinstance(criterion, SpreadLoss) and (criterion.first_margin, criterion.margin) == (0.2, 0.9)
    assert isinstance(vb.default_criterion(), CrossEntropyLoss)
    assert list(em.capsule_layers()) == ["blocks.0", "blocks.1", "class_caps"]
    for model in (em, vb):
        capsules, scores = model.forward_capsules(images())
        assert capsules.shape == (2, 3, 4, 4) and ((scores >= 0) & (scores <= 1)).all()
        assert model.forward_features(images()).shape == (2, 2 * 17, *model.grid_size)
        assert len(group_parameters(model, model.group_matcher())) >= 3
        assert model.no_weight_decay() == {name for name, _ in model.named_parameters() if "beta" in name}
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in em.modules())


@pytest.mark.parametrize("name", NAMES)
def test_levels(name):
    model = small(name).eval()
    final, levels = model.forward_intermediates(images())
    assert torch.equal(final, model.forward_features(images())) and torch.equal(levels[2], final)
    assert [level.shape[1:] for level in levels] == [(4, 9, 9), (34, 9, 9), (34, 2, 2)]
    extractor = small(name, features_only=True, out_indices=(0, 2)).eval()
    assert all(torch.equal(a, levels[i]) for a, i in zip(extractor(images()), (0, 2), strict=True))
    assert model.prune_intermediate_layers(1) == [2]
    assert model.prune_intermediate_layers([1]) == [1] and torch.equal(model(images()), levels[1])
    assert model.prune_intermediate_layers([0]) == [0] and torch.equal(model(images()), levels[0])


ERRORS = {
    "img_size=16x21 is too small: the three kernels need 17 pixels": dict(img_size=(16, 21)),
    "num_types=.* is not possible: give three numbers": dict(num_types=[2, 3, 0]),
    "pose_size=1 is not possible": dict(pose_size=1),
    "num_routing=0 is not possible: give 1": dict(num_routing=0),
    "unknown routing 'dynamic'. Known: em, vb": dict(routing="dynamic"),
    "conv_dim=0 is not possible": dict(conv_dim=0),
    "final_lambda=0.0 is not possible: give a number above 0": dict(final_lambda=0.0),
    "num_classes=-1 is not possible": dict(num_classes=-1),
    "unknown keyword 'decoder' for model 'capsnet_em'": dict(decoder=True),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message) as caught:
        capszoo.create_model("capsnet_em", **{**SMALL, **ERRORS[message]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_grad_checkpointing_counts_a_batch_once(name):
    results = []
    for enable in (False, True):
        model = small(name).train()
        model.set_grad_checkpointing(enable)
        model(images()).square().sum().backward()
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("name", "fused"),
    [*((name, True) for name in NAMES), *(pytest.param(name, False, marks=pytest.mark.slow) for name in NAMES)],
)
def test_ways_out(name, fused):
    model = small(name).eval()
    with warnings.catch_warnings(), capszoo.set_fused_routing(fused):
        warnings.simplefilter("ignore")
        expected = model(images())
        torch.testing.assert_close(torch.jit.script(model)(images()), expected)
        check_export(model, images())
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(images()), expected)


@pytest.mark.parametrize("name", [pytest.param("capsnet_em", marks=pytest.mark.slow), "capsnet_vb"])
def test_onnx(name, tmp_path):
    model = small(name).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx_export(model, str(tmp_path / "model.onnx"), example_input=images(), check=False)
    found = run_onnx(tmp_path / "model.onnx", images())
    np.testing.assert_allclose(found, model(images()).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_of_other_shapes(name, tmp_path):
    source = small(name)
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    overlay = dict(file=str(path), input_size=(1, 21, 21), num_classes=3)
    kwargs = dict(pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(small(name, **kwargs).eval()(images()), source.eval()(images()))
    for other in (dict(num_classes=4), dict(in_chans=3), dict(img_size=30)):
        model = small(name, **kwargs, **other)
        assert torch.equal(model.blocks[1].weight, source.blocks[1].weight), "what fits is kept"
        kept = torch.equal(model.class_caps.beta_a, source.class_caps.beta_a)
        assert kept or "num_classes" in other
    with pytest.raises(ValueError, match="these weights do not fit .*: 'blocks.0.weight' has shape"):
        small(name, **kwargs, num_types=[2, 4, 2])


@pytest.mark.parametrize("name", NAMES)
def test_task_trains(name):
    model = small(name, final_lambda=0.1)
    task, x, target = CapsuleTask(model, verbose=False), images(12), torch.arange(12) % 3
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = task(x, target)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05  # the cross-entropy of activations from 0 to 1 has little room
