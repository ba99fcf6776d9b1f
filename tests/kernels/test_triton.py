"""The Triton kernels through Triton's interpreter, against the float64 reference.

The interpreter is chosen when a kernel is decorated, so each test is a process of its own.
"""
import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

COMPARE = """
import importlib, sys
import torch
import capszoo.kernels
reference = capszoo.kernels.reference
routing = importlib.import_module("capszoo.kernels.dynamic_routing")
squash = importlib.import_module("capszoo.kernels.squash")
B, T, P, K, J, D, R = map(int, sys.argv[1:8])
torch.manual_seed(0)

def close(ours, exact, bound):
    error = (ours.double() - exact).norm() / exact.norm().clamp_min(1e-30)
    assert error < bound, (error.item(), bound)

x, weight, bias = torch.randn(B, T * P, K) / 2, torch.randn(T, K, J, D) / 2, torch.randn(J, D) / 3
x[:, 0] = 0
for approximate in (False, True):
    v, sums = routing.dynamic_routing(x, weight, bias, R, approximate)
    assert sums.shape == (R, B, J, D)
    grad = torch.randn(B, J, D)
    grads = routing.dynamic_routing_backward(grad, x, weight, sums, approximate)
    inputs = [t.double().requires_grad_() for t in (x, weight, bias)]
    exact = reference.dynamic_routing(*inputs, R, approximate)
    close(v, exact.detach(), 1e-5)
    for ours, one in zip(grads, torch.autograd.grad(exact, inputs, grad.double())):
        close(ours, one, 1e-4)
    rows = x.double().requires_grad_()
    squashed = reference.squash(rows, approximate)
    close(squash.squash_forward(x, approximate), squashed.detach(), 1e-5)
    upstream = torch.randn_like(x)
    (exact_grad,) = torch.autograd.grad(squashed, rows, upstream.double())
    close(squash.squash_backward(upstream, x, approximate), exact_grad, 1e-4)
"""


@pytest.mark.parametrize(
    "sizes",
    [
        (3, 5, 1, 8, 10, 16, 3),
        (2, 2, 3, 4, 3, 5, 2),
        (1, 1, 1, 2, 1, 3, 1),
        (4, 3, 2, 8, 37, 16, 4),
        (0, 2, 1, 3, 4, 5, 3),
    ],
    ids=lambda sizes: "B{}-T{}-P{}-K{}-J{}-D{}-R{}".format(*sizes),
)
def test_kernels_equal_the_reference(sizes):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMPARE, *map(str, sizes)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
