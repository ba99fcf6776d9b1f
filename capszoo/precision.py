"""Devices and precisions by name, as options and tables have them."""

import platform
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from .errors import TrainingError, UsageError, first_line
from .kernels.processor import has_fast_vectors, matrix_unit_problem

_AMP_TYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Turn 'auto' or a device's name into a device that is there; one of several GPUs becomes the current one.

    Raises:
        UsageError: If it is not.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        float(torch.zeros((), device=device))  # there is something to compute with
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # graphs are captured, and random numbers drawn, on the current one
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used ({first_line(error)}): use --device auto or cpu") from None
    return device


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor, for tables of results."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def resolve_amp(amp: str, device: torch.device) -> torch.dtype | None:
    """Turn the name of a precision into the type that autocast takes, None for float32.

    Args:
        amp: 'auto' (bfloat16 on GPUs that compute in it and on CPUs with matrix units for it or of AMD from Zen 5 on,
            float16 on older GPUs, else float32), 'none', 'bf16' or 'fp16'.
        device: Where the model runs.

    Raises:
        TrainingError: If there is no such precision, or not on this device.
    """
    if amp == "auto":
        return explain_auto(device)[0]
    if amp not in _AMP_TYPES:
        raise TrainingError(f"unknown precision amp={amp!r}. Known: auto, {', '.join(_AMP_TYPES)}")
    if amp == "fp16" and device.type == "cpu":
        raise TrainingError("amp='fp16' needs a GPU: use bf16, none or auto on a CPU")
    return _AMP_TYPES[amp]


def explain_auto(device: torch.device) -> tuple[torch.dtype | None, str]:
    """What `amp='auto'` takes on a device, as :func:`resolve_amp` returns it, and why."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU computes in it"
        return torch.float16, "the GPU is older than bfloat16"
    if device.type != "cpu":
        return None, f"lower precision is not measured on {device.type}"
    problem = matrix_unit_problem()
    if problem is None:
        return torch.bfloat16, "AMX multiplies its matrices"
    return (torch.bfloat16, "the vectors of this AMD processor multiply it") if has_fast_vectors() else (None, problem)


def time_precisions(device: torch.device, seconds: float = 0.6) -> dict[torch.dtype | None, float]:
    """Time a small training step, of two convolutions and a matrix product, in float32 (None) and bfloat16.

    Args:
        device: A CPU; others do not compute while Python waits.
        seconds: About as long is each measured.

    Returns:
        Median seconds of a step by type.
    """
    images = torch.rand(16, 1, 28, 28, device=device)
    model = nn.Sequential(
        nn.Conv2d(1, 64, 9), nn.ReLU(), nn.Conv2d(64, 64, 9, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(2304, 160)
    ).to(device)

    def step(dtype: torch.dtype | None) -> float:
        start = time.perf_counter()
        with autocast(device, dtype):
            loss = model(images).square().mean()
        loss.backward()
        return time.perf_counter() - start

    dtypes = (None, torch.bfloat16)
    times: dict[torch.dtype | None, list[float]] = {dtype: [] for dtype in dtypes}
    for dtype in dtypes:
        step(dtype)  # what is prepared once
    end = time.monotonic() + len(dtypes) * seconds
    while time.monotonic() < end or len(times[None]) < 3:
        for dtype in dtypes:  # in turns, so that what else runs on the machine slows all of them
            times[dtype].append(step(dtype))
    return {dtype: statistics.median(found) for dtype, found in times.items()}


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast to `dtype` on `device`; nothing where it is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
