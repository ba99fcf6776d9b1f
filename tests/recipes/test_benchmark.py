"""recipes/benchmark.py: what it measures, what it writes, and that one failure costs one row."""

import contextlib
import csv
import importlib.util
import io
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from capszoo.benchmark import measuring
from capszoo.benchmark.steps import layer_names

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PNG = b"\x89PNG\r\n\x1a\n"


def load_recipe():
    spec = importlib.util.spec_from_file_location("capszoo_benchmark", ROOT / "recipes" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


benchmark = load_recipe()


def run(*argv):
    """Run the recipe; return its exit code and what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = benchmark.main([*map(str, argv)])
    return code, out.getvalue()


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def small(path, *argv):
    options = "--device cpu --amp none --models capsnet_tiny --compile-batch-sizes --rounds 2 --output".split()
    return run(*options, path, *argv)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Rows of a run over two batch sizes, what it printed, and its folder."""
    folder = tmp_path_factory.mktemp("results")
    code, out = small(folder / "benchmark-cpu.csv", "--batch-sizes", 2, 8)
    assert code == 0, out
    return read(folder / "benchmark-cpu.csv"), out, folder


def test_all_subjects_and_variants_have_their_row(measured):
    rows, _, _ = measured
    found = {(r["subject"], r["layer"], r["batch_size"], r["variant"]) for r in rows}
    expected = {("routing", "", size, variant) for size in "28" for variant in ("fused", "plain")}
    for subject in ("training step", "inference"):
        expected |= {(subject, "", size, variant) for size in "28" for variant in ("fused", "direct", "plain", "none")}
    expected |= {("training step", "", size, "reference") for size in "28"}
    layers = layer_names("capsnet_tiny")
    expected |= {("layer", layer, "8", "fused") for layer in layers} | {("layer", "routing", "8", "plain")}
    expected |= {("layer", layer, "8", "direct") for layer in ("conv1", "primary_caps")}
    assert found == expected and len(rows) == len(expected)
    assert list(rows[0]) == list(benchmark.COLUMNS)
    assert {r["model"] for r in rows} == {"capsnet_tiny"} and {r["precision"] for r in rows} == {"float32"}
    assert {(r["graph"], r["rounds"], r["note"]) for r in rows} == {("0", "2", "")}
    assert {r["torch"] for r in rows} == {torch.__version__} and all(r["device"] for r in rows)


def test_times_and_ratios_agree(measured):
    rows, _, _ = measured
    fused = {(r["subject"], r["layer"], r["batch_size"]): r for r in rows if r["variant"] == "fused"}
    for row in rows:
        ours = fused[row["subject"], row["layer"], row["batch_size"]]
        low, median, high = (float(row[key]) for key in ("p20_ms", "median_ms", "p80_ms"))
        assert 0 < low <= median <= high
        speed = 1000 * int(row["batch_size"]) / median
        assert float(row["images_per_second"]) == pytest.approx(speed, rel=1e-3)
        # Of two rounds p20 and p80 are the two: any ratio within a round lies between these.
        ratio = float(row["ratio_to_fused"])
        assert low / float(ours["p80_ms"]) * 0.999 <= ratio <= high / float(ours["p20_ms"]) * 1.001
        if row is ours:
            assert ratio == 1.0
        peak_ratio = float(row["peak_mib"]) / float(ours["peak_mib"])
        assert float(row["peak_ratio_to_fused"]) == pytest.approx(peak_ratio, rel=1e-3)


def test_plain_routing_takes_more_memory(measured):
    rows, _, _ = measured
    peak = {(r["subject"], r["variant"], r["batch_size"]): float(r["peak_mib"]) for r in rows if not r["layer"]}
    assert peak["routing", "plain", "8"] > 5 * peak["routing", "fused", "8"]
    assert peak["training step", "plain", "8"] > 2 * peak["training step", "fused", "8"]
    assert peak["inference", "plain", "8"] > 2 * peak["inference", "fused", "8"]
    assert peak["routing", "plain", "8"] == pytest.approx(4 * peak["routing", "plain", "2"], rel=0.2)
    # At most what it is without routing and the operator's own; the gradients alone are 4 bytes a parameter.
    assert peak["training step", "none", "8"] <= peak["training step", "fused", "8"] * 1.01
    parameters = sum(p.numel() for p in benchmark.capszoo.create_model("capsnet_tiny", decoder=True).parameters())
    assert peak["training step", "none", "8"] > 4 * parameters / 2**20


def test_prints_a_table_of_120_columns_and_the_ratios_last(measured):
    rows, out, folder = measured
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:3] == ["subject", "model", "batch"])
    table = lines[start : start + 1 + len(rows)]
    assert all("capsnet_tiny " in line for line in table[1:]) and max(map(len, table)) <= 120
    plain = next(r for r in rows if (r["subject"], r["variant"], r["batch_size"]) == ("routing", "plain", "8"))
    summary = lines[-3:]
    assert summary[0].startswith("routing capsnet_tiny at batch 8, float32: ")
    assert f"plain/fused {float(plain['ratio_to_fused']):.3g}, " in summary[0]
    assert f"peak plain/fused {float(plain['peak_ratio_to_fused']):.3g}" in summary[0]
    assert "fused/none" in summary[1] and summary[2].startswith("inference")
    assert f"written to {folder / 'benchmark-cpu.csv'}" in lines


def test_figures_are_drawn_and_drawn_again(measured, tmp_path):
    _, _, folder = measured
    names = {f"benchmark-cpu-{name}.png" for name in ("speedup", "memory", "layers")}
    assert {p.name for p in folder.iterdir()} == {"benchmark-cpu.csv", *names}
    code, _ = run("--plot-only", folder / "benchmark-cpu.csv", "--plots", tmp_path / "again")
    assert code == 0 and {p.name for p in (tmp_path / "again").iterdir()} == names
    for name in names:
        data = (tmp_path / "again" / name).read_bytes()
        assert data.startswith(PNG) and len(data) > 10_000


def test_long_note_does_not_widen_the_table(measured, capsys):
    rows = [{**row, "note": "a long explanation " * 10} for row in measured[0]]
    benchmark.print_table(rows)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 120


def test_wrong_numbers_are_not_timed(tmp_path, monkeypatch, capsys):
    measuring.check_same_numbers(CPU, "bfloat16")
    right = measuring.dynamic_routing
    monkeypatch.setattr(measuring, "dynamic_routing", lambda x, weight, bias: right(x, weight, bias + 0.01))
    with pytest.raises(ArithmeticError, match="v of our routing is off by .* in float32, T=72"):
        measuring.check_same_numbers(CPU, "float32")
    with pytest.raises(benchmark.UsageError, match="nothing is timed"):
        small(tmp_path / "b.csv", "--batch-sizes", 1)
    assert list(tmp_path.iterdir()) == []


def test_time_limit_starts_nothing_new(tmp_path, monkeypatch):
    seconds = iter(range(0, 1000, 10))
    clock = SimpleNamespace(monotonic=lambda: next(seconds), perf_counter=time.perf_counter)
    monkeypatch.setattr(benchmark, "time", clock)
    code, out = small(
        tmp_path / "b.csv", "--batch-sizes", 1, 2, "--time-limit", 25, "--rounds", 1, "--plots", tmp_path / "figures"
    )
    # Asked at 10, 20 and 30 seconds; of 6 groups and 7 layers two were measured, at the larger batch size.
    assert code == 0 and "--time-limit: 11 of 13 groups of measurements are left out" in out
    rows = read(tmp_path / "b.csv")
    assert {(r["subject"], r["batch_size"]) for r in rows} == {("routing", "2"), ("training step", "2")}
    assert "b-layers.png is not drawn" in out and (tmp_path / "figures" / "b-speedup.png").exists()


def test_nothing_measured_leaves_an_old_file_alone(tmp_path):
    (tmp_path / "b.csv").write_text("old")
    code, out = small(tmp_path / "b.csv", "--batch-sizes", 1, "--time-limit", 0)
    assert code == 1 and "nothing was measured" in out
    assert (tmp_path / "b.csv").read_text() == "old"


def test_failing_group_does_not_end_the_run(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(measuring, "summarise", fail)
    code, out = small(tmp_path / "b.csv", "--batch-sizes", 1, "--subjects", "routing", "inference", "--rounds", 1)
    rows = read(tmp_path / "b.csv")
    assert code == 0 and [r["subject"] for r in rows] == ["routing", "inference"]
    assert {r["note"] for r in rows} == {"RuntimeError: no such thing"}


def test_epoch_is_skipped_without_mnist(tmp_path):
    code, out = small(tmp_path / "b.csv", "--subjects", "epoch", "--data-dir", tmp_path / "none")
    assert code == 1 and "no epoch is timed: " in out and str(tmp_path / "none") in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--models capsnet_wz", "unknown model 'capsnet_wz', did you mean 'capsnet_ws'"),
        ("--models", "expected at least one argument"),
        ("--batch-sizes", "expected at least one argument"),
        ("--batch-sizes 8 0", "must be 1 or more"),
        ("--compile-batch-sizes -1", "must be 1 or more"),
        ("--rounds 0", "must be 1 or more"),
        ("--subjects large", "needs a GPU"),
        ("--subjects everything", "invalid choice: 'everything'"),
        ("--batchsizes 8", "did you mean '--batch-sizes'"),
        ("--plot-only nowhere.csv", "'nowhere.csv' is no file"),
    ],
)
def test_bad_input_gives_one_line(argv, message):
    with pytest.raises(benchmark.UsageError) as caught:
        run("--device", "cpu", *argv.split())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_file_without_measurements_cannot_be_drawn(tmp_path):
    (tmp_path / "other.csv").write_text("epoch,loss\n1,0.5\n")
    with pytest.raises(benchmark.UsageError, match="has nothing to draw"):
        run("--device", "cpu", "--plot-only", tmp_path / "other.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["other.csv"]


@pytest.mark.slow
def test_compiled_variant_joins_where_it_is_asked_for(tmp_path):
    argv = "--subjects routing --batch-sizes 1 2 --compile-batch-sizes 2 --rounds 1".split()
    code, out = small(tmp_path / "b.csv", *argv)
    assert code == 0
    compiled = [r for r in read(tmp_path / "b.csv") if r["variant"] == "compiled"]
    assert [r["batch_size"] for r in compiled] == ["2"]
    # A machine without compiler has a note instead of a time.
    assert bool(compiled[0]["median_ms"]) != bool(compiled[0]["note"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_steps_are_captured_on_a_gpu(tmp_path):
    argv = "--device cuda --models capsnet_tiny --batch-sizes 2 128 --compile-batch-sizes --rounds 2".split()
    subjects = ["routing", "training", "inference", "layer"]
    code, out = run(*argv, "--subjects", *subjects, "--output", tmp_path / "b.csv")
    assert code == 0, out
    rows = read(tmp_path / "b.csv")
    assert {r["note"] for r in rows} == {""}
    eager = {(r["subject"], r["batch_size"], r["precision"], r["variant"]) for r in rows if r["graph"] == "0"}
    assert eager == {("routing", "128", "float32", variant) for variant in ("fused", "plain")}
    assert {r["precision"] for r in rows if r["subject"] == "routing"} == set(measuring.PRECISIONS)
    plain = [r for r in rows if r["variant"] == "plain" and r["batch_size"] == "128"]
    assert all(float(r["peak_ratio_to_fused"]) > 1 and float(r["ratio_to_fused"]) > 1 for r in plain)
    assert torch.get_float32_matmul_precision() == "highest"
