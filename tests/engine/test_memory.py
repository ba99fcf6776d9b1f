"""capszoo.engine.memory: freed memory that stays with the process."""

import processes
import pytest

from capszoo.engine.memory import _glibc

FAULTS = """
import resource, sys
import torch
from capszoo.engine.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(12 << 20)  # 48 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(), faults(), faults(), keep_freed_memory(False), faults())
"""

pytestmark = pytest.mark.skipif(_glibc() is None, reason="needs glibc")


@pytest.mark.parametrize("variable, kept", [("1", True), ("0", False)])
def test_freed_memory_is_not_new_again(variable, kept, monkeypatch):
    monkeypatch.setenv("CAPSZOO_KEEP_MEMORY", variable)
    done = processes.run("-c", FAULTS)
    assert done.returncode == 0, done.stderr
    plain, said, _, again, said_plain, last = done.stdout.split()
    assert (said, said_plain) == (str(kept), "False")
    if int(plain) < 1000:
        pytest.skip("pages are large here")
    # What is given back is new once more; the heap may keep some of it, as glibc does by itself.
    assert (int(again) < int(plain) / 100) == kept and int(last) > int(plain) / 20
