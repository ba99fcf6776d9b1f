"""What to measure, and in which order."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from . import steps
from .measuring import PRECISIONS, Group
from .variants import routes_dynamically, routing_shape

SUBJECTS = ("routing", "training", "inference", "layer", "large", "epoch")
OF_ROUTING = ("routing", "routing in other ways")
LARGE = (4608, 4608, 8, 100, 16)  # I, T, K, J, D


@dataclass(frozen=True)
class Scope:
    """What to measure.

    Attributes:
        subjects: Some of :data:`SUBJECTS`.
        models: Names of models.
        batch_sizes: Batch sizes.
        compile_batch_sizes: Those at which torch.compile joins.
        device: Where to measure.
        amp: Precision of whole models; None is float32.
    """

    subjects: Sequence[str]
    models: list[str]
    batch_sizes: list[int]
    compile_batch_sizes: list[int]
    device: torch.device
    amp: torch.dtype | None

    @property
    def on_gpu(self) -> bool:
        """Whether this is a GPU."""
        return self.device.type == "cuda"

    @property
    def headline(self) -> int:
        """The batch size that matters most: 128, as in the paper, if it is asked for."""
        return 128 if 128 in self.batch_sizes else max(self.batch_sizes)


def plan(scope: Scope, precisions: list[str]) -> list[Group]:
    """All groups, the most important first: a time limit cuts at the end.

    Args:
        scope: What to measure.
        precisions: Those in which routing alone is timed on a GPU.
    """
    size = scope.headline
    others = [other for other in scope.batch_sizes if other != size]
    first = [name for name in scope.models if name in ("capsnet", "capsnet_ws")] or scope.models[:2]
    rest = [name for name in scope.models if name not in first]
    names = first + rest
    order = [
        *(("routing", name, size) for name in names),
        *(("training", name, size) for name in first),
        ("large", "large", 128),
        *((subject, name, size) for subject in ("layer", "epoch") for name in names),
        *(("inference", name, size) for name in first),
        *(("routing in other ways", name, size) for name in names),
        *((subject, name, size) for name in rest for subject in ("training", "inference")),
        *((subject, name, other) for name in names for other in others for subject in SUBJECTS[:3]),
    ]
    wanted = {*scope.subjects, *(["routing in other ways"] if "routing" in scope.subjects and scope.on_gpu else [])}
    return [group for place in order if place[0] in wanted for group in make_groups(*place, scope, precisions)]


def make_groups(subject: str, name: str, batch_size: int, scope: Scope, precisions: list[str]) -> Iterator[Group]:
    """The groups at one place of the order."""
    graph, device, amp = scope.on_gpu, scope.device, scope.amp
    mode = "float32" if amp is None else str(amp).removeprefix("torch.")
    direct = [] if scope.on_gpu else ["direct"]  # convolutions on a GPU are cuDNN's
    compiled = ["compiled"] if batch_size in scope.compile_batch_sizes else []

    def group(
        subject: str, precision: str, make: Callable | None, variants: list[str], layer: str = "", graph: bool = graph
    ) -> Group:
        facts = {"subject": subject, "model": name, "layer": layer, "batch_size": batch_size, "precision": precision}
        return Group(facts, {v: partial(make, v, batch_size, device) for v in variants}, graph)

    if subject in ("training", "inference") and not routes_dynamically(name):
        step = steps.training_step if subject == "training" else steps.inference_step
        kind = "training step" if subject == "training" else subject
        variants = [variant for variant in steps.own_variants(name) if variant != "direct" or direct]
        yield group(kind, mode, partial(step, name, amp), variants)
    elif subject in OF_ROUTING and not routes_dynamically(name):
        return
    elif subject == "routing":
        make = partial(steps.routing_step, routing_shape(name), torch.float32)
        yield group(subject, "float32", make, ["fused", "plain", *compiled])
    elif subject == "large":
        # Without graphs: each holds memory of its own, and what plain and compiled take does not fit side by side.
        make = partial(steps.routing_step, LARGE, torch.float32)
        yield group("routing", "float32", make, ["fused", "plain", *compiled], graph=False)
    elif subject == "routing in other ways":
        for precision in precisions:
            make = partial(steps.routing_step, routing_shape(name), PRECISIONS[precision])
            yield group("routing", precision, make, ["fused", "plain"], graph=precision != "float32")
    elif subject == "training":
        make = partial(steps.training_step, name, amp)
        yield group("training step", mode, make, ["fused", *direct, "plain", *compiled, "none", "reference"])
    elif subject == "inference":
        yield group(subject, mode, partial(steps.inference_step, name, amp), ["fused", *direct, "plain", "none"])
    elif subject == "layer":
        for layer in steps.layer_names(name):
            variants = ["fused"]
            if layer == "routing" and routes_dynamically(name):
                variants.append("plain")
            elif steps.has_convolution(name, layer):
                variants += direct
            yield group(subject, mode, partial(steps.layer_step, name, layer, amp), variants, layer)
    else:
        yield group(subject, mode, None, [])  # what measure_epoch is for
