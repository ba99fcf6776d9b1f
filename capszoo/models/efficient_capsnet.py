"""Efficient-CapsNet: a small capsule network with self-attention routing

Paper: `Efficient-CapsNet: Capsule Network with Self-Attention Routing` - https://arxiv.org/abs/2101.12491

Four convolutions, each followed by ReLU and then BatchNorm (LeakyReLU and InstanceNorm for smallNORB); a depthwise
convolution as large as their map, whose channels are grouped into 16 primary capsules; class capsules reached by
self-attention, without iterations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from capszoo.arguments import SearchedArgument
from capszoo.layers import Decoder, DepthwiseConv2d, SelfAttentionRouting, capsule_lengths, exponential_squash
from capszoo.layers.self_attention import COUPLINGS
from capszoo.models import _builder, _couplings
from capszoo.pretrained import fit_weights, shipped_cfgs

__all__ = ["EfficientCapsNet"]


@dataclass(frozen=True)
class _Form:
    """What differs between the paper's networks: kernels and strides of the convolutions, and what follows them."""

    kernel_sizes: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    instance_norm: bool = False
    """LeakyReLU and InstanceNorm instead of ReLU and BatchNorm."""
    primary_stride: int = 1
    """Of the primary capsules. With 2 their kernel is one pixel smaller than the map: there is one position again."""

    def grid(self, size: int) -> int:
        """Pixels that the convolutions leave of so many."""
        for kernel_size, stride in zip(self.kernel_sizes, self.strides, strict=True):
            size = (size - kernel_size) // stride + 1
        return size

    @property
    def least_size(self) -> int:
        """Pixels that the convolutions need; InstanceNorm has nothing to normalise in a map of one pixel."""
        size = 2 if self.instance_norm else 1
        for kernel_size, stride in zip(reversed(self.kernel_sizes), reversed(self.strides), strict=True):
            size = (size - 1) * stride + kernel_size
        return size


_FORMS = {
    "mnist": _Form((5, 3, 3, 3), (1, 1, 1, 2)),
    "smallnorb": _Form((7, 3, 3, 3), (2, 1, 1, 2), instance_norm=True),
    "multimnist": _Form((5, 3, 3, 3), (1, 1, 2, 2), primary_stride=2),
}


class ConvNorm(nn.Module):
    """An unpadded convolution with bias, an activation, and a normalisation after it."""

    def __init__(
        self, in_chans: int, out_chans: int, kernel_size: int, stride: int = 1, instance_norm: bool = False, **dd: Any
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, **dd)
        # The slope is Keras's default, as in the authors' code; its gains near 0 at the start are not taken over.
        self.act = nn.LeakyReLU(0.3, inplace=True) if instance_norm else nn.ReLU(inplace=True)
        self.norm = (
            nn.InstanceNorm2d(out_chans, affine=True, **dd) if instance_norm else nn.BatchNorm2d(out_chans, **dd)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.act(self.conv(x)))


class ExponentialSquashMap(nn.Module):
    """Squash each capsule of a map ``[B, T*K, H, W]``, see :func:`capszoo.layers.exponential_squash`."""

    def __init__(self, num_types: int, caps_dim: int):
        super().__init__()
        self.num_types, self.caps_dim = num_types, caps_dim

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1).unflatten(-1, (self.num_types, self.caps_dim))
        return exponential_squash(x).flatten(-2).permute(0, 3, 1, 2)


class DepthwiseCaps(nn.Module):
    """Primary capsules: a depthwise convolution over a whole map, its channels ``t * K + k`` grouped and squashed.

    Args:
        num_types: T, the number of capsules.
        caps_dim: K, their dimension; the map has T*K channels.
        kernel_size: Height and width of the map, or of what a stride needs of it.
        stride: Stride of the convolution.
        dd: Device and dtype of the parameters.
    """

    def __init__(self, num_types: int, caps_dim: int, kernel_size: tuple[int, int], stride: int = 1, **dd: Any):
        super().__init__()
        self.num_types, self.caps_dim = num_types, caps_dim
        self.conv = DepthwiseConv2d(num_types * caps_dim, kernel_size, stride, **dd)
        # A module, so that a network cut before it can put nn.Identity in its place.
        self.squash: nn.Module = ExponentialSquashMap(num_types, caps_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, T*K, H', W']`` to squashed capsules ``[B, T*K, H, W]``, H = W = 1 for the map's own size."""
        return self.squash(self.conv(x))

    def to_capsules(self, x: Tensor) -> Tensor:
        """Reorder a map ``[B, T*K, H, W]`` into capsules ``[B, T*H*W, K]``."""
        x = x.unflatten(1, (self.num_types, self.caps_dim))
        return x.permute(0, 1, 3, 4, 2).flatten(1, 3)


class EfficientCapsNet(nn.Module):
    """Capsule network of Mazzia, Salvetti and Chiaberge 2021 (section 3), in its forms for three data sets."""

    uniform_arguments = {"couplings": "uniform"}
    _heads = ("class_caps", "decoder")
    _pooled = "capsules"

    if TYPE_CHECKING:  # not at run time, where torch.jit.script would compile by these annotations
        # nn.Identity once `reset_classifier(0)` or `prune_intermediate_layers` took the layer away.
        primary_caps: DepthwiseCaps
        class_caps: SelfAttentionRouting
        decoder: Decoder | None
        # From timm's builder and from `create_model`.
        pretrained_cfg: dict[str, Any]
        default_cfg: dict[str, Any]
        creation_args: dict[str, Any]

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | tuple[int, int] = 28,
        global_pool: str = "flat",
        conv_dims: tuple[int, int, int] = (32, 64, 64),
        num_types: int = 16,
        caps_dim: int = 8,
        class_dim: int = 16,
        form: str = "mnist",
        couplings: str = "attention",
        decoder: bool = False,
        small_decoder: bool = False,
        decoder_dims: tuple[int, int] = (512, 1024),
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Build the network.

        Args:
            num_classes: J, the number of class capsules; 0 for none, and features as output.
            in_chans: Channels of the images.
            img_size: Height and width of the images, in pixels; the depthwise kernel grows with it.
            global_pool: 'flat' flattens the primary capsules where there are no class capsules, '' keeps their map.
            conv_dims: Filters of the first three convolutions; the fourth has those of the capsules.
            num_types: Primary capsules.
            caps_dim: K, the dimension of a primary capsule.
            class_dim: D, the dimension of a class capsule.
            form: The paper's network for a data set, with any size, channels and classes: 'mnist'; 'smallnorb' (there 2
                channels of 48x48 and 5 classes: a 7x7 stem of stride 2, LeakyReLU and InstanceNorm); 'multimnist'
                (there 36x36: stride 2 in the third convolution and in the primary capsules).
            couplings: 'attention', or 'uniform' for the ablation without, see `capszoo.layers.SelfAttentionRouting`.
            decoder: Add the reconstruction decoder, a training aid that `forward` never uses.
            small_decoder: Feed the decoder the chosen capsule alone instead of all with the others set to zero.
            decoder_dims: Widths of the decoder's two hidden layers.
            drop_rate: Dropout rate of the primary capsules' values before routing.
            device: Device of the parameters.
            dtype: Type of the parameters.

        Raises:
            ValueError: If the images are too small for the four convolutions, or an argument is out of its range.
        """
        given = dict(locals())
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        _builder.check_pool(global_pool, self._pooled)
        if len(conv_dims) != 3 or min(conv_dims) < 1:
            raise ValueError(f"conv_dims={conv_dims} is not possible: give three numbers of filters of 1 or more")
        _builder.check_sizes(in_chans=in_chans, num_types=num_types, caps_dim=caps_dim, class_dim=class_dim)
        _builder.check_drop_rate(drop_rate)
        _builder.check_decoder_dims(decoder_dims)
        if form not in _FORMS:
            raise ValueError(f"unknown form {form!r}. Known: {', '.join(_FORMS)}")
        chosen = _FORMS[form]
        height, width = to_2tuple(img_size)
        if min(height, width) < chosen.least_size:
            raise ValueError(
                f"img_size={height}x{width} is too small: the four convolutions need {chosen.least_size} pixels each "
                f"way, resize the images"
            )
        self.in_chans, self.img_size = in_chans, (height, width)
        self.global_pool, self.drop_rate = global_pool, drop_rate
        self.grad_checkpointing = False
        self._arguments = _builder.given_arguments(
            given, img_size=[height, width], conv_dims=list(conv_dims), decoder_dims=list(decoder_dims)
        )

        channels = num_types * caps_dim
        grid = chosen.grid(height), chosen.grid(width)
        dims = (in_chans, *conv_dims, channels)
        for i, (kernel_size, stride) in enumerate(zip(chosen.kernel_sizes, chosen.strides, strict=True)):
            conv = ConvNorm(dims[i], dims[i + 1], kernel_size, stride, chosen.instance_norm, **dd)
            self.add_module(f"conv{i + 1}", conv)
        primary_stride = chosen.primary_stride
        kernel = max(1, grid[0] - primary_stride + 1), max(1, grid[1] - primary_stride + 1)
        self.primary_caps = DepthwiseCaps(num_types, caps_dim, kernel, primary_stride, **dd)
        self.grid_size = (1, 1)
        self.num_features = self.head_hidden_size = channels
        self.feature_info = [
            dict(num_chs=channels, reduction=height // grid[0], module="conv4"),
            dict(num_chs=channels, reduction=height, module="primary_caps.conv"),
            dict(num_chs=channels, reduction=height, module="primary_caps"),
        ]
        self._class_caps_args = dict(
            num_capsules=num_types, caps_dim=caps_dim, class_dim=class_dim, couplings=couplings
        )
        self._decoder_args: dict[str, Any] | None = None
        if decoder:
            shape, widths = (in_chans, height, width), tuple(decoder_dims)
            self._decoder_args = dict(class_dim=class_dim, image_shape=shape, hidden_dims=widths, small=small_decoder)
        self._build_head(num_classes, **dd)

    @torch.jit.ignore
    def _build_head(self, num_classes: int, **dd: Any) -> None:
        """Make class capsules and decoder for `num_classes`."""
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes} is not possible: it must be 0 or more")
        self.num_classes = num_classes
        caps = SelfAttentionRouting(num_classes=num_classes, **self._class_caps_args, **dd)
        self.class_caps = caps if num_classes else nn.Identity()
        # A registered None lets load_state_dict drop a decoder's weights silently where the model has none.
        has_decoder = num_classes > 0 and self._decoder_args is not None
        decoder = Decoder(num_classes=num_classes, **self._decoder_args, **dd) if has_decoder else None
        self.register_module("decoder", decoder)

    arguments = _builder.arguments
    reset_classifier = _builder.reset_classifier
    forward_intermediates = _builder.forward_intermediates
    prune_intermediate_layers = _builder.prune_intermediate_layers
    set_grad_checkpointing = _builder.set_grad_checkpointing
    forward_capsules = _builder.forward_capsules
    couplings = _couplings.couplings
    couplings_of = _couplings.couplings_of_vectors
    reconstruct = _builder.reconstruct
    auxiliary_modules = _builder.auxiliary_modules
    capsule_layers = _builder.capsule_layers
    no_weight_decay = _builder.no_weight_decay
    get_classifier = _builder.get_classifier

    @torch.jit.ignore
    def primary_capsules(self, features: Tensor) -> Tensor:
        """Reorder features ``[B, T*K, 1, 1]`` into the primary capsules ``[B, T, K]``."""
        return self.primary_caps.to_capsules(features)

    @torch.jit.ignore
    def search_space(self) -> list[SearchedArgument]:
        """What a search may vary: the couplings and the decoder."""
        decoder = _builder.searched_decoder(self._arguments["decoder_dims"])
        return [SearchedArgument("couplings", list(COUPLINGS)), *decoder]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters for optimisation; what no pattern names (class capsules, decoder) is timm's last group."""
        return dict(stem=r"^conv1", blocks=r"^(?:conv[2-4]|primary_caps)")

    @torch.jit.ignore
    def _levels(self) -> list[Callable[[Tensor], Tensor]]:
        """Levels of `feature_info` that `prune_intermediate_layers` has left, each a function of the one before."""
        primary = self.primary_caps
        levels: list[Callable[[Tensor], Tensor]] = [self._convolve]
        if not isinstance(primary, nn.Identity):
            levels += [lambda x: checkpoint(primary.conv, x) if self.grad_checkpointing else primary.conv(x)]
            if not isinstance(primary.squash, nn.Identity):
                levels += [primary.squash]
        return levels

    @torch.jit.ignore
    def _cut(self, last: int) -> None:
        """Remove the levels after the `last`."""
        if last == 0:
            self.primary_caps = nn.Identity()
        else:
            self.primary_caps.squash = nn.Identity()

    def _convolve(self, x: Tensor) -> Tensor:
        return self.conv4(self.conv3(self.conv2(self.conv1(x))))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to the squashed primary capsules ``[B, T*K, 1, 1]``."""
        x = self._convolve(x)
        # Not the convolutions: computed twice, BatchNorm would count a batch twice.
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(self.primary_caps, x)
        return self.primary_caps(x)

    def to_capsules(self, x: Tensor) -> Tensor:
        """Reorder a map ``[B, T*K, 1, 1]`` into the capsules ``[B, T, K]`` that the class capsules take."""
        return self.primary_caps.to_capsules(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map primary capsules ``[B, T*K, 1, 1]`` to class scores ``[B, J]``, or flatten them if `pre_logits`."""
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        if pre_logits or self.num_classes == 0:
            return x.flatten(1) if self.global_pool == "flat" else x
        return capsule_lengths(self.class_caps(self.to_capsules(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to the lengths of the class capsules ``[B, J]``; the longest is the class."""
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit weights to a model of other classes, channels or image size; keep all that can be kept.

    Raises:
        ValueError: If the weights are those of another architecture.
    """
    other_classes, other_chans, other_size = _builder.trained_otherwise(model)
    may_differ = {
        "conv1.conv.weight": other_chans,
        "primary_caps.conv.weight": other_size,
        "class_caps.weight": other_classes,
        "class_caps.bias": other_classes,
        "decoder.fc1.weight": other_classes,
        "decoder.fc3.weight": other_chans or other_size,
        "decoder.fc3.bias": other_chans or other_size,
    }
    return fit_weights(state_dict, model, [key for key, differs in may_differ.items() if differs])


_cfg = partial(
    _builder.digits_cfg,
    pool_size=(1, 1),
    first_conv="conv1.conv",
    classifier="class_caps",
    paper_ids="arXiv:2101.12491",
    paper_name="Efficient-CapsNet: Capsule Network with Self-Attention Routing",
    notes=("published on MNIST: 99.84 % by an ensemble, about 99.7 % by one network",),
)

default_cfgs = generate_default_cfgs(shipped_cfgs(("efficient_capsnet",), _cfg))

_create_efficient_capsnet = partial(_builder.build_model, EfficientCapsNet, checkpoint_filter_fn)


@register_model
def efficient_capsnet(pretrained: bool = False, **kwargs: Any) -> EfficientCapsNet:
    """The network for MNIST of Mazzia, Salvetti and Chiaberge 2021: 161,824 parameters without the decoder.

    `form="smallnorb", in_chans=2, img_size=48, num_classes=5` is that for smallNORB with 151,664 parameters,
    `form="multimnist", img_size=36` that for MultiMNIST with 154,656.
    """
    return _create_efficient_capsnet("efficient_capsnet", pretrained, **kwargs)
