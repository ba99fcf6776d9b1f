"""Measure a checkpoint or shipped weights on a data set.

    python recipes/validate.py runs/NAME                                     # model and data set from the file's header
    python recipes/validate.py capsnet_ws.mnist --data-dir data              # shipped weights by name
    python recipes/validate.py runs/NAME/best.safetensors --dataset fashion_mnist --split val --robustness
    python recipes/validate.py --all --data-dir data --results-dir results   # all shipped weights, into tables
    python recipes/validate.py --all --also runs/cnn/best.safetensors        # and a file that is not shipped

`--all` writes a table for each data set, results-DATASET.csv. `param_count` and `macs` are those of the
class scores, without the decoder, and so is `images_per_second`; `top1_rotate_15` and the like are the accuracies on
changed images (capszoo/engine/robustness.py says how). Where images show several classes, top1 is the exact-match
accuracy (the fraction of images of which just those are predicted); measured, too, are the mean average precision, and
as `exact_top_k` the fraction of images whose k classes have the k highest scores. Where one class has twice the images
of another, the balanced accuracy (the mean of the classes' own) is printed. The margin loss has the margins that the
header of the weights names, the paper's where it names none; weights of the classes that training had are left out.
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import capszoo
from capszoo.command_line import OptionParser, make_table_console, run
from capszoo.contract import auxiliary_modules
from capszoo.data import Loader, Split
from capszoo.data.sources import check_data_dir
from capszoo.engine import CapsuleTask, Evaluation, evaluate
from capszoo.engine.criteria import read_criterion
from capszoo.engine.robustness import ROBUSTNESS_COLUMNS, measure_robustness
from capszoo.errors import UsageError
from capszoo.files import check_target, write_csv, write_json
from capszoo.opening import OpenedModel, open_model
from capszoo.precision import autocast, choose_device, resolve_amp
from capszoo.pretrained import image_statistics

# Of data sets whose images show several classes.
OF_SEVERAL = ("mean_average_precision", "exact_top_k")
# From this ratio of the largest class to the smallest on, the balanced accuracy is printed beside the accuracy.
UNBALANCED = 2
COLUMNS = (
    "model",
    "top1",
    "margin_loss",
    "reconstruction_error",
    "param_count",
    "param_count_with_decoder",
    "macs",
    "img_size",
    "images_per_second",
    *ROBUSTNESS_COLUMNS,
    "precision",
    "device",
    "torch",
    "capszoo",
    "date",
)


def build_parser() -> OptionParser:
    parser = OptionParser(description="Measure a checkpoint or shipped weights on a data set.")
    add = parser.add_argument
    add(
        "weights",
        nargs="?",
        help="a run folder, a safetensors file, or shipped weights such as capsnet_ws.mnist",
    )
    add("--all", action="store_true", help="measure all shipped weights and write the tables of results")
    add("--also", nargs="+", default=[], metavar="FILE", help="with --all: weights that are not shipped")
    add("--results-dir", default=".", help="with --all: folder of the tables")
    add("--model", help="model of the weights, where the file's header does not say it")
    add("--dataset", help="data set; default the one that the weights were trained on")
    add("--data-dir", default="data", help="folder that has the data set")
    add("--download", action="store_true", help="let torchvision download the data set into --data-dir")
    add("--follow-links", action="store_true", help="read what links out of an image folder lead to")
    add("--split", default="test", choices=["train", "val", "test"], help="images to measure on")
    add(
        "--val-fraction",
        type=float,
        help="part of the training images that is the validation split; default that of the weights' training, or 0.1",
    )
    add("--batch-size", type=int, default=256, help="images a step")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--amp", default="none", choices=["auto", "none", "bf16", "fp16"], help="precision of the computation")
    add("--workers", type=int, default=2, help="processes that read images, for sets too large for memory")
    add(
        "--robustness",
        action=argparse.BooleanOptionalAction,
        help="also measure on rotated, shifted and resized images; default only with --all",
    )
    add("--json", metavar="FILE", help="also write the measures to this file")
    return parser


def confusion_table(evaluation: Evaluation, class_names: list[str]) -> Table:
    """Counts of true class (rows) by predicted class (columns), and each class's accuracy."""
    table = Table(title="true class by predicted class", show_lines=False)
    table.add_column("", justify="right", style="bold")
    for name in class_names:
        table.add_column(name, justify="right", overflow="fold", min_width=_digits(evaluation))
    table.add_column("top1", justify="right", style="bold", min_width=6)
    for index, (name, row) in enumerate(zip(class_names, evaluation.confusion.tolist(), strict=True)):
        cells = [Text(str(n), style="bold") if i == index else (str(n) if n else ".") for i, n in enumerate(row)]
        table.add_row(name, *cells, f"{row[index] / sum(row):.4f}" if sum(row) else "-")
    return table


def _digits(evaluation: Evaluation) -> int:
    return len(str(int(evaluation.confusion.max())))


def has_room(evaluation: Evaluation, width: int) -> bool:
    """Whether the counts of all classes fit into so many columns of text, with some for the names of the rows."""
    return 24 + len(evaluation.confusion) * (_digits(evaluation) + 3) <= width


def accuracy_table(evaluation: Evaluation, class_names: list[str]) -> Table:
    """Each class's accuracy and what it is most often taken for, where there are too many for the counts of all."""
    table = Table(title="each class", show_lines=False)
    for name in ("class", "images", "top1", "most often taken for"):
        table.add_column(name, justify="right" if name in ("images", "top1") else "left", overflow="fold")
    for index, (name, row) in enumerate(zip(class_names, evaluation.confusion.tolist(), strict=True)):
        mistakes = [(0 if i == index else n, -i) for i, n in enumerate(row)]
        count, place = max(mistakes)
        taken_for = f"{class_names[-place]} ({count})" if count else "-"
        table.add_row(name, str(sum(row)), f"{row[index] / sum(row):.4f}" if sum(row) else "-", taken_for)
    return table


def is_unbalanced(evaluation: Evaluation) -> bool:
    """Whether some class has so many more images than another that the accuracy is mostly that class's."""
    counts = evaluation.confusion.sum(dim=1)
    return int(counts.max()) >= UNBALANCED * int(counts.min())


def class_table(evaluation: Evaluation, class_names: list[str]) -> Table:
    """Of each class, where images show several: how many show it, how many of them are found, and the precisions."""
    table = Table(title="each class", show_lines=False)
    table.add_column("", justify="right", style="bold")
    for name in ("images", "predicted", "both", "precision", "recall", "average precision"):
        table.add_column(name, justify="right")
    columns = zip(class_names, evaluation.class_confusion.tolist(), evaluation.average_precision.tolist(), strict=True)
    for name, ((_, extra), (missed, both)), average_precision in columns:
        images, predicted = missed + both, extra + both
        parts = (f"{both / total:.4f}" if total else "-" for total in (predicted, images))
        row = (str(images), str(predicted), str(both), *parts, f"{average_precision:.4f}" if images else "-")
        table.add_row(name, *row)
    return table


@torch.inference_mode()
def measure_speed(
    model: torch.nn.Module, split: Split, batch_size: int, device: torch.device, amp: torch.dtype | None
) -> float:
    """Images a second of the class scores: the median of eight batches, after one that is not counted."""
    model.eval()
    seconds = []
    images, _ = next(iter(Loader(split, batch_size, device)))
    for _ in range(9):
        start = time.perf_counter()
        with autocast(device, amp):
            model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return len(images) / statistics.median(seconds[1:])


def measure(
    opened: OpenedModel, name: str, split: Split, args: argparse.Namespace, device: torch.device, robustness: bool
) -> tuple[Evaluation, dict[str, Any]]:
    """Measure one model on the images of a split; the second value is its row in a table of results."""
    amp, model = resolve_amp(args.amp, device), opened.model
    criterion = read_criterion(opened.file, opened.header, opened.model)
    info = capszoo.model_info(model)
    model.to(device, memory_format=torch.channels_last)
    split.mean, split.std = image_statistics(model)  # of --all, models of other statistics share it

    def loader(with_parts: bool = False) -> Loader:
        return Loader(split, args.batch_size, device, num_workers=args.workers, with_parts=with_parts)

    evaluation = evaluate(CapsuleTask(model, criterion, device=device, verbose=False), loader(with_parts=True), amp)
    total = sum(p.numel() for p in model.parameters())
    auxiliary = [module for module in auxiliary_modules(model).values() if module is not None]
    decoder = sum(p.numel() for module in auxiliary for p in module.parameters())
    height, width = model.img_size
    row = {
        "model": name,
        "top1": evaluation.top1,
        **({} if evaluation.confusion is not None else {key: getattr(evaluation, key) for key in OF_SEVERAL}),
        "margin_loss": evaluation.loss,
        "reconstruction_error": evaluation.reconstruction_error,
        "param_count": total - decoder,
        "param_count_with_decoder": total,
        "macs": info.macs,
        "img_size": height if height == width else f"{height}x{width}",
        "images_per_second": round(measure_speed(model, split, args.batch_size, device, amp), 1),
        "precision": "float32" if amp is None else str(amp).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "capszoo": capszoo.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    if robustness:
        row.update(measure_robustness(model, loader(), amp))
    return evaluation, row


def open_data(opened: OpenedModel, dataset: str, args: argparse.Namespace) -> tuple[Split, list[str]]:
    """The images to measure on in the model's size, and the names of their classes."""
    more = {"download": args.download, "follow_links": args.follow_links, "val_fraction": args.val_fraction}
    return opened.load_split(dataset, args.data_dir, args.split, **more)


def measure_one(args: argparse.Namespace, console: Console) -> None:
    """Measure and print the weights on the command line."""
    device = choose_device(args.device)
    resolve_amp(args.amp, device)  # says what is impossible before anything is read
    opened = open_model(args.weights, model_name=args.model)
    name, dataset = opened.name, args.dataset or opened.dataset
    if dataset is None:
        raise UsageError(f"{args.weights!r} does not say what data set it was trained on: give --dataset")
    check_data_dir(dataset, args.data_dir)
    split, class_names = open_data(opened, dataset, args)
    result, row = measure(opened, name, split, args, device, bool(args.robustness))
    reconstruction = result.reconstruction_error
    accuracy = f"top1 {result.top1:.4f}"
    if split.multi_label:
        accuracy = f"exact match {result.top1:.4f}"
        if result.mean_average_precision is not None:
            accuracy += f"  mean average precision {result.mean_average_precision:.4f}"
        accuracy += f"  k longest {result.exact_top_k:.4f}"
    elif is_unbalanced(result):
        accuracy += f"  balanced accuracy {result.balanced_accuracy:.4f}"
    console.print(
        f"{name} on {dataset} {args.split} ({len(split):,} images)\n"
        f"{accuracy}  margin loss {result.margin_loss:.5f}  reconstruction error "
        + ("- (no decoder)" if reconstruction is None else f"{reconstruction:.3f}")
        + f"  {row['images_per_second']:.0f} img/s",
    )
    robustness = {key: row[key] for key in ROBUSTNESS_COLUMNS if key in row}
    for key, value in robustness.items():
        console.print(f"{key} {value:.4f}")
    table = (class_table if split.multi_label else confusion_table)(result, class_names)
    if not split.multi_label and not has_room(result, console.width):
        table = accuracy_table(result, class_names)
    console.print(table)
    if split.multi_label:
        precisions = [None if math.isnan(value) else value for value in result.average_precision.tolist()]
        by_class = {
            **{key: getattr(result, key) for key in OF_SEVERAL},
            "average_precision": dict(zip(class_names, precisions, strict=True)),
            "class_confusion": dict(zip(class_names, result.class_confusion.tolist(), strict=True)),
        }
    else:
        recall = [None if math.isnan(value) else value for value in result.recall.tolist()]
        by_class = {
            "balanced_accuracy": result.balanced_accuracy,
            "recall": dict(zip(class_names, recall, strict=True)),
            "confusion": result.confusion.tolist(),
        }
    if args.json:
        write_json(
            Path(args.json),
            {
                "weights": args.weights,
                "dataset": dataset,
                "split": args.split,
                "images": len(split),
                "top1": result.top1,
                "margin_loss": result.margin_loss,
                "reconstruction_error": reconstruction,
                **robustness,
                **by_class,
            },
        )


def measure_all(args: argparse.Namespace, console: Console) -> None:
    """Measure all shipped weights and the files of --also, and write a table for each data set."""
    device = choose_device(args.device)
    resolve_amp(args.amp, device)
    weights = [*capszoo.list_pretrained(), *args.also]
    if not weights:
        raise UsageError("no weights are shipped yet: give files with --also")
    loaded = []
    for argument in weights:
        opened = open_model(argument)
        name, dataset = opened.name, opened.dataset
        if dataset is None:
            raise UsageError(f"{argument!r} does not say what data set it was trained on: it belongs to no table")
        if name.endswith(f" {argument}"):  # a file: its folder tells it from others of the same model, if there are any
            name = opened.model.pretrained_cfg["architecture"]
            same = [other for _, other, other_dataset in loaded if (other, other_dataset) == (name, dataset)]
            name = f"{name} ({Path(argument).parent.name})" if same else name
        if args.dataset in (None, dataset):
            loaded.append((opened, name, dataset))
    if not loaded:
        raise UsageError(f"no weights are of the data set {args.dataset!r}: check --dataset")
    # All data first: what is missing is said before minutes of work.
    splits: dict[tuple, Split] = {}
    for opened, _, dataset in loaded:
        model = opened.model
        key = dataset, model.in_chans, model.img_size, model.num_classes
        if key not in splits:
            splits[key] = open_data(opened, dataset, args)[0]
    folder = Path(args.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for dataset in dict.fromkeys(dataset for _, _, dataset in loaded):
        rows = []
        for opened, name, _ in (entry for entry in loaded if entry[2] == dataset):
            model = opened.model
            split = splits[dataset, model.in_chans, model.img_size, model.num_classes]
            _, row = measure(opened, name, split, args, device, args.robustness is not False)
            console.print(f"{name} on {dataset} {args.split}: top1 {row['top1']:.4f}")
            rows.append(row)
        path = folder / f"results-{Path(dataset).name}.csv"
        columns = (*COLUMNS[:2], *OF_SEVERAL, *COLUMNS[2:]) if OF_SEVERAL[0] in rows[0] else COLUMNS
        write_csv(path, columns, sorted(rows, key=lambda row: (-row["top1"], row["model"])))
        console.print(f"{path}")


def main(argv: list[str] | None = None) -> int:
    args, given = build_parser().parse(argv)
    if args.all == (args.weights is not None):
        raise UsageError("give either weights (a file, or a name of capszoo.list_pretrained()), or --all")
    wrong = given & ({"json", "model", "split"} if args.all else {"also", "results_dir"})
    for key in sorted(wrong):
        does = "does not go with --all" if args.all else "needs --all"
        raise UsageError(f"--{key.replace('_', '-')} {does}: see --help")
    if args.json:
        check_target(args.json, "--json")
    console = make_table_console()
    if args.all:
        measure_all(args, console)
    else:
        measure_one(args, console)
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    run(main)
