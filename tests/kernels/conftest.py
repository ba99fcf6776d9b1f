"""Tests in Triton's interpreter, which is chosen when a kernel is decorated: they run in another process."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def interpreted_files(request, tmp_path_factory):
    """What came of the tests of all files that ask for the interpreter, by the file's module, and what was printed."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("is the process that it starts")
    asking = [item for item in request.session.items if "interpreted_files" in item.fixturenames]
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", f"--junitxml={report}"]
    result = subprocess.run(
        [*command, *sorted({str(item.path) for item in asking})],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    # 1: some failed, which is the failure of their file's test.
    assert report.exists() and result.returncode in (0, 1), result.stdout + result.stderr
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes.setdefault(case.get("classname"), []).append(next((child.tag for child in case), "passed"))
    return outcomes, result


@pytest.fixture
def through_the_interpreter(request, interpreted_files):
    """Run the tests of the file that asks for this, in a process whose kernels are decorated for the interpreter."""
    outcomes, result = interpreted_files
    found = outcomes[".".join(request.path.relative_to(ROOT).with_suffix("").parts)]
    assert set(found) <= {"passed", "skipped"}, result.stdout + result.stderr
    if "passed" not in found:
        pytest.skip(result.stdout.strip().splitlines()[-2])


@pytest.fixture(scope="module")
def unwritten_memory_is_nan():
    """For files that compare numbers: a place that nothing was written to is seen."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def interpreted_loops():
    """Skip where the interpreter cannot run a loop of a kernel."""
    from capszoo.kernels import dispatch

    try:
        ones = (torch.ones([1] * dim) for dim in (3, 4, 2))
        dispatch.triton_routing.dynamic_routing(*ones, 1, False)
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
