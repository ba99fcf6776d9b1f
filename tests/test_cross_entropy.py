"""Cross-entropy of logits, and the margin of the spread loss that grows."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from capszoo.losses import CrossEntropyLoss, SpreadLoss, cross_entropy_loss, spread_loss


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    soft=st.booleans(),
    seed=st.integers(0, 999),
)
def test_as_torch_has_it(size, smoothing, reduction, soft, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(size, generator=generator, dtype=torch.float64)
    target = torch.randint(size[1], (size[0],), generator=generator)
    if soft:
        target = torch.rand(size, generator=generator, dtype=torch.float64)
        target /= target.sum(dim=1, keepdim=True)
    expected = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(cross_entropy_loss(logits, target, smoothing, reduction=reduction), expected)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_weights_of_classes(reduction):
    logits, target, weight = torch.randn(5, 3).double(), torch.tensor([0, 1, 2, 2, 0]), torch.tensor([1.0, 2.0, 0.5])
    expected = F.cross_entropy(logits, target, weight.double(), reduction=reduction)
    torch.testing.assert_close(cross_entropy_loss(logits, target, weight=weight, reduction=reduction), expected)
    one_hot = F.one_hot(target).double()
    torch.testing.assert_close(cross_entropy_loss(logits, one_hot, weight=weight, reduction=reduction), expected)


def test_labels_are_smooth_in_training_alone():
    logits, target, loss = torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), CrossEntropyLoss(0.2)
    assert loss(logits, target).item() == pytest.approx(F.cross_entropy(logits, target, label_smoothing=0.2).item())
    assert loss.eval()(logits, target).item() == pytest.approx(F.cross_entropy(logits, target).item())


def test_in_half_precision_it_is_computed_in_float32():
    logits = torch.tensor([[60000.0, -60000.0]], dtype=torch.float16)
    assert cross_entropy_loss(logits, torch.tensor([1])).item() == pytest.approx(120000, rel=1e-3)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_smoothing_out_of_range(value):
    for call in lambda: CrossEntropyLoss(value), lambda: cross_entropy_loss(torch.rand(1, 2), torch.tensor([0]), value):
        with pytest.raises(ValueError, match=f"^label_smoothing={value} is not possible: give 0 or more, below 1$"):
            call()


def test_in_torchscript():
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    for loss in (CrossEntropyLoss(0.2), SpreadLoss(0.9, first_margin=0.2)):
        torch.testing.assert_close(torch.jit.script(loss)(logits, target), loss(logits, target))


def test_the_margin_grows_from_first_to_last():
    activations, target = torch.rand(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    loss = SpreadLoss(0.9, first_margin=0.2)
    for progress, margin in (0.0, 0.2), (0.5, 0.55), (1.0, 0.9):
        loss.set_progress(progress)
        assert loss(activations, target).item() == pytest.approx(spread_loss(activations, target, margin).item())
    loss.set_progress(0.0)
    assert loss.eval()(activations, target).item() == pytest.approx(spread_loss(activations, target, 0.9).item())
    assert "first_margin=0.2" in repr(loss)


def test_masked_classes():
    logits = torch.tensor([[2.0, 1.0, -math.inf], [0.0, -math.inf, 1.0]], requires_grad=True)
    target = torch.tensor([0, 2])
    loss = cross_entropy_loss(logits, target)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all() and gradient[0, 2] == gradient[1, 1] == 0
    assert cross_entropy_loss(logits, torch.tensor([2, 2])).isinf()
