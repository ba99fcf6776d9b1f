"""Several processes that train one network: `torchrun --nproc-per-node 2 recipes/train.py ...`.

Each process (rank) holds the whole network and the whole data set, and takes its share of every batch; torch's
DistributedDataParallel adds the gradients up. Batch sizes are those of all ranks together, so a policy means the
same for any number of them, and a run ends with the same weights, to rounding, on one rank as on four. The networks of
this zoo have some million parameters: sharding them (FSDP) would save nothing.
"""

import gc
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from capszoo.errors import RanksError, first_line

__all__ = ["ALONE", "Ranks", "RanksError", "is_lost_connection", "join_ranks", "leave_ranks", "reach", "wait_for"]

# Waiting longer for another rank than this, it is taken for dead; torchrun then starts the ranks again.
_TIMEOUT = timedelta(minutes=10)
_LONG_TIMEOUT = timedelta(hours=12)
# Ranks ask each other so often whether one of them shall stop; each question waits for the slowest.
STEPS_BETWEEN_QUESTIONS = 10
# Where processes meet that do not work at the same pace.
_store: dist.Store | None = None


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: Its number, from 0; rank 0 alone writes and prints.
        count: Number of processes, over all machines.
        local_rank: Its number on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """This rank's part of `total` things; parts differ by one thing at most."""
        return slice(total * self.rank // self.count, total * (self.rank + 1) // self.count)

    def sum_(self, *tensors: Tensor) -> None:
        """Add tensors up over all ranks, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest of all ranks' tensors, in place, element by element."""
        if self.count > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def gather(self, rows: Tensor) -> Tensor:
        """All ranks' rows, one below the other; each may have another number of them."""
        if self.count == 1:
            return rows
        counts = torch.zeros(self.count, dtype=torch.int64, device=rows.device)
        counts[self.rank] = len(rows)
        self.sum_(counts)
        begin, total = int(counts[: self.rank].sum()), int(counts.sum())
        whole = rows.new_zeros(total, *rows.shape[1:])
        whole[begin : begin + len(rows)] = rows
        self.sum_(whole)
        return whole

    def any(self, flag: bool, device: torch.device | str = "cpu") -> bool:
        """Whether `flag` is true on any rank; waits for all of them."""
        if self.count == 1:
            return flag
        answer = torch.tensor(int(flag), device=device)
        dist.all_reduce(answer)
        return bool(answer)

    def share_bytes(self, data: bytes | None, device: torch.device | str = "cpu") -> bytes | None:
        """Give all ranks what the first one has; None if it has nothing."""
        if self.count == 1:
            return data
        size = torch.tensor(-1 if data is None else len(data), device=device)
        dist.broadcast(size, 0)
        if size < 0:
            return None
        content = torch.empty(int(size), dtype=torch.uint8, device=device)
        if data is not None:  # on the first rank
            content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(content, 0)
        return content.cpu().numpy().tobytes()


ALONE = Ranks()


class StopVote:
    """Several ranks must stop after the same step, and agree on it now and then: every second at least."""

    def __init__(self, ranks: Ranks, device: torch.device | str = "cpu"):
        self.ranks, self.device = ranks, device
        self._steps_asked = self._steps_to_question = 1
        self._last_question = time.monotonic()

    def __call__(self, should_stop: Callable[[], bool]) -> bool:
        """Asked after each step: whether all ranks stop after this one."""
        if self.ranks.count == 1:
            return should_stop()
        self._steps_to_question -= 1
        if self._steps_to_question:
            return False
        now = time.monotonic()
        pace, self._last_question = now - self._last_question, now
        answers = torch.tensor([float(should_stop()), pace / self._steps_asked], device=self.device)
        stop, seconds = self.ranks.max_(answers).tolist()
        self._steps_asked = self._steps_to_question = max(1, min(STEPS_BETWEEN_QUESTIONS, int(1 / max(seconds, 1e-9))))
        return bool(stop)


def join_ranks(device: str, environment: Mapping[str, str] = os.environ) -> tuple[Ranks, torch.device | None]:
    """Join the processes that torchrun started; alone where it did not.

    Args:
        device: 'auto', or the name of a kind of device: 'cpu' joins with gloo, 'cuda' with NCCL.
        environment: Where torchrun tells the ranks.

    Returns:
        The ranks, and this rank's device; None where there is one process, which chooses its device itself.

    Raises:
        RanksError: If torchrun started more processes on this machine than it has GPUs, or one of its variables is
            missing, or a device is named that all ranks would share.
    """
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        return ALONE, None
    try:
        ranks = Ranks(*(int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    except KeyError as error:
        raise RanksError(f"WORLD_SIZE is set, but {error.args[0]} is not: start the processes with torchrun") from None
    if ":" in device:
        raise RanksError(f"--device {device} is one device for {ranks.count} processes: give cuda, cpu or auto")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind not in ("cpu", "cuda"):
        raise RanksError(f"--device {device} is none that several processes can train on: give cuda, cpu or auto")
    if kind == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            raise RanksError(
                f"process {ranks.local_rank + 1} of this machine has no GPU (there are {torch.cuda.device_count()}): "
                f"start fewer, or give --device cpu"
            )
        torch.cuda.set_device(ranks.local_rank)
    backend = "nccl" if kind == "cuda" else "gloo"
    global _store
    try:
        store, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.count, timeout=_TIMEOUT))
        _store = _unused_part(store, ranks)
        dist.init_process_group(backend, store=_store, rank=ranks.rank, world_size=ranks.count, timeout=_TIMEOUT)
    except RanksError:
        raise
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise RanksError(f"the other processes cannot be reached ({reason}): start all of them with torchrun") from None
    return ranks, torch.device(kind, ranks.local_rank) if kind == "cuda" else torch.device(kind)


def _unused_part(store: dist.Store, ranks: Ranks) -> dist.Store:
    """A part of the store in which the processes of an earlier start have left nothing.

    torchrun keeps one store over all its restarts. gloo would find the addresses there of processes that have ended,
    and torchrun's count of restarts is not the same on all machines. So the first rank names a part, and the others
    take the name only from one that has read what they have just written.
    """
    end = time.monotonic() + _TIMEOUT.total_seconds()

    def pause() -> None:
        if time.monotonic() > end:
            raise RanksError(f"process {ranks.rank} has waited {_TIMEOUT} for the others: start all of them anew")
        time.sleep(0.02)

    own = uuid.uuid4().hex
    if not ranks.is_first:
        store.set(f"hello/{ranks.rank}", own)
        words: list[str] = []
        while own not in words[1:]:
            pause()
            words = store.get("welcome").decode().split() if store.check(["welcome"]) else []
        store.set(f"{words[0]}/{ranks.rank}", "here")
        return dist.PrefixStore(words[0], store)
    others = range(1, ranks.count)
    while not all(store.check([f"{own}/{rank}"]) for rank in others):
        heard = [store.get(f"hello/{rank}").decode() for rank in others if store.check([f"hello/{rank}"])]
        store.set("welcome", " ".join([own, *heard]))
        pause()
    return dist.PrefixStore(own, store)


def reach(point: str, ranks: Ranks) -> None:
    """Tell the others that this process has come to a point of its work."""
    if ranks.count > 1:
        _meeting_place().set(f"reached/{point}/{ranks.rank}", "")


def wait_for(point: str, ranks: Ranks, others: Iterable[int]) -> None:
    """Wait until others have come to a point, for as long as downloads and large data sets may take.

    Args:
        point: Its name, as they gave it to `reach`.
        ranks: This process.
        others: Numbers of those to wait for.
    """
    if ranks.count > 1:
        _meeting_place().wait([f"reached/{point}/{rank}" for rank in others], _LONG_TIMEOUT)


def _meeting_place() -> dist.Store:
    if _store is None:
        raise RanksError("the processes have not met: call join_ranks first")
    return _store


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error of torch says that another process is not there any more."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def leave_ranks() -> None:
    """Part from the other processes, if there are any; call it again once the trainer is out of use."""
    global _store
    _store = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and sys.exc_info()[0] is None:
        # The threads of gloo end with the last reference to the group. A trainer, a cycle, holds one in its
        # DistributedDataParallel; threads that still free tensors when the interpreter ends would abort the process.
        # An error on its way holds the trainer by its traceback, and torchrun may not wait until it is printed.
        gc.collect()
