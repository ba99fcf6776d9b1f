"""Self-attention routing against the form of the paper, with its I x I matrix, in float64; its squash at the limits."""

import pytest
import torch

from capszoo.layers import SelfAttentionRouting, exponential_squash, self_attention_routing


def paper_form(x, weight, bias, attention=True):
    """Equations 4 to 7 of Mazzia, Salvetti and Chiaberge 2021, one class after the other."""
    dim = weight.shape[3]
    votes = torch.einsum("bik,ikjd->bjid", x, weight)
    agreements = votes @ votes.transpose(2, 3) / dim**0.5  # [B, J, I, I]
    logits = agreements.sum(dim=3) if attention else torch.zeros_like(agreements[..., 0])
    couplings = logits.softmax(dim=1) + bias.T
    s = torch.einsum("bji,bjid->bjd", couplings, votes)
    length = s.norm(dim=2, keepdim=True)
    return (1 - torch.exp(-length)) * s / length


def layer(couplings="attention", sizes=(7, 5, 3, 4), **kwargs):
    torch.manual_seed(0)
    made = SelfAttentionRouting(*sizes, couplings=couplings, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        made.weight.normal_(std=0.8)
        made.bias.normal_(std=0.3)
    return made


@pytest.mark.parametrize("couplings", ["attention", "uniform"])
@pytest.mark.parametrize("sizes", [(7, 5, 3, 4), (16, 8, 10, 16), (1, 1, 1, 1)])
def test_as_in_the_paper(couplings, sizes):
    made = layer(couplings, sizes)
    x = torch.randn(2, *sizes[:2], dtype=torch.float64, requires_grad=True)
    found, expected = made(x), paper_form(x, made.weight, made.bias, couplings == "attention")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    inputs = [x, made.weight, made.bias]
    towards = torch.randn_like(expected)
    for one, other in zip(*(torch.autograd.grad(v, inputs, towards) for v in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_gradients():
    made = layer(sizes=(3, 2, 2, 3))
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(made, x) and torch.autograd.gradgradcheck(made, x)


@pytest.mark.parametrize("attention", [True, False])
def test_work_grows_as_the_capsules(attention):
    """No tensor is as large as a matrix of capsules by capsules would be."""
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t))
            return out

    votes, bias = torch.rand(1, 1000, 2, 3), torch.zeros(1000, 2)
    with Sizes():
        self_attention_routing(votes, bias, attention)
    assert sizes and max(sizes) == votes.numel()


def test_couplings_are_uniform_where_capsules_agree_with_no_class():
    votes = torch.zeros(1, 4, 3, 2)
    votes[:, 0, :, 0] = 1  # alike for all classes
    for attention in (True, False):
        assert torch.allclose(self_attention_routing(votes, torch.zeros(4, 3), attention), votes.sum(1) / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_squash_at_the_limits(dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([[0.0, 0.0], [1e-30, 0], [0, 3e-5], [3, 4], [-largest, 0], [largest, largest]], dtype=dtype)
    x.requires_grad_()
    v = exponential_squash(x)
    v.sum().backward()
    assert v.dtype == dtype and v.isfinite().all() and x.grad.isfinite().all()
    assert (v[0] == 0).all() and (x.grad[0] == 1).all(), "the derivative at zero is the identity"
    half = torch.tensor(0.5, dtype=torch.float64).sqrt()
    expected = torch.tensor([[0.6, 0.8], [-1, 0], [half, half]], dtype=torch.float64)
    expected[0] *= -torch.expm1(torch.tensor(-5.0, dtype=torch.float64))
    small = x.detach()[1:3].double()
    expected = torch.cat([-small.sign() * torch.expm1(-small), expected])
    torch.testing.assert_close(v[1:].double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-300)


def test_squash_is_smooth_at_zero():
    at = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for scale in (1, 1e-3, 1e-8, 1e-15, 1e-17, 1e-200, 0):
        x = (at * scale).requires_grad_()
        (gradient,) = torch.autograd.grad(exponential_squash(x)[:, 0].sum(), x)
        length = x.detach().norm(dim=1, keepdim=True)
        unit = torch.where(length > 0, x.detach() / length, 0)
        factor = torch.where(length > 0, -torch.expm1(-length) / length, 1)
        slope = torch.exp(-length) - factor
        expected = torch.tensor([1.0, 0, 0], dtype=torch.float64) * factor + slope * unit[:, :1] * unit
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_autocast_keeps_the_sums_in_float32():
    torch.manual_seed(0)
    made = SelfAttentionRouting(16, 8, 10)
    x = torch.rand(4, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        half = made(x.bfloat16())
    assert half.dtype == torch.float32
    assert (half - made(x)).norm() / made(x).norm() < 0.01


def test_fresh_weights():
    torch.manual_seed(0)
    weight = SelfAttentionRouting(16, 8, 10).weight
    assert weight.shape == (16, 8, 10, 16)
    assert float(weight.std()) == pytest.approx((2 / 1280) ** 0.5, rel=0.02)


def test_errors():
    with pytest.raises(ValueError, match="unknown couplings 'none'. Known: attention, uniform"):
        layer("none")
    with pytest.raises(AssertionError, match="class capsules of 7 capsules got 6: make the model for this img_size"):
        layer()(torch.zeros(1, 6, 5, dtype=torch.float64))
    assert "num_capsules=7" in repr(layer()) and "couplings='attention'" in repr(layer())
