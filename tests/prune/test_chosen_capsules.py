"""Networks with single capsules: ways out of eager PyTorch."""

import copy
import inspect
import shutil
import warnings

import numpy as np
import pytest
import timm
import torch
from prune.networks import (
    SMALL,
    images,
    small,
)
from timm.layers import create_feature_extractor

import capszoo


@pytest.mark.parametrize(
    "kept, message",
    [
        ([], "keep_capsules is empty"),
        (5, "keep_capsules=5 is not possible: give a list"),
        ([1, 2, 1], "keep_capsules holds 1 twice"),
        ([0, 24], "keep_capsules holds 24: give indices from 0 to 23, of the 24 capsules of 20x22 images"),
        ([-1], "keep_capsules holds -1"),
    ],
)
def test_wrong_capsules(kept, message):
    with pytest.raises(ValueError, match=message) as error:
        small(keep_capsules=kept)
    assert "\n" not in str(error.value)


OWN, SHARED = dict(), dict(share_weights=True)
both = pytest.mark.parametrize("kind", [OWN, SHARED], ids=["own matrices", "shared matrices"])


def chosen(kind, **kwargs):
    """Types that keep 3, 2, 0 and 1 capsules."""
    return small(dtype=torch.float32, decoder=False, keep_capsules=(0, 1, 3, 8, 9, 20), **kind, **kwargs)


@both
def test_script(kind, tmp_path):
    model, x = chosen(kind), images(dtype=torch.float32)
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), model(x))
    torch.jit.save(scripted, tmp_path / "model.pt")
    assert torch.equal(torch.jit.load(tmp_path / "model.pt")(x[:1]), model(x[:1]))


@both
def test_fx(kind):
    model, x = chosen(kind), images(dtype=torch.float32)
    traced = create_feature_extractor(model, ["class_caps"])
    assert torch.equal(traced(x)["class_caps"], model.forward_capsules(x)[0])


@both
@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(kind, strict, tmp_path):
    model, x = chosen(kind), images(dtype=torch.float32)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x[:3]), model(x[:3]))


@both
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(kind, dynamo, tmp_path):
    import onnxruntime

    model, x = chosen(kind), images(dtype=torch.float32)
    path = str(tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The newer exporter of torch 2.7 does not say that it runs.
        says_so = "_is_onnx_exporting" in inspect.getsource(torch.onnx.is_in_onnx_export)
        with capszoo.set_fused_routing(says_so or not dynamo):
            torch.onnx.export(model, (x,), path, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=0, atol=1e-5)


@both
def test_compile_in_one_graph(kind):
    model, x = chosen(kind), images(dtype=torch.float32)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-5, atol=1e-6)


@both
def test_copies_devices_and_information(kind):
    model, x = chosen(kind), images(dtype=torch.float32)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert "capsule_index" not in model.state_dict()
    assert model.double().capsule_index.dtype == torch.int64
    full = capszoo.model_info("capsnet", **{**SMALL, **kind})
    assert capszoo.model_info(model.float()).macs < full.macs
    timm_features = timm.create_model("capsnet", **{**SMALL, **kind, "keep_capsules": (0, 1)}, features_only=True)
    assert [f.shape[1] for f in timm_features(x)] == [6, 16, 16]


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@both
def test_compile(kind):
    model, x = chosen(kind), images(dtype=torch.float32)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)
