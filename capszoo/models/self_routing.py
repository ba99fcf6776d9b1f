"""Self-routing capsules on ResNet-20: each capsule chooses its parents from its own pose

Paper: `Self-Routing Capsule Networks` - https://papers.nips.cc/paper/8982-self-routing-capsule-networks

The convolutions of ResNet-20 (He et al. 2016, section 4.2, with shortcuts that have no parameters), primary capsules
with poses and activations, and capsule layers without iterations: r_ij is a softmax over the parents of a linear
function of the pose of capsule i. Scores are the logarithms of the classes' activations, which sum to 1.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from capszoo.arguments import SearchedArgument
from capszoo.layers.checkpointing import checkpoint_once
from capszoo.layers.self_routing import COUPLINGS, ConvSelfRouting, PoseCaps, SelfRouting, drop_capsules
from capszoo.losses import CrossEntropyLoss
from capszoo.models import _builder, _couplings, _stem
from capszoo.pretrained import fit_weights, shipped_cfgs

__all__ = ["SelfRoutingNet"]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: every `stride`-th position, with channels of zeros on both sides."""

    def __init__(self, in_chans: int, out_chans: int, stride: int = 1, **dd: Any):
        super().__init__()
        self.stride = stride
        before = (out_chans - in_chans) // 2
        self.pad = (before, out_chans - in_chans - before)
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, stride, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(out_chans, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(out_chans, **dd)
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride > 1 or max(self.pad) > 0:
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad[0], self.pad[1]))
        x = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(x + shortcut)


class PooledClassifier(nn.Linear):
    """Average pooling and a linear layer, from a map ``[B, C, H, W]`` to log-probabilities ``[B, J]``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.mean(dim=(2, 3)), self.weight, self.bias).log_softmax(dim=1)


class SelfRoutingNet(nn.Module):
    """Capsule network of Hahn, Pyeon and Kim 2019 on the convolutions of ResNet-20, in its form for CIFAR-10."""

    returns_logits = True

    uniform_arguments = {"couplings": "uniform"}
    _heads = ("class_caps",)
    _pooled = "capsules"
    _ends_in_activation = False

    if TYPE_CHECKING:  # not at run time, where torch.jit.script would compile by these annotations
        # nn.Identity once `reset_classifier(0)` or `prune_intermediate_layers` took the layer away.
        class_caps: nn.Module
        # From timm's builder and from `create_model`.
        pretrained_cfg: dict[str, Any]
        default_cfg: dict[str, Any]
        creation_args: dict[str, Any]

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 32,
        global_pool: str = "flat",
        conv_dims: tuple[int, int, int] = (16, 32, 64),
        num_blocks: int = 3,
        num_types: int = 32,
        caps_dim: int = 16,
        num_layers: int = 1,
        couplings: str = "self",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Build the network.

        Args:
            num_classes: J; 0 for none, and features as output.
            in_chans: Channels of the images.
            img_size: Height and width of the images, in pixels; the class layer is as large as the map there.
            global_pool: 'flat' flattens the capsules where there are no classes, '' keeps their map.
            conv_dims: Filters of the three stages of residual blocks.
            num_blocks: Residual blocks in each stage, each of two convolutions.
            num_types: A, the types of capsules.
            caps_dim: K, the dimension of their poses.
            num_layers: Capsule layers after the primary capsules, the class layer included; 0 for the ResNet itself,
                a linear classifier after average pooling, to measure what capsules bring. Of the layers before the
                class layer, with kernels of 3x3, the first has a stride of 2.
            couplings: 'self', or 'uniform' for the ablation without, see `capszoo.layers.self_routing_scores`.
            drop_rate: Rate at which capsules are left out before the class layer; of features, with `num_layers` 0.
            device: Device of the parameters.
            dtype: Type of the parameters.

        Raises:
            ValueError: If an argument is out of its range.
        """
        given = dict(locals())
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        _builder.check_pool(global_pool, self._pooled)
        if len(conv_dims) != 3 or not 1 <= conv_dims[0] <= conv_dims[1] <= conv_dims[2]:
            raise ValueError(f"conv_dims={conv_dims} is not possible: give three rising numbers of filters")
        height, width = to_2tuple(img_size)
        _builder.check_sizes(in_chans=in_chans, num_blocks=num_blocks, num_types=num_types, caps_dim=caps_dim)
        _builder.check_sizes(img_size=min(height, width))
        _builder.check_drop_rate(drop_rate)
        if num_layers < 0:
            raise ValueError(f"num_layers={num_layers} is not possible: it must be 0 or more")
        self.in_chans, self.img_size = in_chans, (height, width)
        self.global_pool, self.drop_rate = global_pool, drop_rate
        self.num_layers, self.num_types = num_layers, num_types
        self.grad_checkpointing = False
        self._arguments = _builder.given_arguments(given, img_size=[height, width], conv_dims=list(conv_dims))

        self.conv1 = nn.Conv2d(in_chans, conv_dims[0], 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(conv_dims[0], **dd)
        self.act1 = nn.ReLU(inplace=True)
        chans, grid, self.feature_info = conv_dims[0], (height, width), []
        for number, dim in enumerate(conv_dims, start=1):
            stride = 1 if number == 1 else 2
            blocks = [ResidualBlock(chans, dim, stride, **dd)]
            blocks += [ResidualBlock(dim, dim, **dd) for _ in range(num_blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            chans, grid = dim, _stem.strided_grid(grid, stride)
            self.feature_info += [dict(num_chs=dim, reduction=height // grid[0], module=f"layer{number}")]
        if num_layers > 0:
            self.primary_caps: nn.Module = PoseCaps(chans, num_types, caps_dim, **dd)
            chans = num_types * (1 + caps_dim)
            self.feature_info += [dict(num_chs=chans, reduction=height // grid[0], module="primary_caps")]
        else:
            self.primary_caps = nn.Identity()
        inner = []
        for number in range(num_layers - 1):
            stride = 2 if number == 0 else 1
            inner += [ConvSelfRouting(num_types, caps_dim, num_types, caps_dim, 3, stride, couplings, **dd)]
            grid = _stem.strided_grid(grid, stride)
            self.feature_info += [dict(num_chs=chans, reduction=height // grid[0], module=f"conv_caps.{number}")]
        self.conv_caps = nn.Sequential(*inner)
        _builder.check_capsules(num_types * grid[0] * grid[1], height, width, "set num_types")
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight)
        self.grid_size = self.routed_size = grid
        self.num_features = chans
        self.head_hidden_size = chans * grid[0] * grid[1]
        self._class_caps_args = dict(num_types=num_types, caps_dim=caps_dim, grid_size=grid, couplings=couplings)
        self._build_head(num_classes, **dd)

    @torch.jit.ignore
    def _build_head(self, num_classes: int, **dd: Any) -> None:
        """Make the class layer for `num_classes`."""
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes} is not possible: it must be 0 or more")
        self.num_classes = num_classes
        if num_classes == 0:
            self.class_caps = nn.Identity()
        elif self.num_layers == 0:
            self.class_caps = PooledClassifier(self.num_features, num_classes, **dd)
        else:
            self.class_caps = SelfRouting(num_classes=num_classes, **self._class_caps_args, **dd)

    arguments = _builder.arguments
    auxiliary_modules = _builder.auxiliary_modules
    reset_classifier = _builder.reset_classifier
    forward_intermediates = _builder.forward_intermediates
    prune_intermediate_layers = _builder.prune_intermediate_layers
    set_grad_checkpointing = _builder.set_grad_checkpointing
    get_classifier = _builder.get_classifier
    couplings = _couplings.couplings
    couplings_of = _couplings.couplings_of_map
    routed_capsules = _couplings.routed_with_activations
    capsule_places = _couplings.places_by_place

    @torch.jit.ignore
    def capsule_layers(self) -> dict[str, nn.Module]:
        """Layers that route; none of a network without capsules."""
        if self.num_classes == 0 or self.num_layers == 0:
            return {}
        inner = {f"conv_caps.{number}": layer for number, layer in enumerate(self.conv_caps)}
        return {**inner, "class_caps": self.class_caps}

    @torch.jit.ignore
    def default_criterion(self) -> nn.Module:
        """Cross-entropy, which of log-probabilities is their negative log-likelihood."""
        return CrossEntropyLoss()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves out."""
        return {"class_caps.bias", *(f"conv_caps.{number}.bias" for number in range(len(self.conv_caps)))}

    @torch.jit.ignore
    def search_space(self) -> list[SearchedArgument]:
        """What a search may vary: the couplings, and how many capsules there are."""
        num_types, caps_dim = self._arguments["num_types"], self._arguments["caps_dim"]
        return [
            SearchedArgument("couplings", list(COUPLINGS)),
            SearchedArgument("num_types", [max(1, num_types // part) for part in (1, 2, 4)]),
            SearchedArgument("caps_dim", [max(1, caps_dim // part) for part in (1, 2)]),
        ]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters for optimisation; what no pattern names (the class layer) is timm's last group."""
        layer = r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"
        blocks = [(layer, None), (r"^primary_caps", (98,))]
        blocks += [(rf"^conv_caps\.{number}\.", (99 + number,)) for number in range(len(self.conv_caps))]
        return dict(stem=r"^(?:conv1|bn1)", blocks=blocks)

    @torch.jit.ignore
    def _levels(self) -> list[Callable[[Tensor], Tensor]]:
        """Levels of `feature_info` that `prune_intermediate_layers` has left, each a function of the one before."""
        modules = [self.layer1, self.layer2, self.layer3, self.primary_caps, *self.conv_caps]
        run = checkpoint_once if self.grad_checkpointing else nn.Module.__call__
        rest = [partial(run, module) for module in modules[1:] if not isinstance(module, nn.Identity)]
        return [lambda x: run(self.layer1, self._stem(x)), *rest]

    @torch.jit.ignore
    def _cut(self, last: int) -> None:
        """Remove the levels after the `last`."""
        for name in ("layer2", "layer3", "primary_caps")[last:]:
            setattr(self, name, nn.Identity())
        self.conv_caps = self.conv_caps[: max(0, last - 3)]

    def _stem(self, x: Tensor) -> Tensor:
        return self.act1(self.bn1(self.conv1(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to capsules ``[B, A*(1 + K), H', W']``, see `capszoo.layers.split_capsules`."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for level in self._levels():
                x = level(x)
            return x
        return self.conv_caps(self.primary_caps(self.layer3(self.layer2(self.layer1(self._stem(x))))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features to log-probabilities ``[B, J]``, or flatten them if `pre_logits`."""
        if self.drop_rate > 0.0:
            if self.num_layers > 0:
                x = drop_capsules(x, self.num_types, self.drop_rate, self.training)
            else:
                x = F.dropout(x, p=self.drop_rate, training=self.training)
        if pre_logits or self.num_classes == 0:
            return x.flatten(1) if self.global_pool == "flat" else x
        return self.class_caps(x)

    @torch.jit.ignore
    def forward_capsules(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images to class capsules, which are their activations alone, and scores, the logarithms of these.

        Args:
            x: Images ``[B, C, H, W]``.

        Returns:
            Class capsules ``[B, J, 1]`` and class scores ``[B, J]``.

        Raises:
            RuntimeError: If the model has no class capsules.
        """
        if not self.capsule_layers():
            raise RuntimeError("this model has no class capsules: make it with num_classes and num_layers of 1 or more")
        scores = self(x)
        return scores.exp().unsqueeze(-1), scores

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to log-probabilities of the classes ``[B, J]``."""
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
        "class_caps.bias": other_classes or other_size,
    }
    return fit_weights(state_dict, model, [key for key, differs in may_differ.items() if differs])


_cfg = partial(
    _builder.digits_cfg,
    input_size=(3, 32, 32),
    pool_size=(8, 8),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    first_conv="conv1",
    classifier="class_caps",
    paper_name="Self-Routing Capsule Networks",
    notes=("published on CIFAR-10: 92.1 %",),
)

default_cfgs = generate_default_cfgs(shipped_cfgs(("capsnet_resnet_sr",), _cfg))

_create_self_routing = partial(_builder.build_model, SelfRoutingNet, checkpoint_filter_fn)


@register_model
def capsnet_resnet_sr(pretrained: bool = False, **kwargs: Any) -> SelfRoutingNet:
    """The network for CIFAR-10 of Hahn, Pyeon and Kim 2019, with one capsule layer: 931,664 parameters."""
    return _create_self_routing("capsnet_resnet_sr", pretrained, **kwargs)
