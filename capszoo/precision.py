"""Devices and precisions by name, as options and tables have them."""

import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from .errors import TrainingError, UsageError, first_line
from .kernels.fourier_conv import has_matrix_units

_AMP_TYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Turn 'auto' or a device's name into a device that is there.

    Raises:
        UsageError: If it is not.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        float(torch.zeros((), device=device))  # there is something to compute with
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
        amp: 'auto' (bfloat16 on GPUs that compute in it and on CPUs with matrix units for it, float16 on older GPUs,
            else float32), 'none', 'bf16' or 'fp16'.
        device: Where the model runs.

    Raises:
        TrainingError: If there is no such precision, or not on this device.
    """
    if amp == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        # With vector instructions alone (avx512_bf16) it is slower than float32, see recipes/results/precision-cpu.csv.
        return torch.bfloat16 if device.type == "cpu" and has_matrix_units() else None
    if amp not in _AMP_TYPES:
        raise TrainingError(f"unknown precision amp={amp!r}. Known: auto, {', '.join(_AMP_TYPES)}")
    if amp == "fp16" and device.type == "cpu":
        raise TrainingError("amp='fp16' needs a GPU: use bf16, none or auto on a CPU")
    return _AMP_TYPES[amp]


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast to `dtype` on `device`; nothing where it is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
