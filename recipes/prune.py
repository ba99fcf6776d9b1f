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

import argparse
import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import capszoo
from capszoo.checkpoint import read_metadata, save_weights
from capszoo.command_line import (
    OptionParser,
    StopSignal,
    add_policy_options,
    add_result,
    check_results,
    key_value,
    parse_resumable,
    run,
)
from capszoo.data import DataSplits, Loader, default_translate, load_data
from capszoo.engine import Evaluation, Trainer, evaluate
from capszoo.engine.options import check_ranges, create_optimizer, policy_from
from capszoo.engine.run_folder import SUMMARY_COLUMNS, default_folder, drop_state, hold_folder
from capszoo.engine.task import CapsuleTask
from capszoo.errors import UsageError, first_line
from capszoo.files import check_kinds, read_json, read_rows, write_atomically, write_csv, write_json
from capszoo.policies import Policy, list_policies
from capszoo.precision import choose_device, resolve_amp
from capszoo.pretrained import image_statistics, read_table
from capszoo.prune import PARTS, SCORES, cost, count_parts, prune, target_counts
from capszoo.registry import model_header

# Options that only say where and how a run is computed may change when it is resumed.
MAY_CHANGE_ON_RESUME = {"resume", "data_dir", "device", "workers", "quiet", "save_every", "results"}
# Options that belong to one call of this script and not to the run.
NOT_SAVED = {"config", "resume", "output", "results"}
PARETO_COLUMNS = (
    "round",
    "conv1",
    "types",
    "capsules",
    "decoder_1",
    "decoder_2",
    "parameters",
    "parameters_with_decoder",
    "macs",
    "routing_macs",
    "float32_bytes",
    "float16_bytes",
    "val_top1_before",  # after pruning, before the training of the round
    "val_loss_before",
    "val_top1",
    "val_loss",
    "best_epoch",
    "train_seconds",
)

MOST_ROUNDS = 1000
# Columns of every round that are computed with.
ROUND_NUMBERS = ("parameters", "macs", "float32_bytes", "val_top1", "val_loss", "train_seconds")


def build_parser() -> OptionParser:
    parser = OptionParser(description="Prune a trained capsule network, and train what is left.")
    group = parser.add_argument_group("what").add_argument
    group("weights", nargs="?", help="a safetensors file of train.py or prune.py, or the name of shipped weights")
    group(
        "--keep",
        nargs="*",
        type=key_value,
        default=[],
        metavar="PART=N",
        help=f"what to keep of {', '.join(PARTS)}: a number, a fraction such as 0.25, or indices such as [0,3,5]; "
        "decoder takes a pair",
    )
    group("--score", default="taylor", help=f"what ranks the parts: {', '.join(SCORES)}")
    group("--score-images", type=int, default=2048, help="training images that the score is measured on")
    group("--rounds", type=int, default=1, help="rounds of pruning and training in which to get there")
    group("--config", metavar="FILE.yaml", help="take options from a YAML file of 'option: value' lines")
    group("--dataset", help="data set; default the one that the weights were trained on")
    group("--data-dir", default="data", help="folder that has the data set")
    group("--download", action="store_true", help="let torchvision download the data set into --data-dir")
    group("--val-fraction", type=float, default=0.1, help="part of the training images kept for validation")
    group(
        "--decoder",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="train with the decoder; default where the weights hold one",
    )
    group("--output", metavar="RUN_DIR", help="run folder; default runs/prune-WEIGHTS-DATASET-TIME")
    group("--resume", metavar="RUN_DIR", help="go on with the run in this folder")
    group = parser.add_argument_group("training").add_argument
    group("--policy", default="one_cycle", help=", ".join(p for p in list_policies() if p != "lr_finder"))
    group("--epochs", type=int, default=5, help="passes over the training images in each round")
    group(
        "--batch-size",
        type=int,
        help="images a step, for policies with a fixed batch size; default 128, or 16 "
        "for fewer than 10,000 training images, 8 for fewer than 1,000",
    )
    group("--lr", type=float, default=1e-4, help="base learning rate, a tenth of that of training from scratch")
    group("--opt", default="adam", help="optimizer, by timm's names")
    group("--weight-decay", type=float, default=0.0, help="weight decay")
    group("--clip-grad", type=float, help="largest norm of the gradient")
    group("--reconstruction-weight", type=float, default=0.0005, help="weight of the reconstruction loss")
    group("--translate", type=int, help="random shift of training images, in pixels; default by data set, else 0")
    group("--seed", type=int, default=0, help="seed of shuffling and augmentation, and of the scored images")
    group = parser.add_argument_group("computing").add_argument
    group("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    group("--amp", default="auto", choices=["auto", "none", "bf16", "fp16"], help="precision of the training")
    group("--compile", action="store_true", help="use torch.compile")
    group("--cuda-graphs", action=argparse.BooleanOptionalAction, default=True, help="replay captured steps on a GPU")
    group("--channels-last", action=argparse.BooleanOptionalAction, default=True, help="memory format of the maps")
    group("--eval-batch-size", type=int, default=256, help="images a step in evaluation and scoring")
    group("--workers", type=int, default=2, help="processes that read images, for sets too large for memory")
    group("--save-every", type=int, default=0, help="also save the resume state every so many steps")
    group = parser.add_argument_group("reporting").add_argument
    group("--results", metavar="FILE.csv", help="also add the result as a row to this table")
    group("--quiet", action="store_true", help="print the result alone")
    add_policy_options(parser, [policy for policy in list_policies() if policy != "lr_finder"])
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the options; with --resume, those of the run."""
    return parse_resumable(build_parser, MAY_CHANGE_ON_RESUME, argv)


def open_weights(weights: str | None, decoder: bool | None) -> tuple[torch.nn.Module, str | None]:
    """Return the model, and the data set that its weights were trained on, if known."""
    if weights is None:
        raise UsageError("no weights are named: give a safetensors file or shipped weights, or --resume RUN_DIR")
    if capszoo.is_model(weights):
        model = capszoo.create_model(weights, pretrained=True, decoder=decoder is not False)
        name = f"{weights.partition('.')[0]}.{model.pretrained_cfg.get('tag')}"
        return model, read_table().get(name, {}).get("dataset")
    if not Path(weights).is_file():
        known = ", ".join(capszoo.list_pretrained()) or "none yet"
        raise UsageError(f"{weights!r} is no file and no shipped weights (there are: {known}): check the path")
    model = capszoo.load_model(weights, **({} if decoder is None else {"decoder": decoder}))
    return model, read_metadata(weights).get("dataset")


def open_data(args: argparse.Namespace, model: torch.nn.Module) -> DataSplits:
    data = load_data(
        args.dataset,
        args.data_dir,
        img_size=model.img_size,
        in_chans=model.in_chans,
        val_fraction=args.val_fraction,
        download=args.download,
    )
    if data.num_classes != model.num_classes:
        raise UsageError(
            f"{args.dataset!r} has {data.num_classes} classes, the model has {model.num_classes}: check --dataset"
        )
    data.normalize(*image_statistics(model))
    if data.val is None:
        raise UsageError("rounds are compared on the validation split: give --val-fraction above 0")
    return data


def make_policy(args: argparse.Namespace, num_images: int) -> Policy:
    """Make the policy of each round."""
    if args.policy == "lr_finder":
        raise UsageError("--policy lr_finder trains nothing: use it in recipes/train.py")
    return policy_from(args, num_images)


def schedule(args: argparse.Namespace, model: torch.nn.Module) -> list[dict[str, Any]]:
    """What to keep in each round: numbers that fall in the same proportion from round to round.

    With a present number n and an asked one m, round r of R keeps ``n (m / n)^(r / R)``, rounded.
    """
    keep = dict(args.keep)
    if not keep:
        raise UsageError("nothing says what to keep: give --keep, such as --keep types=8 or --keep capsules=0.1")
    if len(keep) < len(args.keep):
        raise UsageError("--keep names a part twice: give each part once")
    if not 1 <= args.rounds <= MOST_ROUNDS:
        raise UsageError(f"--rounds {args.rounds} is not possible: give 1 to {MOST_ROUNDS}")
    if args.score_images < 1:
        raise UsageError(f"--score-images {args.score_images} is not possible: give 1 or more")
    targets, counts = target_counts(model, keep, args.score), count_parts(model)
    if args.rounds == 1:
        return [keep]
    for part, wanted in keep.items():
        if isinstance(wanted, list) and (part != "decoder" or any(isinstance(item, list) for item in wanted)):
            raise UsageError(
                f"--keep {part}={wanted} names indices, and --rounds {args.rounds} ranks anew: give a number"
            )

    def number(present: int, asked: int, done: int) -> int:
        return max(asked, round(present * (asked / present) ** (done / args.rounds)))

    plan = []
    for done in range(1, args.rounds + 1):
        wanted = {}
        for part, asked in targets.items():
            if part == "decoder":
                wanted[part] = tuple(number(n, m, done) for n, m in zip(counts[part], asked, strict=True))
            else:
                wanted[part] = number(counts[part], asked, done)
        plan.append(wanted)
    return plan


def prune_once(model: torch.nn.Module, wanted: dict[str, Any], score: str, batches: list) -> torch.nn.Module:
    """Prune part by part; a number that the parts before have gone below already asks for nothing more."""
    for part in (part for part in PARTS if part in wanted):
        keep = wanted[part]
        if isinstance(keep, int):
            keep = min(keep, count_parts(model)[part])
        model, _ = prune(model, {part: keep}, score, batches)
    return model


def scored_images(args: argparse.Namespace, data: DataSplits, device: torch.device, number: int) -> Iterator:
    """Batches of the training images that a round's score is measured on, other ones in each round."""
    size = min(args.eval_batch_size, args.score_images)
    loader = Loader(data.train, size, device, shuffle=True, seed=args.seed, epoch=number, num_workers=args.workers)
    return itertools.islice(iter(loader), -(-args.score_images // size))


def hold_run_folder(args: argparse.Namespace) -> AbstractContextManager[Path]:
    """Make the run folder; the last thing before work starts, so that no error leaves one behind."""
    import yaml

    weights = Path(args.weights).parent.name if Path(args.weights).is_file() else args.weights
    default = default_folder("prune", weights, Path(args.dataset).name)
    folder = Path(args.output) if args.output else default
    if args.resume:
        return hold_folder(folder, None)
    values = {key: value for key, value in vars(args).items() if key not in NOT_SAVED}
    values["keep"] = dict(args.keep)
    options = yaml.safe_dump(values, sort_keys=False)
    return hold_folder(
        folder,
        lambda folder: f"# python recipes/prune.py --config {folder / 'args.yaml'}\n{options}",
        is_default=not args.output,
    )


class Run:
    """A run in its folder: rounds that each start from the best weights of the one before.

    All that a round needs to start is in files, and it always reads them: a resumed run takes the same way as one that
    was not interrupted. `round-N/start.safetensors` holds the pruned weights, `round-N/round.json` says that the round
    is done. Round 0 is the given network.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        data: DataSplits,
        policy: Policy,
        plan: list[dict[str, Any]],
        folder: Path,
        device: torch.device,
        amp: torch.dtype | None,
        console: Console,
        stop: StopSignal,
    ):
        self.args, self.data, self.policy, self.plan, self.folder = args, data, policy, plan, folder
        self.device, self.amp, self.console, self.stop = device, amp, console, stop
        self.rows: list[dict[str, Any]] = []

    def round_folder(self, number: int) -> Path:
        return self.folder / f"round-{number}"

    def start(self, model: torch.nn.Module) -> None:
        """Keep the given network as round 0."""
        folder = self.round_folder(0)
        folder.mkdir(exist_ok=True)
        if not (folder / "round.json").exists():
            save_weights(folder / "best.safetensors", model, self.header(model, 0))
            measured = self.validate(capszoo.load_model(folder / "best.safetensors").to(self.device))
            write_json(folder / "round.json", self.row(0, model, measured.top1, measured.loss))
        self.add_row(0)

    def train(self) -> bool:
        """Do all rounds that are left; False if stopped before the end."""
        return all(self.train_round(number) for number in range(1, len(self.plan) + 1))

    def train_round(self, number: int) -> bool:
        folder = self.round_folder(number)
        folder.mkdir(exist_ok=True)
        if not (folder / "round.json").exists():
            if self.stop() or not self.fit(number, *self.begin(number)):
                return False
        drop_state(folder)
        self.add_row(number)
        return True

    def begin(self, number: int) -> tuple[torch.nn.Module, dict[str, float]]:
        """Return a round's pruned network, and what the validation split said of it."""
        start = self.round_folder(number) / "start.safetensors"
        if not start.exists():
            model = capszoo.load_model(self.round_folder(number - 1) / "best.safetensors").to(self.device)
            batches = list(scored_images(self.args, self.data, self.device, number))
            model = prune_once(model, self.plan[number - 1], self.args.score, batches)
            measured = self.validate(model)
            before = {"top1": measured.top1, "loss": measured.loss}
            save_weights(start, model, {**self.header(model, number), "before": before})
        model = capszoo.load_model(start)
        try:
            before = json.loads(read_metadata(start).get("before", "{}"))
            check_kinds(before, {"top1": float, "loss": float})
        except (AttributeError, ValueError, RecursionError) as error:
            raise UsageError(
                f"the header of {str(start)!r} is damaged ({first_line(error)}): delete it, and it is made again"
            ) from None
        return model, before

    def fit(self, number: int, model: torch.nn.Module, before: dict[str, float]) -> bool:
        """Train a round's network; False if stopped."""
        args, folder = self.args, self.round_folder(number)
        seed = args.seed + number  # other shuffles and shifts than in the rounds before
        torch.manual_seed(seed)
        model.to(self.device)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        task = CapsuleTask(model, reconstruction_weight=args.reconstruction_weight, device=self.device, verbose=False)
        if args.compile:
            task.compile()
        trainer = Trainer(
            task,
            create_optimizer(args, model),
            self.policy,
            self.data.train,
            self.data.val,
            folder=folder,
            device=self.device,
            amp=self.amp,
            seed=seed,
            translate=default_translate(args.dataset) if args.translate is None else args.translate,
            eval_batch_size=args.eval_batch_size,
            clip_grad=args.clip_grad,
            save_every=args.save_every,
            num_workers=args.workers,
            cuda_graphs=args.cuda_graphs,
            metadata=self.header(model, number),
            on_epoch=lambda trainer, row: self.show_epoch(number, trainer, row),
            should_stop=self.stop,
        )
        if trainer.resume():
            self.say(f"resumed in round {number} at epoch {trainer.position.epoch + 1}, step {trainer.position.step}")
        self.write_summary()
        if not trainer.fit():
            return False
        best = trainer.best
        row = self.row(number, model, best["eval_top1"], best["eval_loss"])
        row.update(
            val_top1_before=before["top1"],
            val_loss_before=before["loss"],
            best_epoch=best["epoch"],
            train_seconds=trainer.position.total_seconds,
        )
        for name in ("best.safetensors", "last.safetensors"):
            write_atomically(self.folder / name, lambda temporary, name=name: shutil.copyfile(folder / name, temporary))
        write_json(folder / "round.json", row)
        return True

    def finish(self) -> dict[str, Any]:
        """Measure the best epoch of the last round on the test set, once, and write result.json."""
        path, args, row = self.folder / "result.json", self.args, self.rows[-1]
        if path.exists():
            return read_json(path, {"test_top1": float, "total_seconds": float}, "delete it, and go on with --resume")
        model = capszoo.load_model(self.folder / "best.safetensors").to(self.device)
        test = self.evaluate(model, self.data.test)
        result = {
            "model": model.pretrained_cfg["architecture"],
            "weights": args.weights,
            "dataset": args.dataset,
            "policy": args.policy,
            "keep": json.dumps(dict(args.keep)),
            "score": args.score,
            "rounds": args.rounds,
            **{key: row[key] for key in PARETO_COLUMNS[1:12]},
            "epochs": self.policy.epochs,
            "batch_size": args.batch_size,
            "lr": args.lr,
            "best_epoch": row["best_epoch"],
            "eval_top1_unpruned": self.rows[0]["val_top1"],
            "eval_top1": row["val_top1"],
            "test_top1": test.top1,
            **({"test_mean_average_precision": test.mean_average_precision} if self.data.multi_label else {}),
            "test_margin_loss": test.loss,
            "test_reconstruction_error": test.reconstruction_error,
            "total_seconds": sum(row["train_seconds"] for row in self.rows),
            "seed": args.seed,
            "amp": "none" if self.amp is None else str(self.amp).removeprefix("torch."),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "capszoo": capszoo.__version__,
        }
        write_json(path, result)
        return result

    def evaluate(self, model: torch.nn.Module, split: Any) -> Evaluation:
        if self.args.channels_last:
            model.to(memory_format=torch.channels_last)
        loader = Loader(split, self.args.eval_batch_size, self.device, num_workers=self.args.workers)
        return evaluate(model, loader, self.amp)

    def validate(self, model: torch.nn.Module) -> Evaluation:
        return self.evaluate(model, self.data.val)

    def header(self, model: torch.nn.Module, number: int) -> dict[str, Any]:
        """The header of the weights' files, with facts of the run."""
        return model_header(
            model,
            dataset=self.args.dataset,
            class_names=self.data.class_names,
            policy=self.args.policy,
            epochs=self.policy.epochs,
            seed=self.args.seed,
            pruned_from=self.args.weights,
            score=self.args.score,
            round=number,
            rounds=self.args.rounds,
        )

    def row(self, number: int, model: torch.nn.Module, top1: float, loss: float) -> dict[str, Any]:
        counts = count_parts(model)
        decoder = counts.pop("decoder", (None, None))
        return {
            "round": number,
            **counts,
            "decoder_1": decoder[0],
            "decoder_2": decoder[1],
            **asdict(cost(model)),
            "val_top1_before": None,
            "val_loss_before": None,
            "val_top1": top1,
            "val_loss": loss,
            "best_epoch": None,
            "train_seconds": 0.0,
        }

    def add_row(self, number: int) -> None:
        kinds = dict.fromkeys(ROUND_NUMBERS, float)
        kinds.update(dict.fromkeys(("val_top1_before", "val_loss_before"), float if number else type(None)))
        remedy = "delete it, and the round is done again with --resume"
        row = read_json(self.round_folder(number) / "round.json", {"round": int, **kinds}, remedy)
        row = {key: row.get(key) for key in PARETO_COLUMNS}
        self.rows.append(row)
        write_csv(self.folder / "pareto.csv", PARETO_COLUMNS, self.rows)
        plot_pareto(self.rows, self.folder / "pareto.png")
        self.write_summary()
        self.say(
            f"round {number}/{len(self.plan)}: {row['conv1']} filters, {row['types']} types, {row['capsules']} "
            f"capsules, {row['parameters']:,} parameters, {row['macs'] / 1e6:.1f} M macs, val top1 "
            + (
                f"{row['val_top1_before']:.4f} pruned, {row['val_top1']:.4f} trained"
                if number
                else f"{row['val_top1']:.4f}"
            )
        )

    def write_summary(self) -> None:
        """Put the epochs of all rounds into one table."""
        rows: list[dict[str, Any]] = []
        for number in range(1, len(self.plan) + 1):
            path = self.round_folder(number) / "summary.csv"
            if path.exists():
                found = read_rows(path, "delete it, and go on with --resume")
                rows += [{"round": number, **{key: row.get(key) for key in SUMMARY_COLUMNS}} for row in found]
        write_csv(self.folder / "summary.csv", ("round", *SUMMARY_COLUMNS), rows)

    def show_epoch(self, number: int, trainer: Trainer, row: dict[str, Any]) -> None:
        self.write_summary()
        star = "*" if trainer.position.best_epoch == row["epoch"] else " "
        self.say(
            f"round {number}/{len(self.plan)} epoch {row['epoch']:>3}/{self.policy.epochs}{star} train top1 "
            f"{row['train_top1']:.4f} loss {row['train_loss']:.4f}  eval top1 {row['eval_top1']:.4f} loss "
            f"{row['eval_loss']:.4f}  lr {row['lr']:.2e}  {row['images_per_second']:.0f} img/s  "
            f"{row['epoch_seconds']:.1f} s"
        )

    def say(self, text: str) -> None:
        if not self.args.quiet:
            self.console.print(text)


def plot_pareto(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw validation accuracy over size, a point a round, before and after its training.

    Args:
        rows: Rows of pareto.csv, of which round 0 is the given network.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    sizes = [row["float32_bytes"] / 1e6 for row in rows]
    axes.plot(sizes, [100 * row["val_top1"] for row in rows], "o-", label="trained after pruning")
    pruned = [row for row in rows if row["round"]]
    before = [100 * row["val_top1_before"] for row in pruned]
    axes.plot([row["float32_bytes"] / 1e6 for row in pruned], before, "x:", label="pruned")
    for size, row in zip(sizes, rows, strict=True):
        axes.annotate(
            str(row["round"]), (size, 100 * row["val_top1"]), xytext=(0, 6), textcoords="offset points", ha="center"
        )
    if max(sizes) > 3 * min(sizes):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 4, 6, 8)))
        axes.xaxis.set_major_formatter(lambda size, _: f"{size:g}")
        axes.xaxis.set_minor_formatter(lambda size, _: f"{size:g}")
    axes.set_xlabel("weights without decoder, float32, MB")
    axes.set_ylabel("validation accuracy, %")
    axes.margins(y=0.15)
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_ranges(args)
    console = Console(highlight=False, soft_wrap=True)
    device = choose_device(args.device)
    amp = resolve_amp(args.amp, device)
    torch.backends.cudnn.benchmark = True  # few shapes, seen often: worth the search for the best algorithm
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError('the figure of a run needs pip install "capszoo[train]"') from None

    # A resumed run has the given network in its folder, and needs the file no more.
    kept = Path(args.output) / "round-0" / "best.safetensors" if args.resume else None
    if kept is not None and kept.exists():
        model = capszoo.load_model(kept)
    else:
        model, trained_on = open_weights(args.weights, args.decoder)
        args.dataset = args.dataset or trained_on
    if args.dataset is None:
        raise UsageError(f"{args.weights!r} does not say what data set it was trained on: give --dataset")
    plan = schedule(args, model)
    data = open_data(args, model)
    policy = make_policy(args, len(data.train))
    create_optimizer(args, model)

    if args.results:
        check_results(Path(args.results))
    with hold_run_folder(args) as folder, StopSignal() as stop:
        for leftover in folder.glob(".*.tmp"):  # of a run killed while it wrote
            leftover.unlink()
        work = Run(args, data, policy, plan, folder, device, amp, console, stop)
        work.say(
            f"{args.weights} on {args.dataset} ({len(data.train):,} train, {len(data.val):,} val, {len(data.test):,} "
            f"test), score {args.score}, {args.policy}, {device.type} "
            f"{'float32' if amp is None else str(amp).removeprefix('torch.')}, folder {folder}"
        )
        if data.multi_label:
            work.say("images show several classes: top1 is the part of them with all classes right (exact match)")
        work.start(model)
        if not work.train():
            console.print(f"stopped and saved: go on with --resume {folder}")
            return stop.exit_code
    result = work.finish()
    if args.results:
        add_result(Path(args.results), result, "python recipes/prune.py", argv)
    first, last = work.rows[0], work.rows[-1]
    console.print(
        f"test top1 {result['test_top1']:.4f}, val top1 {first['val_top1']:.4f} -> {last['val_top1']:.4f}, parameters "
        f"{first['parameters']:,} -> {last['parameters']:,}, macs {first['macs'] / 1e6:.1f} M -> "
        f"{last['macs'] / 1e6:.1f} M, {result['total_seconds']:.1f} s of training, {folder}"
    )
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # plain lines appear as they come, also through a pipe
    run(main)
