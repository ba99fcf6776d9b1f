"""A network of timm as the first layers of a capsule network: the map of one level of its features."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import ConvNormAct
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, group_parameters, model_entrypoint
from timm.models import is_model as timm_is_model
from torch import Tensor, nn

from capszoo.errors import first_line, unknown_name

from .checkpointing import checkpoint_once

__all__ = ["LEAST_MAP", "STEM", "Backbone", "BackbonePlan", "StridedStem", "plan_backbone"]

STEM = "stem"
# Pixels each way that the map of the default level has at least: ImageNet's 224 pixels end at level 16 with 14.
LEAST_MAP = 12
# Keywords of timm's that the model sets itself.
_OWN_KEYWORDS = {"device", "dtype", "feature_cfg", "feature_cls", "features_only", "in_chans", "out_indices"}
# What the names of a network's modules begin with in timm's extractors.
_WRAPPERS = ("model.", "body.")


class BackbonePlan(NamedTuple):
    """What is known of a backbone before it is made.

    Attributes:
        level: Its level, counted from the first.
        channels: C of its map.
        map_size: (H, W) of its map.
        first_conv: Names in its network of the convolutions that see the images.
        extractor: timm's kind of extractor, None for the network's default.
        channels_last: Whether the network gives ``[B, H, W, C]``.
        unused: Names of parameters that its map does not depend on.
        mean: Mean of the images that timm's weights were trained on; None where timm has no weights.
        std: Their standard deviation.
    """

    level: int
    channels: int
    map_size: tuple[int, int]
    first_conv: tuple[str, ...]
    extractor: str | None
    channels_last: bool
    unused: frozenset[str]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


class StridedStem(nn.Module):
    """3x3 convolutions of stride 2 with BatchNorm and ReLU: a backbone for those who want no other.

    Args:
        in_chans: Channels of the images.
        level: Its level; level l has l + 1 convolutions and a map of 1 / 2^(l + 1) of the images' size.
        dims: Filters of each level.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_chans: int,
        level: int,
        dims: Sequence[int] = (32, 64, 128, 256, 256),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        widths = [in_chans, *dims[: level + 1]]
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.convs = nn.Sequential(
            *(ConvNormAct(a, b, 3, stride=2, **dd) for a, b in zip(widths, widths[1:], strict=False))
        )
        self.grad_checkpointing = False

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing of the convolutions."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map images ``[B, C, H, W]`` to the one map, in a list as timm's extractors have it."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for conv in self.convs:
                x = checkpoint_once(conv, x)
            return [x]
        return [self.convs(x)]


def plan_backbone(
    name: str,
    level: int | None,
    in_chans: int,
    img_size: tuple[int, int],
    kwargs: Mapping[str, Any] | None = None,
    least_map: int = LEAST_MAP,
) -> BackbonePlan:
    """Check the arguments of a backbone, and say what its map will be; nothing is made but on the meta device.

    Args:
        name: As for :class:`Backbone`, as are the others.
        level: Level of its features, negative ones from the last; None for the default.
        in_chans: Channels of the images.
        img_size: (H, W) of the images.
        kwargs: More for the network.
        least_map: Pixels each way that the map of the default level has at least.

    Raises:
        ValueError: If no network has this name, it has no features or no such level, or a keyword is not possible.
    """
    if name != STEM:
        arch, _, tag = name.partition(".")
        if not timm_is_model(arch) or (tag and name not in get_arch_pretrained_cfgs(arch)):
            known = [*timm.list_models(), STEM] if not timm_is_model(arch) else list(get_arch_pretrained_cfgs(arch))
            raise ValueError(unknown_name("backbone", name, known, "see timm.list_models(), or give 'stem'"))
        if hasattr(model_entrypoint(name).__annotations__.get("return"), "capsule_layers"):
            raise ValueError(
                f"backbone={name!r} is a capsule network itself: give a network of timm, such as 'resnet18'"
            )
    for key in kwargs or {}:
        if key in _OWN_KEYWORDS:
            raise ValueError(f"backbone_kwargs has {key!r}, which the model sets itself: leave it out")
        # Also of a file's header, which must not make anyone read or download another file.
        if "pretrained" in str(key) or key in ("cache_dir", "checkpoint_path"):
            raise ValueError(f"backbone_kwargs has {key!r}: give backbone_pretrained=True for timm's weights")
    try:
        options = json.dumps(dict(kwargs or {}), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"backbone_kwargs cannot be kept in a file ({first_line(error)}): give plain values") from None
    with torch.random.fork_rng(devices=[]):  # networks may draw numbers, and a plan that is known draws none
        return _plan(name, level, in_chans, tuple(img_size), options, least_map)


@functools.lru_cache(maxsize=64)
def _plan(
    name: str, level: int | None, in_chans: int, img_size: tuple[int, int], options: str, least_map: int
) -> BackbonePlan:
    reductions = _reductions(name, in_chans, img_size, options)
    if level is None:
        fits = [n for n, reduction in enumerate(reductions) if min(img_size) / reduction >= least_map]
        # Of maps that are all too small, the deepest of the largest.
        level = fits[-1] if fits else max(n for n, reduction in enumerate(reductions) if reduction == reductions[0])
    elif not -len(reductions) <= level < len(reductions):
        levels = f"0 to {len(reductions) - 1}, or {-len(reductions)} to -1 from the last"
        raise ValueError(
            f"backbone_level={level} is not possible: {name!r} has {len(reductions)} levels, give {levels}"
        )
    level %= len(reductions)
    try:
        return _measure(name, level, in_chans, img_size, options)
    except Exception as error:  # a network may refuse a size or a level in any way
        size = f"{img_size[0]}x{img_size[1]}"
        raise ValueError(
            f"backbone {name!r} has no map of images of {size} at level {level} ({first_line(error)}): give another "
            f"img_size, backbone_level or backbone"
        ) from error


def _reductions(name: str, in_chans: int, img_size: tuple[int, int], options: str) -> list[int]:
    """Pixels of the images for each of the map, by level."""
    if name == STEM:
        return [2 ** (n + 1) for n in range(len(_stem_dims(options)))]
    info: Any = getattr(_network(name, in_chans, img_size, options), "feature_info", None)
    levels: Any = getattr(info, "info", info)
    if not levels:
        raise ValueError(f"backbone {name!r} has no levels of features: give another, such as 'resnet18'")
    return [level["reduction"] for level in levels]


def _stem_dims(options: str) -> list[int]:
    kwargs = json.loads(options)
    dims = kwargs.pop("dims", [32, 64, 128, 256, 256])
    if kwargs or not isinstance(dims, list) or not all(type(n) is int and n > 0 for n in dims) or not dims:
        raise ValueError(
            f"backbone_kwargs={options} is not possible with backbone='stem': it takes dims, the filters of each of "
            f"its convolutions, such as [32, 64, 128]"
        )
    return dims


@functools.lru_cache(maxsize=16)
def _network(name: str, in_chans: int, img_size: tuple[int, int], options: str) -> nn.Module:
    """The whole network on the meta device."""
    return _create(name, in_chans, img_size, options, device="meta")


def _create(name: str, in_chans: int, img_size: tuple[int, int], options: str, **kwargs: Any) -> nn.Module:
    """Make a network of timm, or its extractor."""
    kwargs = {"in_chans": in_chans, **json.loads(options), **kwargs}
    cfg = get_pretrained_cfg(name)
    if cfg is not None and cfg.fixed_input_size:
        kwargs.setdefault("img_size", img_size)
    try:
        return timm.create_model(name, **kwargs)
    except (AttributeError, RuntimeError, TypeError) as error:
        given = f" with backbone_kwargs={options}" if options != "{}" else ""
        raise ValueError(f"backbone {name!r}{given} cannot be made ({first_line(error)}): give another") from error


def _extractor(
    name: str, level: int, in_chans: int, img_size: tuple[int, int], options: str, extractor: str | None, **kwargs: Any
) -> nn.Module:
    """Make the part of a network that leads to a level."""
    if name == STEM:
        return StridedStem(in_chans, level, _stem_dims(options), **kwargs)
    if extractor is not None:
        kwargs["feature_cls"] = extractor
    return _create(name, in_chans, img_size, options, features_only=True, out_indices=(level,), **kwargs)


def _measure(name: str, level: int, in_chans: int, img_size: tuple[int, int], options: str) -> BackbonePlan:
    """Run a network without memory for its values."""
    extractor: str | None = None
    chosen: Any = None
    for kind in (None, "getter"):
        try:
            found = _extractor(name, level, in_chans, img_size, options, kind, device="meta")
            shape, unused = _run(found, in_chans, img_size)
        except Exception:
            if kind is None:
                raise
            break  # a network without timm's other extractor
        if chosen is None or len(unused) < len(chosen[2]):
            extractor, chosen = kind, (found, shape, unused)
        if not unused:
            break  # else some extractors keep the layers behind the level, which the other cuts off
    net, shape, unused = chosen
    nhwc = str(getattr(getattr(net, "output_fmt", "NCHW"), "value", "NCHW")) == "NHWC"
    channels, height, width = (shape[3], shape[1], shape[2]) if nhwc else shape[1:]
    cfg = None if name == STEM else get_pretrained_cfg(name)
    weights = cfg if cfg is not None and cfg.has_weights else None
    return BackbonePlan(
        level,
        channels,
        (height, width),
        _first_convs(net, name),
        extractor,
        nhwc,
        frozenset(unused),
        tuple(weights.mean) if weights else None,
        tuple(weights.std) if weights else None,
    )


def _run(net: nn.Module, in_chans: int, img_size: tuple[int, int]) -> tuple[torch.Size, set[str]]:
    """Shape of an extractor's map, and the names of parameters that do not take part in it."""
    with torch.enable_grad():
        # Two images: BatchNorm takes no single value of a channel.
        x = net(torch.empty(2, in_chans, *img_size, device="meta"))[0]
        if x.ndim != 4:
            raise ValueError(f"its features have shape {tuple(x.shape)}")
        parameters = dict(net.named_parameters())
        gradients = torch.autograd.grad(x.sum(), list(parameters.values()), allow_unused=True)
    return x.shape, {key for key, gradient in zip(parameters, gradients, strict=True) if gradient is None}


def _plain(key: str) -> str:
    """A name in an extractor as one of the whole network, dots as underscores: timm flattens the one or the other."""
    for wrapper in _WRAPPERS:
        key = key.removeprefix(wrapper)
    return key.replace(".", "_")


def _first_convs(net: nn.Module, name: str) -> tuple[str, ...]:
    if name == STEM:
        return ("convs.0.conv",)
    cfg = get_pretrained_cfg(name)
    given: Any = None if cfg is None else cfg.first_conv
    wanted = [given] if isinstance(given, str) else list(given or ())
    modules = {_plain(key): key for key, _ in net.named_modules()}
    found = tuple(modules[key] for key in (_plain(key) for key in wanted) if key in modules)
    return found or tuple(key for key, module in net.named_modules() if isinstance(module, nn.Conv2d))[:1]


class Backbone(nn.Module):
    """The layers of a network up to one level of its features, whose map ``[B, C, H, W]`` it gives.

    Layers behind the level are not there. Parameters that the map does not depend on, where timm's extractors keep
    such, are frozen.

    Args:
        name: A network of timm that takes `features_only=True`, with or without the tag of its weights; or 'stem' for
            a :class:`StridedStem`.
        level: Level of its features, as timm's `out_indices` counts them, negative ones from the last; None for the
            last whose map has at least `least_map` pixels each way, else the last of the largest.
        in_chans: Channels of the images.
        img_size: (H, W) of the images.
        pretrained: Load timm's weights, through the network where they are not in its cache.
        kwargs: More for the network, which JSON can hold.
        least_map: Pixels each way that the map of the default level has at least.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If there is no such network, level or map, or its weights cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        level: int | None = None,
        in_chans: int = 3,
        img_size: tuple[int, int] = (224, 224),
        pretrained: bool = False,
        kwargs: Mapping[str, Any] | None = None,
        least_map: int = LEAST_MAP,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        plan = plan_backbone(name, level, in_chans, img_size, kwargs, least_map)
        self.name, self.level, self.num_features, self.map_size = name, plan.level, plan.channels, plan.map_size
        self.channels_last = plan.channels_last
        self._made_of = (name, in_chans, (img_size[0], img_size[1]), json.dumps(dict(kwargs or {}), sort_keys=True))
        dd: dict[str, Any] = {key: value for key, value in (("device", device), ("dtype", dtype)) if value is not None}
        on_meta = torch.empty(0, device=device).is_meta
        if pretrained:
            if plan.mean is None:
                raise ValueError(f"timm has no weights for backbone {name!r}: leave out backbone_pretrained")
            if not on_meta:
                dd["pretrained"] = True
        _, _, size, options = self._made_of
        try:
            self.net = _extractor(name, plan.level, in_chans, size, options, plan.extractor, **dd)
        except Exception as error:
            if "pretrained" not in dd:
                raise
            raise ValueError(
                f"the weights of backbone {name!r} cannot be loaded ({first_line(error)}): they come from the network, "
                f"check it, or leave out backbone_pretrained"
            ) from error
        for key, parameter in self.net.named_parameters():
            if key in plan.unused:
                parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, in_chans, H, W]`` to a map ``[B, C, H', W']``."""
        x = self.net(x)[0]
        return x.permute(0, 3, 1, 2) if self.channels_last else x

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing of the network's stages, as timm has it.

        BatchNorm in a stage that is computed twice counts a batch twice in its running statistics.
        """
        for net in (self.net, getattr(self.net, "model", None)):
            switch: Any = getattr(net, "set_grad_checkpointing", None)
            if switch is not None:
                switch(enable)

    @torch.jit.ignore
    def group_matcher(self, prefix: str, later: Sequence[str], coarse: bool = False) -> dict[str, Any]:
        """timm's groups of the network's layers, for layer decay and freezing, and then one for each later layer.

        Args:
            prefix: Name of this module in the model, with the dot.
            later: Regular expressions of the names of the layers after it.
            coarse: Groups of whole stages, where the network has them.
        """
        groups: dict[int, list[str]] = {}
        for key, group in self._groups(coarse).items():
            groups.setdefault(group, []).append(re.escape(key))
        patterns = [rf"^{re.escape(prefix)}net\.(?:{'|'.join(groups[group])})$" for group in sorted(groups)]
        first, *others = [*patterns, *later]
        return dict(stem=first, blocks=[(pattern, (number,)) for number, pattern in enumerate(others)])

    def _groups(self, coarse: bool) -> dict[str, int]:
        """Number of the group of each parameter."""
        keys = [key for key, _ in self.net.named_parameters()]
        if self.name == STEM:
            return {key: int(key.split(".")[1]) for key in keys}
        with torch.random.fork_rng(devices=[]):
            whole: Any = _network(*self._made_of)
        if not hasattr(whole, "group_matcher"):
            return dict.fromkeys(keys, 0)
        known = group_parameters(whole, whole.group_matcher(coarse=coarse), reverse=True)
        by_plain_name = {_plain(key): group for key, group in known.items()}
        groups, last = {}, 0
        for key in keys:
            groups[key] = last = by_plain_name.get(_plain(key), last)
        return groups

    def extra_repr(self) -> str:
        height, width = self.map_size
        return f"name={self.name!r}, level={self.level}, num_features={self.num_features}, map_size={height}x{width}"
