"""Measure routing, training steps and inference against plain PyTorch, in one run: time and peak memory.

    python recipes/benchmark.py                       # writes recipes/results/benchmark-cpu.csv where there is no GPU
    python recipes/benchmark.py --time-limit 500      # what matters most comes first, the rest is left out
    python recipes/benchmark.py --plot-only recipes/results/benchmark-cpu.csv

What is measured (--subjects; column `subject`):

    routing        forward and backward pass of the routing of each model; on a GPU in several precisions
    training       a training step as recipes/train.py takes it: losses, backward pass, Adam
    inference      a forward pass in inference mode
    layer          each part of a training step alone, forward and backward
    large          routing of 4608 capsules to 100 classes, where the plain form takes some 65 GiB (GPU only)
    epoch          an epoch of MNIST with capszoo.engine.Trainer, the second of two

The variants differ in the routing alone:

    fused          capszoo.kernels.dynamic_routing, as models use it
    plain          routing as public PyTorch codes write it: the broadcast product of all poses and matrices, votes and
                   logits stored, autograd through everything
    compiled       the same through torch.compile
    none           no routing: class capsules are a slice of the primary capsules. The floor that the convolutions set.

Variants take turns, round by round, so that a drift of the machine's speed meets all of them; ratios are medians over
rounds of the ratio within a round. On a GPU the step of every variant is captured into a CUDA graph and replayed
(column `graph`), which leaves the time that launches from Python take to none of them. `peak_mib` is what one eager
step allocates at most on top of its inputs, parameters and optimizer state: by torch's CUDA allocator, or on a CPU by
the memory events of torch.profiler, which see torch's tensors but not the scratch memory of its libraries.

A variant that fails (no memory, no compiler) costs a line and a `note` in its row. The CSV is written after each group.
"""

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import capszoo
from capszoo.command_line import OptionParser, results_folder, run
from capszoo.data import DataSplits, load_data
from capszoo.engine import Trainer
from capszoo.engine.task import CapsuleTask
from capszoo.errors import DataError, UsageError, first_line
from capszoo.files import read_rows, write_csv
from capszoo.kernels import dynamic_routing
from capszoo.layers import capsule_lengths
from capszoo.losses import margin_loss, reconstruction_loss
from capszoo.plots import plot_layers, plot_memory, plot_speedup
from capszoo.policies import create_policy
from capszoo.precision import autocast, choose_device, device_name, resolve_amp

SUBJECTS = ("routing", "training", "inference", "layer", "large", "epoch")
COLUMNS = (
    "subject", "model", "layer", "batch_size", "precision", "variant", "graph", "rounds", "median_ms", "p20_ms",
    "p80_ms", "ratio_to_fused", "images_per_second", "peak_mib", "peak_ratio_to_fused", "note", "device", "threads",
    "torch", "triton", "capszoo",
)  # fmt: skip
PRECISIONS = {
    "float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
LARGE = (4608, 4608, 8, 100, 16)  # I, T, K, J, D
WARM_UP = 3
# A round repeats a step for so long, so that neither the clock nor the start of the first replay shows.
ROUND_MS = 10.0


class Group(NamedTuple):
    """What is timed in turns: the variants of one step."""

    facts: dict  # the columns that all rows share
    makers: dict[str, Callable[[], Callable]]  # by variant: makes a step that is ready to be called
    graph: bool

    @property
    def name(self) -> str:
        return " ".join(str(value) for value in self.facts.values() if value != "")


# ---- variants of routing ----


def plain_dynamic_routing(x: Tensor, weight: Tensor, bias: Tensor, num_iters: int = 3) -> Tensor:
    """Routing as public PyTorch codes write it, with their [B, I, K, J*D] product in memory.

    Shapes as in :func:`capszoo.kernels.dynamic_routing`.
    """
    num_types, _, num_classes, class_dim = weight.shape
    matrices = weight.repeat_interleave(x.shape[1] // num_types, dim=0).flatten(2)
    votes = (x[:, :, :, None] * matrices[None]).sum(dim=2).unflatten(2, (num_classes, class_dim))
    logits = torch.zeros_like(votes[..., 0])
    for iteration in range(num_iters):
        couplings = logits.softmax(dim=2)
        s = (couplings[..., None] * votes).sum(dim=1) + bias
        square = s.square().sum(dim=2, keepdim=True)
        v = square / (1 + square) * s / (square.sqrt() + 1e-8)
        if iteration < num_iters - 1:
            logits = logits + (votes * v[:, None]).sum(dim=3)
    return v


def plain_bytes(batch_size: int, shape: tuple[int, ...], backward: bool = True, size: int = 4) -> int:
    """About the peak of :func:`plain_dynamic_routing`: its products, K times the size of the votes, and votes."""
    capsules, _, caps_dim, num_classes, class_dim = shape
    votes = batch_size * capsules * num_classes * class_dim * size
    return votes * (2 * caps_dim + 3 if backward else caps_dim + 1)


def no_routing(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Class capsules cut from the primary capsules."""
    num_classes, class_dim = bias.shape
    return x.flatten(1)[:, : num_classes * class_dim].unflatten(1, (num_classes, class_dim)) + bias


class Routing(nn.Module):
    """A routing function in the place of a model's routing."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.function(x, weight, bias)


def routing_function(variant: str) -> Callable:
    if variant == "compiled":
        return torch.compile(plain_dynamic_routing, fullgraph=True, dynamic=False)
    return {"fused": dynamic_routing, "plain": plain_dynamic_routing, "none": no_routing}[variant]


def routing_shape(name: str) -> tuple[int, ...]:
    """I, T, K, J, D of a model."""
    caps = capszoo.create_model(name, device="meta").class_caps
    return caps.num_capsules, *caps.weight.shape


def require_memory(variant: str, bytes_needed: int, device: torch.device) -> None:
    """Fail before the plain form fills the device; a CPU, whose free memory is not known, is left to try."""
    if variant != "plain" or device.type != "cuda":
        return
    free = torch.cuda.mem_get_info(device)[0]
    if bytes_needed > free:
        raise torch.OutOfMemoryError(f"needs some {bytes_needed >> 30} GiB, {free >> 30} GiB are free")


# ---- the steps that are timed; each function returns one, ready to be called ----


def make_model(
    name: str, variant: str, batch_size: int, device: torch.device, decoder: bool = True
) -> tuple[nn.Module, Tensor, Tensor]:
    """A model with the routing of a variant, images and labels."""
    require_memory(variant, plain_bytes(batch_size, routing_shape(name), backward=decoder), device)
    torch.manual_seed(0)
    model = capszoo.create_model(name, decoder=decoder).to(device, memory_format=torch.channels_last)
    if variant != "fused":
        model.class_caps.routing = Routing(routing_function(variant))
    images = torch.rand(batch_size, model.in_chans, *model.img_size, device=device)
    return model, images, torch.randint(model.num_classes, (batch_size,), device=device)


def make_optimizer(model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3, fused=True, capturable=device.type == "cuda")


def routing_step(
    shape: tuple[int, ...], dtype: torch.dtype, variant: str, batch_size: int, device: torch.device
) -> Callable:
    """Forward and backward pass of routing, for poses and matrices of type `dtype`."""
    require_memory(variant, plain_bytes(batch_size, shape, size=dtype.itemsize), device)
    torch.manual_seed(0)
    capsules, types, caps_dim, num_classes, class_dim = shape
    x = torch.randn(batch_size, capsules, caps_dim, device=device).to(dtype).requires_grad_()
    weight = torch.randn(types, caps_dim, num_classes, class_dim, device=device).mul_(0.1).to(dtype).requires_grad_()
    bias = torch.full((num_classes, class_dim), 0.1, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(batch_size, num_classes, class_dim, device=device).to(dtype)
    route = routing_function(variant)
    return lambda: torch.autograd.grad(route(x, weight, bias), [x, weight, bias], grad)


def training_step(name: str, amp: torch.dtype | None, variant: str, batch_size: int, device: torch.device) -> Callable:
    """A training step as recipes/train.py takes it: losses, backward pass, Adam."""
    model, images, labels = make_model(name, variant, batch_size, device)
    task = CapsuleTask(model, device=device, verbose=False)
    optimizer = make_optimizer(model, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)

    def step() -> None:
        with autocast(device, amp):
            loss = task(images, labels)["loss"]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        # At the end, so that a step starts without gradients and its peak memory counts them.
        optimizer.zero_grad(set_to_none=True)

    return step


def inference_step(name: str, amp: torch.dtype | None, variant: str, batch_size: int, device: torch.device) -> Callable:
    """A forward pass in inference mode."""
    model, images, _ = make_model(name, variant, batch_size, device, decoder=False)
    model.eval()

    @torch.inference_mode()
    def step() -> None:
        with autocast(device, amp):
            model(images)

    return step


LAYERS = ("conv1", "primary_caps", "squash", "routing", "losses", "decoder", "optimizer")


def layer_step(
    name: str, layer: str, amp: torch.dtype | None, variant: str, batch_size: int, device: torch.device
) -> Callable:
    """Forward and backward pass of one part of a training step, on what the parts before it give."""
    model, images, labels = make_model(name, variant, batch_size, device)
    if layer == "optimizer":
        optimizer = make_optimizer(model, device)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        return optimizer.step

    primary = model.primary_caps
    parts = {
        "conv1": (lambda x: model.act1(model.conv1(x)), model.conv1),
        "primary_caps": (primary.conv, primary.conv),
        "squash": (lambda x: primary.to_capsules(primary.squash_map(x)), None),
        "routing": (model.class_caps, model.class_caps),
        "decoder": (lambda x: model.decoder(x, labels), model.decoder),
    }
    inputs = [images]
    with torch.no_grad(), autocast(device, amp):
        for part, (function, _) in parts.items():
            if part == layer:
                break
            inputs = [function(inputs[0]), *inputs]
    if layer == "losses":  # inputs are now the drawn images, the class capsules and what came before
        inputs, module = inputs[:2], None

        def function(drawn: Tensor, capsules: Tensor) -> Tensor:
            return margin_loss(capsule_lengths(capsules), labels) + 0.0005 * reconstruction_loss(drawn, images)
    else:
        inputs, (function, module) = inputs[:1], parts[layer]
    inputs = [tensor.detach().requires_grad_(layer != "conv1") for tensor in inputs]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    wanted += [] if module is None else module.parameters()
    with torch.no_grad(), autocast(device, amp):
        grad = torch.ones_like(function(*inputs))

    def step() -> None:
        with autocast(device, amp):
            out = function(*inputs)
        torch.autograd.grad(out, wanted, grad)

    return step


# ---- measuring ----


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Allow products in TF32 for `precision` 'tf32'. This setting keeps torch's older and newer ones in agreement;
    torch.compile raises an error where they differ."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def release(device: torch.device) -> None:
    """Give back the memory of what is no longer used. Raises an error where the device no longer works."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def time_ms(step: Callable, repeats: int, device: torch.device) -> float:
    """Milliseconds a step takes, mean over `repeats`."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    return 1000 * (time.perf_counter() - begin) / repeats


def peak_bytes(step: Callable, device: torch.device) -> int:
    """Most bytes that torch holds during a step beyond those it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    # One event for each allocation (positive) and release (negative) of memory allocated since the profiler started.
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def prepare(make: Callable[[], Callable], device: torch.device, graph: bool) -> tuple[Callable, dict]:
    """Make a step, run it until nothing is tuned or compiled any more, and capture it where that is wanted."""
    step = make()
    for _ in range(WARM_UP):
        step()
    facts = {"peak_mib": peak_bytes(step, device) / 2**20, "graph": 0}
    if graph:
        try:
            # On the stream of the capture, so that nothing there is done for the first time.
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    step()
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()  # the capture has a memory pool of its own
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=stream):
                step()
            captured.replay()
            torch.cuda.synchronize(device)
        except Exception as error:
            facts["note"] = f"timed without graph: {explain(error)}"
            step()
        else:
            # A graph does not keep the parameters that it was captured with; the step does.
            return (lambda keep=step: captured.replay()), {**facts, "graph": 1}
    return step, facts


def explain(error: Exception) -> str:
    """An error in one line of 120 characters at most; torch's first lines often do not say what happened."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]


def measure(group: Group, rounds: int, device: torch.device) -> list[dict]:
    """Time the steps of all variants in turns; a variant that fails gets a row with a note."""
    facts = group.facts
    rows = {variant: {**facts, "variant": variant, "graph": 0, "rounds": 0, "note": ""} for variant in group.makers}
    steps: dict[str, Callable] = {}
    times: dict[str, list[float]] = {}
    repeats: dict[str, int] = {}

    def start(variant: str) -> None:
        step, found = prepare(group.makers[variant], device, group.graph)
        rows[variant].update(found)
        repeats[variant] = max(1, min(1000, math.ceil(ROUND_MS / max(time_ms(step, 1, device), 1e-3))))
        steps[variant], times[variant] = step, []

    def take_turn(variant: str) -> None:
        times[variant].append(time_ms(steps[variant], repeats[variant], device))

    def attempt(action: Callable[[str], None], variant: str) -> None:
        try:
            action(variant)
            return
        except Exception as error:
            rows[variant]["note"] = explain(error)
            print(f"{group.name} {variant}: {rows[variant]['note']}")
            steps.pop(variant, None)
        release(device)  # only here, where the error and its traceback hold no more tensors

    with float32_products(facts["precision"]):
        for variant in group.makers:
            attempt(start, variant)
        for _ in range(rounds):
            for variant in list(steps):
                attempt(take_turn, variant)
    for variant in steps:
        rows[variant].update(summarise(times[variant], times["fused"] if "fused" in steps else None))
        rows[variant]["images_per_second"] = digits(1000 * facts["batch_size"] / rows[variant]["median_ms"])
    ours = rows["fused"].get("peak_mib")
    for row in rows.values():
        if "peak_mib" in row:
            row["peak_ratio_to_fused"] = digits(row["peak_mib"] / ours) if ours else None
            row["peak_mib"] = digits(row["peak_mib"])
    return list(rows.values())


def summarise(values: list[float], fused: list[float] | None) -> dict:
    ordered = sorted(values)
    summary = {
        "rounds": len(values),
        "median_ms": digits(statistics.median(values)),
        "p20_ms": digits(ordered[len(ordered) // 5]),
        "p80_ms": digits(ordered[-1 - len(ordered) // 5]),
    }
    if fused is not None:
        summary["ratio_to_fused"] = digits(statistics.median(a / b for a, b in zip(values, fused, strict=True)))
    return summary


def digits(value: float) -> float:
    return float(f"{value:.5g}")


def measure_epoch(facts: dict, data: DataSplits, amp: torch.dtype | None, device: torch.device) -> list[dict]:
    """Train two epochs as recipes/train.py does; the second has nothing left to tune or compile."""
    model, _, _ = make_model(facts["model"], "fused", 1, device)
    task = CapsuleTask(model, device=device, verbose=False)
    policy = create_policy("fixed", lr=1e-3, batch_size=facts["batch_size"], epochs=2, num_images=len(data.train))
    trainer = Trainer(task, make_optimizer(model, device), policy, data.train, device=device, amp=amp, translate=2)
    trainer.fit()
    second = trainer.history[1]
    return [{
        **facts,
        "variant": "fused",
        "graph": int(trainer.step.cuda_graphs),
        "rounds": 1,
        "median_ms": digits(1000 * second["epoch_seconds"]),
        "images_per_second": digits(second["images_per_second"]),
    }]  # fmt: skip


def check_same_numbers(device: torch.device, precision: str) -> None:
    """Refuse to time a wrong result: our routing must agree with the plain one before they race.

    Raises:
        ArithmeticError: If it does not.
    """
    bound = {"float32": 1e-3, "tf32": 2e-2}.get(precision, 5e-2)
    for types in (72, 8):  # a matrix for each capsule, and shared ones
        torch.manual_seed(0)
        shapes = (20, 72, 8), (types, 8, 10, 16), (10, 16)
        tensors = [torch.randn(s).mul_(0.1 if i else 1).to(device, PRECISIONS[precision]) for i, s in enumerate(shapes)]
        results = []
        for route, dtype in ((dynamic_routing, PRECISIONS[precision]), (plain_dynamic_routing, torch.float64)):
            inputs = [t.to(dtype).requires_grad_() for t in tensors]
            with float32_products(precision):
                v = route(*inputs)
                results.append([v, *torch.autograd.grad(v.square().sum(), inputs)])
        for what, ours, plain in zip(("v", "dx", "dweight", "dbias"), *results, strict=True):
            error = float((ours.detach().double() - plain.detach()).norm() / plain.detach().norm())
            if not error < bound:
                raise ArithmeticError(f"{what} of our routing is off by {error:.1e} in {precision}, T={types}")


# ---- what to measure, in which order ----


def plan(args: argparse.Namespace, precisions: list[str]) -> list[Group]:
    """All groups, the most important first: the time limit cuts at the end."""
    size = headline(args)
    others = [other for other in args.batch_sizes if other != size]
    first = [name for name in args.models if name in ("capsnet", "capsnet_ws")] or args.models[:2]
    rest = [name for name in args.models if name not in first]
    names = first + rest
    order = [
        *(("routing", name, size) for name in names),
        *(("training", name, size) for name in first),
        ("large", "large", 128),
        *((subject, name, size) for subject in ("layer", "epoch") for name in names),
        *(("inference", name, size) for name in first),
        *(("routing in other ways", name, size) for name in names),
        *((subject, name, size) for name in rest for subject in ("training", "inference")),
        *((subject, name, other) for name in names for other in others for subject in SUBJECTS[:3]),
    ]
    wanted = {*args.subjects, *(["routing in other ways"] if "routing" in args.subjects and on_gpu(args) else [])}
    return [group for place in order if place[0] in wanted for group in make_groups(*place, args, precisions)]


def make_groups(
    subject: str, name: str, batch_size: int, args: argparse.Namespace, precisions: list[str]
) -> Iterator[Group]:
    """The groups at one place of the order."""
    graph, device, amp = on_gpu(args), args.device, args.amp
    mode = "float32" if amp is None else str(amp).removeprefix("torch.")
    compiled = ["compiled"] if batch_size in args.compile_batch_sizes else []

    def group(subject: str, precision: str, make: Callable | None, variants: list[str], layer="", graph=graph) -> Group:
        facts = {"subject": subject, "model": name, "layer": layer, "batch_size": batch_size, "precision": precision}
        return Group(facts, {v: partial(make, v, batch_size, device) for v in variants}, graph)

    if subject == "routing":
        make = partial(routing_step, routing_shape(name), torch.float32)
        yield group(subject, "float32", make, ["fused", "plain", *compiled])
    elif subject == "large":
        # Without graphs: each holds memory of its own, and what plain and compiled take does not fit side by side.
        make = partial(routing_step, LARGE, torch.float32)
        yield group("routing", "float32", make, ["fused", "plain", *compiled], graph=False)
    elif subject == "routing in other ways":
        for precision in precisions:
            make = partial(routing_step, routing_shape(name), PRECISIONS[precision])
            yield group("routing", precision, make, ["fused", "plain"], graph=precision != "float32")
    elif subject == "training":
        make = partial(training_step, name, amp)
        yield group("training step", mode, make, ["fused", "plain", *compiled, "none"])
    elif subject == "inference":
        yield group(subject, mode, partial(inference_step, name, amp), ["fused", "plain", "none"])
    elif subject == "layer":
        for layer in LAYERS:
            variants = ["fused", "plain"] if layer == "routing" else ["fused"]
            yield group(subject, mode, partial(layer_step, name, layer, amp), variants, layer)
    else:
        yield group(subject, mode, None, [])  # what measure_epoch is for


def right_precisions(device: torch.device) -> list[str]:
    """The precisions in which our routing gives the right numbers here."""
    right = []
    for precision in PRECISIONS if device.type == "cuda" else ["float32"]:
        try:
            check_same_numbers(device, precision)
            right.append(precision)
        except Exception as error:
            print(f"routing in {precision} is not timed: {explain(error)}")
    if "float32" not in right:
        raise UsageError("our routing fails here or gives wrong numbers: nothing is timed, run tests/kernels")
    return right


# ---- reporting ----


def describe_machine(device: torch.device) -> dict:
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = ""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
        "capszoo": capszoo.__version__,
    }


def print_table(rows: list[dict]) -> None:
    titles = {
        "subject": "subject", "model": "model", "batch_size": "batch", "precision": "precision", "variant": "variant",
        "graph": "graph", "median_ms": "ms", "ratio_to_fused": "ratio", "images_per_second": "img/s",
        "peak_mib": "peak MiB", "peak_ratio_to_fused": "ratio", "note": "note",
    }  # fmt: skip
    title = f"{rows[0]['device']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for key, heading in titles.items():
        left = key in ("subject", "model", "precision", "variant", "note")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True, max_width=20)
    for row in rows:
        shown = {**row, "subject": row["layer"] or row["subject"]}
        table.add_row(*(str(shown.get(key, "")) for key in titles))
    # Through a pipe rich would assume 80 columns.
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)


def print_summary(rows: list[dict], batch_size: int) -> None:
    """The ratios that the README quotes."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["batch_size"] == batch_size and row["subject"] in ("routing", "training step", "inference"):
            found.setdefault((row["subject"], row["model"], row["precision"], row["graph"]), {})[row["variant"]] = row
    for (subject, model, precision, graph), variants in found.items():
        ratios = [
            f"{variant}/fused {row['ratio_to_fused']:.3g}"
            for variant, row in variants.items()
            if variant in ("plain", "compiled") and "ratio_to_fused" in row
        ]
        if "ratio_to_fused" in variants.get("none", {}):
            ratios.append(f"fused/none {1 / variants['none']['ratio_to_fused']:.3g}")
        if variants.get("plain", {}).get("peak_ratio_to_fused"):
            ratios.append(f"peak plain/fused {variants['plain']['peak_ratio_to_fused']:.3g}")
        if ratios:
            how = f"{precision}, graph" if graph else precision
            print(f"{subject} {model} at batch {batch_size}, {how}: {', '.join(ratios)}")


def draw(rows: list[dict], folder: Path, stem: str) -> int:
    """Draw all figures that the rows are enough for; return their number."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = 0
    for name, plot in {"speedup": plot_speedup, "memory": plot_memory, "layers": plot_layers}.items():
        path = folder / f"{stem}-{name}.png"
        try:
            plot(rows, path)
        except (ImportError, ValueError) as error:
            print(f"{path.name} is not drawn: {first_line(error)}")
        else:
            print(f"drawn {path}")
            drawn += 1
    return drawn


def build_parser() -> OptionParser:
    parser = OptionParser(description="Measure routing, training steps and inference against plain PyTorch.")
    add = parser.add_argument
    add("--models", nargs="+", help="models; default capsnet and capsnet_ws on a CPU, else all capsnet*")
    add("--batch-sizes", nargs="+", type=int, help="batch sizes; default 1 16 128 on a CPU, else 1 2 4 ... 1024")
    add("--compile-batch-sizes", nargs="*", type=int, default=[128], help="batch sizes at which torch.compile joins")
    add("--subjects", nargs="+", choices=SUBJECTS, help="default all, on a CPU all without large and epoch")
    add("--rounds", type=int, help="times that each variant is timed; default 7 on a CPU, else 15")
    add("--time-limit", type=float, metavar="SECONDS", help="start nothing new after so long; default no limit")
    add("--check", action=argparse.BooleanOptionalAction, default=True, help="refuse to time wrong numbers")
    add("--device", default="auto", help="auto, cpu, cuda ...")
    add("--amp", default="auto", choices=["auto", "none", "bf16", "fp16"], help="precision of whole models")
    add("--data-dir", default="data", help="folder that has MNIST, for the epoch")
    add("--output", metavar="FILE.csv", help="file to write; default recipes/results/benchmark-DEVICE.csv")
    add("--plots", metavar="FOLDER", help="folder for the figures; default that of the CSV")
    add("--plot-only", metavar="FILE.csv", help="measure nothing, draw the figures of this file again")
    return parser


def on_gpu(args: argparse.Namespace) -> bool:
    return args.device.type == "cuda"


def headline(args: argparse.Namespace) -> int:
    """The batch size that matters most: 128, as in the paper, if it is asked for."""
    return 128 if 128 in args.batch_sizes else max(args.batch_sizes)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read and check the options; what depends on the device gets its default."""
    args, _ = build_parser().parse(argv)
    args.device = choose_device(args.device)
    if on_gpu(args) and args.device.index is None:
        args.device = torch.device("cuda", torch.cuda.current_device())
    args.amp = resolve_amp(args.amp, args.device)
    args.rounds = (15 if on_gpu(args) else 7) if args.rounds is None else args.rounds
    args.batch_sizes = args.batch_sizes or ([2**i for i in range(11)] if on_gpu(args) else [1, 16, 128])
    args.subjects = args.subjects or (SUBJECTS if on_gpu(args) else SUBJECTS[:4])
    args.models = args.models or (capszoo.list_models("capsnet*") if on_gpu(args) else ["capsnet", "capsnet_ws"])
    if args.rounds < 1 or min(args.batch_sizes + args.compile_batch_sizes) < 1:
        raise UsageError("--rounds, --batch-sizes and --compile-batch-sizes must be 1 or more")
    if "large" in args.subjects and not on_gpu(args):
        raise UsageError("--subjects large needs a GPU: leave it out, or choose --device cuda")
    for name in args.models:
        try:
            routing_shape(name)
        except ValueError as error:
            raise UsageError(str(error)) from None
        except AttributeError:
            raise UsageError(f"model {name!r} has no routing to measure: choose one of capsnet*") from None
    return args


def plot_again(args: argparse.Namespace) -> None:
    source = Path(args.plot_only)
    if not source.is_file():
        raise UsageError(f"--plot-only {args.plot_only!r} is no file: check the path")
    rows = read_rows(source, "give a file that this script wrote")
    if not rows or not set(COLUMNS) <= rows[0].keys() or not draw(rows, Path(args.plots or source.parent), source.stem):
        raise UsageError(f"--plot-only {args.plot_only!r} has nothing to draw: give a file that this script wrote")


def measure_all(args: argparse.Namespace, path: Path, machine: dict) -> list[dict]:
    """Measure group by group, as far as the time limit allows, and write the CSV after each."""
    started = time.monotonic()
    device, data, rows = args.device, None, []
    groups = plan(args, right_precisions(device) if args.check else list(PRECISIONS))
    if "epoch" in args.subjects:
        try:
            data = load_data("mnist", args.data_dir, val_fraction=0)
        except DataError as error:
            print(f"no epoch is timed: {first_line(error)}")
            groups = [group for group in groups if group.makers]
    for place, group in enumerate(groups):
        seconds = time.monotonic() - started
        if args.time_limit is not None and seconds > args.time_limit:
            print(f"--time-limit: {len(groups) - place} of {len(groups)} groups of measurements are left out")
            break
        try:
            if group.makers:
                found = measure(group, args.rounds, device)
            else:
                found = measure_epoch(group.facts, data, args.amp, device)
        except Exception as error:
            found = [{**group.facts, "variant": "", "graph": 0, "rounds": 0, "note": explain(error)}]
            print(f"{group.name}: {explain(error)}")
        rows += [{**row, **machine} for row in found]
        write_csv(path, COLUMNS, rows)
        times = ", ".join(f"{row['variant']} {row['median_ms']} ms" for row in found if "median_ms" in row)
        print(f"[{seconds:.0f} s] {group.name}: {times or 'nothing'}")
        try:
            torch.compiler.reset()
            release(device)
        except Exception as error:
            print(f"{machine['device']} no longer works, stopped here: {explain(error)}")
            break
    return rows


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.plot_only:
        plot_again(args)
        return 0
    if on_gpu(args):
        torch.cuda.set_device(args.device)
        torch.backends.cudnn.benchmark = True
    machine = describe_machine(args.device)
    short = "".join(c if c.isalnum() else "-" for c in machine["device"].lower()) if on_gpu(args) else "cpu"
    path = Path(args.output) if args.output else results_folder() / f"benchmark-{short}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = measure_all(args, path, machine)
    if not rows:
        print("nothing was measured")
        return 1
    print_table(rows)
    draw(rows, Path(args.plots or path.parent), path.stem)
    print(f"written to {path}")
    print_summary(rows, headline(args))
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    run(main)
