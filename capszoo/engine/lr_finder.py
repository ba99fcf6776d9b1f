"""The learning-rate finder."""

import math

from capszoo.policies.finder import WINDOW

from .trainer import Trainer


def find_lr(trainer: Trainer, max_steps: int | None = None) -> tuple[list[float], list[float]]:
    """Raise the learning rate step by step and record the loss of each step (FasTrCaps, learning-rate finder).

    Trains the trainer's model on its way; nothing is saved. Ends with the policy, after `max_steps`, or when the loss
    is no longer finite, or its mean over a window of `suggest_lr` four times the least such mean. (A single loss at
    batch 1 is soon as large.)

    Args:
        trainer: A trainer whose policy is `lr_finder`.
        max_steps: Largest number of steps.

    Returns:
        Learning rates and losses, one of each a step.
    """
    rates: list[float] = []
    losses: list[float] = []
    lowest = math.inf

    def diverged() -> bool:
        nonlocal lowest
        rates.append(trainer.lr)
        losses.append(float(trainer.loss))
        if not math.isfinite(losses[-1]) or (max_steps is not None and len(losses) >= max_steps):
            return True
        mean = sum(losses[-WINDOW:]) / WINDOW if len(losses) >= WINDOW else math.inf
        lowest = min(lowest, mean)
        return mean > 4 * lowest

    asked_before, trainer.should_stop = trainer.should_stop, lambda: diverged() or asked_before()
    try:
        while not trainer.finished and trainer._train_epoch():
            trainer.position.epoch, trainer.position.step = trainer.position.epoch + 1, 0
    finally:
        trainer.should_stop = asked_before
    return rates, losses
