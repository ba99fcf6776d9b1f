"""Look into a trained network: one HTML report with its training, its answers and what is inside.

    python recipes/show.py runs/NAME                                  # the run's own data set and training curves
    python recipes/show.py capsnet_tiny.mnist --data-dir data         # shipped weights
    python recipes/show.py runs/NAME cat.png more/images              # images of your own, whose classes are not known

The report, show.html, and a folder with its pictures as PNG files are written into the run folder, or into the
working directory for other weights.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capszoo.command_line import OptionParser, make_console, run
from capszoo.data.sources import check_data_dir
from capszoo.engine.run_folder import read_summary
from capszoo.engine.task import Normalization
from capszoo.errors import DataError, UsageError
from capszoo.opening import OpenedModel, is_shipped_name, open_model
from capszoo.precision import choose_device
from capszoo.prediction import class_names_of, named_images, to_pixels
from capszoo.report import Findings, check_sheet, find, first_batches, sections_of, training_section, write_sheet

# Options that say nothing of images given by name.
OF_DATA_SETS = {"dataset", "data_dir", "download", "follow_links", "split", "val_fraction", "limit"}


def build_parser() -> OptionParser:
    parser = OptionParser(description="Look into a trained network: one HTML report, and its pictures.")
    add = parser.add_argument
    add("weights", help="a run folder, a safetensors file, or shipped weights such as capsnet_ws.mnist")
    add("images", nargs="*", default=[], metavar="IMAGE", help="image files, folders; default images of the data set")
    add("--dataset", help="data set; default the one that the weights were trained on")
    add("--data-dir", default="data", help="folder that has the data set")
    add("--download", action="store_true", help="let torchvision download the data set into --data-dir")
    add("--follow-links", action="store_true", help="read what links out of an image folder lead to")
    add("--split", default="test", choices=["train", "val", "test"], help="images to look at")
    add(
        "--val-fraction",
        type=float,
        help="part of the training images that is the validation split; default that of the weights' training, or 0.1",
    )
    add("--limit", type=int, default=2000, help="images of the data set to look at, at most")
    add("--output", metavar="FILE.html", help="the report; default show.html in the run folder, or NAME.html")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    return parser


def batches_of_images(model: Any, names: list[str], device: torch.device) -> Iterator[tuple[Tensor, None]]:
    """Batches of image files, normalised as the model takes them; those that cannot be read are told and left out."""
    normalization = Normalization(model, device)
    pixels: list[Tensor] = []
    broken: list[DataError] = []
    count = 0
    for path, problem in named_images(names):
        try:
            if problem is not None:
                raise problem
            pixels.append(to_pixels(path, model))
        except DataError as error:
            broken.append(error)
            continue
        count += 1
        if len(pixels) == 256:
            yield normalization(torch.stack(pixels).to(device)), None
            pixels = []
    if not count and broken:
        raise broken[0]
    for error in broken:
        print(f"left out: {error}", file=sys.stderr)
    if pixels:
        yield normalization(torch.stack(pixels).to(device)), None


def look_at_data(opened: OpenedModel, args: Any, device: torch.device) -> tuple[Findings, str]:
    """Look at images of the data set; what they are, in words."""
    dataset = args.dataset or opened.dataset
    if dataset is None:
        raise UsageError(f"{args.weights!r} does not say what data set it was trained on: give --dataset, or images")
    check_data_dir(dataset, args.data_dir)
    more = {"download": args.download, "follow_links": args.follow_links, "val_fraction": args.val_fraction}
    split, names = opened.load_split(dataset, args.data_dir, args.split, **more)
    if split.multi_label:
        raise UsageError(f"images of {dataset!r} show several classes: give single images to look at")
    found = find(opened.model, first_batches(split, args.limit, device), names)
    return found, f"{found.count:,} of the {len(split):,} {args.split} images of {dataset}"


def main(argv: list[str] | None = None) -> int:
    args, given = build_parser().parse(argv)
    if args.limit < 1:
        raise UsageError(f"--limit {args.limit} is out of range: give 1 or more")
    without = sorted(given & OF_DATA_SETS) if args.images else []
    if without:
        raise UsageError(f"--{without[0].replace('_', '-')} is of data sets, and images are given: leave it out")
    device = choose_device(args.device)
    opened = open_model(args.weights)
    model: Any = opened.model.to(device).eval()
    if not model.num_classes:
        raise UsageError(f"{args.weights!r} has no classes to look at: use other weights")
    # A folder may have the name of shipped weights, as the pictures of their report have.
    folder = Path(args.weights) if Path(args.weights).is_dir() and not is_shipped_name(args.weights) else None
    output = Path(args.output or (folder / "show.html" if folder else f"{opened.file.stem}.html"))
    if output.suffix.lower() != ".html":
        raise UsageError(f"--output {str(output)!r} is not the name of an HTML file: let it end in .html")
    check_sheet(output, "--output")
    console = make_console()
    if args.images:
        found = find(model, batches_of_images(model, args.images, device), class_names_of(model))
        seen = f"{found.count:,} images"
    else:
        found, seen = look_at_data(opened, args, device)
    rows = read_summary(folder) if folder else []
    facts = {
        "model": model.pretrained_cfg["architecture"],
        "weights": opened.file.name if folder is None else f"{folder.name}, {opened.file.name}",
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "images": seen,
        **({} if found.top1 is None else {"accuracy": f"{found.top1:.2%}"}),
    }
    sections = [*([training_section(rows)] if rows else []), *sections_of(found)]
    page, *pictures = write_sheet(output, f"{opened.name}", facts, sections)
    console.print(f"{page}, and {len(pictures)} pictures in {page.with_suffix('')}")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    run(main)
