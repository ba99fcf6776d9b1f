"""Losses against loops written from the papers, and what they do at the margins and in half precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capszoo.losses import (
    MarginLoss,
    ReconstructionLoss,
    SpreadLoss,
    margin_loss,
    reconstruction_loss,
    spread_loss,
)

# Lengths are below 1 by squash; 1.25 shows that nothing depends on it.
lengths_and_targets = st.integers(1, 4).flatmap(
    lambda batch: st.integers(1, 6).flatmap(
        lambda classes: st.tuples(
            st.lists(
                st.lists(st.floats(0, 1.25, width=32), min_size=classes, max_size=classes),
                min_size=batch,
                max_size=batch,
            ),
            st.lists(st.integers(0, classes - 1), min_size=batch, max_size=batch),
        )
    )
)


@given(lengths_and_targets, st.floats(0.5, 1), st.floats(0, 0.5, exclude_max=True), st.floats(0, 2))
@settings(max_examples=100, deadline=None)
def test_margin_loss(example, m_plus, m_minus, lambda_):
    rows, targets = example
    expected = 0.0
    for row, target in zip(rows, targets, strict=True):
        for k, length in enumerate(row):
            if k == target:
                expected += max(0.0, m_plus - length) ** 2
            else:
                expected += lambda_ * max(0.0, length - m_minus) ** 2
    expected /= len(rows)
    lengths, target = torch.tensor(rows, dtype=torch.float64), torch.tensor(targets)
    assert margin_loss(lengths, target, m_plus, m_minus, lambda_).item() == pytest.approx(expected, abs=1e-12)
    assert MarginLoss(m_plus, m_minus, lambda_)(lengths, target).item() == pytest.approx(expected, abs=1e-12)
    assert margin_loss(lengths.float(), target, m_plus, m_minus, lambda_).item() == pytest.approx(expected, abs=1e-4)


@given(lengths_and_targets, st.floats(0.1, 1))
@settings(max_examples=100, deadline=None)
def test_spread_loss(example, margin):
    rows, targets = example
    expected = 0.0
    for row, target in zip(rows, targets, strict=True):
        for k, length in enumerate(row):
            if k != target:
                expected += max(0.0, margin - (row[target] - length)) ** 2
    expected /= len(rows)
    lengths, target = torch.tensor(rows, dtype=torch.float64), torch.tensor(targets)
    assert spread_loss(lengths, target, margin).item() == pytest.approx(expected, abs=1e-12)
    assert SpreadLoss(margin)(lengths, target).item() == pytest.approx(expected, abs=1e-12)


@given(
    st.tuples(*[st.integers(1, 4)] * 4).flatmap(
        lambda shape: st.tuples(st.just(shape), st.integers(0, 2**16), st.integers(0, 2**16))
    )
)
@settings(max_examples=50, deadline=None)
def test_reconstruction_loss(example):
    shape, *seeds = example
    drawn, images = (
        torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds
    )
    pairs = zip(drawn.flatten().tolist(), images.flatten().tolist(), strict=True)
    expected = sum((a - b) ** 2 for a, b in pairs) / shape[0]
    assert reconstruction_loss(drawn, images).item() == pytest.approx(expected, abs=1e-12)
    assert ReconstructionLoss()(drawn, images).item() == pytest.approx(expected, abs=1e-12)


def test_paper_constants():
    assert margin_loss(torch.zeros(3, 10), torch.tensor([0, 4, 9])).item() == pytest.approx(0.81)
    assert margin_loss(torch.ones(3, 10), torch.tensor([0, 4, 9])).item() == pytest.approx(9 * 0.5 * 0.81)


def test_soft_targets():
    lengths, target = torch.rand(4, 5), torch.tensor([0, 3, 3, 1])
    hard = torch.nn.functional.one_hot(target, 5)
    for soft in hard, hard.float(), hard.bool():
        assert torch.equal(margin_loss(lengths, soft), margin_loss(lengths, target))
    other = hard[[1, 0, 3, 2]]
    mixed = 0.3 * hard + 0.7 * other
    expected = 0.3 * margin_loss(lengths, target) + 0.7 * margin_loss(lengths, other)
    torch.testing.assert_close(margin_loss(lengths, mixed), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    target = torch.tensor([2, 0, 1])
    lengths = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    for loss in margin_loss, spread_loss:
        found = loss(lengths.clone().requires_grad_(), target)
        assert found.dtype == torch.float32 and torch.equal(found, loss(lengths.float(), target))
    a, b = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    found = reconstruction_loss(a.to(dtype), b.to(dtype))
    assert found.dtype == torch.float32 and torch.equal(found, reconstruction_loss(a.to(dtype).float(), b.to(dtype)))
    leaf = lengths.clone().requires_grad_()
    margin_loss(leaf, target).backward()
    assert leaf.grad.dtype == dtype and leaf.grad.isfinite().all()


def test_float64_stays():
    lengths = torch.rand(2, 3, dtype=torch.float64)
    assert margin_loss(lengths, torch.tensor([0, 1])).dtype == torch.float64
    assert spread_loss(lengths, torch.tensor([0, 1])).dtype == torch.float64


def test_no_gradient_within_the_margins():
    lengths = torch.tensor([[0.95, 0.05, 0.0], [0.1, 0.9, 0.09]], requires_grad=True)
    loss = margin_loss(lengths, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == 0 and (lengths.grad == 0).all()

    lengths = torch.tensor([[0.95, 0.05, 0.0], [0.3, 0.8, 0.0]], requires_grad=True)
    margin_loss(lengths, torch.tensor([0, 1])).backward()
    assert (lengths.grad[0] == 0).all()
    assert lengths.grad[1, 0] > 0 > lengths.grad[1, 1] and lengths.grad[1, 2] == 0


@pytest.mark.parametrize("margin", [0.2, 0.3, 0.9])
def test_spread_loss_is_zero_beyond_the_margin(margin):
    """Exactly zero: the target's own gap, m squared, does not come back as a rounding error."""
    lengths = torch.tensor([[0.97, 0.01, 0.02], [0.0, 0.05, 0.96]], requires_grad=True)
    loss = spread_loss(lengths, torch.tensor([0, 2]), margin)
    loss.backward()
    assert loss.item() == 0 and (lengths.grad == 0).all()


def test_gradients():
    lengths = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([3, 0, 1])
    assert torch.autograd.gradcheck(lambda x: margin_loss(x, target), lengths)
    assert torch.autograd.gradcheck(lambda x: spread_loss(x, target), lengths)


@pytest.mark.parametrize("m_plus, m_minus", [(0.1, 0.9), (0.5, 0.5), (0.9, -0.1)])
def test_margins_that_are_not_possible(m_plus, m_minus):
    with pytest.raises(ValueError, match=f"m_minus={m_minus} and m_plus={m_plus} are not possible"):
        MarginLoss(m_plus, m_minus)


@pytest.mark.parametrize("module, args", [(MarginLoss(), "m_plus=0.9"), (SpreadLoss(0.2), "margin=0.2")])
def test_modules_show_their_settings_and_can_be_scripted(module, args):
    assert args in repr(module)
    lengths, target = torch.rand(2, 3), torch.tensor([1, 2])
    assert torch.equal(torch.jit.script(module)(lengths, target), module(lengths, target))
