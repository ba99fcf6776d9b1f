"""Capsule networks in Lightning: a module that trains any model of the zoo by its own loss and by capszoo's policies.

```python
import lightning
from capszoo.lightning import CapsuleModule

module = CapsuleModule("capsnet_tiny", {"decoder": True}, policy="one_cycle", lr=1e-3)
lightning.Trainer(max_epochs=5).fit(module, train_loader, val_loader)   # batches of (images, labels)
module.save("digits.safetensors", class_names=list("0123456789"))       # for capszoo.load_model and capszoo predict
```

Precision, devices, gradient clipping and accumulation are the Trainer's. The learning rate is the policy's at each
optimizer step. Policies that change the batch size are refused, since Lightning's loaders keep theirs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .contract import keeps_contract
from .engine.metrics import right_answers
from .engine.task import CapsuleTask
from .errors import TrainingError, UsageError
from .policies import Policy, create_policy
from .registry import create_model, model_header, save_model

try:
    from lightning.pytorch import LightningModule
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'capszoo.lightning needs Lightning: pip install lightning, or "capszoo[lightning]"', name=error.name
    ) from None

__all__ = ["CapsuleModule"]


class CapsuleModule(LightningModule):
    """A capsule network with its losses, optimizer and learning rate, for Lightning's Trainer.

    Batches are (images, labels), or (images, labels, parts), see :class:`capszoo.engine.CapsuleTask`. Images are pixels
    in [0, 1]: the module normalises them by the `mean` and `std` of the model's `pretrained_cfg`, which are 0 and 1 in
    a fresh model of the zoo, so that `capszoo.predict` of what it saves gives the same answers.
    Logged are `loss`, `margin_loss`, `reconstruction_loss` and `top1`, each after `train_`, `val_` or `test_`.

    A checkpoint of the Trainer holds all arguments but a criterion: `CapsuleModule.load_from_checkpoint(path)` needs no
    others.

    Args:
        model: Name of a model of the zoo, or a model that `capszoo.create_model` made.
        model_args: Keywords of `create_model`, where `model` is a name.
        policy: Name of a policy with one batch size, see :mod:`capszoo.policies`.
        lr: The policy's base learning rate.
        policy_options: The policy's own options, see `capszoo.policies.policy_options`.
        opt: Name of one of timm's optimizers.
        weight_decay: Of the optimizer; biases and what the model's `no_weight_decay` names are left out.
        criterion: Loss of (scores ``[B, J]``, labels); if None, the model's own, else the margin loss.
        reconstruction_weight: Weight of the reconstruction loss of a model with a decoder; None as in `CapsuleTask`.

    Raises:
        UsageError: If there is no such policy or option, or the policy changes the batch size or is the learning-rate
            finder's; or if `model_args` are given with a model that is there.
        ValueError: If `create_model` or `CapsuleTask` refuses the model.

    Example:

        ```python
        module = CapsuleModule(capszoo.create_model("efficient_capsnet"), policy="warm_restarts")
        ```
    """

    def __init__(
        self,
        model: str | nn.Module,
        model_args: Mapping[str, Any] | None = None,
        policy: str = "fixed",
        lr: float = 1e-3,
        policy_options: Mapping[str, Any] | None = None,
        opt: str = "adam",
        weight_decay: float = 0.0,
        criterion: nn.Module | None = None,
        reconstruction_weight: float | None = None,
    ):
        super().__init__()
        options = dict(policy_options or {})
        _check_policy(policy, lr, options)
        if isinstance(model, str):
            model = create_model(model, **(model_args or {}))
        elif model_args:
            raise UsageError(
                f"model_args are for a model by name, and a {type(model).__name__} is given: leave one out"
            )
        if keeps_contract(type(model)):
            header = model_header(model)
            # What a checkpoint makes the module from again: plain values, the normalisation among them.
            overlay = {key: tuple(header[key]) for key in ("mean", "std") if key in header}
            self.save_hyperparameters(
                {
                    "model": header["model"],
                    "model_args": {**header["model_args"], "pretrained_cfg_overlay": overlay},
                    "policy": policy,
                    "lr": lr,
                    "policy_options": options,
                    "opt": opt,
                    "weight_decay": weight_decay,
                    "reconstruction_weight": reconstruction_weight,
                }
            )
        self.policy, self.lr, self.policy_options = policy, lr, options
        self.opt, self.weight_decay = opt, weight_decay
        self.task = CapsuleTask(model, criterion, reconstruction_weight, verbose=False)

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.task.model

    def forward(self, images: Tensor) -> Tensor:
        """Map images, pixels in [0, 1] ``[B, C, H, W]``, to class scores ``[B, J]``."""
        scores: Tensor = self.model(self.task.normalization(images))
        return scores

    def on_train_epoch_start(self) -> None:
        """Tell the loss how far the run is: some have a margin that grows."""
        criterion: Any = self.task.criterion
        if hasattr(criterion, "set_progress"):
            criterion.set_progress(min(1.0, self.global_step / self.trainer.estimated_stepping_batches))

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return the loss of a batch, and log it."""
        return self._measure("train", batch)

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Log losses and accuracy of a batch."""
        self._measure("val", batch)

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Log losses and accuracy of a batch."""
        self._measure("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the class scores ``[B, J]`` of images, with labels or without."""
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def _measure(self, stage: str, batch: tuple[Tensor, ...]) -> Tensor:
        images, labels, *parts = batch
        found = self.task(self.task.normalization(images), labels, *parts)
        values = {f"{stage}_{name}": found[name] for name in ("loss", "margin_loss", "reconstruction_loss")}
        values[f"{stage}_top1"] = right_answers(found["output"].detach(), labels).float().mean()
        self.log_dict(values, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images), sync_dist=True)
        loss: Tensor = found["loss"]
        return loss

    def configure_optimizers(self) -> Any:
        """Make the optimizer, and the scheduler that sets the policy's learning rate at each of its steps.

        Raises:
            TrainingError: If the Trainer does not say how many epochs there are.
        """
        from timm.optim import create_optimizer_v2

        optimizer = create_optimizer_v2(self.model, opt=self.opt, lr=self.lr, weight_decay=self.weight_decay)
        policy = self._make_policy()
        steps = policy.steps(0)
        last = policy.total_steps - 1  # Lightning asks once more, after the last step

        def factor(step: int) -> float:
            return policy.lr(policy.progress(*divmod(min(step, last), steps))) / self.lr

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _make_policy(self) -> Policy:
        """The policy of the run, which counts steps alone: as if all batches were of one image."""
        epochs, steps = self.trainer.max_epochs, self.trainer.estimated_stepping_batches
        if epochs is None or epochs < 1 or steps == float("inf") or self.trainer.max_steps != -1:
            raise TrainingError(
                f"policy {self.policy!r} needs the length of the run: give the Trainer max_epochs, no max_steps, and "
                "loaders that have a length"
            )
        per_epoch = max(1, round(steps / epochs))
        return create_policy(
            self.policy, lr=self.lr, batch_size=1, epochs=epochs, num_images=per_epoch, **self.policy_options
        )

    def save(self, path: str | Path, **metadata: Any) -> None:
        """Write the network to a safetensors file, which `capszoo.load_model` and the recipes read.

        Args:
            path: File to write; its folder must exist.
            **metadata: More for its header, such as `class_names`, see :func:`capszoo.save_model`.
        """
        save_model(path, self.model, **metadata)


def _check_policy(name: str, lr: float, options: Mapping[str, Any]) -> None:
    """Refuse what no run could be trained by, before anything is made."""
    remedy = "choose fixed, exp_decay, one_cycle or warm_restarts, or train by capszoo train"
    if name == "lr_finder":
        raise UsageError(f"policy {name!r} is not one to train with: {remedy}")
    try:
        policy = create_policy(name, lr=lr, batch_size=7, epochs=1000, num_images=1000, **options)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if {policy.batch_size(epoch) for epoch in range(policy.epochs)} != {7}:
        raise UsageError(f"policy {name!r} changes the batch size, and Lightning's loaders keep it: {remedy}")
