"""What all policies share: arithmetic on epochs, steps and phases, and the checks of their options."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

# Every epoch has a row in a table of the run.
_MOST_EPOCHS = 1_000_000


class Phase(NamedTuple):
    """A stretch of epochs with one batch size; the last one may be planned longer than the run."""

    epochs: int
    batch_size: int


class Progress(NamedTuple):
    """Where a run stands, just before an optimizer step is taken.

    Attributes:
        epoch: Epoch, from 0.
        step: Steps taken since the start of the run.
        total_steps: Steps of the whole run.
        phase: Phase, from 0.
        phase_step: Steps taken since the start of the phase.
        phase_steps: Steps of the whole phase, as planned: the run may end before the last phase does.
    """

    epoch: int
    step: int
    total_steps: int
    phase: int
    phase_step: int
    phase_steps: int


def option(default: Any, help: str) -> Any:
    """A field of a policy that is an option of command lines and configuration files, too."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What all policies share: arithmetic on epochs, steps and phases. One phase and a fixed rate unless overridden.

    Attributes:
        base_lr: The learning rate that the formulas call lr.
        base_batch_size: Images a step, for the policies with a fixed batch size.
        epochs: Epochs of the whole run.
        num_images: Training images seen in an epoch.
        warmup_steps: Steps over which the rate first rises linearly to the formula's. Not in the paper: Adam's first
            steps are as long as its rate whatever the gradient, and at batch 1 they follow single images.
    """

    name: ClassVar[str]

    base_lr: float
    base_batch_size: int
    epochs: int
    num_images: int
    warmup_steps: int = option(0, "first steps over which the rate rises linearly to the policy's; 0 for none")

    def __post_init__(self) -> None:
        self._check_number("lr", self.base_lr, above=0, remedy="pass a positive number, such as 0.001")
        self._check_whole("batch_size", self.base_batch_size, least=1)
        self._check_whole("epochs", self.epochs, least=1)
        if self.epochs > _MOST_EPOCHS:
            raise ValueError(
                f"policy '{self.name}' got epochs={self.epochs}: pass a whole number, {_MOST_EPOCHS:,} or less"
            )
        self._check_whole("num_images", self.num_images, least=1)
        self._check_whole("warmup_steps", self.warmup_steps, least=0)

    def phases(self) -> list[Phase]:
        """The phases in order; together at least as long as the run."""
        return [Phase(self.epochs, self.base_batch_size)]

    def lr(self, progress: Progress) -> float:
        """The learning rate of the step that is about to be taken: the policy's formula, times the warm-up's factor."""
        rate = self.formula(progress)
        if progress.step < self.warmup_steps:
            rate *= (progress.step + 1) / self.warmup_steps
        return rate

    def formula(self, progress: Progress) -> float:
        """The paper's learning rate of this step, without warm-up."""
        return self.base_lr

    def batch_size(self, epoch: int) -> int:
        """Images a step in this epoch; never more than there are images."""
        return self._row(epoch)[0]

    def steps(self, epoch: int) -> int:
        """Optimizer steps in this epoch; the last batch may be short."""
        return self._row(epoch)[1]

    @cached_property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(row[1] for row in self._rows)

    def progress(self, epoch: int, step: int) -> Progress:
        """The place in the run of one step.

        Args:
            epoch: Epoch, from 0.
            step: Step within the epoch, from 0.
        """
        _, steps, before, phase, phase_before, phase_steps = self._row(epoch)
        if not 0 <= step < steps:
            raise ValueError(
                f"step {step} is not in epoch {epoch} of policy '{self.name}', which has {steps} steps: pass 0 to "
                f"{steps - 1}, counted within the epoch"
            )
        return Progress(epoch, before + step, self.total_steps, phase, phase_before + step, phase_steps)

    def schedule(self) -> Iterator[tuple[int, int, float]]:
        """Yield (epoch, batch size, learning rate) for each step of the run."""
        for epoch in range(self.epochs):
            batch_size = self.batch_size(epoch)
            for step in range(self.steps(epoch)):
                yield epoch, batch_size, self.lr(self.progress(epoch, step))

    @cached_property
    def _rows(self) -> list[tuple[int, int, int, int, int, int]]:
        """Per epoch: batch size, steps, steps before it, phase, steps before it in the phase, steps of the phase."""
        rows: list[tuple[int, int, int, int, int, int]] = []
        before = 0
        for number, phase in enumerate(self.phases()):
            batch_size = min(phase.batch_size, self.num_images)
            steps = -(-self.num_images // batch_size)
            for epoch in range(min(phase.epochs, self.epochs - len(rows))):
                rows.append((batch_size, steps, before, number, epoch * steps, phase.epochs * steps))
                before += steps
        return rows

    def _row(self, epoch: int) -> tuple[int, int, int, int, int, int]:
        if not 0 <= epoch < self.epochs:
            raise ValueError(
                f"epoch {epoch} is not in this run of policy '{self.name}': pass 0 to {self.epochs - 1}, or create the "
                "policy with more epochs"
            )
        return self._rows[epoch]

    def _check_whole(self, option: str, value: Any, least: int) -> None:
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"policy '{self.name}' got {option}={value!r}: pass a whole number, {least} or more")

    def _check_number(self, option: str, value: Any, above: float, remedy: str) -> None:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= above:
            hint = " (text, not a number: YAML reads 1e-3 as text, write 0.001)" if isinstance(value, str) else ""
            raise ValueError(f"policy '{self.name}' got {option}={value!r}{hint}: {remedy}")

    def _rate(self, option: str, least: float) -> float:
        """A learning rate given as a number, or as text such as "10x", which is 10 times lr."""
        value = getattr(self, option)
        rate = math.nan
        try:
            if isinstance(value, str):
                text = value.strip().lower()
                rate = float(text[:-1]) * self.base_lr if text.endswith("x") else float(text)
            elif not isinstance(value, bool):
                rate = float(value)
        except (TypeError, ValueError):
            pass
        if not math.isfinite(rate):
            raise ValueError(
                f"policy '{self.name}' got {option}={value!r}: pass a learning rate such as 0.01, or a multiple of lr "
                'such as "10x"'
            )
        if rate < least:
            raise ValueError(
                f"policy '{self.name}' got {option}={value!r}, which is below {least:g} at lr={self.base_lr:g}: raise "
                f"{option} or lower lr"
            )
        return rate
