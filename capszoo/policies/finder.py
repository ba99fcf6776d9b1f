"""The learning-rate finder: a run with a growing learning rate, and the rate that it suggests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from .base import Policy, Progress, option

# Steps that `suggest_lr` looks at together by default.
WINDOW = 21


@dataclass(frozen=True, kw_only=True)
class LRFinder(Policy):
    """Learning-rate finder: 10 ^ (start_exponent + step / steps_per_decade), whatever lr is.

    No policy to train with: record the loss at each step, stop when it is no longer finite, and give both lists to
    `suggest_lr`. 700 steps go from 1e-6 to 10.
    """

    name = "lr_finder"

    start_exponent: float = option(-6.0, "power of ten of the first learning rate")
    steps_per_decade: int = option(100, "steps in which the learning rate grows tenfold")

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


def suggest_lr(lrs: Sequence[float], losses: Sequence[float], window: int = WINDOW) -> float:
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
