"""Every model through every way out of eager PyTorch: scripts, traced graphs, exported programs, ONNX, compilation."""

import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import timm
import torch
from exporting import ONNX_SAYS_SO, run_onnx
from families import CAPSNETS
from timm.layers import create_feature_extractor
from timm.models import FeatureGraphNet
from timm.utils.onnx import onnx_export
from torch.testing import assert_close

import capszoo

every_model = pytest.mark.parametrize("name", CAPSNETS)

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler for its CPU kernels"
)


def small(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**dict(conv_dim=8, img_size=20, num_classes=5), **kwargs}).eval()


def images(batch_size=2):
    return torch.rand(batch_size, 1, 20, 20, generator=torch.Generator().manual_seed(1))


@every_model
@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_script(name, decoder, train, tmp_path):
    model = small(name, decoder=decoder, drop_rate=0.0).train(train)
    expected = model(images())
    scripted = torch.jit.script(model)
    assert_close(scripted(images()), expected)
    scripted(images()).square().sum().backward()
    assert model.conv1.weight.grad.abs().sum() > 0
    torch.jit.save(scripted, tmp_path / "model.pt")
    assert_close(torch.jit.load(tmp_path / "model.pt")(images(3)), model(images(3)))


VARIANTS = [
    *((name, kwargs) for name in CAPSNETS for kwargs in ({}, {"decoder": True})),
    *((name, {}) for name in capszoo.list_models("cnn*")),
    ("capsnet", {"num_types": 4, "keep_capsules": [1, 6, 9]}),
    ("capsnet_ws", {"num_types": 4, "keep_capsules": [1, 6, 9], "squash": "approx"}),
    ("capsnet_tiny", {"num_classes": 0}),
]


@pytest.mark.parametrize("name, kwargs", VARIANTS)
def test_symbolic_trace(name, kwargs):
    model = small(name, **kwargs)
    traced = torch.fx.symbolic_trace(model)
    assert_close(traced(images(3)), model(images(3)))
    if "capsnet" in name:
        targets = [node.target for node in traced.graph.nodes]
        assert targets.count(capszoo.layers.squash) == 1  # leaves, so that a switch of the operators still counts
        assert targets.count(capszoo.layers.dynamic_routing) == (kwargs.get("num_classes") != 0)
    if kwargs.get("num_classes") != 0:
        with pytest.raises(AssertionError, match="make the model for this img_size"):
            traced(torch.rand(1, 1, 22, 22))


@pytest.mark.parametrize("name", ["capsnet_tiny", "cnn_baseline_tiny"])
def test_symbolic_trace_of_a_checkpointed_model(name):
    model = small(name)
    model.set_grad_checkpointing()
    assert_close(torch.fx.symbolic_trace(model)(images()), model(images()))


@every_model
def test_trace(name):
    model = small(name)
    traced = torch.jit.trace(model, images())
    assert_close(traced(images(3)), model(images(3)))


@every_model
def test_fx(name):
    model = small(name)
    extractor = create_feature_extractor(model, {"act1": "convolution", "primary_caps": "capsules"})
    found = extractor(images())
    assert_close(found["convolution"], model.act1(model.conv1(images())))
    assert_close(found["capsules"], model.forward_features(images()))

    traced = FeatureGraphNet(model, out_indices=(0, 1, 2))
    expected = model.forward_intermediates(images(), intermediates_only=True)
    assert_close(traced(images()), expected)

    whole = create_feature_extractor(model, ["class_caps"])
    assert_close(whole(images())["class_caps"], model.forward_capsules(images())[0])


@every_model
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("decoder", [False, True])
def test_torch_export(name, strict, decoder, tmp_path):
    model = small(name, decoder=decoder)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},), strict=strict)
    assert_close(program.module()(images(3)), model(images(3)))
    torch.export.save(program, tmp_path / "model.pt2")
    assert_close(torch.export.load(tmp_path / "model.pt2").module()(images()), model(images()))


WITHOUT_CAPSZOO = """
import sys, torch
folder, *files = sys.argv[1:]
x, expected = torch.load(f"{folder}/tensors.pt")
for file in files:
    if file.startswith("export"):
        model = torch.export.load(f"{folder}/{file}").module()
    elif file.startswith("aoti"):
        model = torch._inductor.aoti_load_package(f"{folder}/{file}")
    else:
        model = torch.jit.load(f"{folder}/{file}")
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    print(file)
assert "capszoo" not in sys.modules
"""


def load_without_capszoo(folder, *files):
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_CAPSZOO, str(folder), *files]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_files_for_processes_without_capszoo(tmp_path):
    """Of the plain form; those of the fused operators say which they lack."""
    model = small("capsnet_ws", num_types=4, keep_capsules=[1, 6, 9])
    torch.save((images(3), model(images(3)).detach()), tmp_path / "tensors.pt")
    batch = ({0: torch.export.Dim("batch")},)
    with capszoo.set_fused_routing(False):
        torch.export.save(torch.export.export(model, (images(),), dynamic_shapes=batch), tmp_path / "export.pt2")
        torch.jit.save(torch.jit.script(model), tmp_path / "script.pt")
        torch.jit.save(torch.jit.trace(model, images()), tmp_path / "trace.pt")
    torch.jit.save(torch.jit.script(model), tmp_path / "fused.pt")
    run = load_without_capszoo(tmp_path, "export.pt2", "script.pt", "trace.pt", "fused.pt")
    assert run.stdout.split() == ["export.pt2", "script.pt", "trace.pt"], run.stderr
    assert "capszoo::squash" in run.stderr


@pytest.mark.slow
@needs_compiler
def test_compiled_files_for_processes_without_capszoo(tmp_path):
    model = small("capsnet_tiny")
    torch.save((images(), model(images()).detach()), tmp_path / "tensors.pt")
    with capszoo.set_fused_routing(False), torch.no_grad():
        program = torch.export.export(model, (images(),))
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "aoti.pt2"))
    run = load_without_capszoo(tmp_path, "aoti.pt2")
    assert run.stdout.split() == ["aoti.pt2"], run.stderr


@every_model
@pytest.mark.parametrize("dynamo, exportable", [(True, True), (False, None), (False, True)])
def test_onnx(name, dynamo, exportable, tmp_path):
    """By torch itself, at a fixed size; the fused operators must not reach the file."""
    model = small(name, exportable=exportable)
    path = str(tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters deprecate each other
        with capszoo.set_fused_routing(ONNX_SAYS_SO or not dynamo):
            torch.onnx.export(model, (images(),), path, dynamo=dynamo, verbose=False)
    np.testing.assert_allclose(run_onnx(path, images()), model(images()).detach().numpy(), rtol=0, atol=1e-4)
    assert capszoo.layers.use_fused_routing()


@every_model
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_by_timm(name, dynamo, tmp_path):
    """By timm's helper, which its script calls: the batch size stays open."""
    model = small(name)
    path = str(tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with capszoo.set_fused_routing(ONNX_SAYS_SO or not dynamo):
            onnx_export(model, path, input_size=(1, 20, 20), batch_size=2, use_dynamo=dynamo, check_forward=True)
    np.testing.assert_allclose(run_onnx(path, images(5)), model(images(5)).detach().numpy(), rtol=0, atol=1e-4)


def gradients(model, function, x):
    model.zero_grad()
    output = function(x)
    output.square().sum().backward()
    return output, *(p.grad.clone() for p in model.parameters())


@every_model
def test_compile_in_one_graph(name):
    """Capture of forward and backward pass without code generation, which needs no compiler."""
    model = small(name).train()
    expected = gradients(model, model, images())
    torch._dynamo.reset()
    found = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"), images())
    for pair in zip(found, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)


@every_model
@needs_compiler
def test_compile(name):
    model = small(name).train()
    expected = gradients(model, model, images())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for pair in zip(gradients(model, compiled, images()), expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), expected[0], rtol=1e-4, atol=1e-5)


@needs_compiler
def test_compile_with_autocast():
    model = small("capsnet").train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(model, model, images())
        found = gradients(model, compiled, images())
    assert found[0].dtype == expected[0].dtype == torch.float32
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 0.02 * b.norm()
