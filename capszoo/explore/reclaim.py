"""Trials of workers that died or were interrupted: they are found, and run again from their checkpoints."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna


# What a trial that is enqueued again keeps of the one before.
_KEPT = ("name", "repeat_of", "seed", "promoted_from", "retry_of", "folder_before", "deaths", "epochs_at_death")
# Workers that a trial may take with it, one after another in the same epoch, before it is left alone.
MOST_DEATHS = 4


class Reclaimer:
    """Takes trials of dead workers back.

    Args:
        study: The study.
        grace: Seconds without a sign of life after which another worker's trial counts as dead.
    """

    def __init__(self, study: "optuna.Study", grace: int):
        self.study, self.grace = study, grace
        self._nameless: dict[int, float] = {}  # when running trials without a worker were first seen

    def reclaim(self) -> None:
        """Take back trials of workers of this machine that have ended, without waiting for the period of grace.

        Those of other machines are found by their missing heartbeats, whenever a trial begins.
        """
        import optuna

        optuna.storages.fail_stale_trials(self.study)
        for trial in self.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
            if "process" in trial.user_attrs:
                dead = is_dead(trial.user_attrs["process"])
            else:  # its worker has just taken it, or died before it could say who it is
                first = self._nameless.setdefault(trial.number, time.monotonic())
                dead = time.monotonic() - first > self.grace
            if dead:
                try:
                    self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
                    continue  # another worker was first
                retry(self.study, trial)


def enqueue_again(study: "optuna.Study", trial: "optuna.trial.FrozenTrial", **attributes: Any) -> None:
    """Enqueue a trial once more, as what it was."""
    kept = {key: trial.user_attrs[key] for key in _KEPT if key in trial.user_attrs}
    point = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    study.enqueue_trial(point, user_attrs={**kept, **attributes, "queued": True})


def retry(study: "optuna.Study", trial: "optuna.trial.FrozenTrial") -> None:
    """Enqueue a trial again whose worker died or was interrupted; it goes on from its checkpoint.

    Not one that never gets through an epoch: out of memory, it would end each worker that takes it.
    """
    known = trial.user_attrs
    attributes = {"folder_before": known["folder"]} if "folder" in known else {}
    if not known.get("interrupted"):
        deaths = deaths_of(trial)
        if deaths >= MOST_DEATHS:
            return
        attributes |= {"deaths": deaths, "epochs_at_death": len(known.get("history", []))}
    enqueue_again(study, trial, retry_of=known.get("retry_of", trial.number), **attributes)


def deaths_of(trial: "optuna.trial.FrozenTrial") -> int:
    """How many workers died at a trial whose worker died, in the epoch at which it is, one after another."""
    known = trial.user_attrs
    went_on = len(known.get("history", [])) > known.get("epochs_at_death", 0)
    return 1 if went_on else known.get("deaths", 0) + 1


def process_identity(process: int | None = None) -> list[str]:
    """Where a process runs (machine since its start, process numbers of its container), its number and its start.

    A number alone may be that of another container, or of a process that came after. Empty where there is no /proc.
    """
    number = os.getpid() if process is None else process
    try:
        place = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
        started = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return []
    return [place, str(number), started]


def is_dead(identity: Sequence[str]) -> bool:
    """Whether a process is known to be no more; of another machine's, nothing is known."""
    own = process_identity()
    if not identity or not own or identity[0] != own[0]:
        return False
    return process_identity(int(identity[1])) != list(identity)
