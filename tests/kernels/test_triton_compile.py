"""The kernels compiled for several GPUs without one: they compile, and fit into registers and shared memory.

How many registers a kernel takes is the compiler's choice, and every Triton makes it anew. So the first tile of each
kernel, which every machine can fall back on, has room to spare, and of the others it is reported what they take.
"""

import dataclasses
import functools
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest

# Bytes of shared memory that one program may have.
SHARED_MEMORY = {
    "sm_75": 64 * 1024,
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}

# Bytes that a thread may spill: compilers spill a few for more threads at a time, and only more than these cost time.
# The products of "tf32x3" take three times the operands, and what route_kernel spills are the class capsules of its
# samples, which it would read again from the same cache otherwise: its fastest tile on an H100 spills 300.
SPILLS, SPILLS_OF_MANY = 64, 1024

# Precision of products and element type of poses and matrices, at the sizes of the standard network.
EXACT, FAST, HALF, PLAIN = (
    ("OWN", "tf32x3", "fp32"),
    ("OWN", "tf32", "fp32"),
    ("SHARED", "tf32", "bf16"),
    ("OWN", "ieee", "fp32"),
)
CASES = {
    "sm_80": (EXACT,),
    "sm_90": (EXACT, FAST, HALF),
    "sm_100": (HALF,),
    "gfx942": (PLAIN,),
}

# Arguments that can be 1, which Triton then compiles into the kernel.
CAN_BE_ONE = {
    *("B", "T", "P", "J", "R", "N", "C", "H", "W", "height", "width", "stride"),
    *("num_parts", "tiles_per_part", "capsules_per_part", "children_per_part", "positions_per_part"),
}

# Exit code of this file as a script where an AMD GPU's code cannot be linked.
NO_LINKER = 77


def compile_all(*arguments):
    """Run this file as a script: kernels decorated for the interpreter, as they may be here, do not compile."""
    pytest.importorskip("triton")
    import processes  # which the script does not find

    # Triton 3.9 warns that the default is to change.
    environment = {"TRITON_DEFAULT_FP_FUSION": "1", **os.environ}
    if environment.pop("TRITON_INTERPRET", None):
        result = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
    else:
        result = processes.run(__file__, *arguments, env=environment)
    print(result.stdout)
    if result.returncode == NO_LINKER:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("target", [pytest.param(name, marks=[pytest.mark.slow] * (name != "sm_90")) for name in CASES])
def test_first_tiles_fit(target):
    compile_all("first", target)


@pytest.mark.slow
@pytest.mark.parametrize("target", list(CASES))
def test_all_tiles_compile_and_fit(target):
    compile_all("all", target)


def test_arguments_of_one():
    compile_all("ones", "sm_90")


@functools.cache
def launches(what, target):
    from capszoo.kernels import counts

    if what == "ones":
        chosen = [
            counts.tile_launches(kernel, counts.OWN, "ieee", "fp32", **flags)[0] for kernel, flags in counts.PASSES
        ]
        found = []
        for launch in chosen + counts.launches_on_rows() + counts.launches_of_inverted_attention()[:3]:
            names = [name for name in launch.function.arg_names if name in CAN_BE_ONE - launch.constants.keys()]
            found += [dataclasses.replace(launch, ones=ones) for ones in [*zip(names), tuple(names)]]  # noqa: B905
        return found
    found = counts.launches_on_rows() + counts.launches_of_inverted_attention()
    cases = CASES[target] if what == "all" else [case for case in CASES[target] if case != FAST]  # EXACT takes more
    for sizes, precision, dtype in cases:
        for kernel, flags in counts.PASSES:
            tiles = counts.tile_launches(kernel, getattr(counts, sizes), precision, dtype, **flags)
            found += tiles if what == "all" else tiles[:1]
    return found


class FrontEndDone(BaseException):
    pass


def registers_and_spills(compiled, target):
    """Registers for each thread, and bytes that it spills; registers spilled, on AMD."""
    if not target.startswith("sm_"):
        found = (re.search(rf"\.{n}:\s+(\d+)", compiled.asm["amdgcn"]) for n in ("vgpr_count", "vgpr_spill_count"))
        return tuple(int(match.group(1)) for match in found)
    from capszoo.kernels import counts

    found = counts.count(compiled, target)
    return found.registers, found.spilled


def report(what, target, index):
    """A line about one compilation, and whether it fails."""
    from triton.compiler import ASTSource

    from capszoo.kernels import counts

    class FrontEnd(ASTSource):
        """Compiled as far as types matter."""

        def make_ir(self, *arguments):
            super().make_ir(*arguments)
            raise FrontEndDone

    launch = launches(what, target)[index]
    name = f"{target} {launch.name}"
    try:
        compiled = counts.compile_launch(launch, target, FrontEnd if launch.ones else ASTSource)
    except FrontEndDone:
        return f"{name}: compiles", False
    except Exception as error:
        return f"{name}: {error}", True
    registers, spilled = registers_and_spills(compiled, target)
    shared = compiled.metadata.shared
    is_first = not hasattr(launch.kernel, "configs") or launch.config is launch.kernel.configs[0]
    # The widest poses, of CIFAR-100, have but this tile, and spill up to 1.4 kB where Triton is older than 3.8.
    is_first = is_first and "100 types" not in launch.problem
    many = launch.constants.get("PRECISION") == "tf32x3" or launch.function.__name__ == "route_kernel"
    bound = (SPILLS_OF_MANY if many else SPILLS) if is_first else float("inf")
    line = f"{name}: {registers} registers, {spilled} spilled, {shared} B shared memory"
    return line, spilled > bound or shared > SHARED_MEMORY[target]


def main(what, target):
    count = len(launches(what, target))
    with ProcessPoolExecutor() as pool:
        lines = list(pool.map(report, [what] * count, [target] * count, range(count)))
    print("\n".join(line for line, _ in lines))
    failures = [line for line, failed in lines if failed]
    if failures and all("ld.lld" in line for line in failures):
        print(f"Triton finds no linker for {target} here", file=sys.stderr)
        sys.exit(NO_LINKER)
    if failures:
        sys.exit("\n".join(["spills, more shared memory than there is, or errors:", *failures]))


if __name__ == "__main__":
    main(*sys.argv[1:])
