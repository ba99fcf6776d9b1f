"""Train and evaluate loops."""

import csv
import io
import json
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import (
    CheckpointError,
    load_state,
    random_state,
    save_state,
    save_weights,
    set_random_state,
    write_atomically,
)
from .data import Loader, Split
from .distributed import ALONE, Ranks
from .layers import capsule_lengths
from .loader import seeded_generator
from .losses import margin_loss, reconstruction_loss
from .task import CapsuleTask

__all__ = ["Evaluation", "Trainer", "TrainingError", "autocast", "evaluate", "find_lr", "resolve_amp"]

SUMMARY_COLUMNS = (
    "epoch",
    "train_loss",
    "train_margin_loss",
    "train_reconstruction_loss",
    "train_top1",
    "eval_loss",
    "eval_top1",
    "lr",
    "batch_size",
    "epoch_seconds",
    "images_per_second",
)
_logger = logging.getLogger(__name__)

# Steps taken one operator at a time before one is captured: kernels are compiled and tuned in them, which a capture
# does not allow.
_STEPS_BEFORE_CAPTURE = 3

# Ranks ask each other so often whether one of them shall stop; each question waits for the slowest.
_STEPS_BETWEEN_QUESTIONS = 10

_AMP_TYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingError(ValueError):
    """Training cannot start or go on; the message says why and what to do."""


def resolve_amp(amp: str, device: torch.device) -> torch.dtype | None:
    """Turn the name of a precision into the type that autocast takes, None for float32.

    Args:
        amp: 'auto' (bfloat16 where the processor computes in it, float16 on older CUDA devices, else float32),
            'none', 'bf16' or 'fp16'.
        device: Where the model runs.

    Raises:
        TrainingError: If there is no such precision, or not on this device.
    """
    if amp == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        # Without hardware for it, bfloat16 is emulated and slower than float32.
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else None
    if amp not in _AMP_TYPES:
        raise TrainingError(f"unknown precision amp={amp!r}. Known: auto, {', '.join(_AMP_TYPES)}")
    if amp == "fp16" and device.type == "cpu":
        raise TrainingError("amp='fp16' needs a GPU: use bf16, none or auto on a CPU")
    return _AMP_TYPES[amp]


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast to `dtype` on `device`; nothing where it is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measures.

    Attributes:
        top1: Fraction of images whose longest class capsule is the right one.
        margin_loss: Mean margin loss.
        reconstruction_error: Mean over images of the summed squared pixel differences, drawn from the longest
            capsule; None without decoder.
        confusion: Counts ``[J, J]``, true class by predicted class.
    """

    top1: float
    margin_loss: float
    reconstruction_error: float | None
    confusion: Tensor


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], amp: torch.dtype | None = None, ranks: Ranks = ALONE
) -> Evaluation:
    """Measure a model on labelled images.

    Args:
        model: A capsule network; left in the mode it was in.
        loader: Batches of images ``[B, C, H, W]`` in [0, 1] and labels ``[B]``, on the model's device.
        amp: Type for autocast.
        ranks: Processes that each have a part of the images; all get the measures of the whole.

    Raises:
        TrainingError: If there are no images.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    decoder = getattr(model, "decoder", None)
    num_classes = model.num_classes
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    for images, labels in loader:
        if not len(labels):
            continue  # a last batch with fewer images than ranks
        with autocast(device, amp):
            if decoder is None:
                lengths, drawn = model(images), None
            else:
                capsules = model.forward_capsules(images)
                lengths = capsule_lengths(capsules)
                drawn = decoder(capsules, lengths.argmax(dim=1))
        predicted = lengths.argmax(dim=1)
        confusion += torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
        sums[0] += margin_loss(lengths, labels) * len(labels)
        if drawn is not None:
            sums[1] += reconstruction_loss(drawn, images) * len(labels)
    model.train(was_training)
    ranks.sum_(sums, confusion)
    confusion = confusion.view(num_classes, num_classes).cpu()
    count = int(confusion.sum())
    if count == 0:
        raise TrainingError("there are no images to evaluate on")
    margin, reconstruction = (sums / count).tolist()
    return Evaluation(
        top1=int(confusion.diagonal().sum()) / count,
        margin_loss=margin,
        reconstruction_error=None if decoder is None else reconstruction,
        confusion=confusion,
    )


@dataclass
class _Position:
    """Where a run stands; all of it goes into the resume state."""

    epoch: int = 0
    step: int = 0  # within the epoch
    seconds: float = 0.0  # of the epoch so far
    total_seconds: float = 0.0
    best_epoch: int = 0  # counted from 1, 0 before the first
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Trains a capsule network under a policy and keeps its run folder.

    After each epoch the folder holds `summary.csv`, `last.safetensors`, `best.safetensors` (best top-1 on the
    validation split, ties broken by the lower loss; the last epoch's where there is no validation split) and
    `resume.safetensors`, from which :meth:`resume` goes on exactly: every batch, its augmentation and the learning
    rate are functions of (seed, epoch, step).

    Args:
        task: The task with its model, on `device`.
        optimizer: Over the model's parameters; the policy sets its learning rate.
        policy: From :func:`capszoo.policies.create_policy`.
        train: Training split.
        val: Validation split, or None.
        folder: Run folder, which must exist; None keeps nothing.
        device: Where the model is.
        amp: Type for autocast, None for float32.
        seed: Seed of shuffling and augmentation.
        translate: Largest random shift of the training images, in pixels.
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
        metadata: Facts for the header of the weights' files.
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
        eval_batch_size: int = 256,
        clip_grad: float | None = None,
        save_every: int = 0,
        num_workers: int = 0,
        cuda_graphs: bool = True,
        clock: Callable[[], float] = time.perf_counter,
        ranks: Ranks = ALONE,
        micro_batch: int | None = None,
        metadata: dict[str, Any] | None = None,
        on_step: Callable[["Trainer"], None] = lambda trainer: None,
        on_epoch: Callable[["Trainer", dict], None] = lambda trainer, row: None,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self.task, self.optimizer, self.policy, self.train_split, self.val_split = task, optimizer, policy, train, val
        self.folder = None if folder is None else Path(folder)
        self.device = torch.device(device)
        self.amp, self.seed, self.translate, self.eval_batch_size = amp, seed, translate, eval_batch_size
        self.clip_grad, self.save_every, self.num_workers = clip_grad, save_every, num_workers
        self.clock, self.ranks, self.micro_batch = clock, ranks, micro_batch
        if not ranks.is_first:
            self.folder = None
        self.metadata = metadata or {}
        self.on_step, self.on_epoch, self.should_stop = on_step, on_epoch, should_stop
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp is torch.float16)
        self.cuda_graphs = (
            cuda_graphs
            and self.device.type == "cuda"
            and ranks.count == 1
            and not self.scaler.is_enabled()
            and "capturable" in optimizer.defaults
        )
        self._rate = torch.zeros((), device=self.device)  # the learning rate as captured steps read it
        self._captured: _CapturedStep | None = None
        self.position = _Position()
        self._batch_images = 0  # of all ranks together, in the step being taken
        # Of the last step taken.
        self.lr = 0.0
        self.loss = torch.zeros((), device=self.device)
        # Sums over the epoch's images: loss, margin loss, reconstruction loss, right answers, images.
        self.sums = torch.zeros(5, dtype=torch.float64, device=self.device)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of the summary, one an epoch."""
        return self.position.history

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the best epoch, None before the first."""
        return self.history[self.position.best_epoch - 1] if self.position.best_epoch else None

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.position.epoch >= self.policy.epochs

    def running_means(self) -> dict[str, float]:
        """Means over the epoch so far: loss, margin_loss, reconstruction_loss, top1. Waits for the device."""
        loss, margin, reconstruction, right, count = self.sums.tolist()
        count = max(count, 1.0)
        return {
            "loss": loss / count,
            "margin_loss": margin / count,
            "reconstruction_loss": reconstruction / count,
            "top1": right / count,
        }

    def fit(self) -> bool:
        """Train until the policy's last epoch; return False if `should_stop` ended it before.

        Raises:
            TrainingError: If the loss stops being finite (what was saved before stays), or a batch is too small for
                the number of ranks.
        """
        self._check_ranks()
        if not self.ranks.is_first:
            # Random numbers of layers (dropout) must differ between ranks.
            key = self.seed, self.ranks.rank, self.position.epoch, self.position.step
            torch.manual_seed(seeded_generator(*key).initial_seed())
        while not self.finished:
            if not self._train_epoch():
                self.save()
                return False
            self._close_epoch()
        return True

    def _train_epoch(self) -> bool:
        """Train to the end of the current epoch; False if stopped before."""
        position, policy = self.position, self.policy
        batch_size = policy.batch_size(position.epoch)
        loader = self._loader(
            self.train_split,
            batch_size,
            share=(self.ranks.rank, self.ranks.count),
            shuffle=True,
            seed=self.seed,
            epoch=position.epoch,
            start_step=position.step,
            translate=self.translate,
        )
        self.task.train()
        seconds_before, start = position.seconds, self.clock()
        for images, labels in loader:
            self._batch_images = min(batch_size, len(self.train_split) - position.step * batch_size)
            self._step(images, labels)
            position.step += 1
            position.seconds = seconds_before + self.clock() - start
            self.on_step(self)
            if self._is_asked_to_stop():
                return False
            if self.save_every and position.step % self.save_every == 0:
                self.save()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        position.seconds = seconds_before + self.clock() - start
        return True

    def _check_ranks(self) -> None:
        """A batch below the number of ranks would leave some of them without work, waiting."""
        for epoch in range(self.position.epoch, self.policy.epochs):
            if (size := self.policy.batch_size(epoch)) < self.ranks.count:
                raise TrainingError(
                    f"batches of {size} in epoch {epoch + 1} cannot be shared by {self.ranks.count} processes: give "
                    f"--batch-size or --warm-batch {self.ranks.count} or more, or start fewer processes"
                )

    def _is_asked_to_stop(self) -> bool:
        """Several ranks must stop after the same step, and agree on it now and then."""
        if self.ranks.count == 1:
            return self.should_stop()
        if self.position.step % _STEPS_BETWEEN_QUESTIONS:
            return False
        return self.ranks.any(self.should_stop(), self.device)

    def _step(self, images: Tensor, labels: Tensor) -> None:
        self.lr = self.policy.lr(self.policy.progress(self.position.epoch, self.position.step))
        # A last batch that is not full has no graph of its own.
        if self.cuda_graphs and len(labels) == self.policy.batch_size(self.position.epoch):
            if self._captured is None or self._captured.batch_size != len(labels):
                self._captured = _CapturedStep(self._compute_step, len(labels))
            self._set_lr()
            try:
                self._captured(images, labels)
                return
            except _CaptureError as error:
                _logger.warning(f"training without CUDA graphs, more slowly at small batches: {error}")
                self.cuda_graphs = False
        self._set_lr()
        self._compute_step(images, labels)

    def _set_lr(self) -> None:
        """A captured step reads the learning rate from memory, and its optimizer keeps its counts there."""
        if self.cuda_graphs:
            self._rate.fill_(self.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate if self.cuda_graphs else self.lr
            if "capturable" in group:
                group["capturable"] = self.cuda_graphs

    def _compute_step(self, images: Tensor, labels: Tensor) -> None:
        """Forward pass, backward pass and optimizer, without a wait for the device."""
        self.optimizer.zero_grad(set_to_none=True)
        count = len(labels)
        if not count:  # fewer images than ranks: the others still wait for this one's gradients, which are zero
            images, labels = images.new_zeros(1, *images.shape[1:]), labels.new_zeros(1)
        size = self.micro_batch or len(labels)
        parts = list(zip(images.split(size), labels.split(size), strict=True))
        self.loss = torch.zeros((), device=self.device)
        for number, (images, labels) in enumerate(parts):
            # Gradients travel between ranks once, with the last part.
            with self.task.no_sync() if number + 1 < len(parts) else nullcontext():
                with autocast(self.device, self.amp):
                    result = self.task(images, labels)
                self.scaler.scale(self._weighted(result["loss"], min(count, len(labels)))).backward()
            self._count(result, labels, count)
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.task.get_clip_parameters(), self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _weighted(self, loss: Tensor, count: int) -> Tensor:
        """Weigh the mean over some images so that the mean over ranks of the sums of parts is that over the batch."""
        weight = count * self.ranks.count / self._batch_images
        return loss if weight == 1 else loss * weight

    @torch.no_grad()
    def _count(self, result: dict[str, Tensor], labels: Tensor, count: int) -> None:
        """Add a part's numbers up, on the device: a step never waits for them."""
        images = min(count, len(labels))
        loss = result["loss"].detach()
        self.loss = self.loss + loss * (images / max(count, 1))
        right = (result["output"].argmax(dim=1) == labels).sum()
        means = torch.stack([loss, result["margin_loss"], result["reconstruction_loss"]]).double()
        self.sums[:3] += means * images
        self.sums[3] += right * min(images, 1)
        self.sums[4] += images

    def _close_epoch(self) -> None:
        """Evaluate, add the epoch's row and save; the resume state last, so that it never runs ahead of the rest."""
        position = self.position
        self.ranks.sum_(self.sums)
        means = self.running_means()
        if not math.isfinite(means["loss"]):
            raise TrainingError(
                f"the loss is {means['loss']} in epoch {position.epoch + 1} (lr={self.lr:g}): "
                f"lower --lr, or compute in float32 with --amp none"
            )
        evaluation = None
        if self.val_split is not None:
            share = (self.ranks.rank, self.ranks.count)
            loader = self._loader(self.val_split, self.eval_batch_size, share=share)
            evaluation = evaluate(self.task.get_eval_model(), loader, self.amp, self.ranks)
        row = {
            "epoch": position.epoch + 1,
            "train_loss": means["loss"],
            "train_margin_loss": means["margin_loss"],
            "train_reconstruction_loss": means["reconstruction_loss"],
            "train_top1": means["top1"],
            "eval_loss": None if evaluation is None else evaluation.margin_loss,
            "eval_top1": None if evaluation is None else evaluation.top1,
            "lr": self.lr,
            "batch_size": self.policy.batch_size(position.epoch),
            "epoch_seconds": position.seconds,
            "images_per_second": len(self.train_split) / max(position.seconds, 1e-9),
        }
        best = self.best
        improved = best is None or evaluation is None or _rank(row) > _rank(best)
        position.history.append(row)
        if improved:
            position.best_epoch = row["epoch"]
        position.total_seconds += position.seconds
        position.epoch, position.step, position.seconds = position.epoch + 1, 0, 0.0
        self.sums.zero_()
        if improved and self.folder is not None:
            save_weights(self.folder / "best.safetensors", self.task.model, self._header(row))
        self.save()
        self.on_epoch(self, row)

    def _loader(self, split: Split, batch_size: int, **kwargs: Any) -> Loader:
        return Loader(split, batch_size, self.device, num_workers=self.num_workers, **kwargs)

    def _header(self, row: dict[str, Any] | None) -> dict[str, Any]:
        facts = {} if row is None else {key: row[key] for key in ("epoch", "eval_top1", "eval_loss", "train_loss")}
        return {**self.metadata, **facts}

    def save(self) -> None:
        """Write `summary.csv`, `last.safetensors` and the resume state."""
        sums = self.sums.clone()
        self.ranks.sum_(sums)
        if self.folder is None:
            return
        write_csv(self.folder / "summary.csv", SUMMARY_COLUMNS, self.history)
        last = self.history[-1] if self.history else None
        save_weights(self.folder / "last.safetensors", self.task.model, self._header(last))
        state = {
            "position": dict(vars(self.position)),
            "sums": sums,
            "lr": self.lr,
            "model": self.task.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_state(),
        }
        save_state(self.folder / "resume.safetensors", state)

    def resume(self) -> bool:
        """Take up the state in the run folder; return False where there is none, and training starts anew.

        Raises:
            CheckpointError: If the state is damaged or that of another model.
        """
        path = None if self.folder is None else self.folder / "resume.safetensors"
        if path is not None:
            for leftover in self.folder.glob(".*.tmp"):  # of a run killed while it wrote
                leftover.unlink()
        state = self._load_state(path)
        if state is None:
            return False
        try:
            self.task.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError):
            raise CheckpointError(f"{str(path or 'the state')!r} is the state of another model or optimizer") from None
        self._restore_strides()
        self.scaler.load_state_dict(state["scaler"])
        set_random_state(state["random"])
        self.position = _Position(**state["position"])
        if self.ranks.is_first:  # they are those of all ranks
            self.sums.copy_(state["sums"])
        self.lr = state["lr"]
        return True

    def _load_state(self, path: Path | None) -> dict[str, Any] | None:
        """Read the resume state; other ranks get it from the first, whose folder they need not see."""
        if self.ranks.count == 1:
            return load_state(path) if path.exists() else None
        data = path.read_bytes() if path is not None and path.exists() else None
        data = self.ranks.share_bytes(data, self.device)
        if data is None:
            return None
        if path is not None:
            return load_state(path)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "resume.safetensors"
            copy.write_bytes(data)
            return load_state(copy)

    def _restore_strides(self) -> None:
        """Give the optimizer's state the memory format of its parameters; a checkpoint keeps none, and bits differ."""
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


class _CaptureError(RuntimeError):
    """A step that cannot be captured."""


class _CapturedStep:
    """A training step for batches of one size: the first few as they are, one captured, all others replayed."""

    def __init__(self, step: Callable[[Tensor, Tensor], None], batch_size: int):
        self.step = step
        self.batch_size = batch_size
        self.count = 0
        self.replay: Callable[[], None] | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Take one step; raises _CaptureError, with the step not taken, if it cannot be captured."""
        if self.count < _STEPS_BEFORE_CAPTURE:
            self.count += 1
            with warnings.catch_warnings():
                # torch tells the optimizer's first step that it is not captured: so far, on purpose.
                warnings.filterwarnings("ignore", message=".*capturable=True.*")
                _on_side_stream(lambda: self.step(images, labels))
            return
        if self.replay is None:
            # What a replay reads and writes stays where it was at the capture.
            self.images, self.labels = torch.empty_like(images), torch.empty_like(labels)
            self.images.copy_(images)
            self.labels.copy_(labels)
            self.replay = _capture(lambda: self.step(self.images, self.labels))
        else:
            self.images.copy_(images)
            self.labels.copy_(labels)
        self.replay()


def _on_side_stream(step: Callable[[], None]) -> None:
    """Run a step on a stream of its own, as torch asks for of the steps before a capture."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        step()
    current.wait_stream(side)


def _capture(step: Callable[[], None]) -> Callable[[], None]:
    """Record the kernels of a step without running them; what is returned runs them."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        raise _CaptureError(str(error).splitlines()[0]) from error
    return graph.replay


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    return row["eval_top1"], -row["eval_loss"]


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as CSV, atomically; None and missing values are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda temporary: temporary.write_text(text.getvalue()))


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def find_lr(trainer: Trainer, max_steps: int | None = None) -> tuple[list[float], list[float]]:
    """Raise the learning rate step by step and record the loss of each step (FasTrCaps, learning-rate finder).

    Trains the trainer's model on its way; nothing is saved. Ends with the policy, after `max_steps`, or when the loss
    is four times its least or no longer finite.

    Args:
        trainer: A trainer whose policy is `lr_finder`.
        max_steps: Largest number of steps.

    Returns:
        Learning rates and losses, one of each a step.
    """
    rates: list[float] = []
    losses: list[float] = []

    def diverged() -> bool:
        rates.append(trainer.lr)
        losses.append(float(trainer.loss))
        over = max_steps is not None and len(losses) >= max_steps
        return over or not math.isfinite(losses[-1]) or losses[-1] > 4 * min(losses)

    asked_before, trainer.should_stop = trainer.should_stop, lambda: diverged() or asked_before()
    try:
        while not trainer.finished and trainer._train_epoch():
            trainer.position.epoch, trainer.position.step = trainer.position.epoch + 1, 0
    finally:
        trainer.should_stop = asked_before
    return rates, losses
