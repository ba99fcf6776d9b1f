"""The registered operators: dtypes, autograd, compilation, export, scripts, and the messages for wrong inputs."""

import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capszoo.kernels import dispatch, dynamic_routing, ops, reference, squash


def make_inputs(B=3, T=3, P=2, K=4, J=5, D=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (B, T * P, K), (T, K, J, D), (J, D)
    return [(torch.randn(shape, generator=generator) / 2).to(dtype).requires_grad_() for shape in shapes]


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def with_gradients(function, inputs, **options):
    """The output and the gradients of its product with fixed numbers."""
    v = function(*inputs, **options)
    numbers = torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(v.device)
    return v, *torch.autograd.grad((v.double() * numbers).sum(), inputs)


class Capsules(torch.nn.Module):
    def __init__(self, approximate: bool):
        super().__init__()
        self.approximate = approximate
        _, weight, bias = make_inputs()
        self.weight, self.bias = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(bias.detach())

    def forward(self, x):
        return dynamic_routing(squash(x, self.approximate), self.weight, self.bias, 3, self.approximate)


@pytest.mark.parametrize("approximate", [False, True])
def test_gradcheck(approximate):
    x, weight, bias = make_inputs(B=2, T=2, P=2, K=2, J=3, D=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: squash(x, approximate), x)
    assert torch.autograd.gradcheck(lambda *t: dynamic_routing(*t, 3, approximate), (x, weight, bias))


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
def test_dtypes(dtype, bound):
    inputs = make_inputs(B=5, T=96, P=1, K=8, J=10, D=16, dtype=dtype)
    results = with_gradients(dynamic_routing, inputs)
    assert all(result.dtype == dtype for result in results)
    expected = with_gradients(reference.dynamic_routing, [t.detach().double().requires_grad_() for t in inputs])
    assert all(error(*pair) <= bound for pair in zip(results, expected, strict=True))

    v, dx = with_gradients(squash, inputs[:1])
    assert v.dtype == dx.dtype == dtype
    expected = with_gradients(reference.squash, [inputs[0].detach().double().requires_grad_()])
    assert error(v, expected[0]) <= bound and error(dx, expected[1]) <= bound


def test_mixed_dtypes_compute_in_the_wider_one():
    x, weight, bias = make_inputs()
    x = x.detach().bfloat16().requires_grad_()
    results = with_gradients(dynamic_routing, (x, weight, bias))
    assert [result.dtype for result in results] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = with_gradients(reference.dynamic_routing, exact)
    assert error(results[2], expected[2]) <= 1e-6 and error(results[3], expected[3]) <= 1e-6


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_does_not_lower_the_precision(half):
    inputs = make_inputs()
    expected, squashed = with_gradients(dynamic_routing, inputs), squash(inputs[0])
    with torch.autocast("cpu", dtype=half):
        results = with_gradients(dynamic_routing, inputs)
        assert torch.equal(squash(inputs[0]), squashed)
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_kernels_of_a_device_are_kept_from_autocast():
    """Also those of a GPU, whose launchers make some of their sums by PyTorch's own operators."""

    @dispatch.kernel
    def product(x):
        return x @ x

    x = torch.rand(5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            product(x[:2])
        assert torch.is_autocast_enabled("cpu")


def test_non_contiguous_inputs():
    inputs = make_inputs()
    expected = with_gradients(dynamic_routing, inputs)
    # The same values with the last two dimensions stored the other way round, then one row of the bias for all classes.
    transposed = [t.detach().mT.contiguous().mT.requires_grad_() for t in inputs]
    assert not any(t.is_contiguous() for t in transposed)
    for result, exact in zip(with_gradients(dynamic_routing, transposed), expected, strict=True):
        assert result.is_contiguous()
        torch.testing.assert_close(result, exact)
    torch.testing.assert_close(squash(transposed[0]), squash(inputs[0]))
    assert squash(transposed[0]).is_contiguous()

    x, weight, bias = inputs
    row = bias[:1].expand_as(bias)
    torch.testing.assert_close(dynamic_routing(x, weight, row), dynamic_routing(x, weight, row.contiguous()))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(0, 3) for _ in range(6))),
    num_iters=st.integers(1, 3),
    approximate=st.booleans(),
)
@example((0, 2, 2, 3, 2, 3), 3, False)  # no sample
@example((2, 0, 2, 3, 2, 3), 3, False)  # no type
@example((2, 2, 0, 3, 2, 3), 3, True)  # no capsule of a type
@example((2, 2, 2, 0, 2, 3), 1, False)  # capsules of no numbers
@example((2, 2, 2, 3, 0, 3), 3, False)  # no class
@example((2, 2, 2, 3, 2, 0), 3, False)  # class capsules of no numbers
def test_sizes_of_zero(sizes, num_iters, approximate):
    """One meaning for all: what is summed over nothing is the bias. Outputs, gradients and second derivatives."""
    inputs = make_inputs(*sizes, dtype=torch.float64)
    options = {"num_iters": num_iters, "approximate_squash": approximate}
    results, expected = (with_gradients(f, inputs, **options) for f in (dynamic_routing, reference.dynamic_routing))
    for result, exact in zip(results, expected, strict=True):
        assert result.is_contiguous()
        torch.testing.assert_close(result, exact)
    B, T, P, K, J, D = sizes
    if 0 in (T, P, K):
        torch.testing.assert_close(results[0], squash(inputs[2], approximate).expand(B, J, D))
    for found, input in zip(with_gradients(dynamic_routing, [t.to("meta") for t in inputs]), results, strict=True):
        assert found.is_meta and found.shape == input.shape and found.dtype == input.dtype

    x = inputs[0]
    results, expected = (with_gradients(partial(f, approximate=approximate), [x]) for f in (squash, reference.squash))
    torch.testing.assert_close(results, expected)
    for function in partial(dynamic_routing, **options), lambda x, *_: squash(x, approximate):
        gradients = torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True, materialize_grads=True)
        total = sum(gradient.square().sum() for gradient in gradients)
        second = torch.autograd.grad(total, inputs, materialize_grads=True) if total.requires_grad else inputs
        assert all(s.isfinite().all() and s.shape == t.shape for s, t in zip(second, inputs, strict=True))


def test_sizes_of_zero_never_reach_triton(monkeypatch):
    monkeypatch.setattr(ops, "runs_triton", lambda device, dtype: pytest.fail("asks for Triton"))
    for zero in range(6):
        x, weight, bias = (t.detach() for t in make_inputs(*(0 if i == zero else 2 for i in range(6))))
        v, sums = ops._routing_cuda(x, weight, bias, 2, False)
        grads = ops._routing_backward_cuda(v, x, weight, bias, sums, False, False)
        assert [t.shape for t in grads] == [x.shape, weight.shape, bias.shape]


def test_an_input_that_needs_no_gradient():
    x, weight, bias = make_inputs()
    expected = torch.autograd.grad(dynamic_routing(x, weight, bias).sum(), weight)
    results = torch.autograd.grad(dynamic_routing(x.detach(), weight, bias.detach()).sum(), weight)
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("per_type, dtype", [(2, torch.float32), (1, torch.bfloat16)])
def test_opcheck(per_type, dtype, approximate):
    inputs = make_inputs(P=per_type, dtype=dtype)
    torch.library.opcheck(torch.ops.capszoo.dynamic_routing, (*inputs, 3, approximate))
    torch.library.opcheck(torch.ops.capszoo.squash, (inputs[0], approximate))
    columns = inputs[0].detach().transpose(0, 2).requires_grad_()
    torch.library.opcheck(torch.ops.capszoo.squash, (columns, approximate))


@pytest.mark.parametrize("approximate", [False, True])
def test_compile_without_graph_breaks(approximate):
    module, (x, _, _) = Capsules(approximate), make_inputs()
    inputs = x, *module.parameters()
    expected = module(x), *torch.autograd.grad(module(x).sum(), inputs)
    compiled = torch.compile(module, fullgraph=True)
    results = compiled(x), *torch.autograd.grad(compiled(x).sum(), inputs)
    for result, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-6, atol=1e-6)


def test_export_with_any_batch_size():
    module = Capsules(False)
    program = torch.export.export(module, (make_inputs()[0],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert "capszoo.dynamic_routing" in str(program.graph)
    x = make_inputs(B=11)[0]
    torch.testing.assert_close(program.module()(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_script_and_its_file(approximate, tmp_path):
    module, (x, _, _) = Capsules(approximate), make_inputs()
    torch.jit.save(torch.jit.script(module), tmp_path / "capsules.pt")
    loaded = torch.jit.load(tmp_path / "capsules.pt")
    torch.testing.assert_close(loaded(x), module(x), rtol=0, atol=0)
    expected = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(loaded(x).sum(), x), expected, rtol=0, atol=0)


def test_symbolic_trace():
    module, (x, _, _) = Capsules(True), make_inputs()
    traced = torch.fx.symbolic_trace(module)
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [squash, dynamic_routing]
    assert torch.equal(traced(x), module(x))


def test_subclasses_and_modes_of_torch_functions():
    class Labelled(torch.Tensor):
        pass

    x, weight, bias = (t.detach() for t in make_inputs())
    expected = dynamic_routing(squash(x), weight, bias)
    found = dynamic_routing(squash(x.as_subclass(Labelled)), weight, bias)
    assert type(found) is Labelled and torch.equal(found.as_subclass(torch.Tensor), expected)
    with torch.device("cpu"):
        assert torch.equal(dynamic_routing(squash(x), weight, bias), expected)
        compiled = torch.compile(lambda x: dynamic_routing(squash(x), weight, bias), fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), expected)


def test_shapes_on_the_meta_device():
    x, weight, bias = (t.to("meta") for t in make_inputs())
    v = dynamic_routing(squash(x), weight, bias)
    assert v.is_meta and v.shape == (3, 5, 7) and v.dtype == x.dtype


def test_vmap():
    inputs = [torch.stack([t, 2 * t]).detach() for t in make_inputs()]
    v = torch.vmap(dynamic_routing)(*inputs)
    torch.testing.assert_close(v, torch.stack([dynamic_routing(*t) for t in zip(*inputs, strict=True)]))


X, WEIGHT, BIAS = (3, 6, 4), (3, 4, 5, 7), (5, 7)


@pytest.mark.parametrize(
    "x, weight, bias, message",
    [
        ((6, 4), WEIGHT, BIAS, "x must have shape [B, I, K], but it has 2 dimensions"),
        (X, (4, 5, 7), BIAS, "weight must have shape [T, K, J, D], but it has 3 dimensions"),
        ((3, 6, 8), WEIGHT, BIAS, "x has capsules of K=8 numbers, weight takes K=4"),
        (X, (4, 4, 5, 7), BIAS, "weight has T=4 types, which does not divide the I=6 capsules of x"),
        (X, (12, 4, 5, 7), BIAS, "weight has T=12 types, which does not divide the I=6 capsules of x"),
        (X, (0, 4, 5, 7), BIAS, "weight has T=0 types, which does not divide the I=6 capsules of x"),
        (X, WEIGHT, (7, 5), "bias has shape [7, 5], weight needs [J, D] = [5, 7]"),
        (X, WEIGHT, (35,), "bias has shape [35], weight needs [J, D] = [5, 7]"),
    ],
)
def test_shapes_that_do_not_fit(x, weight, bias, message):
    with pytest.raises(ValueError, match=re.escape(message)) as info:
        dynamic_routing(torch.zeros(x), torch.zeros(weight), torch.zeros(bias))
    assert "\n" not in str(info.value)


def test_other_wrong_inputs():
    x, weight, bias = make_inputs()
    with pytest.raises(ValueError, match="num_iters=0: routing needs at least 1 iteration"):
        dynamic_routing(x, weight, bias, 0)
    with pytest.raises(ValueError, match="x is torch.int64, weight torch.float32"):
        dynamic_routing(x.long(), weight, bias)
    with pytest.raises(ValueError, match="x is on cpu, weight on meta, bias on cpu: move them to one device"):
        dynamic_routing(x, weight.to("meta"), bias)
    with pytest.raises(ValueError, match="x is torch.int64: convert it"):
        squash(x.long())
    with pytest.raises(ValueError, match="x is a scalar"):
        squash(torch.tensor(1.0))


def test_without_triton():
    """On a machine where it is missing the package imports and computes; a GPU would get one warning."""
    code = """
import sys, warnings
sys.modules["triton"] = None
import torch
from capszoo.kernels import dispatch, dynamic_routing, self_attention, squash
assert dispatch.triton_routing is None and self_attention.ops.launchers is None
assert "Triton cannot be used here" in dispatch.triton_problem(torch.device("cuda"))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert not dispatch.runs_triton(torch.device("cuda"), torch.float32)
    assert not dispatch.runs_triton(torch.device("cuda"), torch.float32)
    assert not dispatch.runs_triton(torch.device("cuda"), torch.float64)
assert len(caught) == 1 and "run as PyTorch operators" in str(caught[0].message), caught
assert dynamic_routing(torch.rand(2, 3, 4), torch.rand(3, 4, 5, 6), torch.rand(5, 6)).shape == (2, 5, 6)
assert callable(squash) and squash(torch.rand(2, 3)).shape == (2, 3)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(dispatch, "TRITON_PROBLEM", None)
    problem = dispatch.triton_problem.__wrapped__(torch.device("cuda"))
    assert problem == "The GPU has compute capability 6.1, Triton needs 7.0"


def test_a_machine_where_triton_cannot_compile(monkeypatch):
    def fail(x, approximate):
        raise RuntimeError("Failed to find C compiler\nmore lines")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "TRITON_PROBLEM", None)
    monkeypatch.setattr(dispatch, "triton_squash", SimpleNamespace(squash_forward=fail))
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    problem = dispatch.triton_problem.__wrapped__(torch.device("cuda"))
    assert problem == "Triton cannot be used here (Failed to find C compiler)"
