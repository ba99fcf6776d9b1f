"""Tests in Triton's interpreter, which is chosen when a kernel is decorated: their file runs in another process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def through_the_interpreter(request):
    """Run the tests of the file that asks for this, in a process whose kernels are decorated for the interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("is the process that it starts")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(request.path)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    if " passed" not in result.stdout:
        pytest.skip(result.stdout.strip().splitlines()[-2])


@pytest.fixture(scope="session")
def interpreted_loops():
    """Skip where the interpreter cannot run a loop of a kernel."""
    from capszoo.kernels import ops

    try:
        ones = (torch.ones([1] * dim) for dim in (3, 4, 2))
        ops.triton_routing.dynamic_routing(*ones, 1, False)
    except Exception as error:
        if "only 0-dimensional arrays" not in str(error):
            raise
        import numpy
        import triton

        pytest.skip(f"the interpreter of Triton {triton.__version__} runs no loops with NumPy {numpy.__version__}")


@pytest.fixture(scope="module", params=["all_classes", "per_class"])
def form(request):
    """Each of the two forms of the routing kernels, as far as the numbers allow the first."""
    pytest.importorskip("triton")
    from capszoo.kernels import all_classes

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "per_class":
            patch.setattr(all_classes, "MAX_VOTES", 0)
        yield request.param
