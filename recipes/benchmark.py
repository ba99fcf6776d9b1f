"""Time routing and whole training steps against plain PyTorch, in one run.

    python recipes/benchmark.py        # writes recipes/results/benchmark-cpu.csv on a machine without GPU

Variants take turns, round by round, so that a drift of the machine's speed meets all of them; ratios are medians over
rounds of the ratio within a round. The variants of a training step differ in the routing alone:

    fused    capszoo.kernels.dynamic_routing, as models use it
    plain    routing as public PyTorch codes write it: the broadcast product of all poses and matrices, votes and logits
             stored, autograd through everything
    none     no routing: class capsules are a slice of the primary capsules. The floor that the convolutions set.
"""
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import capszoo
from capszoo.command_line import OptionParser, UsageError, choose_device, run
from capszoo.engine import autocast, resolve_amp, write_csv
from capszoo.kernels import dynamic_routing
from capszoo.task import CapsuleTask

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "subject", "model", "batch_size", "amp", "variant", "rounds", "median_ms", "p20_ms", "p80_ms", "ratio_to_fused",
    "device", "threads", "torch", "capszoo",
)  # fmt: skip


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


class PlainRouting(nn.Module):
    """:func:`plain_dynamic_routing` in the place of a model's routing."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return plain_dynamic_routing(x, weight, bias)


class NoRouting(nn.Module):
    """Class capsules cut from the primary capsules, in the place of a model's routing."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        num_classes, class_dim = bias.shape
        return x.flatten(1)[:, : num_classes * class_dim].unflatten(1, (num_classes, class_dim)) + bias


VARIANTS: dict[str, type[nn.Module] | None] = {"fused": None, "plain": PlainRouting, "none": NoRouting}


def training_step(name: str, variant: str, batch_size: int, device: torch.device, amp: torch.dtype | None) -> Callable:
    """Return a function that takes one training step as recipes/train.py does: losses, backward pass, Adam."""
    torch.manual_seed(0)
    model = capszoo.create_model(name, decoder=True).to(device, memory_format=torch.channels_last)
    if VARIANTS[variant] is not None:
        model.class_caps.routing = VARIANTS[variant]()
    task = CapsuleTask(model, device=device, verbose=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    images = torch.rand(batch_size, *model_input(model), device=device)
    labels = torch.randint(10, (batch_size,), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, amp):
            loss = task(images, labels)["loss"]
        loss.backward()
        optimizer.step()

    return step


def model_input(model: nn.Module) -> tuple[int, int, int]:
    return (model.in_chans, *model.img_size)


def routing_step(name: str, variant: str, batch_size: int, device: torch.device) -> Callable:
    """Return a function that takes the forward and backward pass of the routing of a model, in float32."""
    torch.manual_seed(0)
    caps = capszoo.create_model(name, device=device).class_caps
    x = torch.randn(batch_size, caps.num_capsules, caps.weight.shape[1], device=device, requires_grad=True)
    route = dynamic_routing if variant == "fused" else plain_dynamic_routing

    def step() -> None:
        grads = torch.autograd.grad(route(x, caps.weight, caps.bias).square().sum(), [x, caps.weight, caps.bias])
        assert all(grad is not None for grad in grads)

    return step


def check_same_numbers(device: torch.device) -> None:
    """Refuse to time a wrong result: both routings must agree before they race."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 72, 8), torch.randn(72, 8, 10, 16) * 0.1, torch.randn(10, 16) * 0.1
    x, weight, bias = (t.to(device).requires_grad_() for t in (x, weight, bias))
    both = [torch.autograd.grad((v := f(x, weight, bias)).square().sum(), [x, weight, bias]) + (v,)
            for f in (dynamic_routing, plain_dynamic_routing)]
    for ours, plain in zip(*both, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)


def race(steps: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Time each step once a round, in turns, after a warm-up; milliseconds by name."""
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(1000 * (time.perf_counter() - start))
    return times


def summarise(times: dict[str, list[float]], facts: dict) -> list[dict]:
    rows = []
    for variant, values in times.items():
        ordered = sorted(values)
        ratios = [value / ours for value, ours in zip(values, times["fused"], strict=True)]
        rows.append({
            **facts,
            "variant": variant,
            "rounds": len(values),
            "median_ms": round(statistics.median(values), 3),
            "p20_ms": round(ordered[len(ordered) // 5], 3),
            "p80_ms": round(ordered[-1 - len(ordered) // 5], 3),
            "ratio_to_fused": round(statistics.median(ratios), 3),
        })  # fmt: skip
    return rows


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def print_table(console: Console, rows: list[dict]) -> None:
    table = Table(title=f"{rows[0]['device']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}")
    for column in COLUMNS[:-4]:
        table.add_column(column, justify="left" if column in ("subject", "model", "variant") else "right")
    for row in rows:
        table.add_row(*(str(row[column]) for column in COLUMNS[:-4]))
    console.print(table)


def build_parser() -> OptionParser:
    parser = OptionParser(description="Time routing and training steps against plain PyTorch.")
    add = parser.add_argument
    add("--models", nargs="+", default=["capsnet", "capsnet_ws"], help="models to time")
    add("--batch-sizes", nargs="+", type=int, default=[128], help="batch sizes")
    add("--rounds", type=int, default=7, help="times that each variant is timed")
    add("--device", default="auto", help="auto, cpu, cuda ...")
    add("--amp", default="auto", choices=["auto", "none", "bf16", "fp16"], help="precision of the training steps")
    add("--output", metavar="FILE.csv", help="file to write; default recipes/results/benchmark-DEVICE.csv")
    return parser


def main(argv: list[str] | None = None) -> int:
    args, _ = build_parser().parse(argv)
    if args.rounds < 1 or min(args.batch_sizes) < 1:
        raise UsageError("--rounds and --batch-sizes must be 1 or more")
    console = Console(highlight=False, soft_wrap=True)
    device = choose_device(args.device)
    amp = resolve_amp(args.amp, device)
    check_same_numbers(device)
    machine = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "capszoo": capszoo.__version__,
    }
    rows = []
    for name in args.models:
        for batch_size in args.batch_sizes:
            precision = "none" if amp is None else str(amp).removeprefix("torch.")
            steps = {v: training_step(name, v, batch_size, device, amp) for v in VARIANTS}
            facts = {"subject": "training step", "model": name, "batch_size": batch_size, "amp": precision, **machine}
            rows += summarise(race(steps, args.rounds, device), facts)
            steps = {v: routing_step(name, v, batch_size, device) for v in ("fused", "plain")}
            facts.update(subject="routing forward+backward", amp="none")
            rows += summarise(race(steps, args.rounds, device), facts)
    short = "cpu" if device.type == "cpu" else "".join(c if c.isalnum() else "-" for c in machine["device"].lower())
    path = Path(args.output) if args.output else RESULTS / f"benchmark-{short}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, COLUMNS, rows)
    print_table(console, rows)
    console.print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    run(main)
