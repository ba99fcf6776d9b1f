"""A smaller network of the best parts of a trained one."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields

from torch import Tensor, nn

from capszoo.models import CapsNet

from .costs import Cost, cost
from .parts import PARTS, Keep, as_pair, choose, count_parts, count_types, is_indices, target_counts, types_of_capsules
from .ranking import Criterion, scores
from .rebuild import keep_conv1, keep_decoder, keep_types_and_capsules, rebuild, take_over


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
    criterion: Criterion | None = None,
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
        criterion: For 'taylor', see :func:`scores`.

    Returns:
        The smaller network and what was done. The network has the class, device, types, memory format, modes and
        frozen parameters of the given one, and is a leaf: no hooks and no gradients come along. Its `creation_args`
        are the keywords with which `create_model` makes a network of these shapes again.

    Raises:
        ValueError: If the model cannot be pruned, a part or score is unknown, a number is out of range, or the
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
    types, capsules = list(range(count_types(model))), list(range(count_parts(model)["capsules"]))
    for part in sorted(keep, key=PARTS.index):
        total = count_parts(model)[part]
        wanted = keep[part]
        if part == "decoder":
            pair = as_pair(wanted)
            ranked = None if all(is_indices(item) for item in pair) else scores(model, part, score, data, criterion)
            layers = (None, None) if ranked is None else ranked.split(total)
            chosen = [choose(part, *items) for items in zip(pair, total, layers, strict=True)]
            model = keep_decoder(model, *chosen)
            kept[part] = tuple(map(tuple, chosen))
            continue
        indices = choose(
            part, wanted, total, None if is_indices(wanted) else scores(model, part, score, data, criterion)
        )
        if part == "conv1":
            model = keep_conv1(model, indices)
            kept[part] = tuple(indices)
            continue
        # Of capsules and types, each takes some of the other along.
        type_of = types_of_capsules(model).tolist()
        if part == "types":
            left = indices
            indices = [i for i, t in enumerate(type_of) if t in set(left)]
        else:
            left = sorted({type_of[i] for i in indices})
        model = keep_types_and_capsules(model, left, indices, single=part == "capsules")
        emptied = part == "capsules" and len(left) < len(types)
        types, capsules = [types[t] for t in left], [capsules[i] for i in indices]
        if part == "types" or emptied:
            kept["types"] = tuple(types)
        if part == "capsules":
            kept[part] = tuple(capsules)
    if model is source:
        model = rebuild(model, {})
    take_over(model, source)
    return model, PruneReport(before, cost(model), kept)
