"""The search for Pareto-optimal training solutions: FasTrCaps as a whole (section III, figure 3).

The user names a network, a data set and what matters; trials are training runs, compared by their best accuracy on the
validation split, their training seconds and their parameters. The test set plays no part in it. Trials come from
Optuna's multi-objective sampler (a :class:`Space`) or from a fixed list (:class:`Row`), are kept in Optuna's storage,
and may be shared by any number of worker processes on any number of machines:

    exploration = Exploration(Space("capsnet_tiny", data, epochs=10), options, data, folder="runs/explore")
    exploration.run(budget=600)
    for solution in exploration.front():
        print(solution.accuracy, solution.seconds, solution.parameters, solution.options)

Paper: "FasTrCaps: An Integrated Framework for Fast yet Accurate Training of Capsule Networks",
https://arxiv.org/abs/1905.10142.
"""

import argparse
import hashlib
import json
import logging
import os
import socket
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .data import DataSplits
from .engine import Trainer
from .engine.options import (
    MODEL_OPTIONS,
    make_policy,
    make_trainer,
    measure_test,
    model_arguments,
    options_from,
    write_options,
)
from .engine.run_folder import drop_state
from .errors import Stopped, TrainingError, WriteError, first_line, unknown_name
from .files import write_csv
from .policies import list_policies
from .precision import resolve_amp
from .registry import create_model, model_keywords

if TYPE_CHECKING:
    import optuna

__all__ = [
    "CLOCKS",
    "Exploration",
    "ExplorationError",
    "OBJECTIVES",
    "Row",
    "Solution",
    "Space",
    "choose",
    "compare",
    "pareto_front",
    "retime",
    "seconds_of_an_epoch",
    "write_solutions",
]


def _cpu_seconds() -> float:
    """Processor time of this process, per thread of torch."""
    return time.process_time() / torch.get_num_threads()


# By their names on the command line: on a CPU that does other things too, the time of the process alone is comparable.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": _cpu_seconds}
OBJECTIVES = {"accuracy": "maximize", "seconds": "minimize", "parameters": "minimize"}
POLICIES = [name for name in list_policies() if name != "lr_finder"]
_logger = logging.getLogger(__name__)
# Trials are compared with the gains of others from here on only when so many have finished.
_LEAST_PEERS = 3
# Trials that may fail, and none complete, before something must be wrong with all of them.
_MOST_FAILURES = 5
# What ends a trial and not its worker: all errors of this package are ValueErrors, those of a GPU RuntimeErrors.
_ERRORS_OF_A_TRIAL = (ValueError, RuntimeError)
# Sampled options that were tried before, one after another, until the space counts as exhausted.
_MOST_REPETITIONS = 20

_SOLUTION_COLUMNS = (
    "number", "name", "state", "accuracy", "seconds", "parameters", "seconds_to_best", "best_epoch", "test_top1",
    "policy", "epochs", "batch_size", "lr", "seed", "options", "reason", "machine", "folder",
)  # fmt: skip


class ExplorationError(ValueError):
    """A search cannot start or go on; the message says why and what to do."""


class _WorkerFault(Exception):
    """This worker cannot go on, for no fault of the trial."""


@dataclass(frozen=True)
class Solution:
    """A trial and what it came to.

    Attributes:
        number: Number of the trial in the study.
        name: Its policy, or the name of its row in a grid; "baseline" for the network and training of the original.
        state: 'complete', 'stopped' (early), 'failed', 'running' or 'waiting'.
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

    def gains(self, objectives: Sequence[str]) -> tuple[float, ...]:
        """Values of the objectives, larger is better."""
        return tuple(getattr(self, name) * (1 if OBJECTIVES[name] == "maximize" else -1) for name in objectives)


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


def choose(
    solutions: Sequence[Solution],
    mode: str = "fastest",
    *,
    loss: float = 0.0,
    within: float | None = None,
    baseline: Solution | None = None,
) -> Solution | None:
    """Choose by one of the paper's three ways to steer: fast, accurate or small.

    Args:
        solutions: Those to choose from.
        mode: 'fastest' and 'smallest' take the least training time or the fewest parameters at an accuracy not more
            than `loss` below the baseline's; 'accurate' takes the best accuracy at a training time of `within`.
        loss: Accuracy that may be lost, a fraction.
        within: Most training seconds; None for any.
        baseline: What `loss` is measured against; the best accuracy of all if None.

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
    complete = [solution for solution in solutions if solution.state == "complete"]
    if mode == "accurate":
        fitting = [s for s in complete if within is None or s.seconds <= within]
    else:
        has_baseline = baseline is not None and baseline.accuracy is not None
        reference = baseline.accuracy if has_baseline else max((s.accuracy for s in complete), default=0.0)
        # Accuracies are ratios of whole numbers: a loss of exactly what is allowed must pass.
        fitting = [s for s in complete if s.accuracy >= reference - loss - 1e-9]
    return min(fitting, key=keys[mode], default=None)


@dataclass(frozen=True)
class Row:
    """A fixed trial: its name and its options."""

    name: str
    options: dict[str, Any]


class Space:
    """What the search may vary: the policies with their rates, batch sizes and phases, and the network's reductions.

    Policy (section IV of the paper) with learning rate, batch sizes, phase lengths and epochs; then weight sharing,
    decoder, kept capsule types, routing iterations, squash and precision (section V and beyond).

    Args:
        model: Name of a model; of its keywords those are varied that it takes.
        data: The data set, for its size.
        epochs: Most epochs of a trial.
        amps: Precisions to choose from, as `--amp` names them.
        fixed: Options of recipes/train.py that are not varied; entries of `model_kwargs` too.
    """

    def __init__(
        self,
        model: str,
        data: DataSplits,
        epochs: int,
        amps: Sequence[str] = ("none",),
        fixed: Mapping[str, Any] | None = None,
    ):
        self.model, self.epochs, self.amps = model, epochs, list(amps)
        self.fixed = dict(fixed or {})
        self.fixed_kwargs = dict(self.fixed.pop("model_kwargs", {}))
        self.fixed = {**{key: v for key, v in self.fixed_kwargs.items() if key in MODEL_OPTIONS}, **self.fixed}
        num_images = self.num_images = len(data.train)
        self.batch_sizes = [size for size in (16, 32, 64, 128, 256) if size <= num_images // 4] or [1]
        self.base_batch_size = 128 if num_images >= 10_000 else self.batch_sizes[0]
        args = options_from({**self.fixed, "model": model, "model_kwargs": self.fixed_kwargs})
        network = create_model(model, device="meta", **model_arguments(args, data))
        self.keywords = model_keywords(model)
        arguments = network.arguments() if hasattr(network, "arguments") else {}
        kept = arguments.get("keep_types")
        self.num_types = len(kept) if isinstance(kept, list) else kept or arguments.get("num_types")
        self.decoder_dims = list(arguments.get("decoder_dims", []))

    def queue(self) -> list[dict[str, Any]]:
        """Parameters of the trials that come first: the baseline, then each policy at the paper's settings."""
        unreduced = {
            "epochs": self.epochs, "share_weights": False, "types": 1.0,
            "decoder": True, "small_decoder": False, "decoder_width": 1.0,
            "num_routing": 3, "squash": "exact", "amp": self.amps[0],
        }  # fmt: skip
        large = {**unreduced, "batch_size": self.base_batch_size, "lr": 1e-3}
        small = {**unreduced, "lr_small_batch": 1e-3, "warm_share": 0.05, "warm_batch": 1, "first_batch": 16}
        first = [
            {"policy": "fixed", **large},
            {"policy": "exp_decay", **large, "decay": 0.5},
            {"policy": "one_cycle", **large, "peak": 5.0, "rise": 0.45},
            {"policy": "warm_restarts", **large, "peak": 5.0, "cycles": 3},
            {"policy": "ada_batch", **small, "growths": 2},
            {"policy": "warm_ada_batch", **small, "growths": 0, "peak": 10.0},
        ]
        return [point for point in first if self.fixed.get("policy", point["policy"]) == point["policy"]]

    def suggest(self, trial: "optuna.Trial") -> tuple[str, dict[str, Any]]:
        """Draw the options of a trial; return its name and them."""
        options: dict[str, Any] = {"model": self.model, **self.fixed}
        kwargs = dict(self.fixed_kwargs)

        def vary(values: dict[str, Any], name: str, draw: Callable[[], Any]) -> Any:
            if name not in values:
                values[name] = draw()
            return values[name]

        policy = vary(options, "policy", lambda: trial.suggest_categorical("policy", POLICIES))
        epochs = vary(options, "epochs", lambda: trial.suggest_int("epochs", 1, self.epochs, log=True))
        if policy in ("ada_batch", "warm_ada_batch"):
            vary(options, "lr", lambda: _short(trial.suggest_float("lr_small_batch", 1e-4, 3e-3, log=True)))
            share = trial.suggest_float("warm_share", 0.02, 0.4)
            warm = vary(options, "warm_epochs", lambda: min(max(1, round(share * epochs)), epochs - 1))
            vary(options, "warm_batch", lambda: trial.suggest_categorical("warm_batch", [1, 2, 4, 8]))
            vary(options, "first_batch", lambda: trial.suggest_categorical("first_batch", [16, 32, 64]))
            growths = vary(options, "max_growths", lambda: trial.suggest_int("growths", 0, 2))
            vary(options, "grow_every", lambda: -(-(epochs - warm) // (growths + 1)) if growths else 0)
        else:
            vary(options, "lr", lambda: _short(trial.suggest_float("lr", 1e-4, 3e-3, log=True)))
            vary(options, "batch_size", lambda: trial.suggest_categorical("batch_size", self.batch_sizes))
        if policy in ("one_cycle", "warm_restarts", "warm_ada_batch"):
            vary(options, "max_lr", lambda: f"{trial.suggest_float('peak', 1.0, 10.0, log=True):.3g}x")
        if policy == "one_cycle":
            vary(options, "rise", lambda: _short(trial.suggest_float("rise", 0.05, 0.6)))
        if policy == "warm_restarts":
            vary(options, "cycle_epochs", lambda: max(1, epochs // trial.suggest_int("cycles", 1, 4)))
        if policy == "exp_decay":
            # Drawn as what is left of the learning rate at the end, which means the same for any number of steps.
            vary(options, "decay_rate", lambda: _short(trial.suggest_float("decay", 0.01, 0.9, log=True)))
            steps = -(-self.num_images // options["batch_size"])
            vary(options, "decay_steps", lambda: epochs * steps)

        if "share_weights" in self.keywords:
            vary(kwargs, "share_weights", lambda: trial.suggest_categorical("share_weights", [False, True]))
        if "decoder" in self.keywords:
            vary(options, "decoder", lambda: trial.suggest_categorical("decoder", [True, False]))
            if options["decoder"]:
                vary(kwargs, "small_decoder", lambda: trial.suggest_categorical("small_decoder", [False, True]))
                width = trial.suggest_categorical("decoder_width", [1.0, 0.5, 0.25])
                vary(kwargs, "decoder_dims", lambda: [max(1, int(width * units)) for units in self.decoder_dims])
        if "keep_types" in self.keywords and "keep_types" not in kwargs:
            share = trial.suggest_categorical("types", [1.0, 0.75, 0.5, 0.25])
            if share < 1:
                kwargs["keep_types"] = max(1, round(share * self.num_types))
        if "num_routing" in self.keywords:
            vary(options, "num_routing", lambda: trial.suggest_int("num_routing", 1, 4))
        if "squash" in self.keywords:
            vary(options, "squash", lambda: trial.suggest_categorical("squash", ["exact", "approx"]))
        vary(options, "amp", lambda: trial.suggest_categorical("amp", self.amps))
        options["model_kwargs"] = kwargs
        return policy, options


def _short(value: float) -> float:
    """Three digits, which a person can read and write."""
    return float(f"{value:.3g}")


def seconds_of_an_epoch(args: argparse.Namespace, data: DataSplits, device: torch.device, limit: float = 3.0) -> float:
    """Estimate the training seconds of the first epoch from the median of its first steps.

    Args:
        args: Options of the run, see :mod:`capszoo.engine.options`.
        data: The data set.
        device: Where to train.
        limit: Seconds after which the measurement ends, two steps at least.
    """
    ends: list[float] = []

    def measured() -> bool:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())
        return len(ends) > 2 and ends[-1] - ends[0] > limit

    trainer = make_trainer(args, data, device, should_stop=measured)
    start = time.perf_counter()
    trainer.fit()
    # The first step also compiles and allocates.
    steps = [after - before for before, after in zip(ends, ends[1:], strict=False)] or [ends[0] - start]
    return statistics.median(steps) * trainer.policy.steps(0)


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


def _trials_seen(study: "optuna.Study") -> list["optuna.trial.FrozenTrial"]:
    """All trials but those that came after a fixed number was reached."""
    return [trial for trial in study.get_trials(deepcopy=False) if not trial.user_attrs.get("surplus")]


class Exploration:
    """A study: its trials, who runs them, and where they are kept.

    Args:
        plan: A :class:`Space` to search, or the rows of a fixed grid.
        options: Options of recipes/train.py for all trials (`dataset`, `data_dir`, `val_fraction` ...).
        data: The data set that they name; it must have a validation split.
        folder: Where the run folders, and by default the storage, are kept; made when there is something to keep.
        storage: URL of Optuna's storage, for several workers; None is a SQLite file in `folder`.
        name: Name of the study in the storage.
        objectives: Those of :data:`OBJECTIVES` that matter.
        trials: Number of trials of all workers together; None for as many as `run` has time for. Of a grid, all rows.
        seeds: Runs of each row of a grid, with seeds from the options' on.
        device: Where to train.
        measure_test: Also measure each finished trial on the test set, for reports; it is never used to choose.
        clock: What seconds are: 'wall', or 'cpu' for those that the processor spent on it (divided by torch's threads).
        grace: Seconds without a sign of life after which another worker's trial counts as dead and is run again.
        on_change: Called with the trainer of the running trial (None between trials) after each epoch and trial.

    Raises:
        ExplorationError: If the storage cannot be reached, or holds a study of that name made for something else.
    """

    def __init__(
        self,
        plan: Space | Sequence[Row],
        options: Mapping[str, Any],
        data: DataSplits,
        folder: str | Path,
        *,
        storage: str | None = None,
        name: str = "study",
        objectives: Sequence[str] = tuple(OBJECTIVES),
        trials: int | None = None,
        seeds: int = 1,
        device: torch.device | str = "cpu",
        measure_test: bool = False,
        clock: str = "wall",
        grace: int = 120,
        on_change: Callable[[Trainer | None], None] = lambda trainer: None,
    ):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        for objective in objectives:
            if objective not in OBJECTIVES:
                known = list(OBJECTIVES)
                raise ExplorationError(unknown_name("objective", objective, known, f"choose from {', '.join(known)}"))
        if not objectives or len(set(objectives)) < len(objectives):
            raise ExplorationError(f"objectives {list(objectives)} are none or not all different: name each once")
        if data.val is None:
            raise ExplorationError("trials are compared on the validation split: give --val-fraction above 0")
        self.plan, self.options, self.data = plan, dict(options), data
        self.folder, self.device, self.objectives = Path(folder), torch.device(device), list(objectives)
        self.measure_test, self.on_change = measure_test, on_change
        if clock == "cpu" and self.device.type != "cpu":
            raise ExplorationError(f"clock 'cpu' does not see the work of {self.device}: use 'wall'")
        self.clock = CLOCKS[clock]
        self.machine = f"{socket.gethostname()}:{os.getpid()} {_device_name(self.device)}"
        self._process = _process_identity()
        self._nameless: dict[int, float] = {}  # when running trials without a worker were first seen
        self.grace = grace
        self.storage = storage or f"sqlite:///{self.folder / 'study.db'}"
        self._deadline: float | None = None
        self._asked_to_stop: Callable[[], bool] = lambda: False
        is_grid = not isinstance(plan, Space)
        models = {row.options.get("model", "") for row in plan} if is_grid else {plan.model}
        facts = {
            "model": self.options.get("model") or ", ".join(sorted(models)),
            "dataset": self.options.get("dataset", "digits"),
            "images": [len(data.train), len(data.val)],
            "objectives": self.objectives,
            "clock": clock,
            "grid": [row.name for row in plan] if is_grid else None,
            "options": _digest(self.options, {row.name: row.options for row in plan} if is_grid else plan.fixed),
            "seeds": seeds,
        }
        if storage is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ExplorationError(
                    f"folder {str(folder)!r} cannot be made ({error.strerror}): choose another --output"
                ) from None
        # Wide intervals are kind to a database with hundreds of workers.
        backend = _open_storage(self.storage, heartbeat=max(1, grace // 4), grace=grace, retry=self._retry)
        directions = [OBJECTIVES[objective] for objective in self.objectives]
        with _storage_errors(self.storage):
            try:
                self.study = optuna.create_study(storage=backend, study_name=name, directions=directions)
            except optuna.exceptions.DuplicatedStudyError:
                self.study = optuna.load_study(storage=backend, study_name=name)
                self._join(name, facts)
                seed = None  # a worker that joins, or comes again, must not draw what the first one drew
            else:
                self.study.set_user_attr("facts", facts)
                self._fill_queue(trials, seeds)
                seed = int(self.options.get("seed", 0)) % 2**32  # NumPy takes no larger one
        self.study.sampler = optuna.samplers.TPESampler(multivariate=True, group=True, seed=seed)
        if not is_grid:
            # So that all workers draw from one space.
            plan.epochs, plan.amps = self.study.user_attrs["epochs"], self.study.user_attrs["amps"]
            for amp in plan.amps:
                try:
                    resolve_amp(amp, self.device)
                except TrainingError:
                    raise ExplorationError(
                        f"study {name!r} varies precisions that {self.device.type} does not have ({amp}): start it "
                        f"with --set amp=none, or leave this worker out"
                    ) from None

    def _fill_queue(self, trials: int | None, seeds: int) -> None:
        """Enqueue what is known before the search: rows, or the baseline and the paper's policies."""
        first = int(self.options.get("seed", 0))
        if isinstance(self.plan, Space):
            self.study.set_user_attr("epochs", self.plan.epochs)
            self.study.set_user_attr("amps", self.plan.amps)
            known = self.plan.queue()
            known += [{}] * (0 if trials is None else trials - len(known))
            queue: list[tuple[dict[str, Any], dict[str, Any]]]
            queue = [(point, {}) for point in (known if trials is None else known[:trials])]
            if queue and queue[0][0].get("policy") == "fixed":
                queue[0][1]["name"] = "baseline"
        else:
            # By seed, so that a grid that is cut short still has whole repetitions.
            queue = [({"row": row.name, "seed": first + n}, {}) for n in range(seeds) for row in self.plan]
        for point, attributes in queue:
            self.study.enqueue_trial(point, user_attrs={**attributes, "queued": True})
        limited = trials is not None or not isinstance(self.plan, Space)
        self.study.set_user_attr("queue", len(queue) if limited else None)

    def _join(self, name: str, facts: dict[str, Any]) -> None:
        """Wait for the worker that makes the study, and check that it is for the same thing."""
        for _ in range(100):
            if "queue" in self.study.user_attrs:
                break
            time.sleep(0.1)
        else:
            raise ExplorationError(
                f"study {name!r} in {_without_password(self.storage)} was never finished being set up: choose another "
                "--study, or delete it"
            )
        for key, value in self.study.user_attrs.get("facts", {}).items():
            if facts.get(key) != value:
                if key == "options":
                    raise ExplorationError(
                        f"study {name!r} was made with other options or rows: choose another --study or folder"
                    )
                raise ExplorationError(
                    f"study {name!r} was made for {key} {value!r}, not {facts.get(key)!r}: choose another --study or "
                    "folder"
                )

    @property
    def limited(self) -> bool:
        """Whether the number of trials is fixed."""
        return self.study.user_attrs.get("queue") is not None

    def solutions(self) -> list[Solution]:
        """All trials so far, those of other workers too."""
        return [self._solution(trial) for trial in _trials_seen(self.study)]

    def front(self) -> list[Solution]:
        """The Pareto-optimal solutions so far."""
        return pareto_front(self.solutions(), self.objectives)

    def baseline(self) -> Solution | None:
        """The trial named 'baseline', if it is complete; of several, as a grid has by seed, the first."""
        found = (s for s in self.solutions() if s.name == "baseline" and s.state == "complete")
        return next(found, None)

    def run(self, budget: float | None = None, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Run trials until all are done, or the budget is spent; return False if `should_stop` ended it before.

        What the end of the budget or `should_stop` interrupts goes on from its checkpoint when the study is run again.

        Args:
            budget: Seconds; None for no limit, which needs a fixed number of trials.
            should_stop: Asked after each training step.

        Raises:
            ExplorationError: If there is neither a budget nor a number of trials, or all of the first trials fail.
        """
        if budget is None and not self.limited:
            raise ExplorationError("the search has no end: give --budget, such as 30m, or --trials")
        self._deadline = None if budget is None else time.monotonic() + budget
        if budget is not None and isinstance(self.plan, Space) and "most_seconds" not in self.study.user_attrs:
            # Of the first budget, else a short --resume would stop what a long one began.
            self.study.set_user_attr("most_seconds", budget / 4)
        self._asked_to_stop = should_stop
        repetitions = 0
        while not should_stop() and not self._out_of_time():
            self._reclaim()
            if self.limited:
                states = [trial.state.name for trial in _trials_seen(self.study)]
                if "WAITING" not in states:
                    if "RUNNING" not in states:
                        break
                    time.sleep(1)  # another worker has the last ones, and may yet die
                    continue
            self._repeated = False
            self._run_trial()
            seen = _trials_seen(self.study)
            failed = [t for t in seen if t.state.name == "FAIL" and not t.user_attrs.get("interrupted")]
            reasons = [trial.user_attrs["reason"] for trial in failed if "reason" in trial.user_attrs]
            if len(reasons) >= _MOST_FAILURES and not any(trial.state.name == "COMPLETE" for trial in seen):
                raise ExplorationError(f"the first {len(reasons)} trials failed, the last one since {reasons[-1]}")
            repetitions = repetitions + 1 if self._repeated else 0
            if repetitions == _MOST_REPETITIONS:
                break
            self.on_change(None)
        return not should_stop()

    def _run_trial(self) -> None:
        """Run the next trial; one that another worker has taken over in the meantime is that one's."""
        import optuna

        self._finished_folder: Path | None = None
        with _storage_errors(self.storage):
            try:
                self.study.optimize(self._objective, n_trials=1, catch=_ERRORS_OF_A_TRIAL)
            except optuna.exceptions.UpdateFinishedTrialError:
                return
            except ValueError as error:
                if "Cannot tell a" not in str(error):
                    raise
                return
            except _WorkerFault as error:
                raise ExplorationError(f"{error} (the trial is left to other workers, or to --resume)") from None
        if self._finished_folder is not None:
            drop_state(self._finished_folder)

    def _out_of_time(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _objective(self, trial: "optuna.Trial") -> tuple[float, ...]:
        import optuna

        if self.limited and not trial.user_attrs.get("queued"):
            # Another worker took the last one between our look at the queue and our turn.
            trial.set_user_attr("surplus", True)
            raise optuna.TrialPruned
        trial.set_user_attr("machine", self.machine)
        trial.set_user_attr("process", self._process)
        if isinstance(self.plan, Space):
            name, options = self.plan.suggest(trial)
        else:
            rows = {row.name: row.options for row in self.plan}
            name = trial.suggest_categorical("row", list(rows))
            options = {**rows[name], "seed": trial.suggest_int("seed", 0, 2**31)}
        options = {**self.options, **options}
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
        self._retry(self.study, self.study.get_trials(deepcopy=False)[trial.number])

    def _train(self, trial: "optuna.Trial", args: argparse.Namespace, folder: Path) -> tuple[float, ...]:
        """Train in the trial's run folder, from its checkpoint where there is one."""
        import optuna

        peers = [solution for solution in self.solutions() if solution.state == "complete"]
        stopped = {"why": ""}

        def on_epoch(trainer: Trainer, row: dict[str, Any]) -> None:
            self._record(trial, trainer)
            stopped["why"] = "" if trainer.finished else self._why_stop(trial, trainer, peers)
            self.on_change(trainer)

        def should_stop() -> bool:
            return bool(stopped["why"]) or self._asked_to_stop() or self._out_of_time()

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

    def _why_stop(self, trial: "optuna.Trial", trainer: Trainer, peers: list[Solution]) -> str:
        """Why a trial is not worth more time; empty if it is, as the baseline always is.

        More than a quarter of the study's first budget is too much. As for the rest, seconds only grow and parameters
        are known. The accuracy may still rise, by as much as it did in any finished trial from the same fraction of
        its epochs on. If even that would leave the trial behind a finished one in every objective, it is stopped.
        """
        if not isinstance(self.plan, Space) or trial.user_attrs.get("name") == "baseline":
            return ""
        seconds = trainer.position.total_seconds
        most = self.study.user_attrs.get("most_seconds")
        if most is not None and seconds > most:
            return "took more than a quarter of the budget"
        if len(peers) < _LEAST_PEERS:
            return ""
        fraction = trainer.position.epoch / trainer.policy.epochs
        gains = [gain for peer in peers if (gain := _gain_after(peer, fraction)) is not None]
        if len(gains) < _LEAST_PEERS:
            return ""
        accuracy = min(1.0, trainer.best["eval_top1"] + max(gains))
        parameters = trial.user_attrs["parameters"]
        hopes = Solution(trial.number, "", "complete", {}, accuracy, seconds, parameters).gains(self.objectives)
        for peer in peers:
            if all(b >= a for a, b in zip(hopes, peer.gains(self.objectives), strict=True)):
                return f"could at best come near trial {peer.number}"
        return ""

    def _retry(self, study: "optuna.Study", trial: "optuna.trial.FrozenTrial") -> None:
        """Enqueue a trial again whose worker died or was interrupted; it goes on from its checkpoint."""
        known = trial.user_attrs
        attributes = {"queued": True, "retry_of": known.get("retry_of", trial.number)}
        attributes |= {"name": known["name"]} if "name" in known else {}
        attributes |= {"folder_before": known["folder"]} if "folder" in known else {}
        study.enqueue_trial({**trial.system_attrs.get("fixed_params", {}), **trial.params}, user_attrs=attributes)

    def _reclaim(self) -> None:
        """Take back trials of workers of this machine that are no more, without waiting for the period of grace.

        Those of other machines are found by their missing heartbeats, whenever a trial begins.
        """
        import optuna

        with _storage_errors(self.storage):
            optuna.storages.fail_stale_trials(self.study)
            for trial in self.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
                if "process" in trial.user_attrs:
                    dead = _is_dead(trial.user_attrs["process"])
                else:  # its worker has just taken it, or died before it could say who it is
                    first = self._nameless.setdefault(trial.number, time.monotonic())
                    dead = time.monotonic() - first > self.grace
                if dead:
                    try:
                        self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
                        continue  # another worker was first
                    self._retry(self.study, trial)

    def _solution(self, trial: "optuna.trial.FrozenTrial") -> Solution:
        attributes = trial.user_attrs
        history = attributes.get("history", [])
        best = max(history, key=lambda point: (point[2], -point[0])) if history else None
        states = {"COMPLETE": "complete", "PRUNED": "stopped", "FAIL": "failed", "RUNNING": "running"}
        return Solution(
            number=trial.number,
            name=attributes.get("name", ""),
            state=states.get(trial.state.name, "waiting"),
            options=attributes.get("options", {}),
            accuracy=best[2] if best else None,
            seconds=history[-1][1] if history else None,
            parameters=attributes.get("parameters"),
            seconds_to_best=best[1] if best else None,
            best_epoch=int(best[0]) if best else None,
            history=history,
            folder=attributes.get("folder", ""),
            reason=attributes.get("reason", "worker died" if trial.state.name == "FAIL" else ""),
            test_top1=attributes.get("test_top1"),
            machine=attributes.get("machine", ""),
            images=len(self.data.train),
        )


def compare(solutions: Sequence[Solution], baseline: str = "baseline") -> list[dict[str, Any]]:
    """Compare the rows of a grid over their seeds, as section VI of the paper does.

    Every run is held against the baseline's of the same seed: `seconds_to_baseline` is the training time until the end
    of the first epoch that is as accurate, on the validation split, as the baseline ever was, and `saving` what
    that spares of the time the baseline took to get there (0.586 is the paper's headline).

    Args:
        solutions: Trials of a grid.
        baseline: Name of the row to compare with.

    Returns:
        A dictionary a row, in the order of their first trials: means, and standard deviations (`_std`) over seeds.
        Missing are times where no seed got there; `reached` counts the seeds that did.
    """
    complete = [solution for solution in solutions if solution.state == "complete"]
    references = {s.options.get("seed", 0): s for s in complete if s.name == baseline}
    rows = []
    for name in dict.fromkeys(solution.name for solution in complete):
        runs = [solution for solution in complete if solution.name == name]
        times, savings = [], []
        for run in runs:
            reference = references.get(run.options.get("seed", 0))
            if reference is None:
                continue
            at = next((seconds for _, seconds, accuracy in run.history if accuracy >= reference.accuracy), None)
            if at is not None:
                times.append(at)
                savings.append(1 - at / reference.seconds_to_best)
        row: dict[str, Any] = {"name": name, "runs": len(runs)}
        for key, values in (
            ("accuracy", [run.accuracy for run in runs]),
            ("test_top1", [run.test_top1 for run in runs if run.test_top1 is not None]),
            ("best_epoch", [run.best_epoch for run in runs]),
            ("epoch_seconds", [run.seconds / len(run.history) for run in runs]),
            ("seconds", [run.seconds for run in runs]),
            ("seconds_to_best", [run.seconds_to_best for run in runs]),
            ("seconds_to_baseline", times),
            ("saving", savings),
        ):
            row[key] = statistics.fmean(values) if values else None
            row[key + "_std"] = statistics.stdev(values) if len(values) > 1 else None
        row["reached"] = len(times)
        row["parameters"] = runs[0].parameters
        rows.append(row)
    return rows


def write_solutions(path: str | Path, solutions: Sequence[Solution]) -> None:
    """Write solutions as CSV, the options as JSON and the commonest of them as columns too."""
    rows = []
    for solution in solutions:
        row = {**solution.options, **asdict(solution), "options": json.dumps(solution.options)}
        rows.append({key: row.get(key) for key in _SOLUTION_COLUMNS})
    write_csv(Path(path), _SOLUTION_COLUMNS, rows)


def _gain_after(peer: Solution, fraction: float) -> float | None:
    """What a finished trial gained after this fraction of its epochs; None if it had no epoch before."""
    epochs = len(peer.history)
    before = [accuracy for epoch, _, accuracy in peer.history if epoch <= fraction * epochs + 1e-9]
    return peer.accuracy - max(before) if before else None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _digest(*options: Any) -> str:
    """Tell sets of options apart, but for where the data are."""
    kept = [{k: v for k, v in part.items() if k not in ("data_dir", "download")} for part in options]
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _process_identity(process: int | None = None) -> list[str]:
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


def _is_dead(identity: Sequence[str]) -> bool:
    """Whether a process is known to be no more; of another machine's, nothing is known."""
    own = _process_identity()
    if not identity or not own or identity[0] != own[0]:
        return False
    return _process_identity(int(identity[1])) != list(identity)


def _without_password(url: str) -> str:
    """A storage's URL as it may be shown."""
    scheme, sign, rest = url.partition("://")
    account, at, place = rest.rpartition("@")
    return f"{scheme}{sign}{account.partition(':')[0]}{at}{place}"


@contextmanager
def _storage_errors(url: str) -> Iterator[None]:
    """Turn errors of the database into one line."""
    import optuna
    import sqlalchemy.exc

    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, ImportError) as error:
        cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
        text = str(getattr(cause, "orig", cause) or error).strip().splitlines()[0]
        raise ExplorationError(
            f"storage {_without_password(url)} cannot be used ({text}): check --storage, such as "
            "postgresql+psycopg://user@host/database"
        ) from None


def _lock_before_reading(engine: Any) -> None:
    """Let SQLite's transactions take the lock at once.

    It does not know SELECT ... FOR UPDATE, by which Optuna gives a waiting trial to one worker alone.
    """
    import sqlalchemy

    @sqlalchemy.event.listens_for(engine, "connect")
    def leave_transactions_to_us(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @sqlalchemy.event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections made before


def _open_storage(url: str, heartbeat: int, grace: int, retry: Callable) -> Any:
    import optuna
    import sqlalchemy.exc

    engine: dict[str, Any] = {"pool_pre_ping": True}  # a connection that a server or firewall dropped is made anew
    if url.startswith("sqlite"):
        engine["connect_args"] = {"timeout": 60}

    class Storage(optuna.storages.RDBStorage):
        """One whose heartbeat outlives a restart of the server."""

        def record_heartbeat(self, trial_id: int) -> None:
            try:
                super().record_heartbeat(trial_id)
            except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
                _logger.warning(f"the storage cannot be reached, the next heartbeat may: {first_line(error)}")

    if url.startswith("postgresql"):
        engine["connect_args"] = {"connect_timeout": 10}
    with _storage_errors(url):
        for attempt in range(10):
            try:
                storage = Storage(
                    url.replace("{", "{{").replace("}", "}}"),  # which Optuna formats
                    engine_kwargs=engine,
                    heartbeat_interval=heartbeat,
                    grace_period=grace,
                    heartbeat_stale_trial_callback=retry,
                )
                if url.startswith("sqlite"):
                    _lock_before_reading(storage.engine)
                return storage
            except sqlalchemy.exc.DBAPIError as error:
                # Workers that start at the same moment make the tables of a new database at the same moment.
                beaten = isinstance(error, sqlalchemy.exc.IntegrityError) or "already exists" in str(error.orig)
                if not beaten or attempt == 9:
                    raise
                time.sleep(0.2 * (attempt + 1))
    raise AssertionError("the loop returns or raises")
