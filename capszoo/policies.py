"""Learning-rate and batch-size policies: formulas, for any training loop.

A policy answers two questions: which batch size in this epoch, and which learning rate at this step. It holds no
optimizer, loader or counter; the same question has the same answer in any order, so a resumed run just asks again:

    policy = create_policy("warm_ada_batch", lr=1e-3, batch_size=128, epochs=100, num_images=60000)
    for epoch in range(policy.epochs):
        loader = make_loader(policy.batch_size(epoch))
        for step, batch in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = policy.lr(policy.progress(epoch, step))
            ...

Formulas: "FasTrCaps: An Integrated Framework for Fast yet Accurate Training of Capsule Networks", section on training
policies, https://arxiv.org/abs/1905.10142. Where they came from: one cycle, https://arxiv.org/abs/1708.07120; warm
restarts, https://arxiv.org/abs/1608.03983; AdaBatch, https://arxiv.org/abs/1712.02029; the learning-rate finder,
https://arxiv.org/abs/1506.01186.

Units: `step` counts optimizer steps from 0; `epoch` counts passes over the data from 0, where the paper counts from 1;
a batch is all images of one optimizer step, over all devices together, and the last of an epoch may be short. A phase
is a stretch of epochs with one batch size and, where the policy restarts, one cycle of the learning rate.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

__all__ = [
    "AdaBatch",
    "ExpDecay",
    "Fixed",
    "LRFinder",
    "OneCycle",
    "Phase",
    "Policy",
    "Progress",
    "WarmAdaBatch",
    "WarmRestarts",
    "create_policy",
    "list_policies",
    "policy_options",
    "suggest_lr",
]


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


def _option(default: Any, help: str) -> Any:
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
    warmup_steps: int = _option(0, "first steps over which the rate rises linearly to the policy's; 0 for none")

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


def _line(start: float, end: float, fraction: float) -> float:
    return start + (end - start) * fraction


def _cosine(start: float, end: float, progress: Progress) -> float:
    """Half a cosine from start, at the first step of the phase, towards end, at its end (warm restarts, eq. 5)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress.phase_step / progress.phase_steps))


@dataclass(frozen=True, kw_only=True)
class Fixed(Policy):
    """The baseline: lr at each step, one batch size."""

    name = "fixed"


@dataclass(frozen=True, kw_only=True)
class ExpDecay(Policy):
    """Exponential decay: lr * decay_rate ^ (step / decay_steps), one batch size."""

    name = "exp_decay"

    decay_rate: float = _option(0.96, "the learning rate is multiplied by this every decay_steps steps")
    decay_steps: int = _option(2000, "steps per factor of decay_rate")
    staircase: bool = _option(False, "decay at every decay_steps-th step only, not a little at each step")

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

    max_lr: float | str = _option("10x", "highest learning rate: a number, or a multiple of lr such as 10x")
    final_lr: float | str = _option("0.1x", "learning rate at the end: a number, or a multiple of lr such as 0.1x")
    rise: float = _option(0.45, "fraction of all steps after which the learning rate is highest")
    fall_end: float = _option(0.9, "fraction of all steps after which the learning rate is back at lr")

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("rise", "fall_end"):
            self._check_number(option, getattr(self, option), above=0, remedy="pass a fraction between 0 and 1")
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

    max_lr: float | str = _option("10x", "learning rate at each restart: a number, or a multiple of lr such as 10x")
    cycle_epochs: int | str | None = _option(None, "epochs of the first cycle; auto is 10, or all epochs if fewer")
    cycle_mult: int = _option(1, "each cycle has this many times the epochs of the one before")

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

    warm_epochs: int = _option(3, "epochs of the first phase; 0 leaves it out")
    warm_batch: int = _option(1, "batch size in the first phase")
    first_batch: int = _option(16, "batch size after the first phase")
    grow_every: int = _option(30, "epochs after which the batch grows; 0 is never")
    grow_factor: int = _option(2, "factor by which the batch grows")
    max_growths: int = _option(2, "times that the batch grows at most")

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, least in (
            ("warm_epochs", 0),
            ("warm_batch", 1),
            ("first_batch", 1),
            ("grow_every", 0),
            ("grow_factor", 1),
            ("max_growths", 0),
        ):
            self._check_whole(option, getattr(self, option), least)
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

    grow_every: int = _option(0, "epochs after which the batch grows; 0 is never")
    max_lr: float | str = _option("10x", "learning rate at each restart: a number, or a multiple of lr such as 10x")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._rate("max_lr", least=self.base_lr)

    @cached_property
    def highest_lr(self) -> float:
        return self._rate("max_lr", least=self.base_lr)

    def formula(self, progress: Progress) -> float:
        return _cosine(self.highest_lr, self.base_lr, progress)


@dataclass(frozen=True, kw_only=True)
class LRFinder(Policy):
    """Learning-rate finder: 10 ^ (start_exponent + step / steps_per_decade), whatever lr is.

    No policy to train with: record the loss at each step, stop when it is no longer finite, and give both lists to
    `suggest_lr`. 700 steps go from 1e-6 to 10.
    """

    name = "lr_finder"

    start_exponent: float = _option(-6, "power of ten of the first learning rate")
    steps_per_decade: int = _option(100, "steps in which the learning rate grows tenfold")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("start_exponent", self.start_exponent, above=-300, remedy="pass a power of ten, such as -6")
        self._check_whole("steps_per_decade", self.steps_per_decade, least=1)
        last_exponent = self.start_exponent + (self.total_steps - 1) / self.steps_per_decade
        if last_exponent > 308:
            raise ValueError(
                f"policy '{self.name}' would raise the learning rate to 10^{last_exponent:.0f} in its "
                f"{self.total_steps} steps (epochs={self.epochs}): lower epochs, or raise steps_per_decade="
                f"{self.steps_per_decade}"
            )

    def formula(self, progress: Progress) -> float:
        return 10.0 ** (self.start_exponent + progress.step / self.steps_per_decade)


def suggest_lr(lrs: Sequence[float], losses: Sequence[float], window: int = 21) -> float:
    """The learning rate at which the loss falls most steeply, from a run of the learning-rate finder.

    The loss is smoothed by looking at `window` steps at a time: their mean is the smoothed loss, and the least-squares
    line through them, over log10 of the learning rate, gives its slope at the middle step, without a lag. The search
    ends at the lowest smoothed loss, and in any case before the run diverges: at the first loss that is not finite, or
    where the smoothed loss passes 4 times its lowest value so far.

    Args:
        lrs: Learning rate of each step, increasing.
        losses: Loss at each step, 0 or more; it may end in NaN or infinity.
        window: Steps looked at together; 21 are a fifth of a decade at 100 steps per decade.
    """
    lrs, losses = [float(rate) for rate in lrs], [float(loss) for loss in losses]
    if len(lrs) != len(losses):
        raise ValueError(f"got {len(lrs)} learning rates and {len(losses)} losses: pass one loss for each rate")
    if not all(low < high for low, high in zip([0.0, *lrs], lrs, strict=False)):
        raise ValueError("the learning rates do not increase from step to step: pass them as lr_finder gives them")
    if not isinstance(window, Integral) or window < 2:
        raise ValueError(f"got window={window!r}: pass a whole number of steps, 2 or more")
    finite = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    if finite < window:
        raise ValueError(
            f"the run has {finite} steps with a finite loss, fewer than window={window}: record more steps, start from "
            "a lower learning rate, or pass a smaller window"
        )

    exponents = [math.log10(rate) for rate in lrs]
    lowest, steepest_slope = math.inf, 0.0
    steepest = suggested = None
    for start in range(finite - window + 1):
        x, y = exponents[start : start + window], losses[start : start + window]
        x_mean, y_mean = sum(x) / window, sum(y) / window
        if y_mean > 4 * lowest:
            break
        slope = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
        slope /= sum((a - x_mean) ** 2 for a in x)
        if slope < steepest_slope:
            steepest_slope, steepest = slope, start + window // 2
        if y_mean < lowest:  # only a descent that ends in a new low counts: later ones are noise of the divergence
            lowest, suggested = y_mean, steepest
    if suggested is None:
        raise ValueError(
            "the loss never falls before the run diverges: start from a lower learning rate, or record more steps"
        )
    return lrs[suggested]


_POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Fixed, ExpDecay, OneCycle, WarmRestarts, AdaBatch, WarmAdaBatch, LRFinder)
}


def _unknown(what: str, name: Any, known: list[str]) -> ValueError:
    near = difflib.get_close_matches(str(name), known, n=1)
    guess = f"did you mean '{near[0]}'? " if near else ""
    return ValueError(f"{what} {name!r}: {guess}" + (f"choose from {', '.join(known)}" if known else "it has none"))


def _policy_class(name: str) -> type[Policy]:
    if name not in _POLICIES:
        raise _unknown("unknown policy", name, list(_POLICIES))
    return _POLICIES[name]


def list_policies() -> list[str]:
    """The names that `create_policy` takes; "lr_finder" is among them, though it is not one to train with."""
    return list(_POLICIES)


def policy_options(name: str) -> dict[str, tuple[Any, str]]:
    """The options of a policy: name to (default, help), for command lines and configuration files."""
    return {
        option.name: (option.default, option.metadata["help"])
        for option in fields(_policy_class(name))
        if "help" in option.metadata
    }


def create_policy(name: str, *, lr: float, batch_size: int, epochs: int, num_images: int, **options: Any) -> Policy:
    """Make a policy by name.

    Args:
        name: One of `list_policies`.
        lr: The base learning rate.
        batch_size: Images a step, over all devices together, for the policies with a fixed batch size.
        epochs: Epochs of the whole run.
        num_images: Training images seen in an epoch.
        options: The policy's own, see `policy_options`.

    Raises:
        ValueError: The name, an option or a value is not known or does not fit; one line with the remedy.
    """
    policy = _policy_class(name)
    known = list(policy_options(name))
    for option in options:
        if option not in known:
            raise _unknown(f"policy '{name}' has no option", option, known)
    return policy(base_lr=lr, base_batch_size=batch_size, epochs=epochs, num_images=num_images, **options)
