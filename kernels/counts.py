"""The Triton kernels compiled for a GPU that need not be there, and what the machine code takes.

`recipes/kernels.py` makes a table of it, tests hold bounds. Kernels decorated while TRITON_INTERPRET was set do not
compile.
"""

import collections
import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import all_classes, per_class
from .centering import triton_filters as filters
from .class_scores import launchers as class_scores
from .gaussian_routing.ops import launchers as mixtures
from .inverted_attention.ops import launchers as inverted_attention
from .ops import triton_routing as routing
from .ops import triton_squash as squash

# The standard network: J, K, D, and T and P with a matrix for each capsule and with one for 36.
CLASSES = {"J": 10, "K": 8, "D": 16, "BLOCK_D": 16}
OWN = {"T": 1152, "P": 1, "BLOCK_P": 1}
SHARED = {"T": 32, "P": 36, "BLOCK_P": 4}

# Arguments that are numbers and no sizes.
NUMBERS = {"scale", "m_plus", "m_minus", "absent"}


@dataclass(frozen=True)
class Launch:
    """One compilation of a kernel."""

    kernel: Any
    """The decorated kernel."""
    config: triton.Config | None
    """Its tile, if it has a choice."""
    constants: dict
    dtype: str = "fp32"
    """Of poses and matrices, in Triton's words."""
    ones: tuple[str, ...] = ()
    """Arguments that are 1, which Triton compiles into a kernel."""
    problem: str = ""
    """What it works on, where a kernel is compiled for several sizes of networks."""
    aligned: tuple[str, ...] = ("B", "T")
    """Sizes that are multiples of 16."""

    @property
    def function(self) -> triton.JITFunction:
        kernel = self.kernel
        while not isinstance(kernel, triton.JITFunction):
            kernel = kernel.fn
        return kernel

    @property
    def tile(self) -> str:
        """Sizes and warps, such as `16x64 4 warps`."""
        if self.config is None:
            return ""
        return f"{'x'.join(map(str, self.config.kwargs.values()))} {self.config.num_warps} warps"

    @property
    def flags(self) -> str:
        names = ("UNIFORM", "EQUAL", "BACKWARD", "APPROXIMATE", "FIRST", "LAST", "INDICES", "UNITS")
        return " ".join(name for name in names if self.constants.get(name))

    @property
    def name(self) -> str:
        parts = (self.function.__name__, self.flags, self.tile, self.constants.get("PRECISION"), self.dtype)
        return " ".join(filter(None, parts)) + "".join(f" {name}=1" for name in self.ones)


def rows_launches(kernel: Any, **constants) -> list[Launch]:
    """A kernel on rows of D, with each squash that it has."""
    sizes = {"D": 16, "BLOCK_D": 16, "BLOCK_N": 32, **constants}
    squashes = [{"APPROXIMATE": value} for value in (False, True)] if "APPROXIMATE" in kernel.arg_names else [{}]
    return [Launch(kernel, None, {**sizes, **squash_}) for squash_ in squashes]


def launches_on_rows() -> list[Launch]:
    """All kernels that work on class capsules, on vectors, or on the filters of a convolution."""
    adding, block = {"NUM_ADDED": routing.NUM_ADDED, "BLOCK_N": 4}, filters.TILE_SIZE
    return [
        *rows_launches(routing.finish_kernel, FIRST=False, LAST=False, **adding),
        *rows_launches(routing.begin_backward_kernel),
        *rows_launches(routing.finish_backward_kernel, FIRST=False, **adding),
        *rows_launches(routing.dbias_kernel, BLOCK_N=128),
        *rows_launches(squash.squash_kernel, BLOCK_N=64),
        *rows_launches(squash.squash_backward_kernel, BLOCK_N=64),
        *(rows_launches(class_scores.lengths_kernel, BLOCK_N=64, UNITS=units)[0] for units in (True, False)),
        *(rows_launches(class_scores.margin_kernel, BLOCK_J=16, INDICES=indices)[0] for indices in (True, False)),
        Launch(filters.center_kernel, triton.Config({"BLOCK": block}, num_warps=8), {"BLOCK": block}, aligned=("N",)),
    ]


def launches_of_inverted_attention() -> list[Launch]:
    """The kernels at the sizes of its networks for CIFAR-10 and CIFAR-100: convolutional and class capsules of each."""
    found = []
    for side, types, num_parents in ((4, 32, 32), (4, 800, 10), (6, 32, 32), (6, 20, 100)):
        size, k, places = (16, 3, 7) if types == 32 else (1, 1, 1)
        x = torch.empty(128, size, size, types, side, side, device="meta")
        weight = x.new_empty(k, k, types, side, side, num_parents)
        parents = x.new_empty(128, places, places, num_parents, side, side)
        for name in ("sum_kernel", "poses_kernel", "weight_kernel"):
            _, _, chosen = inverted_attention.launch(x, weight, parents, stride=2, backward=name != "sum_kernel")
            blocks = {name: chosen[name] for name in ("BLOCK_N", "BLOCK_S", "BLOCK_J")}
            config = triton.Config(blocks, num_warps=chosen["num_warps"])
            constants = {"KERNEL": k, "S": side, **blocks}
            problem = f"{k}x{k}, {types} to {num_parents} types of {side}x{side}"
            found.append(Launch(getattr(inverted_attention, name), config, constants, problem=problem))
    return found


def launches_of_mixtures() -> list[Launch]:
    """The kernels of EM and variational Bayes at the sizes of their networks: convolutional and class capsules."""
    found = []
    for k, num_parents, offset in ((3, 32, False), (4, 10, True)):  # the matrices of classes hold their places
        poses = torch.empty(32, 4, 4, 128, 8 - k, 8 - k, device="meta")
        weight = poses.new_empty(32, k, k, num_parents, 4, 4)
        places = poses.new_empty(k, k, 4, 4) if offset else None
        sizes = mixtures.Problem(poses, poses[:, 0, 0], weight, places, 1).sizes
        blocks = {name: sizes[name] for name in ("BLOCK_R", "BLOCK_J", "BLOCK_P")}
        config = triton.Config(blocks, num_warps=mixtures.NUM_WARPS)
        problem = f"{k}x{k}, 32 to {num_parents} types of 4x4"
        passes = [
            (mixtures.children_kernel, {}),
            *((mixtures.moments_kernel, {"EQUAL": e, "BACKWARD": b}) for e, b in ((0, 0), (1, 0), (0, 1))),
            *((mixtures.dchildren_kernel, {"EQUAL": equal}) for equal in (False, True)),
            (mixtures.dweight_kernel, {"EQUAL": False}),
        ]
        for kernel, flags in passes:
            constants = {"P": 4, "OFFSET": offset, **blocks, **{name: bool(flag) for name, flag in flags.items()}}
            found.append(Launch(kernel, config, constants, problem=problem))
    return found


PASSES = [
    (per_class.statistics_kernel, {"BACKWARD": False}),
    (per_class.statistics_kernel, {"BACKWARD": True}),
    (per_class.sum_kernel, {"UNIFORM": True, "BACKWARD": False}),
    (per_class.sum_kernel, {"UNIFORM": False, "BACKWARD": False}),
    (per_class.sum_kernel, {"UNIFORM": False, "BACKWARD": True}),
    (per_class.dposes_kernel, {}),
    (per_class.dweight_kernel, {}),
    (all_classes.uniform_kernel, {}),
    (all_classes.route_kernel, {"BACKWARD": False, "PADDED": False}),
    (all_classes.route_kernel, {"BACKWARD": True, "PADDED": False}),
    (all_classes.gradients_kernel, {"R": 3}),
]


def tile_launches(kernel: Any, sizes: dict, precision: str, dtype: str, **flags) -> list[Launch]:
    """A kernel over tiles at the sizes of the standard network, one launch for each of its tiles."""
    constants = {**CLASSES, "BLOCK_K": 8, "PRECISION": precision, "BLOCK_P": sizes["BLOCK_P"], **flags}
    if kernel in (all_classes.route_kernel, all_classes.gradients_kernel):
        constants |= {"JA": 8, "JB": 2, "BLOCK_K": 16}
    elif kernel is all_classes.uniform_kernel:
        constants |= {"JA": 8, "JB": 2, "BLOCK_T": 8}
    else:
        del constants["J"]
    found = []
    for config in kernel.configs:
        chosen = {**constants, **config.kwargs}
        if "WIDTH" in chosen:
            chosen["BLOCK_T"] = per_class.block_t({**chosen, "T": sizes["T"]})
        names = Launch(kernel, config, {}).function.arg_names
        found.append(Launch(kernel, config, {k: v for k, v in chosen.items() if k in names}, dtype))
    return found


def compile_launch(launch: Launch, target: str, source_class: type = ASTSource) -> Any:
    """Compile for `sm_90` and its like, or for `gfx942` and its like."""
    function = launch.function
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        if name in launch.constants or name in launch.ones:
            signature[name], values[(index,)] = "constexpr", launch.constants.get(name, 1)
        elif name.startswith("p_"):
            dtype = "i64" if launch.constants.get("INDICES") and name == "p_target" else "fp32"
            signature[name] = "*" + (launch.dtype if name in ("p_x", "p_w") else dtype)
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in NUMBERS else "i32"
            if name in launch.aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
    config = launch.config
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages} if config else {}
    nvidia = target.startswith("sm_")
    device = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    return triton.compile(source_class(function, signature, values, attributes), target=device, options=options)


@contextlib.contextmanager
def nothing_launched(record: Callable[[tuple], None] = lambda tensors: None) -> Iterator[None]:
    """Within this no kernel of dynamic routing or of a training step around it runs, so that launchers take tensors on
    the meta device.

    Args:
        record: Called instead of each launch, with the kernel's tensors.
    """

    class Recorded:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **kwargs: record(tuple(arg for arg in args if isinstance(arg, torch.Tensor)))

    with contextlib.ExitStack() as stack:
        for module in (routing, all_classes, per_class, squash, class_scores, filters):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                stack.enter_context(mock.patch.object(module, name, Recorded()))
            if hasattr(module, "launcher"):
                stack.enter_context(mock.patch.object(module, "launcher", lambda kernel, grid: kernel[grid]))
        yield


@dataclass
class Counts:
    """What one kernel takes on an NVIDIA GPU."""

    registers: int = 0
    """Of each thread."""
    spilled: int = 0
    """Bytes that a thread stores and loads because registers are short."""
    shared: int = 0
    """Bytes of shared memory of a program."""
    instructions: int = 0
    loop: int = 0
    """Instructions of a warp in one run through the longest loop, with those in it counted once."""
    in_loop: collections.Counter = field(default_factory=collections.Counter)
    """Those by their first word, such as HMMA, FFMA, LDS, BAR."""


def count(compiled: Any, target: str) -> Counts:
    """Counts by the disassembler and the assembler that come with Triton.

    Args:
        compiled: What `compile_launch` returned.
        target: An NVIDIA target, such as `sm_90`.
    """
    from triton.backends.nvidia import compiler

    tools = os.path.join(os.path.dirname(compiler.__file__), "bin")

    def run(*arguments: str) -> tuple[str, str]:
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        return done.stdout, done.stderr

    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = os.path.join(folder, "kernel.cubin"), os.path.join(folder, "kernel.ptx")
        with open(cubin, "wb") as binary:
            binary.write(compiled.asm["cubin"])
        report = run(os.path.join(tools, "cuobjdump"), "--dump-resource-usage", cubin)[0]
        registers, stack = (max(int(n) for n in re.findall(rf"{name}:(\d+)", report)) for name in ("REG", "STACK"))
        found = Counts(registers, shared=compiled.metadata.shared)
        found.instructions, found.loop, found.in_loop = _loops(run(os.path.join(tools, "nvdisasm"), "-c", cubin)[0])
        if stack:  # not all of it is spills: ptxas counts those, in a compilation with Triton's own options
            with open(ptx, "w") as text:
                text.write(compiled.asm["ptx"])
            capability = int(target[3:])
            ptxas = compiler.get_ptxas(capability)
            ptxas = ptxas[0] if isinstance(ptxas, tuple) else ptxas.path  # Triton 3.3 gave path and version
            gpu = f"--gpu-name={target}{'a' if capability >= 90 else ''}"
            report = run(ptxas, "-lineinfo", "-v", gpu, ptx, "-o", cubin)[1]
            found.spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
    return found


def _loops(text: str) -> tuple[int, int, collections.Counter]:
    """Instructions of a disassembly, those of its longest loop, and these by their first word."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        if found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found[1])
    loops = [(0, 0)]
    for place, instruction in enumerate(instructions):
        jump = re.search(r"BRA.*?`\((\.L_x_\d+)\)", instruction)
        if jump and labels.get(jump[1], place) < place:
            loops.append((labels[jump[1]], place + 1))
    first, end = max(loops, key=lambda loop: loop[1] - loop[0])
    words = (re.sub(r"^@!?\w+\s+", "", instruction).split()[0].split(".")[0] for instruction in instructions[first:end])
    return len(instructions), end - first, collections.Counter(words)
