"""What a search cannot tell yet: too few trials, epochs that schedules need, and differences that may be chance."""

import math
import statistics
from collections.abc import Sequence

from capszoo.engine.options import options_from
from capszoo.engine.run import make_policy
from capszoo.errors import CapszooError
from capszoo.policies import create_policy

from .solution import Solution

__all__ = ["RANDOM_TRIALS", "cautions"]

# So many complete trials are drawn at random before Optuna's TPE sampler learns from them; its default.
RANDOM_TRIALS = 10
# Two standard errors: 95 of 100 differences by chance are smaller.
_ERRORS = 2.0
# Below it, the rate of a schedule has hardly changed by the end of the run.
_LEAST_CHANGE = 1.1


def cautions(solutions: Sequence[Solution], num_val: int, searched: bool, seeds: int = 1) -> list[str]:
    """Say why the trials of an exploration may be too few, too short or too alike to compare, a line for each reason.

    Args:
        solutions: All trials.
        num_val: Images of the validation split.
        searched: Whether options were searched, and not the rows of a grid.
        seeds: Runs of each solution that were asked for.

    Returns:
        The lines; none where nothing speaks against a comparison.
    """
    complete = [solution for solution in solutions if solution.state == "complete" and solution.accuracy is not None]
    if not complete:
        return []
    lines = []
    own = sum(solution.repeat_of is None for solution in complete)
    if searched and own < RANDOM_TRIALS:
        are = "trials are" if own > 1 else "trial is"
        lines.append(
            f"{own} {are} complete: the search begins to learn from them at {RANDOM_TRIALS}, until then its "
            "options are random; give a larger budget"
        )
    without = [name for name in _names(complete) if not _has_begun([s for s in complete if s.name == name])]
    if without:
        lines.append(
            f"the runs of {_listed(without)} ended before a restart or a larger batch, or at the rate that they began "
            "with, so they say little about these schedules; give more epochs"
        )
    # One whose rate falls is best in its last epoch, however long it is.
    steady = [s for s in complete if s.history and s.options.get("policy") in ("fixed", "ada_batch")]
    longest = max((len(s.history) for s in steady), default=0)
    steady = [s for s in steady if len(s.history) == longest]
    rising = [s for s in steady if s.best_epoch == longest]
    if len(rising) > 1 and 2 * len(rising) > len(steady):
        lines.append(
            f"{len(rising)} of {len(steady)} trials of {longest} epochs at a fixed rate were best in their last epoch: "
            "longer ones may rank differently; give more epochs"
        )
    if searched and seeds > 1 and all(solution.repeat_of is None for solution in complete):
        lines.append("no repetition with another seed is complete; give a larger budget, or more of it with --resume")
    failed = [s for s in solutions if s.state == "failed" and s.repeat_of is not None]
    if failed:
        runs = _listed([f"trial {s.repeat_of} with seed {s.seed}" for s in failed])
        lines.append(f"{runs} failed ({failed[-1].reason}): what fails with a seed is not chosen")
    alike = _alike(complete, num_val, seeds)
    if alike:
        lines.append(alike)
    return lines


def _names(solutions: Sequence[Solution]) -> list[str]:
    return list(dict.fromkeys(solution.name for solution in solutions))


def _listed(names: Sequence[str]) -> str:
    shown = [name or "(no name)" for name in names]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _has_begun(trials: Sequence[Solution]) -> bool:
    """Whether one of the trials was long enough for its policy to do what a fixed rate and batch size do not."""
    return any(_changes(trial) for trial in trials)


def _changes(trial: Solution) -> bool:
    """Whether a second phase began, of a policy that has phases, or the rate changed, of one that changes it."""
    try:
        policy = make_policy(options_from(trial.options), max(1, trial.images))
        if policy.name in ("fixed", "lr_finder"):
            return True
        options = {"lr": policy.base_lr, "batch_size": policy.base_batch_size, "num_images": policy.num_images}
        long = create_policy(policy.name, epochs=1000, **options)
    except (CapszooError, ValueError):
        return True  # options of another version: nothing is known of them
    if len(long.phases()) > 1:
        return policy.progress(policy.epochs - 1, 0).phase > 0
    rates = [rate for _, _, rate in policy.schedule()]
    return max(rates) > _LEAST_CHANGE * min(rates)


def _alike(complete: Sequence[Solution], num_val: int, asked: int) -> str:
    """Names whose accuracy may be that of the best by chance: the spread of seeds, where there are any, says it."""
    seeds = {}
    for name in _names(complete):
        runs = [s for s in complete if s.name == name]
        best = max(runs, key=lambda run: (run.accuracy, -run.number))
        same = [run for run in runs if {**run.options, "seed": None} == {**best.options, "seed": None}]
        # The run by which a search found it does not count: of many the best were also the luckiest.
        repeated = [run for run in same if run.repeat_of is not None]
        seeds[name] = [run.accuracy for run in repeated or same]
    if len(seeds) < 2:
        return ""
    several = [values for values in seeds.values() if len(values) > 1]
    degrees = sum(len(values) - 1 for values in several)
    # Of all rows together: of two or three seeds alone it is hardly known.
    spread = math.sqrt(sum(statistics.variance(v) * (len(v) - 1) for v in several) / degrees) if several else None

    def mean(name: str) -> float:
        return statistics.fmean(seeds[name])

    def error(name: str) -> float:
        if spread is not None:
            return spread / math.sqrt(len(seeds[name]))
        # Of a ratio of counts, with one more of either kind, so that all right answers are not certain.
        share = (mean(name) * num_val + 1) / (num_val + 2)
        return math.sqrt(share * (1 - share) / max(1, num_val))

    first, *others = sorted(seeds, key=mean, reverse=True)
    near = [name for name in others if mean(first) - mean(name) <= _ERRORS * math.hypot(error(first), error(name))]
    if not near:
        return ""
    shown = [f"{name or '(no name)'} {100 * mean(name):.2f} %" for name in (first, *near)]
    why = (
        f"{num_val:,} validation images"
        if spread is None
        else f"seeds, whose standard deviation is {100 * spread:.2f} points"
    )
    advice = "compare them over --seeds" if spread is None and asked < 2 else "give more seeds, or more time"
    return f"the order of {_listed(shown)} may be chance: they lie within two standard errors, as of {why}; {advice}"
