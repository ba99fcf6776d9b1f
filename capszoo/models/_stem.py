"""The layers before the capsules, as families share them: a backbone or none, and the sizes of the convolutions."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from timm.layers import to_2tuple
from torch import Tensor, nn

from capszoo.layers.backbone import LEAST_MAP, Backbone, plan_backbone

__all__ = [
    "ConvPlan",
    "cfg_overlay",
    "default_conv",
    "fresh_votes",
    "group_matcher",
    "image_weights",
    "kept_arguments",
    "least_map",
    "make_backbone",
    "plan_convs",
    "rescale_votes",
    "strided_grid",
    "without_sources",
]

# Arguments that are not kept where there is no backbone: earlier versions do not know them.
_ABSENT = {"primary_stride", "backbone", "backbone_level", "backbone_kwargs"}
# Pixels of a map for each of the about 6x6 that a 3x3 kernel leaves of it.
_MAP = 7


class ConvPlan(NamedTuple):
    """Sizes of the first convolution and of that of the primary capsules.

    Attributes:
        in_chans: Channels of the backbone's map; None for those of the images.
        first_kernel: Side of the first convolution's kernel.
        map_size: (H, W) of the map after it.
        kernel_size: Side of the primary capsules' kernel.
        stride: Its stride.
        grid: (H, W) of the primary capsules.
    """

    in_chans: int | None
    first_kernel: int
    map_size: tuple[int, int]
    kernel_size: int
    stride: int
    grid: tuple[int, int]


@staticmethod
def least_map(given: Mapping[str, Any]) -> int:
    """Pixels each way that the map of a backbone's default level has at least; a method of classes with a backbone."""
    return LEAST_MAP


def make_backbone(
    given: Mapping[str, Any], img_size: tuple[int, int], least_map: int = LEAST_MAP, **dd: Any
) -> Backbone | None:
    """Make the backbone that a constructor's arguments name, None if they name none.

    Args:
        given: The arguments, among them `in_chans` and those that begin with `backbone`.
        img_size: (H, W) of the images.
        least_map: Pixels each way that the map of the default level has at least.
        **dd: Device and dtype of the parameters.

    Raises:
        ValueError: As :class:`capszoo.layers.Backbone`, and if there are arguments of a backbone without one.
    """
    own = {key: given[f"backbone_{key}"] for key in ("level", "pretrained", "kwargs")}
    if given["backbone"] is None:
        for key, value in own.items():
            if value not in (None, False):
                raise ValueError(f"backbone_{key}={value!r} needs a backbone: give one, such as backbone='resnet18'")
        return None
    sizes: dict[str, Any] = dict(in_chans=given["in_chans"], img_size=img_size, least_map=least_map)
    return Backbone(given["backbone"], **sizes, **own, **dd)


def default_conv(
    map_size: tuple[int, int], kernel_size: int | None = None, stride: int | None = None
) -> tuple[int, int]:
    """Side and stride of a kernel, where they are not given, that leaves about 6x6 of a map."""
    stride = stride or max(1, round(min(map_size) / _MAP))
    return kernel_size or max(3, stride), stride  # no pixel between two kernels is left out


def plan_convs(
    backbone: Backbone | None, img_size: tuple[int, int], kernel_size: int | None, stride: int | None
) -> ConvPlan:
    """Size the two convolutions: 9x9 and 9x9 of stride 2 on images; 1x1 on a backbone's map, and then what leaves a map
    of about 6x6.

    Args:
        backbone: The backbone.
        img_size: (H, W) of the images.
        kernel_size: Side of the kernels; None for the default.
        stride: Stride of the second; None for the default.

    Raises:
        ValueError: If the images or the map are too small for them, or a size is not 1 or more.
    """
    for name, value in (("kernel_size", kernel_size), ("primary_stride", stride)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} is not possible: it must be 1 or more")
    if backbone is None:
        kernel, stride = kernel_size or 9, stride or 2
        first, (height, width) = kernel, (size - kernel + 1 for size in img_size)
        least = 2 * kernel - 1
        problem = (
            f"is too small: two {kernel}x{kernel} convolutions need {least} pixels each way, resize the images or set "
            f"kernel_size"
        )
    else:
        first, (height, width) = 1, backbone.map_size
        kernel, stride = default_conv((height, width), kernel_size, stride)
        problem = (
            f"is too small: level {backbone.level} of {backbone.name!r} leaves a map of {height}x{width} for the "
            f"primary capsules' kernel of {kernel}x{kernel}, resize the images or set backbone_level"
        )
    if min(height, width) < kernel:
        raise ValueError(f"img_size={img_size[0]}x{img_size[1]} {problem}")
    grid = ((height - kernel) // stride + 1, (width - kernel) // stride + 1)
    in_chans = None if backbone is None else backbone.num_features
    return ConvPlan(in_chans, first, (height, width), kernel, stride, grid)


def kept_arguments(arguments: Mapping[str, Any], backbone: Backbone | None, convs: ConvPlan) -> dict[str, Any]:
    """Arguments as a model's `arguments()` keep them: with the sizes that were chosen, and never whence weights came.

    Args:
        arguments: All of them, by keyword.
        backbone: The backbone.
        convs: The sizes of the convolutions.
    """
    kept = {**without_sources(arguments, backbone), "kernel_size": convs.kernel_size}
    if backbone is not None:
        return {**kept, "primary_stride": convs.stride}
    return {key: value for key, value in kept.items() if not (value is None and key in _ABSENT)}


def without_sources(arguments: Mapping[str, Any], backbone: Backbone | None) -> dict[str, Any]:
    """Arguments with the level that was chosen, and without whence weights came."""
    kept = {key: value for key, value in arguments.items() if key != "backbone_pretrained"}
    if backbone is not None and kept["backbone_level"] is None:
        kept["backbone_level"] = backbone.level
    return kept


def cfg_overlay(cls: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of timm's configuration that a model's backbone changes; none without one.

    Args:
        cls: Class of the model.
        kwargs: Its keywords.

    Raises:
        ValueError: As :func:`capszoo.layers.backbone.plan_backbone`.
    """
    parameters = inspect.signature(cls).parameters
    if "backbone_level" not in parameters:  # of a family without timm's backbones
        return {}
    given = {
        key: parameter.default if kwargs.get(key) is None else kwargs[key] for key, parameter in parameters.items()
    }
    if given["backbone"] is None:
        return {}
    size, in_chans = to_2tuple(given["img_size"]), given["in_chans"]
    level = given["backbone_level"]
    least_map = cls.least_map(given)
    plan = plan_backbone(given["backbone"], level, in_chans, (size[0], size[1]), given["backbone_kwargs"], least_map)
    names = tuple(f"backbone.net.{key}" for key in plan.first_conv)
    overlay: dict[str, Any] = {"first_conv": names[0] if len(names) == 1 else names}
    if given["backbone_pretrained"] and plan.mean is not None:
        overlay.update(mean=plan.mean, std=plan.std)
    return overlay


def strided_grid(grid: tuple[int, int], stride: int) -> tuple[int, int]:
    """Size of the map after a padded convolution, which keeps every `stride`-th position."""
    return -(-grid[0] // stride), -(-grid[1] // stride)


def image_weights(model: nn.Module) -> list[str]:
    """Names of the weights whose shapes depend on the channels of the images."""
    convs = model.pretrained_cfg["first_conv"]
    return [f"{conv}.weight" for conv in ([convs] if isinstance(convs, str) else convs)]


def group_matcher(model: nn.Module, coarse: bool = False) -> dict[str, Any]:
    """Group parameters for optimisation: the backbone's layers as timm groups them, `conv1`, `primary_caps`; what no
    pattern names (class capsules, decoder) is timm's last group."""
    if model.backbone is None:
        return dict(stem=r"^conv1", blocks=r"^primary_caps")
    return model.backbone.group_matcher("backbone.", [r"^conv1", r"^primary_caps"], coarse)


def fresh_votes(start: str, shared: bool, positions: int) -> dict[str, float]:
    """Scale of fresh vote matrices: class capsules add up votes of all positions, and are as long as those of 28x28
    images, 36 positions, at any size. Votes by one matrix add up in proportion to the positions, others to their root.
    """
    if start == "paper":
        return dict(init_std=1.0, init_bias=0.0)
    ratio = 36 / max(36, positions)
    return dict(init_std=0.1 * (ratio if shared else ratio**0.5)) if start == "default" else {}


def rescale_votes(state_dict: dict[str, Tensor], model: Any, img_size: Sequence[int]) -> dict[str, Tensor]:
    """Fit vote matrices that the positions of a map share to more of them, whose votes class capsules add up.

    Args:
        state_dict: Weights that were trained on images of another size than the model's.
        model: The model.
        img_size: Height and width of those images, in pixels.
    """
    key = "class_caps.weight"
    if not model.share_weights or key not in state_dict:
        return state_dict
    given = {**model.arguments(), "img_size": tuple(img_size), "keep_capsules": None}
    ratio = math.prod(type(model)(**given, device="meta").grid_size) / math.prod(model.grid_size)
    return {**state_dict, key: state_dict[key].float() * ratio} if ratio < 1 else state_dict
