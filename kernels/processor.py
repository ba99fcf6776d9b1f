"""Which processor this is, and what it multiplies bfloat16 matrices with."""

import functools
import os
import platform
import re
from pathlib import Path

import torch

__all__ = ["family", "has_fast_vectors", "has_matrix_units", "is_zen5", "matrix_unit_problem"]


@functools.cache
def family() -> tuple[str, int]:
    """Vendor and family of an x86 processor, such as ('AuthenticAMD', 26) for Zen 5; ('', 0) where they are unknown."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = platform.processor()  # 'AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD' on Windows
    vendor, number = re.search("AuthenticAMD|GenuineIntel", text), re.search(r"(?i)family\s*:?\s*(\d+)", text)
    return (vendor[0], int(number[1])) if vendor and number else ("", 0)


def _isa_limit() -> str:
    """The instruction set that oneDNN is told to stay within, '' for none."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return "" if limit in ("ALL", "DEFAULT") else limit


def is_zen5() -> bool:
    """Whether this is an AMD processor with vector units of 512 bits, which are those from Zen 5 on, and oneDNN may use
    them."""
    vendor, number = family()
    return vendor == "AuthenticAMD" and number >= 26 and torch.backends.mkldnn.is_available() and not _isa_limit()


def has_fast_vectors() -> bool:
    """Whether bfloat16 is as fast as float32 or faster without matrix units: from Zen 5 on, 1.1 to 1.5 times as fast in
    recipes/results/precision-zen5-cpu.csv."""
    return is_zen5() and torch.cpu._is_avx512_bf16_supported()


@functools.cache
def matrix_unit_problem() -> str | None:
    """Say why bfloat16 matrices are not multiplied by matrix units (AMX) of this processor; None where they are.

    Where they are not, bfloat16 is slower than float32 on Intel's processors, even with vector instructions for it
    (avx512_bf16); measured in recipes/results/precision-cpu.csv. See :func:`has_fast_vectors` for AMD's. The matrix
    instructions of ARM (bfmmla, SME) have not been measured.
    """
    machine = platform.machine()
    if machine.lower() not in ("x86_64", "amd64"):
        return f"not measured on {machine or 'this processor'}"
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not features.get("amx_bf16", torch.cpu._is_amx_tile_supported()):
        vectors = torch.cpu._is_avx512_bf16_supported()
        return "no AMX, and avx512_bf16 alone is slower" if vectors else "the processor has no AMX"
    if not torch.backends.mkldnn.is_available():
        return "torch is built without oneDNN, which uses AMX"
    limit = _isa_limit()
    if limit and "AMX" not in limit:
        return f"ONEDNN_MAX_CPU_ISA={limit} keeps oneDNN from AMX"
    return None if torch.cpu._init_amx() else "the operating system does not let processes use AMX"


@functools.cache
def has_matrix_units() -> bool:
    """Whether bfloat16 matrices are multiplied by matrix units of this processor (AMX)."""
    return matrix_unit_problem() is None
