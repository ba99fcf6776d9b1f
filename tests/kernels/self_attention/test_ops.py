"""The registered operator of self-attention routing: dtypes, sizes, graphs, derivatives, and messages."""

import re

import pytest
import torch
from derivatives import DERIVATIVES, X, draw
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from capszoo.kernels import self_attention_routing
from capszoo.kernels.self_attention import cpu, ops, reference
from capszoo.layers import functional

WEIGHT, PRIOR = draw(4, 3, 2, 3, seed=1), draw(4, 2, seed=2)


are_few_votes = ops._are_few_votes


@pytest.fixture(autouse=True)
def operator_for_any_size(monkeypatch):
    monkeypatch.setattr(ops, "_are_few_votes", lambda x, weight: False)


def make_inputs(B=3, N=6, K=4, J=5, D=7, dtype=torch.float32):
    # N capsules: I in the kernels.
    generator = torch.Generator().manual_seed(0)
    shapes = (B, N, K), (N, K, J, D), (N, J)
    return [(torch.randn(shape, generator=generator) / 2).to(dtype).requires_grad_() for shape in shapes]


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def with_gradients(function, inputs, attention=True):
    s = function(*inputs, attention)
    numbers = torch.randn(s.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(s.device)
    return s, *torch.autograd.grad((s.double() * numbers).sum(), inputs)


class Capsules(torch.nn.Module):
    def __init__(self, attention: bool = True):
        super().__init__()
        self.attention = attention
        _, weight, prior = make_inputs()
        self.weight, self.prior = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(prior.detach())

    def forward(self, x):
        return self_attention_routing(x, self.weight, self.prior, self.attention)


@pytest.mark.parametrize("attention", [True, False])
def test_gradcheck(attention):
    inputs = make_inputs(B=2, N=3, K=2, J=3, D=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: self_attention_routing(*t, attention), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: self_attention_routing(*t, attention), inputs)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
def test_dtypes(dtype, bound):
    inputs = make_inputs(B=5, N=16, K=8, J=10, D=16, dtype=dtype)
    results = with_gradients(self_attention_routing, inputs)
    assert all(result.dtype == dtype for result in results)
    expected = with_gradients(reference.self_attention_routing, [t.detach().double().requires_grad_() for t in inputs])
    assert all(error(*pair) <= bound for pair in zip(results, expected, strict=True))


def test_mixed_dtypes_and_autocast():
    x, weight, prior = make_inputs()
    x = x.detach().bfloat16().requires_grad_()
    results = with_gradients(self_attention_routing, (x, weight, prior))
    assert [result.dtype for result in results] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    exact = [t.detach().double().requires_grad_() for t in (x, weight, prior)]
    expected = with_gradients(reference.self_attention_routing, exact)
    assert error(results[2], expected[2]) <= 1e-6 and error(results[3], expected[3]) <= 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        again = with_gradients(self_attention_routing, (x, weight, prior))
    assert all(torch.equal(*pair) for pair in zip(results, again, strict=True))


def test_non_contiguous_inputs():
    inputs = make_inputs()
    transposed = [t.detach().mT.contiguous().mT.requires_grad_() for t in inputs]
    assert not any(t.is_contiguous() for t in transposed)
    for few_samples in (0, 256):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "FEW_SAMPLES", few_samples)
            pairs = zip(*(with_gradients(self_attention_routing, t) for t in (transposed, inputs)), strict=True)
        for result, exact in pairs:
            assert result.is_contiguous()
            torch.testing.assert_close(result, exact)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=st.tuples(*(st.integers(0, 3) for _ in range(5))), attention=st.booleans())
@example((0, 2, 3, 2, 3), True)  # no sample
@example((2, 0, 3, 2, 3), True)  # no capsule
@example((2, 2, 0, 2, 3), True)  # capsules of no numbers
@example((2, 2, 3, 0, 3), True)  # no class
@example((2, 2, 3, 2, 0), False)  # class capsules of no numbers
def test_sizes_of_zero(sizes, attention):
    inputs = make_inputs(*sizes, dtype=torch.float64)
    results, expected = (with_gradients(f, inputs, attention) for f in (self_attention_routing, ops._reference))
    for result, exact in zip(results, expected, strict=True):
        assert result.is_contiguous()
        torch.testing.assert_close(result, exact)
    for found, input in zip(
        with_gradients(self_attention_routing, [t.to("meta") for t in inputs], attention), results, strict=True
    ):
        assert found.is_meta and found.shape == input.shape and found.dtype == input.dtype


def test_what_never_reaches_triton(monkeypatch):
    """Sizes of zero, and products without attention."""
    monkeypatch.setattr(ops, "runs_triton", lambda device, dtype: pytest.fail("asks for Triton"))
    for zero in range(6):
        inputs = [t.detach() for t in make_inputs(*(0 if i == zero else 2 for i in range(5)))]
        s, total = ops._forward_cuda(*inputs, zero < 5)
        grads = ops._backward_cuda(s, *inputs, total, zero < 5, False)
        assert [t.shape for t in grads] == [t.shape for t in inputs]


@pytest.mark.parametrize("attention, dtype", [(True, torch.float32), (False, torch.bfloat16)])
def test_opcheck(attention, dtype):
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")  # compiled below
    inputs = make_inputs(dtype=dtype)
    torch.library.opcheck(torch.ops.capszoo.self_attention_routing, (*inputs, attention), test_utils=utils)
    s, total = torch.ops.capszoo.self_attention_routing(*inputs, attention)
    arguments = (s.detach().requires_grad_(), *inputs, total.detach(), attention, False)
    torch.library.opcheck(torch.ops.capszoo.self_attention_routing_backward, arguments, test_utils=utils)


def test_compiled_gradients():
    inputs = make_inputs()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: self_attention_routing(*t).sin(), fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    expected = torch.autograd.grad(self_attention_routing(*inputs).sin().sum(), inputs)
    torch.testing.assert_close(found, expected)


def test_compiled_and_exported_graphs_call_the_operator_once():
    module, (x, _, _) = Capsules(), make_inputs()
    graphs = []

    def backend(traced, inputs):
        graphs.append(traced.graph)
        return traced

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend=backend)(x), module(x))
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module, (x,), dynamic_shapes=batch)
    graphs.append(program.graph)
    for graph in graphs:
        targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        assert sum("capszoo" in target for target in targets) == 1 and len(targets) <= 3, targets
    x = make_inputs(B=11)[0]
    torch.testing.assert_close(program.module()(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_script_and_its_file(attention, tmp_path):
    module, (x, _, _) = Capsules(attention), make_inputs()
    torch.jit.save(torch.jit.script(module), tmp_path / "capsules.pt")
    loaded = torch.jit.load(tmp_path / "capsules.pt")
    torch.testing.assert_close(loaded(x), module(x), rtol=0, atol=0)
    expected = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(loaded(x).sum(), x), expected, rtol=0, atol=0)


def test_few_votes_are_stored(monkeypatch):
    """The plain form, of the same numbers to rounding, up to so many votes; a graph always has the operator."""
    inputs = make_inputs()
    expected = with_gradients(self_attention_routing, inputs)
    monkeypatch.setattr(ops, "_are_few_votes", are_few_votes)
    monkeypatch.setattr(ops, "FEW_BESIDE_MATRICES", 0)
    monkeypatch.setattr(ops, "FEW_VOTES", 3 * 6 * 5 * 7)
    calls = []
    monkeypatch.setattr(
        ops, "_reference", lambda *arguments: calls.append(1) or reference.self_attention_routing(*arguments)
    )
    torch.testing.assert_close(with_gradients(self_attention_routing, inputs), expected)
    assert calls == [1]
    monkeypatch.setattr(ops, "FEW_VOTES", 3 * 6 * 5 * 7 - 1)
    self_attention_routing(*inputs)
    assert calls == [1]
    monkeypatch.setattr(ops, "FEW_BESIDE_MATRICES", 3 / 4)  # three samples of capsules of four numbers
    self_attention_routing(*inputs)
    assert calls == [1, 1]


def operator(x, weight, prior):
    return torch.ops.capszoo.self_attention_routing(x, weight, prior, True)[0]


@pytest.mark.parametrize("called", [self_attention_routing, functional.route_by_self_attention, operator])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name, called):
    if called is operator and ("dual" in name or name == "linearize"):
        pytest.skip("test_operator_refuses_tangents")
    derivative, of_the_reference = DERIVATIVES[name]
    found = derivative(lambda x: called(2 * x, WEIGHT, PRIOR), draw(*X))
    expected = of_the_reference(lambda x: reference.self_attention_routing(2 * x, WEIGHT, PRIOR), draw(*X))
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_operator_refuses_tangents():
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="its function in capszoo.kernels, or script"),
    ):
        operator(forward_ad.make_dual(draw(*X), draw(*X, seed=3)), WEIGHT, PRIOR)


def test_backward_operator_under_transforms():
    x, grad = draw(*X), draw(2, 2, 3)
    _, total = torch.ops.capszoo.self_attention_routing(x, WEIGHT, PRIOR, True)

    def back(grad):
        return torch.ops.capszoo.self_attention_routing_backward(grad, x, WEIGHT, PRIOR, total, True, False)

    for found, expected in zip(torch.vmap(back)(torch.stack([grad, -grad])), back(grad), strict=True):
        torch.testing.assert_close(found, torch.stack([expected, -expected]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "x, weight, prior, message",
    [
        ((6, 4), (6, 4, 5, 7), (6, 5), "x must have shape [B, I, K], but it has 2 dimensions"),
        ((3, 6, 4), (4, 5, 7), (6, 5), "weight must have shape [T, K, J, D], but it has 3 dimensions"),
        ((3, 6, 8), (6, 4, 5, 7), (6, 5), "x has capsules of K=8 numbers, weight takes K=4"),
        ((3, 6, 4), (3, 4, 5, 7), (3, 5), "weight has matrices for 3 capsules, x has I=6: give each capsule its own"),
        ((3, 6, 4), (6, 4, 5, 7), (5, 6), "prior has shape [5, 6], weight needs [I, J] = [6, 5]"),
        ((3, 6, 4), (6, 4, 5, 7), (6, 5, 1), "prior has shape [6, 5, 1], weight needs [I, J] = [6, 5]"),
    ],
)
def test_shapes_that_do_not_fit(x, weight, prior, message):
    with pytest.raises(ValueError, match=re.escape(message)) as info:
        self_attention_routing(torch.zeros(x), torch.zeros(weight), torch.zeros(prior))
    assert "\n" not in str(info.value)


def test_other_wrong_inputs():
    x, weight, prior = make_inputs()
    with pytest.raises(ValueError, match="x is torch.float32, weight torch.float32, prior torch.int64"):
        self_attention_routing(x, weight, prior.long())
    with pytest.raises(ValueError, match="x is on cpu, weight on meta, prior on cpu: move them to one device"):
        self_attention_routing(x, weight.to("meta"), prior)
