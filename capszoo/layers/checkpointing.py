"""Gradient checkpointing of modules with BatchNorm, which must count a batch once although it sees it twice."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from timm.models import checkpoint
from torch import Tensor, nn

__all__ = ["checkpoint_once"]

# A compiled checkpoint leaves the statistics out of what it computes again; that of PyTorch 2.7 does not.
_COMPILED_COUNTS_ONCE = torch.__version__ >= "2.14"


@contextmanager
def _kept_statistics(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm count into copies of its statistics, which are then dropped."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, dict(norm._buffers)) for norm in norms]
    for norm, buffers in kept:
        norm._buffers.update({key: None if buffer is None else buffer.clone() for key, buffer in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in kept:
            norm._buffers.update(buffers)


@torch.jit.ignore
def checkpoint_once(module: nn.Module, x: Tensor) -> Tensor:
    """Compute a module again in the backward pass instead of keeping its maps; BatchNorm counts the batch once."""
    if torch.compiler.is_compiling():  # which takes no contexts
        return checkpoint(module, x, use_reentrant=False) if _COMPILED_COUNTS_ONCE else module(x)
    return checkpoint(module, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _kept_statistics(module)))
