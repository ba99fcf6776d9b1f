"""Grids: fixed trials from YAML files, and the comparison of their rows over seeds."""

import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capszoo.data import DataSplits
from capszoo.engine.options import POLICY_OPTIONS, check_ranges, options_from
from capszoo.engine.run import make_policy, model_arguments
from capszoo.errors import UsageError
from capszoo.files import read_yaml
from capszoo.policies import policy_options
from capszoo.registry import create_model

from .solution import ExplorationError, Solution, paired_difference

if TYPE_CHECKING:
    import optuna

_GRIDS = Path(__file__).resolve().parents[1] / "recipes" / "configs"
# Options that say which images the trials train on; those of the validation split depend on them, too.
_OF_THE_DATA = ("seed", "dataset", "val_fraction", "img_size", "in_chans")


@dataclass(frozen=True)
class Row:
    """A fixed trial: its name and its options."""

    name: str
    options: dict[str, Any]


def read_grid(names: Sequence[str], overrides: Mapping[str, Any]) -> list[Row]:
    """Read rows from YAML files of train.py; a row's name is its file's without the number that sorts it."""
    files: list[Path] = []
    for name in names:
        path = _GRIDS / name if (_GRIDS / name).is_dir() or not Path(name).exists() else Path(name)
        found = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            known = ", ".join(sorted(p.name for p in _GRIDS.iterdir() if p.is_dir()))
            raise UsageError(f"no grid {name!r}: name a folder of YAML files, a YAML file, or one of {known}")
        files += found
    rows = []
    for file in files:
        values = read_yaml(file)
        # A length of warm-up, say, is set where a row's policy has one.
        known = policy_options(overrides.get("policy", values.get("policy", "one_cycle")))
        taken = {name: value for name, value in overrides.items() if name in known or name not in POLICY_OPTIONS}
        if not isinstance(values.get("model_kwargs") or {}, dict):
            raise UsageError(f"{file}: model_kwargs must be a mapping, not {values['model_kwargs']!r}")
        kwargs = {**(values.get("model_kwargs") or {}), **taken.get("model_kwargs", {})}
        values = {**values, **taken, "model_kwargs": kwargs}
        options_from(values, str(file))
        rows.append(Row(re.sub(r"^\d+-", "", file.stem), values))
    doubled = next((row.name for n, row in enumerate(rows) if row.name in {r.name for r in rows[:n]}), None)
    if doubled:
        raise UsageError(f"--grid has two rows named {doubled!r}: rename one of the files")
    return rows


def plan_grid(
    names: Sequence[str], options: Mapping[str, Any], given: Collection[str], epochs: int | None = None
) -> tuple[list[Row], dict[str, Any]]:
    """Read the rows of a grid, and split the options of all trials from those of single rows.

    Args:
        names: As in :func:`read_grid`.
        options: Options of recipes/train.py for all trials.
        given: Names of those that take the place of a row's own.
        epochs: Epochs of each row; None for its own.

    Returns:
        The rows, and the options that they share; all rows train on the same images.

    Raises:
        UsageError: If there is no such grid, or its rows name different images.
    """
    overrides = {name: options[name] for name in set(given) & set(options)}
    shared = {name: value for name, value in options.items() if name not in overrides or name in _OF_THE_DATA}
    if epochs is not None:
        overrides["epochs"] = epochs
    rows = read_grid(names, overrides)
    of_rows = [vars(options_from({**shared, **row.options}, f"grid row {row.name!r}")) for row in rows]
    for name in _OF_THE_DATA[1:]:
        values = {str(values[name]) for values in of_rows}
        if len(values) > 1:
            raise UsageError(f"--grid has rows of different {name} ({', '.join(sorted(values))}): give --set {name}=")
        shared[name] = of_rows[0][name]
    return rows, shared


def check_rows(rows: Sequence[Row], options: Mapping[str, Any], data: DataSplits) -> None:
    """Check that the policy and the model of each row can be created, before the first of them trains.

    Raises:
        ValueError: If one cannot.
    """
    for row in rows:
        args = options_from({**options, **row.options}, f"grid row {row.name!r}")
        check_ranges(args)
        make_policy(args, len(data.train))
        create_model(args.model, device="meta", **model_arguments(args, data))


def enqueue_rows(study: "optuna.Study", rows: Sequence[Row], seeds: Iterable[int]) -> int:
    """Enqueue every row with every seed that the study does not have yet; return how many were new."""
    planned = set()
    for trial in study.get_trials(deepcopy=False):
        # Studies made before rows could be added kept them as parameters.
        point = {**trial.system_attrs.get("fixed_params", {}), **trial.user_attrs}
        planned.add((point.get("name", point.get("row")), point.get("seed")))
    # By seed, so that a grid that is cut short still has whole repetitions.
    new = [(row.name, seed) for seed in seeds for row in rows if (row.name, seed) not in planned]
    for name, seed in new:
        study.enqueue_trial({}, user_attrs={"name": name, "seed": seed, "queued": True})
    return len(new)


def check_grown(study: str, known: Mapping[str, str], rows: Mapping[str, str]) -> None:
    """Refuse rows, by name and digest, that lack one of a study or have it otherwise.

    Raises:
        ExplorationError: If they do.
    """
    for name, digest in known.items():
        if name not in rows:
            raise ExplorationError(f"study {study!r} has a row {name!r}: name its file in --grid, too")
        if rows[name] != digest:
            raise ExplorationError(
                f"study {study!r} was made with other options of row {name!r}: choose another --study or folder, or "
                "rename the row"
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
        Means, and standard deviations (`_std`) over seeds: a dictionary a row, in the order of their first trials.
        Missing are times where no seed got there; `reached` counts the seeds that did. `share` and `share_to_best` are
        the whole training, and that to its own best, over the baseline's to its best with the same seeds. `gain`, a
        :class:`capszoo.explore.solution.Difference`, is what its accuracy has over the baseline's, on the test set
        where all runs were measured on it.
    """
    complete = [solution for solution in solutions if solution.state == "complete"]
    references = {s.seed: s for s in complete if s.name == baseline}
    rows = []
    for name in dict.fromkeys(solution.name for solution in complete):
        runs = [solution for solution in complete if solution.name == name]
        times, savings = [], []
        pairs = [(run, references[run.seed]) for run in runs if run.seed in references]
        for run, reference in pairs:
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
        # Means over the same seeds: the baseline is at its best sooner with some than with others.
        best = statistics.fmean(reference.seconds_to_best for _, reference in pairs) if pairs else None
        for key, name_of_time in (("share", "seconds"), ("share_to_best", "seconds_to_best")):
            row[key] = statistics.fmean(getattr(run, name_of_time) for run, _ in pairs) / best if best else None
        key = "test_top1" if all(run.test_top1 is not None for run in [*runs, *references.values()]) else "accuracy"
        by_seed = {run.seed: getattr(run, key) for run in runs}
        row["gain"] = paired_difference(by_seed, {seed: getattr(run, key) for seed, run in references.items()})
        row["parameters"] = runs[0].parameters
        rows.append(row)
    return rows
