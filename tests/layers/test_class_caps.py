"""Class capsules: votes per capsule or per type, the routing by name, and what does not fit."""

import pytest
import torch

from capszoo.kernels import reference
from capszoo.layers import ClassCaps, DynamicRouting, create_routing, list_routings


def make(num_weights=None, **kwargs):
    torch.manual_seed(0)
    return ClassCaps(6, 3, 4, class_dim=5, num_weights=num_weights, **kwargs)


def capsules(batch_size=2, I=6):  # noqa: E741
    return torch.randn(batch_size, I, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("num_weights", [None, 1, 2, 3, 6])
@pytest.mark.parametrize("num_routing", [1, 3])
def test_routing(num_weights, num_routing):
    layer = make(num_weights, num_routing=num_routing)
    assert layer.weight.shape == (num_weights or 6, 3, 4, 5)
    expected = reference.dynamic_routing(capsules(), layer.weight, layer.bias, num_routing)
    torch.testing.assert_close(layer(capsules()), expected)
    approximate = make(num_weights, num_routing=num_routing, approximate_squash=True)
    expected = reference.dynamic_routing(capsules(), layer.weight, layer.bias, num_routing, True)
    torch.testing.assert_close(approximate(capsules()), expected)


def test_consecutive_capsules_share_a_matrix():
    shared, single = make(2), make()
    with torch.no_grad():
        single.weight.copy_(shared.weight.repeat_interleave(3, dim=0))
    torch.testing.assert_close(single(capsules()), shared(capsules()))
    with torch.no_grad():
        single.weight.copy_(shared.weight.repeat(3, 1, 1, 1))  # tiled, as in the reference code of FasTrCaps
    assert not torch.allclose(single(capsules()), shared(capsules()))


def test_initial_values():
    layer = ClassCaps(64, 8, 10)
    weight = layer.weight.detach()
    assert weight.std().item() == pytest.approx(0.1, rel=0.05) and abs(weight.mean().item()) < 0.01
    assert (layer.bias == 0.1).all()
    with torch.no_grad():
        layer.weight.fill_(7)
        layer.bias.fill_(7)
    layer.reset_parameters()
    assert layer.weight.abs().max() < 1 and (layer.bias == 0.1).all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_capsules_are_routed_in_the_type_of_the_parameters(half):
    layer, x = make(), capsules().to(half).requires_grad_()
    output = layer(x)
    assert output.dtype == torch.float32 and torch.equal(output, layer(x.float()))
    output.sum().backward()
    assert x.grad.dtype == half and x.grad.isfinite().all()


def test_other_numbers_of_capsules():
    with pytest.raises(ValueError, match="num_weights=4 does not divide the 6 capsules"):
        make(4)
    for layer in make(1), make(2), make():
        with pytest.raises(AssertionError, match="of 6 capsules got 12: make the model for this img_size"):
            layer(capsules(I=12))


def test_routing_by_name():
    assert "dynamic" in list_routings()
    routing = create_routing("dynamic", 2, approximate_squash=True)
    assert isinstance(routing, DynamicRouting)
    assert repr(routing) == "DynamicRouting(num_iters=2, approximate_squash=True)"
    with pytest.raises(ValueError, match="^unknown routing 'dynamc', did you mean 'dynamic'[?] Known: dynamic"):
        create_routing("dynamc")
    with pytest.raises(ValueError, match="^unknown routing 'em'. Known: dynamic"):
        create_routing("em")
    with pytest.raises(ValueError, match="num_routing=0 is not possible: routing takes 1 to 100 whole iterations"):
        create_routing("dynamic", 0)


def test_script_and_settings():
    layer = make(2)
    assert torch.equal(torch.jit.script(layer)(capsules()), layer(capsules()))
    assert "num_capsules=6, caps_dim=3, num_classes=4, class_dim=5, num_weights=2" in repr(layer)
    assert make(device="meta", dtype=torch.float64).weight.dtype == torch.float64
    assert layer(capsules(0)).shape == (0, 4, 5)
