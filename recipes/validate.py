"""Measure a checkpoint or shipped weights on a data set.

    python recipes/validate.py runs/NAME/best.safetensors                    # model and data set from the file's header
    python recipes/validate.py capsnet_ws.mnist --data-dir data              # shipped weights by name
    python recipes/validate.py runs/NAME/best.safetensors --dataset fashion_mnist --split val
"""
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import capszoo
from capszoo.checkpoint import read_metadata
from capszoo.command_line import OptionParser, UsageError, choose_device, run
from capszoo.data import Loader, load_data
from capszoo.engine import Evaluation, evaluate, resolve_amp, write_json


def build_parser() -> OptionParser:
    parser = OptionParser(description="Measure a checkpoint or shipped weights on a data set.")
    add = parser.add_argument
    add("weights", help="a safetensors file, or the name of shipped weights such as capsnet_ws.mnist")
    add("--model", help="model of the weights, where the file's header does not say it")
    add("--dataset", help="data set; default the one that the weights were trained on")
    add("--data-dir", default="data", help="folder that has the data set")
    add("--download", action="store_true", help="let torchvision download the data set into --data-dir")
    add("--split", default="test", choices=["train", "val", "test"], help="images to measure on")
    add("--val-fraction", type=float, default=0.1, help="part of the training images that is the validation split")
    add("--batch-size", type=int, default=256, help="images a step")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--amp", default="none", choices=["auto", "none", "bf16", "fp16"], help="precision of the computation")
    add("--workers", type=int, default=2, help="processes that read images, for sets too large for memory")
    add("--json", metavar="FILE", help="also write the measures to this file")
    return parser


def load_weights_argument(weights: str, model_name: str | None) -> tuple[torch.nn.Module, str, str | None]:
    """Return the model, its name for people, and the data set that its weights were trained on, if known."""
    if capszoo.is_model(weights):
        tag = weights.partition(".")[2]
        model = capszoo.create_model(weights, pretrained=True, decoder=True)
        return model, weights, tag or model.pretrained_cfg.get("tag")
    if not Path(weights).is_file():
        known = ", ".join(capszoo.list_pretrained()) or "none yet"
        raise UsageError(f"{weights!r} is no file and no shipped weights (there are: {known}): check the path")
    header = read_metadata(weights)
    if model_name is None:
        return capszoo.load_model(weights), f"{header.get('model', '')} {weights}".strip(), header.get("dataset")
    model = capszoo.create_model(model_name, checkpoint_path=weights, **json.loads(header.get("model_args", "{}")))
    return model, f"{model_name} {weights}", header.get("dataset")


def confusion_table(evaluation: Evaluation, class_names: list[str]) -> Table:
    """Counts of true class (rows) by predicted class (columns), and each class's accuracy."""
    table = Table(title="true class by predicted class", show_lines=False)
    table.add_column("", justify="right", style="bold")
    class_names = [escape(name) for name in class_names]
    for name in class_names:
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("top1", justify="right", style="bold")
    for index, (name, row) in enumerate(zip(class_names, evaluation.confusion.tolist(), strict=True)):
        cells = [f"[bold]{n}[/bold]" if i == index else (str(n) if n else ".") for i, n in enumerate(row)]
        table.add_row(name, *cells, f"{row[index] / sum(row):.4f}" if sum(row) else "-")
    return table


def main(argv: list[str] | None = None) -> int:
    args, _ = build_parser().parse(argv)
    console = Console(highlight=False, soft_wrap=True)
    device = choose_device(args.device)
    amp = resolve_amp(args.amp, device)
    model, name, trained_on = load_weights_argument(args.weights, args.model)
    dataset = args.dataset or trained_on
    if dataset is None:
        raise UsageError(f"{args.weights!r} does not say what data set it was trained on: give --dataset")
    data = load_data(
        dataset,
        args.data_dir,
        img_size=model.img_size,
        in_chans=model.in_chans,
        val_fraction=args.val_fraction,
        download=args.download,
    )
    if data.num_classes != model.num_classes:
        raise UsageError(
            f"{dataset!r} has {data.num_classes} classes, the model has {model.num_classes}: check --dataset"
        )
    split = getattr(data, args.split)
    if split is None:
        raise UsageError("--split val needs --val-fraction above 0")
    model.to(device, memory_format=torch.channels_last)
    start = time.perf_counter()
    result = evaluate(model, Loader(split, args.batch_size, device, num_workers=args.workers), amp)
    seconds = time.perf_counter() - start
    reconstruction = result.reconstruction_error
    console.print(
        f"{name} on {dataset} {args.split} ({len(split):,} images)\n"
        f"top1 {result.top1:.4f}  margin loss {result.margin_loss:.5f}  reconstruction error "
        + ("- (no decoder)" if reconstruction is None else f"{reconstruction:.3f}")
        + f"  {len(split) / seconds:.0f} img/s",
    )
    console.print(confusion_table(result, data.class_names))
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
                "confusion": result.confusion.tolist(),
            },
        )
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    run(main)
