"""Small networks to prune, and what is known of pruned ones."""

import copy
import json

import pytest
import torch

import capszoo

# 4 types of 2x3 positions, 24 capsules.
SMALL = dict(conv_dim=6, num_types=4, caps_dim=4, class_dim=5, num_classes=3, img_size=(20, 22), decoder_dims=(7, 9))
PER_TYPE = 6
MODELS = {
    "capsnet": {},
    "capsnet_ws": {},
    "capsnet_pruned": dict(keep_types=4, num_types=8),
    "capsnet_tiny": {},
    "capsnet with chosen types": dict(keep_types=(6, 1, 2, 4), num_types=8),
    "capsnet_tiny with approximate squash": dict(squash="approx", num_routing=2),
}
every_model = pytest.mark.parametrize("name", MODELS)


def small(name="capsnet", **kwargs):
    torch.manual_seed(0)
    options = {**SMALL, "decoder": True, "dtype": torch.float64, **MODELS.get(name, {}), **kwargs}
    model = capszoo.create_model(name.split(" ")[0], **options).eval()
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            torch.nn.init.uniform_(module.bias, -0.1, 0.1)
    return model


def images(batch_size=4, dtype=torch.float64, size=(20, 22)):
    return torch.rand(batch_size, 1, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def batches(num=3, **kwargs):
    return [(images(4, **kwargs).roll(i, 0) * (1 - i / 7), (torch.arange(4) + i) % 3) for i in range(num)]


def hold_at_zero(model, conv1=None, types=None, capsules=None, decoder=None):
    """A copy in which the activations of all parts but those kept are zero."""
    model = copy.deepcopy(model)
    num_types = model.primary_caps.num_types
    with torch.no_grad():
        if conv1 is not None:
            gone = [c for c in range(model.conv1.out_channels) if c not in conv1]
            model.conv1.weight[gone], model.conv1.bias[gone] = 0, 0
        if types is not None:
            gone = [t for t in range(num_types) if t not in types]
            conv = model.primary_caps.conv
            conv.weight.unflatten(0, (num_types, -1))[gone] = 0
            conv.bias.unflatten(0, (num_types, -1))[gone] = 0
        if decoder is not None:
            for fc, kept in zip((model.decoder.fc1, model.decoder.fc2), decoder, strict=True):
                gone = [u for u in range(fc.out_features) if u not in kept]
                fc.weight[gone], fc.bias[gone] = 0, 0
    if capsules is not None:
        there = model.keep_capsules or range(model.num_primary)
        mask = torch.zeros(model.num_primary, dtype=torch.float64)
        mask[[there[i] for i in capsules]] = 1
        mask = mask.view(num_types, 1, *model.grid_size)
        model.primary_caps.register_forward_hook(
            lambda module, args, x: (x.unflatten(1, (num_types, -1)) * mask.to(x.dtype)).flatten(1, 2)
        )
    return model


def assert_same(found, expected, atol=1e-12):
    x = images(dtype=found.conv1.weight.dtype, size=found.img_size)
    with torch.no_grad():
        torch.testing.assert_close(found.forward_capsules(x)[0], expected.forward_capsules(x)[0], rtol=0, atol=atol)
        if found.decoder is not None:
            target = torch.arange(4) % found.num_classes
            drawn, whole = found.reconstruct(x, target), expected.reconstruct(x, target)
            torch.testing.assert_close(drawn, whole, rtol=0, atol=atol)


def as_created(model):
    """The network that the saved arguments make, with these weights."""
    arguments = json.loads(json.dumps(model.creation_args))
    again = capszoo.create_model(model.pretrained_cfg["architecture"], dtype=torch.float64, **arguments).eval()
    again.load_state_dict(model.state_dict())
    return again
