"""Hostile files: whatever bytes a loader is given, it returns or says in one line what is wrong.

Each case is a file made hostile: bytes changed at random, or fields of its header or its text set to what an attacker
would write there. A loader may return, or raise an error of capszoo of one line; meanwhile it must run no code, open
no file outside the folder, take no more than `MEMORY` bytes and no longer than `SECONDS`.

`python tests/fuzz/harness.py LOADER COUNT SEED` runs one loader for long; the tests marked `slow` do so for all.
"""

import json
import linecache
import os
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from argparse import ArgumentTypeError
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from binaries import hostile_idx, hostile_image, hostile_matrix, hostile_tensors
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from loaders import LOADERS, tiny
from sound import make_sound
from texts import damage, hostile_json, hostile_table, hostile_text, hostile_value

from capszoo.checkpoint import save_weights

ROOT = Path(__file__).parents[2]
MEMORY = 3 << 30  # the largest image that PIL reads takes about 1.5 GiB
SECONDS = 20  # parsing the longest YAML takes 5 on an idle core


class Forbidden(BaseException):
    """What a loader did and must not; no `except Exception` hides it."""


_watched: list[Path] = []
_crimes: list[str] = []
_OURS = [os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, ROOT, "/proc", "/sys", os.devnull)]
_PROGRAMS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn")
_OTHERS = ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "ctypes.dlopen", "shutil.rmtree")


def _audit(event: str, args: tuple) -> None:
    if not _watched:
        return
    crime = ""
    if event in _PROGRAMS or event in _OTHERS:
        crime = f"{event} {args!r}"
    elif event in ("open", "os.listdir", "os.scandir", "os.remove", "os.rename") and isinstance(args[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(args[0]))
        if not any(os.path.commonpath([path, str(folder)]) == str(folder) for folder in (_watched[0], *_OURS)):
            crime = f"{event} {path}"
    if crime:
        _crimes.append(crime)
        raise Forbidden(crime)


sys.addaudithook(_audit)


@contextmanager
def limits():
    """Bound the memory of this process, so that an allocation without bound fails at once."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _too_long(number, frame):
    raise Forbidden(f"more than {SECONDS} seconds")


def attempt(loader: str, folder: Path, data: bytes) -> str:
    """Give data to a loader; return 'result' or the type of the error, and raise if it did what it must not."""
    _crimes.clear()
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    _watched.append(folder)
    try:
        LOADERS[loader](folder, data)
        outcome = "result"
    except (ValueError, ArgumentTypeError) as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        text, cause = str(error), error
        while cause is not None:  # no error that stands for an allocation that failed
            assert not isinstance(cause, MemoryError) and "llocate" not in str(cause), repr(cause)
            cause = cause.__cause__ or cause.__context__
        assert len(text.splitlines()) == 1, text
        trace = error.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        frame = trace.tb_frame
        line = linecache.getline(frame.f_code.co_filename, trace.tb_lineno)
        # Not one of Python's own that passed through.
        ours = frame.f_globals.get("__name__", "").startswith("capszoo") and line.strip().startswith("raise")
        if not ours or not (
            type(error).__module__.startswith("capszoo") or type(error) in (ValueError, ArgumentTypeError)
        ):
            raise
        outcome = type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        _watched.clear()
    assert not _crimes, _crimes
    return outcome


# One integer draws a case and the generator makes it: ten times as fast as drawing each choice, and as many shapes.
cases = st.integers(0, 2**64 - 1)
HOSTILE = {
    **dict.fromkeys(("checkpoint", "state", "model", "pretrained"), hostile_tensors),
    **dict.fromkeys(("folder", "table"), hostile_json),
    **dict.fromkeys(("config", "resume"), hostile_text),
    "key_value": hostile_value,
    "results": hostile_table,
    "labels": hostile_table,
    "timings": hostile_table,
    "recipe": hostile_text,
    "card": lambda data, rng: data[:1] + (hostile_tensors if data[0] else hostile_json)(data[1:], rng),
    "pruning": lambda data, rng: (
        data[:1] + (hostile_json, hostile_tensors, hostile_table, hostile_json)[data[0]](data[1:], rng)
    ),
    "mnist": hostile_idx,
    "norb": hostile_matrix,
    "images": hostile_image,
}


def make_case(loader: str, seeds: list[bytes], number: int) -> bytes:
    """The case of a number: mostly a file with hostile fields, else damaged bytes, or both."""
    rng = random.Random(number)
    data, job = rng.choice(seeds), rng.random()
    if loader in HOSTILE and job < 0.8:
        data = HOSTILE[loader](data, rng)
    if loader not in HOSTILE or job > 0.75:
        data = damage(data, rng)
    return data


@contextmanager
def place(loader: str):
    """A folder of its own within one that holds what no case may reach; the contents of sound files."""
    with tempfile.TemporaryDirectory() as outer:
        outer = Path(outer).resolve()
        (outer / "folder").mkdir()
        seeds = make_sound(loader, outer / "folder")
        (outer / "canary").write_text("model: capsnet\n")
        save_weights(outer / "canary.safetensors", tiny(), {"model": "capsnet_tiny"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for data in seeds:  # sound as they are, and whatever is loaded late is loaded
                attempt(loader, outer / "folder", data)
            yield outer / "folder", seeds
        assert not list(outer.rglob("mark")), "code of a pickle ran"


def fuzz(loader: str, count: int, number: int = 0) -> tuple[Counter, float]:
    """Run `count` cases; return how often each outcome came, and the seconds of the slowest."""
    outcomes, slowest = Counter(), 0.0
    with place(loader) as (folder, seeds), limits():

        @seed(number)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(cases)
        def check(case):
            nonlocal slowest
            data = make_case(loader, seeds, case)
            start = time.perf_counter()
            outcomes[attempt(loader, folder, data)] += 1
            slowest = max(slowest, time.perf_counter() - start)

        check()
    return outcomes, slowest


if __name__ == "__main__":
    loader, count, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    start = time.perf_counter()
    outcomes, slowest = fuzz(loader, count, number)
    seconds = round(time.perf_counter() - start, 1)
    facts = {"loader": loader, "seed": number, "cases": outcomes.total(), "seconds": seconds}
    print(json.dumps({**facts, "slowest": round(slowest, 2), **outcomes}))
