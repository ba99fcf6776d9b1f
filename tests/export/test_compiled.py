"""capszoo.export.compile_package: packages of AOTInductor with the numbers of the model, for any batch size."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

import capszoo
from capszoo.errors import UsageError
from capszoo.export import compile_package

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler for its CPU kernels"
)


def small(name="capsnet_tiny", **kwargs):
    torch.manual_seed(0)
    sizes = {"conv_dim": 8, "num_types": 4, "img_size": 20, "num_classes": 5}
    return capszoo.create_model(name, **sizes, **kwargs).train()


def images(count):
    return torch.rand(count, 1, 20, 20, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@needs_compiler
def test_package_has_the_operators_and_the_numbers(tmp_path):
    model = small(decoder=True)
    difference = compile_package(tmp_path / "model.pt2", model, model="capsnet_tiny", class_names=["a", "b"])
    assert difference <= 1e-5 and model.training and [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    package = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    model.eval()
    for count in (1, 2, 7):
        torch.testing.assert_close(package(images(count)), model(images(count)).detach(), rtol=0, atol=1e-5)
    metadata = package.get_metadata()
    assert metadata["model"] == "capsnet_tiny" and json.loads(metadata["class_names"]) == ["a", "b"]


LOAD = """
import sys, torch
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(torch._inductor.aoti_load_package(sys.argv[1])(x), expected, rtol=0, atol=1e-5)
assert "capszoo" not in sys.modules
"""


@pytest.mark.slow
@needs_compiler
def test_command_makes_plain_packages_for_processes_without_capszoo(recipe, make_run, tmp_path, capsys):
    file = make_run("capsnet_tiny", "digits", conv_dim=8, num_types=4, img_size=[20, 20], num_classes=3)
    path = tmp_path / "plain.pt2"
    assert recipe("export").main(["aoti", str(file), "--output", str(path), "--plain", "--device", "cpu"]) == 0
    assert "needs PyTorch alone" in capsys.readouterr().out
    model = capszoo.load_model(file).eval()
    torch.save((images(3), model(images(3)).detach()), tmp_path / "tensors.pt")
    command = [sys.executable, "-W", "ignore", "-c", LOAD, str(path), str(tmp_path / "tensors.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_other_names_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"'model.onnx' is no name of a package: end it with .pt2"):
        compile_package("model.onnx", small())
    with pytest.raises(UsageError, match="model.pt2' is in a folder that is not there: make it first"):
        compile_package(tmp_path / "no/model.pt2", small())


@pytest.fixture
def compiler(monkeypatch):
    """Replace the compiler by one that makes an empty file, whose package computes by a function."""

    def compiler(function, error=None):
        def compile(program, package_path, inductor_configs):
            if error is not None:
                raise error
            with open(package_path, "wb") as file:
                file.write(b"compiled")
            return package_path

        monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: None)
        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile)
        monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: function)

    return compiler


def test_packages_with_other_numbers_are_not_kept(compiler, tmp_path):
    model = small()
    compiler(lambda x: model(x) + 1e-3)
    with pytest.raises(UsageError, match="scores of the package differ by 0.001 from the model's"):
        compile_package(tmp_path / "model.pt2", model)
    compiler(lambda x: model(x) * float("nan"))
    with pytest.raises(UsageError, match="differ by nan"):
        compile_package(tmp_path / "model.pt2", model)
    assert not list(tmp_path.iterdir()) and model.training and capszoo.layers.use_fused_routing()
    compiler(model)
    assert compile_package(tmp_path / "model.pt2", model) == 0.0
    assert (tmp_path / "model.pt2").read_bytes() == b"compiled"


def test_without_a_compiler_it_is_one_line(compiler, tmp_path):
    from torch._inductor.exc import InvalidCxxCompiler

    compiler(None, InvalidCxxCompiler())
    with pytest.raises(UsageError, match=r"^the package cannot be compiled \(.*\): install g\+\+, or name .* in CXX$"):
        compile_package(tmp_path / "model.pt2", small())
