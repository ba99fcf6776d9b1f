"""A run of pruning in its folder: rounds of pruning and training."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from capszoo._version import __version__
from capszoo.checkpoint import read_metadata, save_weights
from capszoo.data import DataSplits, Loader
from capszoo.engine import CapsuleTask, Evaluation, Trainer, evaluate
from capszoo.engine.run import header_of, trainer_of
from capszoo.engine.run_folder import SUMMARY_COLUMNS, drop_state
from capszoo.errors import UsageError, first_line
from capszoo.files import check_kinds, read_json, read_rows, write_atomically, write_csv, write_json
from capszoo.precision import resolve_amp
from capszoo.registry import load_model

from .costs import cost
from .options import PruneOptions
from .pareto import PARETO_COLUMNS, parameters_text, plot_pareto
from .parts import count_parts
from .plan import prune_once

# Columns of every round that are computed with.
ROUND_NUMBERS = ("parameters", "macs", "float32_bytes", "val_top1", "val_loss", "train_seconds")


class Run:
    """A run in its folder: rounds that each start from the best weights of the one before.

    All that a round needs to start is in files, and it always reads them: a resumed run takes the same way as one that
    was not interrupted. `round-N/start.safetensors` holds the pruned weights, `round-N/round.json` says that the round
    is done. Round 0 is the given network.
    """

    def __init__(
        self,
        options: PruneOptions,
        criterion: nn.Module,
        data: DataSplits,
        plan: Sequence[Mapping[str, Any]],
        folder: Path,
        device: torch.device,
        say: Callable[[str], None],
        should_stop: Callable[[], bool],
    ):
        self.options, self.training, self.criterion, self.data = options, options.training, criterion.to(device), data
        self.plan, self.folder, self.device, self.say, self.should_stop = plan, folder, device, say, should_stop
        self.amp = resolve_amp(self.training.amp, device)
        self.rows: list[dict[str, Any]] = []

    def round_folder(self, number: int) -> Path:
        return self.folder / f"round-{number}"

    def start(self, model: nn.Module) -> None:
        """Keep the given network as round 0."""
        folder = self.round_folder(0)
        folder.mkdir(exist_ok=True)
        if not (folder / "round.json").exists():
            save_weights(folder / "best.safetensors", model, self.header(model, 0))
            measured = self.validate(load_model(folder / "best.safetensors").to(self.device))
            write_json(folder / "round.json", self.row(0, model, measured.top1, measured.loss))
        self.add_row(0)

    def train(self) -> bool:
        """Do all rounds that are left; False if stopped before the end."""
        return all(self.train_round(number) for number in range(1, len(self.plan) + 1))

    def train_round(self, number: int) -> bool:
        folder = self.round_folder(number)
        folder.mkdir(exist_ok=True)
        if not (folder / "round.json").exists():
            if self.should_stop() or not self.fit(number, *self.begin(number)):
                return False
        drop_state(folder)
        self.add_row(number)
        return True

    def begin(self, number: int) -> tuple[nn.Module, dict[str, float]]:
        """Return a round's pruned network, and what the validation split said of it."""
        start = self.round_folder(number) / "start.safetensors"
        if not start.exists():
            model = load_model(self.round_folder(number - 1) / "best.safetensors").to(self.device)
            batches = list(self.scored_images(number))
            model = prune_once(model, self.plan[number - 1], self.options.score, batches, self.criterion)
            measured = self.validate(model)
            before = {"top1": measured.top1, "loss": measured.loss}
            save_weights(start, model, {**self.header(model, number), "before": before})
        model = load_model(start)
        try:
            before = json.loads(read_metadata(start).get("before", "{}"))
            check_kinds(before, {"top1": float, "loss": float})
        except (AttributeError, ValueError, RecursionError) as error:
            raise UsageError(
                f"the header of {str(start)!r} is damaged ({first_line(error)}): delete it, and it is made again"
            ) from None
        return model, before

    def fit(self, number: int, model: nn.Module, before: dict[str, float]) -> bool:
        """Train a round's network; False if stopped."""
        folder = self.round_folder(number)
        seed = self.training.seed + number  # other shuffles and shifts than in the rounds before
        torch.manual_seed(seed)
        trainer = trainer_of(
            model,
            self.criterion,
            replace(self.training, seed=seed),
            self.data,
            self.device,
            folder=folder,
            metadata=self.facts(number),
            on_epoch=lambda trainer, row: self.show_epoch(number, trainer, row),
            should_stop=self.should_stop,
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
        path, row = self.folder / "result.json", self.rows[-1]
        options, training = self.options, self.training
        if path.exists():
            return read_json(path, {"test_top1": float, "total_seconds": float}, "delete it, and go on with --resume")
        model = load_model(self.folder / "best.safetensors").to(self.device)
        test = self.evaluate(model, self.data.test)
        result = {
            "model": model.pretrained_cfg["architecture"],
            "weights": options.weights,
            "dataset": training.dataset,
            "policy": training.policy,
            "keep": json.dumps(dict(options.keep)),
            "score": options.score,
            "rounds": options.rounds,
            **{key: row[key] for key in PARETO_COLUMNS[1:12]},
            "epochs": self.training.epochs,
            "batch_size": training.batch_size,
            "lr": training.lr,
            "best_epoch": row["best_epoch"],
            "eval_top1_unpruned": self.rows[0]["val_top1"],
            "eval_top1": row["val_top1"],
            "test_top1": test.top1,
            **({"test_mean_average_precision": test.mean_average_precision} if self.data.multi_label else {}),
            **({"test_exact_top_k": test.exact_top_k} if self.data.multi_label else {}),
            "test_margin_loss": test.loss,
            "test_reconstruction_error": test.reconstruction_error,
            "total_seconds": sum(row["train_seconds"] for row in self.rows),
            "seed": training.seed,
            "amp": "none" if self.amp is None else str(self.amp).removeprefix("torch."),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "capszoo": __version__,
        }
        write_json(path, result)
        return result

    def evaluate(self, model: nn.Module, split: Any) -> Evaluation:
        if self.training.channels_last:
            model.to(memory_format=torch.channels_last)
        task = CapsuleTask(model, self.criterion, device=self.device, verbose=False)
        return evaluate(task, self.loader(split, self.training.eval_batch_size, with_parts=True), self.amp)

    def validate(self, model: nn.Module) -> Evaluation:
        return self.evaluate(model, self.data.val)

    def loader(self, split: Any, batch_size: int, **kwargs: Any) -> Loader:
        return Loader(split, batch_size, self.device, num_workers=self.training.workers, **kwargs)

    def scored_images(self, number: int) -> Iterator:
        """Batches of the training images that a round's score is measured on, other ones in each round."""
        wanted = self.options.score_images
        size = min(self.training.eval_batch_size, wanted)
        seed = self.training.seed
        loader = self.loader(self.data.train, size, shuffle=True, seed=seed, epoch=number, with_parts=True)
        return itertools.islice(iter(loader), -(-wanted // size))

    def facts(self, number: int) -> dict[str, Any]:
        """Facts of the run for the header of the weights' files."""
        options = self.options
        return {
            "seed": self.training.seed,
            "pruned_from": options.weights,
            "score": options.score,
            "round": number,
            "rounds": options.rounds,
        }

    def header(self, model: nn.Module, number: int) -> dict[str, Any]:
        """The header of the weights' files, with facts of the run."""
        return header_of(model, self.criterion, self.training, self.data, **self.facts(number))

    def row(self, number: int, model: nn.Module, top1: float, loss: float) -> dict[str, Any]:
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
        filters = "" if row["conv1"] is None else f"{row['conv1']} filters, "
        self.say(
            f"round {number}/{len(self.plan)}: {filters}{row['types']} types, {row['capsules']} "
            f"capsules, {parameters_text(row)} parameters, {row['macs'] / 1e6:.1f} M macs, val top1 "
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
            f"round {number}/{len(self.plan)} epoch {row['epoch']:>3}/{self.training.epochs}{star} train top1 "
            f"{row['train_top1']:.4f} loss {row['train_loss']:.4f}  eval top1 {row['eval_top1']:.4f} loss "
            f"{row['eval_loss']:.4f}  lr {row['lr']:.2e}  {row['images_per_second']:.0f} img/s  "
            f"{row['epoch_seconds']:.1f} s"
        )
