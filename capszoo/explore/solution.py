"""Solutions: trials with their results, the Pareto-optimal ones among them, and the one to take."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from capszoo.errors import CapszooError, unknown_name

OBJECTIVES = {"accuracy": "maximize", "seconds": "minimize", "parameters": "minimize"}


class ExplorationError(CapszooError):
    """A search cannot start or go on; the message says why and what to do."""


@dataclass(frozen=True)
class Solution:
    """A trial and what it came to.

    Attributes:
        number: Number of the trial in the study.
        name: Its policy, or the name of its row in a grid; "baseline" for the network and training of the original.
        state: 'complete', 'stopped' (early), 'failed', 'interrupted', 'running' or 'waiting'.
        options: Options of recipes/train.py that differ from the defaults.
        accuracy: Best top-1 on the validation split, a fraction; the exact-match accuracy where images show several
            classes (:class:`capszoo.engine.Evaluation`).
        seconds: Time spent in training steps.
        parameters: Trainable parameters, those of the decoder included.
        seconds_to_best: Training seconds until the end of the best epoch.
        best_epoch: First epoch with the best accuracy, from 1. The weights kept are of the one with the lowest loss.
        history: ``[epoch, seconds so far, accuracy of the epoch]`` for each epoch.
        folder: The run folder.
        reason: Why it was stopped or failed.
        test_top1: Top-1 on the test set, where it was asked for.
        machine: Host and device that ran it.
        images: Training images of an epoch.
        repeat_of: Number of the trial that this one repeats with another seed; None for a trial of its own.
        runs: How many runs the figures are means of, see :func:`capszoo.explore.solution.over_seeds`.
        accuracy_std: Standard deviation of their accuracies; None of a single run.
        gain: How much more accurate than the baseline it is, over pairs of equal seeds; None without means.
    """

    number: int
    name: str
    state: str
    options: dict[str, Any] = field(default_factory=dict)
    accuracy: float | None = None
    seconds: float | None = None
    parameters: int | None = None
    seconds_to_best: float | None = None
    best_epoch: int | None = None
    history: list[list[float]] = field(default_factory=list)
    folder: str = ""
    reason: str = ""
    test_top1: float | None = None
    machine: str = ""
    images: int = 0
    repeat_of: int | None = None
    runs: int = 1
    accuracy_std: float | None = None
    gain: "Difference | None" = None

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return int(self.options.get("seed", 0))

    def gains(self, objectives: Sequence[str]) -> tuple[float, ...]:
        """Values of the objectives, larger is better."""
        return tuple(getattr(self, name) * (1 if OBJECTIVES[name] == "maximize" else -1) for name in objectives)


@dataclass(frozen=True)
class Difference:
    """A mean difference over pairs, with its 95 % confidence interval.

    Attributes:
        mean: The mean.
        low: Lower end of the interval by Student's t distribution; None of a single pair.
        high: Its upper end.
        pairs: Number of pairs.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int

    def __str__(self) -> str:
        """Of accuracies, in percent: mean, and from where to where."""
        interval = (
            "" if self.low is None or self.high is None else f" ({100 * self.low:+.2f} to {100 * self.high:+.2f})"
        )
        return f"{100 * self.mean:+.2f}{interval}"


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """How much larger values are than those of a reference with the same seeds.

    Args:
        values: Values by seed.
        reference: Those to compare with; seeds that only one of both has are left out.

    Returns:
        The difference, None where no seed is common.
    """
    differences = [value - reference[seed] for seed, value in values.items() if seed in reference]
    if not differences:
        return None
    mean, pairs = statistics.fmean(differences), len(differences)
    if pairs == 1:
        return Difference(mean, None, None, 1)
    from scipy.stats import t  # comes with scikit-learn

    half = float(t.ppf(0.975, pairs - 1)) * statistics.stdev(differences) / math.sqrt(pairs)
    return Difference(mean, mean - half, mean + half, pairs)


@dataclass(eq=False)
class _Group:
    """A trial that stands for its runs, and the complete ones among these by seed."""

    first: Solution
    runs: dict[int, Solution] = field(default_factory=dict)
    repeated: bool = False
    failed: bool = False

    def add(self, run: Solution) -> None:
        """Count one more run."""
        self.repeated = True
        self.failed |= run.state == "failed"
        if run.state == "complete":
            self.runs.setdefault(run.seed, run)


def over_seeds(solutions: Sequence[Solution], of_rows: bool = False) -> list[Solution]:
    """What a solution is chosen from: complete trials, or their means over the seeds that all of them have.

    The means of a search are those of the repetitions alone. The run by which a trial was found does not count: of many
    single runs the best ones were also the luckiest. Until every trial that is to be repeated has been, once, the
    single runs are compared. Left out are trials of which a run failed, and those that were found later and have less
    than half of the repetitions that others have. The baseline stays in any case.

    Args:
        solutions: Trials, repetitions among them.
        of_rows: Whether they are the runs of a grid's rows, which all count.
    """
    groups: dict[Any, _Group] = {}
    for solution in solutions:
        if solution.repeat_of is None and solution.state == "complete":
            groups.setdefault(solution.name if of_rows else solution.number, _Group(solution))
    for solution in solutions:
        key = solution.name if of_rows else solution.repeat_of
        if key in groups:
            groups[key].add(solution)
    baseline = next((group for group in groups.values() if group.first.name == "baseline"), None)
    compared = [group for group in groups.values() if group.runs and (group is baseline or not group.failed)]
    if not of_rows:  # what was found late must not take the repetitions of all others away
        most = max((len(group.runs) for group in compared), default=0)
        compared = [group for group in compared if group is baseline or 2 * len(group.runs) >= most]
    late = [group for group in groups.values() if group.repeated and not group.runs and not group.failed]
    seeds = set.intersection(*(set(group.runs) for group in compared)) if compared else set()
    if not seeds or (late and max(len(group.runs) for group in compared) < 2):
        return [group.first for group in groups.values()]
    reference = {seed: baseline.runs[seed].accuracy for seed in seeds} if baseline in compared else {}
    means = [_mean_of(group.first, [group.runs[seed] for seed in sorted(seeds)], reference) for group in compared]
    return means if baseline is None or baseline in compared else [baseline.first, *means]


def _mean_of(first: Solution, runs: list[Solution], baseline: Mapping[int, Any]) -> Solution:
    def mean(name: str) -> Any:
        values = [value for run in runs if (value := getattr(run, name)) is not None]
        return statistics.fmean(values) if values else None

    accuracies: dict[int, Any] = {run.seed: run.accuracy for run in runs}
    return replace(
        first,
        **{name: mean(name) for name in ("accuracy", "seconds", "seconds_to_best", "test_top1")},
        runs=len(runs),
        accuracy_std=statistics.stdev(accuracies.values()) if len(runs) > 1 else None,
        gain=paired_difference(accuracies, baseline),
    )


def pareto_front(solutions: Sequence[Solution], objectives: Sequence[str] = tuple(OBJECTIVES)) -> list[Solution]:
    """The complete solutions that no other one beats: none is as good in all objectives and better in one.

    Of solutions that are equal in all objectives the first stands for all. Sorted by the first objective, best first.
    """
    points = [(solution.gains(objectives), solution) for solution in solutions if solution.state == "complete"]
    front: list[tuple[tuple[float, ...], Solution]] = []
    for gains, solution in sorted(points, key=lambda point: (point[0], -point[1].number), reverse=True):
        # Whatever dominates a point comes before it in this order.
        if not any(all(b >= a for a, b in zip(gains, better, strict=True)) for better, _ in front):
            front.append((gains, solution))
    return [solution for _, solution in front]


def is_behind(solution: Solution, others: Sequence[Solution]) -> bool:
    """Whether another one, as small, had been as accurate after no more training time, halfway through its own.

    Whatever is fast is Pareto-optimal among whole schedules, how bad it may be: this tells those apart that a longer
    schedule beats before its end.
    """
    return any(
        other.number != solution.number
        and other.parameters <= solution.parameters
        and any(
            accuracy >= solution.accuracy and seconds <= solution.seconds
            for _, seconds, accuracy in other.history[: len(other.history) - 1]
        )
        for other in others
    )


def choose(
    solutions: Sequence[Solution],
    mode: str = "fastest",
    *,
    max_drop: float = 0.0,
    within: float | None = None,
    baseline: Solution | None = None,
    loss: float | None = None,
) -> Solution | None:
    """Choose by one of the paper's three ways to steer: fast, accurate or small.

    Args:
        solutions: Those to choose from.
        mode: 'fastest' and 'smallest' take the least training time or the fewest parameters at an accuracy not more
            than `max_drop` below the baseline's; 'accurate' takes the best accuracy.
        max_drop: Accuracy that may be lost, a fraction.
        within: Most training seconds of a solution; None for any.
        baseline: What `max_drop` is measured against; the best accuracy of all if None.
        loss: The earlier name of `max_drop`; it takes its place where it is given.

    Returns:
        The solution, or None where no complete solution meets the condition.

    Raises:
        ExplorationError: If there is no such mode.
    """
    keys: dict[str, Callable[[Solution], tuple]] = {
        "fastest": lambda s: (s.seconds, -s.accuracy, s.parameters),
        "accurate": lambda s: (-s.accuracy, s.seconds, s.parameters),
        "smallest": lambda s: (s.parameters, -s.accuracy, s.seconds),
    }
    if mode not in keys:
        raise ExplorationError(unknown_name("choice", mode, list(keys), f"choose from {', '.join(keys)}"))
    complete = [s for s in solutions if s.state == "complete"]
    in_time = [s for s in complete if within is None or s.seconds <= within]
    if mode == "accurate":
        fitting = in_time
    else:
        has_baseline = baseline is not None and baseline.accuracy is not None
        reference = baseline.accuracy if has_baseline else max((s.accuracy for s in complete), default=0.0)
        # Accuracies are ratios of whole numbers: a drop of exactly what is allowed must pass.
        fitting = [s for s in in_time if s.accuracy >= reference - (max_drop if loss is None else loss) - 1e-9]
    return min(fitting, key=keys[mode], default=None)
