"""Memory that a thread's convolutions use again: fresh memory takes as long as products."""

import math
import threading

import numpy as np
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


class _Lent(np.ndarray):
    """Memory that goes back to where it is lent from when the last tensor that looks into it is gone."""

    memory: Tensor | None = None
    lender: list[Tensor]

    def __del__(self) -> None:
        if self.memory is not None:  # a view of a view has none of its own
            self.lender.append(self.memory)


def lend(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory from a forward pass to its backward pass, to be saved as any tensor is.

    It goes to the next pass when autograd lets go of it, and the hooks of saved tensors, such as those of gradient
    checkpointing, see it.
    """
    free, size = scratch.free, _size(shape, dtype)
    fitting = [place for place, tensor in enumerate(free) if tensor.numel() >= size]
    if fitting:
        memory = free.pop(min(fitting, key=lambda place: free[place].numel()))
    else:
        free.clear()
        memory = _empty(size)
    # A tensor made from an array holds the array as long as its storage lives; of a storage itself nobody is told.
    lent: _Lent = memory.numpy().view(_Lent)
    lent.memory, lent.lender = memory, free
    with torch.inference_mode(False):
        return _view(torch.from_numpy(lent), shape, dtype)
