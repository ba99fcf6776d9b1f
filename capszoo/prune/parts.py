"""The parts of a capsule network that can be removed: their names and numbers, and what to keep of them.

A family of models whose parts these are says how many it has by `prunable_parts()`, and names its layers as
:class:`capszoo.models.CapsNet` does.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from capszoo.errors import nearest
from capszoo.layers import DynamicRouting
from capszoo.models import CapsNet
from capszoo.registry import family_of, list_models

# In the order in which one call removes them.
PARTS = ("conv1", "types", "capsules", "decoder")
SCORES = ("magnitude", "taylor", "coupling", "look_ahead")
Keep = int | float | Sequence[int]


def count_parts(model: nn.Module) -> dict[str, int | tuple[int, int]]:
    """How many of each part a network has; 'decoder' is a pair, and missing where there is none.

    Raises:
        ValueError: If the model cannot be pruned.
    """
    check_model(model)
    return model.prunable_parts()


def target_counts(
    model: nn.Module, keep: Mapping[str, Keep], score: str | None = None
) -> dict[str, int | tuple[int, int]]:
    """Check what :func:`prune` is asked to keep, and say how many that is of each part.

    Capsules are counted after the types: at most those that the best-filled types would leave, and a fraction is of
    those.

    Args:
        model: The network.
        keep: As for :func:`prune`.
        score: The score that is to rank the parts, to be checked too.

    Raises:
        ValueError: As :func:`prune`.
    """
    counts = count_parts(model)
    if not keep:
        raise ValueError(f"keep is empty: say what to keep of {', '.join(counts)}, such as {{'types': 8}}")
    targets: dict[str, int | tuple[int, int]] = {}
    for part, wanted in keep.items():
        check_part(model, part)
        if score is not None:
            check_score(model, part, score, ranks=not is_indices(wanted) or part == "decoder")
    for part in sorted(keep, key=PARTS.index):
        total = counts[part]
        if part == "decoder":
            pair = zip(as_pair(keep[part]), total, strict=True)
            targets[part] = tuple(count_of(part, wanted, number) for wanted, number in pair)
            continue
        if part == "capsules" and "types" in targets:
            per_type = types_of_capsules(model).bincount(minlength=counts["types"])
            if is_indices(keep["types"]):
                total = int(per_type[torch.tensor(choose("types", keep["types"], counts["types"], None))].sum())
            else:
                total = int(per_type.sort(descending=True).values[: targets["types"]].sum())
        targets[part] = count_of(part, keep[part], total)
    return targets


def prunable_families() -> list[str]:
    """Names of the model classes of which a part can be pruned."""
    families = (family_of(name) for name in list_models())
    return sorted({family.__name__ for family in families if hasattr(family, "prunable_parts")})


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be pruned, with a ValueError that names it."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if not hasattr(model, "prunable_parts") or not cfg:
        name = cfg.get("architecture") or type(model).__name__
        raise ValueError(
            f"{name} cannot be pruned: give a {' or '.join(prunable_families())} that capszoo.create_model made, not "
            "wrapped"
        )
    if not model.prunable_parts():
        raise ValueError("this model has num_classes=0 and no class capsules: call reset_classifier(num_classes)")


def check_part(model: CapsNet, part: str) -> None:
    """Refuse a part that is unknown or that the model does not have."""
    if part not in PARTS:
        raise ValueError(_unknown("part", part, PARTS))
    if part == "conv1" and part not in (counts := model.prunable_parts()):
        raise ValueError(
            f"the filters of backbone {model.backbone.name!r} and of conv1 after it cannot be pruned: prune "
            f"{', '.join(counts)}"
        )
    if part == "decoder" and model.decoder is None:
        raise ValueError("this model has no decoder to prune: make it with decoder=True, or leave 'decoder' out")


def check_score(model: CapsNet, part: str, score: str, ranks: bool = True) -> None:
    """Refuse a score that is unknown or that does not go with the part; `ranks` where it is to rank parts."""
    if score not in SCORES:
        raise ValueError(_unknown("score", score, SCORES))
    if score != "coupling" or not ranks:
        return
    if part not in ("types", "capsules"):
        raise ValueError(f"score 'coupling' ranks types and capsules, not {part!r}: use another score")
    if not isinstance(model.class_caps.routing, DynamicRouting):
        name = type(model.class_caps.routing).__name__
        raise ValueError(f"score 'coupling' knows the couplings of dynamic routing, not of {name}: use 'taylor'")


def _unknown(kind: str, name: Any, known: Sequence[str]) -> str:
    near = nearest(name, known)
    hint = f", did you mean {near!r}?" if near else "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}"


def is_indices(wanted: Keep) -> bool:
    """Whether what is to be kept is named by indices, not by a number or a fraction."""
    return isinstance(wanted, (Sequence, Tensor)) or hasattr(wanted, "__array__") and getattr(wanted, "ndim", 0) > 0


def as_pair(wanted: Any) -> tuple[Keep, Keep]:
    """What to keep of the two hidden layers of the decoder."""
    if isinstance(wanted, float):
        return wanted, wanted
    if not is_indices(wanted) or isinstance(wanted, str) or len(wanted) != 2:
        raise ValueError(f"decoder={wanted!r} is not possible: give a pair, one per hidden layer, or one fraction")
    return tuple(wanted)


def count_of(part: str, wanted: Keep, total: int) -> int:
    """How many of `total` parts are wanted."""
    if is_indices(wanted):
        return len(choose(part, wanted, total, None))
    if isinstance(wanted, float):
        if not 0 < wanted <= 1:
            raise ValueError(f"{part}={wanted!r} is not possible: a fraction must be above 0 and at most 1")
        return max(1, math.floor(wanted * total + 0.5))
    try:
        if isinstance(wanted, bool):
            raise TypeError
        number = operator.index(wanted)
    except TypeError:
        raise ValueError(f"{part}={wanted!r} is not possible: give a number, a fraction or indices") from None
    if not 1 <= number <= total:
        raise ValueError(f"{part}={number} is not possible: there are {total}, keep 1 to {total}")
    return number


def choose(part: str, wanted: Keep, total: int, ranking: Tensor | None) -> list[int]:
    """Indices to keep, in ascending order."""
    if not is_indices(wanted):
        best = ranking.argsort(descending=True, stable=True)[: count_of(part, wanted, total)]
        return best.sort().values.tolist()
    try:
        indices = sorted(operator.index(i) for i in wanted)
    except TypeError:
        raise ValueError(f"{part}={wanted!r} is not possible: indices are whole numbers") from None
    if not indices:
        raise ValueError(f"{part}={wanted!r} is not possible: keep at least one")
    for one, other in zip(indices, indices[1:], strict=False):
        if one == other:
            raise ValueError(f"{part} holds index {one} twice: give distinct indices")
    for i in (indices[0], indices[-1]):
        if not 0 <= i < total:
            raise ValueError(f"{part} holds index {i}: there are {total}, give indices from 0 to {total - 1}")
    return indices


def count_types(model: CapsNet) -> int:
    """T, the primary capsule types that are there."""
    return model.primary_caps.num_types


def capsule_places(model: CapsNet) -> Tensor:
    """Index of each capsule that is there among all that the convolution makes, ``[n]`` on the CPU."""
    return torch.tensor(model.keep_capsules) if model.keep_capsules else torch.arange(model.num_primary)


def types_of_capsules(model: CapsNet) -> Tensor:
    """Type of each capsule that is there, ``[n]`` on the CPU."""
    return capsule_places(model) // (model.num_primary // count_types(model))
