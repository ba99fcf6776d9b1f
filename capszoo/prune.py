"""Rank the parts of a capsule network and remove the least ones physically: a smaller network comes out.

Parts:
* conv1: filters of the first convolution, with their slices of the primary capsules' filters.
* types: primary capsule types, with their filters, their vote matrices and their share of the routing. This is what
  shrinks the large convolution of the primary capsules.
* capsules: single primary capsules, a type at a position. Their share of the routing goes, and with a vote matrix per
  capsule the matrix too. A type without capsules left goes as a whole.
* decoder: units of the two hidden layers of the reconstruction decoder, with their connections.

Removing a part changes nothing but that its values are zero: the smaller network computes what the given one computes
with the activations of the removed parts held at zero. A capsule of zeros votes zero for each class, which adds nothing
to the weighted sums of the routing.

Papers:
* Taylor score: `Pruning Convolutional Neural Networks for Resource Efficient Inference` -
  https://arxiv.org/abs/1611.06440, `Importance Estimation for Neural Network Pruning` -
  https://arxiv.org/abs/1906.10771
* Look-ahead score: `Lookahead: A Far-Sighted Alternative of Magnitude-based Pruning` -
  https://arxiv.org/abs/2002.04809
* Single capsules: `PrunedCaps` - https://arxiv.org/abs/2512.06003; filters: `FastCaps` -
  https://arxiv.org/abs/2509.03103
"""

import difflib
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from .costs import model_info
from .engine.task import Normalization, class_to_reconstruct
from .layers import ClassCaps, DynamicRouting, ScaledConv2d, capsule_lengths, squash
from .losses import margin_loss, present_classes, reconstruction_loss
from .models import CapsNet
from .registry import create_model

__all__ = ["PARTS", "SCORES", "Cost", "PruneReport", "cost", "count_parts", "prune", "scores", "target_counts"]

# In the order in which one call removes them.
PARTS = ("conv1", "types", "capsules", "decoder")
SCORES = ("magnitude", "taylor", "coupling", "look_ahead")

# Sabour, Frosst and Hinton 2017, section 4.1.
_RECONSTRUCTION_WEIGHT = 0.0005
# The votes of so many images are held at once: [16, 1152, 10, 16] floats are 12 MB.
_COUPLING_BATCH = 16
# What a configuration says of the weights it came with, untrue of pruned ones.
_SOURCE_KEYS = {
    "custom_load",
    "description",
    "file",
    "hf_hub_filename",
    "hf_hub_id",
    "notes",
    "origin_url",
    "source",
    "state_dict",
    "tag",
    "url",
}

Keep = int | float | Sequence[int]


@dataclass(frozen=True)
class Cost:
    """What a network costs to store and to run on one image.

    All but `parameters_with_decoder` are those of the class scores, to which the decoder contributes nothing.

    Attributes:
        parameters: Weights and biases without the decoder's, frozen ones included.
        parameters_with_decoder: All weights and biases.
        macs: Multiply-accumulate operations of one forward pass of one image.
        routing_macs: Those of the votes and the routing iterations among them.
        float32_bytes: Bytes of `parameters` at 4 bytes each.
        float16_bytes: Bytes of `parameters` at 2 bytes each.
    """

    parameters: int
    parameters_with_decoder: int
    macs: int
    routing_macs: int
    float32_bytes: int
    float16_bytes: int


@dataclass(frozen=True)
class PruneReport:
    """What a call of :func:`prune` did; as text it is a table.

    Attributes:
        before: Cost of the given network.
        after: Cost of the smaller one.
        kept: Indices that were kept of the parts that were pruned, as they count in the given network. 'decoder' has
            two tuples, one per hidden layer; 'types' is there too where pruned capsules left types empty.
    """

    before: Cost
    after: Cost
    kept: dict[str, tuple]

    def __str__(self) -> str:
        lines = [f"{'':<24}{'before':>16}{'after':>16}{'left':>9}"]
        for field in fields(Cost):
            before, after = getattr(self.before, field.name), getattr(self.after, field.name)
            lines.append(f"{field.name.replace('_', ' '):<24}{before:>16,}{after:>16,}{after / before:>9.1%}")
        for part, kept in self.kept.items():
            number = " and ".join(str(len(layer)) for layer in kept) if part == "decoder" else str(len(kept))
            lines.append(f"{part + ' kept':<24}{number:>32}")
        return "\n".join(lines)


def prune(
    model: nn.Module,
    keep: Mapping[str, Keep],
    score: str = "taylor",
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
) -> tuple[CapsNet, PruneReport]:
    """Make a smaller network of the best parts of a trained one.

    Several parts are pruned in the order conv1, types, capsules, decoder, each ranked in the network that is left by
    then. Parts of equal score keep the lower index.

    Args:
        model: A network of this zoo with class capsules, made by `create_model`; never changed.
        keep: Part to what is kept of it: a number (int), a fraction (float in (0, 1], rounded, at least one), or
            indices (a sequence). 'decoder' takes a pair of these, one per hidden layer, or one fraction for both.
            Numbers and indices count what is there when the part's turn comes, in the order of :func:`scores`.
        score: 'magnitude', 'taylor', 'coupling' or 'look_ahead', see :func:`scores`. Not used where `keep` holds
            indices.
        data: Batches of images ``[B, C, H, W]`` and labels ``[B]`` or ``[B, J]`` on any device, for 'taylor' and
            'coupling'; some hundred images give a stable ranking.

    Returns:
        The smaller network and what was done. The network has the class, device, types, memory format, modes and
        frozen parameters of the given one, and is a leaf: no hooks and no gradients come along. Its `creation_args`
        are the keywords with which `create_model` makes a network of these shapes again.

    Raises:
        ValueError: If the model has no class capsules, a part or score is unknown, a number is out of range, or the
            score needs data and there is none.

    Example:

        ```python
        smaller, report = prune(model, {"types": 8, "conv1": 0.5}, data=loader)
        print(report)
        ```
    """
    target_counts(model, keep, score)
    if isinstance(data, Iterator):
        data = list(data)  # read once for each part
    before, source = cost(model), model
    kept: dict[str, tuple] = {}
    types, capsules = list(range(_num_types(model))), list(range(count_parts(model)["capsules"]))
    for part in sorted(keep, key=PARTS.index):
        total = count_parts(model)[part]
        wanted = keep[part]
        if part == "decoder":
            pair = _pair(wanted)
            ranked = None if all(_is_indices(item) for item in pair) else scores(model, part, score, data)
            layers = (None, None) if ranked is None else ranked.split(total)
            chosen = [_choose(part, *items) for items in zip(pair, total, layers, strict=True)]
            model = _keep_decoder(model, *chosen)
            kept[part] = tuple(map(tuple, chosen))
            continue
        indices = _choose(part, wanted, total, None if _is_indices(wanted) else scores(model, part, score, data))
        if part == "conv1":
            model = _keep_conv1(model, indices)
            kept[part] = tuple(indices)
            continue
        # Of capsules and types, each takes some of the other along.
        type_of = _type_of_capsules(model).tolist()
        if part == "types":
            left = indices
            indices = [i for i, t in enumerate(type_of) if t in set(left)]
        else:
            left = sorted({type_of[i] for i in indices})
        model = _keep_types_and_capsules(model, left, indices, single=part == "capsules")
        emptied = part == "capsules" and len(left) < len(types)
        types, capsules = [types[t] for t in left], [capsules[i] for i in indices]
        if part == "types" or emptied:
            kept["types"] = tuple(types)
        if part == "capsules":
            kept[part] = tuple(capsules)
    if model is source:
        model = _rebuild(model, {})
    _take_over(model, source)
    return model, PruneReport(before, cost(model), kept)


def scores(
    model: nn.Module, part: str, score: str = "taylor", data: Iterable[tuple[Tensor, Tensor]] | None = None
) -> Tensor:
    """Rank the parts of a network: the higher the score, the more the network needs the part.

    'magnitude' is the Euclidean norm of what computes the part. conv1: the filter and its bias. types: the filters,
    biases and vote matrices. capsules: the filters and biases of the type, and the vote matrix; so with shared vote
    matrices all capsules of a type score the same. decoder: the unit's incoming weights and bias.

    'taylor' is the mean over images of ``|sum of activation * dL/d activation|``, the sum over all values of the part
    (Molchanov et al. 2017, equation 7): to first order, what the loss L of the image changes by when the part is held
    at zero. L is the margin loss, plus 0.0005 times the reconstruction loss where there is a decoder. Activations are
    the maps after ReLU, the squashed primary capsules, and the decoder's units after ReLU: units that never fire score
    exactly 0.

    'coupling' (capsules and types) is the mean over images of ``c_iy |x_i|``: the coupling coefficient c of capsule i
    to the true class y in the last routing iteration, times the length of the capsule's pose x. The length is the
    probability that what the capsule stands for is in the image: where it is absent, it does not matter where its vote
    goes. A type's score is the sum over its capsules. Of several classes present, c is the sum over them.

    'look_ahead' (Park, Lee, Mo and Shin 2020, equation 4) weighs each weight by the norms of the weights it is
    connected to, before and behind, and takes the Euclidean norm over the part: ``|w| * |W_before| * |W_behind|``.
    conv1: the filter, nothing before, the primary capsules' filters' slices behind. types: the filters, between the
    filter of conv1 that each slice reads and the vote matrices' rows. capsules: the vote matrix, the filters before,
    nothing behind; with shared matrices the same for all capsules of a type. decoder: the incoming weights, between the
    unit's inputs and the outgoing weights; before the first layer stand the vote matrices.

    Args:
        model: A network of this zoo with class capsules; left as it is.
        part: 'conv1', 'types', 'capsules' or 'decoder'.
        score: 'magnitude', 'taylor', 'coupling' or 'look_ahead'.
        data: Batches of images ``[B, C, H, W]`` and labels, class indices ``[B]`` or weights of the classes ``[B, J]``,
            for 'taylor' and 'coupling'.

    Returns:
        Scores ``[n]`` of the n parts that are there, float64 on the CPU. Capsules are in type-major order; the decoder
        has first the units of its first hidden layer, then those of the second.

    Raises:
        ValueError: If the model has no such part, the score does not go with it or needs data and there is none.
    """
    _check_model(model)
    _check_part(model, part)
    _check_score(model, part, score)
    if score == "magnitude":
        return _magnitude(model, part).sqrt()
    if score == "look_ahead":
        return _look_ahead(model, part).sqrt()
    if data is None:
        raise ValueError(f"score {score!r} needs data: pass batches of (images, labels), or use score='magnitude'")
    total, count = torch.zeros(()), 0
    for images, labels in data:
        images, labels = _check_batch(model, images, labels)
        per_image = (_taylor if score == "taylor" else _coupling)(model, part, images, labels)
        total = total + per_image.cpu().double().sum(dim=0)
        count += len(labels)
    if count == 0:
        raise ValueError("data holds no images: pass a loader that can be read again, or a list of batches")
    if not total.isfinite().all():
        raise ValueError(f"score {score!r} of {part} is not finite: check the weights and the images")
    return total / count


def count_parts(model: nn.Module) -> dict[str, int | tuple[int, int]]:
    """How many of each part a network has; 'decoder' is a pair, and missing where there is none.

    Raises:
        ValueError: If the model is no network of this zoo, or has no class capsules.
    """
    _check_model(model)
    counts: dict[str, int | tuple[int, int]] = {
        "conv1": model.conv1.out_channels,
        "types": _num_types(model),
        "capsules": len(model.keep_capsules) or model.num_primary,
    }
    if model.decoder is not None:
        counts["decoder"] = (model.decoder.fc1.out_features, model.decoder.fc2.out_features)
    return counts


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
        _check_part(model, part)
        if score is not None:
            _check_score(model, part, score, ranks=not _is_indices(wanted) or part == "decoder")
    for part in sorted(keep, key=PARTS.index):
        total = counts[part]
        if part == "decoder":
            pair = zip(_pair(keep[part]), total, strict=True)
            targets[part] = tuple(_number(part, wanted, number) for wanted, number in pair)
            continue
        if part == "capsules" and "types" in targets:
            per_type = _type_of_capsules(model).bincount(minlength=counts["types"])
            if _is_indices(keep["types"]):
                total = int(per_type[torch.tensor(_choose("types", keep["types"], counts["types"], None))].sum())
            else:
                total = int(per_type.sort(descending=True).values[: targets["types"]].sum())
        targets[part] = _number(part, keep[part], total)
    return targets


def cost(model: nn.Module) -> Cost:
    """Count what a network costs.

    Raises:
        ValueError: If the model is no network of this zoo, or has no class capsules.
    """
    _check_model(model)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    parameters = sum(size for name, size in sizes.items() if not name.startswith("decoder."))
    num_weights, caps_dim, num_classes, class_dim = model.class_caps.weight.shape
    num_iters = model.class_caps.routing.num_iters
    # Votes, agreements after all iterations but the last, weighted sums in each.
    per_capsule = num_classes * class_dim * (caps_dim + num_iters - 1 + num_iters)
    return Cost(
        parameters=parameters,
        parameters_with_decoder=sum(sizes.values()),
        macs=model_info(model.pretrained_cfg["architecture"], **model.arguments()).macs,
        routing_macs=model.class_caps.num_capsules * per_capsule,
        float32_bytes=4 * parameters,
        float16_bytes=2 * parameters,
    )


# Arguments


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, CapsNet) or not getattr(model, "pretrained_cfg", None):
        raise ValueError(
            f"{type(model).__name__} cannot be pruned: give a CapsNet that capszoo.create_model made, not wrapped"
        )
    if not isinstance(model.class_caps, ClassCaps):
        raise ValueError("this model has num_classes=0 and no class capsules: call reset_classifier(num_classes)")


def _check_part(model: CapsNet, part: str) -> None:
    if part not in PARTS:
        raise ValueError(_unknown("part", part, PARTS))
    if part == "decoder" and model.decoder is None:
        raise ValueError("this model has no decoder to prune: make it with decoder=True, or leave 'decoder' out")


def _check_score(model: CapsNet, part: str, score: str, ranks: bool = True) -> None:
    if score not in SCORES:
        raise ValueError(_unknown("score", score, SCORES))
    if score != "coupling" or not ranks:
        return
    if part not in ("types", "capsules"):
        raise ValueError(f"score 'coupling' ranks types and capsules, not {part!r}: use another score")
    if not isinstance(model.class_caps.routing, DynamicRouting):
        name = type(model.class_caps.routing).__name__
        raise ValueError(f"score 'coupling' knows the couplings of dynamic routing, not of {name}: use 'taylor'")


def _check_batch(model: CapsNet, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    expected = (model.in_chans, *model.img_size)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise ValueError(f"data has images of shape {tuple(images.shape)}: the model takes (B, {str(expected)[1:]}")
    weights = labels.is_floating_point() or labels.dtype == torch.bool
    if labels.shape != (images.shape[:1] if not weights else (len(images), model.num_classes)):
        raise ValueError(
            f"data has labels of shape {tuple(labels.shape)}, {labels.dtype}: give class indices [B], or weights of "
            f"the classes [B, {model.num_classes}], floating"
        )
    if not weights and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < model.num_classes:
        raise ValueError(f"data has labels outside 0 to {model.num_classes - 1}: the model has these classes")
    like = model.conv1.weight
    return images.to(like.device, like.dtype), labels.to(like.device)


def _unknown(kind: str, name: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(known)}"


def _is_indices(wanted: Keep) -> bool:
    return isinstance(wanted, (Sequence, Tensor)) or hasattr(wanted, "__array__") and getattr(wanted, "ndim", 0) > 0


def _pair(wanted: Any) -> tuple[Keep, Keep]:
    if isinstance(wanted, float):
        return wanted, wanted
    if not _is_indices(wanted) or isinstance(wanted, str) or len(wanted) != 2:
        raise ValueError(f"decoder={wanted!r} is not possible: give a pair, one per hidden layer, or one fraction")
    return tuple(wanted)


def _number(part: str, wanted: Keep, total: int) -> int:
    """How many of `total` parts are wanted."""
    if _is_indices(wanted):
        return len(_choose(part, wanted, total, None))
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


def _choose(part: str, wanted: Keep, total: int, ranking: Tensor | None) -> list[int]:
    """Indices to keep, in ascending order."""
    if not _is_indices(wanted):
        best = ranking.argsort(descending=True, stable=True)[: _number(part, wanted, total)]
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


# Removal


def _keep_conv1(model: CapsNet, filters: list[int]) -> CapsNet:
    index = torch.tensor(filters, device=model.conv1.weight.device)
    tensors = {
        "conv1.weight": model.conv1.weight[index],
        "conv1.bias": model.conv1.bias[index],
        "primary_caps.conv.weight": model.primary_caps.conv.weight[:, index],
    }
    return _rebuild(model, tensors, conv_dim=len(filters))


def _keep_types_and_capsules(model: CapsNet, types: list[int], capsules: list[int], single: bool) -> CapsNet:
    """Keep `types`, and of the capsules that are there `capsules`, all of these types; `single` for not all of them."""
    device = model.class_caps.weight.device
    conv, num_types = model.primary_caps.conv, _num_types(model)
    kept = torch.tensor(types, device=device)
    rows = kept if model.share_weights else torch.tensor(capsules, device=device)
    tensors = {
        # Filters are type-major.
        "primary_caps.conv.weight": conv.weight.unflatten(0, (num_types, -1))[kept].flatten(0, 1),
        "primary_caps.conv.bias": conv.bias.unflatten(0, (num_types, -1))[kept].flatten(0, 1),
        "class_caps.weight": model.class_caps.weight[rows],
    }
    changes: dict[str, Any] = {}
    if len(types) < num_types:
        before = model.arguments()["keep_types"] or list(range(num_types))
        # Where only a number of types is known, nobody knows which types of the full network they were.
        changes["keep_types"] = len(types) if isinstance(before, int) else [before[t] for t in types]
    if single or model.keep_capsules:
        per_type = model.num_primary // num_types
        new_type = {t: n for n, t in enumerate(types)}
        places = (_places(model)[torch.tensor(capsules)]).tolist()
        changes["keep_capsules"] = [new_type[i // per_type] * per_type + i % per_type for i in places]
    return _rebuild(model, tensors, **changes)


def _keep_decoder(model: CapsNet, first: list[int], second: list[int]) -> CapsNet:
    decoder = model.decoder
    one, two = (torch.tensor(units, device=decoder.fc1.weight.device) for units in (first, second))
    tensors = {
        "decoder.fc1.weight": decoder.fc1.weight[one],
        "decoder.fc1.bias": decoder.fc1.bias[one],
        "decoder.fc2.weight": decoder.fc2.weight[two][:, one],
        "decoder.fc2.bias": decoder.fc2.bias[two],
        "decoder.fc3.weight": decoder.fc3.weight[:, two],
    }
    return _rebuild(model, tensors, decoder_dims=[len(first), len(second)])


def _rebuild(model: CapsNet, tensors: dict[str, Tensor], **changes: Any) -> CapsNet:
    """Make the network again with changed arguments and tensors; all others are copied."""
    # On the meta device nothing is initialised, and the random state stays as it was.
    arguments = {**model.arguments(), **changes}
    smaller = create_model(model.pretrained_cfg["architecture"], device="meta", **arguments)
    smaller.pretrained_cfg = smaller.default_cfg = model.pretrained_cfg
    state = {key: tensors.get(key, value).detach().clone() for key, value in model.state_dict().items()}
    smaller.load_state_dict(state, assign=True)
    return smaller


def _take_over(model: CapsNet, source: CapsNet) -> None:
    """Give the pruned network what the given one had beside its weights."""
    cfg = {key: value for key, value in source.pretrained_cfg.items() if key not in _SOURCE_KEYS}
    cfg.update(
        num_classes=model.num_classes, input_size=(model.in_chans, *model.img_size), pool_size=tuple(model.grid_size)
    )
    model.pretrained_cfg = model.default_cfg = cfg
    model.creation_args = model.arguments()
    model.grad_checkpointing = source.grad_checkpointing
    conv = source.conv1.weight, source.primary_caps.conv.weight
    if all(weight.is_contiguous(memory_format=torch.channels_last) for weight in conv):
        if not all(weight.is_contiguous() for weight in conv):
            model.to(memory_format=torch.channels_last)
    for name, module in source.named_modules():
        model.get_submodule(name).training = module.training
    for name, parameter in source.named_parameters():
        model.get_parameter(name).requires_grad_(parameter.requires_grad)


# Places and sums


def _num_types(model: CapsNet) -> int:
    return model.primary_caps.num_types


def _places(model: CapsNet) -> Tensor:
    """Index of each capsule that is there among all that the convolution makes, ``[n]`` on the CPU."""
    return torch.tensor(model.keep_capsules) if model.keep_capsules else torch.arange(model.num_primary)


def _type_of_capsules(model: CapsNet) -> Tensor:
    """Type of each capsule that is there, ``[n]`` on the CPU."""
    return _places(model) // (model.num_primary // _num_types(model))


def _sum_by_type(model: CapsNet, values: Tensor) -> Tensor:
    """Sum values ``[..., n]`` of the capsules that are there to ``[..., T]``."""
    sums = values.new_zeros(*values.shape[:-1], _num_types(model))
    return sums.index_add(-1, _type_of_capsules(model).to(values.device), values)


def _squares(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double().square()


def _filter_weights(conv: ScaledConv2d) -> Tensor:
    """Squared weights of a convolution's filters, with its scale."""
    return _squares(conv.weight) * _squares(conv.scale)


def _filter_squares(model: CapsNet) -> Tensor:
    """Squared weights of the primary capsules' filters summed over the kernel, ``[T, K, conv_dim]``."""
    return _filter_weights(model.primary_caps.conv).sum(dim=(2, 3)).unflatten(0, (_num_types(model), -1))


def _vote_squares(model: CapsNet) -> Tensor:
    """Squared vote matrices of each capsule that is there, summed over the classes' values, ``[n, K]``."""
    votes = _squares(model.class_caps.weight).sum(dim=(2, 3))
    return votes[_type_of_capsules(model)] if model.share_weights else votes


def _magnitude(model: CapsNet, part: str) -> Tensor:
    """Squared scores."""
    if part == "conv1":
        return _filter_weights(model.conv1).sum(dim=(1, 2, 3)) + _squares(model.conv1.bias)
    if part == "decoder":
        layers = (model.decoder.fc1, model.decoder.fc2)
        return torch.cat([_squares(fc.weight).sum(dim=1) + _squares(fc.bias) for fc in layers])
    bias = _squares(model.primary_caps.conv.bias).unflatten(0, (_num_types(model), -1)).sum(dim=1)
    filters = _filter_squares(model).sum(dim=(1, 2)) + bias
    if part == "capsules":
        return filters[_type_of_capsules(model)] + _vote_squares(model).sum(dim=1)
    if model.share_weights:  # one matrix, however many capsules use it
        return filters + _squares(model.class_caps.weight).sum(dim=(1, 2, 3))
    return filters + _sum_by_type(model, _vote_squares(model).sum(dim=1))


def _look_ahead(model: CapsNet, part: str) -> Tensor:
    """Squared scores."""
    if part == "conv1":
        return _filter_weights(model.conv1).sum(dim=(1, 2, 3)) * _filter_squares(model).sum(dim=(0, 1))
    if part == "capsules":
        return (_vote_squares(model) * _filter_squares(model).sum(dim=2)[_type_of_capsules(model)]).sum(dim=1)
    if part == "types":
        before = _filter_weights(model.conv1).sum(dim=(1, 2, 3))
        if model.share_weights:
            behind = _squares(model.class_caps.weight).sum(dim=(2, 3))
        else:
            behind = _sum_by_type(model, _vote_squares(model).T).T
        return torch.einsum("tkc,c,tk->t", _filter_squares(model), before, behind)
    fc1, fc2, fc3 = (_squares(fc.weight) for fc in (model.decoder.fc1, model.decoder.fc2, model.decoder.fc3))
    votes = _squares(model.class_caps.weight).sum(dim=(0, 1))
    votes = votes.sum(dim=0) if model.decoder.small else votes.flatten()
    return torch.cat([(fc1 @ votes) * fc2.sum(dim=0), (fc2 @ fc1.sum(dim=1)) * fc3.sum(dim=0)])


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def _activations(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the outputs of modules, with gradients from the first one on, whatever is frozen before it."""
    outputs: list[Tensor] = []

    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        outputs.append(output if outputs else output.detach().requires_grad_())
        return outputs[-1]

    handles = [module.register_forward_hook(replace) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _taylor(model: CapsNet, part: str, images: Tensor, labels: Tensor) -> Tensor:
    """|sum of activation * gradient| of each image and part, ``[B, n]``."""
    watched = {
        "conv1": lambda: [model.act1],
        "types": lambda: [model.primary_caps],
        "capsules": lambda: [model.primary_caps],
        "decoder": lambda: [model.decoder.act1, model.decoder.act2],
    }[part]()
    with torch.enable_grad(), _activations(watched) as activations:
        # Not through `forward`: no dropout, and no checkpointing, which would call the modules again.
        features = model.primary_caps(model.act1(model.conv1(images)))
        capsules = model.class_caps(model.to_capsules(features))
        lengths = capsule_lengths(capsules)
        loss = margin_loss(lengths, labels)
        if model.decoder is not None:
            drawn = model.decoder(capsules, class_to_reconstruct(lengths, labels))
            pixels = Normalization(model, images.device).undo(images)
            loss = loss + _RECONSTRUCTION_WEIGHT * reconstruction_loss(drawn, pixels)
        # Losses are means over the batch; the gradients wanted are those of each image's own loss.
        gradients = torch.autograd.grad(loss * len(labels), activations)
    changes = [_at_least_float32(a.detach()) * g for a, g in zip(activations, gradients, strict=True)]
    if part == "decoder":
        return torch.cat(changes, dim=1).abs()
    if part == "conv1":
        return changes[0].sum(dim=(2, 3)).abs()
    of_capsules = model.primary_caps.to_capsules(changes[0]).sum(dim=2)[:, _places(model).to(images.device)]
    return (_sum_by_type(model, of_capsules) if part == "types" else of_capsules).abs()


@torch.no_grad()
def _coupling(model: CapsNet, part: str, images: Tensor, labels: Tensor) -> Tensor:
    """Coupling to the true class times pose length of each image and part, ``[B, n]``."""
    routing, places = model.class_caps.routing, _places(model).to(images.device)
    weight, bias = _at_least_float32(model.class_caps.weight), _at_least_float32(model.class_caps.bias)
    if model.share_weights:
        weight = weight[_type_of_capsules(model).to(weight.device)]
    found = []
    for some, target in zip(images.split(_COUPLING_BATCH), labels.split(_COUPLING_BATCH), strict=True):
        features = model.primary_caps(model.act1(model.conv1(some)))
        poses = model.primary_caps.to_capsules(features)[:, places].to(weight.dtype)
        votes = torch.einsum("bik,ikjd->bijd", poses, weight)
        logits = votes.new_zeros(votes.shape[:3])
        # Procedure 1 of Sabour, Frosst and Hinton 2017; the couplings of iteration R come of R - 1 agreements.
        for _ in range(routing.num_iters - 1):
            sums = torch.einsum("bij,bijd->bjd", logits.softmax(dim=2), votes) + bias
            logits = logits + torch.einsum("bijd,bjd->bij", votes, squash(sums, routing.approximate_squash))
        present = present_classes(target, logits[:, 0])
        to_target = torch.einsum("bij,bj->bi", logits.softmax(dim=2), present)
        found.append(to_target * capsule_lengths(poses))
    values = torch.cat(found)
    return _sum_by_type(model, values) if part == "types" else values
