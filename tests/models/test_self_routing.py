"""Self-routing capsules on ResNet-20: the paper's numbers, both contracts, the ways out of eager PyTorch, training."""

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
from capszoo.models import SelfRoutingNet
from capszoo.testing import check_model

NAME = "capsnet_resnet_sr"
SMALL = dict(**sizes_of(NAME), img_size=12)


def small(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model(NAME, **{**SMALL, **kwargs})
    if isinstance(model, SelfRoutingNet):  # zeros at first
        torch.nn.init.normal_(model.class_caps.weight)
    return model


def images(batch_size=2, in_chans=3, size=(12, 12)):
    return torch.rand(batch_size, in_chans, *size, generator=torch.Generator().manual_seed(1))


PARAMETERS = [
    ({}, 931_664),
    (dict(num_layers=2), 3_187_536),
    (dict(num_layers=0), 269_722),
    (dict(couplings="uniform"), 931_664),
]


@pytest.mark.parametrize("kwargs, parameters", PARAMETERS, ids=str)
def test_parameters_of_the_paper(kwargs, parameters):
    assert capszoo.model_info(NAME, **kwargs).parameters == parameters


def test_features():
    model = capszoo.create_model(NAME).eval()
    assert isinstance(model, SelfRoutingNet) and model.returns_logits
    features = model.forward_features(images(size=(32, 32)))
    assert features.shape == (2, 32 * 17, 8, 8) and (features[:, :32] <= 0).all()
    scores = model(images(size=(32, 32)))
    torch.testing.assert_close(scores, torch.full((2, 10), -np.log(10), dtype=torch.float32))


@pytest.mark.parametrize(
    "kwargs", [{}, dict(num_layers=0), dict(couplings="uniform", in_chans=1), dict(num_classes=1)], ids=str
)
def test_contract(kwargs):
    check_model(NAME, **{**SMALL, **kwargs})


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (9, 14), (32, 32)])
def test_any_size(size):
    model = small(img_size=size).eval()
    assert model(images(size=size)).shape == (2, 10)
    with pytest.raises(AssertionError, match="class capsules of .* capsules got .*: make the model for this img_size"):
        model(images(size=(size[0] + 8, size[1] + 8)))


ERRORS = {
    "img_size=0 is not possible": dict(img_size=(0, 12)),
    "conv_dims=.* is not possible: give three rising numbers": dict(conv_dims=[4, 3, 5]),
    "num_types=0 is not possible": dict(num_types=0),
    "num_layers=-1 is not possible": dict(num_layers=-1),
    "drop_rate=2.0 is not possible": dict(drop_rate=2.0),
    "num_classes=-1 is not possible": dict(num_classes=-1),
    "capsules are not pooled": dict(global_pool="avg"),
    "unknown couplings 'even'. Known: self, uniform": dict(couplings="even"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message) as caught:
        capszoo.create_model(NAME, **{**SMALL, **ERRORS[message]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("couplings", ["self", "uniform"])
def test_finite_at_the_limits(couplings):
    model, criterion = small(couplings=couplings), torch.nn.CrossEntropyLoss()
    for train in (False, True):
        for x in (torch.zeros(2, 3, 12, 12), torch.ones(2, 3, 12, 12), 1e4 * images(), -1e4 * images()):
            model.train(train).zero_grad()
            scores = model(x)
            criterion(scores, torch.tensor([0, 1])).backward()
            assert scores.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())
            torch.testing.assert_close(scores.exp().sum(1), torch.ones(2))


def test_levels():
    model = small(num_layers=2).eval()
    final, levels = model.forward_intermediates(images())
    assert torch.equal(final, model.forward_features(images())) and torch.equal(levels[-1], final)
    assert [level.shape[1:] for level in levels] == [(4, 12, 12), (5, 6, 6), (6, 3, 3), (15, 3, 3), (15, 2, 2)]
    extractor = small(num_layers=2, features_only=True, out_indices=(1, 3)).eval()
    assert all(torch.equal(a, levels[i]) for a, i in zip(extractor(images()), (1, 3), strict=True))
    assert model.prune_intermediate_layers(1) == [4] and model.prune_intermediate_layers([3]) == [3]
    assert torch.equal(model(images()), levels[3]) and model.prune_intermediate_layers([1]) == [1]
    assert torch.equal(model(images()), levels[1])


def test_grad_checkpointing_counts_a_batch_once():
    results = []
    for enable in (False, True):
        model = small(num_layers=2).train()
        model.set_grad_checkpointing(enable)
        model(images()).square().sum().backward()
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_parameter_groups():
    model = small(num_layers=3)
    groups = group_parameters(model, model.group_matcher())
    assert len(groups) >= 5 and model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("kwargs", [dict(num_layers=2), dict(couplings="uniform"), dict(num_layers=0)], ids=str)
def test_ways_out(kwargs, tmp_path):
    model = small(**kwargs).eval()
    expected = model(images())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(torch.jit.script(model)(images()), expected)
        check_export(model, images())
        assert torch.equal(torch.fx.symbolic_trace(model)(images()), expected)
        out = create_feature_extractor(model, {"class_caps": "scores"})(images())["scores"]
        assert torch.equal(out, expected)
        onnx_export(model, str(tmp_path / "model.onnx"), example_input=images(), check=False)
    found = run_onnx(tmp_path / "model.onnx", images())
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_task_trains():
    model = small(num_classes=3)
    task, x, target = CapsuleTask(model, verbose=False), images(12), torch.arange(12) % 3
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = task(x, target)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 3
