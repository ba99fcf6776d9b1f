"""Moments of votes in Triton: through the interpreter against the CPU's in float64, and compiled without a GPU."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# Bytes of shared memory that one program may have, and of stack, for spilled registers, a thread.
SHARED_MEMORY, STACK = 64 * 1024, 64


def interpreted(test):
    asked = pytest.mark.usefixtures("interpreted_loops")(test)
    return pytest.mark.skipif(not INTERPRETING, reason="run by test_through_the_interpreter")(asked)


@pytest.mark.slow
def test_through_the_interpreter(through_the_interpreter):
    """All tests below that are interpreted."""


pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


def error(actual, expected):
    difference = (actual.double() - expected).norm().item()
    return difference / expected.norm().item() if expected.norm() > 1e-12 else difference


# Several residues and a position that no kernel covers; parent types beyond one tile and a pose that is padded; one
# position of a kernel smaller than the map, with an offset; the least.
CASES = {
    "strided": ((2, 2, 5, 6, 4, 3), (3, 3), 2, False),
    "padded": ((1, 1, 3, 3, 3, 17), (2, 3), 1, True),
    "whole": ((3, 2, 2, 4, 2, 2), (2, 3), 2, True),
    "least": ((1, 1, 1, 1, 1, 1), (1, 1), 1, False),
}


@interpreted
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("num_programs", [1, 8])
def test_numbers(case, equal, num_programs, monkeypatch):
    from capszoo.kernels.gaussian_routing import cpu, launch

    monkeypatch.setattr(launch, "NUM_PROGRAMS", num_programs)
    (B, num_types, h, w, P, J), kernel, stride, with_offset = CASES[case]
    H, W = ((side - k) // stride + 1 for side, k in zip((h, w), kernel, strict=True))
    torch.manual_seed(0)
    children = [torch.randn(num_types, P, P, B, h, w), torch.rand(num_types, B, h, w)]
    children += [torch.randn(num_types, *kernel, J, P, P), torch.randn(*kernel, P, P) if with_offset else None]
    priors = [torch.randn(J, P, P, B, H, W), torch.rand(J, P, P, B, H, W), torch.randn(J, B, H, W)]
    inputs = [*children, *((None,) * 3 if equal else priors)]
    exact = [None if t is None else t.double() for t in inputs]
    outputs, expected = launch.moments(*inputs, stride), cpu.moments(*exact, stride)
    grads = [torch.randn_like(t) for t in outputs]
    found = launch.moments_backward(*grads, *inputs, *outputs[:2], stride)
    wanted = cpu.moments_backward(*(t.double() for t in grads), *exact, *expected[:2], stride)
    for actual, right in zip(outputs, expected, strict=True):
        assert actual.is_contiguous() and actual.shape == right.shape and error(actual, right) < 1e-5
    for actual, right in zip(found, wanted, strict=True):
        assert actual.is_contiguous() and actual.shape == right.shape and error(actual, right) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("capability", [70, 80, 90])
def test_compiled(capability):
    """At the sizes of the papers: next to nothing is spilled, and several programs fit on a multiprocessor."""
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)  # kernels decorated for the interpreter do not compile
    command = [sys.executable, __file__, str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = re.findall(r"^(\w+) shared (\d+) stack (\d+)$", result.stdout, re.M)
    assert len(lines) == 7
    for kernel, shared, stack in lines:
        assert int(shared) < SHARED_MEMORY and int(stack) <= STACK, kernel


def compile_all(capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from capszoo.kernels.gaussian_routing import triton as forward
    from capszoo.kernels.gaussian_routing import triton_backward as backward

    sizes = dict(P=4, OFFSET=True, BLOCK_R=4, BLOCK_J=16, BLOCK_P=4)
    launches = [
        (forward.children_kernel, {}),
        (forward.moments_kernel, dict(EQUAL=False, BACKWARD=False)),
        (forward.moments_kernel, dict(EQUAL=True, BACKWARD=False)),
        (forward.moments_kernel, dict(EQUAL=False, BACKWARD=True)),
        (backward.dchildren_kernel, dict(EQUAL=False)),
        (backward.dchildren_kernel, dict(EQUAL=True)),
        (backward.dweight_kernel, dict(EQUAL=False)),
    ]
    for kernel, flags in launches:
        constants = {**sizes, **flags}
        names = [parameter.name for parameter in kernel.params]
        types = {n: "constexpr" if n in constants else "*fp32" if n.startswith("p_") else "i32" for n in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.startswith("p_")}
        source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        print(f"{kernel.fn.__name__} shared {compiled.metadata.shared} stack {stack(compiled.asm['cubin'])}")


def stack(cubin):
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    return re.search(r"STACK:(\d+)", text).group(1)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
