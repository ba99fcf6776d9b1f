"""A check for the tests of a model family: whether a model keeps the contract of :mod:`capszoo.contract` and timm's."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import model_entrypoint
from torch import Tensor, nn

from .contract import (
    Explorable,
    HasCapsules,
    HasCriterion,
    HasPrimaryCapsules,
    HasRoutedCapsules,
    decoder_of,
    has_couplings,
)
from .engine.task import CapsuleTask
from .registry import check_arguments, create_model, family_of, list_models, load_model, save_model

__all__ = ["check_model"]

_BATCH = 3


def check_model(name: str, **kwargs: Any) -> None:
    """Check that a model is listed, trains, and comes back from its file to the same bits.

    The random state stays as it was. `torch.compile`, export and numbers from the paper are for tests of their own.

    Args:
        name: Name of a model that is registered with timm.
        **kwargs: Keywords of :func:`capszoo.create_model`, best those of a small network with all it may have, such as
            `decoder=True`.

    Raises:
        AssertionError: If the model breaks the contract; the message says how.
        ValueError: If the model cannot be made.

    Example:

        ```python
        from capszoo.testing import check_model

        check_model("capsnet", conv_dim=8, num_types=2, img_size=20, decoder=True)
        ```
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(name, **kwargs)
        images = torch.rand(_BATCH, model.in_chans, *model.img_size)
        _check_registration(name, model)
        _check_arguments(name, model, kwargs)
        _check_space(name, model)
        model.eval()
        with torch.no_grad():
            _check_scores(model, images)
            _check_capsules(model, images)
            _check_couplings(model, images)
            _check_file(model, images)
        _check_training(model, images)
        with torch.no_grad():
            _check_classifier(model.eval(), images)


def _check(kept: bool, message: str) -> None:
    if not kept:  # not an assert statement, which python -O leaves out
        raise AssertionError(message)


def _check_shape(what: str, tensor: Tensor, *shape: int) -> None:
    _check(tuple(tensor.shape) == shape, f"{what} has shape {tuple(tensor.shape)}, expected {shape}")
    _check(bool(tensor.isfinite().all()), f"{what} is not finite")


def _check_registration(name: str, model: nn.Module) -> None:
    arch = name.partition(".")[0]
    _check(arch in list_models(), f"{arch!r} is not in capszoo.list_models(): annotate what its entrypoint returns")
    family = family_of(name)
    _check(type(model) is family, f"the entrypoint of {arch!r} returns a {type(model).__name__}, annotated {family}")
    _check(bool(model_entrypoint(arch).__doc__), f"the entrypoint of {arch!r} has no docstring")
    _check(
        model.pretrained_cfg["architecture"] == arch, f"pretrained_cfg names {model.pretrained_cfg['architecture']!r}"
    )
    state = model.state_dict()
    for key in ("first_conv", "classifier"):
        weight = f"{model.pretrained_cfg[key]}.weight"
        _check(weight in state, f"pretrained_cfg has {key}={model.pretrained_cfg[key]!r}, but there is no {weight!r}")


def _check_arguments(name: str, model: nn.Module, kwargs: dict[str, Any]) -> None:
    arguments = model.arguments()
    _check(json.loads(json.dumps(arguments)) == arguments, "arguments() changes in JSON: give lists, not tuples")
    again = create_model(name, device="meta", **arguments)
    shapes, others = ({key: value.shape for key, value in m.state_dict().items()} for m in (model, again))
    _check(shapes == others, "arguments() make a network of other weights: they leave a keyword out")
    for key in kwargs.keys() & arguments.keys():
        given = json.loads(json.dumps(kwargs[key]))
        kept = arguments[key] if isinstance(given, list) or not isinstance(arguments[key], list) else arguments[key][0]
        _check(given is None or kept == given, f"arguments() have {key}={arguments[key]!r}, given was {given!r}")


def _check_space(name: str, model: nn.Module) -> None:
    for argument in model.search_space() if isinstance(model, Explorable) else ():
        values = argument.values.values() if isinstance(argument.values, Mapping) else argument.values
        for value in values:
            try:
                check_arguments(name, {argument.keyword: value})
            except ValueError as error:
                raise AssertionError(f"search_space() has a value that the model does not take: {error}") from None


def _check_scores(model: nn.Module, images: Tensor) -> None:
    scores = model(images)
    _check_shape("forward(x)", scores, _BATCH, model.num_classes)
    _check_shape("forward(x) of one image", model(images[:1]), 1, model.num_classes)
    features = model.forward_features(images)
    _check_shape("forward_features(x)", features, _BATCH, model.num_features, *features.shape[2:])
    _check(torch.equal(model.forward_head(features), scores), "forward_head(forward_features(x)) is not forward(x)")
    flat = model.forward_head(features, pre_logits=True)
    _check_shape("forward_head(features, pre_logits=True)", flat, _BATCH, model.head_hidden_size)
    if getattr(model, "returns_logits", False):
        _check(isinstance(model, HasCriterion), "returns_logits is True, and the margin loss takes no logits: "
               "have a default_criterion()")  # fmt: skip
    if not isinstance(model, HasCriterion):
        within = bool(((scores >= 0) & (scores <= 1)).all())
        _check(within, "scores are not from 0 to 1, as the margin loss takes them: have a default_criterion()")


def _check_capsules(model: nn.Module, images: Tensor) -> None:
    layers, auxiliary, modules = model.capsule_layers(), model.auxiliary_modules(), dict(model.named_modules())
    for key, layer in layers.items():
        _check(modules.get(key) is layer, f"capsule_layers() has {key!r}, which is not the module of that name")
    for key, module in auxiliary.items():
        _check(modules.get(key) is module, f"auxiliary_modules() has {key!r}, which is not the module of that name")
    if layers or auxiliary.get("decoder") is not None:
        _check(isinstance(model, HasCapsules), "a model with capsule layers or a decoder needs forward_capsules(x)")
        capsules, scores = model.forward_capsules(images)
        _check_shape("the capsules of forward_capsules(x)", capsules, _BATCH, model.num_classes, *capsules.shape[2:])
        _check(torch.equal(scores, model(images)), "the scores of forward_capsules(x) are not those of forward(x)")
        decoder = decoder_of(model)
        if decoder is not None:
            drawn = decoder(capsules, scores.argmax(dim=1))
            _check_shape("what the decoder draws", drawn, *images.shape)
            _check(bool(((drawn >= 0) & (drawn <= 1)).all()), "the decoder draws values that are not from 0 to 1")
    if isinstance(model, HasPrimaryCapsules):
        primary = model.primary_capsules(model.forward_features(images))
        _check(primary.ndim == 3 and len(primary) == _BATCH, "primary_capsules(features) are not [B, I, K]")


def _check_couplings(model: nn.Module, images: Tensor) -> None:
    if not has_couplings(model):
        return
    every = model.couplings(images, iteration=None)
    _check(every.ndim == 4, f"couplings(x, iteration=None) have shape {tuple(every.shape)}, expected [R, B, I, J]")
    shape = (_BATCH, every.shape[2], model.num_classes)
    _check_shape("couplings(x, iteration=None)", every, len(every), *shape)
    last = model.couplings(images)
    _check_shape("couplings(x)", last, *shape)
    _check(torch.allclose(last, every[-1]), "couplings(x) are not the last of couplings(x, iteration=None)")
    sums = every.sum(dim=-1)
    # Learned priors are the same for all images and iterations, whatever they add up to.
    alike = torch.allclose(sums, sums[:1, :1].expand_as(sums), atol=1e-4)
    _check(alike, "couplings(x) add up neither to 1 over the classes nor, with priors, to the same for all images")
    if isinstance(model, HasRoutedCapsules):
        capsules, activations = model.routed_capsules(model.forward_features(images))
        expected = (_BATCH, every.shape[2])
        _check_shape("the capsules of routed_capsules(features)", capsules, *expected, *capsules.shape[2:])
        if activations is not None:
            _check_shape("the activations of routed_capsules(features)", activations, *expected)
        grids, places = model.capsule_places()
        count = sum(height * width for height, width in grids)
        if grids:
            _check(places.shape == (every.shape[2],), f"capsule_places() has {len(places)} places of {every.shape[2]}")
            _check(bool(((places >= 0) & (places < count)).all()), f"capsule_places() has places outside of {grids}")


def _check_file(model: nn.Module, images: Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(path, model)
        loaded = load_model(path).eval()
    _check(loaded.arguments() == model.arguments(), "the model of its file has other arguments()")
    for key, value in model.state_dict().items():
        _check(
            torch.equal(loaded.state_dict()[key], value), f"{key!r} comes back from the model's file with other bits"
        )
    _check(torch.equal(loaded(images), model(images)), "the model of its file gives other scores: arguments() lack one")


def _check_training(model: nn.Module, images: Tensor) -> None:
    """One backward pass of the task reaches every parameter, and one of the scores none of auxiliary modules."""
    model.train()
    target = torch.arange(_BATCH) % model.num_classes
    auxiliary = tuple(f"{key}." for key in model.auxiliary_modules())
    model.zero_grad()
    model(images).sum().backward()
    for key, parameter in model.named_parameters():
        if auxiliary and key.startswith(auxiliary):
            _check(parameter.grad is None, f"forward(x) uses {key!r} of an auxiliary module")
    model.zero_grad()
    task = CapsuleTask(model, verbose=False)
    task(images, target)["loss"].backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            _check(parameter.grad is not None, f"{key!r} gets no gradient from the loss")
            _check(bool(parameter.grad.isfinite().all()), f"the gradient of {key!r} is not finite")
    model.zero_grad()


def _check_classifier(model: nn.Module, images: Tensor) -> None:
    _check(
        model.get_classifier() is model.get_submodule(model.pretrained_cfg["classifier"]),
        "get_classifier() is not the module that pretrained_cfg names",
    )
    features, classes = model.forward_features(images), model.num_classes
    model.reset_classifier(classes + 1)
    _check_shape("forward(x) after reset_classifier()", model(images), _BATCH, classes + 1)
    model.reset_classifier(0)
    _check(torch.equal(model(images), features.flatten(1)), "without classes forward(x) is not the flat features")
    _check(not model.capsule_layers(), "capsule_layers() is not empty without classes")
