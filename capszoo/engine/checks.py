"""Whether a policy goes with the images and the processes of a run."""

from typing import Any

from capszoo.errors import TrainingError

from .distributed import Ranks


def check_policy(policy: Any, num_images: int) -> None:
    """Refuse a policy made for another number of images: it would break off, or end before its rate has come down.

    Raises:
        TrainingError: If it is.
    """
    for epoch in range(policy.epochs):
        size, steps = policy.batch_size(epoch), policy.steps(epoch)
        if steps != -(-num_images // size):
            raise TrainingError(
                f"the policy has {steps} steps of {size} images in epoch {epoch + 1}, and there are {num_images} "
                f"training images: create it with num_images={num_images}"
            )


def check_shares(policy: Any, ranks: Ranks, first_epoch: int) -> None:
    """Refuse batches below the number of ranks, which would leave some of them without work, waiting.

    Raises:
        TrainingError: If there are any from an epoch on.
    """
    for epoch in range(first_epoch, policy.epochs):
        if (size := policy.batch_size(epoch)) < ranks.count:
            raise TrainingError(
                f"batches of {size} in epoch {epoch + 1} cannot be shared by {ranks.count} processes: give "
                f"--batch-size or --warm-batch {ranks.count} or more, or start fewer processes"
            )
