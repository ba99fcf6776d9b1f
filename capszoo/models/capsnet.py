"""CapsNet: capsule networks with dynamic routing

Papers:
* `Dynamic Routing Between Capsules` - https://arxiv.org/abs/1710.09829
* `FasTrCaps: An Integrated Framework for Fast yet Accurate Training of Capsule Networks` -
  https://arxiv.org/abs/1905.10142

One convolution, one layer of primary capsules (a convolution whose filters are grouped into capsules), one layer of
class capsules reached by routing. The length of a class capsule is the score of its class. FasTrCaps adds vote
matrices shared per capsule type and a decoder that takes the chosen capsule alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from capszoo.arguments import SearchedArgument
from capszoo.layers import ClassCaps, Decoder, PrimaryCaps, ScaledConv2d, capsule_lengths, select_caps, unfold_scales
from capszoo.layers.backbone import Backbone
from capszoo.models import _builder, _couplings, _stem
from capszoo.pretrained import fit_weights, shipped_cfgs

__all__ = ["CapsNet"]

_SQUASHES = ("exact", "approx")
_STARTS = ("default", "plain", "paper")


class CapsNet(nn.Module):
    """Capsule network of Sabour, Frosst and Hinton 2017, with the reductions of FasTrCaps (section III)."""

    uniform_arguments = {"num_routing": 1}
    _heads = ("class_caps", "decoder")
    _pooled = None
    least_map = _stem.least_map

    if TYPE_CHECKING:  # not at run time, where torch.jit.script would compile by these annotations
        # nn.Identity once `reset_classifier(0)` or `prune_intermediate_layers` took the layer away: whoever may meet
        # such a network asks isinstance.
        primary_caps: PrimaryCaps
        class_caps: ClassCaps
        decoder: Decoder | None
        capsule_index: Tensor | None
        backbone: Backbone | None
        keep_types: tuple[int, ...]
        keep_capsules: tuple[int, ...]
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
        conv_dim: int = 256,
        num_types: int = 32,
        caps_dim: int = 8,
        class_dim: int = 16,
        kernel_size: int | None = None,
        keep_types: int | Sequence[int] | None = None,
        keep_capsules: Sequence[int] | None = None,
        share_weights: bool = False,
        decoder: bool = False,
        small_decoder: bool = False,
        decoder_dims: tuple[int, int] = (512, 1024),
        num_routing: int = 3,
        routing: str = "dynamic",
        squash: str = "exact",
        drop_rate: float = 0.0,
        start: str = "default",
        conv1_scale: float | None = None,
        primary_scale: float | None = None,
        primary_stride: int | None = None,
        backbone: str | None = None,
        backbone_level: int | None = None,
        backbone_pretrained: bool = False,
        backbone_kwargs: dict | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Build the network.

        Args:
            num_classes: J, the number of class capsules; 0 for none, and features as output.
            in_chans: Channels of the images.
            img_size: Height and width of the images, in pixels.
            global_pool: 'flat' flattens the primary capsules where there are no class capsules, '' keeps their map.
            conv_dim: Filters of the first convolution.
            num_types: Primary capsule types.
            caps_dim: K, the dimension of a primary capsule.
            class_dim: D, the dimension of a class capsule.
            kernel_size: Side of both convolution kernels, in pixels, 9 by default; with a backbone that of the primary
                capsules, by default 3 or as wide as their stride.
            keep_types: Types that a pruned network keeps of `num_types`: their number, or their indices, which also
                select the matching part of weights that hold all types.
            keep_capsules: Single primary capsules that a pruned network keeps, as indices into the ``T*H*W`` capsules
                of the kept types, type-major (``t*H*W + position``); in any order, they are kept in ascending order.
                Positions are those of images of `img_size`.
            share_weights: One vote matrix per capsule type instead of one per capsule.
            decoder: Add the reconstruction decoder, a training aid that `forward` never uses.
            small_decoder: Feed the decoder the chosen capsule alone instead of all with the others set to zero.
            decoder_dims: Widths of the decoder's two hidden layers.
            num_routing: R, the number of routing iterations.
            routing: Name of the routing, see `capszoo.layers.list_routings`.
            squash: 'exact', or 'approx' for the paper's cheap approximation.
            drop_rate: Dropout rate of the primary capsules' values before routing.
            start: How a fresh network starts. 'default' suits Adam at rates from 0.0001 to 0.01: each convolution has
                the scale of `capszoo.layers.fan_in_scale`, and the filters of the primary capsules are centred, see
                `capszoo.layers.ScaledConv2d`. 'plain' has scales of 1, and torch's own start of a
                convolution. 'paper' is that of FasTrCaps's code: the primary capsules' scale is 1 / num_types, vote
                matrices have a standard deviation of 1, and biases are 0.
            conv1_scale: Factor of the first convolution's sum, before its bias is added; None for that of `start`.
            primary_scale: Likewise for the convolution of the primary capsules.
            primary_stride: Stride of the convolution of the primary capsules, in pixels, 2 by default; with a backbone
                what leaves a map of about 6x6.
            backbone: Name of a timm network, whose map the first convolution takes, with a kernel of 1x1, instead of
                the images; 'stem' for 3x3 convolutions of stride 2. See :class:`capszoo.layers.Backbone`.
            backbone_level: Level of its features; None for the last whose map has at least 12 pixels each way.
            backbone_pretrained: Start from timm's weights of the backbone, and normalise images as they were.
            backbone_kwargs: More keywords of the backbone, such as ``{"drop_path_rate": 0.1}``.
            device: Device of the parameters.
            dtype: Type of the parameters.

        Raises:
            ValueError: If the images are too small for the two convolutions, an argument is out of its range, or there
                is no such backbone or no weights of it.
        """
        given = dict(locals())
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if squash not in _SQUASHES:
            raise ValueError(f"unknown squash {squash!r}. Known: {', '.join(_SQUASHES)}")
        _builder.check_pool(global_pool, "capsules")
        if start not in _STARTS:
            raise ValueError(f"unknown start {start!r}. Known: {', '.join(_STARTS)}")
        sizes = dict(in_chans=in_chans, conv_dim=conv_dim, num_types=num_types, caps_dim=caps_dim, class_dim=class_dim)
        _builder.check_sizes(**sizes)
        _builder.check_drop_rate(drop_rate)
        _builder.check_decoder_dims(decoder_dims)
        height, width = to_2tuple(img_size)
        self.backbone = _stem.make_backbone(given, (height, width), **dd)
        convs = _stem.plan_convs(self.backbone, (height, width), kernel_size, primary_stride)
        grid = convs.grid
        self.in_chans, self.img_size = in_chans, (height, width)
        self.global_pool, self.drop_rate = global_pool, drop_rate
        self.grad_checkpointing = False
        self.num_types = num_types
        self.keep_types = select_caps.resolve_keep_types(keep_types, num_types)
        types = list(self.keep_types) or keep_types
        replaced = dict(img_size=[height, width], keep_types=types, decoder_dims=list(decoder_dims))
        arguments = _builder.given_arguments(given, **replaced)
        self._arguments = _stem.kept_arguments(arguments, self.backbone, convs)
        # By default a scale leaves what a fresh convolution gives as it is; the paper's divides it.
        fresh: dict[str, Any] = {}
        if start != "default":
            conv1_scale = 1.0 if conv1_scale is None else conv1_scale
            if primary_scale is None:
                primary_scale = 1 / num_types if start == "paper" else 1.0
            fresh = dict(init_gain=primary_scale)
        if keep_types is not None:
            num_types = len(self.keep_types) if self.keep_types else int(keep_types)

        approximate = squash == "approx"
        self.conv1 = ScaledConv2d(convs.in_chans or in_chans, conv_dim, convs.first_kernel, scale=conv1_scale, **dd)
        self.act1 = nn.ReLU(inplace=True)
        kernel = dict(kernel_size=convs.kernel_size, stride=convs.stride, scale=primary_scale)
        self.primary_caps = PrimaryCaps(
            conv_dim, num_types, caps_dim, **kernel, approximate_squash=approximate, **fresh, **dd
        )
        if start == "paper":
            nn.init.zeros_(self.conv1.bias)
            nn.init.zeros_(self.primary_caps.conv.bias)
        self.grid_size = grid  # positions of one capsule type after the two convolutions
        self.num_features = num_types * caps_dim
        self.head_hidden_size = self.num_features * grid[0] * grid[1]
        # Image size over map size, as timm checks it: without padding the maps of small images shrink by more than
        # the strides, 28 pixels to 20 and 6.
        self.feature_info = [
            dict(num_chs=conv_dim, reduction=height // convs.map_size[0], module="act1"),
            dict(num_chs=self.num_features, reduction=height // grid[0], module="primary_caps.conv"),
            dict(num_chs=self.num_features, reduction=height // grid[0], module="primary_caps"),
        ]
        num_capsules = num_types * grid[0] * grid[1]
        _builder.check_capsules(num_capsules, height, width, "set num_types")
        self.num_primary = num_capsules  # made by the convolution, kept or not
        self.keep_capsules = select_caps.resolve_keep_capsules(keep_capsules, num_capsules, self.img_size)
        self.share_weights = share_weights
        self.init_non_persistent_buffers()
        if self.capsule_index is not None:
            num_capsules = len(self.capsule_index)
        self._class_caps_args: dict[str, Any] = dict(
            num_capsules=num_capsules,
            caps_dim=caps_dim,
            class_dim=class_dim,
            num_weights=num_types if share_weights else num_capsules,
            num_routing=num_routing,
            routing=routing,
            approximate_squash=approximate,
            **_stem.fresh_votes(start, share_weights, grid[0] * grid[1]),
        )
        self._decoder_args: dict[str, Any] | None = None
        if decoder:
            shape, widths = (in_chans, height, width), tuple(decoder_dims)
            self._decoder_args = dict(class_dim=class_dim, image_shape=shape, hidden_dims=widths, small=small_decoder)
        self._build_head(num_classes, **dd)
        self.register_load_state_dict_post_hook(select_caps.place_capsule_index)

    @torch.jit.ignore
    def _build_head(self, num_classes: int, **dd: Any) -> None:
        """Make class capsules and decoder for `num_classes`."""
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes} is not possible: it must be 0 or more")
        self.num_classes = num_classes
        caps = ClassCaps(num_classes=num_classes, **self._class_caps_args, **dd) if num_classes else nn.Identity()
        self.class_caps = caps
        # A registered None lets load_state_dict drop a decoder's weights silently where the model has none.
        has_decoder = num_classes > 0 and self._decoder_args is not None
        decoder = Decoder(num_classes=num_classes, **self._decoder_args, **dd) if has_decoder else None
        self.register_module("decoder", decoder)

    _apply = select_caps.apply_to_tensors
    init_non_persistent_buffers = select_caps.init_non_persistent_buffers
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
    group_matcher = _stem.group_matcher

    @torch.jit.ignore
    def resize_weights(self, state_dict: dict[str, Tensor], img_size: tuple[int, int]) -> dict[str, Tensor]:
        """Weights that were trained on images of this size as they are at the network's, see `capszoo.contract`."""
        return _stem.rescale_votes(state_dict, self, img_size)

    @torch.jit.ignore
    def arguments(self) -> dict[str, Any]:
        """Keywords, as JSON can hold them, with which `create_model` makes a network of these shapes again."""
        return {**_builder.arguments(self), "keep_capsules": list(self.keep_capsules) or None}

    @torch.jit.ignore
    def primary_capsules(self, features: Tensor) -> Tensor:
        """Reorder features ``[B, T*K, H, W]`` into all primary capsules ``[B, I, K]``, kept by the network or not."""
        return self.primary_caps.to_capsules(features)

    @torch.jit.ignore
    def prunable_parts(self) -> dict[str, int | tuple[int, int]]:
        """How many of each part there are to prune; none without class capsules. A backbone's filters are left out."""
        if not isinstance(self.class_caps, ClassCaps):
            return {}
        types, capsules = self.primary_caps.num_types, len(self.keep_capsules) or self.num_primary
        parts: dict[str, int | tuple[int, int]] = dict(types=types, capsules=capsules)
        if self.backbone is None:
            parts = dict(conv1=self.conv1.out_channels, **parts)
        if self.decoder is not None:
            parts["decoder"] = (self.decoder.fc1.out_features, self.decoder.fc2.out_features)
        return parts

    @torch.jit.ignore
    def search_space(self) -> list[SearchedArgument]:
        """The reductions of FasTrCaps (section V), and what else makes the network smaller or faster to train."""
        types = {share: max(1, round(share * self.primary_caps.num_types)) for share in (0.75, 0.5, 0.25)}
        return [
            SearchedArgument("share_weights", [False, True]),
            *_builder.searched_decoder(self._arguments["decoder_dims"]),
            SearchedArgument("keep_types", {1.0: None, **types}, name="types"),
            SearchedArgument("num_routing", range(1, 5), first=3),
            SearchedArgument("squash", ["exact", "approx"]),
            SearchedArgument("start", ["default", "plain"]),
        ]

    @torch.jit.ignore
    def _levels(self) -> list[Callable[[Tensor], Tensor]]:
        """Levels of `feature_info` that `prune_intermediate_layers` has left, each a function of the one before."""
        primary = self.primary_caps
        levels: list[Callable[[Tensor], Tensor]] = [self.convolve]
        if not isinstance(primary, nn.Identity):
            levels += [lambda x: checkpoint(primary.conv, x) if self.grad_checkpointing else primary.conv(x)]
            if not isinstance(primary.squash, nn.Identity):
                levels += [primary.squash_map]
        return levels

    @torch.jit.ignore
    def _cut(self, last: int) -> None:
        """Remove the levels after the `last`."""
        if last == 0:
            self.primary_caps = nn.Identity()
            self.num_features = self.feature_info[0]["num_chs"]
        else:
            self.primary_caps.squash = nn.Identity()

    def convolve(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to what the primary capsules are made of, the map of `conv1`."""
        if self.backbone is not None:
            x = self.backbone(x)
        return self.act1(self.conv1(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to the squashed primary capsules ``[B, T*K, H', W']``."""
        x = self.convolve(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(self.primary_caps, x)
        return self.primary_caps(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map primary capsules ``[B, T*K, H', W']`` to class scores ``[B, J]``, or flatten them if `pre_logits`."""
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        if pre_logits or self.num_classes == 0:
            return x.flatten(1) if self.global_pool == "flat" else x
        return capsule_lengths(self.class_caps(self.to_capsules(x)))

    def to_capsules(self, x: Tensor) -> Tensor:
        """Reorder a map ``[B, T*K, H, W]`` into the capsules ``[B, I, K]`` that the class capsules take."""
        x = self.primary_caps.to_capsules(x)
        if self.capsule_index is not None:
            x = select_caps.select_capsules(x, self.capsule_index, self.num_primary, self.fill_capsules)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to the lengths of the class capsules ``[B, J]``; the longest is the class."""
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit weights to a model of other classes, channels or image size; keep all that can be kept.

    What depends on the changed size (vote matrices of every capsule, the decoder's first and last layer) keeps the
    model's own initialisation, and a log line says so. Class capsules and the first convolution are left to timm.

    Raises:
        ValueError: If the weights are those of another architecture.
    """
    state_dict = unfold_scales(select_caps.select_types(state_dict, model), model)
    other_classes, other_chans, other_size = _builder.trained_otherwise(model)
    if other_size:
        state_dict = _stem.rescale_votes(state_dict, model, model.pretrained_cfg["input_size"][1:])
    may_differ = {
        **dict.fromkeys(_stem.image_weights(model), other_chans),
        "class_caps.weight": other_classes or other_size,
        "class_caps.bias": other_classes,
        "decoder.fc1.weight": other_classes,
        "decoder.fc3.weight": other_chans or other_size,
        "decoder.fc3.bias": other_chans or other_size,
    }
    return fit_weights(state_dict, model, [key for key, differs in may_differ.items() if differs])


_cfg = partial(_builder.digits_cfg, first_conv="conv1", classifier="class_caps")

# A tag for each of the shipped weights, `untrained` for a model that has none on MNIST.
default_cfgs = generate_default_cfgs(shipped_cfgs(("capsnet", "capsnet_ws", "capsnet_pruned", "capsnet_tiny"), _cfg))


_create_capsnet = partial(_builder.build_model, CapsNet, checkpoint_filter_fn)


@register_model
def capsnet(pretrained: bool = False, **kwargs: Any) -> CapsNet:
    """The baseline of Sabour, Frosst and Hinton 2017: 32 capsule types, a vote matrix per capsule."""
    return _create_capsnet("capsnet", pretrained, **kwargs)


@register_model
def capsnet_ws(pretrained: bool = False, **kwargs: Any) -> CapsNet:
    """FasTrCaps: vote matrices shared per capsule type, and the small decoder."""
    model_args = dict(share_weights=True, small_decoder=True)
    return _create_capsnet("capsnet_ws", pretrained, **dict(model_args, **kwargs))


@register_model
def capsnet_pruned(pretrained: bool = False, **kwargs: Any) -> CapsNet:
    """The baseline pruned: 8 of its 32 capsule types, 192 of its 256 filters, half of the decoder's units."""
    model_args = dict(conv_dim=192, keep_types=8, decoder_dims=(256, 512))
    return _create_capsnet("capsnet_pruned", pretrained, **dict(model_args, **kwargs))


@register_model
def capsnet_tiny(pretrained: bool = False, **kwargs: Any) -> CapsNet:
    """A network for laptops: 64 filters, 8 capsule types with shared vote matrices, a decoder of 64 and 128 units."""
    model_args = dict(conv_dim=64, num_types=8, share_weights=True, small_decoder=True, decoder_dims=(64, 128))
    return _create_capsnet("capsnet_tiny", pretrained, **dict(model_args, **kwargs))
