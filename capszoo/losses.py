"""Losses of capsule networks.

Each is a function and a module. Scores are ``[B, J]``; a target is class indices ``[B]`` or weights of the classes
``[B, J]`` in [0, 1]: mixed labels, or 1 for each of the classes present (multi-hot). Shapes and dtypes are always
checked, values where that waits for no GPU; there an index out of range is a device-side assertion, as in torch, or,
where the margin loss is one kernel, a loss that is NaN.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capszoo.kernels.class_scores import at_least_float32, margin_losses, present_classes

__all__ = [
    "CrossEntropyLoss",
    "MarginLoss",
    "ReconstructionLoss",
    "SpreadLoss",
    "cross_entropy_loss",
    "default_reconstruction_weight",
    "margin_loss",
    "reconstruction_loss",
    "spread_loss",
]

# Mixed labels in half precision may add up to a little more than 1.
_ROUNDING = 0.01


def margin_loss(
    lengths: Tensor,
    target: Tensor,
    m_plus: float = 0.9,
    m_minus: float = 0.1,
    lambda_: float = 0.5,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Margin loss (Sabour, Frosst and Hinton 2017, equation 4), summed over classes.

    Per class k: ``T_k max(0, m+ - |v_k|)^2 + lambda (1 - T_k) max(0, |v_k| - m-)^2``.

    Args:
        lengths: Lengths of the class capsules ``[B, J]``, floating.
        target: Class indices ``[B]``, int64, int32 or uint8, or weights of the classes ``[B, J]`` in [0, 1], floating
            or bool: T_k, of mixed labels or of several classes present.
        m_plus: m+, the length above which a present class costs nothing.
        m_minus: m-, the length below which an absent class costs nothing.
        lambda_: Weight of the absent classes.
        weight: A factor for each class ``[J]``, floating, by which its images count, as in torch's `cross_entropy`. An
            image of several classes counts by the mean of theirs, ``sum of T_k weight_k / sum of T_k``, one of no class
            by 1.
        reduction: 'none' for the loss of each image times its factor, 'sum' for the sum of these, 'mean' for the sum
            divided by the sum of the images' factors, the batch size without `weight`. (For a target ``[B, J]``
            `cross_entropy` divides by the batch size always; here it is the same for indices and their one-hot form.)
            'batchmean' divides by the batch size, so that factors count as much in small batches as in large ones.

    Returns:
        The loss, a scalar or ``[B]``, in float32 at least.

    Raises:
        ValueError: If a shape, a dtype or a setting does not fit, or (on a CPU) a value of the target.
    """
    _check_margins(m_plus, m_minus, lambda_)
    _check_reduction(reduction)
    check_target(lengths, target)
    _check_weight(weight, lengths.shape[1])
    losses = margin_losses(lengths, target, m_plus, m_minus, lambda_)
    weights: Tensor | None = None
    if weight is not None:
        weights = _image_weights(present_classes(target, at_least_float32(lengths)), weight)
    return _reduce(losses, reduction, weights)


def spread_loss(
    lengths: Tensor, target: Tensor, margin: float = 0.9, weight: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Spread loss (Hinton, Sabour and Frosst 2018, equation 3): sum over i != t of max(0, m - (a_t - a_i))^2.

    With weights of the classes T every class that is present is set against every one that is absent: the sum over all
    pairs i != t of T_t (1 - T_i) max(0, m - (a_t - a_i))^2, which for a single class is the same. It takes memory for
    ``[B, J, J]``.

    Args:
        lengths: Activations of the class capsules ``[B, J]``, floating.
        target: Class indices ``[B]`` or weights of the classes ``[B, J]``, as :func:`margin_loss` takes them.
        margin: m; its schedule (0.2 growing to 0.9 in the paper) is the caller's.
        weight: A factor for each class ``[J]``, as in :func:`margin_loss`.
        reduction: 'none', 'sum', 'mean' or 'batchmean', as in :func:`margin_loss`.

    Returns:
        The loss, a scalar or ``[B]``, in float32 at least.

    Raises:
        ValueError: As :func:`margin_loss`.
    """
    _check_margin(margin)
    _check_reduction(reduction)
    check_target(lengths, target)
    _check_weight(weight, lengths.shape[1])
    lengths = at_least_float32(lengths)
    present = present_classes(target, lengths)
    if target.dim() == 1:
        wanted = (lengths * present).sum(dim=1, keepdim=True)
        losses = ((1 - present) * F.relu(margin - (wanted - lengths)).square()).sum(dim=1)
    else:
        gaps = F.relu(margin - (lengths[:, :, None] - lengths[:, None, :])).square()
        pairs = present[:, :, None] * (1 - present)[:, None, :]
        others = 1 - torch.eye(lengths.shape[1], dtype=lengths.dtype, device=lengths.device)
        losses = (pairs * others * gaps).sum(dim=(1, 2))
    return _reduce(losses, reduction, _image_weights(present, weight))


def cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of the softmax of logits, of families whose scores are not lengths: -sum of T_k log softmax(l)_k.

    Args:
        logits: Scores ``[B, J]`` of any size, floating; log-probabilities are their own softmax.
        target: Class indices ``[B]`` or weights of the classes ``[B, J]`` that add up to 1, as of mixed labels.
        label_smoothing: T becomes (1 - s) T + s / J (Szegedy et al. 2016, section 7).
        weight: A factor for each class ``[J]``, as in :func:`margin_loss`.
        reduction: 'none', 'sum', 'mean' or 'batchmean', as in :func:`margin_loss`.

    Returns:
        The loss, a scalar or ``[B]``, in float32 at least.

    Raises:
        ValueError: As :func:`margin_loss`.
    """
    _check_smoothing(label_smoothing)
    _check_reduction(reduction)
    check_target(logits, target)
    _check_weight(weight, logits.shape[1])
    logits = at_least_float32(logits)
    present = present_classes(target, logits)
    smooth = (1 - label_smoothing) * present + label_smoothing / logits.shape[1]
    log_shares = logits.log_softmax(dim=1)
    # Logits of -inf, as of classes that are masked, count where the target has a weight for them.
    log_shares = log_shares.masked_fill((smooth == 0) & torch.isneginf(log_shares), 0.0)
    losses = -(smooth * log_shares).sum(dim=1)
    return _reduce(losses, reduction, _image_weights(present, weight))


def reconstruction_loss(images: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Sum of squared pixel differences of each image (Sabour, Frosst and Hinton 2017, section 4.1).

    Args:
        images: Reconstructed images ``[B, C, H, W]``, floating; any shape from ``[B, ...]`` will do.
        target: Images to reconstruct, of the same shape, floating.
        reduction: 'none' for each image's loss, 'sum', or 'mean' ('batchmean') over the batch.

    Returns:
        The loss, a scalar or ``[B]``, in float32 at least; see
        :func:`default_reconstruction_weight`.

    Raises:
        ValueError: If shapes differ, images are not floating, or the reduction is unknown.
    """
    _check_reduction(reduction)
    if images.dim() < 2 or list(images.shape) != list(target.shape):
        raise ValueError(
            f"images have shape {list(images.shape)}, target {list(target.shape)}: give both as [B, C, H, W]"
        )
    if not (images.is_floating_point() and target.is_floating_point()):
        raise ValueError(
            f"images are {images.dtype}, target {target.dtype}: give floating pixels in [0, 1], such as images / 255"
        )
    losses = (at_least_float32(images) - target).square().flatten(1).sum(dim=1)
    return _reduce(losses, reduction, None)


def default_reconstruction_weight(num_values: int) -> float:
    """Weight of the reconstruction loss against the margin loss, where none is chosen.

    0.0005 for an image of MNIST (Sabour, Frosst and Hinton 2017, section 4.1). The loss is a sum: in larger images the
    same weight would let it outweigh the classes, so it shrinks with the number of values.

    Args:
        num_values: Values of an image, C * H * W.
    """
    return 0.0005 * min(1.0, 784 / num_values)


def _image_weights(present: Tensor, weight: Tensor | None) -> Tensor | None:
    if weight is None:
        return None
    total = present.sum(dim=1)
    weights = (present * weight.to(present.dtype)).sum(dim=1)
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), 1.0)


def _reduce(losses: Tensor, reduction: str, weights: Tensor | None) -> Tensor:
    if weights is not None:
        losses = losses * weights
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if weights is None or reduction == "batchmean" else losses.sum() / weights.sum()


def _check_margins(m_plus: float, m_minus: float, lambda_: float) -> None:
    if not 0 <= m_minus < m_plus < math.inf:
        raise ValueError(f"m_minus={m_minus} and m_plus={m_plus} are not possible: need 0 <= m_minus < m_plus")
    if not 0 <= lambda_ < math.inf:
        raise ValueError(f"lambda_={lambda_} is not possible: give 0 or more")


def _check_margin(margin: float) -> None:
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin={margin} is not possible: give 0 or more")


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} is not possible: give 0 or more, below 1")


def _check_weight(weight: Tensor | None, num_classes: int) -> None:
    if weight is not None:
        if weight.dim() != 1 or weight.shape[0] != num_classes or not weight.is_floating_point():
            raise ValueError(
                f"weight has shape {list(weight.shape)} and is {weight.dtype}: give floating [J], J={num_classes}"
            )


def _check_reduction(reduction: str) -> None:
    if reduction != "none" and reduction != "mean" and reduction != "sum" and reduction != "batchmean":
        raise ValueError(f"unknown reduction '{reduction}'. Known: none, mean, sum, batchmean")


def check_target(scores: Tensor, target: Tensor) -> None:
    """Check that a target is one for these scores ``[B, J]``, see :func:`margin_loss`.

    Raises:
        ValueError: If its shape or dtype is another, or (on a CPU) a value out of range.
    """
    if scores.dim() != 2 or not scores.is_floating_point():
        raise ValueError(f"lengths have shape {list(scores.shape)} and are {scores.dtype}: give floating [B, J]")
    indices = target.dtype == torch.int64 or target.dtype == torch.int32 or target.dtype == torch.uint8
    weights = target.is_floating_point() or target.dtype == torch.bool
    of_images = target.dim() == 1 and target.shape[0] == scores.shape[0] and indices
    of_classes = target.dim() == 2 and list(target.shape) == list(scores.shape) and weights
    if not (of_images or of_classes):
        raise ValueError(
            f"target has shape {list(target.shape)} and is {target.dtype}, lengths have shape {list(scores.shape)}: "
            f"give class indices [B] (int64, int32 or uint8) or weights of the classes [B, J] (bool, or target.float())"
        )
    if not torch.jit.is_scripting():
        _check_values(target, scores.shape[1])


def _check_values(target: Tensor, num_classes: int) -> None:
    """Check the values of a target on a CPU, where there are any: compilers and tracers have none."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if target.device.type != "cpu" or target.dtype == torch.bool or target.numel() == 0:
        return
    try:
        least, most = float(target.min()), float(target.max())
    except RuntimeError:  # of vmap, or a fake tensor
        return
    if target.dim() == 1 and not 0 <= least <= most < num_classes:
        raise ValueError(
            f"target has class indices from {least:.0f} to {most:.0f}: give 0 to J - 1 = {num_classes - 1}"
        )
    if target.dim() == 2 and not -_ROUNDING <= least <= most <= 1 + _ROUNDING:
        raise ValueError(f"target has weights of the classes from {least:g} to {most:g}: give numbers in [0, 1]")


class MarginLoss(nn.Module):
    """Module form of :func:`margin_loss`."""

    weight: Tensor | None

    def __init__(
        self,
        m_plus: float = 0.9,
        m_minus: float = 0.1,
        lambda_: float = 0.5,
        weight: Tensor | None = None,
        reduction: str = "mean",
    ):
        super().__init__()
        _check_margins(m_plus, m_minus, lambda_)
        _check_reduction(reduction)
        self.m_plus, self.m_minus, self.lambda_, self.reduction = m_plus, m_minus, lambda_, reduction
        self.register_buffer("weight", weight)

    def forward(self, lengths: Tensor, target: Tensor) -> Tensor:
        return margin_loss(lengths, target, self.m_plus, self.m_minus, self.lambda_, self.weight, self.reduction)

    def extra_repr(self) -> str:
        return f"m_plus={self.m_plus}, m_minus={self.m_minus}, lambda_={self.lambda_}, reduction={self.reduction!r}"


class SpreadLoss(nn.Module):
    """Module form of :func:`spread_loss`, whose margin may grow while it is trained with.

    Args:
        margin: m, the last where it grows; in evaluation mode always this one, and as long as nobody calls
            `set_progress`.
        weight: As in :func:`spread_loss`.
        reduction: As in :func:`spread_loss`.
        first_margin: m at the start of training, growing linearly to `margin` (0.2 to 0.9 in Hinton et al. 2018); None
            for the same margin throughout. The trainer tells the progress before each epoch, by `set_progress`.
    """

    weight: Tensor | None

    def __init__(
        self,
        margin: float = 0.9,
        weight: Tensor | None = None,
        reduction: str = "mean",
        first_margin: float | None = None,
    ):
        super().__init__()
        first = margin if first_margin is None else first_margin
        _check_margin(margin)
        _check_margin(first)
        _check_reduction(reduction)
        self.margin, self.first_margin, self.reduction = margin, first, reduction
        self.current_margin = float(margin)
        self.register_buffer("weight", weight)

    @torch.jit.ignore
    def set_progress(self, progress: float) -> None:
        """Set the margin for a fraction of the training that is done, from 0 to 1."""
        self.current_margin = float(self.first_margin + (self.margin - self.first_margin) * progress)

    def forward(self, lengths: Tensor, target: Tensor) -> Tensor:
        margin = self.current_margin if self.training and self.first_margin != self.margin else self.margin
        return spread_loss(lengths, target, margin, self.weight, self.reduction)

    def extra_repr(self) -> str:
        first = "" if self.first_margin == self.margin else f", first_margin={self.first_margin}"
        return f"margin={self.margin}, reduction={self.reduction!r}{first}"


class CrossEntropyLoss(nn.Module):
    """Module form of :func:`cross_entropy_loss`, whose labels are smooth in training mode alone."""

    weight: Tensor | None

    def __init__(self, label_smoothing: float = 0.0, weight: Tensor | None = None, reduction: str = "mean"):
        super().__init__()
        _check_smoothing(label_smoothing)
        _check_reduction(reduction)
        self.label_smoothing, self.reduction = label_smoothing, reduction
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        smoothing = self.label_smoothing if self.training else 0.0
        return cross_entropy_loss(logits, target, smoothing, self.weight, self.reduction)

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}, reduction={self.reduction!r}"


class ReconstructionLoss(nn.Module):
    """Module form of :func:`reconstruction_loss`."""

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        _check_reduction(reduction)
        self.reduction = reduction

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        return reconstruction_loss(images, target, self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
