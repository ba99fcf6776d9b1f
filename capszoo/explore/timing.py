"""Training seconds: the clocks of a search, estimates of an epoch, and times measured at rest."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from capszoo.data import DataSplits
from capszoo.engine.options import POLICY_OPTIONS, TrainingOptions, options_from
from capszoo.engine.run import make_policy, make_trainer

from .solution import Solution

if TYPE_CHECKING:
    from .exploration import Exploration


def _cpu_seconds() -> float:
    """Processor time of this process, per thread of torch."""
    return time.process_time() / torch.get_num_threads()


# By their names on the command line: on a CPU that does other things too, the time of the process alone is comparable.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": _cpu_seconds}


def one_plain_epoch(options: Mapping[str, Any]) -> TrainingOptions:
    """Options of recipes/train.py for a single epoch at a fixed rate and batch size, without those of the policy."""
    kept = {name: value for name, value in options.items() if name not in POLICY_OPTIONS}
    return options_from({**kept, "policy": "fixed", "epochs": 1})


def seconds_of_an_epoch(
    args: argparse.Namespace, data: DataSplits, device: torch.device, limit: float | None = None
) -> float:
    """Estimate the training seconds of the first epoch from the median of its first steps.

    Args:
        args: Options of the run, see `capszoo.engine.options`.
        data: The data set.
        device: Where to train.
        limit: Seconds after which the measurement ends, two steps at least; default 3, on a GPU 0.5.
    """
    limit = (0.5 if device.type == "cuda" else 3.0) if limit is None else limit
    ends: list[float] = []
    taken = 0

    def measured() -> bool:
        nonlocal taken
        taken += 1
        if taken % together:
            return False
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())
        return len(ends) > 2 and ends[-1] - ends[0] > limit

    trainer = make_trainer(args, data, device, should_stop=measured)
    # Steps on a GPU overlap with what Python does for the next ones: a wait after each would be timed, too.
    together = min(20, max(1, trainer.policy.steps(0) // 4)) if device.type == "cuda" else 1
    start = time.perf_counter()
    trainer.fit()
    # The first step also compiles and allocates.
    steps = [after - before for before, after in zip(ends, ends[1:], strict=False)] or [ends[0] - start]
    return statistics.median(steps) / together * trainer.policy.steps(0)


def retime(solutions: Sequence[Solution], seconds: Callable[[Solution, int], float]) -> list[Solution]:
    """Replace the times of solutions by epochs times seconds an epoch, as the paper counts them.

    Trials that ran beside other work, or on different machines, are compared fairly by times that were measured
    at rest.

    Args:
        solutions: Trials; those without a history stay as they are.
        seconds: Seconds of an epoch of a solution at a batch size.
    """
    retimed = []
    for solution in solutions:
        if not solution.history:
            retimed.append(solution)
            continue
        args = options_from(solution.options)
        policy = make_policy(args, solution.images)
        total, history = 0.0, []
        for epoch, _, accuracy in solution.history:
            total += seconds(solution, policy.batch_size(int(epoch) - 1))
            history.append([epoch, total, accuracy])
        to_best = None if solution.best_epoch is None else history[solution.best_epoch - 1][1]
        retimed.append(replace(solution, history=history, seconds=total, seconds_to_best=to_best))
    return retimed


def retime_at_rest(exploration: "Exploration", rounds: int = 3) -> list[Solution]:
    """Measure an epoch of every row at every batch size it has, in turns, and time the trials by the medians."""
    solutions = exploration.solutions()
    device, data = exploration.device, exploration.data
    first = {solution.name: solution for solution in reversed(solutions) if solution.history}
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for name, solution in first.items():
            policy = make_policy(options_from(solution.options), solution.images)
            for batch_size in {policy.batch_size(epoch) for epoch in range(policy.epochs)}:
                args = one_plain_epoch({**solution.options, "batch_size": batch_size})
                times.setdefault((name, batch_size), []).append(seconds_of_an_epoch(args, data, device))
    return retime(solutions, lambda solution, batch_size: statistics.median(times[solution.name, batch_size]))
