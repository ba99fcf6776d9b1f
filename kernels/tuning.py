"""Tile sizes of the Triton kernels: chosen by timing once for each problem, or fixed where bits must not depend on it.

The environment variable CAPSZOO_TILES limits how many are timed for a kernel: a run starts sooner, and with 1, which
times nothing, every process computes the same bits.
"""

import functools
import inspect
import os
import threading

import torch
import triton

# What tells one problem from another, of the arguments that a kernel has.
KEY = ("T", "P", "J", "K", "D", "MAX_B", "R", "UNIFORM", "BACKWARD", "PRECISION")


def read_max_tiles() -> int | None:
    text = os.environ.get("CAPSZOO_TILES")
    if text is None or (text.isdecimal() and int(text) > 0):
        return None if text is None else int(text)
    raise ValueError(f"CAPSZOO_TILES={text!r} does not say how many tile sizes to time: give 1 or more, or unset it")


MAX_TILES = read_max_tiles()


def make_configs(*tiles: dict[str, int]) -> list[triton.Config]:
    """From meta-parameters with `warps` and `stages`, the first for any problem. The interpreter takes that one."""
    configs = []
    for tile in tiles:
        sizes = {name: size for name, size in tile.items() if name.isupper()}
        configs.append(triton.Config(sizes, num_warps=tile["warps"], num_stages=tile["stages"]))
    return configs[:1] if os.environ.get("TRITON_INTERPRET", "0") == "1" else configs


def candidates(configs: list[triton.Config], named_args: dict, **kwargs) -> list[triton.Config]:
    """The tiles to time: of no more samples than there are. A stream that is being captured cannot be timed."""
    max_b = {**named_args, **kwargs}["MAX_B"]
    fitting = [config for config in configs if config.kwargs["BLOCK_B"] <= max_b]
    return fitting[: 1 if torch.cuda.is_current_stream_capturing() else MAX_TILES]


def tuned(*tiles: dict[str, int]):
    """Decorator of a kernel that chooses one of these by timing; on disk between runs where this Triton can."""

    def decorate(kernel):
        names = kernel.arg_names if hasattr(kernel, "arg_names") else kernel.fn.arg_names
        known = inspect.signature(triton.autotune).parameters
        options = {name: value for name, value in _TUNING.items() if name in known}
        pruning = {"early_config_prune": candidates}
        key = [name for name in KEY if name in names]
        return triton.autotune(make_configs(*tiles), key, prune_configs_by=pruning, **options)(kernel)

    return decorate


def measure(call, quantiles):
    """Milliseconds of a call. Tile sizes differ by more than so short a measurement errs."""
    if torch.cuda.is_current_stream_capturing():  # Triton before 3.8 times a single candidate as well
        return [0.0] * len(quantiles)
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)


# Triton's tuner keeps the arguments of a call on the kernel, which all threads share: those of nn.DataParallel, the
# backward threads of several GPUs, a server's. A launch does not wait for the GPU.
_LOCK = threading.Lock()
_TUNING = {"cache_results": True, "do_bench": measure}


def launcher(kernel, grid):
    """Launches a tuned kernel over a grid, with its first tile where bits must not depend on timing.

    Tiles differ in the order of their sums, and another process may find another one fastest.
    """
    if MAX_TILES == 1 or torch.are_deterministic_algorithms_enabled():
        return functools.partial(kernel.fn[grid], **kernel.configs[0].all_kwargs())
    launch = kernel[grid]

    def launched(*args, **kwargs):
        with _LOCK:
            return launch(*args, **kwargs)

    return launched
