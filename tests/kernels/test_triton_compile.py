"""The kernels compiled for several GPUs without one: no register spills, shared memory within the device's limit."""

import functools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

import pytest

# Bytes of shared memory that one program may have.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

# The standard network, with a matrix for each capsule and with one for 36.
OWN = {"P": 1, "T": 1152, "BLOCK_P": 1}
SHARED = {"P": 36, "T": 32, "BLOCK_P": 4}

# Sizes, precision of products, and element type of poses and matrices.
EXACT, FAST, HALF = (OWN, "ieee", "fp32"), (OWN, "tf32", "fp32"), (SHARED, "tf32", "bf16")
CASES = {"sm_80": (EXACT, HALF), "sm_90": (EXACT, FAST, HALF), "sm_100": (EXACT, HALF), "gfx942": (EXACT,)}


@pytest.mark.parametrize("target", list(CASES))
def test_no_spills(target):
    pytest.importorskip("triton")
    # Compilation fails where kernels are decorated for the interpreter: another process, without it.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # Triton 3.9 warns that the default is to change.
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    result = subprocess.run([sys.executable, __file__, target], env=environment, capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


@functools.cache
def launches(target):
    """Kernel, tile configuration or None, constants, element type of poses and matrices."""
    from capszoo.kernels import ops

    routing, squash = ops.triton_routing, ops.triton_squash
    found = []
    for approximate in (False, True):
        rows = {"D": 16, "BLOCK_D": 16, "BLOCK_N": 32, "APPROXIMATE": approximate}
        found.append((routing.finish_kernel, None, {**rows, "FIRST": False, "LAST": False}, "fp32"))
        found.append((routing.begin_backward_kernel, None, rows, "fp32"))
        found.append((routing.finish_backward_kernel, None, {**rows, "FIRST": False}, "fp32"))
        found.append((squash.squash_kernel, None, {**rows, "BLOCK_N": 64}, "fp32"))
        found.append((squash.squash_backward_kernel, None, {**rows, "BLOCK_N": 64}, "bf16"))
    passes = [
        (routing.statistics_kernel, {"BACKWARD": False}),
        (routing.statistics_kernel, {"BACKWARD": True}),
        (routing.sum_kernel, {"UNIFORM": True, "BACKWARD": False}),
        (routing.sum_kernel, {"UNIFORM": False, "BACKWARD": False}),
        (routing.sum_kernel, {"UNIFORM": False, "BACKWARD": True}),
        (routing.dposes_kernel, {}),
        (routing.dweight_kernel, {}),
    ]
    for kernel, flags in passes:
        for config in kernel.configs:
            for sizes, precision, dtype in CASES[target]:
                constants = {"K": 8, "D": 16, "BLOCK_K": 8, "BLOCK_D": 16, "PRECISION": precision, **flags}
                constants.update(config.kwargs, BLOCK_P=sizes["BLOCK_P"])
                constants["BLOCK_T"] = routing.block_t({**constants, "T": sizes["T"]})
                found.append((kernel, config, constants, dtype))
    return found


def compile_kernel(kernel, config, constants, dtype, target):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
        elif name.startswith("p_"):
            signature[name] = "*" + (dtype if name in ("p_x", "p_w") else "fp32")
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
            if name in ("B", "T"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages} if config else {}
    nvidia = target.startswith("sm_")
    device = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    return triton.compile(ASTSource(kernel, signature, values, attributes), target=device, options=options)


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


def report(target, index):
    """A line about one compilation, and whether it fails."""
    kernel, config, constants, dtype = launches(target)[index]
    compiled = compile_kernel(kernel, config, constants, dtype, target)
    registers, spilled = registers_and_spills(compiled, target)
    tile = f"{config.kwargs['BLOCK_B']}x{config.kwargs['WIDTH']} {config.num_warps} warps" if config else ""
    flags = " ".join(name for name in ("UNIFORM", "BACKWARD", "APPROXIMATE") if constants.get(name))
    what = " ".join(filter(None, [compiled.metadata.name, flags, tile, constants.get("PRECISION"), dtype]))
    line = f"{target} {what}: {registers} registers, {spilled} spilled, {compiled.metadata.shared} B shared memory"
    # AMD spills are reported only: tuning has configurations without them to choose there.
    return line, (spilled > 0 and target.startswith("sm_")) or compiled.metadata.shared > SHARED_MEMORY[target]


def main(target):
    with ProcessPoolExecutor() as pool:
        count = len(launches(target))
        lines = list(pool.map(report, [target] * count, range(count)))
    print("\n".join(line for line, _ in lines))
    failures = [line for line, failed in lines if failed]
    if failures:
        sys.exit("\n".join(["spills, or more shared memory than there is:", *failures]))


if __name__ == "__main__":
    main(sys.argv[1])
