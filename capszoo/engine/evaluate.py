"""What a network is worth on labelled images."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capszoo.contract import decoder_of
from capszoo.data import Loader, Split
from capszoo.errors import Stopped, TrainingError
from capszoo.losses import margin_loss, reconstruction_loss
from capszoo.modes import evaluation_mode
from capszoo.precision import autocast
from capszoo.pretrained import image_statistics

from .criteria import without_weights
from .distributed import ALONE, Ranks
from .metrics import average_precision, right_answers, right_sets, shows
from .task import CapsuleTask, Normalization, reconstruct_parts


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measures.

    Attributes:
        top1: Fraction of images whose longest class capsule is the right one. Where labels are weights of the classes,
            the exact-match accuracy: the fraction of images of which just the classes present are predicted, see
            `capszoo.engine.metrics`.
        loss: Mean over images of the criterion that was trained with, but without its weights of the classes; of the
            margin loss if none is known.
        reconstruction_error: Mean over images of the summed squared pixel differences, drawn from the longest
            capsule; None without decoder. Of images with parts, the sum over the parts, each drawn from the capsule of
            its own class.
        confusion: Counts ``[J, J]``, true class by predicted class; None where labels are weights of the classes.
        class_confusion: There, counts ``[J, 2, 2]``: for each class, absent and present by predicted as absent and as
            present; else None.
        average_precision: There, that of each class ``[J]``, NaN where no image shows it; else None.
        mean_average_precision: There, the mean over the classes that are shown; else, or if none is, None.
        exact_top_k: There, the fraction of images whose k longest class capsules are those of the k classes present,
            see `capszoo.engine.metrics.right_sets`; else None.
    """

    top1: float
    loss: float
    reconstruction_error: float | None
    confusion: Tensor | None
    class_confusion: Tensor | None = None
    average_precision: Tensor | None = None
    mean_average_precision: float | None = None
    exact_top_k: float | None = None

    @property
    def recall(self) -> Tensor | None:
        """Fraction of each class's images that are found ``[J]``, NaN where there are none.

        None where labels are weights of the classes.
        """
        if self.confusion is None:
            return None
        return self.confusion.diagonal().double() / self.confusion.sum(dim=1)

    @property
    def balanced_accuracy(self) -> float | None:
        """Mean recall of the classes that have images; None where labels are weights of the classes."""
        return None if self.recall is None else float(self.recall.nanmean())

    @property
    def margin_loss(self) -> float:
        """The former name of `loss`."""
        return self.loss


def until_stopped(batches: Iterable[Any], should_stop: Callable[[], bool]) -> Iterator[Any]:
    """Pass batches on; raise :class:`capszoo.errors.Stopped` once `should_stop`, asked after each, says so."""
    for batch in batches:
        yield batch
        if should_stop():
            raise Stopped


@torch.inference_mode()
def evaluate(
    task: nn.Module, loader: Iterable[tuple[Tensor, ...]], amp: torch.dtype | None = None, ranks: Ranks = ALONE
) -> Evaluation:
    """Measure a model on labelled images.

    Args:
        task: A task, whose criterion is measured, on the average of its weights where it keeps one; or a model alone,
            measured by the margin loss. Left in the mode it was in.
        loader: Batches of images ``[B, C, H, W]``, normalised as the model's `pretrained_cfg` says, and labels, class
            indices ``[B]`` or weights of the classes ``[B, J]``, on the model's device; and the images' parts, if any,
            as :class:`capszoo.data.Loader` gives them.
        amp: Type for autocast.
        ranks: Processes that each have a part of the images; all get the measures of the whole.

    Raises:
        TrainingError: If there are no images.
    """
    is_task = isinstance(task, CapsuleTask)
    model, criterion = (task.get_eval_model(ema=task.has_ema()), task.criterion) if is_task else (task, margin_loss)
    criterion = without_weights(criterion)
    if isinstance(loader, Loader):
        check_statistics(model, loader.split)
    device = next(model.parameters()).device
    modules = [module for module in (model, criterion) if isinstance(module, nn.Module)]
    decoder, normalization = decoder_of(model), Normalization(model, device)
    num_classes = model.num_classes
    # Of the images: losses, reconstruction errors, right answers, number.
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
    multi_label, rows = False, [torch.empty(0, 2 * num_classes, device=device)]
    with evaluation_mode(*modules):
        for images, labels, *parts in loader:
            multi_label = labels.ndim == 2
            if not len(labels):
                continue  # a last batch with fewer images than ranks
            with autocast(device, amp):
                if decoder is None:
                    lengths, drawn = model(images), None
                else:
                    capsules, lengths = model.forward_capsules(images)
                    if parts:
                        drawn = reconstruct_parts(decoder, capsules, labels, parts[0].shape[1])
                    else:
                        drawn = decoder(capsules, lengths.argmax(dim=1))
            sums[0] += criterion(lengths, labels) * len(labels)
            if drawn is not None:
                pixels = parts[0] if parts else normalization.undo(images)
                sums[1] += reconstruction_loss(drawn, pixels) * len(labels)
            sums[2] += right_answers(lengths, labels).sum()
            sums[3] += len(labels)
            if multi_label:
                rows.append(torch.cat([lengths, labels], dim=1))  # an average precision is that of all images
            else:
                place = labels.long() * num_classes + lengths.argmax(dim=1)
                confusion.index_add_(0, place, torch.ones_like(place))  # `bincount` would wait for a GPU
    ranks.sum_(sums)
    *totals, count = sums.tolist()
    if count == 0:
        raise TrainingError("there are no images to evaluate on")
    loss, reconstruction, top1 = (total / count for total in totals)
    by_class: dict[str, Any] = {}
    if multi_label:
        # One type, whatever that of the scores: a rank without images has none.
        scores, labels = ranks.gather(torch.cat(rows).double()).cpu().split(num_classes, dim=1)
        by_class = _measure_classes(scores, labels)
    else:
        ranks.sum_(confusion)
    return Evaluation(
        top1=top1,
        loss=loss,
        reconstruction_error=None if decoder is None else reconstruction,
        confusion=None if multi_label else confusion.view(num_classes, num_classes).cpu(),
        **by_class,
    )


def _measure_classes(scores: Tensor, labels: Tensor) -> dict[str, Any]:
    """The measures of an :class:`Evaluation` that are for weights of the classes, of scores and labels ``[N, J]``."""
    truth, predicted = shows(labels), shows(scores)
    counts = [[(t & p).sum(dim=0) for p in (~predicted, predicted)] for t in (~truth, truth)]
    precision = average_precision(scores, labels)
    return {
        "class_confusion": torch.stack([torch.stack(row, dim=1) for row in counts], dim=1),
        "average_precision": precision,
        "mean_average_precision": None if precision.isnan().all() else float(precision.nanmean()),
        "exact_top_k": float(right_sets(scores, labels).double().mean()),
    }


def check_statistics(model: nn.Module, split: Split) -> None:
    """Images that are normalised otherwise than a model takes them would give wrong numbers, in silence."""
    channels = split.image_shape[0]
    for name, wanted, given in zip(("mean", "std"), image_statistics(model), (split.mean, split.std), strict=True):
        # One number stands for all channels.
        expected, found = (values * channels if len(values) == 1 else values for values in (wanted, given))
        if expected != found:
            raise TrainingError(
                f"the images are normalised by {name}={given}, the model takes those of {name}={wanted}: call "
                f"data.normalize(mean, std) with those of the model's pretrained_cfg"
            )
