"""CapsuleTask: one forward pass of a capsule network to a dictionary of losses."""

import inspect
import math
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from capszoo.contract import HasCriterion, decoder_of
from capszoo.losses import MarginLoss, check_target, default_reconstruction_weight, reconstruction_loss
from capszoo.pretrained import image_statistics

from .batch_norm import has_batch_norm

__all__ = ["CapsuleTask", "Normalization", "class_to_reconstruct"]


class Normalization(nn.Module):
    """Pixels in [0, 1] to the images that a model takes, and back, as its decoder reconstructs them.

    Args:
        model: A model; the `mean` and `std` of its `pretrained_cfg` say how its images are normalised.
        device: Where the images are.
    """

    def __init__(self, model: nn.Module, device: torch.device | str | None = None):
        super().__init__()
        mean, std = image_statistics(model)
        # Images that are not normalised pass through, to the same bits.
        self.is_identity = (set(mean), set(std)) == ({0.0}, {1.0})
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, device=device).view(-1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise pixels in [0, 1] ``[B, C, H, W]``."""
        return pixels if self.is_identity else (pixels - self.mean) / self.std

    def undo(self, images: Tensor) -> Tensor:
        """Map normalised images ``[B, C, H, W]`` to pixels in [0, 1]."""
        return images if self.is_identity else images * self.std + self.mean


def class_to_reconstruct(lengths: Tensor, target: Tensor) -> Tensor:
    """Choose the class whose capsule the decoder gets.

    Args:
        lengths: Lengths of the class capsules ``[B, J]``.
        target: Class indices ``[B]``, or weights of the classes ``[B, J]``: then it is the class of the largest weight,
            and of several such (several classes present, or none) the one whose capsule is the longest.

    Returns:
        Class indices ``[B]``, int64.

    Raises:
        ValueError: If the target is of another shape or dtype.
    """
    check_target(lengths, target)
    if target.ndim == 1:
        return target.long()
    weights = target.to(lengths.dtype)
    return lengths.masked_fill(weights < weights.amax(dim=1, keepdim=True), -torch.inf).argmax(dim=1)


def reconstruct_parts(decoder: nn.Module, capsules: Tensor, target: Tensor, num_parts: int) -> Tensor:
    """Reconstruct the images that each image is composed of, each from the capsule of its class.

    Args:
        decoder: The decoder of a model.
        capsules: Class capsules ``[B, J, ...]``.
        target: Weights of the classes ``[B, J]``, which show as many classes as there are parts.
        num_parts: P.

    Returns:
        Pixels ``[B, P, C, H, W]`` in the order of the classes.

    Raises:
        ValueError: If the target has class indices.
    """
    if target.ndim != 2:
        raise ValueError(
            f"images of {num_parts} parts show as many classes, and the target has one class each, shape "
            f"{list(target.shape)}: give weights of the classes [B, J]"
        )
    classes = target.float().topk(num_parts, dim=1).indices.sort(dim=1).values
    drawn = decoder(capsules.repeat_interleave(num_parts, dim=0), classes.flatten())
    return drawn.unflatten(0, (len(target), num_parts))


class _CapsuleForward(nn.Module):
    """Class scores and reconstructions in one forward pass, so that DDP and torch.compile see a single module."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input: Tensor, target: Tensor, num_parts: int = 0) -> tuple[Tensor, Tensor | None]:
        decoder = decoder_of(self.model)
        if decoder is None:
            return self.model(input), None
        capsules, scores = self.model.forward_capsules(input)
        if num_parts:
            return scores, reconstruct_parts(decoder, capsules, target, num_parts)
        return scores, decoder(capsules, class_to_reconstruct(scores, target))


class CapsuleTask(TrainingTask):
    """Margin loss on the lengths of the class capsules plus a weighted reconstruction loss.

    A drop-in for `timm.task.ClassificationTask`. Models without decoder train on the margin loss alone.

    Args:
        model: A model that keeps the contract of :mod:`capszoo.contract`, or any with `forward`, and with
            `forward_capsules` and `decoder`.
        criterion: Loss of (scores ``[B, J]``, target), a scalar; if None, the model's own, else the margin loss.
        reconstruction_weight: Weight of the reconstruction loss (sum of squared pixel differences); if None,
            :func:`capszoo.losses.default_reconstruction_weight`: 0.0005, the paper's, or less for larger ones.
        device: Device of the task.
        dtype: Type of the task's tensors.
        verbose: Log what the task is made of.

    Raises:
        ValueError: If the model has no attribute `decoder`, or the criterion does not reduce to a scalar.

    Example:

        ```python
        task = CapsuleTask(capszoo.create_model("capsnet", decoder=True))
        task(images, labels)["loss"].backward()
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | None = None,
        reconstruction_weight: float | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        if not (hasattr(model, "decoder") or hasattr(model, "arguments")):
            raise ValueError(f"{type(model).__name__} is no capsule network: CapsuleTask needs a model of capszoo")
        if getattr(criterion, "reduction", None) == "none":
            raise ValueError(f"{type(criterion).__name__} has reduction='none': training needs a scalar, give 'mean'")
        self.trainable_module = _CapsuleForward(model)
        if criterion is None:
            criterion = model.default_criterion() if isinstance(model, HasCriterion) else MarginLoss()
        self.criterion = criterion if device is None else criterion.to(device)  # it may have weights of the classes
        self.normalization = Normalization(model, device)
        if reconstruction_weight is None:
            values = 1 if decoder_of(model) is None else model.in_chans * math.prod(model.img_size)
            reconstruction_weight = default_reconstruction_weight(values)
        self.reconstruction_weight = reconstruction_weight

    @property
    def model(self) -> nn.Module:
        """The network, free of the wrappers of DDP and torch.compile."""
        return unwrap_model(self.trainable_module).model

    @property
    def kept_model(self) -> nn.Module:
        """The network whose weights are measured and kept, which is their average after `setup_ema`, else `model`."""
        return unwrap_model(self.trainable_module_ema).model if self.has_ema() else self.model

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> "CapsuleTask":
        """Wrap the network in DistributedDataParallel."""
        from torch.nn.parallel import DistributedDataParallel

        # Ranks may take unequal numbers of forward passes, and buffers that no training changes need not travel.
        changing = has_batch_norm(self.trainable_module)
        known = inspect.signature(DistributedDataParallel).parameters
        own = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its name until 2.13
        if not {"forward_sync_buffers", "broadcast_buffers"} & ddp_kwargs.keys():
            ddp_kwargs[own] = changing
        if changing and device_ids:
            self.trainable_module = nn.SyncBatchNorm.convert_sync_batchnorm(self.trainable_module)
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile the training forward pass and the evaluation model."""
        self.eval_model = torch.compile(self.get_eval_model(), backend=backend, mode=mode, **compile_kwargs)
        self.compile_ema(backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The network itself, whose forward gives class scores."""
        module = super().get_eval_model(module, ema)
        inner = None if module is None else unwrap_model(module)
        return inner.model if isinstance(inner, _CapsuleForward) else module

    def forward(self, input: Tensor, target: Tensor, parts: Tensor | None = None) -> dict[str, Tensor]:
        """Run the network and its losses.

        Args:
            input: Images ``[B, C, H, W]``, normalised by the `mean` and `std` of the model's `pretrained_cfg` (pixels
                in [0, 1] where these are 0 and 1).
            target: Class indices ``[B]``, or weights of the classes ``[B, J]`` (mixed labels, or several classes
                present), see :func:`capszoo.losses.margin_loss`; the decoder draws the class that
                :func:`class_to_reconstruct` chooses.
            parts: What the images are composed of, pixels in [0, 1] ``[B, P, C, H, W]`` in the order of the P classes
                that the target shows: the decoder then draws each from the capsule of its class, and the losses of the
                parts are added up, as for the two digits of MultiMNIST (Sabour, Frosst and Hinton 2017, section 6).

        Returns:
            'loss' (scalar, for backward), 'output' (lengths ``[B, J]``), 'margin_loss' and 'reconstruction_loss'
            (scalars, not weighted; the latter 0 without decoder).
        """
        if parts is None:
            lengths, images = self.trainable_module(input, target)
        else:
            lengths, images = self.trainable_module(input, target, parts.shape[1])
        margin = self.criterion(lengths, target)
        if images is None:
            reconstruction = margin.new_zeros(())
        else:
            pixels = self.normalization.undo(input) if parts is None else parts
            reconstruction = reconstruction_loss(images, pixels)
        loss = margin + self.reconstruction_weight * reconstruction
        return {
            "loss": loss,
            "output": lengths,
            "margin_loss": margin.detach(),
            "reconstruction_loss": reconstruction.detach(),
        }
