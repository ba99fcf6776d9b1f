"""Layers of DeepCaps: convolutional routing against a loop over capsules in float64, its limits, the decoder."""

import pytest
import torch
import torch.nn.functional as F

from capszoo import set_fused_routing
from capszoo.layers import ConvCaps, ConvDynamicRouting, DeconvDecoder


def layer(num_iters=3, sizes=(3, 4, 2, 5), **kwargs):
    torch.manual_seed(0)
    made = ConvDynamicRouting(*sizes, num_iters, dtype=torch.float64, **kwargs)
    torch.nn.init.normal_(made.bias)
    torch.nn.init.normal_(made.weight)
    return made


def maps(batch=2, chans=12, size=(3, 4)):
    return torch.randn(batch, chans, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_loops(x, made):
    """Procedure of section 3.1: types below one after the other, squash over a capsule's dimensions."""
    parents, dim = made.num_parents, made.parent_dim
    out = []
    for image in x.unflatten(1, (made.num_types, -1)):
        votes = [F.conv2d(below[None], made.weight, padding=1)[0].unflatten(0, (parents, dim)) for below in image]
        logits = [torch.zeros_like(vote[:, 0]) for vote in votes]  # [J, H, W]
        for _ in range(made.num_iters):
            couplings = [logit.exp() / logit.exp().sum() for logit in logits]
            s = sum(c[:, None] * vote for c, vote in zip(couplings, votes, strict=True)) + made.bias[:, :, None, None]
            squares = s.square().sum(dim=1, keepdim=True)
            v = squares / (1 + squares) * s / squares.sqrt()
            logits = [logit + (vote * v).sum(dim=1) for logit, vote in zip(logits, votes, strict=True)]
        out.append(v.flatten(0, 1))
    return torch.stack(out)


@pytest.mark.parametrize("num_iters", [1, 2, 3, 5])
@torch.no_grad()
def test_routing_as_in_the_paper(num_iters):
    made, x = layer(num_iters), maps()
    torch.testing.assert_close(made(x), by_loops(x, made), rtol=1e-11, atol=1e-11)
    with set_fused_routing(False):
        torch.testing.assert_close(made(x), by_loops(x, made), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("num_iters", [1, 3])
def test_derivatives(num_iters):
    made, x = layer(num_iters, (2, 2, 2, 2)), maps(1, 4, (2, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: made(x), [x, *made.parameters()])
    assert torch.autograd.gradgradcheck(lambda x, *_: made(x), [x, *made.parameters()], fast_mode=True)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 4, 2, 5)], ids=str)
def test_finite_at_the_limits(value, sizes):
    made = layer(3, sizes).float()
    for batch in (0, 1, 2):
        x = torch.full((batch, sizes[0] * sizes[1], 1, 2), value, requires_grad=True)
        v = made(x)
        v.square().sum().backward()
        assert v.shape == (batch, sizes[2] * sizes[3], 1, 2)
        assert v.isfinite().all() and x.grad.isfinite().all() and made.weight.grad.isfinite().all()


def test_votes_are_stored_once():
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    made, x = ConvDynamicRouting(32, 8, 32, 8, 5), torch.randn(2, 256, 4, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        made(x)
    votes = 2 * 32 * 32 * 8 * 16 * 4
    assert votes <= sum(sizes.values()) < 2.5 * votes


@torch.no_grad()
def test_start_keeps_lengths():
    """Capsules of length 1/2 make capsules of length 1/2, whatever their dimensions."""
    torch.manual_seed(0)
    for in_dim, dim in ((4, 8), (8, 8), (0, 4)):
        made = ConvCaps(32 * max(in_dim, 1), in_dim, 32, dim)
        x = torch.randn(4, 32 * max(in_dim, 1), 8, 8)
        if in_dim:
            x = F.normalize(x.unflatten(1, (32, in_dim)), dim=2).flatten(1, 2) / 2
        lengths = made(x).unflatten(1, (32, dim)).norm(dim=2)
        assert lengths.mean().item() == pytest.approx(0.45, abs=0.06) and lengths.max() < 1


@torch.no_grad()
def test_decoder_takes_the_chosen_capsule_whatever_its_class():
    torch.manual_seed(0)
    decoder = DeconvDecoder(5, (2, 13, 16)).eval()
    capsules = torch.randn(2, 3, 5)
    capsules[1, 2] = capsules[0, 0]
    drawn = decoder(capsules, torch.tensor([0, 2]))
    assert drawn.shape == (2, 2, 13, 16) and (drawn > 0).all() and (drawn < 1).all()
    torch.testing.assert_close(drawn[0], drawn[1])


def test_errors():
    with pytest.raises(ValueError, match="^num_routing=0 is not possible: routing takes 1 to 100 whole iterations$"):
        ConvDynamicRouting(1, 1, 1, 1, 0)
