"""CapsNet itself: its sizes, its capsules and their order, its decoders, and what it says to wrong arguments."""

import math
import os
import subprocess
import sys

import pytest
import timm
import torch
from families import CAPSNETS

import capszoo
from capszoo.kernels.switches import read_switch
from capszoo.layers import capsule_lengths
from capszoo.models import CapsNet


def small(name="capsnet", **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**dict(conv_dim=8, img_size=20), **kwargs}).eval()


def images(batch_size=2, in_chans=1, size=(20, 20)):
    return torch.rand(batch_size, in_chans, *size, generator=torch.Generator().manual_seed(1))


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture
def plain_routing():
    capszoo.set_fused_routing(False)
    yield
    capszoo.set_fused_routing(True)


@pytest.mark.parametrize(
    "name, without, with_decoder", [("capsnet", 6_804_384, 8_215_728), ("capsnet_ws", 5_370_784, 6_708_400)]
)
def test_parameters_are_those_of_the_paper(name, without, with_decoder):
    assert count(capszoo.create_model(name, device="meta")) == without
    assert count(capszoo.create_model(name, device="meta", decoder=True)) == with_decoder


def test_parameters_by_layer():
    model = capszoo.create_model("capsnet", device="meta", decoder=True)
    assert count(model.conv1) == 20_992 and count(model.primary_caps) == 5_308_672
    assert count(model.class_caps) == 1_474_560 + 160 and count(model.decoder) == 1_411_344
    shared = capszoo.create_model("capsnet_ws", device="meta", decoder=True)
    assert count(model.class_caps) - count(shared.class_caps) == 1_433_600
    assert count(model.decoder) - count(shared.decoder) == 73_728


def test_small_models():
    assert count(capszoo.create_model("capsnet_tiny", device="meta", decoder=True)) <= 500_000
    pruned = capszoo.create_model("capsnet_pruned", device="meta", decoder=True)
    assert pruned.class_caps.num_capsules == 8 * 36 and count(pruned.primary_caps) == 64 * (192 * 81 + 1)
    # At most a third of the baseline, both with their decoders.
    assert 3 * count(pruned) <= count(capszoo.create_model("capsnet", device="meta", decoder=True))


def test_cifar_images():
    model = capszoo.create_model("capsnet", in_chans=3, img_size=32, decoder=True).eval()
    assert model.class_caps.num_capsules == 2048
    assert model(images(1, 3, (32, 32))).shape == (1, 10)
    assert model.reconstruct(images(1, 3, (32, 32))).shape == (1, 3, 32, 32)


def test_no_decoder_unless_asked_for():
    assert not any(key.startswith("decoder") for key in small().state_dict())


@pytest.mark.parametrize("name", ["capsnet", "capsnet_ws"])
def test_forward_gives_the_lengths_of_the_class_capsules(name):
    model = small(name, num_classes=6, class_dim=5)
    capsules, scores = model.forward_capsules(images())
    assert capsules.shape == (2, 6, 5)
    assert torch.equal(scores, capsule_lengths(capsules)) and torch.equal(model(images()), scores)
    assert torch.equal(model.forward_head(model.forward_features(images())), capsule_lengths(capsules))


def test_capsules_are_squashed():
    model = small()
    capsules = model.primary_caps.to_capsules(model.forward_features(images() * 1e4))
    assert capsules.shape == (2, 128, 8)
    lengths = capsule_lengths(capsules)
    assert (lengths <= 1 + 1e-5).all() and lengths.max() > 0.9


@pytest.mark.parametrize("share_weights", [False, True])
def test_one_type_is_consecutive_capsules_with_its_own_matrices(share_weights):
    """With the other types' matrices at zero, just the type's own filters can change the output."""
    model = small(num_types=4, share_weights=share_weights)
    assert model.class_caps.weight.shape[0] == (4 if share_weights else 16)
    chosen = 2
    with torch.no_grad():
        by_type = model.class_caps.weight.view(4, -1, 8, 10, 16)
        by_type[torch.arange(4) != chosen] = 0
    expected = model(images())
    for changed in range(4):
        model_weights = model.primary_caps.conv.weight.detach().clone()
        with torch.no_grad():
            model.primary_caps.conv.weight.view(4, 8, -1)[changed] *= -1.5
            same = torch.equal(model(images()), expected)
            model.primary_caps.conv.weight.copy_(model_weights)
        assert same == (changed != chosen)


def test_shared_weights_are_the_same_for_every_position():
    shared, single = small(num_types=4, share_weights=True), small(num_types=4)
    weights = shared.state_dict()
    weights["class_caps.weight"] = weights["class_caps.weight"].repeat_interleave(4, dim=0)
    single.load_state_dict(weights)
    torch.testing.assert_close(shared(images()), single(images()))


@pytest.mark.parametrize("name", CAPSNETS)
def test_channels_last(name):
    model, x = small(name, decoder=True), images()
    expected = model(x)
    expected.sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model = model.to(memory_format=torch.channels_last)
    found = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    found.sum().backward()
    for p, grad in zip([p for p in model.parameters() if p.grad is not None], grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)
    assert model.reconstruct(x.to(memory_format=torch.channels_last)).shape == x.shape


@pytest.mark.parametrize("squash", ["exact", "approx"])
@pytest.mark.parametrize("name", CAPSNETS)
def test_fused_and_plain_routing_agree(name, squash, plain_routing):
    model = small(name, squash=squash)
    assert not capszoo.layers.use_fused_routing()
    plain = model(images())
    plain.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    capszoo.set_fused_routing(True)
    fused = model(images())
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-5)
    fused.sum().backward()
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value, fused", [("0", False), pytest.param(None, True, marks=pytest.mark.slow)])
def test_environment_variable(value, fused):
    env = {key: v for key, v in os.environ.items() if key != "CAPSZOO_FUSED_ROUTING"}
    if value is not None:
        env["CAPSZOO_FUSED_ROUTING"] = value
    code = """
import torch, capszoo
called = []
capszoo.kernels.dynamic_routing, original = lambda *a: called.append(1) or original(*a), capszoo.kernels.dynamic_routing
capszoo.create_model("capsnet_tiny", conv_dim=8, img_size=17)(torch.rand(1, 1, 17, 17))
print(capszoo.layers.use_fused_routing(), bool(called))
"""
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == [str(fused), str(fused)], result.stderr


@pytest.mark.parametrize(("text", "on"), [("0", False), (" off", False), ("False", False), ("1", True), ("ON", True)])
def test_words_of_the_environment_variables(monkeypatch, text, on):
    monkeypatch.setenv("CAPSZOO_FOURIER_CONV", text)
    assert read_switch("CAPSZOO_FOURIER_CONV") is on
    monkeypatch.setenv("CAPSZOO_FOURIER_CONV", text + "x")
    with pytest.raises(ValueError, match="says neither on nor off: give 1 or 0, or unset it"):
        read_switch("CAPSZOO_FOURIER_CONV")
    monkeypatch.delenv("CAPSZOO_FOURIER_CONV")
    assert read_switch("CAPSZOO_FOURIER_CONV")


def test_num_routing_and_squash_change_the_output():
    outputs = [small(**kw)(images()) for kw in ({}, dict(num_routing=1), dict(num_routing=2), dict(squash="approx"))]
    for i, a in enumerate(outputs):
        assert not any(torch.allclose(a, b, rtol=0, atol=1e-6) for b in outputs[:i])


@pytest.mark.parametrize("small_decoder", [False, True])
def test_reconstruct(small_decoder):
    model = small(decoder=True, small_decoder=small_decoder, in_chans=2, img_size=(18, 21))
    x = images(3, 2, (18, 21))
    drawn = model.reconstruct(x)
    assert drawn.shape == x.shape and (drawn > 0).all() and (drawn < 1).all()
    longest = model(x).argmax(dim=1)
    assert torch.equal(drawn, model.reconstruct(x, longest))
    other = (longest + 1) % 10
    assert not torch.allclose(drawn, model.reconstruct(x, other))
    mixed = torch.where(torch.arange(3) == 1, other, longest)
    assert torch.equal((model.reconstruct(x, mixed) == drawn).all(dim=(1, 2, 3)), torch.tensor([True, False, True]))


def test_small_decoder_is_the_masked_one_without_its_zeros():
    masked, single = small(decoder=True), small(decoder=True, small_decoder=True)
    x = images(4)
    for target in range(10):
        weights = masked.state_dict()
        weights["decoder.fc1.weight"] = weights["decoder.fc1.weight"][:, target * 16 : (target + 1) * 16]
        single.load_state_dict(weights)
        targets = torch.full((4,), target)
        torch.testing.assert_close(single.reconstruct(x, targets), masked.reconstruct(x, targets))


def test_dropout_is_for_training_alone():
    model = small(drop_rate=0.5)
    assert torch.equal(model(images()), model(images())) and torch.equal(model(images()), small()(images()))
    model.train()
    assert not torch.equal(model(images()), model(images()))
    assert not torch.equal(model.forward_capsules(images())[0], model.forward_capsules(images())[0])


@pytest.mark.parametrize("name", CAPSNETS)
def test_autocast(name):
    model = small(name, decoder=True).train()
    expected = model(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        capsules, lengths = model.forward_capsules(images())
        drawn = model.decoder(capsules, torch.tensor([1, 2]))
        loss = lengths.sum() + drawn.float().sum()
    assert lengths.dtype == torch.float32  # bfloat16 would not tell 0.9 from 0.9035
    torch.testing.assert_close(lengths, expected, rtol=0, atol=0.02)
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == torch.float32, key


@pytest.mark.parametrize("squash", ["exact", "approx"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_black_images(squash, bias, fused, plain_routing):
    """Without biases every capsule is exactly zero, where the length has no derivative."""
    capszoo.set_fused_routing(fused)
    model = small(squash=squash).train()
    if not bias:
        for module in (model.conv1, model.primary_caps.conv, model.class_caps):
            torch.nn.init.zeros_(module.bias)
    output = model(torch.zeros(2, 1, 20, 20))
    output.square().sum().backward()
    model(torch.zeros(2, 1, 20, 20)).sum().backward()
    assert output.isfinite().all() and (bias or (output == 0).all())
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_needs_a_decoder():
    with pytest.raises(RuntimeError, match=r"no decoder: make it with create_model\(..., decoder=True\)$"):
        small().reconstruct(images())


def test_needs_classes():
    with pytest.raises(RuntimeError, match=r"num_classes=0 and no class capsules: call reset_classifier"):
        small(num_classes=0).forward_capsules(images())
    with pytest.raises(RuntimeError, match="no decoder"):
        small(num_classes=0, decoder=True).reconstruct(images())


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(squash="exakt"), "unknown squash 'exakt'. Known: exact, approx"),
        (dict(routing="dinamic"), "unknown routing 'dinamic', did you mean 'dynamic'"),
        (dict(global_pool="avg"), "global_pool='avg' is not possible"),
        (dict(img_size=16), "img_size=16x16 is too small: two 9x9 convolutions need 17 pixels"),
        (dict(img_size=(28, 9)), "img_size=28x9 is too small"),
        (dict(num_classes=-1), "num_classes=-1 is not possible"),
        (dict(in_chans=0), "in_chans=0 is not possible"),
        (dict(conv_dim=0), "conv_dim=0 is not possible"),
        (dict(drop_rate=100), "drop_rate=100 is not possible"),
        (dict(drop_rate=math.nan), "drop_rate=nan is not possible"),
        (dict(num_types=0), "num_types=0 is not possible"),
        (dict(num_routing=0), "num_routing=0 is not possible"),
        (dict(num_routing=2.5), "num_routing=2.5 is not possible"),
        (dict(num_routing=10**9), "num_routing=1000000000 is not possible"),
        (dict(kernel_size=0), "kernel_size=0 is not possible"),
        (dict(caps_dim=0), "caps_dim=0 is not possible"),
        (dict(class_dim=-2), "class_dim=-2 is not possible"),
        (dict(decoder_dims=(0, 3)), r"decoder_dims=\(0, 3\) is not possible: give two widths of 1 or more"),
        (dict(decoder_dims=(4,)), r"decoder_dims=\(4,\) is not possible"),
        (dict(keep_types=0), "keep_types=0 is not possible: it must be 1 to num_types=32"),
        (dict(keep_types=33), "keep_types=33 is not possible"),
        (dict(keep_types=()), r"keep_types=\(\) is not possible: give distinct indices from 0 to 31"),
        (dict(keep_types=(1, 1)), r"keep_types=\(1, 1\) is not possible"),
        (dict(keep_types=(0, 32)), r"keep_types=\(0, 32\) is not possible"),
        (dict(keep_types=(-1,)), r"keep_types=\(-1,\) is not possible"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        CapsNet(**{"device": "meta", **kwargs})
    assert "\n" not in str(error.value)


def test_wrong_pool_on_reset():
    model = small()
    with pytest.raises(ValueError, match="global_pool='avg' is not possible"):
        model.reset_classifier(5, "avg")
    with pytest.raises(ValueError, match="num_classes=-3 is not possible"):
        model.reset_classifier(-3)
    assert model.num_classes == 10 and model(images()).shape == (2, 10)


def test_features_of_chosen_capsules_move():
    """Without its primary capsules a network has none to choose from."""
    model = small(keep_capsules=[1, 2, 5], features_only=True, out_indices=[0])
    assert model.to_empty(device="cpu")(images())[0].shape == (2, 8, 12, 12)
