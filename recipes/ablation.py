"""Measure what routing buys: each family with its routing, and with uniform couplings in its place.

    python recipes/ablation.py --data-dir data                             # recipes/results/routing-gain-mnist.csv
    python recipes/ablation.py --models capsnet_resnet_sr --dataset cifar10 --epochs 10 --seeds 1
    python recipes/ablation.py --set opt=adamw weight_decay=0.02           # more options of recipes/train.py

Both networks of a pair have the same options and seeds. A row is one training: accuracy on the test set of the weights
that are best on the validation split, the same on changed images (capszoo/engine/robustness.py says how), the seconds
of a training step, and the entropy of the couplings of the last iteration, 1 for equal ones. Rows that the table has
already are left out, so that a run goes on where it ended; a training that was stopped goes on from its last epoch in
the folder --work.
"""

import dataclasses
import hashlib
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

import capszoo
from capszoo import inspect
from capszoo.checkpoint import load_weights
from capszoo.command_line import (
    ExtendAction,
    OptionParser,
    StopSignal,
    check_results,
    key_value,
    make_console,
    results_folder,
    run,
)
from capszoo.contract import has_couplings
from capszoo.data import DataSplits, Loader
from capszoo.engine import Trainer, evaluate
from capszoo.engine.options import options_from
from capszoo.engine.robustness import ROBUSTNESS_COLUMNS, measure_robustness
from capszoo.engine.run import load_splits, make_trainer
from capszoo.errors import UsageError
from capszoo.files import read_rows, write_csv
from capszoo.precision import choose_device, device_name
from capszoo.registry import uniform_arguments

MODELS = ("capsnet_tiny", "efficient_capsnet")
COLUMNS = (
    "model",
    "couplings",
    "dataset",
    "epochs",
    "options",
    "seed",
    "top1",
    *ROBUSTNESS_COLUMNS,
    "val_top1",
    "step_ms",
    "entropy",
    "parameters",
    "device",
    "threads",
    "torch",
    "capszoo",
    "date",
)
# Those that tell a row from all others.
KEYS = COLUMNS[: COLUMNS.index("top1")]
# Options of recipes/train.py that this recipe has itself, and their names here.
OWN = {"model": "models", "dataset": "dataset", "data_dir": "data-dir", "epochs": "epochs", "seed": "seeds"}
# Images whose couplings are looked at.
LOOKED_AT = 500


def build_parser() -> OptionParser:
    parser = OptionParser(description="Measure what routing buys over uniform couplings.")
    add = parser.add_argument
    add("--models", nargs="+", default=list(MODELS), help="families with routing, of capszoo.list_models()")
    add("--dataset", default="mnist", help="data set")
    add("--data-dir", default="data", help="folder that has the data set")
    add("--epochs", type=int, default=5, help="passes over the training images")
    add("--seeds", type=int, default=3, help="seeds 0, 1 and so on of each network")
    add(
        "--set",
        nargs="*",
        action=ExtendAction,
        type=key_value,
        default=[],
        metavar="NAME=VALUE",
        help="more options of recipes/train.py, such as batch_size=64",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--work", default="runs/ablation", metavar="FOLDER", help="folder of the trainings that are not finished")
    add("--results", metavar="FILE.csv", help="the table; default routing-gain-DATASET.csv among the results")
    return parser


def plan(args: Any) -> list[dict[str, Any]]:
    """Rows to measure, without their results; routing and uniform couplings of a seed one after the other."""
    more = " ".join(f"{name}={value}" for name, value in sorted(args.set))
    rows = []
    for model in args.models:
        uniform_arguments(model)  # refuses a model without before anything is trained
        for seed in range(args.seeds):
            for couplings in ("routing", "uniform"):
                row = (model, couplings, args.dataset, args.epochs, more, seed)
                rows.append(dict(zip(KEYS, row, strict=True)))
    return rows


def folder_of(row: dict[str, Any], work: str) -> Path:
    """Where the training of a row goes on until the row is in the table: a folder for each set of options."""
    dataset = Path(row["dataset"])
    options = hashlib.sha256(f"{dataset.absolute()} {row['options']}".encode()).hexdigest()[:8]
    names = (row["model"], row["couplings"], dataset.name, row["epochs"], row["seed"], options)
    return Path(work) / "-".join(map(str, names))


def measure(row: dict[str, Any], args: Any, data: DataSplits, device: torch.device, stop: StopSignal) -> dict | None:
    """Train as a row says, and complete it; None if stopped."""
    uniform = uniform_arguments(row["model"]) if row["couplings"] == "uniform" else {}
    given = dict(args.set)
    model_kwargs = {**given.pop("model_kwargs", {}), **uniform}
    values = {key: row[key] for key in ("model", "dataset", "epochs", "seed")}
    values = {"amp": "none", "decoder": None, **values, **given, "model_kwargs": model_kwargs}
    folder = folder_of(row, args.work)
    folder.mkdir(parents=True, exist_ok=True)
    trainer: Trainer = make_trainer(options_from(values, "--set"), data, device, folder, should_stop=stop)
    trainer.resume()
    if not trainer.fit():
        return None
    load_weights(trainer.task.kept_model, folder / "best.safetensors")
    model, steps = trainer.task.kept_model, 0
    for epoch in range(trainer.policy.epochs):
        steps += -(-len(data.train) // trainer.policy.batch_size(epoch))
    loader = Loader(data.test, 250, device)
    found = {name: round(value, 4) for name, value in measure_robustness(model, loader).items()}
    entropy = ""
    if has_couplings(model):
        images, _ = next(iter(Loader(data.test, LOOKED_AT, device, shuffle=True)))
        entropy = round(float(inspect.coupling_entropy(model, images)[-1]), 4)
    return {
        **row,
        "top1": round(evaluate(trainer.task, loader).top1, 4),
        **found,
        "val_top1": "" if trainer.best["eval_top1"] is None else round(trainer.best["eval_top1"], 4),
        "step_ms": round(1000 * trainer.position.total_seconds / steps, 2),
        "entropy": entropy,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "capszoo": capszoo.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def main(argv: list[str] | None = None) -> int:
    args, _ = build_parser().parse(argv)
    console, device = make_console(), choose_device(args.device)
    path = Path(args.results or results_folder() / f"routing-gain-{Path(args.dataset).name}.csv")
    for name in OWN.keys() & {name for name, _ in args.set}:
        raise UsageError(f"--set {name}=... is an option of this recipe: give it as --{OWN[name]}")
    done = read_rows(path, "mend or delete it") if path.exists() else []
    keys = {tuple(str(row[key]) for key in KEYS) for row in done}
    missing = [row for row in plan(args) if tuple(str(row[key]) for key in KEYS) not in keys]
    if not missing:
        console.print(f"{path} has all of these rows")
        return 0
    check_results(path)
    data = load_splits(options_from({**dict(args.set), "dataset": args.dataset, "data_dir": args.data_dir}, "--set"))
    with StopSignal() as stop:
        for row in missing:
            result = measure(row, args, dataclasses.replace(data), device, stop)
            if result is None:
                console.print("stopped and saved: the same command goes on")
                return stop.exit_code
            done.append(result)
            write_csv(path, COLUMNS, done)
            shutil.rmtree(folder_of(row, args.work))
            console.print(
                " ".join(f"{key}={done[-1][key]}" for key in ("model", "couplings", "seed", "top1", "step_ms"))
            )
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    run(main)
