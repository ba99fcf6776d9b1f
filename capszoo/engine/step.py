"""One training step: forward pass, backward pass and optimizer, whole or in parts, captured or not."""

import logging
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from capszoo.precision import autocast

from .batch_norm import batch_statistics
from .distributed import ALONE, Ranks
from .graphs import CapturedStep, CaptureError
from .metrics import right_answers
from .task import CapsuleTask

_logger = logging.getLogger(__name__)


class TrainingStep:
    """Takes the steps of a run, and adds up what they come to; a step never waits for the device.

    Args:
        task: The task with its model.
        optimizer: Over the model's parameters.
        device: Where they are.
        amp: Type for autocast, None for float32.
        clip_grad: Largest norm of the gradient; None for no limit.
        micro_batch: Most images of one forward pass; None for all of a rank's part of a batch.
        cuda_graphs: Capture the step of a batch size once and replay it, where that is possible.
        skips: Leave out every step whose loss or gradient is not finite, which waits for the device once a step.
        ranks: The processes that train together.
        mixed_labels: Labels are weights of the classes of images that are mixed of one class each.

    Attributes:
        loss: That of the last step, on the device.
        sums: Over the images so far: loss, margin loss, reconstruction loss, right answers, images.
        skipped: Steps left out so far.
        skipped_in_a_row: Consecutive ones, up to the last step.
        cuda_graphs: Whether steps are captured.
    """

    def __init__(
        self,
        task: CapsuleTask,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        amp: torch.dtype | None = None,
        clip_grad: float | None = None,
        micro_batch: int | None = None,
        cuda_graphs: bool = True,
        skips: bool = False,
        ranks: Ranks = ALONE,
        mixed_labels: bool = False,
    ):
        self.mixed_labels = mixed_labels
        self.task, self.optimizer, self.device, self.amp = task, optimizer, device, amp
        self.clip_grad, self.micro_batch, self.skips, self.ranks = clip_grad, micro_batch, skips, ranks
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        self.cuda_graphs = bool(
            cuda_graphs
            and device.type == "cuda"
            and ranks.count == 1
            and not self.scaler.is_enabled()
            and not skips
            # One that reads the learning rate from memory.
            and ("capturable" in optimizer.defaults or optimizer.defaults.get("fused"))
        )
        self._rate = torch.zeros((), device=device)  # the learning rate as captured steps read it
        self.captured: CapturedStep | None = None
        self._batch_images = 0  # of all ranks together, in the step being taken
        self.skipped = self.skipped_in_a_row = 0
        self._statistics = batch_statistics(task.model) if skips else []
        self.loss = torch.zeros((), device=device)
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)

    def __call__(
        self, images: Tensor, labels: Tensor, lr: float, batch_images: int, batch_size: int, *parts: Tensor
    ) -> None:
        """Take a step.

        Args:
            images: This rank's images ``[B, C, H, W]``.
            labels: Their labels.
            lr: Learning rate.
            batch_images: Images of the batch, over all ranks.
            batch_size: The policy's batch size, of which a last batch of an epoch may be a part.
            parts: What the images are composed of ``[B, P, C, H, W]``, where they have parts.
        """
        self._batch_images = batch_images
        # A last batch that is not full has no graph of its own.
        if self.cuda_graphs and len(labels) == batch_size:
            if self.captured is None or self.captured.batch_size != len(labels):
                self.captured = CapturedStep(self._compute, len(labels))
            self._set_lr(lr)
            try:
                self.captured(images, labels, *parts)
                return
            except CaptureError as error:
                _logger.warning(f"training without CUDA graphs, more slowly at small batches: {error}")
                self.cuda_graphs = False
        self._set_lr(lr)
        self._compute(images, labels, *parts)

    def _set_lr(self, lr: float) -> None:
        """A captured step reads the learning rate from memory, and its optimizer keeps its counts there."""
        if self.cuda_graphs:
            self._rate.fill_(lr)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate if self.cuda_graphs else lr
            if "capturable" in group:
                group["capturable"] = self.cuda_graphs

    def _compute(self, *batch: Tensor) -> None:
        """Forward pass, backward pass and optimizer, without a wait for the device.

        Results go into tensors that stay: a replay writes where the capture wrote, and binds no name anew.
        """
        self.optimizer.zero_grad(set_to_none=True)
        sums = self.sums.clone() if self.skips else None
        statistics = [buffer.clone() for buffer in self._statistics]
        count = len(batch[1])
        if not count:  # fewer images than ranks: the others still wait for this one's gradients, which are zero
            batch = tuple(some.new_zeros(1, *some.shape[1:]) for some in batch)
        size = self.micro_batch or len(batch[1])
        pieces = list(zip(*(some.split(size) for some in batch), strict=True))
        self.loss.zero_()  # in place, here and below: replays of a captured step write where it did, and run no Python
        for number, piece in enumerate(pieces):
            labels = piece[1]
            # Gradients travel between ranks once, with the last piece.
            with self.task.no_sync() if number + 1 < len(pieces) else nullcontext():
                with autocast(self.device, self.amp):
                    result = self.task(*piece)
                self.scaler.scale(self._weighted(result["loss"], min(count, len(labels)))).backward()
            self._count(result, labels, count)
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.task.get_clip_parameters(), self.clip_grad)
        if sums is not None and self._skip_step():
            self.sums.copy_(sums)
            for buffer, before in zip(self._statistics, statistics, strict=True):
                buffer.copy_(before)
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
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skip else 0
        self.skipped += skip
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
        self.loss.add_(loss, alpha=images / max(count, 1))
        right = right_answers(result["output"], labels.argmax(dim=1) if self.mixed_labels else labels).sum()
        means = torch.stack([loss, result["margin_loss"], result["reconstruction_loss"]])
        self.sums[:3].add_(means, alpha=images)
        self.sums[3].add_(right, alpha=min(images, 1))
        self.sums[4].add_(images)
