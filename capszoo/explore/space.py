"""The search space: policies with their rates, batch sizes and phases, and the network's reductions."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from capszoo.arguments import SearchedArgument
from capszoo.data import DataSplits
from capszoo.engine.options import MODEL_OPTIONS, options_from
from capszoo.engine.run import make_policy, model_arguments
from capszoo.errors import UsageError
from capszoo.policies import list_policies, policy_options
from capszoo.precision import resolve_amp
from capszoo.registry import create_model, model_keywords

from .solution import ExplorationError
from .timing import one_plain_epoch, seconds_of_an_epoch

if TYPE_CHECKING:
    import optuna

# A trial whose schedule is worth more epochs is trained again with so many times as many.
GROWTH = 3
POLICIES = [name for name in list_policies() if name != "lr_finder"]
# Of a budget, what a trial of the most epochs may take: some ten such trials fit.
_SHARE_OF_A_TRIAL = 1 / 12


class Space:
    """What the search may vary: the policies with their rates, batch sizes and phases, and the network's reductions.

    Policy (section IV of the paper) with learning rate, batch sizes, phase lengths and epochs; then what the model's
    own `search_space()` lists (of a model without that method, nothing), such as weight sharing, decoder and kept
    capsule types (section V); and the precision.

    Args:
        model: Name of a model.
        data: The data set, for its size.
        epochs: Most epochs of a trial.
        amps: Precisions to choose from, as `--amp` names them.
        fixed: Options of recipes/train.py that are not varied; entries of `model_kwargs` too.

    Raises:
        ExplorationError: If the model's search space names what is not a keyword of it.
        ValueError: If the model cannot be created with what is fixed.
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
        self._least: dict[str, int] = {}
        num_images = self.num_images = len(data.train)
        self.batch_sizes = [size for size in (16, 32, 64, 128, 256) if size <= num_images // 4] or [1]
        self.base_batch_size = 128 if num_images >= 10_000 else self.batch_sizes[0]
        args = options_from({**self.fixed, "model": model, "model_kwargs": self.fixed_kwargs})
        network = create_model(model, device="meta", **model_arguments(args, data))
        self.arguments: list[SearchedArgument] = list(getattr(network, "search_space", list)())
        unknown = [argument.keyword for argument in self.arguments if argument.keyword not in model_keywords(model)]
        if unknown:
            raise ExplorationError(
                f"search_space() of {model!r} names {unknown[0]!r}, which is not a keyword of it: leave it out there"
            )

    def queue(self) -> list[dict[str, Any]]:
        """Parameters of the trials that come first: the baseline, then each policy at the paper's settings.

        The policies get a third of the epochs, as they have batches of 1 among them: what is good then gets all.
        """
        unreduced = {
            "epochs": self.epochs,
            **{argument.study_name: argument.first_choice for argument in self.arguments},
            "amp": self.amps[0],
        }
        short = {**unreduced, "epochs": max(1, self.epochs // GROWTH)}
        large = {**short, "batch_size": self.base_batch_size, "lr": 1e-3}
        small = {**short, "lr_small_batch": 1e-3, "warm_share": 0.05, "warm_batch": 1, "first_batch": 16}
        first = [
            {"policy": "fixed", **large, "epochs": self.epochs},
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
        is_free = "epochs" not in options
        epochs = vary(options, "epochs", lambda: trial.suggest_int("epochs", 1, self.epochs, log=True))
        if is_free:
            epochs = options["epochs"] = max(epochs, self._least_epochs(policy))
        if policy in ("ada_batch", "warm_ada_batch"):
            vary(options, "lr", lambda: _short(trial.suggest_float("lr_small_batch", 1e-4, 3e-3, log=True)))
            share = trial.suggest_float("warm_share", 0.02, 0.4)
            warm = vary(options, "warm_epochs", lambda: min(max(1, round(share * epochs)), epochs - 1))
            vary(options, "warm_batch", lambda: trial.suggest_categorical("warm_batch", [1, 2, 4, 8]))
            vary(options, "first_batch", lambda: trial.suggest_categorical("first_batch", [16, 32, 64]))
            # As many as there are epochs for, each followed by one at least.
            most = max(0, epochs - warm - 1)
            growths = vary(options, "max_growths", lambda: min(trial.suggest_int("growths", 0, 2), most))
            vary(options, "grow_every", lambda: (epochs - warm) // (growths + 1) if growths else 0)
        else:
            vary(options, "lr", lambda: _short(trial.suggest_float("lr", 1e-4, 3e-3, log=True)))
            vary(options, "batch_size", lambda: trial.suggest_categorical("batch_size", self.batch_sizes))
        if policy in ("one_cycle", "warm_restarts", "warm_ada_batch"):
            vary(options, "max_lr", lambda: f"{trial.suggest_float('peak', 1.0, 10.0, log=True):.3g}x")
        if policy == "one_cycle":
            vary(options, "rise", lambda: _short(trial.suggest_float("rise", 0.05, 0.6)))
        if policy == "warm_restarts":
            if "cycle_epochs" not in options:
                # The run ends with a cycle: one cut short would end at a high rate.
                cycles = min(trial.suggest_int("cycles", 1, 4), epochs)
                if is_free:
                    epochs = options["epochs"] = epochs - epochs % cycles
                else:
                    cycles = next(number for number in range(cycles, 0, -1) if epochs % number == 0)
                options["cycle_epochs"] = epochs // cycles
        if policy == "exp_decay":
            # Drawn as what is left of the learning rate at the end, which means the same for any number of steps.
            vary(options, "decay_rate", lambda: _short(trial.suggest_float("decay", 0.01, 0.9, log=True)))
            steps = -(-self.num_images // options["batch_size"])
            vary(options, "decay_steps", lambda: epochs * steps)

        for argument in self.arguments:
            chosen = {**options, **kwargs}
            if argument.keyword in chosen or (argument.needs and not chosen[argument.needs]):
                continue
            value = _suggest_argument(trial, argument)
            if value is not None:
                (options if argument.keyword in MODEL_OPTIONS else kwargs)[argument.keyword] = value
        vary(options, "amp", lambda: trial.suggest_categorical("amp", self.amps))
        options["model_kwargs"] = kwargs
        return policy, options

    def _least_epochs(self, policy: str) -> int:
        """The fewest epochs that a policy can have with what is fixed; all, if none of them will do."""
        if policy not in self._least:
            self._least[policy] = next((n for n in range(1, self.epochs) if self._fits(policy, n)), self.epochs)
        return self._least[policy]

    def _fits(self, policy: str, epochs: int) -> bool:
        known = policy_options(policy)
        taken = {name: value for name, value in self.fixed.items() if name in known or name in ("lr", "batch_size")}
        try:
            _check_policy(policy, epochs, taken, self.num_images, "--set")
        except ValueError:
            return False
        # Both phases, if it has two.
        return epochs > 1 or policy not in ("ada_batch", "warm_ada_batch")


def _check_policy(policy: str, epochs: int, options: Mapping[str, Any], num_images: int, source: str) -> None:
    """Raise ValueError if a policy cannot have so many epochs; one of two phases has an epoch for each."""
    phases = {"warm_epochs": min(1, epochs - 1)} if policy in ("ada_batch", "warm_ada_batch") else {}
    make_policy(options_from({**phases, **options, "policy": policy, "epochs": epochs}, source), num_images)


def plan_space(
    options: Mapping[str, Any],
    fixed: Mapping[str, Any],
    data: DataSplits,
    device: torch.device,
    epochs: int | None = None,
    budget: float | None = None,
) -> Space:
    """Make the space, with as many epochs a trial as the budget has time for.

    Args:
        options: Options of recipes/train.py for all trials, those of `fixed` among them.
        fixed: Those that are not varied.
        data: The data set.
        device: Where to train; it bounds the precisions.
        epochs: Most epochs of a trial; None for what the budget has time for, else 10.
        budget: Seconds of the search; None measures nothing.

    Raises:
        UsageError: If the budget is too short for such trials.
        ValueError: If an option of all trials is wrong.
    """
    base = options_from({"policy": "fixed", **options}, "--set")
    if base.policy == "lr_finder":
        raise UsageError("--set policy=lr_finder compares no trainings: leave it out, or give it to recipes/train.py")
    if fixed.get("epochs") is not None:
        epochs = base.epochs
    if budget is not None:
        seconds = seconds_of_an_epoch(one_plain_epoch(options), data, device)
        if seconds > budget:
            raise UsageError(
                f"--budget {budget:g}s is too short for one trial: an epoch of {base.model} on {base.dataset} "
                f"takes about {seconds:.0f} s here, give --budget {max(1, 12 * seconds / 60):.0f}m or more"
            )
        if epochs is not None and epochs * seconds > budget / 4:
            raise UsageError(
                f"--epochs {epochs} take about {epochs * seconds:.0f} s here, more than a quarter of --budget, after "
                f"which a trial is stopped: give {max(1, int(budget / 4 / seconds))} or fewer, or more time"
            )
        if epochs is None:
            epochs = max(1, min(30, int(budget * _SHARE_OF_A_TRIAL / seconds)))
    epochs = epochs or 10
    # What is wrong with --set is found here, and not in each trial.
    _check_policy(base.policy, epochs, options, len(data.train), "--set")
    best = resolve_amp("auto", device)
    amps = ["none"] if best is None else [{torch.bfloat16: "bf16", torch.float16: "fp16"}[best], "none"]
    return Space(base.model, data, epochs, amps, fixed)


def _suggest_argument(trial: "optuna.Trial", argument: SearchedArgument) -> Any:
    """Draw the value of an argument of the model."""
    values, name = argument.values, argument.study_name
    if isinstance(values, range):
        return trial.suggest_int(name, values[0], values[-1], step=values.step)
    choice = trial.suggest_categorical(name, list(values))
    return values[choice] if isinstance(values, Mapping) else choice


def _short(value: float) -> float:
    """Three digits, which a person can read and write."""
    return float(f"{value:.3g}")
