"""Prune a trained capsule network, and train what is left.

    python recipes/prune.py runs/NAME/best.safetensors --keep types=4                 # one round, 5 epochs
    python recipes/prune.py capsnet_ws.mnist --data-dir data --keep types=8 conv1=128 --rounds 3 --epochs 3
    python recipes/prune.py runs/NAME/best.safetensors --keep capsules=0.1 decoder=[64,128] --score look_ahead
    python recipes/prune.py --resume runs/NAME                                        # go on exactly where a run ended

Options come from the command line, then from --config, then from the defaults. Each round removes a part, always in the
same proportion, and trains the rest; the best epoch by the validation split goes into the next round. The run folder
gets args.yaml, summary.csv, best.safetensors and last.safetensors (of the last round so far), result.json, pareto.csv
and pareto.png (accuracy over size, before and after the training of each round), and a folder per round with its
weights and, while it runs, its resume.safetensors. The test set is measured once, at the end. Where images show several
classes, top1 is the exact-match accuracy everywhere: the fraction of images of which just those are predicted.
"""

import math
import shlex
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch

from capszoo.command_line import (
    OptionParser,
    StopSignal,
    add_options,
    add_result,
    check_results,
    make_console,
    parse_resumable,
    run,
)
from capszoo.data import DataSplits, Loader
from capszoo.data.sources import check_data_dir
from capszoo.engine.criteria import read_criterion
from capszoo.engine.options import check_ranges, fill_in
from capszoo.engine.run import create_optimizer, make_policy
from capszoo.engine.run_folder import default_folder, hold_folder
from capszoo.errors import UsageError
from capszoo.opening import OpenedModel, load_data_for, open_model, warn_of_split
from capszoo.precision import choose_device, resolve_amp
from capszoo.pretrained import image_statistics
from capszoo.prune.options import PRUNE_OPTIONS, PruneOptions, flat_prune_values, prune_options_text
from capszoo.prune.pareto import parameters_text
from capszoo.prune.plan import schedule
from capszoo.prune.run import Run

MAY_CHANGE_ON_RESUME = {name for name, option in PRUNE_OPTIONS.items() if option.may_change}


def build_parser() -> OptionParser:
    parser = OptionParser(description="Prune a trained capsule network, and train what is left.")
    add_options(parser, PRUNE_OPTIONS, flat_prune_values(PruneOptions()))
    return parser


def parse_args(argv: list[str] | None = None) -> PruneOptions:
    """Read the options; with --resume, those of the run."""
    return PruneOptions.of_values(vars(parse_resumable(build_parser, MAY_CHANGE_ON_RESUME, argv)))


def open_weights(options: PruneOptions) -> OpenedModel:
    """Open the given network; a resumed run has it in its folder, and needs its file no more."""
    training = options.training
    if training.resume:
        kept = Path(training.output) / "round-0" / "best.safetensors"
        if kept.exists():
            return open_model(kept)
    if options.weights is None:
        raise UsageError("no weights are named: give a safetensors file or shipped weights, or --resume RUN_DIR")
    return open_model(options.weights, decoder=training.decoder)


def open_data(options: PruneOptions, opened: OpenedModel) -> DataSplits:
    """Load the data set, normalised as the model takes it."""
    training = options.training
    check_data_dir(training.dataset, training.data_dir)
    data = load_data_for(
        opened.model,
        training.dataset,
        training.data_dir,
        val_fraction=training.val_fraction,
        download=training.download,
        follow_links=training.follow_links,
    )
    warn_of_split(opened.header, training.dataset, training.val_fraction)
    data.normalize(*image_statistics(opened.model))
    if data.val is None:
        raise UsageError("rounds are compared on the validation split: give --val-fraction above 0")
    return data


def hold_run_folder(options: PruneOptions) -> AbstractContextManager[Path]:
    """Make the run folder; the last thing before work starts, so that no error leaves one behind."""
    training = options.training
    file = Path(options.weights)
    weights = file.parent.name or file.stem if file.is_file() else options.weights
    folder = Path(training.output or default_folder("prune", weights, Path(training.dataset).name))
    text = None if training.resume else lambda folder: prune_options_text(options, folder)
    return hold_folder(folder, text, is_default=not training.output)


def main(argv: list[str] | None = None) -> int:
    options = parse_args(argv)
    check_ranges(options.training)
    console = make_console()
    device = choose_device(options.training.device)
    amp = resolve_amp(options.training.amp, device)
    torch.backends.cudnn.benchmark = True  # few shapes, seen often: worth the search for the best algorithm
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError('the figure of a run needs pip install "capszoo[train]"') from None

    opened = open_weights(options)
    dataset = options.training.dataset or opened.dataset
    if dataset is None:
        raise UsageError(f"{options.weights!r} does not say what data set it was trained on: give --dataset")
    fraction = opened.val_fraction(dataset, options.training.val_fraction)
    options = replace(options, training=replace(options.training, dataset=dataset, val_fraction=fraction))
    plan = schedule(options, opened.model)
    data = open_data(options, opened)
    if options.training.policy == "lr_finder":
        raise UsageError("--policy lr_finder trains nothing: use it in recipes/train.py")
    policy = make_policy(options.training, len(data.train))  # says what is impossible before there is a folder
    train = data.train
    options.training.augmentation.check_images(
        train.image_shape, train.multi_label, train.images is None, train.parts is not None
    )
    options.training.augmentation.check_batches(policy.batch_size(epoch) for epoch in range(policy.epochs))
    Loader(train, 1, device, translate=options.training.translate or 0)  # refuses what is too far for the images
    training = fill_in(options.training, len(data.train), math.prod(train.image_shape))
    options = replace(options, training=training)
    create_optimizer(training, opened.model)
    criterion = read_criterion(opened.file, opened.header, opened.model)
    if training.results:
        check_results(Path(training.results))

    def say(text: str) -> None:
        if not training.quiet:
            console.print(text)

    with hold_run_folder(options) as folder, StopSignal() as stop:
        for leftover in folder.glob(".*.tmp"):  # of a run killed while it wrote
            leftover.unlink()
        work = Run(options, criterion, data, plan, folder, device, say, stop)
        say(
            f"{options.weights} on {dataset} ({len(data.train):,} train, {len(data.val):,} val, {len(data.test):,} "
            f"test), score {options.score}, {training.policy}, {device.type} "
            f"{'float32' if amp is None else str(amp).removeprefix('torch.')}, folder {folder}"
        )
        if data.multi_label:
            say("images show several classes: top1 is the part of them with all classes right (exact match)")
        work.start(opened.model)
        if not work.train():
            console.print(f"stopped and saved: go on with --resume {shlex.quote(str(folder))}")
            return stop.exit_code
    result = work.finish()
    if training.results:
        add_result(Path(training.results), result, "python recipes/prune.py", argv)
    first, last = work.rows[0], work.rows[-1]
    console.print(
        f"test top1 {result['test_top1']:.4f}, val top1 {first['val_top1']:.4f} -> {last['val_top1']:.4f}, parameters "
        f"{parameters_text(first)} -> {parameters_text(last)}, macs {first['macs'] / 1e6:.1f} M -> "
        f"{last['macs'] / 1e6:.1f} M, {result['total_seconds']:.1f} s of training, {folder}"
    )
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # plain lines appear as they come, also through a pipe
    run(main)
