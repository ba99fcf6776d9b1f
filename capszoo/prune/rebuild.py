"""Smaller networks of the tensors of a given one."""

from typing import Any

import torch
from torch import Tensor

from capszoo.layers import fan_in_scale
from capszoo.models import CapsNet
from capszoo.registry import create_model

from .parts import capsule_places, count_types

# What a configuration says of the weights it came with, untrue of pruned ones.
_SOURCE_KEYS = {
    "custom_load",
    "description",
    "file",
    "hf_hub_filename",
    "hf_hub_id",
    "notes",
    "origin_url",
    "source",
    "state_dict",
    "tag",
    "url",
}


def keep_conv1(model: CapsNet, filters: list[int]) -> CapsNet:
    """Keep these filters of the first convolution."""
    index, conv = torch.tensor(filters, device=model.conv1.weight.device), model.primary_caps.conv
    tensors = {
        "conv1.weight": model.conv1.weight[index],
        "conv1.bias": model.conv1.bias[index],
        "primary_caps.conv.weight": conv.kernels()[:, index],
    }
    # What is kept of filters has another mean, and trains as those that are not centred.
    if not conv.centered.is_meta and conv.centered:
        scale = torch.full_like(conv.scale, fan_in_scale(tensors["primary_caps.conv.weight"][0].numel()))
        tensors["primary_caps.conv.weight"] *= conv.scale / scale
        tensors |= {"primary_caps.conv.scale": scale, "primary_caps.conv.centered": torch.zeros_like(conv.centered)}
    return rebuild(model, tensors, conv_dim=len(filters))


def keep_types_and_capsules(model: CapsNet, types: list[int], capsules: list[int], single: bool) -> CapsNet:
    """Keep `types`, and of the capsules that are there `capsules`, all of these types; `single` for not all of them."""
    device = model.class_caps.weight.device
    conv, num_types = model.primary_caps.conv, count_types(model)
    kept = torch.tensor(types, device=device)
    rows = kept if model.share_weights else torch.tensor(capsules, device=device)
    tensors = {
        # Filters are type-major.
        "primary_caps.conv.weight": conv.weight.unflatten(0, (num_types, -1))[kept].flatten(0, 1),
        "primary_caps.conv.bias": conv.bias.unflatten(0, (num_types, -1))[kept].flatten(0, 1),
        "class_caps.weight": model.class_caps.weight[rows],
    }
    changes: dict[str, Any] = {}
    if len(types) < num_types:
        before = model.arguments()["keep_types"] or list(range(num_types))
        # Where only a number of types is known, nobody knows which types of the full network they were.
        changes["keep_types"] = len(types) if isinstance(before, int) else [before[t] for t in types]
    if single or model.keep_capsules:
        per_type = model.num_primary // num_types
        new_type = {t: n for n, t in enumerate(types)}
        places = (capsule_places(model)[torch.tensor(capsules)]).tolist()
        changes["keep_capsules"] = [new_type[i // per_type] * per_type + i % per_type for i in places]
    return rebuild(model, tensors, **changes)


def keep_decoder(model: CapsNet, first: list[int], second: list[int]) -> CapsNet:
    """Keep these units of the decoder's two hidden layers."""
    decoder = model.decoder
    one, two = (torch.tensor(units, device=decoder.fc1.weight.device) for units in (first, second))
    tensors = {
        "decoder.fc1.weight": decoder.fc1.weight[one],
        "decoder.fc1.bias": decoder.fc1.bias[one],
        "decoder.fc2.weight": decoder.fc2.weight[two][:, one],
        "decoder.fc2.bias": decoder.fc2.bias[two],
        "decoder.fc3.weight": decoder.fc3.weight[:, two],
    }
    return rebuild(model, tensors, decoder_dims=[len(first), len(second)])


def rebuild(model: CapsNet, tensors: dict[str, Tensor], **changes: Any) -> CapsNet:
    """Make the network again with changed arguments and tensors; all others are copied."""
    # On the meta device nothing is initialised, and the random state stays as it was.
    arguments = {**model.arguments(), **changes}
    smaller = create_model(model.pretrained_cfg["architecture"], device="meta", **arguments)
    smaller.pretrained_cfg = smaller.default_cfg = model.pretrained_cfg
    state = {key: tensors.get(key, value).detach().clone() for key, value in model.state_dict().items()}
    smaller.load_state_dict(state, assign=True)
    for name, buffer in model.named_buffers():
        if name.startswith("backbone.") and name not in state:  # no state dict holds these, and nothing changes them
            owner, _, key = name.rpartition(".")
            smaller.get_submodule(owner).register_buffer(key, buffer.clone(), persistent=False)
    return smaller


def take_over(model: CapsNet, source: CapsNet) -> None:
    """Give the pruned network what the given one had beside its weights."""
    cfg = {key: value for key, value in source.pretrained_cfg.items() if key not in _SOURCE_KEYS}
    cfg.update(
        num_classes=model.num_classes, input_size=(model.in_chans, *model.img_size), pool_size=tuple(model.grid_size)
    )
    model.pretrained_cfg = model.default_cfg = cfg
    model.creation_args = model.arguments()
    model.grad_checkpointing = source.grad_checkpointing
    conv = source.conv1.weight, source.primary_caps.conv.weight
    if all(weight.is_contiguous(memory_format=torch.channels_last) for weight in conv):
        if not all(weight.is_contiguous() for weight in conv):
            model.to(memory_format=torch.channels_last)
    for name, module in source.named_modules():
        model.get_submodule(name).training = module.training
    for name, parameter in source.named_parameters():
        model.get_parameter(name).requires_grad_(parameter.requires_grad)
