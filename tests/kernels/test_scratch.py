"""Memory and transforms of kernels that convolutions keep from step to step."""

import math

import pytest
import torch
from convolutions import error, inputs
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from capszoo.kernels import fourier_conv, scratch
from capszoo.kernels.fourier_plan import best_plan
from capszoo.kernels.large_conv import large_conv2d
from capszoo.kernels.scratch import Scratch, lend


class Passes:
    """A convolution of fixed images, whose transforms of kernels are counted."""

    def __init__(self, monkeypatch):
        self.plan = best_plan(12, 12, 5, 2, 2, 3)
        self.x, weight, _ = inputs(4, 2, 3, 12, 12, 5)
        self.weight = weight.float().requires_grad_()
        self.count = 0
        real = fourier_conv._transform_kernels

        def transform(*args):
            self.count += 1
            real(*args)

        monkeypatch.setattr(fourier_conv, "_transform_kernels", transform)

    def __call__(self, centered=None):
        return large_conv2d(self.x.float(), self.weight, None, self.plan, centered=centered)

    def is_right(self, y):
        return error(y, functional.conv2d(self.x, self.weight.detach().double(), stride=2)) <= 1e-6


@pytest.fixture
def passes(monkeypatch):
    monkeypatch.setattr(scratch, "scratch", Scratch())
    monkeypatch.setattr(fourier_conv, "scratch", scratch.scratch)
    return Passes(monkeypatch)


def test_evaluation_transforms_kernels_once_until_they_change(passes):
    with torch.no_grad():
        assert passes.is_right(passes()) and passes.is_right(passes()) and passes.count == 1
        passes.weight.add_(1)
        assert passes.is_right(passes()) and passes.count == 2
        passes.weight.data.mul_(2)  # which no version counts
        assert passes.is_right(passes()) and passes.is_right(passes()) and passes.count == 3
    with torch.inference_mode():
        assert passes.is_right(passes())
    assert passes.is_right(passes().detach())


def test_kernels_are_transformed_again_where_centring_changes(passes):
    centered = torch.zeros(())
    with torch.no_grad():
        assert passes.is_right(passes()) and passes.count == 1
        assert passes.is_right(passes(centered)) and passes.is_right(passes(centered)) and passes.count == 2
        centered.data.fill_(1.0)
        y = passes(centered)
        assert passes.count == 3
        passes.weight -= passes.weight.mean((1, 2, 3), keepdim=True)
        assert passes.is_right(y) and passes.is_right(passes()) and passes.count == 4


def test_training_transforms_kernels_once_a_step(passes):
    for step in range(1, 4):
        y = passes()
        y.square().sum().backward()
        assert passes.is_right(y.detach()) and passes.count == step
        passes.weight.data.sub_(passes.weight.grad, alpha=0.01)


def test_kernels_that_are_computed_anew_are_transformed_as_often_as_others(passes):
    """As with a parametrization: they are another tensor in each pass."""
    kept = passes.weight
    with torch.no_grad():
        for _ in range(2):
            passes.weight = kept * 1
            assert passes.is_right(passes()) and passes.count == 1
    for count in (2, 3):
        passes.weight = kept * 1
        passes().square().sum().backward()
        assert passes.count == count


def test_backward_pass_of_kernels_that_another_convolution_has_overwritten(passes):
    other = torch.randn(3, 2, 5, 5, requires_grad=True)
    x = passes.x.float().requires_grad_()
    y = large_conv2d(x, passes.weight, None, passes.plan)
    z = large_conv2d(x, other, None, passes.plan)
    found = torch.autograd.grad((y * z).sum(), (x, passes.weight, other))
    a, b = (functional.conv2d(x, weight, stride=2) for weight in (passes.weight, other))
    for actual, expected in zip(found, torch.autograd.grad((a * b).sum(), (x, passes.weight, other)), strict=True):
        assert error(actual, expected) <= 1e-5


def test_a_graph_that_is_kept_gives_its_gradients_again(passes):
    y = passes().square().sum()
    first = torch.autograd.grad(y, passes.weight, retain_graph=True)[0].clone()
    passes().sum().backward()  # takes no memory that the first still needs
    assert torch.equal(torch.autograd.grad(y, passes.weight)[0], first)


def test_memory_of_a_pass_goes_to_the_next(passes):
    free = fourier_conv.scratch.free
    for _ in range(3):
        y = passes()
        assert not free
        y.sum().backward()
        assert len(free) == 1  # while the result lives
    with torch.no_grad():
        passes()
    assert len(free) == 1
    passes.x = passes.x.repeat(2, 1, 1, 1)
    passes().sum().backward()
    assert len(free) == 1 and free[0].numel() == 8 * math.prod((*passes.plan.tiles, passes.plan.products, 4 * 2))


def test_training_after_inference(passes):
    with torch.inference_mode():
        passes()
    passes().sum().backward()
    with torch.inference_mode():
        assert passes.is_right(passes())


def test_scratch_memory_is_counted_and_given_back(passes):
    assert fourier_conv.scratch_bytes() == 0
    passes().sum().backward()
    kept = [*fourier_conv.scratch.kept.values(), *fourier_conv.scratch.free]
    assert fourier_conv.scratch_bytes() == sum(tensor.nbytes for tensor in kept) > 0
    fourier_conv.release_scratch()
    assert fourier_conv.scratch_bytes() == 0
    y = passes()
    fourier_conv.release_scratch()  # between a forward pass and its backward pass
    y.square().sum().backward()
    z = functional.conv2d(passes.x.float(), passes.weight, stride=2)
    (expected,) = torch.autograd.grad(z.square().sum() + z.sum(), passes.weight)
    assert error(passes.weight.grad, expected) <= 1e-5


def test_memory_holds_any_type(monkeypatch):
    monkeypatch.setattr(scratch, "scratch", Scratch())
    rows = scratch.scratch.take("rows", 3, 5, dtype=torch.bfloat16)
    assert rows.shape == (3, 5) and rows.dtype == torch.bfloat16
    assert scratch.scratch_bytes() == 32  # of float32
    whole = scratch.scratch.take("rows", 8)
    assert whole.data_ptr() == rows.data_ptr()
    loan = lend(3, 5, dtype=torch.bfloat16)
    assert loan.shape == (3, 5) and loan.dtype == torch.bfloat16
    del loan
    assert scratch.scratch_bytes() == 64
    loan = lend(8)
    assert loan.dtype == torch.float32 and scratch.scratch_bytes() == 32


def test_gradient_checkpointing_keeps_no_memory(passes):
    """Memory that only `ctx` knew would be kept by the first forward pass, and taken again by the second."""
    expected = torch.autograd.grad(passes().square().sum(), passes.weight)[0]
    fourier_conv.release_scratch()
    free = fourier_conv.scratch.free
    y = checkpoint(passes, use_reentrant=False)
    assert len(free) == 1
    (found,) = torch.autograd.grad(y.square().sum(), passes.weight)
    assert torch.equal(found, expected) and len(free) == 1


def test_saved_memory_may_be_kept_elsewhere(passes):
    expected = torch.autograd.grad(passes().square().sum(), passes.weight)[0]
    copies = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: copies.append(t.clone()) or t.clone(), lambda t: t):
        y = passes()
    passes().sum().backward()  # in the memory that the first gave back
    assert torch.equal(torch.autograd.grad(y.square().sum(), passes.weight)[0], expected)
    assert len(copies) >= 3
