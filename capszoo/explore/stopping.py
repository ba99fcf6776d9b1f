"""Early stopping: trials that could not become Pareto-optimal any more."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from capszoo.engine import Trainer
from capszoo.engine.options import DEFAULTS

from .solution import Solution

if TYPE_CHECKING:
    import optuna

# Trials are compared with the gains of others of their policy only when so many of these have finished.
_LEAST_PEERS = 3


def why_stop(
    trial: "optuna.Trial",
    trainer: Trainer,
    peers: Sequence[Solution],
    objectives: Sequence[str],
    most_seconds: float | None = None,
) -> str:
    """Why a trial is not worth more time; empty if it is.

    More than `most_seconds` is too much. As for the rest, seconds only grow and parameters are known. The accuracy may
    still rise, by as much as it did in any finished trial of the same policy from the same fraction of its epochs on:
    what one schedule has reached halfway says nothing of another, which may gain most at its end. If even that would
    leave the trial behind a finished one in every objective, it is stopped.

    Args:
        trial: The trial, whose `parameters` are among its attributes.
        trainer: Its trainer, after an epoch.
        peers: Finished trials.
        objectives: What trials are compared by.
        most_seconds: Most training seconds of a trial, a quarter of the study's first budget; None for any.
    """
    seconds = trainer.position.total_seconds
    if most_seconds is not None and seconds > most_seconds:
        return "took more than a quarter of the budget"
    if len(peers) < _LEAST_PEERS:
        return ""
    fraction = trainer.position.epoch / trainer.policy.epochs
    policy = trainer.policy.name
    alike = [peer for peer in peers if peer.options.get("policy", DEFAULTS.policy) == policy]
    gains = [gain for peer in alike if (gain := _gain_after(peer, fraction)) is not None]
    if len(gains) < _LEAST_PEERS:
        return ""
    accuracy = min(1.0, trainer.best["eval_top1"] + max(gains))
    parameters = trial.user_attrs["parameters"]
    hopes = Solution(trial.number, "", "complete", {}, accuracy, seconds, parameters).gains(objectives)
    for peer in peers:
        if all(b >= a for a, b in zip(hopes, peer.gains(objectives), strict=True)):
            return f"could at best come near trial {peer.number}"
    return ""


def _gain_after(peer: Solution, fraction: float) -> float | None:
    """What a finished trial gained after this fraction of its epochs; None if it had no epoch before."""
    epochs = len(peer.history)
    before = [accuracy for epoch, _, accuracy in peer.history if epoch <= fraction * epochs + 1e-9]
    return peer.accuracy - max(before) if before else None
