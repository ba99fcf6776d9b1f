"""What PyTorch would compute in many launches, fused in Triton: against float64, through the interpreter.

The functions are called as models and losses call them, on tensors that say of themselves that they lie on a GPU.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capszoo.kernels import centering, class_scores, dispatch

pytest.importorskip("triton")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


# Autograd's names of what is fused.
FUSED = {"_LengthsBackward", "_MarginLossesBackward", "_FusedCenteredKernelsBackward"}


def test_through_the_interpreter(through_the_interpreter):
    """All tests below."""


def interpreted(test):
    asked = pytest.mark.usefixtures("interpreted_loops")(test)
    return pytest.mark.skipif(not INTERPRETING, reason="run by test_through_the_interpreter")(asked)


@pytest.fixture(autouse=True, scope="module")
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="module")
def fused():
    """Take the path of a GPU for what it takes there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dispatch, "fuses", lambda x: x.dtype != torch.float64 and not dispatch.is_looked_at(x) and INTERPRETING
        )
        yield


def error(actual, expected):
    difference = (actual.double() - expected).norm().item()
    return difference / expected.norm().item() if expected.any() else difference


def check(function, inputs, grad, bound):
    """Result and gradients against those of float64, which PyTorch's operators compute."""
    given_ = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    result, expected = function(*given_), function(*exact)
    assert result.shape == expected.shape and result.grad_fn.name() in FUSED
    grad = grad.to(result.dtype)
    gradients = torch.autograd.grad(result, given_, grad)
    assert error(result.detach(), expected.detach()) <= bound
    for x, actual, wanted in zip(given_, gradients, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert actual.dtype == x.dtype and actual.shape == x.shape and error(actual, wanted) <= bound


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@interpreted
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 40), max_size=2),
    width=st.integers(1, 130),
    dtype=st.sampled_from(list(BOUNDS)),
    seed=st.integers(0, 2**20),
)
def test_lengths(shape, width, dtype, seed):
    x = draw(seed, *shape, width)
    check(class_scores.capsule_lengths, [x.to(dtype)], draw(seed + 1, *shape).to(dtype), BOUNDS[dtype])


@interpreted
def test_lengths_of_zero_of_any_strides_and_of_nothing():
    x = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]], requires_grad=True)
    lengths = class_scores.capsule_lengths(x)
    assert lengths.tolist() == [[5.0, 0.0]]
    lengths.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[[0.6, 0.8], [0.0, 0.0]]]))
    check(class_scores.capsule_lengths, [draw(0, 3, 5, 7).float().transpose(0, 2)], draw(1, 7, 5).T.T, 1e-5)
    for shape in (2, 0, 3), (2, 3, 0), (4,):
        x = torch.ones(shape, requires_grad=True)
        torch.testing.assert_close(class_scores.capsule_lengths(x), torch.linalg.vector_norm(x.detach(), dim=-1))
        assert torch.autograd.grad(class_scores.capsule_lengths(x).sum(), x)[0].shape == shape
    lengths = class_scores.capsule_lengths(torch.tensor([[float("nan"), 0.0], [0.0, float("inf")]]))
    assert lengths.isnan().tolist() == [True, False] and lengths[1].isinf()


@interpreted
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 70),
    classes=st.integers(1, 130),
    dtype=st.sampled_from(list(BOUNDS)),
    kind=st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16]),
    margins=st.sampled_from([(0.9, 0.1, 0.5), (1.0, 0.0, 1.0), (0.7, 0.2, 0.0)]),
    seed=st.integers(0, 2**20),
)
def test_margin_losses(batch, classes, dtype, kind, margins, seed):
    lengths = draw(seed, batch, classes).sigmoid().to(dtype)
    if kind in (torch.int64, torch.int32, torch.uint8):
        target = torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(seed)).to(kind)
    else:
        target = (draw(seed + 2, batch, classes).sigmoid() if kind.is_floating_point else lengths > 0.5).to(kind)
    check(
        lambda x: class_scores.margin_losses(x, target, *margins),
        [lengths],
        draw(seed + 1, batch),
        max(BOUNDS[dtype], 1e-5),
    )


@interpreted
def test_margin_losses_of_what_is_wrong():
    """An index out of range, which a GPU is not asked for, and a length that is not finite."""
    lengths = torch.full((4, 3), 0.5)
    lengths[3, 1] = float("nan")
    losses = class_scores.margin_losses(lengths, torch.tensor([0, 3, -1, 0]), 0.9, 0.1, 0.5)
    assert losses.isnan().tolist() == [False, True, True, True]
    assert class_scores.margin_losses(lengths[:0], torch.tensor([], dtype=torch.long), 0.9, 0.1, 0.5).shape == (0,)


@interpreted
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    filters=st.integers(1, 7),
    channels=st.integers(1, 80),
    side=st.integers(1, 9),
    dtype=st.sampled_from(list(BOUNDS)),
    channels_last=st.booleans(),
    is_centered=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_centred_filters(filters, channels, side, dtype, channels_last, is_centered, seed):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    weight, grad = (
        t.to(dtype).contiguous(memory_format=layout) for t in draw(seed, 2, filters, channels, side, side).unbind()
    )

    def scaled(w):
        return centering.scaled_kernels(w, torch.tensor(float(is_centered)), torch.tensor(0.25))

    if is_centered and channels * side * side == 1:  # nothing is left of them but rounding
        assert scaled(weight).abs().max() < 1e-6
        return
    assert scaled(weight).is_contiguous(memory_format=layout)
    check(scaled, [weight], grad, BOUNDS[dtype])


@interpreted
def test_centred_filters_in_the_type_of_autocast(monkeypatch):
    """The same as those that autocast would cast, with a gradient as exact as they have."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    weight, one, grad = draw(0, 3, 5, 4, 4).float().requires_grad_(), torch.ones(()), draw(1, 3, 5, 4, 4).bfloat16()
    kernels = centering.scaled_kernels(weight, one, one / 4)
    expected = (weight - weight.mean((1, 2, 3), keepdim=True)) / 4
    torch.testing.assert_close(kernels, expected.bfloat16(), rtol=1e-2, atol=1e-6)
    (dweight,) = torch.autograd.grad(kernels, weight, grad)
    (wanted,) = torch.autograd.grad(expected, weight, grad.float())
    assert dweight.dtype == torch.float32 and error(dweight, wanted.double()) < 1e-5


@interpreted
def test_second_derivatives_and_batches_of_gradients():
    """They are PyTorch's, of the same formulas."""
    target, one = torch.tensor([1, 0]), torch.ones(())
    cases = [
        (class_scores.capsule_lengths, draw(0, 2, 3, 4).float()),
        (lambda x: class_scores.margin_losses(x, target, 0.9, 0.1, 0.5), draw(0, 2, 3).sigmoid().float()),
        (lambda w: centering.scaled_kernels(w, one, one / 4).square(), draw(0, 2, 3, 2, 2).float()),
    ]
    for function, x in cases:
        seconds, jacobians = [], []
        for values in (x.requires_grad_(), x.detach().double().requires_grad_()):
            result = function(values)
            (gradient,) = torch.autograd.grad(result.square().sum(), values, create_graph=True)
            seconds.append(torch.autograd.grad(gradient.square().sum(), values)[0])
            every = torch.eye(result.numel(), dtype=result.dtype).view(-1, *result.shape)
            jacobians.append(torch.autograd.grad(function(values), values, every, is_grads_batched=True)[0])
        assert error(seconds[0], seconds[1]) < 1e-5 and error(jacobians[0], jacobians[1]) < 1e-5
        assert seconds[1].any() and jacobians[1].any()
