"""What the Triton kernels take, counted without a GPU.

    python recipes/kernels.py                             # recipes/results/kernels-sm_90.csv and kernels-launches.csv
    python recipes/kernels.py --target sm_80 --output runs/kernels

The first table has a row for each kernel, pass, precision and tile, at the sizes of the standard network, and for
inverted attention, EM and variational Bayes at those of their networks (self-attention launches the kernels of dynamic
routing): registers, bytes spilled, shared memory, and the instructions of a warp in its longest loop. The second has
the launches of a forward and a backward pass of dynamic routing, and the bytes of the tensors that they read or write.
Both belong into a commit that changes a kernel: the difference shows what the change does. Times are the benchmark's,
on a GPU.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from capszoo.command_line import OptionParser, run
from capszoo.files import write_csv

# Instructions that tell what a loop does, by the words of the disassembly.
WORDS = {
    "matrix": ("HMMA", "HGMMA"),
    "float": ("FFMA", "FMUL", "FADD", "FMNMX"),
    "exponential": ("MUFU",),
    "shared_loads": ("LDS", "LDSM"),
    "shared_stores": ("STS", "STSM"),
    "global_loads": ("LDG", "LDGSTS"),
    "shuffles": ("SHFL",),
    "barriers": ("BAR",),
}

# Functions of `capszoo.kernels.counts` whose launches have one precision and one tile each.
WHOLE = {
    "rows": "launches_on_rows",
    "inverted attention": "launches_of_inverted_attention",
    "mixtures": "launches_of_mixtures",
}


def compiled_row(target: str, task: tuple[str, str, str, int, int]) -> dict:
    """The row of one compilation: sizes, precision, dtype, and the places of the pass and of its tile."""
    import triton

    from capszoo.kernels import counts

    sizes, precision, dtype, place, tile = task
    if sizes in WHOLE:
        launch = getattr(counts, WHOLE[sizes])()[place]
    else:
        kernel, flags = counts.PASSES[place]
        launch = counts.tile_launches(kernel, getattr(counts, sizes), precision, dtype, **flags)[tile]
    found = counts.count(counts.compile_launch(launch, target), target)
    return {
        "kernel": launch.function.__name__,
        "pass": launch.flags,
        "tile": launch.tile,
        "stages": launch.config.num_stages if launch.config else "",
        "matrices": {"OWN": "one a capsule", "SHARED": "one for 36 capsules"}.get(sizes, launch.problem),
        "precision": precision,
        "poses": dtype,
        "registers": found.registers,
        "spilled_bytes": found.spilled,
        "shared_bytes": found.shared,
        "instructions": found.instructions,
        "loop_instructions": found.loop,
        **{name: sum(found.in_loop[word] for word in words) for name, words in WORDS.items()},
        "triton": triton.__version__,
    }


def tasks() -> Iterator[tuple[str, str, str, int, int]]:
    from capszoo.kernels import counts

    for sizes, precision, dtype in (("OWN", "tf32x3", "fp32"), ("OWN", "tf32", "fp32"), ("SHARED", "tf32", "bf16")):
        for place, (kernel, _) in enumerate(counts.PASSES):
            for tile in range(len(kernel.configs)):
                yield sizes, precision, dtype, place, tile
    for sizes, function in WHOLE.items():
        for place in range(len(getattr(counts, function)())):
            yield sizes, "", "fp32", place, 0


def launch_rows() -> Iterator[dict]:
    """Launches and bytes of both forms: tensors on the meta device, and kernels that do nothing."""
    from capszoo.kernels import all_classes, counts
    from capszoo.kernels.dispatch import triton_routing as routing

    launched: list[int] = []

    def record(tensors: tuple[torch.Tensor, ...]) -> None:
        launched.append(sum(t.numel() * t.element_size() for t in tensors))

    T, K, J, D, R = 1152, 8, 10, 16, 3
    for form, most in (("all classes", all_classes.MAX_VOTES), ("per class", 0)):
        with mock.patch.object(all_classes, "MAX_VOTES", most), counts.nothing_launched(record):
            for batch in (1, 16, 128):
                shapes = (batch, T, K), (T, K, J, D), (J, D), (batch, J, D)
                x, weight, bias, grad = (torch.empty(shape, device="meta") for shape in shapes)
                launched.clear()
                _, sums = routing.dynamic_routing(x, weight, bias, R, False)
                yield {"form": form, "pass": "forward", "batch_size": batch, **_summed(launched)}
                launched.clear()
                routing.dynamic_routing_backward(grad, x, weight, sums, False)
                yield {"form": form, "pass": "backward", "batch_size": batch, **_summed(launched)}


def _summed(launched: list[int]) -> dict[str, int]:
    return {"launches": len(launched), "megabytes": round(sum(launched) / 1e6, 1)}


def build_parser() -> OptionParser:
    parser = OptionParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="sm_90", help="compute capability of an NVIDIA GPU, such as sm_80")
    parser.add_argument("--output", type=Path, default=Path("recipes/results"), metavar="FOLDER")
    return parser


def main(argv: list[str] | None = None) -> int:
    args, _ = build_parser().parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        rows = list(pool.map(partial(compiled_row, args.target), list(tasks())))
    table = args.output / f"kernels-{args.target}.csv"
    write_csv(table, list(rows[0]), rows)
    launches = list(launch_rows())
    write_csv(args.output / "kernels-launches.csv", list(launches[0]), launches)
    print(f"{len(rows)} compilations: {table}")
    return 0


if __name__ == "__main__":
    run(main)
