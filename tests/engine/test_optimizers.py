"""The fused optimizers compute what PyTorch's do, in whatever memory format, without copies of gradients."""

import copy

import pytest
import torch
from torch import nn

from capszoo.engine.optimizers import FusedAdam, FusedAdamW, FusedSGD, create_optimizer
from capszoo.engine.options import options_from

KINDS = [(FusedAdam, torch.optim.Adam), (FusedAdamW, torch.optim.AdamW)]
SETTINGS = {"lr": 0.05, "weight_decay": 0.1}


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 1, 2), nn.Flatten(), nn.Linear(4, 2))
    return model.to(memory_format=torch.channels_last)


def train(model, optimizer, format_of_gradients=torch.preserve_format, steps=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator)
            p.grad = torch.empty_like(p).copy_(grad)
            if p.dim() == 4:
                p.grad = p.grad.clone(memory_format=format_of_gradients)
        optimizer.step()
    return list(model.parameters())


MORE = [(*kinds, {"amsgrad": amsgrad}) for kinds in KINDS for amsgrad in (False, True)]
MORE += [(FusedSGD, torch.optim.SGD, {"momentum": momentum, "nesterov": momentum > 0}) for momentum in (0.0, 0.9)]


@pytest.mark.parametrize("format_of_gradients", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("fused", "plain", "more"), MORE)
def test_it_is_the_same_update(fused, plain, more, format_of_gradients):
    model, expected = make_model(), make_model()
    settings = {**SETTINGS, **more}
    found = train(model, fused(model.parameters(), **settings, fused=True), format_of_gradients)
    expected = train(expected, plain(expected.parameters(), **settings))
    for p, q in zip(found, expected, strict=True):
        assert p.stride() == q.stride()
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("fused", "plain"), KINDS)
def test_states_are_those_of_torch(fused, plain):
    model = make_model()
    optimizer = fused(model.parameters(), **SETTINGS, fused=True)
    train(model, optimizer)
    other = copy.deepcopy(model)
    torchs = plain(other.parameters(), **SETTINGS, fused=True)
    torchs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(train(model, optimizer), train(other, torchs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_sgd_reads_its_learning_rate_from_memory():
    """As a replay needs it, which runs no Python."""
    model, expected = make_model(), make_model()
    rate = torch.tensor(0.5)
    optimizer = FusedSGD(model.parameters(), lr=rate, momentum=0.9, fused=True)
    plain = torch.optim.SGD(expected.parameters(), lr=0.5, momentum=0.9)
    train(model, optimizer)
    train(expected, plain)
    rate.fill_(0.125)
    plain.param_groups[0]["lr"] = 0.125
    for p, q in zip(train(model, optimizer), train(expected, plain), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_no_gradient_is_copied():
    model = make_model()
    optimizer = FusedAdam(model.parameters(), fused=True)
    train(model, optimizer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert "aten::clone" not in {event.name for event in profile.events()}


@pytest.mark.parametrize(("name", "kind"), [("adam", FusedAdam), ("adamw", FusedAdamW), ("sgd", torch.optim.SGD)])
def test_recipes_take_it(name, kind):
    options = options_from({"opt": name, "lr": 0.25, "weight_decay": 0.125, "momentum": 0.5})
    optimizer = create_optimizer(options, make_model())
    assert type(optimizer) is kind and optimizer.defaults["lr"] == 0.25
    assert {group["weight_decay"] for group in optimizer.param_groups} <= {0.0, 0.125}
    assert all(group["lr"] == 0.25 for group in optimizer.param_groups)
    if kind is not torch.optim.SGD:
        assert all(group["fused"] for group in optimizer.param_groups)
