"""The operator of inverted dot-product attention against the reference in float64, and what PyTorch asks of one."""

import warnings

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import capszoo
from capszoo import layers
from capszoo.kernels import inverted_attention_routing
from capszoo.kernels.inverted_attention import cpu, ops, reference, uniform_routing

# Ratios of norms, for the output and for the gradients.
BOUNDS = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (1e-2, 1e-2),
    torch.float16: (1e-2, 1e-2),
}


def make_inputs(B=2, T=3, P=2, H=5, W=4, k=2, J=3, stride=1, seed=0, dtype=torch.float64):
    """Children, matrices, parents and a gradient of the sums."""
    generator = torch.Generator().manual_seed(seed)
    parents = B, J, P, P, (H - k) // stride + 1, (W - k) // stride + 1
    shapes = (B, T, P, P, H, W), (k, k, T, P, P, J), parents, parents
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def with_gradients(function, x, weight, parents, grad, stride=1):
    inputs = [t.detach().requires_grad_() for t in (x, weight, parents)]
    sums = function(*inputs, stride)
    return sums.detach(), *torch.autograd.grad(sums, inputs, grad)


def error(actual, expected):
    difference = (actual.double() - expected).norm().item()
    return difference / expected.norm().item() if expected.any() else difference


def check(inputs, stride=1, function=inverted_attention_routing):
    results = with_gradients(function, *inputs, stride)
    exact = with_gradients(reference.inverted_attention_routing, *(t.double() for t in inputs), stride)
    bounds = BOUNDS[inputs[0].dtype]
    for name, actual, wanted, like in zip(("s", "dx", "dweight", "dparents"), results, exact, inputs, strict=True):
        assert actual.shape == wanted.shape and actual.dtype == like.dtype, name
        assert error(actual, wanted) <= bounds[name != "s"], name
    return results


sizes = st.tuples(*(st.integers(1, n) for n in (4, 5, 4, 6, 6, 3, 7, 3)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=sizes, dtype=st.sampled_from(list(BOUNDS)), tile=st.sampled_from([1, 2**8, 2**12]), seed=st.integers(0, 99)
)
@example((3, 4, 4, 1, 1, 1, 10, 1), torch.float32, 2**19, 0)  # class capsules
@example((1, 1, 1, 1, 1, 1, 1, 1), torch.float32, 1, 0)
@example((2, 2, 3, 6, 5, 3, 4, 2), torch.float64, 2**10, 1)
def test_output_and_gradients(sizes, dtype, tile, seed):
    B, T, P, H, W, k, J, stride = sizes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "TILE_BYTES", tile)
        patch.setattr(cpu, "GROUP_BYTES", 4 * tile)
        check(make_inputs(B, T, P, max(H, k), max(W, k), k, J, stride, seed, dtype), stride)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(sizes=sizes)
@example((2, 3, 2, 3, 3, 3, 4, 1))  # a kernel as large as the map
def test_uniform_couplings(sizes):
    B, T, P, H, W, k, J, stride = sizes
    x, weight, _, grad = make_inputs(B, T, P, max(H, k), max(W, k), k, J, stride)
    for function in (inverted_attention_routing, lambda x, weight, _, stride: uniform_routing(x, weight, stride)):
        inputs = [t.requires_grad_() for t in (x, weight)]
        sums = function(*inputs, None, stride)
        expected = reference.inverted_attention_routing(x, weight, None, stride)
        torch.testing.assert_close(sums, expected)
        found, wanted = (torch.autograd.grad(s, inputs, grad) for s in (sums, expected))
        torch.testing.assert_close(found, wanted)


def test_small_extremes():
    for scale in (0.0, 1e-20, 1e4):
        x, weight, parents, grad = make_inputs(dtype=torch.float32)
        results = with_gradients(inverted_attention_routing, scale * x, weight, parents, grad)
        assert all(result.isfinite().all() for result in results), scale
        results = with_gradients(inverted_attention_routing, torch.full_like(x, scale), weight, scale * parents, grad)
        assert all(result.isfinite().all() for result in results), scale


@pytest.mark.parametrize("size", ["B", "T", "P", "J"])
def test_sizes_of_zero(size):
    x, weight, parents, grad = make_inputs(**{size: 0})
    sums, *gradients = with_gradients(inverted_attention_routing, x, weight, parents, grad)
    assert sums.shape == parents.shape and not sums.any()
    assert [g.shape for g in gradients] == [t.shape for t in (x, weight, parents)] and not any(
        g.any() for g in gradients
    )


def test_mixed_dtypes_and_strides():
    x, weight, parents, grad = make_inputs(dtype=torch.float32)
    results = with_gradients(inverted_attention_routing, x.bfloat16(), weight, parents.half(), grad.bfloat16())
    assert [r.dtype for r in results] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float16]
    expected = check([x, weight, parents, grad])
    strided = [t.transpose(0, 3).contiguous().transpose(0, 3) for t in (x, weight, parents, grad)]
    torch.testing.assert_close(check(strided), expected)


def test_autocast_does_not_lower_it():
    inputs = make_inputs(dtype=torch.float32)
    expected = with_gradients(inverted_attention_routing, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = with_gradients(inverted_attention_routing, *inputs)
    assert all(map(torch.equal, found, expected))
    x, weight = (t.detach() for t in inputs[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = inverted_attention_routing(x, weight)
    assert torch.equal(first, inverted_attention_routing(x, weight))


ERRORS = {
    "x must have shape .* but it has 5 dimensions": (lambda x, w, p: (x[0], w, p), 1),
    "weight has shape .* it must be": (lambda x, w, p: (x, w[:1], p), 1),
    r"x has poses \[I, P, P\] = \[2, 2, 2\], weight takes \[3, 2, 2\]": (lambda x, w, p: (x[:, :2], w, p), 1),
    "stride=0: it must be 1 or more": (lambda x, w, p: (x, w, p), 0),
    "x has a map of 1x4 positions, the kernel needs 2x2": (lambda x, w, p: (x[..., :1, :], w, p), 1),
    "parents have shape .* x and weight need": (lambda x, w, p: (x, w, p[..., :2]), 1),
    "routing needs floating-point tensors, but x is torch.int64": (lambda x, w, p: (x.long(), w, p), 1),
    "x is on cpu, weight on meta": (lambda x, w, p: (x, w.to("meta"), p), 1),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    change, stride = ERRORS[message]
    with pytest.raises(ValueError, match=message) as caught:
        inverted_attention_routing(*change(*make_inputs()[:3]), stride)
    assert "\n" not in str(caught.value)


def small():
    return [t.requires_grad_() for t in make_inputs(B=1, T=2, P=2, H=3, W=2, k=2, J=2)[:3]]


def test_gradcheck():
    assert torch.autograd.gradcheck(inverted_attention_routing, small())
    assert torch.autograd.gradgradcheck(inverted_attention_routing, small())


def test_opcheck():
    x, weight, parents = small()
    inputs = x.permute(0, 4, 5, 1, 2, 3), weight, parents.permute(0, 4, 5, 1, 2, 3)
    torch.library.opcheck(ops.forward_op, (*inputs, 1))
    grad = torch.randn_like(inputs[2]).requires_grad_()
    torch.library.opcheck(ops.backward_op, (grad, *inputs, 1))


def test_transforms():
    x, weight, parents, grad = make_inputs()
    exact = with_gradients(reference.inverted_attention_routing, x, weight, parents, grad)[1:]
    for function in (inverted_attention_routing, layers.inverted_attention_routing):
        _, pull_back = torch.func.vjp(function, x, weight, parents)
        torch.testing.assert_close(pull_back(grad), exact)
        value, slope = torch.func.jvp(lambda *t, f=function: f(*t).sin().sum(), (x, weight, parents), (x, weight, grad))
        sums = reference.inverted_attention_routing(x, weight, parents)
        slopes = with_gradients(reference.inverted_attention_routing, x, weight, parents, sums.cos())[1:]
        torch.testing.assert_close(value, sums.sin().sum())
        torch.testing.assert_close(slope, sum((a * b).sum() for a, b in zip(slopes, (x, weight, grad), strict=True)))
        by_sample = torch.vmap(lambda x, p, f=function: f(x[None], weight, p[None])[0])(x, parents)
        torch.testing.assert_close(by_sample, sums)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, grad.new_ones(x.shape))
        tangent = torch.autograd.forward_ad.unpack_dual(inverted_attention_routing(dual, weight, parents)).tangent
    ones = (torch.ones_like(x),)
    _, expected = torch.func.jvp(lambda x: reference.inverted_attention_routing(x, weight, parents), (x,), ones)
    torch.testing.assert_close(tangent, expected)


class Pass(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = layers.InvertedAttentionConvCaps(3, 3, pose_size=2, kernel_size=2)

    def forward(self, x):
        return self.layer(x, self.layer(x))


def test_ways_out():
    torch.manual_seed(0)
    model, x = Pass().eval(), torch.randn(2, 3, 2, 2, 5, 4)
    expected = model(x)
    for fused in (True, False):
        with capszoo.set_fused_routing(fused), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dynamic = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
            exported = torch.export.export(model, (x,), dynamic_shapes=dynamic)
            names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
            assert any("inverted_attention" in name for name in names) == fused
            torch.testing.assert_close(exported.module()(x[[0, 1, 0]]), expected[[0, 1, 0]])
            torch.testing.assert_close(torch.jit.script(model)(x), expected)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)


def test_compile():
    inputs = make_inputs(dtype=torch.float32)
    expected = with_gradients(inverted_attention_routing, *inputs)
    compiled = torch.compile(inverted_attention_routing, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(with_gradients(compiled, *inputs), expected)
