"""Size of a model, and the work of a forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import is_model as timm_is_model
from torch import nn

from .contract import HasPrimaryCapsules, keeps_contract
from .errors import UsageError
from .kernels.gaussian_routing.ops import mixture_moments_op
from .kernels.inverted_attention.ops import forward_op as inverted_attention_op
from .kernels.ops import dynamic_routing_op
from .kernels.self_attention.ops import forward_op as self_attention_op
from .layers import set_fused_routing
from .modes import evaluation_mode
from .registry import create_model, list_pretrained

# Above, routing takes more than the convolutions do; the networks for MNIST have 288 to 1,152.
_MANY_CAPSULES = 10_000


@dataclass(frozen=True)
class ModelInfo:
    """Size and work of a model.

    Attributes:
        name: Name of the model.
        parameters: Number of trainable values.
        macs: Multiply-accumulate operations of one forward pass of one image.
        input_size: (C, H, W) of the images.
        weights: Names of the shipped weights.
        capsules: Number of primary capsules; 0 for a model that does not tell of any.
        backbone: Name of the network before the capsules, None without.
    """

    name: str
    parameters: int
    macs: int
    input_size: tuple[int, int, int]
    weights: tuple[str, ...]
    capsules: int = 0
    backbone: str | None = None

    def __str__(self) -> str:
        name = f"{self.name} with {self.backbone}" if self.backbone else self.name
        capsules = f", {self.capsules:,} capsules" if self.capsules else ""
        images = "x".join(map(str, self.input_size))
        return f"{name}: {self.parameters:,} parameters, {self.macs / 1e6:,.1f} M MACs{capsules}, images of {images}"

    def warning(self) -> str | None:
        """What to do about a model with very many capsules; None where there is nothing to say."""
        if self.capsules <= _MANY_CAPSULES:
            return None
        size = f"{self.input_size[1]}x{self.input_size[2]}"
        remedy = "a deeper --backbone-level" if self.backbone else "--backbone resnet18 (or stem)"
        return (
            f"warning: {self.capsules:,} capsules of {size} images take much memory and time: give {remedy}, or a "
            f"smaller --img-size"
        )


def model_info(model: str | nn.Module, **kwargs: Any) -> ModelInfo:
    """Count the parameters and the work of a model.

    Args:
        model: A name, or a model made by `create_model`.
        **kwargs: Keywords of `create_model`, where a name is given.

    Raises:
        ValueError: If `create_model` refuses the name or a keyword, or the model is none of the zoo's, such as the
            feature extractor that `features_only` makes.
    """
    # Not at the top: where Triton is not installed, its import logs a warning that helps nobody.
    from torch.utils.flop_counter import FlopCounterMode

    if isinstance(model, str):
        # The numbers do not depend on weights, which have no place on this device.
        kwargs = {key: value for key, value in kwargs.items() if key not in ("pretrained", "checkpoint_path")}
        model = create_model(model, device="meta", **kwargs)
    if not keeps_contract(type(model)):
        raise UsageError(
            f"{type(model).__name__} is no model of capszoo's zoo: give a name, or what create_model makes"
        )
    name = model.pretrained_cfg["architecture"]
    input_size = (model.in_chans, *model.img_size)
    parameter = next(model.parameters())
    image = torch.empty(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    # The operator says by its shapes what it does; of the reference, the counter would see the matrix products alone.
    # Both as they were defined and as `torch.ops` has them: PyTorch may make a new object of an operator there, and
    # the counter is given whichever was called first.
    operators = {
        dynamic_routing_op: _routing_flops,
        inverted_attention_op: _inverted_attention_flops,
        mixture_moments_op: _moments_flops,
        self_attention_op: _self_attention_flops,
    }
    counted = {operator._opoverload._overloadpacket: count for operator, count in operators.items()}
    counted |= {getattr(torch.ops.capszoo, operator._name): count for operator, count in operators.items()}
    counter = FlopCounterMode(display=False, custom_mapping=counted)
    with evaluation_mode(model), set_fused_routing(True), torch.no_grad():
        with counter:
            model(image)
        capsules = _count_capsules(model, image)
    backbone = getattr(getattr(model, "backbone", None), "name", None)
    weights = list_pretrained(name) if timm_is_model(name) and backbone is None else []
    return ModelInfo(
        name=name,
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        macs=counter.get_total_flops() // 2,
        input_size=input_size,
        weights=tuple(weights),
        capsules=capsules,
        backbone=backbone,
    )


def _count_capsules(model: Any, image: torch.Tensor) -> int:
    """Primary capsules that class capsules are made of: those that a pruned network keeps."""
    layers = list(model.capsule_layers().values())
    if not layers:
        return 0
    if not isinstance(model, HasPrimaryCapsules):
        return getattr(layers[-1], "num_capsules", 0)
    primary: Any = model
    return (
        len(getattr(model, "keep_capsules", ())) or primary.primary_capsules(primary.forward_features(image)).shape[1]
    )


def _routing_flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int],
    num_iters: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Two operations for every multiply-accumulate of the votes, the agreements and the weighted sums of votes."""
    B, I, K = x_shape  # noqa: E741
    _, _, J, D = weight_shape
    return 2 * B * I * J * D * (K + (num_iters - 1) + num_iters)


def _self_attention_flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    prior_shape: Sequence[int],
    attention: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    """As of dynamic routing: votes, agreements, and one weighted sum of votes."""
    B, I, K = x_shape  # noqa: E741
    _, _, J, D = weight_shape
    return 2 * B * I * J * D * (K + int(attention) + 1)


def _inverted_attention_flops(
    x_shape: Sequence[int], weight_shape: Sequence[int], parents_shape: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    """Votes, agreements, and one weighted sum of votes, of the children in the patch of each parent."""
    batch, height, width, _, size, _ = parents_shape
    kernel, _, types, _, _, parents = weight_shape
    votes = batch * height * width * kernel * kernel * types * parents
    return 2 * votes * size * size * (size + 2)


def _moments_flops(
    poses_shape: Sequence[int],
    activations_shape: Sequence[int],
    weight_shape: Sequence[int],
    offset_shape: Sequence[int] | None,
    mean_shape: Sequence[int] | None,
    precision_shape: Sequence[int] | None,
    log_prior_shape: Sequence[int] | None,
    stride: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Votes, average and scatter, and but for the first iteration the distances from the averages of the one before."""
    batch, *grid = poses_shape[3:]
    types, *kernel, parents, size, _ = weight_shape
    height, width = ((side - reach) // stride + 1 for side, reach in zip(grid, kernel, strict=True))
    votes = batch * height * width * types * kernel[0] * kernel[1] * parents
    return 2 * votes * size * size * (size + 2 + int(mean_shape is not None))
