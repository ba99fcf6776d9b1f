"""What a family of models owes everything else, beside timm's own contract: trainer, checkpoints, recipes.

The entrypoint of a family names its class as its return annotation, and the class has what :class:`CapsuleModel` lists.
The other Protocols are optional: whoever needs one asks whether a model has its method.
:func:`capszoo.testing.check_model` checks all of it.
"""

from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from .arguments import SearchedArgument

__all__ = [
    "CapsuleModel",
    "Explorable",
    "HasCapsules",
    "HasCouplings",
    "HasCriterion",
    "HasPrimaryCapsules",
    "HasRoutedCapsules",
    "HasUniformTwin",
    "Prunable",
    "Resizable",
    "auxiliary_modules",
    "decoder_of",
    "has_couplings",
    "keeps_contract",
    "to_probabilities",
]

_METHODS = ("arguments", "auxiliary_modules", "capsule_layers", "forward_features", "forward_head")


@runtime_checkable
class CapsuleModel(Protocol):
    """A model of the zoo, an `nn.Module`.

    Attributes:
        num_classes: J, the number of classes; 0 for features alone.
        in_chans: C, the channels of its images.
        img_size: (H, W), their size in pixels.
        pretrained_cfg: timm's configuration: `architecture`, `first_conv`, `classifier`, `input_size`, `mean`, `std`.
    """

    num_classes: int
    in_chans: int
    img_size: tuple[int, int]
    pretrained_cfg: dict[str, Any]

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to class scores ``[B, J]``; the largest is the class.

        The margin loss and images that show several classes take them for numbers from 0 to 1, of which those from 0.5
        on say that a class is there. A family whose scores are logits or log-probabilities says so by a class attribute
        `returns_logits = True`, and has a `default_criterion`.
        """

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images ``[B, C, H, W]`` to a map of features ``[B, num_features, H', W']``."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features to class scores ``[B, J]``, or flatten them if `pre_logits`."""

    def arguments(self) -> dict[str, Any]:
        """Keywords, as JSON can hold them, with which `create_model` makes a network of these shapes again."""

    def auxiliary_modules(self) -> dict[str, nn.Module | None]:
        """Modules that only training uses, by their attribute's name; None where the model was made without.

        Each is asked for by a keyword of its name. Weights of one that a model has not are left out when it is loaded.
        One named 'decoder' takes (class capsules ``[B, J, ...]``, classes ``[B]``) and gives images ``[B, C, H, W]``
        with values in [0, 1].
        """

    def capsule_layers(self) -> dict[str, nn.Module]:
        """Layers that route, by name; none for a model without capsules, which needs no `forward_capsules`."""


@runtime_checkable
class HasCapsules(Protocol):
    """A model with class capsules: one whose `capsule_layers()` are any."""

    def forward_capsules(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images ``[B, C, H, W]`` to class capsules ``[B, J, ...]`` and the scores ``[B, J]`` of `forward`."""


@runtime_checkable
class HasCouplings(Protocol):
    """A model that can be asked what its routing decides."""

    def couplings(self, x: Tensor, iteration: int | None = -1) -> Tensor:
        """Shares ``[B, I, J]`` of each capsule below the classes in each class, of an iteration of routing from 0, or
        ``[R, B, I, J]`` of all."""


@runtime_checkable
class HasRoutedCapsules(Protocol):
    """A model that says of which capsules its couplings are: I in number, in the order of the couplings.

    A model with couplings that has `to_capsules(features)` alone, which gives vectors ``[B, I, K]``, is taken to route
    all capsules of its map of features, ordered by type and then by place, each as much as it is long.
    """

    def routed_capsules(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map features to the capsules that the class capsules take, ``[B, I, ...]``, and their lengths or activations.

        The latter say from 0 to 1 how much a capsule is there, ``[B, I]``; None in a family where nothing says it.
        """

    def capsule_places(self) -> tuple[list[tuple[int, int]], Tensor]:
        """Height and width of the maps that these capsules are from, and the place of each in them, int64 ``[I]``.

        Places are counted row by row, from one map on to the next. No maps where a capsule is of the whole image.
        """


@runtime_checkable
class HasUniformTwin(Protocol):
    """A family whose routing can be left out, to measure what it brings.

    Attributes:
        uniform_arguments: Keywords that give it uniform couplings; an attribute of the class.
    """

    uniform_arguments: ClassVar[dict[str, Any]]


@runtime_checkable
class HasPrimaryCapsules(Protocol):
    """A model whose primary capsules are squashed: the trainer warns where all of them have a length of nearly 1."""

    def primary_capsules(self, features: Tensor) -> Tensor:
        """Reorder features ``[B, num_features, H', W']`` into capsules ``[B, I, K]``."""


@runtime_checkable
class HasCriterion(Protocol):
    """A model that does not train on the margin loss."""

    def default_criterion(self) -> nn.Module:
        """The loss of (scores ``[B, J]``, target), a scalar."""


@runtime_checkable
class Prunable(Protocol):
    """A model of which parts can be removed."""

    def prunable_parts(self) -> dict[str, int | tuple[int, int]]:
        """How many of each part there are, a pair for parts of two layers; none where there are no class capsules."""


@runtime_checkable
class Resizable(Protocol):
    """A model whose weights must change with the size of the images, though their shapes do not."""

    def resize_weights(self, state_dict: dict[str, Tensor], img_size: tuple[int, int]) -> dict[str, Tensor]:
        """Weights that were trained on images of `img_size`, height and width in pixels, as they are at the model's."""


@runtime_checkable
class Explorable(Protocol):
    """A model whose shape a search may vary."""

    def search_space(self) -> list[SearchedArgument]:
        """Keywords of the model and the values that each may take, the unreduced one first."""


def keeps_contract(cls: object) -> bool:
    """Whether a class has the methods of :class:`CapsuleModel`."""
    return isinstance(cls, type) and issubclass(cls, nn.Module) and all(hasattr(cls, name) for name in _METHODS)


def to_probabilities(model: Any, scores: Tensor) -> Tensor:
    """Scores ``[B, J]`` of a model as numbers from 0 to 1: the softmax of logits, else the scores themselves."""
    return scores.softmax(dim=1) if getattr(model, "returns_logits", False) else scores


def auxiliary_modules(model: Any) -> dict[str, nn.Module | None]:
    """Modules of a model that only training uses, by name; of a model without the method, the attribute `decoder`."""
    if hasattr(model, "auxiliary_modules"):
        return model.auxiliary_modules()
    return {"decoder": getattr(model, "decoder", None)}


def has_couplings(model: Any) -> bool:
    """Whether a model has couplings to look at: its family has, and it was made with capsule layers and classes."""
    return isinstance(model, HasCouplings) and bool(getattr(model, "capsule_layers", dict)())


def decoder_of(model: Any) -> nn.Module | None:
    """The reconstruction decoder of a model, None if it has none."""
    return auxiliary_modules(model).get("decoder")
