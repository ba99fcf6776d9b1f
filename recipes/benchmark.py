"""Measure routing, training steps and inference against plain PyTorch, in one run: time and peak memory.

    python recipes/benchmark.py                       # writes benchmark-cpu.csv where there is no GPU
    python recipes/benchmark.py --time-limit 500      # what matters most comes first, the rest is left out
    python recipes/benchmark.py --plot-only benchmark-cpu.csv
    python recipes/benchmark.py --subjects training layer --batch-sizes 32 --models efficient_capsnet capsnet_vb_mini

What is measured (--subjects; column `subject`):

    routing        forward and backward pass of the routing of each model; on a GPU in several precisions
    training       a training step as recipes/train.py takes it: losses, backward pass, Adam
    inference      a forward pass in inference mode
    layer          each part of a training step alone, forward and backward
    large          routing of 4608 capsules to 100 classes, where the plain form takes some 65 GiB (GPU only)
    epoch          an epoch of MNIST with capszoo.engine.Trainer, the second of two

The variants differ in the routing alone, but for direct and reference:

    fused          capszoo.kernels.dynamic_routing, as models use it
    plain          routing as public PyTorch codes write it: the broadcast product of all poses and matrices, votes and
                   logits stored, autograd through everything
    compiled       the same through torch.compile
    none           no routing: class capsules are a slice of the primary capsules. The floor that the convolutions set.
    unfused        of a family with another routing: its operators' references, which store the votes
    uniform        of such a family: its form with uniform couplings
    direct         as fused, with PyTorch's own convolutions (on a CPU)
    reference      a training step as public codes have it: as plain, PyTorch's own convolutions in its usual layout, an
                   Adam that is not fused, float32

Variants take turns, round by round, so that a drift of the machine's speed meets all of them; ratios are medians over
rounds of the ratio within a round. On a GPU the step of every variant is captured into a CUDA graph and replayed
(column `graph`), which leaves the time that launches from Python take to none of them. `peak_mib` is what one eager
step allocates at most on top of its inputs, parameters and optimizer state: by torch's CUDA allocator, or on a CPU by
the memory events of torch.profiler, which see torch's tensors but not the scratch memory of its libraries; what our
convolutions keep from step to step is added.

A variant that fails (no memory, no compiler) costs a line and a `note` in its row. The CSV is written after each group.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

import capszoo
from capszoo.benchmark.measuring import PRECISIONS, explain, measure, measure_epoch, release, right_precisions
from capszoo.benchmark.planning import SUBJECTS, Scope, plan
from capszoo.benchmark.reporting import COLUMNS, describe_machine, draw, print_summary, print_table
from capszoo.benchmark.variants import routes_dynamically, routing_shape
from capszoo.command_line import OptionParser, run
from capszoo.data import load_data
from capszoo.errors import DataError, UsageError, first_line
from capszoo.files import read_rows, write_csv
from capszoo.precision import choose_device, resolve_amp


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
    add("--output", metavar="FILE.csv", help="file to write; default benchmark-DEVICE.csv in the working directory")
    add("--plots", metavar="FOLDER", help="folder for the figures; default that of the CSV")
    add("--plot-only", metavar="FILE.csv", help="measure nothing, draw the figures of this file again")
    return parser


def on_gpu(args: argparse.Namespace) -> bool:
    return args.device.type == "cuda"


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
    capsnets = [name for name in capszoo.list_models("capsnet*") if routes_dynamically(name)]
    args.models = args.models or (capsnets if on_gpu(args) else ["capsnet", "capsnet_ws"])
    if args.rounds < 1 or min(args.batch_sizes + args.compile_batch_sizes) < 1:
        raise UsageError("--rounds, --batch-sizes and --compile-batch-sizes must be 1 or more")
    if "large" in args.subjects and not on_gpu(args):
        raise UsageError("--subjects large needs a GPU: leave it out, or choose --device cuda")
    for name in args.models:
        try:
            if not {"training", "inference", "layer", "epoch"} & {*args.subjects}:
                routing_shape(name)
            capszoo.create_model(name, device="meta")
        except ValueError as error:
            raise UsageError(str(error)) from None
    return args


def plot_again(args: argparse.Namespace) -> None:
    source = Path(args.plot_only)
    if not source.is_file():
        raise UsageError(f"--plot-only {args.plot_only!r} is no file: check the path")
    rows = read_rows(source, "give a file that this script wrote")
    if not rows or not set(COLUMNS) <= rows[0].keys() or not draw(rows, Path(args.plots or source.parent), source.stem):
        raise UsageError(f"--plot-only {args.plot_only!r} has nothing to draw: give a file that this script wrote")


def scope_of(args: argparse.Namespace) -> Scope:
    """What the options ask for."""
    return Scope(args.subjects, args.models, args.batch_sizes, args.compile_batch_sizes, args.device, args.amp)


def measure_all(args: argparse.Namespace, path: Path, machine: dict) -> list[dict]:
    """Measure group by group, as far as the time limit allows, and write the CSV after each."""
    started = time.monotonic()
    device, data, rows = args.device, None, []
    groups = plan(scope_of(args), right_precisions(device) if args.check else list(PRECISIONS))
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
    path = Path(args.output) if args.output else Path(f"benchmark-{short}.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = measure_all(args, path, machine)
    if not rows:
        print("nothing was measured")
        return 1
    print_table(rows)
    draw(rows, Path(args.plots or path.parent), path.stem)
    print(f"written to {path}")
    print_summary(rows, scope_of(args).headline)
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    run(main)
