"""capszoo.benchmark.measuring: variants in turns, their times and peak memory; one that fails costs its row alone."""

import time

import pytest
import torch

from capszoo.benchmark.measuring import Group, measure, measure_epoch, peak_bytes, summarise
from capszoo.data import load_data

CPU = torch.device("cpu")


def make_group(graph=False, **makers):
    facts = {"subject": "routing", "model": "m", "layer": "", "batch_size": 4, "precision": "float32"}
    return Group(facts, makers, graph)


def nap():
    return lambda: time.sleep(0.002)


def no_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nGPU 0 has a total of 2 GiB")


def test_variant_without_memory_costs_its_row_alone(capsys):
    fused, plain, none = measure(make_group(fused=nap, plain=no_memory, none=nap), 2, CPU)
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

    fused, plain = measure(make_group(fused=nap, plain=fails_late), 4, CPU)
    assert plain["note"] == "RuntimeError: lost" and "median_ms" not in plain and len(calls) == 7
    assert fused["rounds"] == 4


def test_failing_fused_variant_leaves_the_others_without_ratio(capsys):
    fused, plain = measure(make_group(fused=no_memory, plain=nap), 1, CPU)
    assert fused["note"] and plain["median_ms"] > 0
    assert "ratio_to_fused" not in plain and plain["peak_ratio_to_fused"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where no graph can be captured")
def test_failed_capture_is_timed_without_graph():
    (row,) = measure(make_group(fused=nap, graph=True), 1, CPU)
    assert row["graph"] == 0 and row["note"].startswith("timed without graph: ") and row["median_ms"] >= 2


def test_ratio_is_the_median_of_the_ratios_within_rounds():
    summary = summarise([2.0, 30.0, 8.0], [1.0, 10.0, 2.0])
    assert summary == {"rounds": 3, "median_ms": 8.0, "p20_ms": 2.0, "p80_ms": 30.0, "ratio_to_fused": 3.0}
    assert "ratio_to_fused" not in summarise([1.0], None)


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

    assert peak_bytes(step, CPU) / 2**20 == pytest.approx(16, abs=0.1)


def test_epoch_is_the_second_of_two():
    data = load_data("digits", img_size=28, val_fraction=0)
    facts = {"subject": "epoch", "model": "capsnet_tiny", "layer": "", "batch_size": 256, "precision": "float32"}
    (row,) = measure_epoch(facts, data, None, CPU)
    assert row["graph"] == 0 and row["rounds"] == 1
    assert row["images_per_second"] == pytest.approx(1000 * len(data.train) / row["median_ms"], rel=1e-3)
