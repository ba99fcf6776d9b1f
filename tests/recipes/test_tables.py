"""recipes/tables.py: tables of pages from files of results."""

import csv

import pytest

from capszoo.errors import UsageError
from capszoo.recipes import tables


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "results_folder", lambda: tmp_path)
    return tmp_path


def page(tmp_path, table, text="old\n"):
    path = tmp_path / "page.md"
    path.write_text(f"before\n<!-- table {table} -->\n{text}<!-- end of table -->\nbehind\n")
    return path


def body(path):
    return path.read_text().split("-->\n", 1)[1].split("<!-- end", 1)[0].splitlines()


def test_accuracies(results):
    write(results / "r.csv", [
        {"model": "capsnet.mnist", "top1": 0.9955, "top1_scale_0.8": "", "param_count": 6804384},
        {"model": "cnn_baseline", "top1": 0.5, "top1_scale_0.8": 0.12345, "param_count": 12},
    ])  # fmt: skip
    path = page(results, "accuracies r.csv top1 top1_scale_0.8 param_count")
    assert tables.main([str(path), "--check"]) == 1 and body(path) == ["old"]
    assert tables.main([str(path)]) == 0 and tables.main([str(path), "--check"]) == 0
    assert body(path) == [
        "| weights | top-1 | scaled 0.8 | parameters |",
        "|---|---:|---:|---:|",
        "| `capsnet.mnist` | 99.55 % | not measured yet | 6,804,384 |",
        "| `cnn_baseline` (not shipped) | 50.00 % | 12.35 % | 12 |",
    ]
    assert path.read_text().startswith("before\n") and path.read_text().endswith("\nbehind\n")


def test_routing_gain_is_over_pairs_of_seeds(results):
    rows = [
        {"model": "deepcaps", "epochs": 2, "couplings": kind, "seed": seed, "top1": top1, "step_ms": ms, "entropy": 0.5}
        for kind, seed, top1, ms in (
            ("routing", 0, 0.92, 30), ("routing", 1, 0.90, 30), ("routing", 2, 0.1, 30),  # the last has no twin
            ("uniform", 1, 0.90, 20), ("uniform", 0, 0.90, 20),
        )
    ]  # fmt: skip
    other = {"epochs": "2", "options": "lr=0.1 model_kwargs={'num_passes': 3} opt=sgd"}
    rows = [{"options": "lr=0.1", **row} for row in rows]
    write(results / "gain.csv", rows + [{**row, **other, "top1": 0.75} for row in rows[:1] + rows[-1:]])
    path = page(results, "routing-gain gain.csv top1")
    tables.main([str(path)])
    cells = body(path)[2].strip("| ").split(" | ")
    assert cells == ["`deepcaps`", "2", "2", "91.00 ± 1.41 %", "90.00 ± 0.00 %", "+1.00 ± 1.41", "0.500"]
    assert body(path)[3].startswith("| `deepcaps` (num_passes: 3) | 2 | 1 | 75.00 % | 75.00 % | +0.00 |")


def test_rows_without_published_ones_and_over_pairs_of_seeds(results):
    write(results / "paper-published.csv", [{"name": "baseline", "dataset": "mnist"}])
    row = {"test_top1": 0.99, "seconds": 50, "seconds_to_best": 40, "runs": 3}
    gain = {"gain": 0.0012, "gain_low": -0.0003, "gain_high": 0.0027}
    write(results / "p.csv", [
        {**row, "name": "baseline", **dict.fromkeys(gain, 0.0)},
        {**row, "name": "fast", "seconds": 10, **gain},
        {**row, "name": "once", "seconds": 60, "runs": 1, **dict.fromkeys(gain, "")},
    ])  # fmt: skip
    path = page(results, "paper p.csv digits")
    tables.main([str(path)])
    assert body(path) == [
        "| row | seeds | test top-1 | over the baseline of the same seed (95 %) | training | to its best epoch | "
        "less than the baseline to its best |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| baseline | 3 | 99.00 % | - | 50 s | 40 s | - |",
        "| fast | 3 | 99.00 % | +0.12 (-0.03 to +0.27) | 10 s | 40 s | 75 % |",
        "| once | 1 | 99.00 % | - | 60 s | 40 s | -50 % |",
    ]


def test_what_a_row_saves_is_told_over_the_same_seeds(results):
    write(results / "paper-published.csv", [{"name": "baseline", "dataset": "mnist"}])
    row = {"test_top1": 0.99, "seconds": 100, "seconds_to_best": 100, "runs": 1}
    write(results / "p.csv", [
        {**row, "name": "baseline", "seconds_to_best": 80, "runs": 2, "share": 1.25},
        {**row, "name": "decay", "share": 1.0},
    ])  # fmt: skip
    path = page(results, "paper p.csv digits")
    tables.main([str(path)])
    assert body(path)[-1] == "| decay | 1 | 99.00 % | 100 s | 100 s | 0 % |"


def test_rows_of_the_paper(results):
    published = {"name": "exp_decay", "accuracy": 0.99404, "epochs": 12, "epoch_seconds": 300}
    write(results / "paper-published.csv", [
        {**published, "dataset": "fashion_mnist", "accuracy": 0.5}, {**published, "dataset": "mnist"},
    ])  # fmt: skip
    row = {"runs": 2, "test_top1": 0.99, "test_top1_std": 0.0005, "seconds_std": "", "seconds_to_best_std": 4}
    write(results / "p.csv", [
        {**row, "name": "baseline", "seconds": 120, "seconds_to_best": 100},
        {**row, "name": "exp_decay", "seconds": 40.4, "seconds_to_best": ""},
    ])  # fmt: skip
    path = page(results, "paper p.csv mnist")
    tables.main([str(path)])
    assert body(path)[2:] == [
        "| baseline | 2 | 99.00 ± 0.05 % | 120 s | 100 ± 4 s | - | - | - |",
        "| exp decay | 2 | 99.00 ± 0.05 % | 40 s | - | 60 % | 99.40 % | 12 x 300 |",
    ]


def test_families(results):
    row = {"subject": "training step", "model": "deepcaps", "layer": "", "batch_size": 4, "variant": "fused"}
    row |= {"median_ms": 30, "ratio_to_fused": 1, "images_per_second": 1333.3, "peak_ratio_to_fused": 1}
    stem = {"subject": "layer", "variant": "fused"}
    write(results / "f.csv", [
        row, {**row, "variant": "unfused", "ratio_to_fused": 2.5, "peak_ratio_to_fused": 9.123},
        {**row, **stem, "layer": "stem1", "median_ms": 15}, {**row, **stem, "layer": "stem2", "median_ms": 5},
        {**row, **stem, "layer": "caps", "median_ms": 10},
    ])  # fmt: skip
    path = page(results, "families f.csv stem1 stem2")
    tables.main([str(path)])
    assert body(path)[2:] == ["| `deepcaps` | 4 | 1,333 | 2.50 (9.12) | - | 1.50 |"]


def test_what_is_not_measured_and_what_is_not_a_table(results):
    path = page(results, "routing-gain nothing.csv top1")
    assert tables.main([str(path)]) == 0 and body(path) == ["not measured yet"]
    with pytest.raises(UsageError, match="table plots r.csv is not KIND FILE.csv COLUMN"):
        tables.main([str(page(results, "plots r.csv"))])
    with pytest.raises(UsageError, match="^no page at 'nothing.md': check the path$"):
        tables.main(["nothing.md"])


def test_plots_of_the_pages_are_drawn_anew_from_their_tables(results, capsys):
    write(results / "paper-published.csv", [{"name": "baseline", "dataset": "mnist", "epochs": 2, "epoch_seconds": 3}])
    write(results / "p.csv", [
        {"name": "baseline", "dataset": "mnist", "seconds_to_best": 4, "seconds_to_baseline": 4, "saving": 0},
    ])  # fmt: skip
    write(results / "p-epochs.csv", [{"name": "baseline", "seed": 0, "epoch": 1, "seconds": 2, "accuracy": 0.5}])
    step = {"subject": "routing", "model": "capsnet", "batch_size": 4, "precision": "float32", "graph": 0}
    write(results / "b.csv", [
        {**step, "variant": "fused", "median_ms": 3, "ratio_to_fused": 1, "peak_mib": 7},
        {**step, "variant": "plain", "median_ms": 6, "ratio_to_fused": 2, "peak_mib": 9},
    ])  # fmt: skip
    pruned = {"float32_bytes": 4e6, "val_top1": 0.9, "val_top1_before": ""}
    write(results / "pruned.csv", [
        {**pruned, "round": 0}, {**pruned, "round": 1, "float32_bytes": 1e6, "val_top1_before": 0.4},
    ])  # fmt: skip
    names = ["p", "p-accuracy", "b-speedup", "b-memory", "pruned"]
    path = results / "page.md"
    path.write_text("".join(f"![words](../recipes/results/{name}.png)\n" for name in names))
    assert tables.main([str(path)]) == 0 and not list(results.glob("*.png")), "only where they are asked for"
    assert tables.main([str(path), "--plots"]) == 0
    assert sorted(png.stem for png in results.glob("*.png")) == sorted(names)
    path.write_text("![words](recipes/results/other.png) ![words](recipes/results/b-layers.png)")
    capsys.readouterr()
    assert tables.main([str(path), "--plots"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "other.png is not drawn: recipes/results has no table of other.png: name a plot by its table" in out
    assert "b-layers.png is not drawn: there is nothing to draw" in out
    with pytest.raises(UsageError, match="--check changes nothing, and --plots draws"):
        tables.main([str(path), "--check", "--plots"])
