"""Train a capsule network.

    python recipes/train.py                                       # capsnet_tiny on digits, no network needed
    python recipes/train.py --model capsnet --dataset mnist --download
    python recipes/train.py --config recipes/configs/warm_ada_batch.yaml --data-dir data
    python recipes/train.py --resume runs/NAME                    # go on exactly where a run ended

Options come from the command line, then from --config, then from the defaults. The run folder gets args.yaml,
summary.csv, last.safetensors, best.safetensors, resume.safetensors and result.json.
"""
import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import capszoo
from capszoo.checkpoint import load_weights, write_atomically
from capszoo.command_line import (
    OptionParser,
    StopSignal,
    UsageError,
    add_policy_options,
    add_result,
    choose_device,
    create_optimizer,
    key_value,
    parse_resumable,
    policy_from,
    run,
)
from capszoo.data import DataSplits, Loader, default_translate, load_data
from capszoo.engine import Trainer, evaluate, find_lr, resolve_amp, write_csv, write_json
from capszoo.losses import MarginLoss
from capszoo.policies import Policy, list_policies, suggest_lr
from capszoo.registry import model_keywords
from capszoo.task import CapsuleTask

# Options that only say where and how a run is computed may change when it is resumed.
MAY_CHANGE_ON_RESUME = {"resume", "data_dir", "device", "workers", "quiet", "tensorboard", "save_every", "results"}
# Options that belong to one call of this script and not to the run.
NOT_SAVED = {"config", "resume", "output", "results"}


def build_parser() -> OptionParser:
    parser = OptionParser(description="Train a capsule network.")
    group = parser.add_argument_group("what").add_argument
    group("--config", metavar="FILE.yaml", help="take options from a YAML file of 'option: value' lines")
    group("--model", default="capsnet_tiny", help="one of capszoo.list_models(), or local-dir:FOLDER")
    group("--dataset", default="digits", help="digits, mnist, fashion_mnist, cifar10, an image folder or a timm name")
    group("--data-dir", default="data", help="folder that has the data set")
    group("--download", action="store_true", help="let torchvision download the data set into --data-dir")
    group("--val-fraction", type=float, default=0.1, help="part of the training images kept for validation")
    group("--output", metavar="RUN_DIR", help="run folder; default runs/MODEL-DATASET-POLICY-TIME")
    group("--resume", metavar="RUN_DIR", help="go on with the run in this folder")
    group = parser.add_argument_group("model").add_argument
    group("--pretrained", action="store_true", help="start from the weights shipped for --model")
    group("--checkpoint", metavar="FILE", help="start from the weights in a safetensors file")
    group("--img-size", type=int, help="height and width of the images, in pixels; default the data set's")
    group("--in-chans", type=int, help="channels of the images; default the data set's")
    group("--num-routing", type=int, default=3, help="routing iterations")
    group("--routing", default="dynamic", help="kind of routing")
    group("--squash", default="exact", help="exact or approx")
    group("--decoder", action=argparse.BooleanOptionalAction, default=True, help="train with the decoder")
    group("--drop-rate", type=float, default=0.0, help="dropout rate of the primary capsules")
    group("--model-kwargs", nargs="*", type=key_value, default=[], metavar="NAME=VALUE", help="more for the model")
    group = parser.add_argument_group("training").add_argument
    group("--policy", default="one_cycle", help=", ".join(list_policies()))
    group("--epochs", type=int, default=30, help="passes over the training images")
    group("--batch-size", type=int, help="images a step, for policies with a fixed batch size; default 128, or 16 "
          "for fewer than 10,000 training images")
    group("--lr", type=float, help="base learning rate; default 0.001, for warm_ada_batch 0.0001")
    group("--opt", default="adam", help="optimizer, by timm's names")
    group("--weight-decay", type=float, default=0.0, help="weight decay")
    group("--momentum", type=float, default=0.9, help="momentum, for optimizers that have it")
    group("--clip-grad", type=float, help="largest norm of the gradient")
    group("--m-plus", type=float, default=0.9, help="margin loss: length that a present class should reach")
    group("--m-minus", type=float, default=0.1, help="margin loss: length that an absent class should not pass")
    group("--margin-lambda", type=float, default=0.5, help="margin loss: weight of the absent classes")
    group("--reconstruction-weight", type=float, default=0.0005, help="weight of the reconstruction loss")
    group("--translate", type=int, help="random shift of training images, in pixels; default by data set, else 0")
    group("--seed", type=int, default=0, help="seed of initial weights, shuffling and augmentation")
    group = parser.add_argument_group("computing").add_argument
    group("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    group("--amp", default="auto", choices=["auto", "none", "bf16", "fp16"], help="precision of the computation")
    group("--compile", action="store_true", help="use torch.compile")
    group("--cuda-graphs", action=argparse.BooleanOptionalAction, default=True, help="replay captured steps on a GPU")
    group("--channels-last", action=argparse.BooleanOptionalAction, default=True, help="memory format of the maps")
    group("--eval-batch-size", type=int, default=256, help="images a step in evaluation")
    group("--workers", type=int, default=2, help="processes that read images, for sets too large for memory")
    group("--save-every", type=int, default=0, help="also save the resume state every so many steps")
    group = parser.add_argument_group("reporting").add_argument
    group("--tensorboard", action="store_true", help="also write TensorBoard files into the run folder")
    group("--results", metavar="FILE.csv", help="also add the result as a row to this table")
    group("--quiet", action="store_true", help="print the result alone")
    add_policy_options(parser, list_policies())
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the options; with --resume, those of the run."""
    return parse_resumable(build_parser, MAY_CHANGE_ON_RESUME, argv)


def make_model(args: argparse.Namespace, data: DataSplits) -> torch.nn.Module:
    kwargs = dict(
        num_classes=data.num_classes,
        in_chans=data.in_chans,
        img_size=data.img_size,
        decoder=args.decoder,
        num_routing=args.num_routing,
        routing=args.routing,
        squash=args.squash,
        drop_rate=args.drop_rate,
    )
    if ":" not in args.model:
        # A model without routing or decoder is not told of them, unless the user changed something about them.
        parser, known = build_parser(), model_keywords(args.model)
        kwargs = {key: v for key, v in kwargs.items() if key in known or v != parser.get_default(key)}
    kwargs.update(args.model_kwargs)
    model = capszoo.create_model(args.model, pretrained=args.pretrained, **kwargs)
    if args.checkpoint:
        load_weights(model, args.checkpoint)
    model.creation_args = kwargs
    return model


def make_policy(args: argparse.Namespace, num_images: int) -> Policy:
    """Make the policy, with a learning rate that suits it where none is given."""
    if args.lr is None:
        args.lr = 1e-4 if args.policy == "warm_ada_batch" else 1e-3
    return policy_from(args, num_images)


def prepare_folder(args: argparse.Namespace) -> Path:
    """Make the run folder; the last thing before work starts, so that no error leaves one behind."""
    import yaml

    name = "-".join([args.model, Path(args.dataset).name, args.policy, time.strftime("%Y%m%d-%H%M%S")])
    default = Path("runs") / "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    folder = Path(args.output) if args.output else default
    if not args.resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"run folder {str(folder)!r} is not empty: use --resume, or choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        values = {key: value for key, value in vars(args).items() if key not in NOT_SAVED}
        values["model_kwargs"] = dict(args.model_kwargs)
        text = f"# python recipes/train.py --config {folder / 'args.yaml'}\n" + yaml.safe_dump(values, sort_keys=False)
        write_atomically(folder / "args.yaml", lambda temporary: temporary.write_text(text))
    return folder


class Report:
    """Shows a run: a live bar on a terminal, a line an epoch elsewhere, and TensorBoard if asked for."""

    def __init__(self, console: Console, policy: Policy, folder: Path, quiet: bool, tensorboard: bool):
        self.console, self.policy, self.quiet = console, policy, quiet
        self.live = console.is_terminal and not quiet
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=6),  # all of it fits into 80 columns
            TextColumn("{task.fields[speed]:.0f} img/s loss {task.fields[loss]:.3f} top1 {task.fields[top1]:.3f}"),
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
            evaluated = f"eval top1 {row['eval_top1']:.4f} loss {row['eval_loss']:.4f}  "
        star = "*" if trainer.position.best_epoch == row["epoch"] else " "
        self.console.print(
            f"epoch {row['epoch']:>3}/{self.policy.epochs}{star} train top1 {row['train_top1']:.4f} "
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


def describe(args: argparse.Namespace, data: DataSplits, model: torch.nn.Module, policy: Policy) -> dict[str, Any]:
    """Facts of the run for the header of the weights' files; `model_args` make the model again."""
    return {
        "capszoo_version": capszoo.__version__,
        "model": args.model.partition(".")[0],
        "model_args": model.creation_args,
        "dataset": args.dataset,
        "class_names": data.class_names,
        "policy": args.policy,
        "epochs": policy.epochs,
        "seed": args.seed,
    }


def finish(trainer: Trainer, args: argparse.Namespace, data: DataSplits, folder: Path) -> dict[str, Any]:
    """Measure the best epoch's weights on the test set, once, and write result.json."""
    load_weights(trainer.task.model, folder / "best.safetensors")
    loader = Loader(data.test, args.eval_batch_size, trainer.device, num_workers=args.workers)
    test = evaluate(trainer.task.get_eval_model(), loader, trainer.amp)
    best = trainer.best
    result = {
        "model": args.model,
        "dataset": args.dataset,
        "policy": args.policy,
        "parameters": sum(p.numel() for p in trainer.task.model.parameters()),
        "epochs": trainer.policy.epochs,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "best_epoch": best["epoch"],
        "eval_top1": best["eval_top1"],
        "test_top1": test.top1,
        "test_margin_loss": test.margin_loss,
        "test_reconstruction_error": test.reconstruction_error,
        "total_seconds": trainer.position.total_seconds,
        "seed": args.seed,
        "amp": "none" if trainer.amp is None else str(trainer.amp).removeprefix("torch."),
        "device": torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "capszoo": capszoo.__version__,
    }
    write_json(folder / "result.json", result)
    return result


def search_lr(trainer: Trainer, folder: Path, console: Console) -> int:
    """Run the learning-rate finder and write what it saw."""
    rates, losses = find_lr(trainer)
    rows = [{"step": i, "lr": lr, "loss": loss} for i, (lr, loss) in enumerate(zip(rates, losses, strict=True))]
    write_csv(folder / "lr_finder.csv", ("step", "lr", "loss"), rows)
    console.print(f"suggested learning rate {suggest_lr(rates, losses):.2e} ({folder / 'lr_finder.csv'})")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    device = choose_device(args.device)
    amp = resolve_amp(args.amp, device)
    torch.backends.cudnn.benchmark = True  # few shapes, seen often: worth the search for the best algorithm

    data = load_data(
        args.dataset,
        args.data_dir,
        img_size=args.img_size,
        in_chans=args.in_chans,
        val_fraction=args.val_fraction,
        download=args.download,
    )
    torch.manual_seed(args.seed)
    model = make_model(args, data)
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    policy = make_policy(args, len(data.train))
    optimizer = create_optimizer(args, model)
    criterion = MarginLoss(args.m_plus, args.m_minus, args.margin_lambda)
    task = CapsuleTask(model, criterion, args.reconstruction_weight, device=device, verbose=False)
    if args.compile:
        task.compile()

    folder = prepare_folder(args)
    with Report(console, policy, folder, args.quiet, args.tensorboard) as report, StopSignal() as stop:
        trainer = Trainer(
            task,
            optimizer,
            policy,
            data.train,
            data.val,
            folder=folder,
            device=device,
            amp=amp,
            seed=args.seed,
            translate=default_translate(args.dataset) if args.translate is None else args.translate,
            eval_batch_size=args.eval_batch_size,
            clip_grad=args.clip_grad,
            save_every=args.save_every,
            num_workers=args.workers,
            cuda_graphs=args.cuda_graphs,
            metadata=describe(args, data, model, policy),
            on_step=report.step,
            on_epoch=report.epoch,
            should_stop=stop,
        )
        if not args.quiet:
            val = 0 if data.val is None else len(data.val)
            console.print(
                f"{args.model} ({sum(p.numel() for p in model.parameters()):,} parameters) on {args.dataset} "
                f"({len(data.train):,} train, {val:,} val, {len(data.test):,} test), {args.policy}, "
                f"{device.type} {'float32' if amp is None else str(amp).removeprefix('torch.')}, folder {folder}",
            )
        if args.policy == "lr_finder":
            return search_lr(trainer, folder, console)
        if args.resume and trainer.resume() and not args.quiet:
            console.print(f"resumed at epoch {trainer.position.epoch + 1}, step {trainer.position.step}")
        completed = trainer.fit()
    if not completed:
        console.print(f"stopped and saved: go on with --resume {folder}")
        return 130
    result = finish(trainer, args, data, folder)
    if args.results:
        add_result(Path(args.results), result, "recipes/train.py", argv)
    chosen = "last epoch" if result["eval_top1"] is None else f"best epoch {result['best_epoch']} by validation"
    console.print(
        f"test top1 {result['test_top1']:.4f} ({chosen}), {result['total_seconds']:.1f} s of training, {folder}",
    )
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # plain lines appear as they come, also through a pipe
    run(main)
