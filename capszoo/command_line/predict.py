"""`capszoo predict`: what a model says of image files."""

import contextlib
import csv
import io
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from capszoo.contract import decoder_of
from capszoo.errors import DataError, UsageError, WriteError, first_line
from capszoo.files import check_target, write_atomically
from capszoo.opening import open_model
from capszoo.precision import choose_device
from capszoo.prediction import Prediction, class_names_of, named_images, predict_pixels, reconstruct, to_pixels

from .console import make_table_console
from .parser import OptionParser

__all__ = ["main"]

BATCH_SIZE = 256
COLUMNS = ("image", "class", "score", "second", "second_score")
# Images and reconstructions side by side; more would make a picture that nobody can look at.
MOST_DRAWN = 256


def build_parser() -> OptionParser:
    parser = OptionParser(prog="capszoo predict", description="Say what image files show, by a trained model.")
    add = parser.add_argument
    add("weights", help="name of shipped weights such as capsnet_tiny.mnist, a safetensors file, or a run folder")
    add("images", nargs="+", metavar="IMAGE", help="image files and folders; - reads their names from standard input")
    add("--json", action="store_true", help="print JSON, with the scores of all classes")
    add("--csv", action="store_true", help="print CSV")
    add(
        "--threshold",
        type=float,
        metavar="SCORE",
        help="also say which classes score at least this (default: 0.5 if images of the training showed several)",
    )
    add("--reconstruct", metavar="FILE.png", help="also draw each image beside what the decoder makes of it")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    return parser


def predict_all(model: torch.nn.Module, names: Iterable[str], drawn: list[Tensor] | None) -> Iterator[Any]:
    """(name, prediction or error) of each image, in order."""
    waiting: list[tuple[str, Tensor | DataError]] = []

    def flush() -> Iterator[tuple[str, Prediction | DataError]]:
        pixels = [found for _, found in waiting if isinstance(found, Tensor)]
        predictions = iter(predict_pixels(model, torch.stack(pixels)) if pixels else [])
        if pixels and drawn is not None and len(drawn) < MOST_DRAWN:
            pairs = torch.stack([torch.stack(pixels), reconstruct(model, torch.stack(pixels))], dim=1)
            drawn.extend(pairs[: MOST_DRAWN - len(drawn)])
        for name, found in waiting:
            yield name, next(predictions) if isinstance(found, Tensor) else found
        waiting.clear()

    for name, problem in named_images(names):
        try:
            if problem is not None:
                raise problem
            waiting.append((name, to_pixels(name, model)))
        except DataError as error:
            waiting.append((name, error))
        if len(waiting) == BATCH_SIZE:
            yield from flush()
    yield from flush()


def keep_odd_names() -> None:
    """Let names of files that are not text go in and out as they are, instead of failing at the first."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            with contextlib.suppress(OSError):  # of a stream that has been led elsewhere
                stream.reconfigure(errors="surrogateescape" if utf8 or stream is sys.stdin else "backslashreplace")


def draw(pairs: list[Tensor], path: Path) -> None:
    """Write pairs `[2, C, H, W]` of images and reconstructions as a picture, eight pairs in a row."""
    from torchvision.utils import make_grid, save_image

    grid = make_grid(torch.cat(pairs), nrow=16, padding=2, pad_value=0.5)
    write_atomically(path, lambda temporary: save_image(grid, temporary, format=path.suffix[1:] or "png"))


def print_table(rows: list[list[Any]]) -> None:
    """Print rows of COLUMNS, and of what images show, if that is asked for."""
    table = Table(box=None, pad_edge=False)
    for column in ("image", "class", "score", "second best", "score", "shows")[: len(rows[0])]:
        table.add_column(column, justify="right" if column == "score" else "left", overflow="fold")
    for name, label, score, second, second_score, *shown in rows:
        more = ("", "") if second is None else (second, f"{second_score:.3f}")
        table.add_row(name, label, f"{score:.3f}", *more, *(some or "-" for some in shown))
    make_table_console().print(table)


def main(argv: list[str] | None = None) -> int:
    args, _ = build_parser().parse(argv)
    if args.json and args.csv:
        raise UsageError("--json does not go with --csv: choose one")
    if args.threshold is not None and not math.isfinite(args.threshold):
        raise UsageError(f"--threshold {args.threshold} is not a score: give a number such as 0.5")
    device = choose_device(args.device)
    opened = open_model(args.weights)
    model: Any = opened.model.to(device).eval()
    if not model.num_classes:
        raise UsageError(f"{args.weights!r} has no classes to predict: use other weights")
    if args.reconstruct and decoder_of(model) is None:
        raise UsageError(f"{args.weights!r} has no decoder for --reconstruct: leave it out, or use other weights")
    if args.reconstruct and Path(args.reconstruct).suffix.lower() != ".png":
        raise UsageError(f"--reconstruct {args.reconstruct!r} is not the name of a PNG file: let it end in .png")
    if args.reconstruct and Path(args.reconstruct).exists():
        raise UsageError(f"--reconstruct {args.reconstruct!r} is there already: give a new name, or delete it")
    if args.reconstruct:
        check_target(args.reconstruct, "--reconstruct")
    threshold = args.threshold
    if threshold is None and opened.header.get("several_classes") == "true":
        threshold = 0.5
    names, columns = class_names_of(model), (*COLUMNS, *(() if threshold is None else ("shows",)))
    keep_odd_names()
    drawn: list[Tensor] | None = [] if args.reconstruct else None
    failed = False
    found = []
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if args.csv:
        writer.writerow(columns)
    for name, prediction in predict_all(model, args.images, drawn):
        if isinstance(prediction, DataError):
            print(f"error: {first_line(prediction)}", file=sys.stderr)
            failed = True
            continue
        row = [name, prediction.class_name, prediction.score, prediction.second_name, prediction.second_score]
        if threshold is not None:
            shown = [label for label, score in zip(names, prediction.scores, strict=True) if score >= threshold]
            row.append(shown if args.json else ";".join(shown))
        if args.csv:
            writer.writerow(row)
        else:
            found.append((row, prediction))
    if args.json:
        values = [
            {**dict(zip(columns, row, strict=True)), "classes": names, "scores": prediction.scores}
            for row, prediction in found
        ]
        print(json.dumps(values, indent=2))
    elif found:
        print_table([row for row, _ in found])
    if args.reconstruct:
        if not drawn:
            raise WriteError(f"{args.reconstruct!r} is not written: no image could be read")
        draw(drawn, Path(args.reconstruct))
    return 2 if failed else 0
