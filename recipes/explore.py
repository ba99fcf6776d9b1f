"""Search for the Pareto-optimal ways to train a capsule network: accuracy, training time, parameters.

    python recipes/explore.py --budget 5m                                    # capsnet_tiny on digits
    python recipes/explore.py --model capsnet --dataset mnist --budget 8h --choose fastest
    python recipes/explore.py --dataset mnist --trials 100 --set policy=one_cycle num_routing=3
    python recipes/explore.py --grid paper --model capsnet_tiny --dataset mnist --seeds 3 --epochs 6
    python recipes/explore.py --dataset mnist --trials 100 --storage postgresql+psycopg://me@host/db   # on each machine
    python recipes/explore.py --resume runs/NAME --budget 10m                # go on where a search ended or was killed

Trials are compared on a validation split of the training images. The folder gets args.yaml, study.db (unless --storage
names another place), a run folder per trial in trials/, trials.csv, front.csv, report.html, front.png, tradeoff.png,
accuracy.png, time_to_best.png, and chosen.yaml, from which recipes/train.py trains the chosen solution.
"""

import argparse
import contextlib
import csv
import re
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

import capszoo
from capszoo import plots
from capszoo.command_line import OptionParser, StopSignal, key_value, parse_resumable, run
from capszoo.data import DataSplits
from capszoo.engine import Trainer
from capszoo.engine.options import check_ranges, load_splits, make_policy, model_arguments, options_from
from capszoo.engine.run_folder import check_folder, default_folder, make_default_folder, start_folder
from capszoo.errors import UsageError
from capszoo.explore import (
    CLOCKS,
    OBJECTIVES,
    Exploration,
    Row,
    Solution,
    Space,
    choose,
    compare,
    retime,
    seconds_of_an_epoch,
    write_solutions,
)
from capszoo.files import read_yaml, write_atomically, write_csv
from capszoo.policies import list_policies, policy_options
from capszoo.precision import choose_device, resolve_amp
from capszoo.report import write_report

GRIDS = Path(__file__).parent / "configs"
PUBLISHED = Path(__file__).parent / "results/paper-published.csv"
# What may change when a search goes on.
MAY_CHANGE_ON_RESUME = {
    "resume", "budget", "data_dir", "device", "quiet", "results", "retime", "choose", "loss", "within", "test",
    "storage",
}  # fmt: skip
NOT_SAVED = {"config", "resume", "output", "results", "retime", "budget"}
ALL_POLICY_OPTIONS = {name for policy in list_policies() for name in policy_options(policy)}
OF_THE_DATA = ("seed", "dataset", "val_fraction", "img_size", "in_chans")
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
# Of a budget, what a trial of the most epochs may take: some ten such trials fit.
SHARE_OF_A_TRIAL = 1 / 12


def duration(text: str) -> float:
    """Turn '90', '90s', '30m', '8h' or '1.5h' into seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write 90s, 30m or 8h")
    return float(found[1]) * UNITS[found[2]]


def fraction(text: str) -> float:
    """Turn '0.001' or '0.1%' into a fraction."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no accuracy to lose: write 0.1% or 0.001")
    return value


def build_parser() -> OptionParser:
    parser = OptionParser(description="Search for the Pareto-optimal ways to train a capsule network.")
    group = parser.add_argument_group("what").add_argument
    group("--config", metavar="FILE.yaml", help="take options from a YAML file of 'option: value' lines")
    group("--model", help="one of capszoo.list_models(); default capsnet_tiny, or what the grid says")
    group("--dataset", help="data set, as in train.py; default digits, or what the grid says")
    group("--data-dir", default="data", help="folder that has the data set")
    group("--download", action="store_true", help="let torchvision download the data set into --data-dir")
    group("--val-fraction", type=float, default=0.1, help="part of the training images kept for validation")
    group("--output", metavar="FOLDER", help="folder; default runs/explore-MODEL-DATASET-TIME")
    group("--resume", metavar="FOLDER", help="go on with the search in this folder")
    group = parser.add_argument_group("search").add_argument
    group("--budget", type=duration, help="time of this call, such as 90s, 30m or 8h; default 30m without --trials")
    group("--trials", type=int, help="trials of all workers together; default what the budget has time for")
    group("--epochs", type=int, help="most epochs of a trial; default by the budget, else 10; of a grid: of each row")
    group("--objectives", nargs="+", default=list(OBJECTIVES), help=", ".join(OBJECTIVES))
    group(
        "--set",
        nargs="*",
        type=key_value,
        default=[],
        metavar="NAME=VALUE",
        help="options of train.py that all trials have, and that are not searched",
    )
    group(
        "--grid",
        nargs="+",
        metavar="NAME",
        help="train fixed rows instead: paper (the paper's eight), YAML files of train.py, or folders of them",
    )
    group("--seeds", type=int, default=1, help="runs of each row of a grid, with seeds from --seed on")
    group("--seed", type=int, default=0, help="seed of the search, and of each trial")
    group("--storage", help="URL of a database that workers share, such as postgresql+psycopg://user@host/name")
    group("--study", help="name of the study in the storage; default made of model, data set and grid")
    group(
        "--grace",
        type=int,
        default=120,
        help="seconds without a sign of life after which another worker's trial is run again",
    )
    group = parser.add_argument_group("choice").add_argument
    group(
        "--choose",
        default="fastest",
        choices=["fastest", "accurate", "smallest"],
        help="what to take of the front: the fastest or the smallest that loses at most --loss of the baseline's "
        "accuracy, or the most accurate --within a training time",
    )
    group("--loss", type=fraction, default=0.0, help="accuracy that may be lost, such as 0.1%%")
    group("--within", type=duration, help="most training time, such as 10m")
    group("--test", action="store_true", help="also measure each finished trial on the test set; never used to choose")
    group = parser.add_argument_group("computing and reporting").add_argument
    group("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    group(
        "--clock",
        default="wall",
        choices=list(CLOCKS),
        help="training seconds by the clock on the wall, or "
        "those of the processor: for a CPU that does other things at the same time",
    )
    group("--results", metavar="FILE.csv", help="also write the rows of a grid, compared over seeds, to this table")
    group(
        "--retime",
        action="store_true",
        help="compare the rows of a grid by epochs times seconds an epoch, "
        "measured in turns at the end, when the machine should be at rest",
    )
    group("--quiet", action="store_true", help="print the result alone")
    return parser


def read_grid(names: list[str], overrides: dict[str, Any]) -> list[Row]:
    """Read rows from YAML files of train.py; a row's name is its file's without the number that sorts it."""
    files: list[Path] = []
    for name in names:
        path = GRIDS / name if (GRIDS / name).is_dir() else Path(name)
        found = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            known = ", ".join(sorted(p.name for p in GRIDS.iterdir() if p.is_dir()))
            raise UsageError(f"no grid {name!r}: name a folder of YAML files, a YAML file, or one of {known}")
        files += found
    rows = []
    for file in files:
        values = read_yaml(file)
        # A length of warm-up, say, is set where a row's policy has one.
        known = policy_options(overrides.get("policy", values.get("policy", "one_cycle")))
        taken = {name: value for name, value in overrides.items() if name in known or name not in ALL_POLICY_OPTIONS}
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


def common_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of train.py that all trials have."""
    fixed = dict(args.set)
    kwargs = fixed.get("model_kwargs", {})
    if not isinstance(kwargs, dict):
        raise UsageError(f"--set model_kwargs={kwargs!r} is no mapping: write model_kwargs='{{name: value}}'")
    options = {"data_dir": args.data_dir, "download": args.download, "val_fraction": args.val_fraction, **fixed}
    if "seed" not in fixed:
        options["seed"] = args.seed
    for name in ("model", "dataset"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    return options


def plan_search(args: argparse.Namespace, options: dict[str, Any], data: DataSplits, device: torch.device) -> Space:
    """Make the space, with as many epochs a trial as the budget has time for."""
    base = options_from({"policy": "fixed", "epochs": 1, **options}, "--set")
    make_policy(base, len(data.train))  # what is wrong with --set is found here, and not in each trial
    epochs = args.epochs
    if args.budget is not None and args.resume is None:
        seconds = seconds_of_an_epoch(base, data, device)
        if seconds > args.budget:
            raise UsageError(
                f"--budget {args.budget:g}s is too short for one trial: an epoch of {base.model} on {base.dataset} "
                f"takes about {seconds:.0f} s here, give --budget {max(1, 12 * seconds / 60):.0f}m or more"
            )
        if epochs is not None and epochs * seconds > args.budget / 4:
            raise UsageError(
                f"--epochs {epochs} take about {epochs * seconds:.0f} s here, more than a quarter of --budget, after "
                f"which a trial is stopped: give {max(1, int(args.budget / 4 / seconds))} or fewer, or more time"
            )
        if epochs is None:
            epochs = max(1, min(30, int(args.budget * SHARE_OF_A_TRIAL / seconds)))
    best = resolve_amp("auto", device)
    amps = ["none"] if best is None else [{torch.bfloat16: "bf16", torch.float16: "fp16"}[best], "none"]
    return Space(base.model, data, epochs or 10, amps, dict(args.set))


@contextlib.contextmanager
def claim_folder(args: argparse.Namespace, options: dict[str, Any]) -> Iterator[Path]:
    """Yield the run folder.

    A default folder is made at once, under a name that no other search has, also if both began in the same second, and
    is removed again if the block fails.
    """
    if args.resume or args.output:
        folder = Path(args.resume or args.output)
        if not args.resume:
            check_folder(folder)
        yield folder
        return
    name = default_folder("explore", str(options.get("model", "grid")), Path(options["dataset"]).name)
    parents = [] if name.parent.exists() else [name.parent]
    folder = make_default_folder(name)
    try:
        yield folder
    except BaseException:
        with contextlib.suppress(OSError):  # has files
            for path in [folder, *parents]:
                path.rmdir()
        raise


def save_args(args: argparse.Namespace, folder: Path) -> None:
    """Write the options from which --resume goes on."""
    import yaml

    values = {key: value for key, value in vars(args).items() if key not in NOT_SAVED}
    values["set"] = dict(args.set)
    text = f"# python recipes/explore.py --resume {folder}\n" + yaml.safe_dump(values, sort_keys=False)
    start_folder(folder, text)  # the study may be in it by now


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def seconds_text(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


def short_options(solution: Solution) -> str:
    """What sets a trial apart, in a line."""
    shown = {**solution.options, **solution.options.get("model_kwargs", {})}
    names = ("epochs", "batch_size", "lr", "max_lr", "share_weights", "small_decoder", "keep_types", "num_routing")
    values = {
        name: f"{shown[name]:.2g}" if isinstance(shown[name], float) else shown[name] for name in names if name in shown
    }
    return " ".join(f"{name}={value}" for name, value in values.items())


def solutions_table(solutions: list[Solution], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("trial", "name", "accuracy", "time", "parameters"):
        table.add_column(column, justify="left" if column == "name" else "right", no_wrap=True)
    table.add_column("options", overflow="fold")
    for s in solutions:
        parameters = "" if s.parameters is None else f"{s.parameters:,}"
        name = s.name if s.state in ("complete", "running") else f"{s.name} ({s.state})"
        table.add_row(str(s.number), name, percent(s.accuracy), seconds_text(s.seconds), parameters, short_options(s))
    return table


class Report:
    """Shows a search: a live table on a terminal, a line a trial elsewhere."""

    def __init__(self, console: Console, quiet: bool, budget: float | None):
        self.console, self.quiet, self.budget = console, quiet, budget
        self.live = Live(console=console, refresh_per_second=2) if console.is_terminal and not quiet else None
        self.start = time.monotonic()
        self.exploration: Exploration | None = None
        self.printed: set[int] = set()

    def change(self, trainer: Trainer | None) -> None:
        """Called after each epoch and trial."""
        if self.quiet or self.exploration is None or (self.live is None and trainer is not None):
            return
        solutions = self.exploration.solutions()
        if self.live is not None:
            waited = sum(solution.state == "waiting" for solution in solutions)
            seen = [solution for solution in solutions if solution.state != "waiting"]
            of = "" if self.budget is None else f" of {self.budget:.0f}"
            head = f"{time.monotonic() - self.start:.0f}{of} s, {len(seen)} trials, {waited} waiting"
            front = solutions_table(self.exploration.front(), "Pareto-optimal so far")
            self.live.update(Group(head, solutions_table(seen[-8:], "trials"), "", front))
            return
        for s in solutions:
            if s.state in ("complete", "stopped", "failed") and s.number not in self.printed:
                self.printed.add(s.number)
                why = f" ({s.reason})" if s.reason else ""
                self.console.print(
                    f"trial {s.number:>3} {s.name:<14} {s.state:<8} accuracy {percent(s.accuracy):>8}  "
                    f"{seconds_text(s.seconds):>8}  {s.parameters or 0:>10,} parameters  {short_options(s)}{why}"
                )

    def __enter__(self) -> "Report":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.live is not None:
            self.live.stop()


def write_reports(
    exploration: Exploration, folder: Path, args: argparse.Namespace, chosen: Solution | None
) -> list[str]:
    """Write tables, figures and the page; return what could not be drawn."""
    import yaml

    solutions, front = exploration.solutions(), exploration.front()
    write_solutions(folder / "trials.csv", solutions)
    write_solutions(folder / "front.csv", front)
    command = ""
    if chosen is not None:
        command = f"python recipes/train.py --config {folder / 'chosen.yaml'}"
        text = f"# {command}\n" + yaml.safe_dump(chosen.options, sort_keys=False)
        write_atomically(folder / "chosen.yaml", lambda temporary: temporary.write_text(text))
    facts = exploration.study.user_attrs["facts"]
    shown = {
        "model": str(facts["model"]),
        "data set": f"{facts['dataset']} ({facts['images'][0]:,} train, {facts['images'][1]:,} validation)",
        "seconds": {"wall": "by the clock", "cpu": "of the processor"}[facts["clock"]],
        "machines": ", ".join(sorted({re.sub(r":\d+", "", s.machine) for s in solutions if s.machine})),
        "torch": torch.__version__,
        "capszoo": capszoo.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    title = f"{facts['model']} on {facts['dataset']}"
    write_report(
        folder / "report.html", solutions, front, title=title, facts=shown, objectives=exploration.objectives,
        study=exploration.study, command=command,
    )  # fmt: skip
    missing = []
    for name, draw in (
        ("front", lambda path: plots.plot_front(solutions, front, path, exploration.objectives)),
        ("tradeoff", lambda path: plots.plot_tradeoff(solutions, front, path)),
        ("accuracy", lambda path: plots.plot_accuracy(solutions, path)),
        ("time_to_best", lambda path: plots.plot_time_to_best(solutions, path)),
    ):
        try:
            draw(folder / f"{name}.png")
        except ValueError as error:
            missing.append(f"{name}.png: {error}")
    return missing


def comparison_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="rows over seeds, mean ± standard deviation", title_justify="left", box=None, pad_edge=False)
    columns = ("row", "runs", "validation", "test", "epochs to best", "s an epoch", "time to baseline's best", "saved")
    for column in columns:
        table.add_column(column, justify="left" if column == "row" else "right", no_wrap=True)

    def cell(row: dict[str, Any], key: str, scale: float, form: str) -> str:
        if row[key] is None:
            return "-"
        spread = "" if row[key + "_std"] is None else f" ±{scale * row[key + '_std']:{form}}"
        return f"{scale * row[key]:{form}}{spread}"

    for row in rows:
        table.add_row(
            row["name"], str(row["runs"]), cell(row, "accuracy", 100, ".2f"), cell(row, "test_top1", 100, ".2f"),
            cell(row, "best_epoch", 1, ".1f"), cell(row, "epoch_seconds", 1, ".1f"),
            f"{cell(row, 'seconds_to_baseline', 1, '.0f')} s ({row['reached']}/{row['runs']})",
            f"{cell(row, 'saving', 100, '.0f')} %",
        )  # fmt: skip
    return table


def retimed(exploration: Exploration, rounds: int = 3) -> list[Solution]:
    """Measure an epoch of every row at every batch size it has, in turns, and time the trials by the medians."""
    solutions = exploration.solutions()
    device, data = exploration.device, exploration.data
    first = {solution.name: solution for solution in reversed(solutions) if solution.history}
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for name, solution in first.items():
            policy = make_policy(options_from(solution.options), solution.images)
            for batch_size in {policy.batch_size(epoch) for epoch in range(policy.epochs)}:
                fixed = {**solution.options, "policy": "fixed", "batch_size": batch_size, "epochs": 1}
                args = options_from({key: value for key, value in fixed.items() if key not in ALL_POLICY_OPTIONS})
                times.setdefault((name, batch_size), []).append(seconds_of_an_epoch(args, data, device))
    return retime(solutions, lambda solution, batch_size: statistics.median(times[solution.name, batch_size]))


def write_comparison(
    exploration: Exploration,
    solutions: list[Solution],
    rows: list[dict[str, Any]],
    args: argparse.Namespace,
    argv: list[str] | None,
) -> None:
    """Write the rows of a grid, what it takes to make them again, and the figures beside the table."""
    path = Path(args.results)
    dataset = exploration.study.user_attrs["facts"]["dataset"]
    command = shlex.join(["python", "recipes/explore.py", *(sys.argv[1:] if argv is None else argv)])
    facts = {
        "clock": "at rest" if args.retime else args.clock,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "capszoo": capszoo.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**row, **facts} for row in rows]
    write_csv(path, list(rows[0]), rows)
    with open(PUBLISHED, newline="") as file:
        published = [row for row in csv.DictReader(file) if row["dataset"] == dataset]
    if any(row["name"] == "baseline" for row in rows):
        plots.plot_comparison(rows, published, path.with_suffix(".png"))
        plots.plot_accuracy(solutions, path.with_name(path.stem + "-accuracy.png"))


def main(argv: list[str] | None = None) -> int:
    args = parse_resumable(build_parser, MAY_CHANGE_ON_RESUME, argv)
    try:
        import optuna  # noqa: F401
        import plotly  # noqa: F401
    except ImportError as error:
        raise UsageError(f'{error.name} is not installed: pip install "capszoo[explore]"') from None
    piped = not sys.stdout.isatty()
    console = Console(highlight=False, soft_wrap=piped, width=180 if piped else None)
    device = choose_device(args.device)
    torch.backends.cudnn.benchmark = True
    check_ranges(args)
    if args.budget is None and args.trials is None and not args.grid:
        args.budget = duration("30m")

    options = common_options(args)
    rows: list[Row] = []
    if args.grid:
        named = {"model", "dataset", *dict(args.set)}
        overrides = {name: options[name] for name in named & set(options)}
        options = {name: value for name, value in options.items() if name not in overrides or name in OF_THE_DATA}
        if args.epochs is not None:
            overrides["epochs"] = args.epochs
        rows = read_grid(args.grid, overrides)
        of_rows = [vars(options_from({**options, **row.options}, f"grid row {row.name!r}")) for row in rows]
        for name in OF_THE_DATA[1:]:  # all rows train on the same images
            values = {str(values[name]) for values in of_rows}
            if len(values) > 1:
                raise UsageError(
                    f"--grid has rows of different {name} ({', '.join(sorted(values))}): give --set {name}="
                )
            options[name] = of_rows[0][name]
    else:
        args.model = options.setdefault("model", "capsnet_tiny")
        args.dataset = options.setdefault("dataset", "digits")
    of_all = options_from(options, "--set")
    check_ranges(of_all)
    if of_all.seed >= 2**31:  # Optuna keeps numbers as floats
        raise UsageError(f"--seed {of_all.seed} is out of range: give 0 to 2^31 - 1")
    data = load_splits(of_all)
    for row in rows:
        of_row = options_from({**options, **row.options}, f"grid row {row.name!r}")
        check_ranges(of_row)
        make_policy(of_row, len(data.train))
        capszoo.create_model(of_row.model, device="meta", **model_arguments(of_row, data))
    plan = rows or plan_search(args, options, data, device)
    names = [str(options.get("model", "grid")), Path(options["dataset"]).name, *(Path(n).stem for n in args.grid or [])]
    report = Report(console, args.quiet, args.budget)
    with claim_folder(args, options) as folder:
        exploration = report.exploration = Exploration(
            plan,
            options,
            data,
            folder,
            storage=args.storage,
            name=args.study or "-".join(names),
            objectives=args.objectives,
            trials=args.trials,
            seeds=args.seeds,
            device=device,
            measure_test=args.test,
            clock=args.clock,
            grace=args.grace,
            on_change=report.change,
        )
        if not args.resume:
            args.epochs = args.epochs if rows else plan.epochs
            save_args(args, folder)
    if not args.quiet:
        what = f"{len(rows)} rows, {args.seeds} seeds" if rows else f"up to {plan.epochs} epochs a trial"
        console.print(f"{names[0]} on {names[1]}, {what}, {device.type}, folder {folder}")
    with report, StopSignal() as stop:
        completed = exploration.run(args.budget, stop)

    baseline = exploration.baseline()
    front = exploration.front()
    # Of all: a front in fewer than three objectives lacks what others would choose.
    chosen = choose(exploration.solutions(), args.choose, loss=args.loss, within=args.within, baseline=baseline)
    missing = write_reports(exploration, folder, args, chosen)
    console.print(solutions_table(front, f"front of {len(front)} Pareto-optimal solutions"))
    if rows:
        solutions = retimed(exploration) if args.retime else exploration.solutions()
        compared = compare(solutions)
        console.print(comparison_table(compared))
        if args.results and compared:
            write_comparison(exploration, solutions, compared, args, argv)
    for line in missing:
        console.print(f"not drawn: {line}")
    console.print(f"report: {folder / 'report.html'}")
    if chosen is None:
        console.print(f"nothing to choose: no solution meets --choose {args.choose} with this --loss and --within")
    else:
        console.print(
            f"chosen ({args.choose}): trial {chosen.number}, {percent(chosen.accuracy)}, "
            f"{seconds_text(chosen.seconds)}, {chosen.parameters:,} parameters"
        )
        console.print(f"train it: python recipes/train.py --config {folder / 'chosen.yaml'}")
    if not completed:
        console.print(f"stopped and saved: go on with --resume {folder}")
        return stop.exit_code
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    run(main)
