"""DeepCaps: a deep network of convolutional capsules, of which one layer routes

Paper: `DeepCaps: Going Deeper with Capsule Networks` - https://arxiv.org/abs/1904.09546

A convolution and four cells. A cell has a convolution of capsules with stride 2, two more after it, and a skip that is
added to them: a third, or in the last cell a layer that routes. The capsules of the last two cells go to class capsules
by dynamic routing, as in `Dynamic Routing Between Capsules`, section 3.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from capszoo.arguments import SearchedArgument
from capszoo.layers import ClassCaps, ConvCaps, ConvDynamicRouting, DeconvDecoder, capsule_lengths
from capszoo.layers.checkpointing import checkpoint_once
from capszoo.models import _builder, _couplings, _stem
from capszoo.pretrained import fit_weights, shipped_cfgs

__all__ = ["DeepCaps"]


class Cell(nn.Module):
    """Capsules at half the size, two convolutions of them, and a skip: a convolution, or a layer that routes."""

    def __init__(
        self, in_chans: int, in_dim: int, num_types: int, caps_dim: int, num_routing: int | None = None, **dd: Any
    ):
        super().__init__()
        chans = num_types * caps_dim
        self.down = ConvCaps(in_chans, in_dim, num_types, caps_dim, stride=2, **dd)
        self.conv1 = ConvCaps(chans, caps_dim, num_types, caps_dim, **dd)
        self.conv2 = ConvCaps(chans, caps_dim, num_types, caps_dim, **dd)
        if num_routing is None:
            self.skip: nn.Module = ConvCaps(chans, caps_dim, num_types, caps_dim, **dd)
        else:
            self.skip = ConvDynamicRouting(num_types, caps_dim, num_types, caps_dim, num_routing, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.conv2(self.conv1(x)) + self.skip(x)


class DeepCaps(nn.Module):
    """Capsule network of Rajasegaran et al. 2019, in its form for images of 64x64."""

    uniform_arguments = {"num_routing": 1}
    _heads = ("class_caps", "decoder")
    _pooled = "capsules"
    _ends_in_activation = False

    if TYPE_CHECKING:  # not at run time, where torch.jit.script would compile by these annotations
        # nn.Identity once `reset_classifier(0)` or `prune_intermediate_layers` took the layer away.
        class_caps: ClassCaps
        decoder: DeconvDecoder | None
        # From timm's builder and from `create_model`.
        pretrained_cfg: dict[str, Any]
        default_cfg: dict[str, Any]
        creation_args: dict[str, Any]

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 64,
        global_pool: str = "flat",
        conv_dim: int = 128,
        num_types: int = 32,
        first_dim: int = 4,
        caps_dim: int = 8,
        class_dim: int = 32,
        num_routing: int = 3,
        decoder: bool = False,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Build the network.

        Args:
            num_classes: J, the number of class capsules; 0 for none, and features as output.
            in_chans: Channels of the images.
            img_size: Height and width of the images, in pixels.
            global_pool: 'flat' flattens the capsules where there are no class capsules, '' keeps their map.
            conv_dim: Filters of the first convolution.
            num_types: Capsule types of each cell.
            first_dim: Dimension of the first cell's capsules.
            caps_dim: K, the dimension of the other cells' capsules.
            class_dim: D, the dimension of a class capsule.
            num_routing: R, the number of iterations, in the last cell and to the class capsules; 1 for uniform
                couplings in both, to measure what routing brings.
            decoder: Add the reconstruction decoder, a training aid that `forward` never uses.
            drop_rate: Dropout rate of the values that go to the class capsules.
            device: Device of the parameters.
            dtype: Type of the parameters.

        Raises:
            ValueError: If an argument is out of its range.
        """
        given = dict(locals())
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        _builder.check_pool(global_pool, self._pooled)
        height, width = to_2tuple(img_size)
        sizes = dict(in_chans=in_chans, conv_dim=conv_dim, num_types=num_types, caps_dim=caps_dim, class_dim=class_dim)
        _builder.check_sizes(**sizes, first_dim=first_dim, img_size=min(height, width))
        _builder.check_drop_rate(drop_rate)
        self.in_chans, self.img_size = in_chans, (height, width)
        self.global_pool, self.drop_rate, self.num_types = global_pool, drop_rate, num_types
        self.grad_checkpointing = False
        self.is_cut = False  # by `prune_intermediate_layers`: the map of the last cell left is the features
        self._arguments = _builder.given_arguments(given, img_size=[height, width])

        self.conv1 = nn.Conv2d(in_chans, conv_dim, 3, padding=1, **dd)
        self.act1 = nn.ReLU()
        self.norm1 = nn.BatchNorm2d(conv_dim, **dd)
        chans, dim, grids, self.feature_info = conv_dim, 0, [(height, width)], []
        for number, cell_dim in enumerate((first_dim, caps_dim, caps_dim, caps_dim), start=1):
            cell = Cell(chans, dim, num_types, cell_dim, num_routing if number == 4 else None, **dd)
            self.add_module(f"cell{number}", cell)
            chans, dim = num_types * cell_dim, cell_dim
            grids.append(_stem.strided_grid(grids[-1], 2))
            self.feature_info += [dict(num_chs=chans, reduction=height // grids[-1][0], module=f"cell{number}")]
        num_positions = sum(rows * columns for rows, columns in grids[3:])
        _builder.check_capsules(num_types * num_positions, height, width, "set num_types")
        self.grid_size = (num_positions, 1)
        self._joined_grids = [grids[4], grids[3]]
        self.num_features, self.head_hidden_size = chans, chans * num_positions
        # Of capsules of length 1/2 these matrices make class capsules of about that length.
        self._class_caps_args: dict[str, Any] = dict(
            num_capsules=num_types * num_positions,
            caps_dim=caps_dim,
            class_dim=class_dim,
            num_routing=num_routing,
            init_std=0.05,
        )
        shape = (in_chans, height, width)
        self._decoder_args = dict(class_dim=class_dim, image_shape=shape) if decoder else None
        self._build_head(num_classes, **dd)

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
        self.register_module("decoder", DeconvDecoder(**self._decoder_args, **dd) if has_decoder else None)

    arguments = _builder.arguments
    reset_classifier = _builder.reset_classifier
    prune_intermediate_layers = _builder.prune_intermediate_layers
    set_grad_checkpointing = _builder.set_grad_checkpointing
    forward_capsules = _builder.forward_capsules
    reconstruct = _builder.reconstruct
    auxiliary_modules = _builder.auxiliary_modules
    get_classifier = _builder.get_classifier
    couplings = _couplings.couplings
    couplings_of = _couplings.couplings_of_vectors
    routed_capsules = _couplings.routed_vectors

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Forward features and return the maps of cells, see `capszoo.models._builder.forward_intermediates`."""
        if intermediates_only:
            return _builder.forward_intermediates(self, x, indices, norm, stop_early, output_fmt, True)
        _, maps = _builder.forward_intermediates(self, x, None, norm, stop_early, output_fmt)
        taken, _ = feature_take_indices(len(maps), indices)
        return maps[-1] if self.is_cut else self._join(maps[2], maps[3]), [maps[i] for i in taken]

    @torch.jit.ignore
    def capsule_layers(self) -> dict[str, nn.Module]:
        """Layers that route."""
        return {"cell4.skip": self.cell4.skip, "class_caps": self.class_caps} if self.num_classes else {}

    @torch.jit.ignore
    def capsule_places(self) -> tuple[list[tuple[int, int]], Tensor]:
        """The maps of the last two cells, and the place of each capsule, counted from one map on to the next."""
        return self._joined_grids, torch.arange(self.grid_size[0]).repeat(self.num_types)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves out."""
        return {"cell4.skip.bias", "class_caps.bias"}

    @torch.jit.ignore
    def search_space(self) -> list[SearchedArgument]:
        """What a search may vary: the iterations, the decoder, and the width."""
        conv_dim, num_types = self._arguments["conv_dim"], self._arguments["num_types"]
        return [
            SearchedArgument("num_routing", range(1, 5), first=3),
            SearchedArgument("decoder", [True, False]),
            SearchedArgument("conv_dim", [max(1, conv_dim // part) for part in (1, 2, 4)]),
            SearchedArgument("num_types", [max(1, num_types // part) for part in (1, 2, 4)]),
        ]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters for optimisation; what no pattern names (class capsules, decoder) is timm's last group."""
        return dict(stem=r"^(?:conv1|norm1)", blocks=r"^cell(\d+)")

    @torch.jit.ignore
    def _levels(self) -> list[Callable[[Tensor], Tensor]]:
        """Levels of `feature_info` that `prune_intermediate_layers` has left, each a function of the one before."""
        cells = [cell for cell in (self.cell1, self.cell2, self.cell3, self.cell4) if not isinstance(cell, nn.Identity)]
        run = checkpoint_once if self.grad_checkpointing else nn.Module.__call__
        return [lambda x: run(cells[0], self._stem(x)), *(partial(run, cell) for cell in cells[1:])]

    @torch.jit.ignore
    def _cut(self, last: int) -> None:
        """Remove the levels after the `last`."""
        for name in ("cell2", "cell3", "cell4")[last:]:
            setattr(self, name, nn.Identity())
        self.is_cut = True

    def _stem(self, x: Tensor) -> Tensor:
        return self.norm1(self.act1(self.conv1(x)))

    def _join(self, x: Tensor, last: Tensor) -> Tensor:
        """Put the positions of two maps ``[B, T*K, ...]`` one after the other, ``[B, T*K, P, 1]``."""
        return torch.cat([last.flatten(2), x.flatten(2)], dim=2).unsqueeze(3)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to the capsules of the last two cells ``[B, T*K, P, 1]``, at P positions."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return self.forward_intermediates(x)[0]
        x = self.cell3(self.cell2(self.cell1(self._stem(x))))
        return x if self.is_cut else self._join(x, self.cell4(x))

    def to_capsules(self, x: Tensor) -> Tensor:
        """Reorder a map ``[B, T*K, P, 1]`` into the capsules ``[B, T*P, K]`` that the class capsules take."""
        return x.flatten(2).unflatten(1, (self.num_types, -1)).transpose(2, 3).flatten(1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map capsules ``[B, T*K, P, 1]`` to class scores ``[B, J]``, or flatten them if `pre_logits`."""
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
        "conv1.weight": other_chans,
        "class_caps.weight": other_classes or other_size,
        "class_caps.bias": other_classes,
        "decoder.fc.weight": other_size,
        "decoder.fc.bias": other_size,
        "decoder.layers.8.weight": other_chans,
        "decoder.layers.8.bias": other_chans,
    }
    return fit_weights(state_dict, model, [key for key, differs in may_differ.items() if differs])


_cfg = partial(
    _builder.digits_cfg,
    input_size=(3, 64, 64),
    pool_size=(80, 1),
    first_conv="conv1",
    classifier="class_caps",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    paper_ids="arXiv:1904.09546",
    paper_name="DeepCaps: Going Deeper with Capsule Networks",
    notes=("published: CIFAR-10 92.74 %, SVHN 97.56 %, Fashion-MNIST 94.73 %, MNIST 99.72 %",),
)

default_cfgs = generate_default_cfgs(shipped_cfgs(("deepcaps",), _cfg))

_create_deepcaps = partial(_builder.build_model, DeepCaps, checkpoint_filter_fn)


@register_model
def deepcaps(pretrained: bool = False, **kwargs: Any) -> DeepCaps:
    """The network for 64x64 images of Rajasegaran et al. 2019: 13,359,424 parameters, as the authors' code has them.

    Its decoder has 67,571 more.
    """
    return _create_deepcaps("deepcaps", pretrained, **kwargs)
