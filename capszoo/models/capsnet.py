"""CapsNet: capsule networks with dynamic routing

Papers:
* `Dynamic Routing Between Capsules` - https://arxiv.org/abs/1710.09829
* `FasTrCaps: An Integrated Framework for Fast yet Accurate Training of Capsule Networks` -
  https://arxiv.org/abs/1905.10142

One convolution, one layer of primary capsules (a convolution whose filters are grouped into capsules), one layer of
class capsules reached by routing. The length of a class capsule is the score of its class. FasTrCaps adds vote
matrices shared per capsule type and a decoder that takes the chosen capsule alone.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import _assert, get_device_dtype, to_2tuple
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from capszoo.arguments import SearchedArgument
from capszoo.layers import ClassCaps, Decoder, PrimaryCaps, ScaledConv2d, capsule_lengths, unfold_scales
from capszoo.pretrained import check_source, fit_weights, shipped_cfgs

__all__ = ["CapsNet"]

_logger = logging.getLogger(__name__)

_SQUASHES = ("exact", "approx")
_STARTS = ("default", "plain", "paper")

# Shared vote matrices have the same shapes whatever the size of the images: something else must bound it.
_MAX_CAPSULES = 1 << 22


class CapsNet(nn.Module):
    """Capsule network of Sabour, Frosst and Hinton 2017, with the reductions of FasTrCaps (section III)."""

    if TYPE_CHECKING:  # not at run time, where torch.jit.script would compile by these annotations
        # nn.Identity once `reset_classifier(0)` or `prune_intermediate_layers` took the layer away: whoever may meet
        # such a network asks isinstance.
        primary_caps: PrimaryCaps
        class_caps: ClassCaps
        decoder: Decoder | None
        capsule_index: Tensor | None
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
        kernel_size: int = 9,
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
            kernel_size: Side of both convolution kernels, in pixels.
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
                the scale of `capszoo.layers.fan_in_scale`. 'plain' has scales of 1, and torch's own start of a
                convolution. 'paper' is that of FasTrCaps's code: the primary capsules' scale is 1 / num_types, vote
                matrices have a standard deviation of 1, and biases are 0.
            conv1_scale: Factor of the first convolution's sum, before its bias is added; None for that of `start`.
            primary_scale: Likewise for the convolution of the primary capsules.
            device: Device of the parameters.
            dtype: Type of the parameters.

        Raises:
            ValueError: If the images are too small for the two convolutions, or an argument is out of its range.
        """
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if squash not in _SQUASHES:
            raise ValueError(f"unknown squash {squash!r}. Known: {', '.join(_SQUASHES)}")
        if global_pool not in ("flat", ""):
            raise ValueError(f"global_pool={global_pool!r} is not possible: capsules are not pooled, use 'flat' or ''")
        if start not in _STARTS:
            raise ValueError(f"unknown start {start!r}. Known: {', '.join(_STARTS)}")
        sizes = dict(in_chans=in_chans, conv_dim=conv_dim, num_types=num_types, caps_dim=caps_dim, class_dim=class_dim)
        for name, value in dict(**sizes, kernel_size=kernel_size).items():
            if value < 1:
                raise ValueError(f"{name}={value} is not possible: it must be 1 or more")
        if not 0.0 <= drop_rate <= 1.0:
            raise ValueError(f"drop_rate={drop_rate} is not possible: it must be between 0 and 1")
        if len(decoder_dims) != 2 or min(decoder_dims) < 1:
            raise ValueError(f"decoder_dims={decoder_dims} is not possible: give two widths of 1 or more")
        height, width = to_2tuple(img_size)
        least = kernel_size + kernel_size - 1
        if min(height, width) < least:
            raise ValueError(
                f"img_size={height}x{width} is too small: two {kernel_size}x{kernel_size} convolutions need {least} "
                f"pixels each way, resize the images or set kernel_size"
            )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.img_size = (height, width)
        self.global_pool = global_pool
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.num_types = num_types
        self.keep_types = _resolve_keep_types(keep_types, num_types)
        self._arguments: dict[str, Any] = dict(
            in_chans=in_chans,
            img_size=[height, width],
            conv_dim=conv_dim,
            num_types=num_types,
            caps_dim=caps_dim,
            class_dim=class_dim,
            kernel_size=kernel_size,
            keep_types=list(self.keep_types) or keep_types,
            share_weights=share_weights,
            decoder=decoder,
            small_decoder=small_decoder,
            decoder_dims=list(decoder_dims),
            num_routing=num_routing,
            routing=routing,
            squash=squash,
            start=start,
            conv1_scale=conv1_scale,
            primary_scale=primary_scale,
        )
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
        self.conv1 = ScaledConv2d(in_chans, conv_dim, kernel_size, scale=conv1_scale, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.primary_caps = PrimaryCaps(
            conv_dim,
            num_types,
            caps_dim,
            kernel_size,
            stride=2,
            scale=primary_scale,
            approximate_squash=approximate,
            **fresh,
            **dd,
        )
        if start == "paper":
            nn.init.zeros_(self.conv1.bias)
            nn.init.zeros_(self.primary_caps.conv.bias)
        # Positions of one capsule type after the two convolutions.
        grid = tuple((size - 2 * (kernel_size - 1) - 1) // 2 + 1 for size in (height, width))
        self.grid_size = grid
        self.num_features = num_types * caps_dim
        self.head_hidden_size = self.num_features * grid[0] * grid[1]
        # Image size over map size, as timm checks it: without padding the maps of small images shrink by more than
        # the strides, 28 pixels to 20 and 6.
        reduction = height // grid[0]
        self.feature_info = [
            dict(num_chs=conv_dim, reduction=height // (height - kernel_size + 1), module="act1"),
            dict(num_chs=self.num_features, reduction=reduction, module="primary_caps.conv"),
            dict(num_chs=self.num_features, reduction=reduction, module="primary_caps"),
        ]
        num_capsules = num_types * grid[0] * grid[1]
        if num_capsules > _MAX_CAPSULES:
            raise ValueError(
                f"img_size={height}x{width} makes {num_capsules:,} primary capsules, more than {_MAX_CAPSULES:,}: "
                f"resize the images or set num_types"
            )
        self.num_primary = num_capsules  # made by the convolution, kept or not
        self.keep_capsules = _resolve_keep_capsules(keep_capsules, num_capsules, self.img_size)
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
            **(dict(init_std=1.0, init_bias=0.0) if start == "paper" else {}),
        )
        self._decoder_args: dict[str, Any] | None = None
        if decoder:
            self._decoder_args = dict(
                class_dim=class_dim,
                image_shape=(in_chans, height, width),
                hidden_dims=tuple(decoder_dims),
                small=small_decoder,
            )
        self._build_head(num_classes, **dd)
        self.register_load_state_dict_post_hook(_place_capsule_index)

    @torch.jit.ignore
    def _build_head(self, num_classes: int, **dd: Any) -> None:
        """Make class capsules and decoder for `num_classes`."""
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes} is not possible: it must be 0 or more")
        self.num_classes = num_classes
        self.class_caps = (
            ClassCaps(num_classes=num_classes, **self._class_caps_args, **dd) if num_classes else nn.Identity()
        )
        # A registered None lets load_state_dict drop a decoder's weights silently where the model has none.
        has_decoder = num_classes > 0 and self._decoder_args is not None
        self.register_module(
            "decoder", Decoder(num_classes=num_classes, **self._decoder_args, **dd) if has_decoder else None
        )

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Make the index of the capsules that remain, which no checkpoint holds, where the weights are.

        Own matrices take the kept capsules as they come. A shared matrix serves equally many capsules of each type:
        types that keep fewer are filled up with a capsule of zeros, whose vote is zero and adds nothing.
        """
        index = list(self.keep_capsules)
        if index and self.share_weights:
            per_type = self.grid_size[0] * self.grid_size[1]
            types: list[list[int]] = [[] for _ in range(self.primary_caps.num_types)]
            for i in index:
                types[i // per_type].append(i)
            longest = max(map(len, types))
            index = [i for kept in types for i in kept + [self.num_primary] * (longest - len(kept))]
        # Read by `to_capsules`: the place after the last capsule is the capsule of zeros.
        self.fill_capsules = self.num_primary in index
        tensor = torch.tensor(index, device=self.conv1.weight.device) if index else None
        self.register_buffer("capsule_index", tensor, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CapsNet":
        index = self.capsule_index
        super()._apply(fn, recurse)
        # Whatever moved it: `to_empty` gives memory without the values.
        if self.capsule_index is not index and not self.capsule_index.is_meta:
            self.init_non_persistent_buffers()
        return self

    @torch.jit.ignore
    def arguments(self) -> dict[str, Any]:
        """Keywords, as JSON can hold them, with which `create_model` makes a network of these shapes again."""
        return {
            **self._arguments,
            "num_classes": self.num_classes,
            "global_pool": self.global_pool,
            "keep_capsules": list(self.keep_capsules) or None,
            "drop_rate": self.drop_rate,
        }

    @torch.jit.ignore
    def prunable_parts(self) -> dict[str, int | tuple[int, int]]:
        """How many there are of each part that `capszoo.prune` removes; none without class capsules.

        'conv1' counts filters, 'types' and 'capsules' primary capsules, and 'decoder' the units of its hidden layers.
        """
        if not isinstance(self.class_caps, ClassCaps):
            return {}
        parts: dict[str, int | tuple[int, int]] = {
            "conv1": self.conv1.out_channels,
            "types": self.primary_caps.num_types,
            "capsules": len(self.keep_capsules) or self.num_primary,
        }
        if self.decoder is not None:
            parts["decoder"] = (self.decoder.fc1.out_features, self.decoder.fc2.out_features)
        return parts

    @torch.jit.ignore
    def search_space(self) -> list[SearchedArgument]:
        """The reductions of FasTrCaps (section V), and what else makes the network smaller or faster."""
        types = {share: max(1, round(share * self.primary_caps.num_types)) for share in (0.75, 0.5, 0.25)}
        dims = self._arguments["decoder_dims"]
        widths = {width: [max(1, int(width * units)) for units in dims] for width in (1.0, 0.5, 0.25)}
        return [
            SearchedArgument("share_weights", [False, True]),
            SearchedArgument("decoder", [True, False]),
            SearchedArgument("small_decoder", [False, True], needs="decoder"),
            SearchedArgument("decoder_dims", widths, name="decoder_width", needs="decoder"),
            SearchedArgument("keep_types", {1.0: None, **types}, name="types"),
            SearchedArgument("num_routing", range(1, 5), first=3),
            SearchedArgument("squash", ["exact", "approx"]),
        ]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves out."""
        return {"class_caps.bias"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters for optimisation; what no pattern names (class capsules, decoder) is timm's last group."""
        return dict(stem=r"^conv1", blocks=r"^primary_caps")

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing of the primary capsules."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The class capsules."""
        return self.class_caps

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make new class capsules (and decoder), of the same type and device, frozen if the old ones were.

        Args:
            num_classes: Classes of the new head; 0 removes it, and `forward` then gives the features.
            global_pool: 'flat' or '', kept if None.
        """
        dd = get_device_dtype(self)
        frozen = [n for n in ("class_caps", "decoder") if _is_frozen(getattr(self, n))]
        if global_pool is not None:
            if global_pool not in ("flat", ""):
                raise ValueError(f"global_pool={global_pool!r} is not possible: use 'flat' or ''")
            self.global_pool = global_pool
        self._build_head(num_classes, **dd)
        for name in ("class_caps", "decoder"):
            module = getattr(self, name)
            if module is not None:
                module.train(self.training)
                module.requires_grad_(name not in frozen)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Forward features and return intermediates.

        Args:
            x: Images ``[B, C, H, W]``.
            indices: Levels to return, counted as in `feature_info`: the last n if int, all if None; of a network cut
                by `prune_intermediate_layers`, of those that are left.
            norm: Not used, for timm's interface.
            stop_early: Stop after the last level asked for; needs `intermediates_only`.
            output_fmt: Must be 'NCHW'.
            intermediates_only: Return the intermediates alone.

        Returns:
            The intermediates, or the final features and the intermediates.
        """
        assert output_fmt == "NCHW", "Output format must be NCHW."
        assert intermediates_only or not stop_early, "Must use intermediates_only for early stopping."
        num_levels = self._num_levels()
        take_indices, max_index = feature_take_indices(num_levels, indices)
        intermediates = []
        x = self.act1(self.conv1(x))
        if 0 in take_indices:
            intermediates.append(x)
        if num_levels > 1 and not (stop_early and max_index == 0):
            checkpointed = self.grad_checkpointing and not torch.jit.is_scripting()
            x = checkpoint(self.primary_caps.conv, x) if checkpointed else self.primary_caps.conv(x)
            if 1 in take_indices:
                intermediates.append(x)
            if not (stop_early and max_index == 1):
                x = self.primary_caps.squash_map(x)
            if 2 in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def _num_levels(self) -> int:
        """Levels of `feature_info` that `prune_intermediate_layers` has left."""
        if isinstance(self.primary_caps, nn.Identity):
            return 1
        return 2 if isinstance(self.primary_caps.squash, nn.Identity) else 3

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers that the given intermediates do not need.

        Args:
            indices: Levels to keep, counted as in `feature_info`: the last n if int.
            prune_norm: Also take the squash away where only the map before it is kept, as timm's models do with their
                last norm: `forward_features` then ends at that map.
            prune_head: Remove class capsules and decoder, too.

        Returns:
            The levels, counted from the first.
        """
        take_indices, max_index = feature_take_indices(self._num_levels(), indices)
        if max_index == 0:
            self.primary_caps = nn.Identity()
            self.num_features = self.feature_info[0]["num_chs"]
        elif max_index == 1 and prune_norm:
            self.primary_caps.squash = nn.Identity()
        if prune_head or max_index == 0:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to the squashed primary capsules ``[B, T*K, H', W']``."""
        x = self.act1(self.conv1(x))
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
            # Maps of other sizes would have capsules at these places too, and give wrong numbers silently.
            _assert(
                x.shape[1] == self.num_primary,
                f"a choice of {self.num_primary} capsules got {x.shape[1]}: make the model for this img_size",
            )
            if self.fill_capsules:
                x = F.pad(x, (0, 0, 0, 1))
            x = x.index_select(1, self.capsule_index)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to the lengths of the class capsules ``[B, J]``; the longest is the class."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_capsules(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images ``[B, C, H, W]`` to class capsules ``[B, J, D]`` and class scores ``[B, J]``, their lengths.

        Raises:
            RuntimeError: If the model has no class capsules (`num_classes=0`).
        """
        if self.num_classes == 0:
            raise RuntimeError("this model has num_classes=0 and no class capsules: call reset_classifier(num_classes)")
        x = self.forward_features(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        capsules = self.class_caps(self.to_capsules(x))
        return capsules, capsule_lengths(capsules)

    @torch.jit.ignore
    def reconstruct(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """Draw each image again from one class capsule.

        Args:
            x: Images ``[B, C, H, W]``.
            target: Class whose capsule is drawn, ``[B]``; the longest capsule if None.

        Returns:
            Images ``[B, C, H, W]`` with values in [0, 1].

        Raises:
            RuntimeError: If the model was made without decoder.
        """
        if self.decoder is None:
            raise RuntimeError("this model has no decoder: make it with create_model(..., decoder=True)")
        capsules, scores = self.forward_capsules(x)
        if target is None:
            target = scores.argmax(dim=1)
        return self.decoder(capsules, target)


def _place_capsule_index(model: CapsNet, incompatible_keys: object) -> None:
    """Follow the weights: `load_state_dict(assign=True)` takes those of another device, and no index."""
    if model.capsule_index is not None and model.capsule_index.device != model.conv1.weight.device:
        model.init_non_persistent_buffers()


def _is_frozen(module: nn.Module | None) -> bool:
    params = [] if module is None else list(module.parameters())
    return bool(params) and not any(p.requires_grad for p in params)


def _resolve_keep_types(keep_types: int | Sequence[int] | None, num_types: int) -> tuple[int, ...]:
    """Check `keep_types` and return its indices, none where only a number is given."""
    if keep_types is None:
        return ()
    if isinstance(keep_types, int):
        if not 1 <= keep_types <= num_types:
            raise ValueError(f"keep_types={keep_types} is not possible: it must be 1 to num_types={num_types}")
        return ()
    kept = tuple(int(t) for t in keep_types)
    if not kept or len(set(kept)) != len(kept) or min(kept) < 0 or max(kept) >= num_types:
        raise ValueError(f"keep_types={kept} is not possible: give distinct indices from 0 to {num_types - 1}")
    return kept


def _resolve_keep_capsules(
    keep_capsules: Sequence[int] | None, num_capsules: int, img_size: tuple[int, int]
) -> tuple[int, ...]:
    """Check `keep_capsules` and return its indices in ascending order, none where all capsules are kept."""
    if keep_capsules is None:
        return ()
    if isinstance(keep_capsules, int):
        raise ValueError(f"keep_capsules={keep_capsules} is not possible: give the indices of the capsules to keep")
    kept = sorted(int(i) for i in keep_capsules)
    images = f"{num_capsules} capsules of {img_size[0]}x{img_size[1]} images"
    if not kept:
        raise ValueError(f"keep_capsules is empty: give at least one index of the {images}")
    for one, other in zip(kept, kept[1:], strict=False):
        if one == other:
            raise ValueError(f"keep_capsules holds {one} twice: give distinct indices")
    for i in (kept[0], kept[-1]):
        if not 0 <= i < num_capsules:
            raise ValueError(f"keep_capsules holds {i}: give indices from 0 to {num_capsules - 1}, of the {images}")
    return tuple(kept) if len(kept) < num_capsules else ()


def _select_types(state_dict: dict[str, Tensor], model: CapsNet) -> dict[str, Tensor]:
    """Cut weights that hold more capsule types, or more capsules, down to those that the model keeps.

    Raises:
        ValueError: If the model keeps single capsules, and the weights are for images of another size.
    """
    size, source_size = tuple(model.img_size), tuple(model.pretrained_cfg["input_size"][1:])
    if model.keep_capsules and model.num_classes and size != source_size:
        raise ValueError(
            f"keep_capsules chooses positions of {source_size[0]}x{source_size[1]} images, for which these weights "
            f"are, and means others at img_size={size[0]}x{size[1]}: leave img_size as it is, or resize the images"
        )
    conv = state_dict.get("primary_caps.conv.weight")
    if conv is None:
        return state_dict
    state_dict = dict(state_dict)
    caps_dim, num_types, kept = model.primary_caps.caps_dim, model.num_types, torch.tensor(model.keep_types)
    votes = state_dict.get("class_caps.weight")
    own_votes = votes is not None and bool(model.keep_capsules) and not model.share_weights
    # Rows of weights whose capsules are cut already do not divide by types.
    divisible = not own_votes or votes.shape[0] == num_types * model.grid_size[0] * model.grid_size[1]
    if conv.shape[0] == num_types * caps_dim and len(kept) not in (0, num_types) and divisible:
        for key in ("primary_caps.conv.weight", "primary_caps.conv.bias", "class_caps.weight"):
            # Both filters and vote matrices are type-major, with a whole number of rows per type.
            if key in state_dict:
                state_dict[key] = state_dict[key].unflatten(0, (num_types, -1))[kept].flatten(0, 1)
        _logger.info(f"Kept {len(kept)} of {num_types} capsule types of the pretrained weights.")
    if own_votes and state_dict["class_caps.weight"].shape[0] == model.num_primary:
        state_dict["class_caps.weight"] = state_dict["class_caps.weight"][torch.tensor(model.keep_capsules)]
        _logger.info(f"Kept {len(model.keep_capsules)} of {model.num_primary} capsules of the pretrained weights.")
    return state_dict


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Fit weights to a model of other classes, channels or image size; keep all that can be kept.

    What depends on the changed size (vote matrices of every capsule, the decoder's first and last layer) keeps the
    model's own initialisation, and a log line says so. Class capsules and the first convolution are left to timm.

    Raises:
        ValueError: If the weights are those of another architecture.
    """
    state_dict = unfold_scales(_select_types(state_dict, model), model)
    cfg = model.pretrained_cfg
    source_chans, *source_size = cfg["input_size"]
    other_classes = model.num_classes != cfg["num_classes"]
    other_chans = model.in_chans != source_chans
    other_size = tuple(model.img_size) != tuple(source_size)
    may_differ = {
        "conv1.weight": other_chans,
        "class_caps.weight": other_classes or other_size,
        "class_caps.bias": other_classes,
        "decoder.fc1.weight": other_classes,
        "decoder.fc3.weight": other_chans or other_size,
        "decoder.fc3.bias": other_chans or other_size,
    }
    return fit_weights(state_dict, model, [key for key, differs in may_differ.items() if differs])


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (1, 28, 28),
        "pool_size": (6, 6),
        "fixed_input_size": True,
        # Digits reach to the border: any crop would cut them.
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.0,),
        "std": (1.0,),
        "first_conv": "conv1",
        "classifier": "class_caps",
        "license": "mit",
        **kwargs,
    }


# A tag for each of the shipped weights, `untrained` for a model that has none on MNIST.
default_cfgs = generate_default_cfgs(shipped_cfgs(("capsnet", "capsnet_ws", "capsnet_pruned", "capsnet_tiny"), _cfg))


def _create_capsnet(variant: str, pretrained: bool = False, **kwargs: Any) -> CapsNet:
    if pretrained:
        overlay = check_source(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        kwargs["pretrained_cfg_overlay"] = overlay
    out_indices = kwargs.pop("out_indices", (0, 1, 2))
    return build_model_with_cfg(
        CapsNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


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
