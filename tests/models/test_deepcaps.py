"""DeepCaps: the authors' numbers, both contracts, the ways out of eager PyTorch, training."""

import warnings

import numpy as np
import pytest
import timm
import torch
from exporting import check_export, run_onnx
from families import sizes_of
from timm.layers import create_feature_extractor
from timm.models import group_parameters
from timm.utils.onnx import onnx_export

import capszoo
from capszoo.engine.task import CapsuleTask
from capszoo.models import DeepCaps
from capszoo.testing import check_model

NAME = "deepcaps"
SMALL = dict(**sizes_of(NAME), img_size=20)


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model(NAME, **{**SMALL, **kwargs})


def images(batch_size=2, in_chans=3, size=(20, 20)):
    return torch.rand(batch_size, in_chans, *size, generator=torch.Generator().manual_seed(1))


def test_parameters_of_the_authors_code():
    model = capszoo.create_model(NAME, device="meta")
    assert isinstance(model, DeepCaps)
    cells = {"cell1": 589_824, "cell2": 2_064_384, "cell3": 2_359_296, "cell4": 1_769_472 + 18_432 + 256}
    parts = {"conv1": 3_584, "act1": 0, "norm1": 256, **cells, "class_caps": 6_553_600 + 320}
    assert {key: sum(p.numel() for p in module.parameters()) for key, module in model.named_children()} == parts
    assert capszoo.model_info(NAME).parameters == sum(parts.values()) == 13_359_424
    assert capszoo.model_info(NAME, decoder=True).parameters == 13_359_424 + 67_571
    assert model.class_caps.num_capsules == 2560


@pytest.mark.parametrize("kwargs", [dict(decoder=True), dict(num_routing=1, in_chans=1), dict(num_classes=1)], ids=str)
def test_contract(kwargs):
    check_model(NAME, **{**SMALL, **kwargs})


@pytest.mark.parametrize("size", [(1, 1), (9, 16), (28, 28)])
def test_any_size(size):
    model = small(img_size=size, decoder=True).eval()
    assert model(images(size=size)).shape == (2, 10)
    assert model.reconstruct(images(size=size)).shape == (2, 3, *size)
    with pytest.raises(AssertionError, match="class capsules of .* capsules got .*: make the model for this img_size"):
        model(images(size=(size[0] + 16, size[1] + 16)))


ERRORS = {
    "img_size=0 is not possible": dict(img_size=(0, 12)),
    "first_dim=0 is not possible": dict(first_dim=0),
    "num_routing=0 is not possible": dict(num_routing=0),
    "drop_rate=2.0 is not possible": dict(drop_rate=2.0),
    "num_classes=-1 is not possible": dict(num_classes=-1),
    "capsules are not pooled": dict(global_pool="avg"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message) as caught:
        capszoo.create_model(NAME, **{**SMALL, **ERRORS[message]})
    assert "\n" not in str(caught.value)


def test_levels():
    model = small().eval()
    final, levels = model.forward_intermediates(images())
    assert torch.equal(final, model.forward_features(images()))
    assert [level.shape[1:] for level in levels] == [(8, 10, 10), (16, 5, 5), (16, 3, 3), (16, 2, 2)]
    assert torch.equal(final[:, :, 4:, 0], levels[2].flatten(2)) and torch.equal(
        final[:, :, :4, 0], levels[3].flatten(2)
    )
    capsules = model.to_capsules(final)
    assert torch.equal(capsules[:, 13 + 2], final[:, 8:, 2, 0])
    extractor = small(features_only=True, out_indices=(1, 3)).eval()
    assert all(torch.equal(a, levels[i]) for a, i in zip(extractor(images()), (1, 3), strict=True))
    assert model.prune_intermediate_layers(1) == [3] and torch.equal(model(images()), final)
    assert model.prune_intermediate_layers([1]) == [1]
    assert torch.equal(model.forward_intermediates(images(), intermediates_only=True)[-1], levels[1])
    assert torch.equal(model(images()), levels[1]) and torch.equal(model.forward_intermediates(images())[0], levels[1])


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
    assert len(groups) == 6 and model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


def test_couplings():
    found = small().eval().couplings(images())
    assert found.shape == (2, 26, 10)
    torch.testing.assert_close(found.sum(dim=2), torch.ones(2, 26))


@pytest.mark.parametrize("num_routing, fused", [(1, True), (3, True), (3, False)])
def test_ways_out(num_routing, fused, tmp_path):
    model = small(num_routing=num_routing).eval()
    with warnings.catch_warnings(), capszoo.set_fused_routing(fused):
        warnings.simplefilter("ignore")
        expected = model(images())
        assert torch.equal(torch.jit.script(model)(images()), expected)
        check_export(model, images())
        assert torch.equal(torch.fx.symbolic_trace(model)(images()), expected)
        out = create_feature_extractor(model, {"class_caps": "capsules"})(images())["capsules"]
        assert torch.equal(out, model.forward_capsules(images())[0])
        if fused:
            return
        onnx_export(model, str(tmp_path / "model.onnx"), example_input=images(), check=False)
    found = run_onnx(tmp_path / "model.onnx", images())
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_task_trains():
    torch.manual_seed(0)
    model = small(num_classes=3, decoder=True, num_types=4)
    task, x, target = CapsuleTask(model, verbose=False), images(9), torch.arange(9) % 3
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        found = task(x, target)
        found["loss"].backward()
        optimizer.step()
        losses.append(float(found["margin_loss"]))
    assert losses[-1] < losses[0] / 2
