"""The training loop."""

import math
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capszoo.data import Augmentation, Loader, Split, seeded_generator
from capszoo.errors import CheckpointError, DataError, Stopped, TrainingError

from .batch_norm import check_batch_norm
from .checks import check_policy, check_shares
from .distributed import ALONE, Ranks, StopVote
from .evaluate import check_statistics, evaluate, until_stopped
from .options import TrainingOptions
from .run_folder import Position, RunFolder, share_state
from .run_state import check_data_facts, data_facts, random_state, restore_strides, set_random_state
from .step import TrainingStep
from .task import CapsuleTask
from .warm_up import warm_up
from .watch import Watch


class Trainer:
    """Trains a capsule network under a policy and keeps its run folder.

    After each epoch the folder holds `summary.csv`, `last.safetensors`, `best.safetensors` (best top-1 on the
    validation split, ties broken by the lower loss; the last epoch's where there is no validation split) and
    `resume.safetensors`, from which :meth:`resume` goes on exactly: every batch, its augmentation and the learning
    rate are functions of (seed, epoch, step). The state before is kept as `resume-previous.safetensors`. Where labels
    are weights of the classes ``[N, J]``, top-1 (`train_top1`, `eval_top1`) is the exact-match accuracy, see
    :class:`Evaluation`.

    Args:
        task: The task with its model, on `device`. After `task.setup_ema` each step moves the average of the weights,
            and it is the average that is measured and kept.
        optimizer: Over the model's parameters; the policy sets its learning rate.
        policy: From :func:`capszoo.policies.create_policy`.
        train: Training split.
        val: Validation split, or None.
        folder: Run folder, which must exist; None keeps nothing.
        device: Where the model is.
        amp: Type for autocast, None for float32.
        seed: Seed of shuffling and augmentation.
        translate: Largest random shift of the training images, in pixels.
        augmentation: What else changes training images at random. Where it mixes them, an image counts as right in
            `train_top1` if the class with the largest share in it is predicted.
        eval_batch_size: Images per batch of the evaluation.
        clip_grad: Largest norm of the gradient; None for no limit.
        save_every: Also keep the resume state every so many steps; 0 for after epochs only.
        num_workers: Processes that read images, for data sets too large for memory.
        cuda_graphs: On a CUDA device, capture the step of a batch size once and replay it: at small batches launching
            hundreds of kernels takes longer than running them. Ignored where it is impossible: on other devices, with
            float16's scaler, with several ranks, and with optimizers that torch cannot capture.
        clock: Tells the seconds that training takes.
        ranks: The processes that train together. Batches are divided among them, so that any number of them takes the
            same steps; the first alone keeps the run folder.
        micro_batch: Most images of one forward pass; a rank's part of a batch is computed in as many passes as that
            takes, to save memory, and its gradients are added up.
        nonfinite: What to do about a step whose loss is infinite or not a number: 'stop', or 'skip', which leaves out
            every step whose loss or gradient is not finite (one wait for the device a step, no CUDA graphs).
        metadata: Facts for the header of the weights' files.
        options: What the trainer was made from, kept as its attribute; see :func:`capszoo.engine.run.make_trainer`.
        on_step: Called with the trainer after each step.
        on_epoch: Called with the trainer and the new row of the summary after each epoch.
        should_stop: Asked after each step; True saves the state and ends the training.
    """

    def __init__(
        self,
        task: CapsuleTask,
        optimizer: torch.optim.Optimizer,
        policy: Any,
        train: Split,
        val: Split | None = None,
        *,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
        amp: torch.dtype | None = None,
        seed: int = 0,
        translate: int = 0,
        augmentation: Augmentation | None = None,
        eval_batch_size: int = 256,
        clip_grad: float | None = None,
        save_every: int = 0,
        num_workers: int = 0,
        cuda_graphs: bool = True,
        clock: Callable[[], float] = time.perf_counter,
        ranks: Ranks = ALONE,
        micro_batch: int | None = None,
        nonfinite: str = "stop",
        metadata: dict[str, Any] | None = None,
        options: TrainingOptions | None = None,
        on_step: Callable[["Trainer"], None] = lambda trainer: None,
        on_epoch: Callable[["Trainer", dict], None] = lambda trainer, row: None,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self.task, self.policy, self.train_split, self.val_split = task, policy, train, val
        self.device, self.ranks = torch.device(device), ranks
        self.amp, self.seed, self.translate, self.eval_batch_size = amp, seed, translate, eval_batch_size
        self.augmentation = augmentation or Augmentation()
        self.save_every, self.num_workers, self.micro_batch, self.clock = save_every, num_workers, micro_batch, clock
        if nonfinite not in ("stop", "skip"):
            raise TrainingError(f"unknown nonfinite={nonfinite!r}: give stop or skip")
        check_statistics(task.model, train)
        self.augmentation.check_batches(policy.batch_size(epoch) for epoch in range(policy.epochs))
        batch_sizes = {policy.batch_size(epoch) for epoch in range(policy.epochs)}
        on_cpu = self.device.type == "cpu"
        check_policy(policy, len(train))
        check_batch_norm(task.model, ranks, micro_batch, batch_sizes, len(train), on_cpu)
        self.metadata, self.options = metadata or {}, options
        self.folder = None if folder is None else Path(folder)
        self.on_step, self.on_epoch, self.should_stop = on_step, on_epoch, should_stop
        self.step = TrainingStep(
            task,
            optimizer,
            self.device,
            amp,
            clip_grad,
            micro_batch,
            cuda_graphs,
            skips=nonfinite == "skip",
            ranks=ranks,
            mixed_labels=self.mixed_labels,
        )
        self.position = Position()
        self.watch = Watch(self)
        self.saved: tuple[int, int] | None = None  # epoch and step of the last checkpoint
        self._vote = StopVote(ranks, self.device)
        self.lr = 0.0  # of the last step taken

    @property
    def folder(self) -> Path | None:
        """The run folder; None on all ranks but the first, and where nothing is kept."""
        return None if self.run_folder is None else self.run_folder.path

    @folder.setter
    def folder(self, path: Path | None) -> None:
        self.run_folder = RunFolder(path, self.metadata) if path is not None and self.ranks.is_first else None

    @cached_property
    def _data_facts(self) -> dict[str, Any]:
        """What states say of the images; the checksum of their labels is made once."""
        return data_facts(self.train_split, self.val_split)

    @property
    def mixed_labels(self) -> bool:
        """Whether images of one class each are mixed, so that their labels are weights of the classes."""
        return self.augmentation.mixes and not self.train_split.multi_label

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What each step ends with."""
        return self.step.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self.step.optimizer = optimizer

    @property
    def loss(self) -> Tensor:
        """The loss of the last step, on the device."""
        return self.step.loss

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of the summary, one an epoch."""
        return self.position.history

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the best epoch, None before the first."""
        return self.position.best

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.position.epoch >= self.policy.epochs

    def running_means(self, sums: Tensor | None = None) -> dict[str, float]:
        """Means over the epoch so far: loss, margin_loss, reconstruction_loss, top1. Waits for the device.

        They are not a number while no step has counted.
        """
        *values, count = (self.step.sums if sums is None else sums).tolist()
        means = (value / count if count else math.nan for value in values)
        return dict(zip(("loss", "margin_loss", "reconstruction_loss", "top1"), means, strict=True))

    def fit(self) -> bool:
        """Train until the policy's last epoch; return False if `should_stop` ended it before, with all of it saved.

        Raises:
            TrainingError: If the loss stops being finite (what was saved before stays, `nonfinite.json` in the run
                folder names the step and its images), or a batch is too small for the number of ranks.
            DataError: If the images cannot be read any more; the state is saved.
            WriteError: If the run folder cannot be written; what was saved before stays.
        """
        check_shares(self.policy, self.ranks, self.position.epoch)
        if not self.ranks.is_first:
            # Random numbers of layers (dropout) must differ between ranks.
            key = self.seed, self.ranks.rank, self.position.epoch, self.position.step
            torch.manual_seed(seeded_generator(*key).initial_seed())
        if self.device.type == "cuda" and not self.finished:
            warm_up(self)
        while not self.finished:
            try:
                completed = self._train_epoch() and self._close_epoch()
            except DataError:
                if self.ranks.count == 1:  # the others are not at the same step
                    self.watch.check_finite()
                    self.save()
                    if self.should_stop():  # and what asked for it ended the processes that read images, too
                        return False
                raise
            if not completed:
                self.watch.check_finite()
                self.save()
                return False
        return True

    def _train_epoch(self) -> bool:
        """Train to the end of the current epoch; False if stopped before."""
        position, policy = self.position, self.policy
        batch_size = policy.batch_size(position.epoch)
        loader = self.make_loader(
            self.train_split,
            batch_size,
            share=(self.ranks.rank, self.ranks.count),
            shuffle=True,
            seed=self.seed,
            epoch=position.epoch,
            start_step=position.step,
            translate=self.translate,
            augmentation=self.augmentation,
            num_classes=self.task.model.num_classes,
            with_parts=True,
        )
        self.task.train()
        if hasattr(self.task.criterion, "set_progress"):
            self.task.criterion.set_progress(position.epoch / policy.epochs)
            self.step.captured = None  # a captured step keeps the numbers that it was captured with
        seconds_before, start, skipped_before = position.seconds, self.clock(), position.skipped - self.step.skipped
        for images, labels, *parts in loader:
            self.lr = policy.lr(policy.progress(position.epoch, position.step))
            batch_images = min(batch_size, len(self.train_split) - position.step * batch_size)
            self.step(images, labels, self.lr, batch_images, batch_size, *parts)
            if position.skipped == skipped_before + self.step.skipped:
                position.updates += 1
                self.task.update_ema(position.updates)
            position.skipped = skipped_before + self.step.skipped
            self.watch.check_skipped()
            position.step += 1
            position.seconds = seconds_before + self.clock() - start
            self.watch.see()
            self.on_step(self)
            if self._vote(self.should_stop):
                return False
            self.watch.look()
            if self.save_every and position.step % self.save_every == 0:
                self.watch.check_finite()
                self.save()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        position.seconds = seconds_before + self.clock() - start
        self.watch.check_finite()
        return True

    def _close_epoch(self) -> bool:
        """Evaluate, add the epoch's row and save; False if stopped before that."""
        position = self.position
        self.watch.check_saturation()
        sums = self.step.sums.clone()
        self.ranks.sum_(sums)
        means = self.running_means(sums)
        evaluation = None
        if self.val_split is not None:
            share = (self.ranks.rank, self.ranks.count)
            loader = self.make_loader(self.val_split, self.eval_batch_size, share=share, with_parts=True)
            batches = until_stopped(loader, lambda: self._vote(self.should_stop))
            try:
                evaluation = evaluate(self.task, batches, self.amp, self.ranks)
            except Stopped:
                return False
        row = {
            "epoch": position.epoch + 1,
            "train_loss": means["loss"],
            "train_margin_loss": means["margin_loss"],
            "train_reconstruction_loss": means["reconstruction_loss"],
            "train_top1": means["top1"],
            "eval_loss": None if evaluation is None else evaluation.loss,
            "eval_top1": None if evaluation is None else evaluation.top1,
            "lr": self.lr,
            "batch_size": self.policy.batch_size(position.epoch),
            "epoch_seconds": position.seconds,
            "images_per_second": len(self.train_split) / max(position.seconds, 1e-9),
            "skipped_steps": position.skipped,
        }
        improved = self.best is None or evaluation is None or _quality(row) > _quality(self.best)
        position.history.append(row)
        if improved:
            position.best = row
        position.total_seconds += position.seconds
        position.epoch, position.step, position.seconds, position.skipped = position.epoch + 1, 0, 0.0, 0
        self.step.sums.zero_()
        # The state first: if a run ends in between, it has what the best weights are made of, see RunFolder.mend_best.
        self.save()
        if improved and self.run_folder is not None:
            self.run_folder.write_best(self.task.kept_model, row)
        self.on_epoch(self, row)
        return True

    def make_loader(self, split: Split, batch_size: int, **kwargs: Any) -> Loader:
        """Make batches of a split as this run has them."""
        return Loader(split, batch_size, self.device, num_workers=self.num_workers, **kwargs)

    def save(self) -> None:
        """Write `summary.csv`, `last.safetensors` and the resume state.

        Raises:
            WriteError: If the folder cannot be written.
        """
        sums = self.step.sums.clone()
        self.ranks.sum_(sums)
        if self.run_folder is not None:
            state = {
                "position": dict(vars(self.position)),
                "sums": sums,
                "lr": self.lr,
                "model": self.task.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.step.scaler.state_dict(),
                "random": random_state(),
                "data": self._data_facts,
            }
            if self.task.has_ema():
                state["ema"] = self.task.kept_model.state_dict()
            self.run_folder.write(self.task.kept_model, state, self.history)
        if self.run_folder is not None or not self.ranks.is_first:
            self.saved = self.position.epoch, self.position.step

    def resume(self) -> bool:
        """Take up the state in the run folder; return False where there is none, and training starts anew.

        A last state that is damaged is passed over for the one before it, with a warning in the log.

        Raises:
            CheckpointError: If the states are damaged or those of another model or of other images.
        """
        if self.run_folder is not None:
            self.run_folder.remove_leftovers()
        found = (None, None) if self.run_folder is None else self.run_folder.find_state()
        state = share_state(*found, self.ranks, self.device)
        if state is None:
            return False
        check_data_facts(state, self._data_facts)
        try:
            self.task.model.load_state_dict(state["model"])
            if self.task.has_ema():
                self.task.kept_model.load_state_dict(state["ema"])
            fused = [group.get("fused") for group in self.optimizer.param_groups]
            # Capturable optimizers keep their counts on the device: of this run's steps, not of those before.
            groups = [
                {**group, "capturable": self.step.cuda_graphs} if "capturable" in group else group
                for group in state["optimizer"]["param_groups"]
            ]
            self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
            for group, value in zip(self.optimizer.param_groups, fused, strict=True):
                if "fused" in group:  # that of this device, not of the one on which the run began
                    group["fused"] = value
            if state["scaler"]:  # empty of a run that needed none
                self.step.scaler.load_state_dict(state["scaler"])
            set_random_state(state["random"])
            self.position = Position(**state["position"])
            if self.ranks.is_first:  # they are those of all ranks
                self.step.sums.copy_(state["sums"])
            self.lr = float(state["lr"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            folder = "" if self.folder is None else f" in {str(self.folder)!r}"
            raise CheckpointError(
                f"the state{folder} is that of another model, optimizer or version of capszoo: start a new run"
            ) from None
        restore_strides(self.optimizer)
        self.saved = self.position.epoch, self.position.step
        if self.run_folder is not None:
            self.run_folder.mend_best(self.position, self.task.kept_model)
        return True


def _quality(row: dict[str, Any]) -> tuple[float, float]:
    """What epochs are compared by: top-1, and the lower loss where that is equal."""
    return row["eval_top1"], -row["eval_loss"]
