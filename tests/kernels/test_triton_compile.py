"""The kernels compiled for several GPUs without one: they compile, and fit into registers and shared memory.

How many registers a kernel takes is the compiler's choice, and every Triton makes it anew. So the first tile of each
kernel, which every machine can fall back on, has room to spare, and of the others it is reported what they take.
"""

import functools
import os
import re
import subprocess
import sys
import tempfile
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

# The standard network, with a matrix for each capsule and with one for 36.
OWN = {"P": 1, "T": 1152, "BLOCK_P": 1}
SHARED = {"P": 36, "T": 32, "BLOCK_P": 4}

# Sizes, precision of products, and element type of poses and matrices.
EXACT, FAST, HALF = (OWN, "tf32x3", "fp32"), (OWN, "tf32", "fp32"), (SHARED, "tf32", "bf16")
PLAIN = (OWN, "ieee", "fp32")
CASES = {
    "sm_80": (EXACT, HALF),
    "sm_90": (EXACT, FAST, HALF),
    "sm_100": (EXACT, HALF),
    "gfx942": (PLAIN,),
}

# Arguments that can be 1, which Triton then compiles into the kernel.
CAN_BE_ONE = {"B", "T", "P", "J", "R", "N", "num_parts", "tiles_per_part", "capsules_per_part"}

# Exit code of this file as a script where an AMD GPU's code cannot be linked.
NO_LINKER = 77


def compile_all(*arguments):
    """Run this file as a script: kernels decorated for the interpreter, as they may be here, do not compile."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # Triton 3.9 warns that the default is to change.
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    result = subprocess.run([sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True)
    print(result.stdout)
    if result.returncode == NO_LINKER:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("target", list(CASES))
def test_first_tiles_fit(target):
    compile_all("first", target)


@pytest.mark.slow
@pytest.mark.parametrize("target", list(CASES))
def test_all_tiles_compile_and_fit(target):
    compile_all("all", target)


def test_arguments_of_one():
    compile_all("ones", "sm_90")


def rows(kernel, **constants):
    """The launches of a kernel on rows of D, one for each form of squash."""
    sizes = {"D": 16, "BLOCK_D": 16, "BLOCK_N": 32, **constants}
    return [(kernel, None, {**sizes, "APPROXIMATE": approximate}) for approximate in (False, True)]


def few_classes(kernel, sizes, precision, **flags):
    """The launches of a kernel of all_classes.py, one for each configuration."""
    constants = {"J": 10, "K": 8, "D": 16, "JA": 8, "JB": 2, "BLOCK_K": 16, "BLOCK_D": 16, "PRECISION": precision}
    if kernel.fn.__name__ == "uniform_kernel":
        constants |= {"BLOCK_K": 8, "BLOCK_T": 8, "BLOCK_P": sizes["BLOCK_P"]}
    return [(kernel, config, {**constants, **flags, **config.kwargs}) for config in kernel.configs]


def tiles(kernel, sizes, precision, **flags):
    """The launches of a kernel on tiles, one for each configuration."""
    from capszoo.kernels.per_class import block_t

    constants = {"K": 8, "D": 16, "BLOCK_K": 8, "BLOCK_D": 16, "PRECISION": precision, **flags}
    constants["BLOCK_P"] = sizes["BLOCK_P"]
    found = []
    for config in kernel.configs:
        chosen = {**constants, **config.kwargs}
        found.append((kernel, config, {**chosen, "BLOCK_T": block_t({**chosen, "T": sizes["T"]})}))
    return found


@functools.cache
def launches(what, target):
    """Kernel, tile configuration or None, constants, element type of poses and matrices, arguments that are 1."""
    from capszoo.kernels import all_classes, ops, per_class

    routing, squash = ops.triton_routing, ops.triton_squash
    on_rows = [
        *rows(routing.finish_kernel, FIRST=False, LAST=False, NUM_ADDED=16, BLOCK_N=4),
        *rows(routing.begin_backward_kernel),
        *rows(routing.finish_backward_kernel, FIRST=False, NUM_ADDED=16, BLOCK_N=4),
        (routing.dbias_kernel, None, {"D": 16, "BLOCK_D": 16, "BLOCK_N": 128}),
        *rows(squash.squash_kernel, BLOCK_N=64),
        *rows(squash.squash_backward_kernel, BLOCK_N=64),
    ]
    passes = [
        (tiles, per_class.statistics_kernel, {"BACKWARD": False}),
        (tiles, per_class.statistics_kernel, {"BACKWARD": True}),
        (tiles, per_class.sum_kernel, {"UNIFORM": True, "BACKWARD": False}),
        (tiles, per_class.sum_kernel, {"UNIFORM": False, "BACKWARD": False}),
        (tiles, per_class.sum_kernel, {"UNIFORM": False, "BACKWARD": True}),
        (tiles, per_class.dposes_kernel, {}),
        (tiles, per_class.dweight_kernel, {}),
        (few_classes, all_classes.uniform_kernel, {}),
        (few_classes, all_classes.route_kernel, {"BACKWARD": False, "PADDED": False}),
        (few_classes, all_classes.route_kernel, {"BACKWARD": True, "PADDED": False}),
        (few_classes, all_classes.gradients_kernel, {"R": 3}),
    ]
    if what == "ones":
        found = [launches_of(kernel, OWN, "ieee", **flags)[0] for launches_of, kernel, flags in passes] + on_rows
        for first, last in ((True, True), (True, False), (False, True)):
            found += rows(routing.finish_kernel, FIRST=first, LAST=last, NUM_ADDED=16, BLOCK_N=4)
        named = [(launch, sorted(CAN_BE_ONE.intersection(launch[0].arg_names))) for launch in found]
        return [(*launch, "fp32", ones) for launch, names in named for ones in [*zip(names), tuple(names)]]  # noqa: B905
    found = [(*launch, "fp32", ()) for launch in on_rows]
    for sizes, precision, dtype in CASES[target]:
        for launches_of, kernel, flags in passes:
            chosen = launches_of(kernel, sizes, precision, **flags)
            found += [(*launch, dtype, ()) for launch in (chosen if what == "all" else chosen[:1])]
    return found


def compile_kernel(kernel, config, constants, dtype, ones, target):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    class FrontEndDone(BaseException):
        pass

    class FrontEnd(ASTSource):
        """Compiled as far as types matter."""

        def make_ir(self, *arguments):
            super().make_ir(*arguments)
            raise FrontEndDone

    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants or name in ones:
            signature[name], values[(index,)] = "constexpr", constants.get(name, 1)
        elif name.startswith("p_"):
            signature[name] = "*" + (dtype if name in ("p_x", "p_w") else "fp32")
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
            if name in ("B", "T"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = (FrontEnd if ones else ASTSource)(kernel, signature, values, attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages} if config else {}
    nvidia = target.startswith("sm_")
    device = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    try:
        return triton.compile(source, target=device, options=options)
    except FrontEndDone:
        return None


def registers_and_spills(compiled, target):
    """Registers for each thread, and bytes stored and loaded by spills (registers spilled, on AMD)."""
    if not target.startswith("sm_"):
        found = (re.search(rf"\.{n}:\s+(\d+)", compiled.asm["amdgcn"]) for n in ("vgpr_count", "vgpr_spill_count"))
        return tuple(int(match.group(1)) for match in found)
    from triton.backends.nvidia import compiler

    command = os.path.join(os.path.dirname(compiler.__file__), "bin", "cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = os.path.join(folder, "kernel.cubin"), os.path.join(folder, "kernel.ptx")
        with open(cubin, "wb") as file:
            file.write(compiled.asm["cubin"])
        arguments = [command, "--dump-resource-usage", cubin]
        report = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
        registers, stack = (max(int(n) for n in re.findall(rf"{name}:(\d+)", report)) for name in ("REG", "STACK"))
        if stack == 0:
            return registers, 0
        # Not all of the stack is spills: ptxas counts those, in a compilation with Triton's own options.
        with open(ptx, "w") as file:
            file.write(compiled.asm["ptx"])
        capability = int(target[3:])
        name = target + ("a" if capability >= 90 else "")
        ptxas = compiler.get_ptxas(capability)
        ptxas = ptxas[0] if isinstance(ptxas, tuple) else ptxas.path  # Triton 3.3 gave path and version
        arguments = [ptxas, "-lineinfo", "-v", f"--gpu-name={name}", ptx, "-o", cubin]
        report = subprocess.run(arguments, capture_output=True, text=True, check=True).stderr
    return registers, sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))


def report(what, target, index):
    """A line about one compilation, and whether it fails."""
    kernel, config, constants, dtype, ones = launches(what, target)[index]
    tile = f"{'x'.join(map(str, config.kwargs.values()))} {config.num_warps} warps" if config else ""
    flags = " ".join(name for name in ("UNIFORM", "BACKWARD", "APPROXIMATE", "FIRST", "LAST") if constants.get(name))
    while hasattr(kernel, "fn") and not hasattr(kernel, "__name__"):
        kernel = kernel.fn
    name = " ".join(filter(None, [target, kernel.__name__, flags, tile, constants.get("PRECISION"), dtype]))
    name += "".join(f" {argument}=1" for argument in ones)
    try:
        compiled = compile_kernel(kernel, config, constants, dtype, ones, target)
    except Exception as error:
        return f"{name}: {error}", True
    if compiled is None:
        return f"{name}: compiles", False
    registers, spilled = registers_and_spills(compiled, target)
    shared = compiled.metadata.shared
    is_first = config is None or config is launches(what, target)[index][0].configs[0]
    many = constants.get("PRECISION") == "tf32x3" or kernel.__name__ == "route_kernel"
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
