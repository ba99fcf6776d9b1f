"""What the Triton kernels take, counted without a GPU.

    python recipes/kernels.py                             # the three tables of recipes/results
    python recipes/kernels.py --target sm_80 --output runs/kernels

kernels-sm_90.csv has a row for each kernel, pass, precision and tile, at the sizes of the standard network, and for
inverted attention, EM and variational Bayes at those of their networks (self-attention launches the kernels of dynamic
routing): registers, bytes spilled, shared memory, and the instructions of a warp in its longest loop.
kernels-launches.csv has the launches of a forward and a backward pass of dynamic routing, and the bytes of the tensors
that they read or write; step-launches.csv those of the forward and backward pass of a training step of `capsnet` with
its decoder in float32, and of parts of it, beside those of PyTorch's operators in place of what is fused.
They belong into a commit that changes a kernel: the difference shows what the change does. Times are the benchmark's,
on a GPU.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Launches(TorchDispatchMode):
    """Notes the bytes of the tensors of each operator that computes; that is one launch on a GPU, near enough."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        given, made = tree_leaves((args, kwargs)), tree_leaves(result)
        storages = {t.untyped_storage()._cdata for t in given if isinstance(t, Tensor)}
        is_view = not operator._schema.is_mutable and all(
            t.untyped_storage()._cdata in storages for t in made if isinstance(t, Tensor)
        )
        # Routing's launches are noted where it launches them.
        if not is_view and "empty" not in operator.name() and "dynamic_routing" not in operator.name():
            self.note(tuple(t for t in (*given, *made) if isinstance(t, Tensor)))
        return result

    def note(self, tensors: tuple[Tensor, ...]) -> None:
        self.found.append(sum(t.numel() * t.element_size() for t in tensors))


def parts_of_a_step(batch_size: int) -> dict[str, Callable[[], object]]:
    """Forward and backward pass of a step of `capsnet`, and of parts of it, on the meta device."""
    import capszoo
    from capszoo.engine.task import CapsuleTask
    from capszoo.kernels import centering, class_scores
    from capszoo.kernels.dispatch import triton_routing as routing

    with torch.device("meta"):
        model = capszoo.create_model("capsnet", decoder=True).to(memory_format=torch.channels_last)
        images = torch.empty(batch_size, 1, 28, 28).contiguous(memory_format=torch.channels_last)
        labels = torch.empty(batch_size, dtype=torch.long)
    features = model.forward_features(images).detach().requires_grad_()
    capsules, lengths = (t.detach().requires_grad_() for t in model.forward_capsules(images))
    poses, (conv, classes) = model.to_capsules(features).detach(), (model.primary_caps.conv, model.class_caps)

    def passes(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
        grad = torch.empty_like(function(x))
        return lambda: torch.autograd.grad(function(x), x, grad)

    def route() -> None:
        _, sums = routing.dynamic_routing(poses, classes.weight, classes.bias, 3, False)
        routing.dynamic_routing_backward(torch.empty_like(capsules), poses, classes.weight, sums, False)

    def step() -> None:
        route()
        CapsuleTask(model, verbose=False)(images, labels)["loss"].backward()
        model.zero_grad()

    return {
        "step": step,
        "filters of the primary capsules": passes(
            lambda weight: centering.scaled_kernels(weight, conv.centered, conv.scale), conv.weight
        ),
        "order of the primary capsules": passes(model.to_capsules, features),
        "routing": route,
        "lengths": passes(class_scores.capsule_lengths, capsules),
        "margin loss": passes(lambda x: class_scores.margin_losses(x, labels, 0.9, 0.1, 0.5).mean(), lengths),
    }


def step_rows() -> Iterator[dict]:
    from capszoo.kernels import centering, counts, dispatch

    for batch_size in (1, 16, 128):
        counted: dict[bool, dict[str, dict[str, int]]] = {False: {}, True: {}}
        for is_fused, row in counted.items():
            with (
                mock.patch.object(dispatch, "fuses", lambda *tensors, is_fused=is_fused: is_fused),
                # Of those that look on, one is the mode that counts.
                mock.patch.object(centering, "is_looked_at", lambda *tensors: False),
                Launches() as launches,
                counts.nothing_launched(launches.note),
            ):
                for part, function in parts_of_a_step(batch_size).items():
                    launches.found.clear()
                    function()
                    row[part] = _summed(launches.found)
        for part in counted[True]:
            unfused = {f"{name}_unfused": number for name, number in counted[False][part].items()}
            yield {"part": part, "batch_size": batch_size, **counted[True][part], **unfused}


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
    for name, found in (("kernels-launches", list(launch_rows())), ("step-launches", list(step_rows()))):
        write_csv(args.output / f"{name}.csv", list(found[0]), found)
    print(f"{len(rows)} compilations: {table}")
    return 0


if __name__ == "__main__":
    run(main)
