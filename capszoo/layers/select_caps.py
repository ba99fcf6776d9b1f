"""The choice of capsule types and single capsules that a pruned network keeps."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import _assert
from torch import Tensor, nn

__all__ = [
    "apply_to_tensors",
    "index_capsules",
    "init_non_persistent_buffers",
    "place_capsule_index",
    "resolve_keep_capsules",
    "resolve_keep_types",
    "select_capsules",
    "select_types",
]

_logger = logging.getLogger(__name__)


def resolve_keep_types(keep_types: int | Sequence[int] | None, num_types: int) -> tuple[int, ...]:
    """Check `keep_types` and return its indices, none where only a number is given.

    Raises:
        ValueError: If the number or an index is out of range, or an index is there twice.
    """
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


def resolve_keep_capsules(
    keep_capsules: Sequence[int] | None, num_capsules: int, img_size: tuple[int, int]
) -> tuple[int, ...]:
    """Check `keep_capsules` and return its indices in ascending order, none where all capsules are kept.

    Raises:
        ValueError: If an index is out of range or there twice, or there is none.
    """
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


def index_capsules(kept: Sequence[int], num_capsules: int, num_types: int, shared: bool) -> list[int]:
    """Places to read for the kept capsules; the one after the last capsule is a capsule of zeros.

    Own matrices take the kept capsules as they come. A shared matrix serves equally many capsules of each type:
    types that keep fewer are filled up with a capsule of zeros, whose vote is zero and adds nothing.

    Args:
        kept: Indices of the kept capsules, type-major, ascending.
        num_capsules: Number of capsules before the choice.
        num_types: Number of their types.
        shared: Whether the capsules of a type share a matrix.
    """
    if not kept or not shared:
        return list(kept)
    types: list[list[int]] = [[] for _ in range(num_types)]
    for i in kept:
        types[i // (num_capsules // num_types)].append(i)
    longest = max(map(len, types))
    return [i for of_type in types for i in of_type + [num_capsules] * (longest - len(of_type))]


def select_capsules(x: Tensor, index: Tensor, num_capsules: int, fill: bool) -> Tensor:
    """Take the capsules at the places of an index.

    Args:
        x: Capsules ``[B, I, K]``.
        index: Places ``[n]``, see :func:`index_capsules`.
        num_capsules: I that the index is for.
        fill: Whether it names the capsule of zeros.

    Returns:
        Capsules ``[B, n, K]``.
    """
    # Maps of other sizes would have capsules at these places too, and give wrong numbers silently.
    _assert(
        x.shape[1] == num_capsules,
        f"a choice of {num_capsules} capsules got {x.shape[1]}: make the model for this img_size",
    )
    if fill:
        x = F.pad(x, (0, 0, 0, 1))
    return x.index_select(1, index)


@torch.jit.ignore
def init_non_persistent_buffers(self: Any) -> None:
    """Make the index of the capsules that remain, which no checkpoint holds, where the weights are."""
    is_cut = isinstance(self.primary_caps, nn.Identity)  # by `prune_intermediate_layers`
    types = 0 if is_cut else self.primary_caps.num_types
    index = [] if is_cut else index_capsules(self.keep_capsules, self.num_primary, types, self.share_weights)
    self.fill_capsules = self.num_primary in index  # the place after the last capsule
    tensor = torch.tensor(index, device=self.conv1.weight.device) if index else None
    self.register_buffer("capsule_index", tensor, persistent=False)


def apply_to_tensors(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, after which the index holds its values, whatever moved it: `to_empty` gives memory alone."""
    index = self.capsule_index
    nn.Module._apply(self, fn, recurse)
    if self.capsule_index is not index and not self.capsule_index.is_meta:
        self.init_non_persistent_buffers()
    return self


def place_capsule_index(model: nn.Module, incompatible_keys: object) -> None:
    """Follow the weights: `load_state_dict(assign=True)` takes those of another device, and no index."""
    if model.capsule_index is not None and model.capsule_index.device != model.conv1.weight.device:
        model.init_non_persistent_buffers()


def select_types(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
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
