"""Time and peak memory of steps: variants in turns, after a check that their numbers agree."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from capszoo.data import DataSplits
from capszoo.engine import Trainer
from capszoo.engine.memory import keep_freed_memory
from capszoo.engine.task import CapsuleTask
from capszoo.errors import UsageError
from capszoo.kernels import dynamic_routing
from capszoo.kernels.fourier_conv import release_scratch, scratch_bytes
from capszoo.policies import create_policy

from .steps import make_model, make_optimizer
from .variants import plain_dynamic_routing

PRECISIONS = {
    "float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
_WARM_UP = 3
# A round repeats a step for so long, so that neither the clock nor the start of the first replay shows.
_ROUND_MS = 10.0


class Group(NamedTuple):
    """What is timed in turns: the variants of one step."""

    facts: dict  # the columns that all rows share
    makers: dict[str, Callable[[], Callable]]  # by variant: makes a step that is ready to be called
    graph: bool

    @property
    def name(self) -> str:
        """What is measured, in a few words."""
        return " ".join(str(value) for value in self.facts.values() if value != "")


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
    release_scratch()
    for _ in range(_WARM_UP):
        step()
    # What convolutions keep from step to step counts as well.
    facts = {"peak_mib": (scratch_bytes() + peak_bytes(step, device)) / 2**20, "graph": 0}
    if graph:
        try:
            # On the stream of the capture, so that nothing there is done for the first time.
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
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
    keep_freed_memory(device=device)
    steps: dict[str, Callable] = {}
    times: dict[str, list[float]] = {}
    repeats: dict[str, int] = {}

    def start(variant: str) -> None:
        step, found = prepare(group.makers[variant], device, group.graph)
        rows[variant].update(found)
        repeats[variant] = max(1, min(1000, math.ceil(_ROUND_MS / max(time_ms(step, 1, device), 1e-3))))
        steps[variant], times[variant] = step, []

    def take_turn(variant: str) -> None:
        if device.type == "cpu":  # caches, and memory of the C library, are still those of the variant before
            steps[variant]()
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
    """Median and quantiles of the milliseconds of a variant, and its ratio to the fused one's."""
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
    """Five digits, which are more than a measurement has."""
    return float(f"{value:.5g}")


def measure_epoch(facts: dict, data: DataSplits, amp: torch.dtype | None, device: torch.device) -> list[dict]:
    """Train two epochs as recipes/train.py does; the second has nothing left to tune or compile."""
    keep_freed_memory(device=device)
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
