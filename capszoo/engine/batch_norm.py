"""Networks with BatchNorm: where a step is not that of one whole batch, their statistics would be other ones."""

from torch import Tensor, nn

from capszoo.errors import TrainingError

from .distributed import Ranks

__all__ = ["batch_statistics", "check_batch_norm", "has_batch_norm"]


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a model computes with the statistics of its batches in training."""
    return bool(_layers(model))


def batch_statistics(model: nn.Module) -> list[Tensor]:
    """The buffers that a forward pass in training changes."""
    return [buffer for layer in _layers(model) for buffer in layer.buffers()]


def check_batch_norm(
    model: nn.Module, ranks: Ranks, micro_batch: int | None, batch_sizes: set[int], num_images: int, on_cpu: bool
) -> None:
    """Refuse ways of training under which a network with BatchNorm would take other steps than on whole batches.

    Args:
        model: The network.
        ranks: The processes that train together.
        micro_batch: Most images of one forward pass.
        batch_sizes: Those of the run, over all ranks.
        num_images: Training images, of which the last batch of an epoch has what is left.
        on_cpu: Whether they train on CPUs, where torch cannot synchronise the statistics.

    Raises:
        TrainingError: If there is such a layer, and batches are computed in parts that it would tell apart.
    """
    if not has_batch_norm(model):
        return
    if micro_batch is not None and micro_batch < max(batch_sizes):
        raise TrainingError(
            f"--micro-batch {micro_batch} would give BatchNorm the statistics of parts of a batch: leave it out, or "
            f"lower --batch-size"
        )
    if ranks.count > 1 and on_cpu:
        raise TrainingError(
            f"BatchNorm's statistics cannot be shared by {ranks.count} processes on CPUs: train in one process, or on "
            f"GPUs"
        )
    for batch_size in sorted(batch_sizes):
        if 0 < num_images % batch_size < ranks.count:
            raise TrainingError(
                f"the last batch of an epoch has {num_images % batch_size} of {batch_size} images, and BatchNorm needs "
                f"one for each of {ranks.count} processes: give another --batch-size, or start fewer processes"
            )
