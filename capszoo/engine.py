"""Train and evaluate loops."""

import csv
import io
import json
import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .checkpoint import (
    CheckpointError,
    UnreadableError,
    check_resume_state,
    load_state,
    random_state,
    read_metadata,
    save_state,
    save_weights,
    set_random_state,
    write_atomically,
)
from .data import DataError, Loader, Split
from .distributed import ALONE, Ranks
from .loader import seeded_generator
from .losses import margin_loss, reconstruction_loss
from .metrics import average_precision, right_answers, shows
from .pretrained import image_statistics
from .task import CapsuleTask, Normalization
from .watch import measure_saturation

__all__ = [
    "Evaluation",
    "Stopped",
    "Trainer",
    "TrainingError",
    "autocast",
    "drop_state",
    "evaluate",
    "find_lr",
    "resolve_amp",
    "until_stopped",
]

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
    "skipped_steps",
)
# The state of a run, and the one before it, for the case that the last is damaged.
STATE_FILES = ("resume.safetensors", "resume-previous.safetensors")

_logger = logging.getLogger(__name__)

# Steps taken one operator at a time before one is captured: kernels are compiled and tuned in them, which a capture
# does not allow.
_STEPS_BEFORE_CAPTURE = 3

# Ranks ask each other so often whether one of them shall stop; each question waits for the slowest.
_STEPS_BETWEEN_QUESTIONS = 10

# On a GPU, where it means waiting, losses are looked at after so many steps; on a CPU after each.
_STEPS_BETWEEN_CHECKS = 50

# So many steps left out one after the other are not bad luck.
_MOST_SKIPPED_IN_A_ROW = 100

# A gradient that overflows at such a scale is not one that float16 will ever hold.
_LEAST_SCALE = 2.0**-10

# Steps of the first epoch after which the trainer looks whether the network is saturated; it does after each epoch too.
_LOOKS_AT_SATURATION = (50, 200, 1000)
_SATURATION_IMAGES = 64

_AMP_TYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingError(ValueError):
    """Training cannot start or go on; the message says why and what to do."""


class Stopped(Exception):
    """A measurement was given up, because the run is asked to stop."""


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
        top1: Fraction of images whose longest class capsule is the right one. Where labels are weights of the classes,
            the exact-match accuracy: the fraction of images of which just the classes present are predicted, see
            :mod:`capszoo.metrics`.
        margin_loss: Mean margin loss.
        reconstruction_error: Mean over images of the summed squared pixel differences, drawn from the longest
            capsule; None without decoder.
        confusion: Counts ``[J, J]``, true class by predicted class; None where labels are weights of the classes.
        class_confusion: There, counts ``[J, 2, 2]``: for each class, absent and present by predicted as absent and as
            present; else None.
        average_precision: There, that of each class ``[J]``, NaN where no image shows it; else None.
        mean_average_precision: There, the mean over the classes that are shown; else, or if none is, None.
    """

    top1: float
    margin_loss: float
    reconstruction_error: float | None
    confusion: Tensor | None
    class_confusion: Tensor | None = None
    average_precision: Tensor | None = None
    mean_average_precision: float | None = None


def until_stopped(batches: Iterable[Any], should_stop: Callable[[], bool]) -> Iterator[Any]:
    """Pass batches on; raise :class:`Stopped` once `should_stop`, asked after each, says so."""
    for batch in batches:
        yield batch
        if should_stop():
            raise Stopped


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], amp: torch.dtype | None = None, ranks: Ranks = ALONE
) -> Evaluation:
    """Measure a model on labelled images.

    Args:
        model: A capsule network; left in the mode it was in.
        loader: Batches of images ``[B, C, H, W]``, normalised as the model's `pretrained_cfg` says, and labels, class
            indices ``[B]`` or weights of the classes ``[B, J]``, on the model's device.
        amp: Type for autocast.
        ranks: Processes that each have a part of the images; all get the measures of the whole.

    Raises:
        TrainingError: If there are no images.
    """
    if isinstance(loader, Loader):
        _check_statistics(model, loader.split)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    decoder, normalization = getattr(model, "decoder", None), Normalization(model, device)
    num_classes = model.num_classes
    # Of the images: margin losses, reconstruction errors, right answers, number.
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    multi_label, rows = False, [torch.empty(0, 2 * num_classes, device=device)]
    for images, labels in loader:
        multi_label = labels.ndim == 2
        if not len(labels):
            continue  # a last batch with fewer images than ranks
        with autocast(device, amp):
            if decoder is None:
                lengths, drawn = model(images), None
            else:
                capsules, lengths = model.forward_capsules(images)
                drawn = decoder(capsules, lengths.argmax(dim=1))
        sums[0] += margin_loss(lengths, labels) * len(labels)
        if drawn is not None:
            sums[1] += reconstruction_loss(drawn, normalization.undo(images)) * len(labels)
        sums[2] += right_answers(lengths, labels).sum()
        sums[3] += len(labels)
        if multi_label:
            rows.append(torch.cat([lengths, labels], dim=1))  # an average precision is that of all images
        else:
            place = labels.long() * num_classes + lengths.argmax(dim=1)
            confusion.index_add_(0, place, torch.ones_like(place))  # `bincount` would wait for a GPU
    model.train(was_training)
    ranks.sum_(sums)
    *totals, count = sums.tolist()
    if count == 0:
        raise TrainingError("there are no images to evaluate on")
    margin, reconstruction, top1 = (total / count for total in totals)
    by_class: dict[str, Any] = {}
    if multi_label:
        # One type, whatever that of the scores: a rank without images has none.
        scores, labels = ranks.gather(torch.cat(rows).double()).cpu().split(num_classes, dim=1)
        by_class = _measure_classes(scores, labels)
    else:
        ranks.sum_(confusion)
    return Evaluation(
        top1=top1,
        margin_loss=margin,
        reconstruction_error=None if decoder is None else reconstruction,
        confusion=None if multi_label else confusion.view(num_classes, num_classes).cpu(),
        **by_class,
    )


def _measure_classes(scores: Tensor, labels: Tensor) -> dict[str, Any]:
    """The measures of an :class:`Evaluation` that are for weights of the classes, of scores and labels ``[N, J]``."""
    truth, predicted = shows(labels), shows(scores)
    counts = [[(t & p).sum(dim=0) for p in (~predicted, predicted)] for t in (~truth, truth)]
    precision = average_precision(scores, labels)
    return {
        "class_confusion": torch.stack([torch.stack(row, dim=1) for row in counts], dim=1),
        "average_precision": precision,
        "mean_average_precision": None if precision.isnan().all() else float(precision.nanmean()),
    }


@dataclass
class _Position:
    """Where a run stands; all of it goes into the resume state."""

    epoch: int = 0
    step: int = 0  # within the epoch
    seconds: float = 0.0  # of the epoch so far
    total_seconds: float = 0.0
    best: dict[str, Any] | None = None  # the row of the best epoch
    skipped: int = 0  # steps of the epoch so far that were left out, their loss or gradient not finite
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def best_epoch(self) -> int:
        """The best epoch, counted from 1; 0 before the first."""
        return self.best["epoch"] if self.best else 0


class Trainer:
    """Trains a capsule network under a policy and keeps its run folder.

    After each epoch the folder holds `summary.csv`, `last.safetensors`, `best.safetensors` (best top-1 on the
    validation split, ties broken by the lower loss; the last epoch's where there is no validation split) and
    `resume.safetensors`, from which :meth:`resume` goes on exactly: every batch, its augmentation and the learning
    rate are functions of (seed, epoch, step). The state before is kept as `resume-previous.safetensors`. Where labels
    are weights of the classes ``[N, J]``, top-1 (`train_top1`, `eval_top1`) is the exact-match accuracy, see
    :class:`Evaluation`.

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
        nonfinite: What to do about a step whose loss is infinite or not a number: 'stop', or 'skip', which leaves out
            every step whose loss or gradient is not finite (one wait for the device a step, no CUDA graphs).
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
        nonfinite: str = "stop",
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
        if nonfinite not in ("stop", "skip"):
            raise TrainingError(f"unknown nonfinite={nonfinite!r}: give stop or skip")
        self.skips = nonfinite == "skip"
        _check_statistics(task.model, train)
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
            and not self.skips
            and "capturable" in optimizer.defaults
        )
        self._rate = torch.zeros((), device=self.device)  # the learning rate as captured steps read it
        self._captured: _CapturedStep | None = None
        self.position = _Position()
        # Losses of the steps since the last look at them.
        looks = _STEPS_BETWEEN_QUESTIONS if ranks.count > 1 else 1
        self._recent = torch.zeros(looks if self.device.type == "cpu" else _STEPS_BETWEEN_CHECKS, device=self.device)
        self._unseen = 0
        self._steps_asked, self._steps_to_question, self._last_question = 1, 1, time.monotonic()
        self._skipped_in_a_row = 0
        self._said_saturated = False
        self._saved: tuple[int, int] | None = None  # epoch and step of the last checkpoint
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
        return self.position.best

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.position.epoch >= self.policy.epochs

    def running_means(self, sums: Tensor | None = None) -> dict[str, float]:
        """Means over the epoch so far: loss, margin_loss, reconstruction_loss, top1. Waits for the device."""
        loss, margin, reconstruction, right, count = (self.sums if sums is None else sums).tolist()
        count = max(count, 1.0)
        return {
            "loss": loss / count,
            "margin_loss": margin / count,
            "reconstruction_loss": reconstruction / count,
            "top1": right / count,
        }

    def fit(self) -> bool:
        """Train until the policy's last epoch; return False if `should_stop` ended it before, with all of it saved.

        Raises:
            TrainingError: If the loss stops being finite (what was saved before stays, `nonfinite.json` in the run
                folder names the step and its images), or a batch is too small for the number of ranks.
            DataError: If the images cannot be read any more; the state is saved.
            WriteError: If the run folder cannot be written; what was saved before stays.
        """
        self._check_ranks()
        if not self.ranks.is_first:
            # Random numbers of layers (dropout) must differ between ranks.
            key = self.seed, self.ranks.rank, self.position.epoch, self.position.step
            torch.manual_seed(seeded_generator(*key).initial_seed())
        if self.device.type == "cuda" and not self.finished:
            self._warm_up()
        while not self.finished:
            try:
                completed = self._train_epoch() and self._close_epoch()
            except DataError:
                if self.ranks.count == 1:  # the others are not at the same step
                    self._check_finite()
                    self.save()
                    if self.should_stop():  # and what asked for it ended the processes that read images, too
                        return False
                raise
            if not completed:
                self._check_finite()
                self.save()
                return False
        return True

    def _warm_up(self) -> None:
        """Compile and tune the kernels for every batch to come, before a clock runs; changes nothing but memory."""
        train, evaluated = self._sizes_to_come()
        buffers = [(buffer, buffer.clone()) for buffer in self.task.buffers()]
        self.task.train()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), self.task.no_sync():
            for size in train:
                with autocast(self.device, self.amp):
                    loss = self.task(*self._blank_batch(self.train_split, size))["loss"]
                loss.backward()
            for size in evaluated:
                evaluate(self.task.get_eval_model(), [self._blank_batch(self.val_split, size)], self.amp)
        self.task.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

    def _sizes_to_come(self) -> tuple[list[int], list[int]]:
        """Sizes of this rank's forward passes, in training and in evaluation, the largest first."""

        def of_this_rank(split: Split, batch_size: int) -> set[int]:
            of_all = {min(batch_size, len(split)), len(split) % batch_size or batch_size}
            shares = (self.ranks.share(size) for size in of_all)
            return {share.stop - share.start for share in shares}

        train: set[int] = set()
        for batch_size in {self.policy.batch_size(e) for e in range(self.position.epoch, self.policy.epochs)}:
            for size in of_this_rank(self.train_split, batch_size):
                size = max(size, 1)  # a rank without an image computes with a blank one
                part = min(self.micro_batch or size, size)
                train |= {part, size % part}
        evaluated = set() if self.val_split is None else of_this_rank(self.val_split, self.eval_batch_size)
        return sorted(train - {0}, reverse=True), sorted(evaluated - {0}, reverse=True)

    def _blank_batch(self, split: Split, size: int) -> tuple[Tensor, Tensor]:
        images = torch.zeros(size, *split.image_shape, device=self.device)
        shape = size, *split.labels.shape[1:]
        return images, torch.zeros(shape, dtype=split.labels.dtype, device=self.device)

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
            self._recent[self._unseen] = self.loss
            self._unseen += 1
            self.on_step(self)
            if self._is_asked_to_stop():
                return False
            if self._unseen == len(self._recent):
                self._check_losses()
            if position.epoch == 0 and position.step in _LOOKS_AT_SATURATION:
                self._check_saturation()
            if self.save_every and position.step % self.save_every == 0:
                self._check_finite()
                self.save()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        position.seconds = seconds_before + self.clock() - start
        self._check_finite()
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
        """Several ranks must stop after the same step, and agree on it now and then: every second at least."""
        if self.ranks.count == 1:
            return self.should_stop()
        self._steps_to_question -= 1
        if self._steps_to_question:
            return False
        now = time.monotonic()
        pace, self._last_question = now - self._last_question, now
        answers = torch.tensor([float(self.should_stop()), pace / self._steps_asked], device=self.device)
        stop, seconds = self.ranks.max_(answers).tolist()
        self._steps_asked = self._steps_to_question = max(1, min(_STEPS_BETWEEN_QUESTIONS, int(1 / max(seconds, 1e-9))))
        return bool(stop)

    def _check_losses(self) -> None:
        """Stop at the first loss that is not finite, by any rank's count."""
        unseen, self._unseen = self._unseen, 0
        if self.scaler.is_enabled() and (scale := self.scaler.get_scale()) < _LEAST_SCALE:
            raise TrainingError(
                f"float16 cannot hold the gradients: their scale has fallen to {scale:g} in epoch "
                f"{self.position.epoch + 1}, and no step was taken on the way: compute with --amp bf16 or none"
            )
        if self.skips or not unseen:
            return
        finite = self._recent[:unseen].isfinite()
        steps_ago = int(self.ranks.max_(torch.where(finite, 0, torch.arange(unseen, 0, -1, device=self.device)).max()))
        if steps_ago:
            loss = float(self._recent[unseen - steps_ago])
            what = "the loss of another process is not finite" if math.isfinite(loss) else f"the loss is {loss}"
            self._raise_nonfinite(what, self.position.step - steps_ago, loss)

    def _check_finite(self) -> None:
        """Before anything is saved: a finite loss can have a gradient that is not."""
        self._check_losses()
        if not all(torch.stack([p.isfinite().all() for p in self.task.model.parameters()]).tolist()):
            self._raise_nonfinite("the weights are not finite", max(0, self.position.step - 1), float(self.loss))

    def _check_saturation(self) -> None:
        """Say once if the network has come to where hardly any gradient is left, and what to do."""
        if self._said_saturated or not self.ranks.is_first or self.policy.name == "lr_finder":
            return
        images, _ = next(iter(self._loader(self.train_split, _SATURATION_IMAGES)))
        if len(images) < 2:
            return
        with autocast(self.device, self.amp):
            found = measure_saturation(self.task.model, images)
        if found.is_stuck:
            self._said_saturated = True
            share = (
                "" if found.saturated is None else f"{found.saturated:.0%} of the primary capsules are saturated and "
            )
            _logger.warning(
                f"at step {self.position.step} of epoch {self.position.epoch + 1} {share}all images score alike (to "
                f"{found.spread:.1g}): this run will hardly learn any more; start again with a tenth of --lr, or with "
                f"--warmup-steps 1000, and leave --mean, --std and --start as they are by default"
            )

    def _raise_nonfinite(self, what: str, step: int, loss: float) -> NoReturn:
        """Say where training broke off, and keep for the user which images it was computed from."""
        epoch = self.position.epoch
        batch_size = self.policy.batch_size(epoch)
        loader = self._loader(self.train_split, batch_size, shuffle=True, seed=self.seed, epoch=epoch)
        images = loader.order()[step * batch_size : (step + 1) * batch_size].tolist()
        kept = "there is no checkpoint yet"
        if self._saved is not None:
            kept = f"the last good checkpoint is that of epoch {self._saved[0] + 1}, step {self._saved[1]}"
        where = ""
        if self.folder is not None:
            facts = {"epoch": epoch + 1, "step": step + 1, "lr": self.lr, "loss": str(loss), "images": images}
            write_json(self.folder / "nonfinite.json", facts)
            where = f", see {self.folder / 'nonfinite.json'}"
        named = ", ".join(map(str, images[:4])) + (", ..." if len(images) > 4 else "")
        raise TrainingError(
            f"{what} at step {step + 1} of epoch {epoch + 1} (lr={self.lr:g}, training images {named}{where}); {kept}: "
            f"lower --lr, compute in float32 with --amp none, or leave such steps out with --nonfinite skip"
        )

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
        """Forward pass, backward pass and optimizer, without a wait for the device.

        Results go into tensors that stay: a replay writes where the capture wrote, and binds no name anew.
        """
        self.optimizer.zero_grad(set_to_none=True)
        sums = self.sums.clone() if self.skips else None
        count = len(labels)
        if not count:  # fewer images than ranks: the others still wait for this one's gradients, which are zero
            images, labels = (some.new_zeros(1, *some.shape[1:]) for some in (images, labels))
        size = self.micro_batch or len(labels)
        parts = list(zip(images.split(size), labels.split(size), strict=True))
        self.loss.zero_()  # in place, here and below: replays of a captured step write where it did, and run no Python
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
        if sums is not None and self._skip_step():
            self.sums.copy_(sums)
            if self.scaler.is_enabled():  # the scale is not at fault
                self.scaler.update(self.scaler.get_scale())
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def _skip_step(self) -> bool:
        """Whether the step must be left out, on all ranks."""
        finite = self.loss.isfinite()
        if not self.scaler.is_enabled():  # float16's scaler looks at the gradient itself, and expects it to overflow
            gradients = [p.grad for p in self.task.model.parameters() if p.grad is not None]
            finite = finite & nn.utils.get_total_norm(gradients).isfinite()
        skip = self.ranks.any(not bool(finite), self.device)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skip else 0
        self.position.skipped += skip
        if self._skipped_in_a_row >= _MOST_SKIPPED_IN_A_ROW:
            self._raise_nonfinite(
                f"{self._skipped_in_a_row} steps one after the other were not finite, the last",
                self.position.step,
                float(self.loss),
            )
        return skip

    def _weighted(self, loss: Tensor, count: int) -> Tensor:
        """Weigh the mean over some images so that the mean over ranks of the sums of parts is that over the batch."""
        weight = count * self.ranks.count / self._batch_images
        return loss if weight == 1 else loss * weight

    @torch.no_grad()
    def _count(self, result: dict[str, Tensor], labels: Tensor, count: int) -> None:
        """Add a part's numbers up, on the device: a step never waits for them."""
        images = min(count, len(labels))
        loss = result["loss"].detach()
        self.loss += loss * (images / max(count, 1))
        right = right_answers(result["output"], labels).sum()
        means = torch.stack([loss, result["margin_loss"], result["reconstruction_loss"]]).double()
        self.sums[:3] += means * images
        self.sums[3] += right * min(images, 1)
        self.sums[4] += images

    def _close_epoch(self) -> bool:
        """Evaluate, add the epoch's row and save; False if stopped before that."""
        position = self.position
        self._check_saturation()
        sums = self.sums.clone()
        self.ranks.sum_(sums)
        means = self.running_means(sums)
        evaluation = None
        if self.val_split is not None:
            share = (self.ranks.rank, self.ranks.count)
            loader = self._loader(self.val_split, self.eval_batch_size, share=share)
            batches = until_stopped(loader, self._is_asked_to_stop)
            try:
                evaluation = evaluate(self.task.get_eval_model(), batches, self.amp, self.ranks)
            except Stopped:
                return False
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
            "skipped_steps": position.skipped,
        }
        improved = self.best is None or evaluation is None or _rank(row) > _rank(self.best)
        position.history.append(row)
        if improved:
            position.best = row
        position.total_seconds += position.seconds
        position.epoch, position.step, position.seconds, position.skipped = position.epoch + 1, 0, 0.0, 0
        self.sums.zero_()
        # The state first: if a run ends between the two, it has what the best weights are made of, see _mend_best.
        self.save()
        if improved:
            self._save_best()
        self.on_epoch(self, row)
        return True

    def _save_best(self) -> None:
        if self.folder is not None:
            save_weights(self.folder / "best.safetensors", self.task.model, self._header(self.best))

    def _loader(self, split: Split, batch_size: int, **kwargs: Any) -> Loader:
        return Loader(split, batch_size, self.device, num_workers=self.num_workers, **kwargs)

    def _header(self, row: dict[str, Any] | None) -> dict[str, Any]:
        facts = {} if row is None else {key: row[key] for key in ("epoch", "eval_top1", "eval_loss", "train_loss")}
        return {**self.metadata, **facts}

    def save(self) -> None:
        """Write `summary.csv`, `last.safetensors` and the resume state.

        Raises:
            WriteError: If the folder cannot be written.
        """
        sums = self.sums.clone()
        self.ranks.sum_(sums)
        if self.folder is not None:
            self._write(sums)
        if self.folder is not None or not self.ranks.is_first:
            self._saved = self.position.epoch, self.position.step

    def _write(self, sums: Tensor) -> None:
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
        path, previous = (self.folder / name for name in STATE_FILES)
        save_state(path, state, previous)

    def resume(self) -> bool:
        """Take up the state in the run folder; return False where there is none, and training starts anew.

        A last state that is damaged is passed over for the one before it, with a warning in the log.

        Raises:
            CheckpointError: If the states are damaged or those of another model.
        """
        if self.folder is not None:
            for leftover in self.folder.glob(".*.tmp"):  # of a run killed while it wrote
                leftover.unlink()
        state = self._load_state()
        if state is None:
            return False
        try:
            self.task.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            set_random_state(state["random"])
            self.position = _Position(**state["position"])
            if self.ranks.is_first:  # they are those of all ranks
                self.sums.copy_(state["sums"])
            self.lr = float(state["lr"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            folder = "" if self.folder is None else f" in {str(self.folder)!r}"
            raise CheckpointError(
                f"the state{folder} is that of another model, optimizer or version of capszoo: start a new run"
            ) from None
        self._restore_strides()
        self._saved = self.position.epoch, self.position.step
        if self.folder is not None:
            self._mend_best()
        return True

    def _mend_best(self) -> None:
        """Make `best.safetensors` and the state agree: a run can end between writing one and the other."""
        position, path = self.position, self.folder / "best.safetensors"
        try:
            header = read_metadata(path)
            found = {key: json.loads(header[key]) for key in ("epoch", "eval_top1", "eval_loss", "train_loss")}
        except UnreadableError:
            raise
        except (CheckpointError, KeyError, ValueError) as error:
            found = None
            if position.best is not None and path.exists():
                _logger.warning(f"the best weights so far cannot be used: {error}")
        if found is not None and found["epoch"] == position.best_epoch:
            return
        if found is not None and found["epoch"] > position.epoch:
            position.best = found  # of an epoch that the state has not seen yet; to be beaten all the same
        elif position.best_epoch == position.epoch and position.step == 0 and position.epoch:
            self._save_best()  # what the state holds are these weights
        else:
            position.best = None  # lost: the best of the epochs to come takes its place

    def _load_state(self) -> dict[str, Any] | None:
        """Read the resume state; other ranks get it from the first, whose folder they need not see."""
        path, state = self._find_state()
        if self.ranks.count == 1:
            return state
        data = self.ranks.share_bytes(None if path is None else path.read_bytes(), self.device)
        if data is None or self.ranks.is_first:
            return state
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "resume.safetensors"
            copy.write_bytes(data)
            return load_state(copy)

    def _find_state(self) -> tuple[Path | None, dict[str, Any] | None]:
        """The last state in the run folder that is whole, and its file."""
        paths = [] if self.folder is None else [self.folder / name for name in STATE_FILES]
        damage: CheckpointError | None = None
        for path in paths:
            if not path.exists():
                continue
            try:
                state = load_state(path)
                check_resume_state(state, path)
            except UnreadableError:  # perhaps for now alone: the one before must not take its place
                raise
            except CheckpointError as error:
                damage = damage or error
                continue
            if damage is not None:
                _logger.warning(f"going on from the checkpoint before the last: {damage}")
                os.replace(path, paths[0])  # else the next save would keep the damaged one as the one before
                path = paths[0]
            return path, state
        if damage is not None:
            raise damage
        return None, None

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
        # Other threads, such as those that pin memory of the loader, may go on as they like.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        raise _CaptureError(str(error).splitlines()[0]) from error
    return graph.replay


def _check_statistics(model: nn.Module, split: Split) -> None:
    """Images that are normalised otherwise than a model takes them would give wrong numbers, in silence."""
    channels = split.image_shape[0]
    for name, wanted, given in zip(("mean", "std"), image_statistics(model), (split.mean, split.std), strict=True):
        # One number stands for all channels.
        expected, found = (values * channels if len(values) == 1 else values for values in (wanted, given))
        if expected != found:
            raise TrainingError(
                f"the images are normalised by {name}={given}, the model takes those of {name}={wanted}: call "
                f"data.normalize(mean, std) with those of the model's pretrained_cfg"
            )


def drop_state(folder: Path) -> None:
    """Delete the resume states of a run that is over: as large as all the rest, and no one resumes."""
    for name in STATE_FILES:
        (folder / name).unlink(missing_ok=True)


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
