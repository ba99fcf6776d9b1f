"""All tests that need a GPU run on a pretended one, so that a GPU's minutes are not spent on their errors."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent


def load_module():
    spec = importlib.util.spec_from_file_location("pretended_cuda", TESTS / "pretended_cuda.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pretended = load_module()


def run_on_pretended_gpu(*arguments):
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pretended_cuda", "-p", "no:cacheprovider", "-m", "gpu"]
    result = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    return result.returncode, result.stdout + result.stderr


def test_tests_that_need_a_gpu():
    files = [path for path in sorted(TESTS.rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    # Kernels are pretended as well: what chooses between them is run once.
    code, out = run_on_pretended_gpu(*files, "-k", "not per_class")
    assert code == 0, out
    # What libraries print at their end may follow.
    summary = [line for line in out.splitlines() if re.match(r"\d+ [a-z]+.* in [\d.]+s", line)][-1]
    counts = {name: int(count) for count, name in re.findall(r"(\d+) ([a-z]+)", summary)}
    # None is skipped.
    assert counts["passed"] > 50 and counts.keys() <= {"passed", "deselected", "warning", "warnings"}, out


def test_errors_of_such_tests_are_found(tmp_path):
    wrong = {
        "torch.randn(3, devise='cuda')": "got (int, devise=str)",
        "assert torch.ones(2, device='cuda').sum().item() == 3": "assert 2.0 == 3",
        "with torch.cuda.graph(torch.cuda.CUDAGraph()): torch.ones(1, device='cuda').item()": "not permitted",
    }
    tests = [f"@pytest.mark.gpu\ndef test_{place}():\n    {line}\n" for place, line in enumerate(wrong)]
    (tmp_path / "test_wrong.py").write_text("\n".join(["import pytest, torch", *tests]))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    code, out = run_on_pretended_gpu(tmp_path)
    assert code == 1 and "3 failed" in out and all(message in out for message in wrong.values()), out


def test_graph_leaves_nothing_behind_and_replays_into_its_own_memory():
    weight, count = torch.ones(3, requires_grad=True), torch.zeros(())
    graph = pretended.Graph()
    runs = []
    with pretended.capture(graph):
        runs.append("Python")
        weight.grad = None
        (weight * 2).square().sum().backward()
        with torch.no_grad():
            weight -= weight.grad / 8
        count += 1
        noise = torch.rand(2)
    assert weight.tolist() == [1] * 3 and count == 0
    gradient = weight.grad
    weight.grad = None  # as a step that is not captured leaves it
    graph.replay()
    assert weight.tolist() == [0] * 3 and count == 1 and gradient.tolist() == [8] * 3
    before = noise.clone()
    graph.replay()
    assert weight.tolist() == [0] * 3 and count == 2 and gradient.tolist() == [0] * 3
    assert runs == ["Python"] and not torch.equal(noise, before)


@pytest.mark.parametrize("read", [bool, float, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu])
def test_graph_does_not_wait_for_numbers(read):
    with pytest.raises(RuntimeError, match="not permitted"), pretended.capture(pretended.Graph()):
        read(torch.ones(()))
