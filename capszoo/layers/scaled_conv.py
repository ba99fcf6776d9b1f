"""A convolution whose sum is scaled, so that one step of Adam moves it by about as much whatever its fan-in."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from capszoo.kernels.centering import less_means, scaled_kernels

from .large_conv import LargeConv2d

__all__ = ["ScaledConv2d", "fan_in_scale", "fold_scales", "unfold_scales"]

# The scale times the fan-in, plain and centred. Chosen by recipes/starts.py, see recipes/results/starts-cpu.csv.
_SCALED_FAN_IN = 32
_CENTERED_FAN_IN = 128


def fan_in_scale(fan_in: int, centered: bool = False) -> float:
    """Scale of a convolution's sum: 32 / fan_in, centred 128 / fan_in, rounded to a power of two, at most 1.

    Adam moves each weight by about its learning rate, whatever the gradient. Inputs of one sign then move a sum of
    fan_in products by up to fan_in * lr: 20 at a rate of 0.001 in the primary capsules of `capsnet`, which squash takes
    to a length of 0.998. Scaled, the same step moves it by up to 32 * lr. This is the 1 / fan_in learning rate that
    maximal update parametrisation gives hidden layers (Yang et al. 2022, https://arxiv.org/abs/2203.03466), as a
    property of the network and not of its optimizer. A power of two scales to the same bits.

    Centred filters do not see what the inputs have in common, so that their steps can be larger.
    """
    return min(1.0, 2.0 ** round(math.log2((_CENTERED_FAN_IN if centered else _SCALED_FAN_IN) / fan_in)))


class ScaledConv2d(LargeConv2d):
    """A convolution whose sum is multiplied by a fixed scale before the bias is added: conv(x) * scale + bias.

    A fresh one computes what a fresh `torch.nn.Conv2d` of the same arguments does, times a gain, whatever the scale:
    its weights are larger by gain / scale.

    Centred, each filter less its mean over the fan-in is what convolves (as in Huang et al. 2017, "Centered Weight
    Normalization in Accelerating Training of Deep Neural Networks", without their normalisation). A step of Adam, which
    moves all weights of a filter alike, then does not drive its sums to one side by what all inputs have in common, as
    those after a ReLU do.

    Scale and centring are part of the state dict; a state dict without them is that of a plain convolution, which they
    become.

    Args:
        in_channels: Channels of the incoming map.
        out_channels: Filters.
        kernel_size: Side of the square kernel, in pixels.
        stride: Stride, in pixels.
        scale: Factor of the sum; None for that of :func:`fan_in_scale`.
        init_gain: Gain of fresh weights.
        centered: Centre the filters.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If the scale is not above 0 and finite, or filters of one weight are to be centred.
    """

    if TYPE_CHECKING:
        scale: Tensor
        centered: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        scale: float | None = None,
        init_gain: float = 1.0,
        centered: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        scale = fan_in_scale(in_channels * kernel_size**2, centered) if scale is None else scale
        if not 0 < scale < math.inf:
            raise ValueError(f"scale={scale} of a convolution is not possible: give a number above 0, such as 1/32")
        if centered and in_channels * kernel_size**2 == 1:
            raise ValueError("centered=True of filters of one weight leaves nothing of them: leave it out")
        super().__init__(in_channels, out_channels, kernel_size, stride, device=device, dtype=dtype)
        # False once it is known that there is nothing to centre. A step does not ask the tensor, for which a GPU would
        # have to be waited for; and who sets tensors past `load_state_dict` gets what they say.
        self.may_center = True
        self.register_buffer("centered", torch.full((), float(centered), device=device, dtype=self.weight.dtype))
        self.register_buffer("scale", torch.full((), scale, device=device, dtype=self.weight.dtype))
        self.fresh = (scale, float(centered), init_gain)
        self._rescale()

    def reset_parameters(self) -> None:
        """Make all as it was at first: weights and bias drawn as `torch.nn.Conv2d` does, the weights multiplied by
        gain / scale, and the scale and the centring that the constructor was given."""
        super().reset_parameters()
        if "scale" in self._buffers:  # not yet where the constructor of nn.Conv2d calls this
            self._rescale()

    @torch.no_grad()
    def _rescale(self) -> None:
        scale, centered, init_gain = self.fresh
        self.scale.fill_(scale)
        self.centered.fill_(centered)
        self.may_center = True
        self.weight.mul_(init_gain / scale)

    def kernels(self) -> Tensor:
        """The weights as they convolve, without the scale: centred, if they are to be."""
        if not self.may_center:
            return self.weight
        return less_means(self.weight, self.centered)

    # Not the sum is multiplied but the weights, as float16 could not hold all sums.
    @torch.jit.unused
    def _scaled_kernels(self) -> Tensor:
        return scaled_kernels(self.weight, self.centered if self.may_center else None, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.kernels() * self.scale, self.bias)
        y = self._by_plan(x, self.scale, self.centered if self.may_center else None)
        return self._conv_forward(x, self._scaled_kernels(), self.bias) if y is None else y

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}weight" in state_dict:
            weight = state_dict[f"{prefix}weight"]
            state_dict.setdefault(f"{prefix}scale", weight.new_ones(()))
            centered = state_dict.setdefault(f"{prefix}centered", weight.new_zeros(()))
            self.may_center = bool(centered.is_meta or centered)
        super()._load_from_state_dict(state_dict, prefix, *args)


def fold_scales(model: nn.Module) -> nn.Module:
    """Centre the weights of all convolutions of a model that are to be, multiply the scales into them, in place, and
    return the model.

    It computes the same numbers as before, and its weights are those of plain convolutions.
    """
    for module in model.modules():
        if isinstance(module, ScaledConv2d):
            with torch.no_grad():
                module.weight.copy_(module.kernels() * module.scale)
                module.scale.fill_(1.0)
                module.centered.fill_(0.0)
                module.may_center = False
    return model


def unfold_scales(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Give weights of plain convolutions, which have no scales, scales, so that they train about as fresh ones do.

    They are those of the model; where it centres its filters, which these weights are not made for, those of
    convolutions of its size that are not centred.

    Args:
        state_dict: Weights of a whole model. Convolutions that have a scale are left as they are.
        model: The model they are for; on the meta device scales are unknown, and weights keep a scale of 1.

    Returns:
        A new state dict that stands for the same numbers.
    """
    state_dict = dict(state_dict)
    for name, module in model.named_modules():
        weight = state_dict.get(f"{name}.weight")
        if not isinstance(module, ScaledConv2d) or weight is None:
            continue
        state_dict.setdefault(f"{name}.centered", torch.zeros((), dtype=module.weight.dtype, device=weight.device))
        if f"{name}.scale" in state_dict:
            continue
        if module.scale.is_meta:
            scale = torch.ones(())
        elif module.centered:
            scale = torch.full_like(module.scale, fan_in_scale(module.weight[0].numel()))
        else:
            scale = module.scale.detach().clone()
        state_dict[f"{name}.scale"] = scale = scale.to(weight.device)
        if weight.is_floating_point():  # others are refused where they are loaded
            # In the model's type, since float16 could not hold all of them.
            state_dict[f"{name}.weight"] = weight.to(module.weight.dtype) / scale
    return state_dict
