"""A worker: runs trials of a study in this process, one at a time, each from its checkpoint where it has one."""

import argparse
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from capszoo.data import DataSplits
from capszoo.engine import Trainer
from capszoo.engine.options import options_from, write_options
from capszoo.engine.run import make_trainer, measure_test
from capszoo.engine.run_folder import drop_state
from capszoo.errors import Stopped, TrainingError, WriteError, first_line
from capszoo.precision import device_name

from .grid import Row
from .reclaim import process_identity, retry
from .solution import ExplorationError, Solution
from .space import Space
from .stopping import why_stop
from .trials import is_limited, solution_of, trials_seen

if TYPE_CHECKING:
    import optuna

_logger = logging.getLogger(__name__)
# What ends a trial and not its worker: all errors of this package are ValueErrors, those of a GPU RuntimeErrors.
_ERRORS_OF_A_TRIAL = (ValueError, RuntimeError)


class _WorkerFault(Exception):
    """This worker cannot go on, for no fault of the trial."""


class Worker:
    """Runs trials of a study.

    Args:
        study: The study.
        plan: What it searches: a :class:`Space`, or the rows of a grid.
        options: Options of recipes/train.py for all trials.
        data: The data set.
        folder: Where the run folders of the trials are kept.
        objectives: What trials are compared by.
        device: Where to train.
        clock: Gives the time, in seconds.
        measure_test: Also measure each finished trial on the test set.
        should_stop: Asked after each training step whether to hand the trial back.
        on_change: Called with the trainer after each epoch.
    """

    def __init__(
        self,
        study: "optuna.Study",
        plan: Space | Sequence[Row],
        options: Mapping[str, Any],
        data: DataSplits,
        folder: Path,
        objectives: Sequence[str],
        device: torch.device,
        clock: Callable[[], float],
        measure_test: bool,
        should_stop: Callable[[], bool],
        on_change: Callable[[Trainer | None], None],
    ):
        self.study, self.plan, self.options, self.data = study, plan, options, data
        self.folder, self.objectives, self.device, self.clock = folder, objectives, device, clock
        self.measure_test, self.should_stop, self.on_change = measure_test, should_stop, on_change
        self.machine = f"{socket.gethostname()}:{os.getpid()} {device_name(device)}"
        self._process = process_identity()
        self._finished_folder: Path | None = None
        self._repeated = False

    def run_trial(self) -> bool:
        """Run the next trial; one that another worker has taken over in the meantime is that one's.

        Returns:
            Whether its options had been tried before, so that nothing was trained.

        Raises:
            ExplorationError: If this worker cannot go on, for no fault of the trial.
        """
        import optuna

        self._finished_folder, self._repeated = None, False
        try:
            self.study.optimize(self._objective, n_trials=1, catch=_ERRORS_OF_A_TRIAL)
        except optuna.exceptions.UpdateFinishedTrialError:
            return self._repeated
        except ValueError as error:
            if "Cannot tell a" not in str(error):
                raise
            return self._repeated
        except _WorkerFault as error:
            raise ExplorationError(f"{error} (the trial is left to other workers, or to --resume)") from None
        if self._finished_folder is not None:
            drop_state(self._finished_folder)
        return self._repeated

    def _has_twin(self, trial: "optuna.Trial") -> bool:
        """Whether this repetition was enqueued before by another worker, in the same moment."""
        import optuna

        keys = ("repeat_of", "seed")
        if keys[0] not in trial.user_attrs:
            return False
        own = [trial.user_attrs.get(key) for key in keys]
        states = (optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.COMPLETE)
        return any(
            other.number < trial.number and [other.user_attrs.get(key) for key in keys] == own
            for other in self.study.get_trials(deepcopy=False, states=states)
        )

    def _objective(self, trial: "optuna.Trial") -> tuple[float, ...]:
        import optuna

        if is_limited(self.study) and not trial.user_attrs.get("queued"):
            # Another worker took the last one between our look at the queue and our turn.
            trial.set_user_attr("surplus", True)
            raise optuna.TrialPruned
        if self._has_twin(trial):
            trial.set_user_attr("surplus", True)
            raise optuna.TrialPruned
        if self.study.user_attrs.get("repeating") and "repeat_of" not in trial.user_attrs:
            # The rest of the budget is for repetitions; what began before them is handed back, and goes on later.
            trial.set_user_attr("surplus", True)
            trial.set_user_attr("waits_for_seeds", True)
            raise optuna.TrialPruned
        trial.set_user_attr("machine", self.machine)
        trial.set_user_attr("process", self._process)
        if isinstance(self.plan, Space):
            name, options = self.plan.suggest(trial)
        else:
            rows = {row.name: row.options for row in self.plan}
            if "seed" in trial.user_attrs:
                name = trial.user_attrs["name"]
            else:  # of a study made before rows could be added
                name = trial.suggest_categorical("row", list(rows))
                trial.set_user_attr("seed", trial.suggest_int("seed", 0, 2**31))
            if name not in rows:
                self._hand_back(trial)
                raise _WorkerFault(f"row {name!r} was added by another worker: give this one the same --grid")
            options = rows[name]
        options = {**self.options, **options}
        if "seed" in trial.user_attrs:  # of a repetition, or a row
            options["seed"] = trial.user_attrs["seed"]
        options["model_kwargs"] = {**self.options.get("model_kwargs", {}), **options.get("model_kwargs", {})}
        trial.set_user_attr("name", trial.user_attrs.get("name", name))
        done = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
        known = (other.user_attrs.get("options") for other in self.study.get_trials(deepcopy=False, states=done))
        if isinstance(self.plan, Space) and options in known:
            self._repeated = True
            trial.set_user_attr("surplus", True)
            raise optuna.TrialPruned
        trial.set_user_attr("options", options)
        folder = self.folder / "trials" / f"{trial.user_attrs.get('retry_of', trial.number):04d}"
        before = trial.user_attrs.get("folder_before", "")
        if before and (Path(before) / "args.yaml").is_file():  # of another worker, on a disk that both see
            folder = Path(before)
        trial.set_user_attr("folder", str(folder.resolve()))
        try:
            return self._train(trial, options_from(options, f"trial {trial.number}"), folder)
        except (KeyboardInterrupt, optuna.exceptions.StorageInternalError):
            self._hand_back(trial)
            raise
        except (WriteError, OSError) as error:  # of this worker's disk: another one may have room
            self._hand_back(trial)
            raise _WorkerFault(first_line(error)) from error
        except _ERRORS_OF_A_TRIAL as error:
            trial.set_user_attr("reason", first_line(error))
            raise

    def _hand_back(self, trial: "optuna.Trial") -> None:
        """Give up a trial that is not to blame for it; it goes on from its checkpoint, here or elsewhere."""
        trial.set_user_attr("interrupted", True)
        retry(self.study, self.study.get_trials(deepcopy=False)[trial.number])

    def _train(self, trial: "optuna.Trial", args: argparse.Namespace, folder: Path) -> tuple[float, ...]:
        """Train in the trial's run folder, from its checkpoint where there is one."""
        import optuna

        peers = self._peers()
        # Read here: after an epoch, the storage may be out of reach for a while.
        most_seconds = self.study.user_attrs.get("most_seconds")
        stopped = {"why": ""}

        def on_epoch(trainer: Trainer, row: dict[str, Any]) -> None:
            self._record(trial, trainer)
            stopped["why"] = "" if trainer.finished else self._why_stop(trial, trainer, peers, most_seconds)
            with contextlib.suppress(optuna.exceptions.StorageInternalError):  # _record has told of it
                self.on_change(trainer)

        def should_stop() -> bool:
            return bool(stopped["why"]) or self.should_stop()

        trainer = make_trainer(
            args, self.data, self.device, folder, clock=self.clock, on_epoch=on_epoch, should_stop=should_stop
        )
        args = trainer.options
        folder.mkdir(parents=True, exist_ok=True)
        write_options(args, folder)
        parameters = sum(p.numel() for p in trainer.task.model.parameters())
        trial.set_user_attr("parameters", parameters)
        trainer.resume()
        self.on_change(trainer)
        # A trainer asks whether to stop after a step: a bad trial ends with the first step of its next epoch.
        if not trainer.fit():
            if stopped["why"]:
                trial.set_user_attr("reason", stopped["why"])
                self._finished_folder = folder
                raise optuna.TrialPruned
            self._hand_back(trial)
            raise TrainingError("interrupted")
        self._record(trial, trainer)
        if self.measure_test:
            try:
                trial.set_user_attr("test_top1", measure_test(trainer, args, self.data)["test_top1"])
            except Stopped:
                self._hand_back(trial)
                raise TrainingError("interrupted") from None
        self._finished_folder = folder
        values = {
            "accuracy": trainer.best["eval_top1"],
            "seconds": trainer.position.total_seconds,
            "parameters": parameters,
        }
        return tuple(values[objective] for objective in self.objectives)

    def _peers(self) -> list[Solution]:
        """The finished trials, by which others are judged."""
        solutions = (solution_of(trial, len(self.data.train)) for trial in trials_seen(self.study))
        return [solution for solution in solutions if solution.state == "complete"]

    def _why_stop(
        self, trial: "optuna.Trial", trainer: Trainer, peers: list[Solution], most_seconds: float | None
    ) -> str:
        """Why a trial is not worth more time; empty if it is, as the baseline, rows of a grid and repetitions are."""
        known = trial.user_attrs
        if not isinstance(self.plan, Space) or known.get("name") == "baseline" or "repeat_of" in known:
            return ""
        return why_stop(trial, trainer, peers, self.objectives, most_seconds)

    def _record(self, trial: "optuna.Trial", trainer: Trainer) -> None:
        import optuna

        seconds, history = 0.0, []
        for row in trainer.history:
            seconds += row["epoch_seconds"]
            history.append([row["epoch"], seconds, row["eval_top1"]])
        try:
            trial.set_user_attr("history", history)
        except optuna.exceptions.StorageInternalError as error:  # the next epoch writes all of it again
            _logger.warning(f"the storage cannot be reached, training goes on: {first_line(error)}")
