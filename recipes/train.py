"""Train a capsule network.

    python recipes/train.py                                       # capsnet_tiny on digits, no network needed
    python recipes/train.py --model capsnet --dataset mnist --download
    python recipes/train.py --config recipes/configs/warm_ada_batch.yaml --data-dir data
    python recipes/train.py --resume runs/NAME                    # go on exactly where a run ended
    torchrun --nproc-per-node 4 recipes/train.py --dataset mnist  # on four GPUs, or with four processes on a CPU

Options come from the command line, then from --config, then from the defaults. The run folder gets args.yaml,
summary.csv, last.safetensors, best.safetensors, resume.safetensors and result.json. Where images show several classes,
top1 is the exact-match accuracy there: the fraction of images of which just the classes present are predicted.
"""

import os
import shlex
import sys
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from capszoo.checkpoint import read_metadata
from capszoo.command_line import (
    StopSignal,
    add_result,
    changed_options,
    check_results,
    make_console,
    parse_resumable,
    run,
)
from capszoo.command_line.training import MAY_CHANGE_ON_RESUME, build_parser
from capszoo.costs import model_info
from capszoo.data import DataSplits
from capszoo.engine import Trainer, find_lr
from capszoo.engine.distributed import Ranks, is_lost_connection, join_ranks, leave_ranks, reach, wait_for
from capszoo.engine.options import DEFAULTS, TrainingOptions, flat_values, options_from, options_text, with_values
from capszoo.engine.run import load_splits, make_trainer, measure_test
from capszoo.engine.run_folder import default_folder, hold_folder
from capszoo.errors import CheckpointError, DataError, RanksError, Stopped, UsageError, WriteError, first_line
from capszoo.files import read_yaml, write_csv
from capszoo.opening import weights_in
from capszoo.policies import Policy, suggest_lr
from capszoo.policies.finder import WINDOW
from capszoo.precision import choose_device
from capszoo.pretrained_cfg import class_names_in
from capszoo.registry import is_model


def parse_args(argv: list[str] | None = None) -> TrainingOptions:
    """Read the options; with --resume, those of the run."""
    options = with_values(DEFAULTS, vars(parse_resumable(build_parser, MAY_CHANGE_ON_RESUME, argv)))
    # torchrun starts all processes again, with the same command, when one of them has died.
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and not options.resume:
        if not options.output:
            raise UsageError("torchrun --max-restarts needs --output RUN_DIR, where processes find the run again")
        if is_own_run(options, Path(options.output)):
            return replace(options, resume=options.output)
    return options


def torchrun_mark() -> str:
    """What tells in args.yaml which start of torchrun a run is of; nothing where torchrun does not start again."""
    if not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        return ""
    return f"# torchrun {os.environ['TORCHELASTIC_RUN_ID']}\n"


def is_own_run(options: TrainingOptions, folder: Path) -> bool:
    """Whether torchrun has started the run in this folder with these options, and now starts its processes again."""
    file = folder / "args.yaml"
    # Without a rendezvous of its own, all that torchrun starts has one name.
    if torchrun_mark() == "# torchrun none\n" and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        return False
    if not file.is_file() or torchrun_mark() not in file.read_text(errors="replace"):
        return False
    values, saved = flat_values(options), flat_values(options_from(read_yaml(file), str(file)))
    return not changed_options(values, saved, values.keys() - MAY_CHANGE_ON_RESUME - {"output"})


def hold_run_folder(options: TrainingOptions) -> AbstractContextManager[Path]:
    """Make the run folder; the last thing before work starts, so that no error leaves one behind."""
    default = default_folder(options.model, Path(options.dataset).name, options.policy)
    folder = Path(options.output) if options.output else default
    text = None if options.resume else lambda folder: options_text(options, folder) + torchrun_mark()
    return hold_folder(folder, text, is_default=not options.output)


class Report:
    """Shows a run: a live bar on a terminal, a line an epoch elsewhere, and TensorBoard if asked for."""

    def __init__(self, console: Console, policy: Policy, folder: Path, quiet: bool, tensorboard: bool, accuracy: str):
        self.console, self.policy, self.quiet, self.accuracy = console, policy, quiet, accuracy
        self.live = console.is_terminal and not quiet
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=6),  # all of it fits into 80 columns
            TextColumn("{task.fields[speed]:.0f} img/s loss {task.fields[loss]:.3f}"),
            TextColumn(f"{accuracy} {{task.fields[top1]:.3f}}"),
            TextColumn("lr {task.fields[lr]:.1e} batch {task.fields[batch]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not self.live,
        )
        self.task = self.bar.add_task("", total=policy.total_steps, epoch="", speed=0, loss=0, top1=0, lr=0, batch=0)
        self.shown = 0.0
        self.writer = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UsageError('--tensorboard needs pip install "capszoo[tensorboard]"') from None
            self.writer = SummaryWriter(folder / "tensorboard")

    def step(self, trainer: Trainer) -> None:
        # Reading the means waits for the device, so it is done a few times a second at most.
        if not self.live or time.monotonic() - self.shown < 0.25:
            return
        self.shown = time.monotonic()
        position, means = trainer.position, trainer.running_means()
        progress = self.policy.progress(position.epoch, position.step - 1)
        batch = self.policy.batch_size(position.epoch)
        self.bar.update(
            self.task,
            completed=progress.step + 1,
            epoch=f"{position.epoch + 1}/{self.policy.epochs}",
            speed=position.step * batch / max(position.seconds, 1e-9),
            loss=means["loss"],
            top1=means["top1"],
            lr=trainer.lr,
            batch=batch,
        )

    def epoch(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if self.writer is not None:
            for key, value in row.items():
                if value is not None and key != "epoch":
                    self.writer.add_scalar(key, value, row["epoch"])
            self.writer.flush()
        if self.quiet:
            return
        evaluated = ""
        if row["eval_top1"] is not None:
            evaluated = f"eval {self.accuracy} {row['eval_top1']:.4f} loss {row['eval_loss']:.4f}  "
        star = "*" if trainer.position.best_epoch == row["epoch"] else " "
        self.console.print(
            f"epoch {row['epoch']:>3}/{self.policy.epochs}{star} train {self.accuracy} {row['train_top1']:.4f} "
            f"loss {row['train_loss']:.4f}  {evaluated}lr {row['lr']:.2e}  batch {row['batch_size']}  "
            f"{row['images_per_second']:.0f} img/s  {row['epoch_seconds']:.1f} s",
        )

    def __enter__(self) -> "Report":
        self.bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.stop()
        if self.writer is not None:
            self.writer.close()


def search_lr(trainer: Trainer, folder: Path, console: Console, stop: StopSignal) -> int:
    """Run the learning-rate finder and write what it saw."""
    rates, losses = find_lr(trainer)
    rows = [{"step": i, "lr": lr, "loss": loss} for i, (lr, loss) in enumerate(zip(rates, losses, strict=True))]
    write_csv(folder / "lr_finder.csv", ("step", "lr", "loss"), rows)
    if stop():
        console.print(f"stopped before its last rate: no suggestion ({folder / 'lr_finder.csv'})")
        return stop.exit_code
    console.print(f"suggested learning rate {suggest_lr(rates, losses):.2e} ({folder / 'lr_finder.csv'})")
    return 0


def main(argv: list[str] | None = None) -> int:
    options = parse_args(argv)
    ranks, device = join_ranks(options.device)
    try:
        return prepare(options, argv, ranks, choose_device(options.device) if device is None else device)
    except RuntimeError as error:
        if ranks.count == 1 or not is_lost_connection(error):
            raise
        raise RanksError(
            f"another process of this run has died or cannot be reached ({first_line(error)}): go on from the "
            f"last checkpoint with --resume, or let torchrun do it with --max-restarts and --output"
        ) from None
    finally:
        leave_ranks()


def prepare(options: TrainingOptions, argv: list[str] | None, ranks: Ranks, device: torch.device) -> int:
    """Load the data, make the trainer and the run folder, and train; the first of the ranks writes and prints."""
    console = make_console(quiet=not ranks.is_first)
    torch.backends.cudnn.benchmark = True  # few shapes, seen often: worth the search for the best algorithm
    if not ranks.is_first:
        options = replace(options, quiet=True, tensorboard=False)
        if options.download:
            wait_for("data", ranks, [0])
    elif options.results:
        check_results(Path(options.results))
    data = load_run_data(options)
    reach("data", ranks)
    wait_for("data", ranks, range(ranks.count))
    trainer = make_trainer(options, data, device, ranks=ranks)
    if ranks.count > 1 and options.policy == "lr_finder":
        raise UsageError("--policy lr_finder runs in one process: start it without torchrun")
    if options.policy == "lr_finder" and (options.results or options.tensorboard):
        name = "--results" if options.results else "--tensorboard"
        raise UsageError(f"{name} has no effect with --policy lr_finder, which writes lr_finder.csv: leave it out")
    if options.policy == "lr_finder" and trainer.policy.total_steps < WINDOW:
        raise UsageError(
            f"--policy lr_finder has {trainer.policy.total_steps} steps and needs {WINDOW}: give more --epochs or "
            "a smaller --batch-size"
        )
    options = trainer.options
    with hold_run_folder(options) if ranks.is_first else nullcontext(Path()) as folder:
        if ranks.is_first:
            trainer.folder = folder
        return train(options, argv, trainer, data, folder, console)


def load_run_data(options: TrainingOptions) -> DataSplits:
    """Load the data of a run; of one that is resumed, its images may have moved, and its classes must be the same."""
    dataset = str(options.dataset)
    try:
        data = load_splits(options)
    except DataError as error:
        if options.resume and not os.path.exists(dataset):
            raise DataError(f"{error}; where its folder has moved, give --dataset with the new one") from None
        raise
    weights = weights_in(options.resume or "")
    if options.resume and weights.is_file():
        names = []
        with suppress(CheckpointError):  # of which the run tells, or which it writes anew
            names = class_names_in(read_metadata(weights))
        if names and names != data.class_names:
            raise UsageError(
                f"{dataset!r} has the classes {', '.join(data.class_names[:5])}, the run has {', '.join(names[:5])}: "
                "give --dataset with the images of the run"
            )
    return data


def train(
    options: TrainingOptions,
    argv: list[str] | None,
    trainer: Trainer,
    data: DataSplits,
    folder: Path,
    console: Console,
) -> int:
    """Train in a run folder, and measure the test set."""
    ranks, device, policy, model = trainer.ranks, trainer.device, trainer.policy, trainer.task.model
    accuracy = "exact" if data.multi_label else "top1"
    with Report(console, policy, folder, options.quiet, options.tensorboard, accuracy) as report, StopSignal() as stop:
        trainer.on_step, trainer.on_epoch, trainer.should_stop = report.step, report.epoch, stop
        if not options.quiet:
            val = 0 if data.val is None else len(data.val)
            precision = "float32" if trainer.amp is None else str(trainer.amp).removeprefix("torch.")
            info = model_info(model.pretrained_cfg["architecture"], **model.arguments())
            console.print(str(info), *filter(None, [info.warning()]), sep="\n")
            console.print(
                f"{options.model} on {options.dataset} "
                f"({len(data.train):,} train, {val:,} val, {len(data.test):,} test), {options.policy}, "
                f"{device.type} {precision}, "
                + (f"{ranks.count} processes, " if ranks.count > 1 else "")
                + f"folder {folder}",
            )
            if data.multi_label:
                console.print("images show several classes: exact is the part of them with all classes right, as top1")
        if options.policy == "lr_finder":
            return search_lr(trainer, folder, console, stop)
        # Of ranks that were started again, only those that see the run folder know that there is something to resume.
        if ranks.any(bool(options.resume), device) and trainer.resume() and not options.quiet:
            console.print(f"resumed at epoch {trainer.position.epoch + 1}, step {trainer.position.step}")
        try:
            completed = trainer.fit()
            # A signal to one of them stops all, and all end as it asks for.
            stop.received = int(ranks.max_(torch.tensor(stop.received or 0, device=device))) or None
            leave_ranks()
            if not ranks.is_first:
                return 0 if completed else stop.exit_code
            result = measure_test(trainer, options, data) if completed else None
        except (DataError, WriteError) as error:
            raise type(error)(f"{error} (the run: --resume {shlex.quote(str(folder))})") from error
        except Stopped:
            result = None
    if result is None:
        console.print(f"stopped and saved: go on with --resume {shlex.quote(str(folder))}")
        return stop.exit_code
    if options.results:
        launch = "python" if ranks.count == 1 else f"torchrun --nproc-per-node {ranks.count}"
        add_result(Path(options.results), result, f"{launch} recipes/train.py", argv)
    chosen = "last epoch" if result["eval_top1"] is None else f"best epoch {result['best_epoch']} by validation"
    precision = result.get("test_mean_average_precision")
    console.print(
        f"test {accuracy} {result['test_top1']:.4f} "
        + ("" if precision is None else f"mean average precision {precision:.4f} ")
        + (f"k longest {result['test_exact_top_k']:.4f} " if data.multi_label else "")
        + f"({chosen}), {result['total_seconds']:.1f} s of training, {folder}",
    )
    if options.report:
        report_run(trainer, options, data, folder, result, console)
    if not options.quiet:
        links = " --follow-links" if options.follow_links else ""
        place = shlex.quote(f"./{folder}" if is_model(str(folder)) else str(folder))
        own = f"capszoo validate {place}{links}, capszoo show {place}{links}"
        console.print(f"next: {own}, or capszoo predict {place} IMAGE...")
    return 0


def report_run(
    trainer: Trainer, options: TrainingOptions, data: DataSplits, folder: Path, result: dict, console: Console
) -> None:
    """Write report.html; what hinders it is one line, and no reason for a trained network to fail."""
    from capszoo.report import write_run_report

    facts = {
        "model": options.model,
        "parameters": f"{result['parameters']:,}",
        "data set": f"{options.dataset}, {len(data.train):,} training images",
        "policy": options.policy,
        "test accuracy": f"{result['test_top1']:.2%}",
        "training time": f"{result['total_seconds']:.1f} s on {result['device']}",
    }
    try:
        page = write_run_report(folder, trainer.task.kept_model, data, trainer.device, facts, folder.name)
    except (ImportError, OSError, ValueError) as error:
        console.print(f"no report.html: {first_line(error)}")
        return
    if not options.quiet:
        console.print(f"report: {page}")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # plain lines appear as they come, also through a pipe
    run(main)
