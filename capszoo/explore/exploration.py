"""A study: its trials, who runs them, and where they are kept."""

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from capszoo.data import DataSplits
from capszoo.engine import Trainer
from capszoo.errors import TrainingError, unknown_name
from capszoo.precision import resolve_amp

from .caution import RANDOM_TRIALS
from .grid import Row, check_grown, enqueue_rows
from .reclaim import Reclaimer, enqueue_again, retry
from .solution import OBJECTIVES, ExplorationError, Solution, is_behind, over_seeds, pareto_front
from .space import GROWTH, Space
from .storage import check_optuna, open_storage, storage_errors, without_password
from .timing import CLOCKS
from .trials import is_limited, solution_of, trials_seen
from .worker import Worker

# Trials that may fail, and none complete, before something must be wrong with all of them.
_MOST_FAILURES = 5
# Sampled options that were tried before, one after another, until the space counts as exhausted.
_MOST_REPETITIONS = 20
# Of the budget, what the search takes where its solutions are repeated with other seeds after it.
_SHARE_OF_THE_SEARCH = 0.6


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
        trials: Number of trials of all workers together that are drawn; None for as many as `run` has time for. Of a
            grid, all rows. Promotions and repetitions come on top.
        seeds: Runs of each row of a grid, with seeds from the options' on; of a search, of each solution on its front
            and of the baseline, after the search.
        device: Where to train.
        measure_test: Also measure each finished trial on the test set, for reports; it is never used to choose.
        clock: What seconds are: 'wall', or 'cpu' for those that the processor spent on it (divided by torch's threads).
        grace: Seconds without a sign of life after which another worker's trial counts as dead and is run again.
        on_change: Called with the trainer of the running trial (None between trials) after each epoch and trial.

    Raises:
        ExplorationError: If the storage cannot be reached, or holds a study of that name made for something else.
        UsageError: If Optuna is not installed.
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
        check_optuna()
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
        self.on_change, self.seeds = on_change, seeds
        if clock == "cpu" and self.device.type != "cpu":
            raise ExplorationError(f"clock 'cpu' does not see the work of {self.device}: use 'wall'")
        self.storage = storage or f"sqlite:///{self.folder / 'study.db'}"
        self._deadline: float | None = None
        self._end_of_search: float | None = None
        self._searches_on = False
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
            "rows": {row.name: _digest(self.options, row.options) for row in plan} if is_grid else None,
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
        backend = open_storage(self.storage, heartbeat=max(1, grace // 4), grace=grace, retry=retry)
        directions = [OBJECTIVES[objective] for objective in self.objectives]
        with storage_errors(self.storage):
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
        self.study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=RANDOM_TRIALS, multivariate=True, group=True, seed=seed
        )
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
        self._reclaimer = Reclaimer(self.study, grace)
        self._worker = Worker(
            self.study,
            plan,
            self.options,
            data,
            self.folder,
            self.objectives,
            self.device,
            CLOCKS[clock],
            measure_test,
            self._interrupted,
            on_change,
        )

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
            for point, attributes in queue:
                self.study.enqueue_trial(point, user_attrs={**attributes, "queued": True})
            self.study.set_user_attr("queue", None if trials is None else len(queue))
        else:
            self.study.set_user_attr("queue", enqueue_rows(self.study, self.plan, range(first, first + seeds)))

    def _join(self, name: str, facts: dict[str, Any]) -> None:
        """Wait for the worker that makes the study, check that it is for the same thing, and enqueue what is new.

        Seeds and the rows of a grid may become more.
        """
        for _ in range(100):
            if "queue" in self.study.user_attrs:
                break
            time.sleep(0.1)
        else:
            raise ExplorationError(
                f"study {name!r} in {without_password(self.storage)} was never finished being set up: choose another "
                "--study, or delete it"
            )
        known = self.study.user_attrs.get("facts", {})
        are_rows = bool(known.get("rows") and facts["rows"])
        # Rows tell grid, options and model.
        may_grow = {"seeds", "rows", "grid", "options", "model"} if are_rows else {"seeds"}
        for key, value in known.items():
            if facts.get(key) != value and key not in may_grow:
                if key == "options":
                    raise ExplorationError(
                        f"study {name!r} was made with other options or rows: choose another --study or folder"
                    )
                raise ExplorationError(
                    f"study {name!r} was made for {key} {value!r}, not {facts.get(key)!r}: choose another --study or "
                    "folder"
                )
        if are_rows:
            check_grown(name, known["rows"], facts["rows"])
        if facts["seeds"] < known.get("seeds", 1):
            raise ExplorationError(
                f"study {name!r} was made for {known['seeds']} seeds, not {facts['seeds']}: give that many or more"
            )
        grown = {**known, **{key: facts[key] for key in may_grow}}
        if grown != known:
            self.study.set_user_attr("facts", grown)
            if not isinstance(self.plan, Space):
                first = int(self.options.get("seed", 0))
                added = enqueue_rows(self.study, self.plan, range(first, first + facts["seeds"]))
                self.study.set_user_attr("queue", self.study.user_attrs["queue"] + added)

    @property
    def limited(self) -> bool:
        """Whether the number of trials is fixed."""
        return is_limited(self.study)

    def solutions(self) -> list[Solution]:
        """All trials so far, those of other workers too."""
        return [solution_of(trial, len(self.data.train)) for trial in trials_seen(self.study)]

    def candidates(self) -> list[Solution]:
        """What a solution is chosen from: complete trials, or where seeds were repeated, their means."""
        return over_seeds(self.solutions(), of_rows=not isinstance(self.plan, Space))

    def front(self) -> list[Solution]:
        """The Pareto-optimal solutions so far."""
        return pareto_front(self.candidates(), self.objectives)

    def baseline(self) -> Solution | None:
        """The solution named 'baseline', if it is complete."""
        return next((solution for solution in self.candidates() if solution.name == "baseline"), None)

    def _enqueue_again(self, solution: Solution, **changes: Any) -> None:
        """Enqueue a trial of this study once more, with other parameters or another seed."""
        trial = self.study.get_trials(deepcopy=False)[solution.number]
        point = {**trial.params, **changes.pop("params", {})}
        self.study.enqueue_trial(point, user_attrs={**changes, "queued": True})

    def _promote(self) -> None:
        """Enqueue what is on the front with three times the epochs, once.

        So the search compares short schedules with short ones, each trained to its end, and spends long ones on what
        was good when it was short: successive halving (Jamieson and Talwalkar 2016) whose rungs are whole schedules.
        What a longer one was better than, after as much time, is not good.
        """
        if not isinstance(self.plan, Space) or "epochs" in self.plan.fixed or self._repeating():
            return
        solutions = self.solutions()
        promoted = {trial.user_attrs.get("promoted_from") for trial in self.study.get_trials(deepcopy=False)}
        complete = [solution for solution in solutions if solution.state == "complete"]
        if len(complete) < len(self.plan.queue()):
            return
        most = self.study.user_attrs.get("most_seconds", math.inf)
        for solution in pareto_front(complete, self.objectives):
            epochs = GROWTH * len(solution.history)
            if epochs > self.plan.epochs or solution.number in promoted or GROWTH * solution.seconds >= most:
                continue
            if not is_behind(solution, complete):
                self._enqueue_again(solution, params={"epochs": epochs}, promoted_from=solution.number)

    def _search_on(self) -> None:
        """All was repeated, and what is left to do is to search on, with what waited when the repetitions began."""
        self.study.set_user_attr("repeating", False)
        trials = self.study.get_trials(deepcopy=False)
        again = {trial.user_attrs.get("put_off") for trial in trials}
        for trial in trials:
            if trial.user_attrs.get("waits_for_seeds") and trial.number not in again:
                enqueue_again(self.study, trial, put_off=trial.number)

    def _repeating(self) -> bool:
        return bool(self.study.user_attrs.get("repeating"))

    def _repeat(self) -> bool:
        """Enqueue what is on the front, and the baseline, with the other seeds; return whether there was any left."""
        if not isinstance(self.plan, Space) or self.seeds < 2:
            return False
        trials = trials_seen(self.study)
        known = {(trial.user_attrs.get("repeat_of"), trial.user_attrs.get("seed")) for trial in trials}
        own = [solution for solution in self.solutions() if solution.repeat_of is None]
        # The baseline first: a round that is cut short compares nothing without it.
        baseline = [solution for solution in own if solution.name == "baseline" and solution.state == "complete"][:1]
        wanted = baseline + [s for s in pareto_front(own, self.objectives) if s not in baseline]
        self.study.set_user_attr("repeating", True)
        added = False
        # By seed, so that what is cut short still has whole repetitions.
        for seed in range(1, self.seeds):
            for solution in wanted:
                seed_of_run = solution.seed + seed
                if (solution.number, seed_of_run) not in known:
                    self._enqueue_again(solution, repeat_of=solution.number, seed=seed_of_run, name=solution.name)
                    added = True
        return added

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
        self._end_of_search = None
        if budget is not None and isinstance(self.plan, Space) and self.seeds > 1:
            self._end_of_search = time.monotonic() + _SHARE_OF_THE_SEARCH * budget
        with storage_errors(self.storage):
            self._searches_on = budget is not None and self._repeating()
            if self._repeating() and all(trial.state.name != "WAITING" for trial in trials_seen(self.study)):
                self._search_on()
        if budget is not None and isinstance(self.plan, Space) and "most_seconds" not in self.study.user_attrs:
            # Of the first budget, else a short --resume would stop what a long one began.
            self.study.set_user_attr("most_seconds", budget / 4)
        self._asked_to_stop = should_stop
        repetitions = 0
        while not should_stop() and not self._out_of_time():
            with storage_errors(self.storage):
                self._reclaimer.reclaim()
                if not self._has_work():
                    break
                repeated = self._worker.run_trial()
                seen = trials_seen(self.study)
                failed = [t for t in seen if t.state.name == "FAIL" and not t.user_attrs.get("interrupted")]
                reasons = [trial.user_attrs["reason"] for trial in failed if "reason" in trial.user_attrs]
                if len(reasons) >= _MOST_FAILURES and not any(trial.state.name == "COMPLETE" for trial in seen):
                    raise ExplorationError(f"the first {len(reasons)} trials failed, the last one since {reasons[-1]}")
                self._promote()
                repetitions = repetitions + 1 if repeated else 0
                if repetitions >= _MOST_REPETITIONS and not self._repeating() and not self._repeat():
                    break
            self.on_change(None)
        return not should_stop()

    def _has_work(self) -> bool:
        """Whether there is a trial to run; enqueues repetitions when it is time for them, and waits for workers."""
        while not self._out_of_time():
            if self._end_of_search is not None and time.monotonic() >= self._end_of_search and not self._repeating():
                if any(solution.state == "complete" for solution in self.solutions()):
                    self._repeat()
            if not self.limited and not self._repeating():
                return True
            states = [trial.state.name for trial in trials_seen(self.study)]
            if "WAITING" in states:
                return True
            if "RUNNING" in states:
                time.sleep(1)  # another worker has the last ones, and may yet die
                self._reclaimer.reclaim()
                if self._asked_to_stop():
                    return False
            elif not self._repeat():
                if not self._searches_on:
                    return False
                # This call began with repetitions that the one before had left, and has time to go on searching.
                self._searches_on = False
                self._search_on()
                now = time.monotonic()
                self._end_of_search = now + _SHARE_OF_THE_SEARCH * max(0.0, (self._deadline or now) - now)
        return False

    def _out_of_time(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _interrupted(self) -> bool:
        return self._asked_to_stop() or self._out_of_time()


def _digest(*options: Any) -> str:
    """Tell sets of options apart, but for where the data are."""
    kept = [{k: v for k, v in part.items() if k not in ("data_dir", "download")} for part in options]
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]
