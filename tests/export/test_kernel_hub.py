"""capszoo.export.kernel_hub: a project that kernel-builder takes, whose operators compute what capszoo's do."""

import ast
import importlib.util
import inspect
import re
import sys

import pytest
import torch
from torch import nn

import capszoo
from capszoo import kernels
from capszoo.errors import UsageError
from capszoo.export import kernel_hub, write_kernel

NAMESPACE = "_capszoo_routing_cpu_0123abc"
# What stands in for the module that the builder generates.
OPS = f"""
import torch

ops = torch.ops.{NAMESPACE}

def add_op_namespace_prefix(name):
    return f"{NAMESPACE}::{{name}}"
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "project"
    write_kernel(folder, "me/capszoo-routing")
    return folder


@pytest.fixture(scope="module")
def package(project):
    return project / "torch-ext" / "capszoo_routing"


@pytest.fixture(scope="module")
def kernel(package):
    """The kernel as the Hub's loader imports it: under a name of its own, from a path that Python does not search."""
    (package / "_ops.py").write_text(OPS)
    name = "capszoo_routing_0123abc"
    spec = importlib.util.spec_from_file_location(name, package / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for key in [key for key in sys.modules if key.partition(".")[0] == name]:
        del sys.modules[key]


@pytest.fixture(scope="module")
def trees(package):
    return {path: ast.parse(path.read_text()) for path in package.rglob("*.py") if path.name != "_ops.py"}


def test_build_file(project):
    tomllib = pytest.importorskip("tomllib")
    build = tomllib.loads((project / "build.toml").read_text())
    assert build.keys() == {"general", "torch-noarch"} and build["torch-noarch"] == {}
    general = build["general"]
    assert general.pop("hub") == {"repo-id": "me/capszoo-routing"}
    assert general == {
        "name": "capszoo-routing", "version": 1, "edition": 5, "license": "MIT", "backends": ["cpu", "cuda"]
    }  # fmt: skip
    # The builder's rule for names; the module is the name with underscores.
    assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", general["name"])
    assert (project / "torch-ext" / general["name"].replace("-", "_") / "__init__.py").is_file()
    assert "hub" not in tomllib.loads(kernel_hub._build_file(None))["general"]


def test_layout_and_card(project):
    top = {path.name for path in project.iterdir()}
    assert top == {"build.toml", "flake.nix", "README.md", "CARD.md", "torch-ext", "tests"}
    card = (project / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\nlicense: mit\n") and "{{" not in card and "{%" not in card
    assert 'get_kernel("me/capszoo-routing"' in card
    for name in (*kernels.__all__, *capszoo.export.hub_layers.__all__):
        assert f"`{name}`" in card, name


def test_imports_are_relative_or_of_torch_triton_and_python(package, trees):
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                for name in names:
                    assert name.split(".")[0] in sys.stdlib_module_names | {"torch", "triton"}, (path.name, name)
            elif isinstance(node, ast.ImportFrom):
                base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                assert base.is_relative_to(package)
                for alias in node.names:
                    found = [base.with_suffix(".py"), base / "__init__.py", base / f"{alias.name}.py"]
                    assert (node.module or "").endswith("_ops") or any(file.is_file() for file in found), (path, alias)
    assert not (package / "counts.py").exists() and not (package / "fourier_conv.py").exists()


def test_operators_are_in_the_builders_namespace(trees):
    registered, called = set(), set()
    for path, tree in trees.items():
        assert "capszoo::" not in path.read_text() and "ops.capszoo" not in path.read_text(), path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr == "custom_op":
                    name = node.args[0]
                    assert isinstance(name, ast.Call) and name.func.id == "add_op_namespace_prefix"
                    registered.add(name.args[0].value)
                elif node.func.attr == "Library":
                    assert not isinstance(node.args[0], ast.Constant)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ops":
                called.add(node.attr)
    own = {name.split("::")[1] for name in dir_of_operators("capszoo")}
    assert registered == own and called and called <= registered


def dir_of_operators(namespace):
    schemas = torch._C._jit_get_all_schemas()
    return {schema.name for schema in schemas if schema.name.startswith(f"{namespace}::")}


def test_layers_are_stateless_and_define_forward_alone(kernel):
    allowed = {name for name, _ in inspect.getmembers(nn.Module)} | {"can_torch_compile", "has_backward"}
    assert kernel.layers.__all__ == capszoo.export.hub_layers.__all__
    for name in kernel.layers.__all__:
        layer = getattr(kernel.layers, name)
        assert issubclass(layer, nn.Module) and layer.__init__ is nn.Module.__init__
        own = {key for key, value in vars(layer).items() if not key.startswith("__")}
        assert own == {"forward", "can_torch_compile", "has_backward"}
        assert {key for key, _ in inspect.getmembers(layer) if not key.startswith("__")} <= allowed
        assert not [*layer().parameters(), *layer().buffers(), *layer().children()]
    # Of the layer that it takes the place of.
    ours = inspect.signature(capszoo.layers.DynamicRouting.forward)
    assert list(inspect.signature(kernel.layers.DynamicRouting.forward).parameters) == list(ours.parameters)


def drawn(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


CALLS = {
    "squash": [(4, 5)],
    "dynamic_routing": [(3, 12, 5), (6, 5, 4, 7), (4, 7)],
    "self_attention_routing": [(3, 6, 5), (6, 5, 4, 7), (6, 4)],
}


@pytest.mark.parametrize("name", CALLS)
def test_operators_compute_what_ours_do(kernel, name):
    tensors = drawn(*CALLS[name])
    values = [getattr(package, name)(*tensors) for package in (kernel, kernels)]
    assert torch.equal(*values)
    gradients = [torch.autograd.grad(value.square().sum(), tensors) for value in values]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_programs_hold_the_operator_of_the_kernel(kernel):
    class Router(nn.Module):
        num_iters, approximate_squash = 3, False
        forward = kernel.layers.DynamicRouting.forward

    tensors = [tensor.detach() for tensor in drawn(*CALLS["dynamic_routing"])]
    program = torch.export.export(Router(), tuple(tensors))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert f"{NAMESPACE}.dynamic_routing.default" in targets
    assert torch.equal(program.module()(*tensors), kernels.dynamic_routing(*tensors))
    x = tensors[0]
    assert torch.equal(torch.func.vmap(kernel.squash)(x), torch.func.vmap(kernels.squash)(x))


def test_its_own_tests_pass(kernel, project, monkeypatch):
    monkeypatch.setitem(sys.modules, "capszoo_routing", kernel)
    space = {}
    text = (project / "tests" / "test_capszoo_routing.py").read_text()
    exec(text.replace("@pytest.mark.kernels_ci\n", ""), space)
    tests = [value for name, value in space.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_command(recipe, tmp_path, capsys):
    export = recipe("export")
    assert export.main(["kernels", str(tmp_path / "kernel")]) == 0
    assert "kernel-builder build-and-copy" in capsys.readouterr().out
    for words, message in (
        ([str(tmp_path / "kernel")], "is not empty: choose another one"),
        ([str(tmp_path / "new"), "--repo-id", "me"], "repo id 'me' is not OWNER/NAME"),
    ):
        with pytest.raises(UsageError, match=message):
            export.main(["kernels", *words])
    assert not (tmp_path / "new").exists()
