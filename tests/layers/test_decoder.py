"""The decoder: which capsule it draws, in both of its forms."""

import pytest
import torch

from capszoo.layers import Decoder


def make(small, **kwargs):
    torch.manual_seed(0)
    return Decoder(3, 4, (2, 5, 6), hidden_dims=(7, 8), small=small, **kwargs)


def capsules():
    return torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("small", [False, True])
def test_draws_the_chosen_capsule_alone(small):
    decoder, x, target = make(small), capsules().requires_grad_(), torch.tensor([2, 0, 1])
    images = decoder(x, target)
    assert images.shape == (3, 2, 5, 6) and (images > 0).all() and (images < 1).all()
    images.sum().backward()
    touched = x.grad.abs().sum(dim=2) > 0
    assert torch.equal(touched, torch.nn.functional.one_hot(target, 3).bool())


def test_layers():
    masked, single = make(False), make(True)
    assert masked.fc1.in_features == 12 and single.fc1.in_features == 4
    assert single.fc3.out_features == 60
    for decoder in masked, single:
        chosen = capsules()[:, 1]
        vector = torch.cat([torch.zeros(3, 4), chosen, torch.zeros(3, 4)], dim=1) if decoder is masked else chosen
        hidden = decoder.fc2(decoder.fc1(vector).relu()).relu()
        expected = decoder.fc3(hidden).sigmoid().view(3, 2, 5, 6)
        torch.testing.assert_close(decoder(capsules(), torch.ones(3, dtype=torch.int64)), expected)


@pytest.mark.parametrize("target", range(3))
def test_small_is_the_masked_one_without_its_zeros(target):
    masked, single = make(False), make(True)
    weights = masked.state_dict()
    weights["fc1.weight"] = weights["fc1.weight"][:, target * 4 : (target + 1) * 4]
    single.load_state_dict(weights)
    targets = torch.full((3,), target)
    torch.testing.assert_close(single(capsules(), targets), masked(capsules(), targets))


@pytest.mark.parametrize("small", [False, True])
def test_types_and_empty_batches(small):
    target = torch.tensor([2, 0, 1])
    assert make(small, dtype=torch.bfloat16)(capsules().bfloat16(), target).dtype == torch.bfloat16
    assert make(small, device="meta").fc1.weight.is_meta
    assert make(small)(capsules()[:0], target[:0]).shape == (0, 2, 5, 6)
    scripted = torch.jit.script(make(small))
    assert torch.equal(scripted(capsules(), target), make(small)(capsules(), target))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make(small)(capsules(), target).isfinite().all()
