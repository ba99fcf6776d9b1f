"""Random numbers that depend on a key alone, such as (seed, epoch), and leave the global random states as they are."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["kept_random_state", "seed_all", "seeded_generator", "seeded_numpy"]


def _seed(key: tuple[int, ...]) -> int:
    """32 bits by the hash of the numbers.

    torch's CPU generator keeps no more of a seed, and a sum, say, would make epoch 1 of seed 0 the epoch 0 of seed 1.
    """
    digest = hashlib.sha256(",".join(str(int(number)) for number in key).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def seeded_generator(*key: int) -> torch.Generator:
    """Return a CPU generator that depends on all numbers of `key`."""
    return torch.Generator().manual_seed(_seed(key))


def seeded_numpy(*key: int) -> np.random.RandomState:
    """Return a generator of numpy that depends on all numbers of `key`; its numbers are the same in all versions."""
    return np.random.RandomState(_seed(key))


def seed_all(*key: int) -> None:
    """Seed the global generators on the CPU (random, numpy, torch) by all numbers of `key`."""
    seed = _seed(key)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed GPUs, too


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Put the global generators on the CPU back to where they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
