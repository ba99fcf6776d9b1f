"""recipes/benchmark.py: what it measures, what it writes, and that one failure costs one row."""

import contextlib
import csv
import importlib.util
import io
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from capszoo.data import load_data

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
        expected |= {(subject, "", size, variant) for size in "28" for variant in ("fused", "plain", "none")}
    expected |= {("layer", layer, "8", "fused") for layer in benchmark.LAYERS} | {("layer", "routing", "8", "plain")}
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


def make_group(graph=False, **makers):
    facts = {"subject": "routing", "model": "m", "layer": "", "batch_size": 4, "precision": "float32"}
    return benchmark.Group(facts, makers, graph)


def nap():
    return lambda: time.sleep(0.002)


def no_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nGPU 0 has a total of 2 GiB")


def test_variant_without_memory_costs_its_row_alone(capsys):
    fused, plain, none = benchmark.measure(make_group(fused=nap, plain=no_memory, none=nap), 2, CPU)
    assert capsys.readouterr().out.startswith("routing m 4 float32 plain: OutOfMemoryError: CUDA out of memory.")
    assert plain["note"].startswith("OutOfMemoryError") and "\n" not in plain["note"] and len(plain["note"]) <= 120
    assert plain["rounds"] == 0 and "median_ms" not in plain and "peak_mib" not in plain
    assert fused["median_ms"] >= 2 and none["median_ms"] >= 2 and none["ratio_to_fused"] > 0


def test_variant_that_fails_in_a_later_round_is_dropped(capsys):
    calls = []

    def fails_late():
        def step():
            calls.append(None)
            time.sleep(0.02)
            if len(calls) > 6:  # three to warm up, one for the memory, one for the repeats
                raise RuntimeError("lost")

        return step

    fused, plain = benchmark.measure(make_group(fused=nap, plain=fails_late), 4, CPU)
    assert plain["note"] == "RuntimeError: lost" and "median_ms" not in plain and len(calls) == 7
    assert fused["rounds"] == 4


def test_failing_fused_variant_leaves_the_others_without_ratio(capsys):
    fused, plain = benchmark.measure(make_group(fused=no_memory, plain=nap), 1, CPU)
    assert fused["note"] and plain["median_ms"] > 0
    assert "ratio_to_fused" not in plain and plain["peak_ratio_to_fused"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where no graph can be captured")
def test_failed_capture_is_timed_without_graph():
    (row,) = benchmark.measure(make_group(fused=nap, graph=True), 1, CPU)
    assert row["graph"] == 0 and row["note"].startswith("timed without graph: ") and row["median_ms"] >= 2


def test_ratio_is_the_median_of_the_ratios_within_rounds():
    summary = benchmark.summarise([2.0, 30.0, 8.0], [1.0, 10.0, 2.0])
    assert summary == {"rounds": 3, "median_ms": 8.0, "p20_ms": 2.0, "p80_ms": 30.0, "ratio_to_fused": 3.0}
    assert "ratio_to_fused" not in benchmark.summarise([1.0], None)


def test_peak_memory_of_a_known_step():
    held = [torch.ones(2**20)]  # 4 MiB from before, which count neither while held nor when freed

    def step():
        held.clear()
        a = torch.ones(2**21)  # 8 MiB
        b = a + 1  # 16
        del a
        c = torch.ones(2**20) * b[0]  # at most 8 + 4 + 4
        del b, c
        torch.ones(3 * 2**20)  # 12

    assert benchmark.peak_bytes(step, CPU) / 2**20 == pytest.approx(16, abs=0.1)


@pytest.mark.parametrize("shape", [(288, 8, 8, 10, 16), (288, 288, 8, 30, 16), (200, 200, 4, 10, 12)])
def test_estimated_memory_of_plain_routing_is_near_the_measured(shape):
    step = benchmark.routing_step(shape, torch.float32, "plain", 16, CPU)
    assert benchmark.plain_bytes(16, shape) == pytest.approx(benchmark.peak_bytes(step, CPU), rel=0.2)


def test_plain_form_is_not_tried_without_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 << 30, 10 << 30))
    with pytest.raises(torch.OutOfMemoryError, match="needs some 66 GiB, 5 GiB are free"):
        benchmark.routing_step(benchmark.LARGE, torch.float32, "plain", 128, torch.device("cuda", 0))


@pytest.mark.parametrize("shape", [(72, 72, 8, 10, 16), (72, 8, 8, 10, 16)])
def test_plain_routing_has_the_numbers_of_ours(shape):
    ours, plain = (benchmark.routing_step(shape, torch.float32, v, 5, CPU)() for v in ("fused", "plain"))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layer", benchmark.LAYERS)
def test_layers_are_timed_on_what_the_model_gives_them(layer):
    """In bfloat16, where the parts hand on different types."""
    assert benchmark.layer_step("capsnet_tiny", layer, torch.bfloat16, "fused", 2, CPU)() is None


def test_wrong_numbers_are_not_timed(tmp_path, monkeypatch, capsys):
    benchmark.check_same_numbers(CPU, "bfloat16")
    right = benchmark.dynamic_routing
    monkeypatch.setattr(benchmark, "dynamic_routing", lambda x, weight, bias: right(x, weight, bias + 0.01))
    with pytest.raises(ArithmeticError, match="v of our routing is off by .* in float32, T=72"):
        benchmark.check_same_numbers(CPU, "float32")
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

    monkeypatch.setattr(benchmark, "summarise", fail)
    code, out = small(tmp_path / "b.csv", "--batch-sizes", 1, "--subjects", "routing", "inference", "--rounds", 1)
    rows = read(tmp_path / "b.csv")
    assert code == 0 and [r["subject"] for r in rows] == ["routing", "inference"]
    assert {r["note"] for r in rows} == {"RuntimeError: no such thing"}


def test_epoch_is_skipped_without_mnist(tmp_path):
    code, out = small(tmp_path / "b.csv", "--subjects", "epoch", "--data-dir", tmp_path / "none")
    assert code == 1 and "no epoch is timed: " in out and str(tmp_path / "none") in out


def test_epoch_is_the_second_of_two():
    data = load_data("digits", img_size=28, val_fraction=0)
    facts = {"subject": "epoch", "model": "capsnet_tiny", "layer": "", "batch_size": 256, "precision": "float32"}
    (row,) = benchmark.measure_epoch(facts, data, None, CPU)
    assert row["graph"] == 0 and row["rounds"] == 1
    assert row["images_per_second"] == pytest.approx(1000 * len(data.train) / row["median_ms"], rel=1e-3)


def test_order_on_a_gpu_begins_with_what_matters():
    args = Namespace(
        device=torch.device("cuda", 0),
        amp=torch.bfloat16,
        models=["capsnet_tiny", "capsnet_ws", "capsnet"],
        batch_sizes=[1, 128, 1024],
        compile_batch_sizes=[128],
        subjects=benchmark.SUBJECTS,
    )
    groups = benchmark.plan(args, ["float32", "tf32", "bfloat16"])  # float16 had wrong numbers, say
    names = [group.name for group in groups]
    assert names[:6] == [
        "routing capsnet_ws 128 float32",
        "routing capsnet 128 float32",
        "routing capsnet_tiny 128 float32",
        "training step capsnet_ws 128 bfloat16",
        "training step capsnet 128 bfloat16",
        "routing large 128 float32",
    ]
    assert list(groups[3].makers) == ["fused", "plain", "compiled", "none"]
    assert "compiled" not in {variant for group in groups if "1024" in group.name for variant in group.makers}
    assert names.index("epoch capsnet_ws 128 bfloat16") < names.index("inference capsnet_ws 128 bfloat16")
    assert names.index("routing capsnet 128 tf32") < names.index("routing capsnet_ws 1 float32")
    assert names[-1] == "inference capsnet_tiny 1024 bfloat16" and "routing capsnet 128 float16" not in names
    ways = [(group.name, group.graph) for group in groups]
    assert len(set(ways)) == len(ways)
    assert [name for name, graph in ways if not graph] == [
        "routing large 128 float32",
        *(f"routing {name} 128 float32" for name in ("capsnet_ws", "capsnet", "capsnet_tiny")),
    ]


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
    assert {r["precision"] for r in rows if r["subject"] == "routing"} == set(benchmark.PRECISIONS)
    plain = [r for r in rows if r["variant"] == "plain" and r["batch_size"] == "128"]
    assert all(float(r["peak_ratio_to_fused"]) > 1 and float(r["ratio_to_fused"]) > 1 for r in plain)
    assert torch.get_float32_matmul_precision() == "highest"
