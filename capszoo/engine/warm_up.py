"""Kernels compiled and tuned for every batch of a run before its clock starts."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from capszoo.data import Split
from capszoo.precision import autocast

from .evaluate import evaluate

if TYPE_CHECKING:
    from .trainer import Trainer


def warm_up(trainer: "Trainer") -> None:
    """Compute with blank batches of all sizes to come; changes nothing but memory."""
    task, device = trainer.task, trainer.device
    train, evaluated = _sizes_to_come(trainer)
    buffers = [(buffer, buffer.clone()) for buffer in task.buffers()]
    task.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), task.no_sync():
        for size in train:
            with autocast(device, trainer.amp):
                images, labels, *parts = _blank_batch(trainer.train_split, size, device)
                if trainer.mixed_labels:
                    labels = torch.zeros(size, task.model.num_classes, device=device)
                loss = task(images, labels, *parts)["loss"]
            loss.backward()
        for size in evaluated:
            batch = _blank_batch(trainer.val_split, size, device)
            evaluate(task, [batch], trainer.amp)
    task.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)


def _sizes_to_come(trainer: "Trainer") -> tuple[list[int], list[int]]:
    """Sizes of this rank's forward passes, in training and in evaluation, the largest first."""
    policy, ranks = trainer.policy, trainer.ranks

    def of_this_rank(split: Split, batch_size: int) -> set[int]:
        of_all = {min(batch_size, len(split)), len(split) % batch_size or batch_size}
        shares = (ranks.share(size) for size in of_all)
        return {share.stop - share.start for share in shares}

    train: set[int] = set()
    for batch_size in {policy.batch_size(e) for e in range(trainer.position.epoch, policy.epochs)}:
        for size in of_this_rank(trainer.train_split, batch_size):
            size = max(size, 1)  # a rank without an image computes with a blank one
            part = min(trainer.micro_batch or size, size)
            train |= {part, size % part}
    evaluated = set() if trainer.val_split is None else of_this_rank(trainer.val_split, trainer.eval_batch_size)
    return sorted(train - {0}, reverse=True), sorted(evaluated - {0}, reverse=True)


def _blank_batch(split: Split, size: int, device: torch.device) -> tuple[Tensor, ...]:
    images = torch.zeros(size, *split.image_shape, device=device)
    shape = size, *split.labels.shape[1:]
    parts = () if split.parts is None else (torch.zeros(size, *split.parts.shape[1:], device=device),)
    return images, torch.zeros(shape, dtype=split.labels.dtype, device=device), *parts
