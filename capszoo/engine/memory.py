"""Memory of the C library on a CPU: what a step frees stays with the process, and the next step takes it again."""

import contextlib
import ctypes
import functools
import os

import torch

__all__ = ["keep_freed_memory"]

# Options of glibc's mallopt, and its own values: a block of 32 MiB and more is the operating system's at once.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEEPING = {_MMAP_THRESHOLD: 2**30, _TRIM_THRESHOLD: 2**31 - 1}
_PLAIN = {_MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 64 * 2**20}


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, None where it is another."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version, library.mallopt, library.malloc_trim  # noqa: B018
        return library
    return None


_kept = False


def keep_freed_memory(keep: bool = True, device: torch.device | None = None) -> bool:
    """Let freed tensors stay with the process, for all of it, until this is called with False.

    glibc gives large blocks back to the operating system when they are freed, which clears them page by page when they
    are needed again, at every step. `CAPSZOO_KEEP_MEMORY=0` in the environment leaves glibc as it is.

    Args:
        keep: Whether to keep blocks of up to 1 GiB, and up to 2 GiB at the end of the heap. False gives back what is
            free.
        device: Where the tensors are, by default on a CPU; for those elsewhere nothing is changed.

    Returns:
        Whether freed memory stays with the process from now on.
    """
    global _kept
    library = _glibc()
    if device is not None and device.type != "cpu":
        return _kept
    if library is None or os.environ.get("CAPSZOO_KEEP_MEMORY", "1") == "0":
        return False
    if keep != _kept:
        done = [library.mallopt(option, value) for option, value in (_KEEPING if keep else _PLAIN).items()]
        if not keep:
            library.malloc_trim(0)
        _kept = keep and all(done)
    return _kept
