"""The routing operators as a project of Hugging Face's kernel-builder, made from the sources of `capszoo.kernels`.

The Hub loads kernels from any path and several versions at once. So a kernel imports itself by relative names alone,
and registers its operators under a namespace that the builder makes, in a module `_ops` that it generates. The layout
is that of edition 5 for kernels without compiled code:

    build.toml                      name, backends, [torch-noarch]
    flake.nix                       starts the builder
    README.md, CARD.md              the card
    torch-ext/capszoo_routing/      modules of capszoo.kernels, and layers.py
    tests/test_capszoo_routing.py   what the builder runs on the built kernel

Source: https://huggingface.co/docs/kernels/builder/writing-kernels
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import capszoo.kernels
from capszoo._version import __version__
from capszoo.errors import UsageError

from . import hub_layers

__all__ = ["sources", "write_kernel"]

NAME = "capszoo-routing"
MODULE = NAME.replace("-", "_")

# What names the namespace of the operators, what stands there in a kernel of the Hub, and what of `_ops` that needs.
_NAMESPACES = (
    (r'(custom_op\(\s*)"capszoo::(\w+)"', r'\1add_op_namespace_prefix("\2")', "add_op_namespace_prefix"),
    (r'Library\("capszoo"', 'Library(add_op_namespace_prefix("").partition("::")[0]', "add_op_namespace_prefix"),
    (r"\btorch\.ops\.capszoo\.", "ops.", "ops"),
)
# Texts for readers, who have no capszoo there.
_TEXTS = {
    "script and export with capszoo.set_fused_routing(False)": "script and export that of its reference",
    "`capszoo::": "`",
    "the `capszoo` namespace": "this kernel",
    "capszoo.kernels": MODULE,
}
_DOCSTRING = '''"""The operators of capsule networks: `squash` and routings, fused and recomputing, on CPUs and GPUs.

`reference` holds the same functions in plain PyTorch, and `layers` what takes the place of layers.
"""
'''


def sources() -> dict[str, str]:
    """The modules that the operators need, path in the kernel to text, as they stand in a kernel of the Hub."""
    root = Path(capszoo.kernels.__file__).parent
    waiting, found = ["__init__.py"], {}
    while waiting:
        path = waiting.pop()
        if path not in found:
            text = (root / path).read_text(encoding="utf-8")
            found[path] = rewritten(text, path)
            waiting += [name for name in _needed(text, path) if (root / name).is_file()]
    layers = Path(hub_layers.__file__).read_text(encoding="utf-8")
    found["layers.py"] = layers.replace("from capszoo.kernels import", "from . import")
    init = found["__init__.py"]
    init = _DOCSTRING + init[init.index('"""\n', 3) + 4 :]
    # Last: layers import the operators from the package itself.
    init = init.replace("\n__all__ = [\n", "\nfrom . import layers  # isort: skip\n\n__all__ = [\n", 1)
    found["__init__.py"] = init.replace('    "reference",\n', '    "layers",\n    "reference",\n', 1)
    return dict(sorted(found.items()))


def rewritten(text: str, path: str) -> str:
    """Put the operators of a module into the namespace that the builder makes.

    Args:
        text: Its source.
        path: Where it stands in the package, which says how far up `_ops` is.
    """
    names = set()
    lines = text
    for words, others in _TEXTS.items():
        lines = lines.replace(words, others)
    for pattern, replacement, name in _NAMESPACES:
        lines, count = re.subn(pattern, replacement, lines)
        if count:
            names.add(name)
    if not names:
        return lines
    dots = "." * (1 + path.count("/"))
    tree = ast.parse(lines)
    last = max(node.end_lineno or 0 for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    rows = lines.splitlines(keepends=True)
    rows.insert(last, f"from {dots}_ops import {', '.join(sorted(names))}\n")
    return "".join(rows)


def _needed(text: str, path: str) -> Iterator[str]:
    """Paths that the relative imports of a module may mean, those of Triton's modules by name among them."""
    package = path.split("/")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            names = [base, *([*base, alias.name] for alias in node.names)]
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "triton_module"
            and isinstance(node.args[0], ast.Constant)
        ):
            names = [str(node.args[0].value).strip(".").split(".")]
        else:
            continue
        for parts in names:
            yield "/".join(parts) + ".py"
            yield "/".join([*parts, "__init__.py"])


def write_kernel(folder: str | Path, repo_id: str | None = None) -> list[Path]:
    """Write the project.

    Args:
        folder: Folder to make; must be empty or absent.
        repo_id: OWNER/NAME on the Hub, to which the builder uploads; None leaves it out.

    Returns:
        The files.

    Raises:
        UsageError: If there is something in the folder, or `repo_id` is not OWNER/NAME.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"folder {str(folder)!r} is not empty: choose another one")
    if repo_id is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise UsageError(f"repo id {repo_id!r} is not OWNER/NAME, such as me/{NAME}")
    card = _card(repo_id or f"OWNER/{NAME}")
    files = {"build.toml": _build_file(repo_id), "flake.nix": _FLAKE, "README.md": card, "CARD.md": card}
    files[f"tests/test_{MODULE}.py"] = _TEST
    files |= {f"torch-ext/{MODULE}/{path}": text for path, text in sources().items()}
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return [folder / path for path in files]


def _build_file(repo_id: str | None) -> str:
    hub = f'[general.hub]\nrepo-id = "{repo_id}"\n\n' if repo_id else ""
    return f"""[general]
name = "{NAME}"
version = 1
edition = 5
license = "MIT"
backends = ["cpu", "cuda"]

{hub}[torch-noarch]
"""


_FLAKE = """{
  description = "Routing between capsules, fused";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""

_TEST = f'''"""The fused operators against the same functions in plain PyTorch."""

import {MODULE} as kernel
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def close(found, expected):
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.kernels_ci
def test_squash():
    x = torch.randn(5, 7, device=DEVICE, requires_grad=True)
    close(kernel.squash(x), kernel.reference.squash(x))
    close(*(torch.autograd.grad(f(x).square().sum(), x)[0] for f in (kernel.squash, kernel.reference.squash)))


@pytest.mark.kernels_ci
def test_dynamic_routing():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_()
        for shape in ((3, 12, 5), (6, 5, 4, 7), (4, 7))
    )
    fused, plain = (f(x, weight, bias) for f in (kernel.dynamic_routing, kernel.reference.dynamic_routing))
    close(fused, plain)
    gradients = [torch.autograd.grad(v.square().sum(), (x, weight, bias)) for v in (fused, plain)]
    for found, expected in zip(*gradients, strict=True):
        close(found, expected)
'''


def _card(repo_id: str) -> str:
    layers = "\n".join(f"- `{name}`" for name in hub_layers.__all__)
    operators = "\n".join(f"- `{name}`" for name in capszoo.kernels.__all__ if name != "reference")
    return f"""---
library_name: kernels
license: mit
tags: [capsule-network, kernels, triton]
---
# {NAME}

Routing between capsules without stored votes, from capszoo {__version__}: Triton kernels for GPUs from compute
capability 7.0 on, tiled PyTorch for CPUs, with first derivatives of their own and higher ones by the reference. Made by
`capszoo export kernels`.

```python
import torch
from kernels import get_kernel

routing = get_kernel("{repo_id}", version=1)
x, weight, bias = torch.randn(8, 1152, 8), torch.randn(1152, 8, 10, 16), torch.zeros(10, 16)
capsules = routing.dynamic_routing(x, weight, bias, num_iters=3)   # [8, 10, 16]
```

## Functions

{operators}

`reference` has the same functions in plain PyTorch.

## Layers

{layers}

A layer of capszoo takes one of them by `replace_kernel_forward_from_hub`, see the documentation of `kernels`.
"""
