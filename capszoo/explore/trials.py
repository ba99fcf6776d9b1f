"""Trials of an Optuna study as solutions."""

from typing import TYPE_CHECKING

from .reclaim import MOST_DEATHS, deaths_of
from .solution import Solution

if TYPE_CHECKING:
    import optuna


def trials_seen(study: "optuna.Study") -> list["optuna.trial.FrozenTrial"]:
    """All trials but those that came after a fixed number was reached."""
    return [trial for trial in study.get_trials(deepcopy=False) if not trial.user_attrs.get("surplus")]


def is_limited(study: "optuna.Study") -> bool:
    """Whether the number of trials is fixed."""
    return study.user_attrs.get("queue") is not None


def solution_of(trial: "optuna.trial.FrozenTrial", images: int) -> Solution:
    """A trial with its result, of a study with so many training images."""
    attributes = trial.user_attrs
    history = attributes.get("history", [])
    best = max(history, key=lambda point: (point[2], -point[0])) if history else None
    states = {"COMPLETE": "complete", "PRUNED": "stopped", "FAIL": "failed", "RUNNING": "running"}
    state = states.get(trial.state.name, "waiting")
    reason = attributes.get("reason", "")
    if state == "failed" and attributes.get("interrupted"):
        state = "interrupted"  # goes on in another trial
    elif state == "failed" and not reason:
        deaths = deaths_of(trial)
        if deaths < MOST_DEATHS:
            state, reason = "interrupted", "worker died"
        else:
            reason = f"its worker died {deaths} times in one epoch: memory may be too small"
    return Solution(
        number=trial.number,
        name=attributes.get("name", ""),
        state=state,
        options=attributes.get("options", {}),
        accuracy=best[2] if best else None,
        seconds=history[-1][1] if history else None,
        parameters=attributes.get("parameters"),
        seconds_to_best=best[1] if best else None,
        best_epoch=int(best[0]) if best else None,
        history=history,
        folder=attributes.get("folder", ""),
        reason=reason,
        test_top1=attributes.get("test_top1"),
        machine=attributes.get("machine", ""),
        images=images,
        repeat_of=attributes.get("repeat_of"),
    )
