"""What PyTorch would compute in many launches, fused in Triton: against float64, through the interpreter.

The functions are called as models and losses call them, as if their tensors lay on a GPU. What is not fused there goes
to PyTorch's operators, which have their tests elsewhere; which that is, is tested here, without the interpreter too.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

import capszoo
from capszoo.kernels import centering, class_scores, dispatch

pytest.importorskip("triton")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

# Autograd's names of what is fused.
FUSED = {"_LengthsBackward", "_MarginLossesBackward", "_FusedCenteredKernelsBackward"}


def test_through_the_interpreter(through_the_interpreter):
    """All tests below that compute."""


def interpreted(test):
    asked = pytest.mark.usefixtures("interpreted_loops")(test)
    return pytest.mark.skipif(not INTERPRETING, reason="run by test_through_the_interpreter")(asked)


pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")


@pytest.fixture(autouse=True, scope="module")
def on_a_gpu():
    """Take the path of a GPU for what it takes there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_is_on_gpu", lambda x: True)
        patch.setattr(dispatch, "runs_triton", lambda device, dtype: dtype == torch.float32)
        yield


@pytest.fixture
def autocast(monkeypatch):
    """As under autocast to bfloat16 on a GPU."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)


def error(actual, expected):
    difference = (actual.double() - expected).norm().item()
    return difference / expected.norm().item() if expected.any() else difference


def check(function, inputs, grad, bound, dtype=None):
    """Result and gradients against those of float64, which PyTorch's operators compute."""
    given_ = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    result, expected = function(*given_), function(*exact)
    assert result.grad_fn.name() in FUSED and expected.grad_fn.name() not in FUSED
    assert result.shape == expected.shape and result.dtype == (dtype or inputs[0].dtype)
    grad = grad.to(result.dtype)
    gradients = torch.autograd.grad(result, given_, grad)
    assert error(result.detach(), expected.detach()) <= bound
    for x, actual, wanted in zip(given_, gradients, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert actual.dtype == x.dtype and actual.shape == x.shape and error(actual, wanted) <= bound


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def margins(target, m_plus=0.9, m_minus=0.1, lambda_=0.5):
    return lambda lengths: class_scores.margin_losses(lengths, target, m_plus, m_minus, lambda_)


def centred(weight, is_centered=True):
    return centering.scaled_kernels(weight, torch.tensor(float(is_centered)), torch.tensor(0.25))


@interpreted
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 40), max_size=2),
    width=st.integers(1, 130),
    dtype=st.sampled_from(list(BOUNDS)),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    seed=st.integers(0, 2**20),
)
def test_lengths(shape, width, dtype, scale, seed):
    x = (scale * draw(seed, *shape, width)).to(dtype)
    check(class_scores.capsule_lengths, [x], draw(seed + 1, *shape).to(dtype), BOUNDS[dtype])
    with torch.no_grad():
        lengths = class_scores.capsule_lengths(x)
    assert lengths.dtype == dtype and error(lengths, x.double().norm(dim=-1)) <= BOUNDS[dtype]


@interpreted
@pytest.mark.parametrize("scale", [1e-35, 1e-21, 1e18])
def test_lengths_of_any_size(scale):
    x = draw(0, 3, 4)
    check(class_scores.capsule_lengths, [(scale * x).float()], draw(1, 3), 1e-5)


@interpreted
def test_lengths_of_zero_of_any_strides_and_of_nothing():
    x = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]], requires_grad=True)
    lengths = class_scores.capsule_lengths(x)
    assert lengths.tolist() == [[5.0, 0.0]]
    lengths.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[[0.6, 0.8], [0.0, 0.0]]]))
    strided, grad = draw(0, 3, 5, 7).float().transpose(0, 2), draw(1, 5, 7).float().t()
    check(class_scores.capsule_lengths, [strided], grad, 1e-5)
    check(class_scores.capsule_lengths, [strided], grad[:1, :1].expand(7, 5), 1e-5)
    for shape in (2, 0, 3), (2, 3, 0), (4,):
        x = torch.ones(shape, requires_grad=True)
        torch.testing.assert_close(class_scores.capsule_lengths(x), torch.linalg.vector_norm(x.detach(), dim=-1))
        assert torch.autograd.grad(class_scores.capsule_lengths(x).sum(), x)[0].shape == shape
    lengths = class_scores.capsule_lengths(torch.tensor([[float("nan"), 0.0], [0.0, float("inf")]]))
    assert lengths.isnan().tolist() == [True, False] and lengths[1].isinf()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths_are_float32_under_autocast(autocast, dtype):
    """As a norm is: the highest of several scores is not to be a matter of eight bits."""
    x = draw(0, 4, 10, 16).to(dtype)
    check(class_scores.capsule_lengths, [x], draw(1, 4, 10), BOUNDS[dtype], torch.float32)
    with torch.no_grad():
        assert error(class_scores.capsule_lengths(x), x.double().norm(dim=-1)) < 1e-6


@interpreted
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 70),
    classes=st.integers(1, 130),
    dtype=st.sampled_from(list(BOUNDS)),
    kind=st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16]),
    settings_=st.sampled_from([(0.9, 0.1, 0.5), (1.0, 0.0, 1.0), (0.7, 0.2, 0.0)]),
    strided=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_margin_losses(batch, classes, dtype, kind, settings_, strided, seed):
    lengths = draw(seed, batch, classes).sigmoid().to(dtype)
    if kind in (torch.int64, torch.int32, torch.uint8):
        target = torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(seed)).to(kind)
    else:
        target = (draw(seed + 2, batch, classes).sigmoid() if kind.is_floating_point else lengths > 0.5).to(kind)
    if strided:
        lengths = lengths.t().contiguous().t()
        target = torch.stack([target, target], dim=-1)[..., 0]
    check(margins(target, *settings_), [lengths], draw(seed + 1, batch), BOUNDS[dtype], torch.float32)


@interpreted
def test_margin_losses_of_what_is_wrong():
    """An index out of range, which a GPU is not asked for, and a length that is not finite."""
    lengths = torch.full((5, 3), 0.5)
    lengths[3, 1], lengths[4, 0] = torch.nan, torch.nan
    lengths.requires_grad_()
    losses = margins(torch.tensor([0, 3, -1, 0, 0]))(lengths)
    assert losses.isnan().tolist() == [False, True, True, True, True]
    losses.sum().backward()
    assert lengths.grad.isnan().any(1).tolist() == [False, True, True, True, True]
    assert margins(torch.tensor([], dtype=torch.long))(lengths[:0]).shape == (0,)


@interpreted
def test_targets_and_lengths_are_the_callers_to_change():
    """Nothing of them is kept for the backward pass, and pseudo-labels may come from inference mode."""
    with torch.inference_mode():
        labels = draw(0, 4, 5).argmax(1)
    lengths = draw(1, 4, 5).sigmoid().float().requires_grad_()
    margins(labels)(lengths).sum().backward()
    target, scores = labels.clone(), lengths.detach().clone().requires_grad_() * 1
    capsules = draw(2, 4, 5, 3).float().requires_grad_() * 1
    losses, norms = margins(target)(scores).sum(), class_scores.capsule_lengths(capsules)
    norms = norms.mul_(3).sum()
    with torch.no_grad():
        target.zero_(), scores.zero_(), capsules.zero_()
    assert torch.equal(torch.autograd.grad(losses, scores)[0], lengths.grad)
    assert torch.autograd.grad(norms, capsules)[0].all()


@interpreted
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    filters=st.integers(1, 7),
    channels=st.integers(1, 80),
    side=st.integers(1, 9),
    dtype=st.sampled_from(list(BOUNDS)),
    layout=st.sampled_from(["contiguous", "channels last", "other"]),
    is_centered=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_centred_filters(filters, channels, side, dtype, layout, is_centered, seed):
    weight, grad = draw(seed, 2, filters, channels, side, side).to(dtype)
    if layout == "channels last":
        weight = weight.contiguous(memory_format=torch.channels_last)
    elif layout == "other":
        weight, grad = (t.transpose(0, 2).contiguous().transpose(0, 2) for t in (weight, grad))
    if is_centered and channels * side * side == 1:  # nothing is left of them but rounding
        assert centred(weight, is_centered).abs().max() < 1e-6
        return
    if layout == "channels last":
        assert centred(weight).is_contiguous(memory_format=torch.channels_last)
    check(lambda w: centred(w, is_centered), [weight], grad, BOUNDS[dtype])


@interpreted
def test_no_filters():
    assert centred(torch.ones(0, 3, 2, 2)).shape == (0, 3, 2, 2)


@interpreted
def test_centred_filters_in_the_type_of_autocast(autocast):
    """The same as those that autocast would cast, with gradients as exact as they have."""
    weight, grad = draw(0, 3, 5, 4, 4).float().requires_grad_(), draw(1, 3, 5, 4, 4).bfloat16()
    kernels = centred(weight)
    expected = (weight - weight.mean((1, 2, 3), keepdim=True)) / 4
    torch.testing.assert_close(kernels, expected.bfloat16(), rtol=1e-2, atol=1e-6)
    (wanted,) = torch.autograd.grad(expected, weight, grad.float())
    for create_graph in (False, True):
        (dweight,) = torch.autograd.grad(kernels, weight, grad, create_graph=create_graph, retain_graph=True)
        assert dweight.dtype == torch.float32 and error(dweight, wanted.double()) < 1e-5


@interpreted
@pytest.mark.parametrize("what", ["lengths", "margins", "filters"])
def test_other_derivatives(what):
    """Of second and third order, batches of gradients, and tangents of gradients: those of PyTorch's operators."""
    function, x = {
        "lengths": (class_scores.capsule_lengths, draw(0, 2, 3, 4).index_fill(1, torch.tensor(1), 0)),
        "margins": (margins(torch.tensor([1, 0, 2])), draw(0, 3, 5).sigmoid() * 1.5),
        "filters": (centred, draw(0, 2, 3, 2, 2)),
    }[what]
    found = []
    for values in (x.float().requires_grad_(), x.clone().requires_grad_()):
        result = function(values)
        (first,) = torch.autograd.grad(result.pow(3).sum(), values, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), values, create_graph=True)
        (third,) = torch.autograd.grad(second.square().sum(), values)
        every = torch.eye(result.numel(), dtype=result.dtype).view(-1, *result.shape)
        (jacobian,) = torch.autograd.grad(function(values), values, every, is_grads_batched=True)
        grad, tangent = draw(1, *result.shape).to(result), draw(2, *result.shape).to(result)
        with forward_ad.dual_level():
            (dual,) = torch.autograd.grad(function(values), values, forward_ad.make_dual(grad, tangent))
            along = forward_ad.unpack_dual(dual).tangent
        found.append((first.detach(), second.detach(), third, jacobian, along))
    for actual, expected in zip(*found, strict=True):
        assert expected.any() and error(actual, expected) < 1e-4


def test_what_is_fused(monkeypatch):
    """A plain call, with tensors of a type and device that Triton takes."""
    x = torch.ones(2, 3)
    assert dispatch.fuses(x, x) and dispatch.fuses(torch.nn.Parameter(x), torch.ones(2, dtype=torch.long))
    for dtype in (torch.float64, torch.int64, torch.bool, torch.complex64):
        assert not dispatch.fuses(x.to(dtype))
    assert not dispatch.fuses(x, x.to("meta")) and not dispatch.fuses(x.as_subclass(type("Other", (torch.Tensor,), {})))
    with capszoo.set_fused_routing(False):
        assert not dispatch.fuses(x)
    with forward_ad.dual_level():
        assert not dispatch.fuses(x, forward_ad.make_dual(x, x))
    seen = []

    def look(x):
        seen.append(dispatch.fuses(x))
        return x.sum()

    torch.func.vmap(look)(x)
    torch.func.grad(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    assert seen == [False, False, False]
    graph = torch.fx.symbolic_trace(capszoo.layers.ScaledConv2d(5, 7, 3, centered=True)).graph
    assert {node.target for node in graph.nodes} >= {torch.conv2d, "mean"}
    monkeypatch.setattr(dispatch, "_is_on_gpu", lambda x: False)
    assert not dispatch.fuses(x)


def test_targets_that_are_not_fused():
    lengths, target = torch.rand(2, 3), torch.rand(2, 3)
    assert class_scores._fuses_margins(lengths, target) and class_scores._fuses_margins(lengths, target > 0.5)
    assert not class_scores._fuses_margins(lengths, target.clone().requires_grad_())
    for dtype in (torch.float64, torch.int16, torch.float8_e4m3fn):
        assert not class_scores._fuses_margins(lengths, target.to(dtype))
    assert not class_scores._fuses_margins(*torch.rand(2, 1, class_scores.launchers.MAX_WIDTH + 1))
