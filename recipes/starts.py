"""Measure which start of a network learns at which learning rate, batch size and data set.

    python recipes/starts.py --data-dir data                         # recipes/results/starts-cpu.csv
    python recipes/starts.py --data-dir data --policies              # each policy with its own options, instead
    python recipes/starts.py --sets shapes --starts plain default --lrs 0.01 --batch-sizes 16

Each row is a short training of `--model` from fresh weights at one learning rate of Adam (or under one policy), and its
accuracy on images that it was not trained on: of the training images, never of a test set. `saturated` is the share of
primary capsules longer than 0.99 at the end. `shapes` are four kinds of bright shapes drawn by a seed; `inverted_mnist`
is MNIST with black and white exchanged. Rows that the table has already are left out, so that a run goes on where it
ended.
"""

import argparse
import dataclasses
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import torch

import capszoo
from capszoo.command_line import OptionParser, check_results, make_console, results_folder, run
from capszoo.data import DataSplits, Split, load_data
from capszoo.data.loader import Loader, seeded_generator
from capszoo.engine import evaluate
from capszoo.engine.options import options_from
from capszoo.engine.run import make_trainer
from capszoo.engine.watch import measure_saturation
from capszoo.files import read_rows, write_csv
from capszoo.layers import fan_in_scale
from capszoo.policies import list_policies
from capszoo.precision import choose_device, device_name

# Whether images are normalised, keywords of the model, and whether its primary capsules are scaled without centring.
STARTS: dict[str, tuple[bool, dict[str, Any], bool]] = {
    "plain": (False, {"start": "plain"}, False),
    "normalized": (True, {"start": "plain"}, False),
    "scaled": (False, {}, True),
    "normalized, primary scaled": (True, {"conv1_scale": 1.0}, True),
    "normalized, scaled": (True, {}, True),
    "paper": (False, {"start": "paper"}, False),
    "normalized, paper": (True, {"start": "paper"}, False),
    "default": (True, {}, False),
}
SETS = ("mnist", "fashion_mnist", "cifar10", "shapes", "inverted_mnist")
# Steps of a row by its batch size, where the command line does not say.
STEPS = {1: 1000, 16: 200, 128: 60}
VALIDATION_IMAGES = 1000
COLUMNS = (
    "set",
    "start",
    "model",
    "policy",
    "lr",
    "batch_size",
    "images",
    "epochs",
    "seed",
    "precision",
    "top1",
    "chance",
    "saturated",
    "spread",
    "seconds",
    "device",
    "torch",
    "capszoo",
    "date",
)
# Those that tell a row from all others.
KEYS = COLUMNS[: COLUMNS.index("top1")]


def bright_shapes(count: int, kinds: int = 4, size: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw discs, crosses, squares and triangles on a bright ground of any colour, darker, with a little noise.

    Args:
        count: How many; kinds take turns.
        kinds: How many of the four kinds.
        size: Height and width, in pixels.
        seed: Decides colours, places, sizes and noise.

    Returns:
        Images uint8 ``[count, 3, size, size]`` and labels int64 ``[count]``.
    """
    generator = seeded_generator(seed)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.empty(*shape).uniform_(low, high, generator=generator)

    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    radius = uniform(0.2, 0.34, count, 1, 1)
    y, x = (axis - uniform(0.38, 0.62, count, 1, 1) for axis in (y, x))
    labels = torch.arange(count) % kinds
    masks = torch.stack(
        [
            x**2 + y**2 < radius**2,
            torch.minimum(x.abs(), y.abs()).lt(0.3 * radius) & torch.maximum(x.abs(), y.abs()).lt(radius),
            torch.maximum(x.abs(), y.abs()) < 0.85 * radius,
            (y < 0.7 * radius) & (y > 2 * x.abs() - radius),
        ]
    )[labels, torch.arange(count)]
    ground = uniform(0.6, 1, count, 3, 1, 1)
    images = torch.where(masks[:, None], ground - uniform(0.2, 0.6, count, 3, 1, 1), ground)
    images = images + 0.03 * torch.randn(images.shape, generator=generator)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


def open_set(name: str, data_dir: str) -> DataSplits:
    """A data set by name, or one of the two that are made here."""
    if name == "shapes":
        train, val = (
            Split(labels, images) for images, labels in (bright_shapes(360, seed=0), bright_shapes(400, seed=1))
        )
        return DataSplits(name, train, val, val, ["disc", "cross", "square", "triangle"], 4, 3, (32, 32))
    data = load_data("mnist" if name == "inverted_mnist" else _folder(name, data_dir), data_dir)
    if name == "inverted_mnist":
        for split in (data.train, data.val, data.test):
            split.images = 255 - split.images
    data.val = first(data.val, VALIDATION_IMAGES)
    return data


def _folder(name: str, data_dir: str) -> str:
    """A set that is not one of `load_data`'s names in its files there, but a folder of images in the data folder."""
    folder = Path(data_dir) / name
    return str(folder) if (folder / "train").is_dir() else name


def first(split: Split, count: int) -> Split:
    """The first images of a split in a fixed random order."""
    rows = torch.randperm(len(split), generator=seeded_generator(0))[:count]
    return Split(split.labels[rows], split.images[rows])


def measure(row: dict[str, Any], data: DataSplits, device: torch.device) -> dict[str, Any]:
    """Train as a row says, and complete it."""
    normalized, model_kwargs, only_scaled = STARTS[row["start"]]
    if only_scaled:
        conv = capszoo.create_model(row["model"], device="meta").primary_caps.conv
        model_kwargs = {**model_kwargs, "primary_scale": fan_in_scale(conv.weight[0].numel())}
    options = {key: row[key] for key in ("model", "seed", "policy", "epochs")}
    options.update(dataset=row["set"], start=model_kwargs.get("start", "default"), amp=row["precision"])
    options["model_kwargs"] = {key: value for key, value in model_kwargs.items() if key != "start"}
    if not normalized:
        options.update(mean=[0.0], std=[1.0])
    if row["lr"] != "default":
        options.update(lr=float(row["lr"]), batch_size=int(row["batch_size"]), warmup_steps=0)
    data.train = data.train if len(data.train) <= row["images"] else first(data.train, row["images"])
    val, data.val = data.val, None
    trainer = make_trainer(options_from(options), data, device)
    trainer.fit()
    data.val = val
    data.normalize(trainer.options.mean, trainer.options.std)
    evaluation = evaluate(trainer.task.model, Loader(val, 250, device), trainer.amp)
    images, _ = next(iter(Loader(val, 250, device)))
    saturation = measure_saturation(trainer.task.model, images)
    return {
        **row,
        "top1": round(evaluation.top1, 4),
        "chance": round(1 / data.num_classes, 4),
        "saturated": round(saturation.saturated, 4),
        "spread": round(saturation.spread, 4),
        "seconds": round(trainer.position.total_seconds, 1),
        "device": device_name(device),
        "torch": torch.__version__,
        "capszoo": capszoo.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def build_parser() -> OptionParser:
    parser = OptionParser(description="Measure which start of a network learns where.")
    add = parser.add_argument
    add("--sets", nargs="+", default=list(SETS), help=f"data sets: {', '.join(SETS)}, or what load_data knows")
    add("--data-dir", default="data", help="folder that has the data sets")
    add("--starts", nargs="+", default=list(STARTS), choices=list(STARTS), metavar="START", help=", ".join(STARTS))
    add("--model", default="capsnet_tiny", help="one of capszoo.list_models()")
    add("--lrs", nargs="+", type=float, default=[1e-4, 1e-3, 1e-2], help="learning rates of Adam")
    add("--batch-sizes", nargs="+", type=int, default=list(STEPS), help="images a step")
    add(
        "--steps",
        type=int,
        help=f"steps of each row; default {', '.join(f'{n} at batch {b}' for b, n in STEPS.items())}",
    )
    add("--policies", nargs="*", metavar="POLICY", help="policies with their own options, in place of fixed rates")
    add("--images", type=int, default=1000, help="with --policies: training images")
    add("--epochs", type=int, default=6, help="with --policies: epochs")
    add("--seeds", type=int, default=1, help="seeds 0, 1 and so on of each row")
    add("--amp", default="none", choices=["none", "bf16"], help="precision of the computation")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--results", default=str(results_folder() / "starts-cpu.csv"), metavar="FILE.csv", help="the table")
    return parser


def plan(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows to measure, without their results."""
    rows = []
    common = {"model": args.model, "precision": args.amp}
    if args.policies is not None:
        policies = args.policies or [policy for policy in list_policies() if policy != "lr_finder"]
        for name, start, policy, seed in itertools.product(args.sets, args.starts, policies, range(args.seeds)):
            rows.append(
                {
                    **common, "set": name, "start": start, "policy": policy, "lr": "default", "batch_size": "default",
                    "images": args.images, "epochs": args.epochs, "seed": seed,
                }
            )  # fmt: skip
        return rows
    for name, batch, start, lr, seed in itertools.product(
        args.sets, args.batch_sizes, args.starts, args.lrs, range(args.seeds)
    ):
        images = (args.steps or STEPS.get(batch, 200)) * batch
        rows.append(
            {
                **common, "set": name, "start": start, "policy": "fixed", "lr": f"{lr:g}", "batch_size": batch,
                "images": images, "epochs": 1, "seed": seed,
            }
        )  # fmt: skip
    return rows


def of_set(row: dict[str, Any], num_images: int) -> dict[str, Any]:
    """A row for a set of so many training images: of fewer than its steps take, more epochs."""
    images = min(num_images, row["images"])
    epochs = row["epochs"] if row["lr"] == "default" else max(1, round(row["images"] / images))
    return {**row, "images": images, "epochs": epochs}


def main(argv: list[str] | None = None) -> int:
    args, _ = build_parser().parse(argv)
    console = make_console()
    device, path = choose_device(args.device), Path(args.results)
    check_results(path)
    done = read_rows(path, "mend or delete it") if path.exists() else []
    keys = {tuple(str(row[key]) for key in KEYS) for row in done}
    for name, rows in itertools.groupby(plan(args), key=lambda row: row["set"]):
        data = open_set(name, args.data_dir)
        rows = [of_set(row, len(data.train)) for row in rows]
        for row in (row for row in rows if tuple(str(row[key]) for key in KEYS) not in keys):
            done.append(measure(row, dataclasses.replace(data), device))
            write_csv(path, COLUMNS, done)
            console.print(" ".join(f"{key}={done[-1][key]}" for key in COLUMNS[:12]))
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    run(main)
