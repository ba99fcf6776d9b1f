"""Tables and figures of the measurements."""

import sys
from pathlib import Path

import torch
from rich.table import Table

from capszoo._version import __version__
from capszoo.command_line import make_console
from capszoo.errors import first_line
from capszoo.figures import plot_layers, plot_memory, plot_speedup
from capszoo.precision import device_name

COLUMNS = (
    "subject", "model", "layer", "batch_size", "precision", "variant", "graph", "rounds", "median_ms", "p20_ms",
    "p80_ms", "ratio_to_fused", "images_per_second", "peak_mib", "peak_ratio_to_fused", "note", "device", "threads",
    "torch", "triton", "capszoo",
)  # fmt: skip
# By what follows the name of their table.
PLOTS = {"speedup": plot_speedup, "memory": plot_memory, "layers": plot_layers}


def describe_machine(device: torch.device) -> dict:
    """The device and the versions, which all rows share."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = ""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
        "capszoo": __version__,
    }


def print_table(rows: list[dict]) -> None:
    """Print the rows as a table, of 120 columns where this is not a terminal."""
    titles = {
        "subject": "subject", "model": "model", "batch_size": "batch", "precision": "precision", "variant": "variant",
        "graph": "graph", "median_ms": "ms", "ratio_to_fused": "ratio", "images_per_second": "img/s",
        "peak_mib": "peak MiB", "peak_ratio_to_fused": "ratio", "note": "note",
    }  # fmt: skip
    title = f"{rows[0]['device']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for key, heading in titles.items():
        left = key in ("subject", "model", "precision", "variant", "note")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True, max_width=20)
    for row in rows:
        shown = {**row, "subject": row["layer"] or row["subject"]}
        table.add_row(*(str(shown.get(key, "")) for key in titles))
    # Through a pipe rich would assume 80 columns.
    make_console(width=None if sys.stdout.isatty() else 120).print(table)


def print_summary(rows: list[dict], batch_size: int) -> None:
    """The ratios that the README quotes."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["batch_size"] == batch_size and row["subject"] in ("routing", "training step", "inference"):
            found.setdefault((row["subject"], row["model"], row["precision"], row["graph"]), {})[row["variant"]] = row
    for (subject, model, precision, graph), variants in found.items():
        ratios = [
            f"{variant}/fused {row['ratio_to_fused']:.3g}"
            for variant, row in variants.items()
            if variant in ("direct", "plain", "compiled", "reference") and "ratio_to_fused" in row
        ]
        if "ratio_to_fused" in variants.get("none", {}):
            ratios.append(f"fused/none {1 / variants['none']['ratio_to_fused']:.3g}")
        if variants.get("plain", {}).get("peak_ratio_to_fused"):
            ratios.append(f"peak plain/fused {variants['plain']['peak_ratio_to_fused']:.3g}")
        if ratios:
            how = f"{precision}, graph" if graph else precision
            print(f"{subject} {model} at batch {batch_size}, {how}: {', '.join(ratios)}")


def draw(rows: list[dict], folder: Path, stem: str) -> int:
    """Draw all figures that the rows are enough for; return their number."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = 0
    for name, plot in PLOTS.items():
        path = folder / f"{stem}-{name}.png"
        try:
            plot(rows, path)
        except (ImportError, ValueError) as error:
            print(f"{path.name} is not drawn: {first_line(error)}")
        else:
            print(f"drawn {path}")
            drawn += 1
    return drawn
