"""Scores that rank the parts of a network."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from capszoo.data import Loader
from capszoo.engine.evaluate import check_statistics
from capszoo.engine.task import Normalization, class_to_reconstruct, reconstruct_parts
from capszoo.layers import ScaledConv2d, capsule_lengths, squash
from capszoo.losses import default_reconstruction_weight, margin_loss, present_classes, reconstruction_loss
from capszoo.models import CapsNet
from capszoo.modes import evaluation_mode

from .parts import capsule_places, check_model, check_part, check_score, count_types, types_of_capsules

# The votes of so many images are held at once: [16, 1152, 10, 16] floats are 12 MB.
_COUPLING_BATCH = 16


Criterion = Callable[[Tensor, Tensor], Tensor]


def scores(
    model: nn.Module,
    part: str,
    score: str = "taylor",
    data: Iterable[tuple[Tensor, ...]] | None = None,
    criterion: Criterion | None = None,
) -> Tensor:
    """Rank the parts of a network: the higher the score, the more the network needs the part.

    'magnitude' is the Euclidean norm of what computes the part. conv1: the filter and its bias. types: the filters,
    biases and vote matrices. capsules: the filters and biases of the type, and the vote matrix; so with shared vote
    matrices all capsules of a type score the same. decoder: the unit's incoming weights and bias.

    'taylor' is the mean over images of ``|sum of activation * dL/d activation|``, the sum over all values of the part
    (Molchanov et al. 2017, equation 7): to first order, what the loss L of the image changes by when the part is held
    at zero. L is the criterion (the margin loss by default), plus the reconstruction loss with its default weight
    where there is a decoder. Activations are the maps after ReLU, the squashed primary capsules, and the decoder's
    units after ReLU: units that never fire score exactly 0.

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
            for 'taylor' and 'coupling'; and the images' parts, if any, as :class:`capszoo.data.Loader` gives them.
        criterion: Loss of (lengths ``[B, J]``, labels) of 'taylor', a mean over the batch, such as the `criterion` of
            the task that trained the model; the margin loss with the paper's margins if None.

    Returns:
        Scores ``[n]`` of the n parts that are there, float64 on the CPU. Capsules are in type-major order; the decoder
        has first the units of its first hidden layer, then those of the second.

    Raises:
        ValueError: If the model has no such part, the score does not go with it or needs data and there is none.
    """
    check_model(model)
    check_part(model, part)
    check_score(model, part, score)
    if score == "magnitude":
        return _magnitude(model, part).sqrt()
    if score == "look_ahead":
        return _look_ahead(model, part).sqrt()
    if data is None:
        raise ValueError(f"score {score!r} needs data: pass batches of (images, labels), or use score='magnitude'")
    if isinstance(data, Loader):
        check_statistics(model, data.split)
    total, count = torch.zeros(()), 0
    with _fixed_statistics(model):
        for images, labels, *parts in data:
            images, labels = _check_batch(model, images, labels)
            if score == "taylor":
                parts = [some.to(images) for some in parts]
                per_image = _taylor(model, part, images, labels, criterion or margin_loss, *parts)
            else:
                per_image = _coupling(model, part, images, labels)
            total = total + per_image.cpu().double().sum(dim=0)
            count += len(labels)
    if count == 0:
        raise ValueError("data holds no images: pass a loader that can be read again, or a list of batches")
    if not total.isfinite().all():
        raise ValueError(f"score {score!r} of {part} is not finite: check the weights and the images")
    return total / count


def _fixed_statistics(model: CapsNet) -> AbstractContextManager[None]:
    """Put a backbone into the mode of evaluation: BatchNorm would count the images, dropout would draw numbers."""
    return evaluation_mode(*([] if model.backbone is None else [model.backbone]))


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


def _sum_by_type(model: CapsNet, values: Tensor) -> Tensor:
    """Sum values ``[..., n]`` of the capsules that are there to ``[..., T]``."""
    sums = values.new_zeros(*values.shape[:-1], count_types(model))
    return sums.index_add(-1, types_of_capsules(model).to(values.device), values)


def _squares(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double().square()


def _filter_weights(conv: ScaledConv2d) -> Tensor:
    """Squared weights of a convolution's filters as they convolve, with its scale."""
    return _squares(conv.kernels()) * _squares(conv.scale)


def _filter_squares(model: CapsNet) -> Tensor:
    """Squared weights of the primary capsules' filters summed over the kernel, ``[T, K, conv_dim]``."""
    return _filter_weights(model.primary_caps.conv).sum(dim=(2, 3)).unflatten(0, (count_types(model), -1))


def _vote_squares(model: CapsNet) -> Tensor:
    """Squared vote matrices of each capsule that is there, summed over the classes' values, ``[n, K]``."""
    votes = _squares(model.class_caps.weight).sum(dim=(2, 3))
    return votes[types_of_capsules(model)] if model.share_weights else votes


def _magnitude(model: CapsNet, part: str) -> Tensor:
    """Squared scores."""
    if part == "conv1":
        return _filter_weights(model.conv1).sum(dim=(1, 2, 3)) + _squares(model.conv1.bias)
    if part == "decoder":
        layers = (model.decoder.fc1, model.decoder.fc2)
        return torch.cat([_squares(fc.weight).sum(dim=1) + _squares(fc.bias) for fc in layers])
    bias = _squares(model.primary_caps.conv.bias).unflatten(0, (count_types(model), -1)).sum(dim=1)
    filters = _filter_squares(model).sum(dim=(1, 2)) + bias
    if part == "capsules":
        return filters[types_of_capsules(model)] + _vote_squares(model).sum(dim=1)
    if model.share_weights:  # one matrix, however many capsules use it
        return filters + _squares(model.class_caps.weight).sum(dim=(1, 2, 3))
    return filters + _sum_by_type(model, _vote_squares(model).sum(dim=1))


def _look_ahead(model: CapsNet, part: str) -> Tensor:
    """Squared scores."""
    if part == "conv1":
        return _filter_weights(model.conv1).sum(dim=(1, 2, 3)) * _filter_squares(model).sum(dim=(0, 1))
    if part == "capsules":
        return (_vote_squares(model) * _filter_squares(model).sum(dim=2)[types_of_capsules(model)]).sum(dim=1)
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


def _taylor(
    model: CapsNet, part: str, images: Tensor, labels: Tensor, criterion: Criterion, shown: Tensor | None = None
) -> Tensor:
    """|sum of activation * gradient| of each image and part, ``[B, n]``."""
    watched = {
        "conv1": lambda: [model.act1],
        "types": lambda: [model.primary_caps],
        "capsules": lambda: [model.primary_caps],
        "decoder": lambda: [model.decoder.act1, model.decoder.act2],
    }[part]()
    with torch.enable_grad(), _activations(watched) as activations:
        # Not through `forward`: no dropout, and no checkpointing, which would call the modules again.
        features = model.primary_caps(model.convolve(images))
        capsules = model.class_caps(model.to_capsules(features))
        lengths = capsule_lengths(capsules)
        loss = criterion(lengths, labels)
        if model.decoder is not None:
            if shown is None:
                drawn = model.decoder(capsules, class_to_reconstruct(lengths, labels))
                pixels = Normalization(model, images.device).undo(images)
            else:
                drawn, pixels = reconstruct_parts(model.decoder, capsules, labels, shown.shape[1]), shown
            loss = loss + default_reconstruction_weight(images[0].numel()) * reconstruction_loss(drawn, pixels)
        # Losses are means over the batch; the gradients wanted are those of each image's own loss.
        gradients = torch.autograd.grad(loss * len(labels), activations)
    changes = [_at_least_float32(a.detach()) * g for a, g in zip(activations, gradients, strict=True)]
    if part == "decoder":
        return torch.cat(changes, dim=1).abs()
    if part == "conv1":
        return changes[0].sum(dim=(2, 3)).abs()
    of_capsules = model.primary_caps.to_capsules(changes[0]).sum(dim=2)[:, capsule_places(model).to(images.device)]
    return (_sum_by_type(model, of_capsules) if part == "types" else of_capsules).abs()


@torch.no_grad()
def _coupling(model: CapsNet, part: str, images: Tensor, labels: Tensor) -> Tensor:
    """Coupling to the true class times pose length of each image and part, ``[B, n]``."""
    routing, places = model.class_caps.routing, capsule_places(model).to(images.device)
    weight, bias = _at_least_float32(model.class_caps.weight), _at_least_float32(model.class_caps.bias)
    if model.share_weights:
        weight = weight[types_of_capsules(model).to(weight.device)]
    found = []
    for some, target in zip(images.split(_COUPLING_BATCH), labels.split(_COUPLING_BATCH), strict=True):
        features = model.primary_caps(model.convolve(some))
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
