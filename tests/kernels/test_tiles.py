"""Which tile sizes a launch takes: the fastest, or the first where bits must not depend on timing."""

import threading
import time

import pytest
import torch

pytest.importorskip("triton")
from capszoo.kernels import all_classes, per_class, tuning  # noqa: E402
from capszoo.kernels.dispatch import triton_routing as routing  # noqa: E402


class Kernel:
    """Stands for a tuned kernel; what it launches is written down."""

    def __init__(self):
        self.configs = tuning.make_configs(
            dict(BLOCK_B=16, WIDTH=64, warps=4, stages=2),
            dict(BLOCK_B=32, WIDTH=64, warps=8, stages=1),
            dict(BLOCK_B=64, WIDTH=64, warps=8, stages=1),
        )
        self.launched = []
        self.fn = {"grid": lambda *args, **options: self.launched.append(options)}

    def __getitem__(self, grid):
        return lambda *args, **options: self.launched.append("tuned")


@pytest.fixture(autouse=True)
def a_gpu_that_captures_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "MAX_TILES", None)


def candidates(max_b):
    return [config.kwargs["BLOCK_B"] for config in tuning.candidates(Kernel().configs, {"p_x": None}, MAX_B=max_b)]


def test_timing_chooses():
    kernel = Kernel()
    tuning.launcher(kernel, "grid")(B=3)
    assert kernel.launched == ["tuned"]


def test_the_first_tile_where_torch_is_deterministic():
    kernel = Kernel()
    torch.use_deterministic_algorithms(True)
    try:
        tuning.launcher(kernel, "grid")(B=3)
    finally:
        torch.use_deterministic_algorithms(False)
    tuning.launcher(kernel, "grid")(B=3)
    first, then = kernel.launched
    expected = {"B": 3, "BLOCK_B": 16, "WIDTH": 64, "num_warps": 4, "num_stages": 2}
    assert expected.items() <= first.items() and then == "tuned"


def test_one_tile_is_not_timed(monkeypatch):
    monkeypatch.setattr(tuning, "MAX_TILES", 1)
    kernel = Kernel()
    tuning.launcher(kernel, "grid")(B=3)
    assert kernel.launched[0]["BLOCK_B"] == 16


def test_tiles_of_more_samples_than_there_are_and_beyond_the_limit_are_not_timed(monkeypatch):
    assert candidates(16) == [16] and candidates(32) == [16, 32] and candidates(64) == [16, 32, 64]
    monkeypatch.setattr(tuning, "MAX_TILES", 2)
    assert candidates(16) == [16] and candidates(64) == [16, 32]


def test_nothing_is_timed_in_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert candidates(64) == [16]
    assert tuning.measure(pytest.fail, quantiles=(0.5, 0.2, 0.8)) == [0.0] * 3


def test_every_tuned_kernel_has_a_first_tile_for_any_batch():
    tuned = {n: k for m in (all_classes, per_class) for n, k in vars(m).items() if hasattr(k, "configs")}
    assert len(tuned) == 7
    for name, kernel in tuned.items():
        assert kernel.configs[0].kwargs["BLOCK_B"] == 16, name


@pytest.mark.parametrize("text", ["0", "two", "-1", ""])
def test_variable_that_is_not_a_number_of_tiles(text, monkeypatch):
    monkeypatch.setenv("CAPSZOO_TILES", text)
    with pytest.raises(ValueError, match=f"CAPSZOO_TILES='{text}' does not say how many"):
        tuning.read_max_tiles()
    monkeypatch.setenv("CAPSZOO_TILES", "2")
    assert tuning.read_max_tiles() == 2
    monkeypatch.delenv("CAPSZOO_TILES")
    assert tuning.read_max_tiles() is None


def test_threads_do_not_tune_a_kernel_at_once():
    """Triton's tuner keeps the arguments of a call on the kernel: a second thread would take them away."""
    running, most = [], []

    class Slow(Kernel):
        def __getitem__(self, grid):
            def launch():
                running.append(1)
                time.sleep(0.05)
                most.append(len(running))
                running.pop()

            return launch

    kernel = Slow()
    threads = [threading.Thread(target=tuning.launcher(kernel, "grid")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


def test_capsules_too_long_for_the_tiles_of_a_class():
    """Their tiles would take more shared memory than a GPU has, and their offsets more than 32 bits."""

    def fits(K, D, shared_memory, P=1):
        sizes = routing.problem_sizes(torch.empty(2, 8 * P, K), torch.empty(8, K, 3, D), False)
        return per_class.fits(sizes, shared_memory)

    turing, ampere, hopper = 65_536, 101_376, 232_448
    assert fits(8, 16, turing) and fits(16, 64, turing) and fits(8, 128, ampere)
    assert not fits(256, 32, ampere) and fits(256, 32, hopper)
    assert not fits(256, 256, hopper)
    assert fits(8, 16, hopper, P=2**18) and not fits(16, 16, hopper, P=2**18)
