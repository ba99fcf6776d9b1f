"""Memory that a thread's convolutions use again: fresh memory takes as long as products."""

import math
import threading

import torch
from torch import Tensor


def _empty(size: int) -> Tensor:
    with torch.inference_mode(False):  # or it could not be written outside of inference mode
        return torch.empty(size, dtype=torch.float32, device="cpu")  # whatever the defaults are


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Numbers of float32 that take the memory of these."""
    return -(-math.prod(shape) * dtype.itemsize // 4)


def _view(memory: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return memory[: _size(shape, dtype)].view(dtype)[: math.prod(shape)].view(shape)


class Scratch(threading.local):
    """Memory for what a call throws away, kept for the next."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self.free: list[Tensor] = []
        self.weights: object | None = None
        """What `kept` holds of a convolution's kernels, see fourier_conv.py."""

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size = _size(shape, dtype)
        if name not in self.kept or self.kept[name].numel() < size:
            self.kept[name] = _empty(size)
        return _view(self.kept[name], shape, dtype)


scratch = Scratch()


def scratch_bytes() -> int:
    """Bytes that this thread keeps for its next convolution; a forward pass that waits for its backward pass has its
    loan beside them."""
    return 4 * sum(tensor.numel() for tensor in [*scratch.kept.values(), *scratch.free])


def release_scratch() -> None:
    """Give back what this thread keeps for its next convolution."""
    scratch.kept.clear()
    scratch.free.clear()
    scratch.weights = None


class Loan:
    """Memory from a forward pass to its backward pass, which goes back to the next when the graph is freed."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32):
        self._free, size = scratch.free, _size(shape, dtype)
        fitting = [place for place, tensor in enumerate(self._free) if tensor.numel() >= size]
        if fitting:
            memory = self._free.pop(min(fitting, key=lambda place: self._free[place].numel()))
        else:
            self._free.clear()
            memory = _empty(size)
        self.tensor = _view(memory, shape, dtype)
        self._memory = memory

    def __del__(self) -> None:
        if hasattr(self, "_memory"):  # there may have been none
            self._free.append(self._memory)
