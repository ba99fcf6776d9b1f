"""Search for the Pareto-optimal ways to train a capsule network: accuracy, training time, parameters.

    python recipes/explore.py --budget 5m                                    # capsnet_tiny on digits
    python recipes/explore.py --model capsnet --dataset mnist --budget 8h --choose fastest
    python recipes/explore.py --dataset mnist --trials 100 --set policy=one_cycle num_routing=3
    python recipes/explore.py --grid paper --model capsnet_tiny --dataset mnist --seeds 3 --epochs 6
    python recipes/explore.py --dataset mnist --trials 100 --storage postgresql+psycopg://me@host/db   # on each machine
    python recipes/explore.py --resume runs/NAME --budget 10m                # go on where a search ended or was killed
    python recipes/explore.py --resume runs/NAME --seeds 5                   # more seeds of each row, or of the front

Trials are compared on a validation split of the training images. The folder gets args.yaml, study.db (unless --storage
names another place), a run folder per trial in trials/, trials.csv, front.csv, report.html, front.png, tradeoff.png,
accuracy.png, time_to_best.png, and chosen.yaml, from which recipes/train.py trains the chosen solution.
"""

import argparse
import contextlib
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from capszoo.command_line import (
    ExtendAction,
    OptionParser,
    SizeAction,
    StopSignal,
    key_value,
    make_console,
    parse_resumable,
    run,
)
from capszoo.engine.options import check_ranges, options_from
from capszoo.engine.run import load_splits
from capszoo.engine.run_folder import check_folder, default_folder, make_default_folder, start_folder
from capszoo.errors import UsageError
from capszoo.explore import CLOCKS, OBJECTIVES, Exploration, Row, choose, compare
from capszoo.explore.comparison import write_comparison
from capszoo.explore.console import Report, comparison_table, percent, seconds_text, solutions_table
from capszoo.explore.grid import check_rows, plan_grid
from capszoo.explore.results import write_reports
from capszoo.explore.space import plan_space
from capszoo.explore.storage import check_optuna
from capszoo.explore.timing import retime_at_rest
from capszoo.files import read_yaml, yaml_text
from capszoo.precision import choose_device

# What may change when a search goes on.
MAY_CHANGE_ON_RESUME = {
    "resume", "budget", "data_dir", "device", "quiet", "results", "retime", "choose", "max_drop", "within",
    "test", "storage", "seeds", "grid",
}  # fmt: skip
NOT_SAVED = {"config", "resume", "output", "results", "retime", "budget"}
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


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
    # Earlier versions wrote `loss` into args.yaml.
    parser = OptionParser(
        old_keys={"loss": "max_drop"}, description="Search for the Pareto-optimal ways to train a capsule network."
    )
    group = parser.add_argument_group("what").add_argument
    group("--config", metavar="FILE.yaml", help="take options from a YAML file of 'option: value' lines")
    group("--model", help="one of capszoo.list_models(); default capsnet_tiny, or what the grid says")
    group("--dataset", help="data set, as in train.py; default digits, or what the grid says")
    group("--img-size", action=SizeAction, help="size of the images, as in train.py")
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
        action=ExtendAction,
        type=key_value,
        default=[],
        metavar="NAME=VALUE",
        help="options of train.py that all trials have, and that are not searched",
    )
    group(
        "--grid",
        nargs="+",
        metavar="NAME",
        help="train fixed rows instead: paper (the paper's eight), YAML files of train.py, or folders of them; "
        "--resume takes more",
    )
    group(
        "--seeds",
        type=int,
        default=1,
        help="runs of each row of a grid, with seeds from --seed on; of a search, runs of each solution on its front "
        "after it, of which the means are compared; --resume takes more",
    )
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
        help="what to take of the front: the fastest or the smallest that loses at most --max-drop of the baseline's "
        "accuracy, or the most accurate",
    )
    group(
        "--max-drop",
        "--loss",
        dest="max_drop",
        type=fraction,
        default=0.0,
        help="accuracy that may be lost, such as 0.1%%",
    )
    group("--within", type=duration, help="most training time of what is chosen, such as 10m")
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


def common_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of train.py that all trials have."""
    fixed = args.set
    for name in ("model", "dataset", "img_size", "epochs"):
        given = getattr(args, name)
        if not args.resume and given is not None and fixed.get(name, given) != given:
            words = f"--{name.replace('_', '-')} {given} and --set {name}={fixed[name]}"
            raise UsageError(f"{words} contradict each other: give one of them")
    kwargs = fixed.get("model_kwargs", {})
    if not isinstance(kwargs, dict):
        raise UsageError(f"--set model_kwargs={kwargs!r} is no mapping: write model_kwargs='{{name: value}}'")
    options = {"data_dir": args.data_dir, "download": args.download, "val_fraction": args.val_fraction, **fixed}
    if "seed" not in fixed:
        options["seed"] = args.seed
    for name in ("model", "dataset", "img_size"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    return options


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


def save_args(values: Mapping[str, Any], folder: Path) -> None:
    """Write the options from which --resume goes on."""
    values = {key: value for key, value in values.items() if key not in NOT_SAVED}
    values["set"] = dict(values["set"])
    text = yaml_text(["python", "recipes/explore.py", "--resume", str(folder)], values)
    start_folder(folder, text)  # the study may be in it by now


def main(argv: list[str] | None = None) -> int:
    args = parse_resumable(build_parser, MAY_CHANGE_ON_RESUME, argv)
    check_optuna()
    piped = not sys.stdout.isatty()
    console = make_console(width=180 if piped else None)
    console.soft_wrap = piped  # a live table is cut to the terminal
    args.set = {name: value for name, value in dict(args.set).items() if value is not None}
    device = choose_device(args.device)
    torch.backends.cudnn.benchmark = True
    check_ranges(args)
    if args.budget is None and args.trials is None and not args.grid:
        args.budget = duration("30m")

    saved = read_yaml(Path(args.resume) / "args.yaml") if args.resume else {}
    if saved and args.grid:
        if not saved.get("grid"):
            raise UsageError(
                f"--resume {args.resume!r} is a search, and takes no --grid: leave it out, or start a new run with "
                "--output"
            )
        args.grid = list(dict.fromkeys([*saved["grid"], *args.grid]))  # what is given comes on top
    for name, value in (("trials", args.trials), ("results", args.results), ("retime", args.retime)):
        if value and bool(args.grid) == (name == "trials") and not (args.resume and name == "trials"):
            raise UsageError(
                f"--{name} is of no use {'to' if args.grid else 'without'} a --grid: leave it out"
                + (", the trials are its rows times --seeds" if args.grid else "")
            )
    options = common_options(args)
    rows: list[Row] = []
    if args.grid:
        rows, options = plan_grid(args.grid, options, {"model", "dataset", "img_size", *args.set}, args.epochs)
    else:
        args.model = options.setdefault("model", "capsnet_tiny")
        args.dataset = options.setdefault("dataset", "digits")
    of_all = options_from(options, "--set")
    check_ranges(of_all)
    if of_all.seed >= 2**31:  # Optuna keeps numbers as floats
        raise UsageError(f"--seed {of_all.seed} is out of range: give 0 to 2^31 - 1")
    data = load_splits(of_all)
    check_rows(rows, options, data)
    budget = None if args.resume else args.budget
    plan = rows or plan_space(options, args.set, data, device, args.epochs, budget)
    first_grid = saved.get("grid") or args.grid or []
    names = [str(options.get("model", "grid")), Path(options["dataset"]).name, *(Path(n).stem for n in first_grid)]
    args.study = args.study or "-".join(names)
    report = Report(console, args.quiet, args.budget)
    with claim_folder(args, options) as folder:
        exploration = report.exploration = Exploration(
            plan,
            options,
            data,
            folder,
            storage=args.storage,
            name=args.study,
            objectives=args.objectives,
            trials=args.trials,
            seeds=args.seeds,
            device=device,
            measure_test=args.test,
            clock=args.clock,
            grace=args.grace,
            on_change=report.change,
        )
        grown = {name: getattr(args, name) for name in ("grid", "seeds", "study")}
        if not args.resume:
            args.epochs = args.epochs if rows else plan.epochs
            save_args(vars(args), folder)
        elif {**saved, **grown} != saved:
            save_args({**saved, **grown}, folder)
    if not args.quiet:
        what = f"{len(rows)} rows, {args.seeds} seeds" if rows else f"up to {plan.epochs} epochs a trial"
        console.print(f"{names[0]} on {names[1]}, {what}, {device.type}, folder {folder}")
    has_page = find_spec("plotly") is not None
    if not has_page:
        console.print('there will be no report.html: it needs plotly, pip install "capszoo[explore]"')
    with report, StopSignal() as stop:
        completed = exploration.run(args.budget, stop)

    baseline = exploration.baseline()
    front = exploration.front()
    # Of all: a front in fewer than three objectives lacks what others would choose.
    chosen = choose(
        exploration.candidates(), args.choose, max_drop=args.max_drop, within=args.within, baseline=baseline
    )
    missing, doubts = write_reports(exploration, folder, chosen)
    console.print(solutions_table(front, f"front of {len(front)} Pareto-optimal solutions"))
    if rows:
        solutions = retime_at_rest(exploration) if args.retime else exploration.solutions()
        compared = compare(solutions)
        console.print(comparison_table(compared))
        if args.results and compared:
            clock = "at rest" if args.retime else args.clock
            command = shlex.join(["python", "recipes/explore.py", *(sys.argv[1:] if argv is None else argv)])
            write_comparison(Path(args.results), exploration, solutions, compared, clock, command)
    for line in missing:
        console.print(f"left out: {line}")
    for line in doubts:
        console.print(f"caution: {line}")
    if has_page:
        console.print(f"report: {folder / 'report.html'}")
    if chosen is None:
        console.print(f"nothing to choose: no solution meets --choose {args.choose} with this --max-drop and --within")
    else:
        console.print(
            f"chosen ({args.choose}): trial {chosen.number}, {percent(chosen.accuracy)}, "
            f"{seconds_text(chosen.seconds)}, {chosen.parameters:,} parameters"
        )
        console.print(f"train it: python recipes/train.py --config {shlex.quote(str(folder / 'chosen.yaml'))}")
    if not completed:
        console.print(f"stopped and saved: go on with --resume {shlex.quote(str(folder))}")
        return stop.exit_code
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    run(main)
