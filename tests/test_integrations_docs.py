"""The code of docs/timm.md about exports, Lightning and the Kernel Hub runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch
from exporting import ONNX_SAYS_SO, batches_like, run_onnx
from torch.utils.data import DataLoader, TensorDataset

import capszoo
import capszoo.export

PAGE = (Path(__file__).parents[1] / "docs" / "timm.md").read_text(encoding="utf-8")


def block(words):
    """The one block of Python that has these words."""
    (code,) = [code for code in re.findall(r"```py(?:thon)?\n(.*?)```", PAGE, re.DOTALL) if words in code]
    return code


@pytest.fixture
def space(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = capszoo.create_model("capsnet_tiny", conv_dim=8, num_types=4, img_size=20).eval()
    return {"model": model, "images": torch.rand(2, 1, 20, 20)}


def test_program(space):
    exec(block("dynamic_shapes=({0: batch},)"), space)
    module = torch.export.load("model.pt2").module()
    for images in batches_like(space["images"]):
        torch.testing.assert_close(module(images), space["model"](images))


@pytest.mark.slow
def test_plain_program(space):
    exec(block("plain.pt2"), space)
    program = torch.export.load("plain.pt2")
    assert not [node for node in program.graph.nodes if "capszoo" in str(node.target)]
    torch.testing.assert_close(program.module()(space["images"]), space["model"](space["images"]))


@pytest.mark.slow
def test_onnx(space):
    with capszoo.set_fused_routing(ONNX_SAYS_SO):
        exec(block("torch.onnx.export"), space)
    for images in batches_like(space["images"]):
        expected = space["model"](images).detach()
        torch.testing.assert_close(torch.from_numpy(run_onnx("model.onnx", images)), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_compiled(space, recipe, make_run):
    file = make_run("capsnet_tiny", "digits", conv_dim=8, num_types=4, img_size=[20, 20])
    code = block("aoti_load_package")
    assert recipe("export").main(["aoti", str(file), "--output", "capsnet.pt2", "--device", "cpu"]) == 0
    exec(code, space)
    torch.testing.assert_close(space["scores"], capszoo.load_model(file).eval()(space["images"]), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_lightning(space):
    pytest.importorskip("lightning")
    images = torch.rand(6, 1, 28, 28)
    space["train_loader"] = space["val_loader"] = DataLoader(TensorDataset(images, torch.arange(6)), batch_size=3)
    smaller = '{"decoder": True, "conv_dim": 8, "num_types": 4}'
    exec(block("CapsuleModule(").replace('{"decoder": True}', smaller), space)
    model = capszoo.load_model("digits.safetensors").eval()
    assert torch.equal(model(images), space["module"].eval()(images))
    assert model.pretrained_cfg["label_names"] == tuple("0123456789")


def test_layer_of_the_kernel_hub():
    """Its names are those that the project and capszoo have; `kernels` itself is not needed for that."""
    code = block("replace_kernel_forward_from_hub")
    assert {*re.findall(r'"(\w+)"', code)} - {"FOLDER", "cpu"} == {"DynamicRouting"}
    assert "DynamicRouting" in capszoo.export.hub_layers.__all__ and hasattr(capszoo.layers, "DynamicRouting")
