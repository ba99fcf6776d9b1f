"""Write the tables in README.md and docs/ from the CSV files in recipes/results, and draw the plots that these show.

    python recipes/tables.py            # writes the tables anew, where they have changed
    python recipes/tables.py --check    # changes nothing; fails if a table is not that of its file
    python recipes/tables.py --plots    # also draws the plots anew

A table stands between the comments `<!-- table KIND FILE.csv COLUMN ... -->` and `<!-- end of table -->`. The kinds are
those of KINDS below; a file that is not there, or a figure that is not in it, is "not measured yet". A plot's name
begins with that of its file, and ends as PLOTS below has it.
"""

import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from capszoo.benchmark.reporting import PLOTS as benchmark_plots
from capszoo.command_line import OptionParser, make_console, results_folder, run
from capszoo.errors import UsageError, first_line
from capszoo.explore.comparison import draw_epochs, draw_rows
from capszoo.files import read_rows, write_atomically
from capszoo.pretrained import read_table
from capszoo.prune.pareto import plot_pareto

Rows = list[dict[str, str]]

MARKED = re.compile(r"(<!-- table (\S+) ([^>]*?) ?-->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
NOT_MEASURED = "not measured yet"
TITLES = {
    "top1": "top-1",
    "top1_affine": "`mnist_affine`'s changes",
    "top1_rotate_15": "rotated 15°",
    "top1_rotate_30": "rotated 30°",
    "top1_shift_6": "shifted up to 6 px",
    "top1_scale_0.8": "scaled 0.8",
    "top1_scale_1.2": "scaled 1.2",
    "param_count": "parameters",
    "images_per_second": "images/s",
    "step_ms": "step",
    "entropy": "entropy of couplings",
}


def build_parser() -> OptionParser:
    parser = OptionParser(
        description="Write the tables of README.md and docs/, and their plots, from the files in recipes/results."
    )
    add = parser.add_argument
    add("pages", nargs="*", metavar="PAGE.md", help="pages; default README.md and those in docs/")
    add("--check", action="store_true", help="change nothing, and fail if a table is not that of its file")
    add("--plots", action="store_true", help="also draw the plots that the pages show anew")
    return parser


def cell(key: str, value: str | None) -> str:
    """One figure as the tables show it."""
    if value in (None, ""):
        return NOT_MEASURED
    if key.startswith("top1"):
        return f"{100 * float(value):.2f} %"
    if key in ("param_count", "images_per_second"):
        return f"{round(float(value)):,}"
    return value


# What begins as a number, and what stands in its place.
_NUMBER = re.compile(r"[-+]?\d|-$|not measured yet$")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its columns of numbers are to the right."""
    body = list(rows)
    columns = list(zip(*body, strict=True)) or [()] * len(header)
    rules = ["---:" if all(map(_NUMBER.match, column)) and column else "---" for column in columns]
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(rules)}|", *(f"| {' | '.join(line)} |" for line in body)]
    return "".join(line + "\n" for line in lines)


def accuracies(rows: Rows, columns: Sequence[str]) -> str:
    """The rows of recipes/validate.py."""
    shipped = read_table()
    names = [f"`{row['model']}`" + ("" if row["model"] in shipped else " (not shipped)") for row in rows]
    body = [[name, *(cell(key, row.get(key)) for key in columns)] for name, row in zip(names, rows, strict=True)]
    return markdown(["weights", *(TITLES.get(key, key) for key in columns)], body)


def spread(values: Sequence[float], scale: float = 1.0, unit: str = "") -> str:
    """Mean and standard deviation, of one value the value alone."""
    mean = scale * statistics.mean(values)
    deviation = f" ± {scale * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean:.2f}{deviation}{unit}"


def routing_gain(rows: Rows, columns: Sequence[str]) -> str:
    """The rows of recipes/ablation.py: routing, uniform couplings, and their difference over pairs of equal seeds."""
    groups: dict[tuple[str, ...], dict[str, dict[str, dict[str, str]]]] = {}
    for row in rows:
        key = row["model"], row["epochs"], row.get("options", "")
        groups.setdefault(key, {}).setdefault(row["couplings"], {})[row["seed"]] = row
    body = []
    for (model, epochs, options), found in groups.items():
        seeds = sorted(found.get("routing", {}).keys() & found.get("uniform", {}).keys())
        if not seeds:
            continue
        kwargs = re.search(r"model_kwargs=\{(.+?)\}", options)
        with_kwargs = f" ({kwargs[1]})".replace("'", "") if kwargs else ""
        cells = [f"`{model}`{with_kwargs}", epochs, str(len(seeds))]
        for key in columns:
            routing, uniform = ([float(found[kind][seed][key]) for seed in seeds] for kind in ("routing", "uniform"))
            gains = [a - b for a, b in zip(routing, uniform, strict=True)]
            cells += [spread(routing, 100, " %"), spread(uniform, 100, " %"), f"{statistics.mean(gains) * 100:+.2f}"]
            cells[-1] += f" ± {100 * statistics.stdev(gains):.2f}" if len(gains) > 1 else ""
        entropies = [float(found["routing"][seed]["entropy"]) for seed in seeds]
        body.append([*cells, f"{statistics.mean(entropies):.3f}"])
    header = ["model", "epochs", "seeds"]
    for key in columns:
        header += [f"{TITLES.get(key, key)}: routing", "uniform", "gain"]
    return markdown([*header, TITLES["entropy"]], body) if body else NOT_MEASURED + "\n"


def families(rows: Rows, columns: Sequence[str]) -> str:
    """Steps of recipes/benchmark.py: ours, and over ours that of references, that without routing, and of the stem."""
    steps: dict[str, dict[str, dict[str, str]]] = {}
    stems: dict[str, float] = {}
    for row in rows:
        if row["subject"] == "training step":
            steps.setdefault(row["model"], {})[row["variant"]] = row
        elif row["layer"] in columns and row["variant"] == "fused":
            stems[row["model"]] = stems.get(row["model"], 0.0) + float(row["median_ms"])
    body = []
    for model, variants in steps.items():
        ours = variants["fused"]
        cells = [f"`{model}`", ours["batch_size"], f"{float(ours['images_per_second']):,.0f}"]
        for variant in ("unfused", "uniform"):
            row = variants.get(variant, {})
            ratio, memory = (row.get(key) for key in ("ratio_to_fused", "peak_ratio_to_fused"))
            cells.append(f"{float(ratio):.2f} ({float(memory):.2f})" if ratio and memory else "-")
        stem = stems.get(model)
        body.append([*cells, f"{float(ours['median_ms']) / stem:.2f}" if stem else "-"])
    header = ["model", "batch", "images/s", "references over ours", "uniform over ours", "ours over stem"]
    return markdown(header, body) if body else NOT_MEASURED + "\n"


def paper(rows: Rows, columns: Sequence[str]) -> str:
    """The rows of a grid of recipes/explore.py, beside the published ones of a data set, which is the first column."""
    published = read_rows(results_folder() / "paper-published.csv", "restore it")
    theirs = {row["name"]: row for row in published if row["dataset"] == columns[0]}

    def with_deviation(row: dict[str, str], key: str, scale: float, digits: int, unit: str) -> str:
        if not row.get(key):
            return "-"
        deviation = f" ± {scale * float(row[f'{key}_std']):.{digits}f}" if row.get(f"{key}_std") else ""
        return f"{scale * float(row[key]):.{digits}f}{deviation}{unit}"

    baseline = next((float(row["seconds_to_best"]) for row in rows if row["name"] == "baseline"), None)
    is_paired = any(row.get("gain_low") for row in rows)
    body = []
    for row in rows:
        is_other = baseline is not None and row["name"] != "baseline"
        # Of equal seeds; tables of before they were told have the same seeds in all rows.
        share = float(row["share"]) if row.get("share") else float(row["seconds"]) / (baseline or math.nan)
        saved = f"{round(100 * (1 - share))} %" if is_other else "-"
        cells = [row["name"].replace("_", " "), row["runs"], with_deviation(row, "test_top1", 100, 2, " %")]
        if is_paired and is_other and row["gain"]:
            between = " to ".join(f"{100 * float(row[key]):+.2f}" for key in ("gain_low", "gain_high") if row[key])
            cells.append(f"{100 * float(row['gain']):+.2f}" + f" ({between})" * bool(between))
        elif is_paired:
            cells.append("-")
        cells += [f"{float(row['seconds']):.0f} s", with_deviation(row, "seconds_to_best", 1, 0, " s"), saved]
        if other := theirs.get(row["name"]):
            cells += [f"{100 * float(other['accuracy']):.2f} %", f"{other['epochs']} x {other['epoch_seconds']}"]
        elif theirs:
            cells += ["-", "-"]
        body.append(cells)
    header = ["row", "seeds", "test top-1", *["over the baseline of the same seed (95 %)"] * is_paired]
    header += ["training", "to its best epoch", "less than the baseline to its best"]
    return markdown([*header, *["paper: top-1", "epochs x seconds to its best"] * bool(theirs)], body)


KINDS: dict[str, Callable[[Rows, Sequence[str]], str]] = {
    "accuracies": accuracies,
    "routing-gain": routing_gain,
    "families": families,
    "paper": paper,
}


Draw = Callable[[Path, Path], None]


def of_rows(plot: Callable[[Rows, Path], None]) -> Draw:
    """The plot of the rows of one file, as a function of the file and of the plot's."""
    return lambda table, path: plot(read_rows(table, "mend it"), path)


# By the ends of their names, and a column of their files where it takes that to tell them apart.
PLOTS: dict[tuple[str, str], Draw] = {
    **{(f"-{name}", ""): of_rows(plot) for name, plot in benchmark_plots.items()},
    ("-accuracy", ""): draw_epochs,
    ("", "val_top1_before"): of_rows(plot_pareto),
    ("", "seconds_to_baseline"): draw_rows,
}
SHOWN = re.compile(r"\]\((?:\.\./)*recipes/results/([\w.-]+)\.png\)")


def draw_again(name: str) -> None:
    """Draw the plot of a page from its table.

    Raises:
        UsageError: If there is no table that it is drawn from.
    """
    for (end, column), draw in PLOTS.items():
        table = results_folder() / f"{name.removesuffix(end)}.csv"
        if not name.endswith(end) or not table.is_file():
            continue
        if column and column not in next(iter(read_rows(table, "mend it")), {}):
            continue
        return draw(table, results_folder() / f"{name}.png")
    raise UsageError(f"recipes/results has no table of {name}.png: name a plot by its table")


def renewed(text: str, page: Path) -> str:
    """The text of a page with its tables written anew."""

    def renew(match: re.Match[str]) -> str:
        opening, kind, arguments, _, closing = match.groups()
        file, *columns = arguments.split() or [""]
        if kind not in KINDS or not file.endswith(".csv"):
            raise UsageError(f"{str(page)!r}: table {kind} {arguments} is not KIND FILE.csv COLUMN ...: see --help")
        path = results_folder() / file
        rows = read_rows(path, "mend or delete it") if path.exists() else []
        return f"{opening}{KINDS[kind](rows, columns) if rows else NOT_MEASURED + chr(10)}{closing}"

    return MARKED.sub(renew, text)


def main(argv: list[str] | None = None) -> int:
    args, _ = build_parser().parse(argv)
    root = Path(__file__).resolve().parents[1]
    pages = [Path(page) for page in args.pages] or [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    console, changed, shown = make_console(), 0, {}
    if args.check and args.plots:
        raise UsageError("--check changes nothing, and --plots draws: give one of them")
    for page in pages:
        if not page.is_file():
            raise UsageError(f"no page at {str(page)!r}: check the path")
        text = page.read_text(encoding="utf-8")
        new = renewed(text, page)
        shown |= dict.fromkeys(SHOWN.findall(text))
        if new == text:
            continue
        changed += 1
        console.print(f"{page}: {'a table is not that of its file' if args.check else 'written anew'}")
        if not args.check:
            write_atomically(page, lambda temporary, new=new: temporary.write_text(new, encoding="utf-8"))
    missing = 0
    for name in shown if args.plots else ():
        try:
            draw_again(name)
        except ValueError as error:
            missing += 1
            console.print(f"{name}.png is not drawn: {first_line(error)}")
        else:
            console.print(f"{name}.png: drawn anew")
    return int(args.check and changed > 0 or missing > 0)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    run(main)
