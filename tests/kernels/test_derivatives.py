"""Derivatives of every order and mode through the operators, against the reference differentiated in reverse alone.

That the reference has the right derivatives is for test_reference.py to say.
"""

import subprocess
import sys
from functools import partial

import pytest
import torch
from derivatives import DERIVATIVES, DIRECTION, X, draw
from torch.autograd import forward_ad

from capszoo import kernels, layers
from capszoo.kernels import reference

WEIGHT, BIAS = (2, 3, 2, 3), (2, 3)


def operator_squash(x, approximate=False):
    return torch.ops.capszoo.squash(x, approximate)


def operator_routing(x, weight, bias, num_iters=3, approximate=False):
    return torch.ops.capszoo.dynamic_routing(x, weight, bias, num_iters, approximate)[0]


SQUASHES = {"kernels": kernels.squash, "layers": layers.squash, "operator": operator_squash}
ROUTINGS = {"kernels": kernels.dynamic_routing, "layers": layers.dynamic_routing, "operator": operator_routing}
every_way_to_call = pytest.mark.parametrize("called", SQUASHES)
both_variants = pytest.mark.parametrize("approximate", [False, True])


WEIGHTS, BIASES = draw(*WEIGHT, seed=1), draw(*BIAS, seed=2)


def capsules(squash, routing, approximate=False):
    """Class capsules of x by two operators in a row, so that what one gives back the other differentiates."""
    return lambda x: routing(squash(2 * x, approximate), WEIGHTS, BIASES, 3, approximate)


@every_way_to_call
@both_variants
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name, approximate, called):
    if called == "operator" and ("dual" in name or name == "linearize"):
        pytest.skip("test_operators_refuse_tangents")
    derivative, of_the_reference = DERIVATIVES[name]
    found = derivative(capsules(SQUASHES[called], ROUTINGS[called], approximate), draw(*X))
    expected = of_the_reference(capsules(reference.squash, reference.dynamic_routing, approximate), draw(*X))
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@both_variants
def test_by_all_inputs(approximate):
    """Also those of which one alone needs a gradient, and the gradient of the output itself."""
    inputs = [t.requires_grad_() for t in (draw(2, 4, 2), draw(2, 2, 2, 2, seed=1), draw(2, 2, seed=2))]
    route = partial(kernels.dynamic_routing, num_iters=2, approximate_squash=approximate)
    assert torch.autograd.gradgradcheck(route, inputs)
    assert torch.autograd.gradgradcheck(partial(kernels.squash, approximate=approximate), inputs[0])
    for i, chosen in enumerate(inputs):
        others = [t.detach() for t in inputs]
        assert torch.autograd.gradgradcheck(lambda t, i=i, o=others: route(*o[:i], t, *o[i + 1 :]), chosen)

    x, grad = draw(3, 2), draw(3, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda grad: torch.ops.capszoo.squash_backward(grad, x, approximate), grad)


@both_variants
def test_opcheck_of_the_backward_operators(approximate):
    tensors = draw(*X), WEIGHTS, BIASES, draw(2, 2, 3)
    x, weight, bias, grad = (t.detach().to(torch.float32, copy=True).requires_grad_() for t in tensors)
    _, sums = torch.ops.capszoo.dynamic_routing(x, weight, bias, 2, approximate)
    arguments = grad, x, weight, bias, sums.detach(), approximate, False
    torch.library.opcheck(torch.ops.capszoo.dynamic_routing_backward, arguments)
    other = x.detach().clone().requires_grad_()
    torch.library.opcheck(torch.ops.capszoo.squash_backward, (other, x, approximate))


@both_variants
def test_backward_operators_under_transforms(approximate):
    grad, x = draw(2, 2, 3), draw(*X)
    _, sums = torch.ops.capszoo.dynamic_routing(x, WEIGHTS, BIASES, 2, approximate)

    def back(grad):
        return torch.ops.capszoo.dynamic_routing_backward(grad, x, WEIGHTS, BIASES, sums, approximate, False)

    for found, expected in zip(torch.vmap(back)(torch.stack([grad, -grad])), back(grad), strict=True):
        torch.testing.assert_close(found, torch.stack([expected, -expected]), rtol=1e-9, atol=1e-12)
    for found, expected in zip(torch.func.jvp(back, (grad,), (2 * grad,))[1], back(grad), strict=True):
        torch.testing.assert_close(found, 2 * expected, rtol=1e-9, atol=1e-12)  # linear in grad


def test_mixed_dtypes_and_autocast():
    """Second derivatives have the dtypes of their inputs, and autocast does not lower them."""
    tensors = draw(*X).bfloat16(), WEIGHTS.float(), BIASES.float()

    def second(route, inputs):
        inputs = [t.detach().requires_grad_() for t in inputs]
        gradients = torch.autograd.grad(route(*inputs).sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.double().square().sum() for g in gradients), inputs)

    results = second(kernels.dynamic_routing, tensors)
    assert [t.dtype for t in results] == [torch.bfloat16, torch.float32, torch.float32]
    with torch.autocast("cpu", torch.bfloat16):
        again = second(kernels.dynamic_routing, tensors)
        forward = torch.func.jvp(kernels.squash, (WEIGHTS.float(),), (WEIGHTS.float(),))
    assert all(torch.equal(*pair) for pair in zip(results, again, strict=True))
    expected = second(reference.dynamic_routing, [t.double() for t in tensors])
    for found, exact in zip(results, expected, strict=True):
        assert (found.double() - exact).norm() <= 0.02 * exact.norm()
    assert forward[1].dtype == torch.float32


def test_memory_that_lies_elsewhere():
    """Hooks that move saved tensors (offloading, checkpoints) see those of the second pass too."""
    moved = []
    x = draw(*X).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: moved.append(t) or t, lambda t: t):
        (g,) = torch.autograd.grad(kernels.squash(x).sin().sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(g.square().sum(), x)
    (g,) = torch.autograd.grad(reference.squash(x).sin().sum(), x, create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(g.square().sum(), x)[0])
    assert moved


@pytest.mark.parametrize("transform", ["jvp", "vmap of grad"])
def test_compiled_transforms(transform):
    derivative, of_the_reference = DERIVATIVES[transform]
    function = capsules(kernels.squash, kernels.dynamic_routing)
    torch._dynamo.reset()
    compiled = torch.compile(partial(derivative, function), fullgraph=True, backend="aot_eager")
    expected = of_the_reference(capsules(reference.squash, reference.dynamic_routing), draw(*X))
    torch.testing.assert_close(compiled(draw(*X)), expected, rtol=1e-9, atol=1e-12)


def test_compiled_and_exported_graphs_call_each_operator_once():
    class Capsules(torch.nn.Module):
        def forward(self, x, weight, bias):
            return kernels.dynamic_routing(kernels.squash(x), weight, bias)

    def count(graph):
        targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        assert sum("capszoo" in target for target in targets) == 2 and len(targets) <= 4, targets
        return [sum(name in target for target in targets) for name in ("capszoo.squash", "capszoo.dynamic_routing")]

    graphs = []

    def backend(module, inputs):
        graphs.append(module.graph)
        return module

    torch._dynamo.reset()
    inputs = draw(*X), WEIGHTS, BIASES
    torch.compile(Capsules(), fullgraph=True, backend=backend)(*inputs)
    for strict in (False, True):
        graphs.append(torch.export.export(Capsules(), inputs, strict=strict).graph)
    assert [count(graph) for graph in graphs] == [[1, 1]] * 3


@pytest.mark.parametrize("requires_grad", [False, True])
def test_operators_refuse_tangents(requires_grad):
    """As scripts and exported programs call them, they would drop them in silence."""
    message = "jvp" if requires_grad else "its function in capszoo.kernels, or script and export with"
    with forward_ad.dual_level():
        x = forward_ad.make_dual(draw(*X).requires_grad_(requires_grad), DIRECTION)
        with pytest.raises(NotImplementedError, match=message):
            operator_squash(x)
        with pytest.raises(NotImplementedError, match=message):
            operator_routing(x, WEIGHTS, BIASES)
    x = draw(*X).requires_grad_()
    v = kernels.squash(x)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="it cannot pass on"):
        torch.autograd.grad(v, x, forward_ad.make_dual(DIRECTION, DIRECTION))


def test_a_torch_without_the_key_of_transforms():
    """Nothing may be wrong in silence, should torch rename it."""
    code = """
import torch
del torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode
from capszoo.kernels import dynamic_routing, reference, squash
x, t = torch.randn(2, 3, 4)
for function, exact in ((squash, reference.squash),):
    assert torch.allclose(torch.func.jvp(function, (x,), (t,))[1], torch.func.jvp(exact, (x,), (t,))[1])
    assert torch.allclose(torch.vmap(function)(x), exact(x))
    try:
        torch.func.grad(lambda x: function(x).sum())(x)
    except RuntimeError:
        print("refused")
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["refused"], result.stderr
