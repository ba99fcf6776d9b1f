"""recipes/kernels.py: the committed table has every Triton kernel, and a row is what one compilation takes."""

import csv
import importlib
import os
from pathlib import Path

import pytest

pytest.importorskip("triton")

from capszoo.kernels import counts
from capszoo.recipes import kernels

RESULTS = Path(kernels.__file__).parent / "results"
MODULES = (
    *("all_classes", "centered_filters", "class_scores.triton", "dynamic_routing", "per_class", "squash"),
    "inverted_attention.triton",
    *("gaussian_routing.triton", "gaussian_routing.triton_backward"),
)


@pytest.fixture(scope="module")
def table():
    with open(RESULTS / "kernels-sm_90.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_modules_of_kernels_are_known():
    folder = Path(counts.__file__).parent
    names = {".".join(path.relative_to(folder).with_suffix("").parts) for path in folder.rglob("*.py")
             if "@triton.jit" in path.read_text() and "_kernel(" in path.read_text()}  # fmt: skip
    assert names == set(MODULES)


def test_every_kernel_is_in_the_table(table):
    found = set()
    for name in MODULES:
        module = importlib.import_module(f"capszoo.kernels.{name}")
        found |= {key for key in vars(module) if key.endswith("_kernel") and not key.startswith("_")}
    assert {row["kernel"] for row in table} == found
    assert len(table) == len(list(kernels.tasks()))


def test_rows_of_the_operators_that_have_their_own_kernels(table):
    own = [row for row in table if row["matrices"].endswith(("4x4", "6x6"))]
    names = {row["kernel"]: [other["matrices"] for other in own if other["kernel"] == row["kernel"]] for row in own}
    assert names["poses_kernel"] == [
        "3x3, 32 to 32 types of 4x4",
        "1x1, 800 to 10 types of 4x4",
        "3x3, 32 to 32 types of 6x6",
        "1x1, 20 to 100 types of 6x6",
    ]
    assert names["children_kernel"] == ["3x3, 32 to 32 types of 4x4", "4x4, 32 to 10 types of 4x4"]
    # At the sizes of the papers for CIFAR-10 and smallNORB.
    assert all(int(row["spilled_bytes"]) <= 64 for row in own if "4x4" in row["matrices"])
    assert all(int(row["shared_bytes"]) < 100_000 for row in own)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="decorated for the interpreter, nothing compiles")
def test_a_row(table):
    place = next(i for i, launch in enumerate(counts.launches_of_mixtures()) if launch.constants.get("EQUAL"))
    row = kernels.compiled_row("sm_90", ("mixtures", "", "fp32", place, 0))
    like = next(other for other in table if other["kernel"] == "moments_kernel" and other["pass"] == "EQUAL")
    names = ("kernel", "pass", "tile", "matrices", "precision", "poses")
    assert [row[name] for name in names] == [like[name] for name in names] and list(row) == list(like)
    # Another Triton counts otherwise, but not by much.
    assert row["instructions"] == pytest.approx(int(like["instructions"]), rel=0.5) and 16 <= row["registers"] <= 255


def test_the_table_of_a_step():
    """Our own launches are as committed; those of PyTorch's operators are for each torch to choose."""
    with open(RESULTS / "step-launches.csv", newline="") as file:
        committed = {(row["part"], int(row["batch_size"])): row for row in csv.DictReader(file)}
    rows = {(row["part"], row["batch_size"]): row for row in kernels.step_rows()}
    assert rows.keys() == committed.keys()
    for key, row in rows.items():
        if key[0] in ("filters of the primary capsules", "lengths", "routing"):
            assert [str(row[name]) for name in ("launches", "megabytes")] == list(committed[key].values())[2:4]
        if key[0] not in ("routing", "order of the primary capsules"):
            assert row["launches"] < 0.7 * row["launches_unfused"] and row["megabytes"] <= row["megabytes_unfused"]
    assert rows["step", 1]["launches"] == rows["step", 128]["launches"] < 90
