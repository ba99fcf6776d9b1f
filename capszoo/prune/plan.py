"""What each round of pruning keeps."""

from typing import Any

import torch

from capszoo.errors import UsageError

from .options import PruneOptions
from .parts import PARTS, count_parts, target_counts
from .pruning import prune
from .ranking import Criterion

MOST_ROUNDS = 1000


def schedule(options: PruneOptions, model: torch.nn.Module) -> list[dict[str, Any]]:
    """What to keep in each round: numbers that fall in the same proportion from round to round.

    With a present number n and an asked one m, round r of R keeps ``n (m / n)^(r / R)``, rounded.
    """
    keep = dict(options.keep)
    if not keep:
        raise UsageError("nothing says what to keep: give --keep, such as --keep types=8 or --keep capsules=0.1")
    if len(keep) < len(options.keep):
        raise UsageError("--keep names a part twice: give each part once")
    if not 1 <= options.rounds <= MOST_ROUNDS:
        raise UsageError(f"--rounds {options.rounds} is not possible: give 1 to {MOST_ROUNDS}")
    if options.score_images < 1:
        raise UsageError(f"--score-images {options.score_images} is not possible: give 1 or more")
    targets, counts = target_counts(model, keep, options.score), count_parts(model)
    if options.rounds == 1:
        return [keep]
    for part, wanted in keep.items():
        if isinstance(wanted, list) and (part != "decoder" or any(isinstance(item, list) for item in wanted)):
            raise UsageError(
                f"--keep {part}={wanted} names indices, and --rounds {options.rounds} ranks anew: give a number"
            )

    def number(present: int, asked: int, done: int) -> int:
        return max(asked, round(present * (asked / present) ** (done / options.rounds)))

    plan = []
    for done in range(1, options.rounds + 1):
        wanted = {}
        for part, asked in targets.items():
            if part == "decoder":
                wanted[part] = tuple(number(n, m, done) for n, m in zip(counts[part], asked, strict=True))
            else:
                wanted[part] = number(counts[part], asked, done)
        plan.append(wanted)
    return plan


def prune_once(
    model: torch.nn.Module, wanted: dict[str, Any], score: str, batches: list, criterion: Criterion | None = None
) -> torch.nn.Module:
    """Prune part by part; a number that the parts before have gone below already asks for nothing more."""
    for part in (part for part in PARTS if part in wanted):
        keep = wanted[part]
        if isinstance(keep, int):
            keep = min(keep, count_parts(model)[part])
        model, _ = prune(model, {part: keep}, score, batches, criterion)
    return model
