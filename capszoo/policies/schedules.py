"""The policies of the paper."""

import math
from dataclasses import dataclass
from functools import cached_property

from .base import Phase, Policy, Progress, option


@dataclass(frozen=True, kw_only=True)
class Fixed(Policy):
    """The baseline: lr at each step, one batch size."""

    name = "fixed"


@dataclass(frozen=True, kw_only=True)
class ExpDecay(Policy):
    """Exponential decay: lr * decay_rate ^ (step / decay_steps), one batch size."""

    name = "exp_decay"

    decay_rate: float = option(0.96, "the learning rate is multiplied by this every decay_steps steps")
    decay_steps: int = option(2000, "steps per factor of decay_rate")
    staircase: bool = option(False, "decay at every decay_steps-th step only, not a little at each step")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("decay_rate", self.decay_rate, above=0, remedy="pass a number above 0, at most 1")
        if self.decay_rate > 1:
            raise ValueError(f"policy '{self.name}' got decay_rate={self.decay_rate!r}, which grows: pass 1 or less")
        self._check_whole("decay_steps", self.decay_steps, least=1)
        if not isinstance(self.staircase, bool):
            raise ValueError(f"policy '{self.name}' got staircase={self.staircase!r}: pass true or false")

    def formula(self, progress: Progress) -> float:
        decays = progress.step // self.decay_steps if self.staircase else progress.step / self.decay_steps
        return self.base_lr * self.decay_rate**decays


@dataclass(frozen=True, kw_only=True)
class OneCycle(Policy):
    """One cycle: straight lines from lr up to max_lr, back to lr, and down to final_lr, over the whole run.

    With x = step / total_steps the corners are x = 0, `rise`, `fall_end` and 1. The last step lies just before x = 1.
    """

    name = "one_cycle"

    max_lr: float | str = option("10x", "highest learning rate: a number, or a multiple of lr such as 10x")
    final_lr: float | str = option("0.1x", "learning rate at the end: a number, or a multiple of lr such as 0.1x")
    rise: float = option(0.45, "fraction of all steps after which the learning rate is highest")
    fall_end: float = option(0.9, "fraction of all steps after which the learning rate is back at lr")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rise", "fall_end"):
            self._check_number(name, getattr(self, name), above=0, remedy="pass a fraction between 0 and 1")
        if not self.rise < self.fall_end < 1:
            raise ValueError(
                f"policy '{self.name}' got rise={self.rise!r} and fall_end={self.fall_end!r}: choose them so that "
                "0 < rise < fall_end < 1"
            )
        if self.total_steps < 3:
            raise ValueError(
                f"policy '{self.name}' needs at least 3 steps to rise, fall and end, got {self.total_steps} "
                f"(epochs={self.epochs}, batch_size={self.base_batch_size}, num_images={self.num_images}): raise "
                "epochs or lower batch_size"
            )
        self._rate("max_lr", least=self.base_lr)
        self._rate("final_lr", least=0)

    @cached_property
    def highest_lr(self) -> float:
        return self._rate("max_lr", least=self.base_lr)

    @cached_property
    def lowest_lr(self) -> float:
        return self._rate("final_lr", least=0)

    def formula(self, progress: Progress) -> float:
        x = progress.step / progress.total_steps
        if x < self.rise:
            return _line(self.base_lr, self.highest_lr, x / self.rise)
        if x < self.fall_end:
            return _line(self.highest_lr, self.base_lr, (x - self.rise) / (self.fall_end - self.rise))
        return _line(self.base_lr, self.lowest_lr, (x - self.fall_end) / (1 - self.fall_end))


@dataclass(frozen=True, kw_only=True)
class WarmRestarts(Policy):
    """Warm restarts: half a cosine from max_lr down to lr over each cycle of epochs; a phase is a cycle.

    A last cycle that the end of the run cuts short is the beginning of a full cycle: it is not squeezed. The default
    cycle is 10 epochs, or the whole run if that is shorter.
    """

    name = "warm_restarts"

    max_lr: float | str = option("10x", "learning rate at each restart: a number, or a multiple of lr such as 10x")
    cycle_epochs: int | str | None = option(None, "epochs of the first cycle; auto is 10, or all epochs if fewer")
    cycle_mult: int = option(1, "each cycle has this many times the epochs of the one before")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first_cycle > self.epochs:
            raise ValueError(
                f"policy '{self.name}' got cycle_epochs={self.cycle_epochs!r}, longer than the run, epochs="
                f"{self.epochs}: raise epochs to {self.first_cycle} or more, or set cycle_epochs={self.epochs}"
            )
        self._check_whole("cycle_mult", self.cycle_mult, least=1)
        self._rate("max_lr", least=self.base_lr)

    @cached_property
    def highest_lr(self) -> float:
        return self._rate("max_lr", least=self.base_lr)

    @cached_property
    def first_cycle(self) -> int:
        """Epochs of the first cycle."""
        cycle = self.cycle_epochs
        if cycle is None or cycle == "auto":
            return min(10, self.epochs)
        if isinstance(cycle, str) and cycle.isdecimal():
            cycle = int(cycle)
        self._check_whole("cycle_epochs", cycle, least=1)
        return int(cycle)

    def phases(self) -> list[Phase]:
        phases, planned, cycle = [], 0, self.first_cycle
        while planned < self.epochs:
            phases.append(Phase(cycle, self.base_batch_size))
            planned += cycle
            cycle *= self.cycle_mult
        return phases

    def formula(self, progress: Progress) -> float:
        return _cosine(self.highest_lr, self.base_lr, progress)


@dataclass(frozen=True, kw_only=True)
class AdaBatch(Policy):
    """AdaBatch: lr at each step; the batch is tiny in the first epochs, then larger, then doubles now and then.

    In the paper, counting epochs from 1: batch 1 in epochs 1 to 3, 16 in 4 to 33, 32 in 34 to 63, 64 after. A phase is
    a stretch of one batch size. `base_batch_size` plays no part.
    """

    name = "ada_batch"

    warm_epochs: int = option(3, "epochs of the first phase; 0 leaves it out")
    warm_batch: int = option(1, "batch size in the first phase")
    first_batch: int = option(16, "batch size after the first phase")
    grow_every: int = option(30, "epochs after which the batch grows; 0 is never")
    grow_factor: int = option(2, "factor by which the batch grows")
    max_growths: int = option(2, "times that the batch grows at most")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (
            ("warm_epochs", 0),
            ("warm_batch", 1),
            ("first_batch", 1),
            ("grow_every", 0),
            ("grow_factor", 1),
            ("max_growths", 0),
        ):
            self._check_whole(name, getattr(self, name), least)
        if self.epochs <= self.warm_epochs:
            raise ValueError(
                f"policy '{self.name}' needs more than warm_epochs={self.warm_epochs} epochs, got epochs="
                f"{self.epochs}: raise epochs to {self.warm_epochs + 1} or more, or set warm_epochs={self.epochs - 1}"
            )

    def phases(self) -> list[Phase]:
        phases = [Phase(self.warm_epochs, self.warm_batch)] if self.warm_epochs else []
        left, batch_size = self.epochs - self.warm_epochs, self.first_batch
        growths = self.max_growths if self.grow_every else 0
        while growths and left > self.grow_every:
            phases.append(Phase(self.grow_every, batch_size))
            left -= self.grow_every
            batch_size *= self.grow_factor
            growths -= 1
        return [*phases, Phase(left, batch_size)]


@dataclass(frozen=True, kw_only=True)
class WarmAdaBatch(AdaBatch):
    """WarmAdaBatch: AdaBatch's batches, and half a cosine from max_lr down to lr over each phase.

    In the paper: batch 1 for 3 epochs, 180,000 steps of 60,000 images, then batch 16 for 97 epochs, 363,750 steps; so
    the batch does not grow further unless `grow_every` says so, in which case each batch size is a phase of its own.
    """

    name = "warm_ada_batch"

    grow_every: int = option(0, "epochs after which the batch grows; 0 is never")
    max_lr: float | str = option("10x", "learning rate at each restart: a number, or a multiple of lr such as 10x")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._rate("max_lr", least=self.base_lr)

    @cached_property
    def highest_lr(self) -> float:
        return self._rate("max_lr", least=self.base_lr)

    def formula(self, progress: Progress) -> float:
        return _cosine(self.highest_lr, self.base_lr, progress)


def _line(start: float, end: float, fraction: float) -> float:
    return start + (end - start) * fraction


def _cosine(start: float, end: float, progress: Progress) -> float:
    """Half a cosine from start, at the first step of the phase, towards end, at its end (warm restarts, eq. 5)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress.phase_step / progress.phase_steps))
