"""Watching a run: losses and weights that are not finite, and networks that can learn no more."""

import logging
import math
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from capszoo.contract import HasPrimaryCapsules
from capszoo.data import Loader
from capszoo.errors import TrainingError
from capszoo.layers import capsule_lengths
from capszoo.modes import evaluation_mode
from capszoo.precision import autocast

from .distributed import STEPS_BETWEEN_QUESTIONS

if TYPE_CHECKING:
    from .trainer import Trainer

_logger = logging.getLogger(__name__)

# On a GPU, where it means waiting, losses are looked at after so many steps; on a CPU after each.
_STEPS_BETWEEN_CHECKS = 50
# So many steps left out one after the other are not bad luck.
_MOST_SKIPPED_IN_A_ROW = 100
# A gradient that overflows at such a scale is not one that float16 will ever hold.
_LEAST_SCALE = 2.0**-10
# Steps of the first epoch after which the trainer looks whether the network is saturated; it does after each epoch too.
_LOOKS_AT_SATURATION = (50, 200, 1000)
_SATURATION_IMAGES = 64

__all__ = ["Saturation", "Watch", "measure_saturation"]

# Squash has a slope of 0.002 at this length.
_LONG = 0.99


class Saturation(NamedTuple):
    """What :func:`measure_saturation` finds.

    Attributes:
        saturated: Share of the primary capsules longer than 0.99, over all images; None for models without any.
        spread: Standard deviation over the images of the score that differs most between them.
        least: The lowest score of all classes and images.
    """

    saturated: float | None
    spread: float
    least: float = 0.0

    @property
    def is_stuck(self) -> bool:
        """Whether hardly any gradient is left, and nothing to tell images by."""
        return self.spread < 1e-4 or (self.saturated is not None and self.saturated > 0.9 and self.spread < 0.02)


@torch.no_grad()
def measure_saturation(model: Any, images: Tensor) -> Saturation:
    """Look at the primary capsules and the scores of some images.

    Args:
        model: A model of this zoo; left in the mode it was in.
        images: ``[B, C, H, W]``, normalised as the model takes them, two or more.
    """
    with evaluation_mode(model):
        features = model.forward_features(images)
        scores = model.forward_head(features).float()
    saturated = None
    if isinstance(model, HasPrimaryCapsules):
        saturated = float((capsule_lengths(model.primary_capsules(features).float()) > _LONG).float().mean())
    return Saturation(saturated, float(scores.std(dim=0).max()), float(scores.min()))


class Watch:
    """Stops a trainer whose numbers are not finite, and warns of one whose network is saturated.

    Args:
        trainer: The trainer, made but for this.
    """

    def __init__(self, trainer: "Trainer"):
        self.trainer = trainer
        device = trainer.device
        looks = STEPS_BETWEEN_QUESTIONS if trainer.ranks.count > 1 else 1
        # Losses of the steps since the last look at them.
        self._recent = torch.zeros(looks if device.type == "cpu" else _STEPS_BETWEEN_CHECKS, device=device)
        self._unseen = 0
        self._said_saturated = False

    def see(self) -> None:
        """Take note of the loss of the step just taken."""
        self._recent[self._unseen] = self.trainer.loss
        self._unseen += 1

    def look(self) -> None:
        """Look at what is due after the step just taken.

        Raises:
            TrainingError: As `check_losses`.
        """
        position = self.trainer.position
        if self._unseen == len(self._recent):
            self.check_losses()
        if position.epoch == 0 and position.step in _LOOKS_AT_SATURATION:
            self.check_saturation()

    def check_skipped(self) -> None:
        """Stop where one step after the other was left out."""
        trainer = self.trainer
        if trainer.step.skipped_in_a_row >= _MOST_SKIPPED_IN_A_ROW:
            self._raise_nonfinite(
                f"{trainer.step.skipped_in_a_row} steps one after the other were not finite, the last",
                trainer.position.step,
                float(trainer.loss),
            )

    def check_losses(self) -> None:
        """Stop at the first loss that is not finite, by any rank's count.

        Raises:
            TrainingError: If there is one, or float16's scaler has no scale left.
        """
        trainer, unseen = self.trainer, self._unseen
        self._unseen = 0
        scaler = trainer.step.scaler
        if scaler.is_enabled() and (scale := scaler.get_scale()) < _LEAST_SCALE:
            raise TrainingError(
                f"float16 cannot hold the gradients: their scale has fallen to {scale:g} in epoch "
                f"{trainer.position.epoch + 1}, and no step was taken on the way: compute with --amp bf16 or none"
            )
        if trainer.step.skips or not unseen:
            return
        finite = self._recent[:unseen].isfinite()
        ago = torch.where(finite, 0, torch.arange(unseen, 0, -1, device=trainer.device)).max()
        steps_ago = int(trainer.ranks.max_(ago))
        if steps_ago:
            loss = float(self._recent[unseen - steps_ago])
            what = "the loss of another process is not finite" if math.isfinite(loss) else f"the loss is {loss}"
            self._raise_nonfinite(what, trainer.position.step - steps_ago, loss)

    def check_finite(self) -> None:
        """Before anything is saved: a finite loss can have a gradient that is not.

        Raises:
            TrainingError: If a loss or a weight is not finite.
        """
        self.check_losses()
        trainer = self.trainer
        if not all(torch.stack([p.isfinite().all() for p in trainer.task.model.parameters()]).tolist()):
            step = max(0, trainer.position.step - 1)
            self._raise_nonfinite("the weights are not finite", step, float(trainer.loss))

    def check_saturation(self) -> None:
        """Say once if the network has come to where hardly any gradient is left, and what to do."""
        trainer = self.trainer
        if self._said_saturated or not trainer.ranks.is_first or trainer.policy.name == "lr_finder":
            return
        images, _ = next(iter(trainer.make_loader(trainer.train_split, _SATURATION_IMAGES)))
        if len(images) < 2:
            return
        with autocast(trainer.device, trainer.amp):
            found = measure_saturation(trainer.task.model, images)
        if found.is_stuck:
            self._said_saturated = True
            share = (
                "" if found.saturated is None else f"{found.saturated:.0%} of the primary capsules are saturated and "
            )
            if found.least > _LONG and not getattr(trainer.task.model, "returns_logits", False):
                share = "all class capsules are saturated and "
            _logger.warning(
                f"at step {trainer.position.step} of epoch {trainer.position.epoch + 1} {share}all images score alike "
                f"(to {found.spread:.1g}): this run will hardly learn any more; start again with a tenth of --lr, or "
                f"with --warmup-steps 1000, and leave --mean, --std and --start as they are by default"
            )

    def _raise_nonfinite(self, what: str, step: int, loss: float) -> NoReturn:
        """Say where training broke off, and keep for the user which images it was computed from."""
        trainer = self.trainer
        epoch, lr = trainer.position.epoch, trainer.lr
        batch_size = trainer.policy.batch_size(epoch)
        loader: Loader = trainer.make_loader(
            trainer.train_split, batch_size, shuffle=True, seed=trainer.seed, epoch=epoch
        )
        images = loader.order()[step * batch_size : (step + 1) * batch_size].tolist()
        kept = "there is no checkpoint yet"
        if trainer.saved is not None:
            kept = f"the last good checkpoint is that of epoch {trainer.saved[0] + 1}, step {trainer.saved[1]}"
        where = ""
        if trainer.run_folder is not None:
            facts = {"epoch": epoch + 1, "step": step + 1, "lr": lr, "loss": str(loss), "images": images}
            where = f", see {trainer.run_folder.write_nonfinite(facts)}"
        named = ", ".join(map(str, images[:4])) + (", ..." if len(images) > 4 else "")
        remedies = ["lower --lr", "compute in float32 with --amp none"]
        remedies += [] if trainer.step.skips else ["leave such steps out with --nonfinite skip"]
        raise TrainingError(
            f"{what} at step {step + 1} of epoch {epoch + 1} (lr={lr:g}, training images {named}{where}); {kept}: "
            f"{', '.join(remedies[:-1])}, or {remedies[-1]}"
        )
