"""A training run from its options: the data, the parts that the options name, the trainer and the result.

recipes/train.py runs one of these, capszoo.explore many of them.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple

from capszoo._version import __version__
from capszoo.checkpoint import computing_arguments, load_weights, read_metadata
from capszoo.data import DataSplits, Loader, default_translate, load_data
from capszoo.data.sources import check_data_dir
from capszoo.errors import CheckpointError, UsageError
from capszoo.fields import words
from capszoo.files import write_json
from capszoo.opening import weights_in
from capszoo.policies import Policy
from capszoo.precision import resolve_amp
from capszoo.pretrained import image_statistics
from capszoo.registry import (
    check_arguments,
    create_model,
    header_arguments,
    load_model,
    model_header,
    model_keywords,
)

from .criteria import criterion_header, make_criterion
from .distributed import ALONE, Ranks
from .evaluate import evaluate, until_stopped
from .memory import keep_freed_memory
from .optimizers import create_optimizer
from .options import (
    BACKBONE_OPTIONS,
    DEFAULTS,
    MODEL_OPTIONS,
    OPTIONS,
    TrainingOptions,
    check_ranges,
    fill_in,
    policy_of,
)
from .task import CapsuleTask
from .trainer import Trainer


def load_splits(options: TrainingOptions) -> DataSplits:
    """Load the data set that the options name.

    Raises:
        UsageError: If a number of the options is out of range, or they also name a folder that the set does not use.
        DataError: If it cannot be loaded.
    """
    check_ranges(options)  # before what may take minutes
    check_data_dir(options.dataset, options.data_dir)
    return load_data(
        options.dataset,
        options.data_dir,
        img_size=options.img_size,
        in_chans=options.in_chans,
        val_fraction=DEFAULTS.val_fraction if options.val_fraction is None else options.val_fraction,
        download=options.download,
        follow_links=options.follow_links,
    )


def model_arguments(options: TrainingOptions, data: DataSplits) -> dict[str, Any]:
    """Keywords of the model for the images and classes of a data set.

    Raises:
        UsageError: If --model-kwargs contradicts the data set or another option.
        ValueError: If the model or a keyword is unknown, or a value is of the wrong type.
    """
    known = model_keywords(options.model)
    of_data = {"num_classes": data.num_classes, "in_chans": data.in_chans, "img_size": data.img_size}
    # A model without a decoder is not told of it, unless the user changed something about it; nor is any model of a
    # backbone. What is not given is the model's own.
    own = {key: value for key in MODEL_OPTIONS if (value := getattr(options, key)) is not None}
    told = known.difference(BACKBONE_OPTIONS)
    own = {key: value for key, value in own.items() if key in told or value != getattr(DEFAULTS, key)}
    more = check_arguments(options.model, dict(options.model_kwargs))
    more = {key: value for key, value in more.items() if value is not None}
    for key, value in more.items():
        given = f"--model-kwargs {key}={value}"
        if key in {"device", "dtype"} or key not in known:
            remedy = {"device": "use --device", "dtype": "use --amp"}.get(key, "leave it out")
            raise UsageError(f"{given} does not go with training: {remedy}")
        if key in of_data and to_2tuple(value) != to_2tuple(of_data[key]):
            remedy = f"use {' '.join(words(key, value, OPTIONS[key]))}" if key in OPTIONS else "leave it out"
            raise UsageError(f"{given} contradicts the images of {options.dataset!r}, {key}={of_data[key]}: {remedy}")
        if key in own and own[key] not in (value, getattr(DEFAULTS, key)):
            raise UsageError(f"{given} contradicts {' '.join(words(key, own[key], OPTIONS[key]))}: give one of them")
    return {**of_data, **own, **more}


def make_model(options: TrainingOptions, data: DataSplits) -> torch.nn.Module:
    """Make the model for the images and classes of a data set, with the weights that the options name.

    The images are normalised by `mean` and `std` of the options, else by those of the weights, else by their own; the
    model's `pretrained_cfg` has them.
    """
    kwargs = model_arguments(options, data)
    begun = _begun(options)
    if begun is not None:
        name, kwargs = begun
        model = create_model(name, **kwargs)
    elif options.checkpoint:
        model = _with_weights(options.model, weights_in(options.checkpoint), kwargs)
    else:
        model = create_model(options.model, pretrained=options.pretrained, **kwargs)
    model.creation_args = kwargs
    # Weights are used to images as they were trained on.
    has_weights = options.pretrained or options.checkpoint or ":" in options.model or kwargs.get("backbone_pretrained")
    own = image_statistics(model) if has_weights else data.statistics()
    given = options.mean, options.std
    mean, std = (tuple(o if g is None else g) for g, o in zip(given, own, strict=True))
    data.normalize(mean, std)
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "mean": mean, "std": std}
    return model


def _begun(options: TrainingOptions) -> tuple[str, dict[str, Any]] | None:
    """Name and keywords of the model of a run that goes on, where it began with weights that may be gone by now.

    None of any other run; and of one that has saved nothing yet, or nothing whole: it begins with those weights.
    """
    file = Path(options.resume or "", "last.safetensors")
    from_weights = options.checkpoint or options.pretrained or options.backbone_pretrained or ":" in options.model
    if not (options.resume and from_weights and file.is_file()):
        return None
    try:
        header = read_metadata(file)
        return header["model"], header_arguments(file, header["model"], header)
    except (CheckpointError, KeyError):
        return None


# What follows from the size of the images where it is not given.
_OF_BACKBONES = ("backbone_level", "kernel_size", "primary_stride")


def _with_weights(name: str, path: Path, kwargs: dict[str, Any]) -> torch.nn.Module:
    """Make a model with the weights of a file; where they are of other classes or images, with all that can be kept."""
    header = read_metadata(path)
    of_file = header_arguments(path, name, header) if header.get("model") == name else {}
    # It computes as the weights were trained, unless told otherwise, and a backbone ends where theirs does.
    kwargs = {**computing_arguments(of_file, kwargs["img_size"]), **kwargs}
    if of_file.get("backbone") is not None and kwargs.get("backbone") == of_file["backbone"]:
        kwargs = {**{key: of_file[key] for key in _OF_BACKBONES if key in of_file}, **kwargs}
    of_data = {key: kwargs[key] for key in ("num_classes", "in_chans", "img_size") if key in of_file}
    if all(to_2tuple(of_file[key]) == to_2tuple(value) for key, value in of_data.items()):
        model = create_model(name, **kwargs)
        load_weights(model, path)
        return model
    trained: Any = load_model(path)  # whatever is wrong with the file shows here
    mean, std = image_statistics(trained)
    size = (trained.in_chans, *trained.img_size)
    cfg = {"file": str(path), "num_classes": trained.num_classes, "input_size": size, "mean": mean, "std": std}
    return create_model(name, pretrained=True, pretrained_cfg_overlay=cfg, **kwargs)


def make_policy(options: TrainingOptions, num_images: int) -> Policy:
    """Make the policy of --policy and its options, for so many training images."""
    return policy_of(fill_in(options, num_images), num_images)


policy_from = make_policy  # its name of before


def make_trainer(
    options: TrainingOptions,
    data: DataSplits,
    device: torch.device,
    folder: Path | None = None,
    ranks: Ranks = ALONE,
    **kwargs: Any,
) -> Trainer:
    """Make model, policy, optimizer and task, and the trainer that holds them.

    Seeds torch's generator, so that equal options give equal initial weights.

    Args:
        options: The options.
        data: From :func:`load_splits`.
        device: Where to train.
        folder: Run folder, which must exist; None keeps nothing. It may also be set later, before the training.
        ranks: The processes that train together, from `capszoo.engine.distributed.join_ranks`.
        kwargs: More for :class:`capszoo.engine.Trainer`: `on_step`, `on_epoch`, `should_stop`.

    Returns:
        The trainer; its `options` are the given ones with all defaults filled in.

    Raises:
        ValueError: For a model, policy, optimizer or precision that cannot be made.
    """
    check_ranges(options)
    if data.num_classes == 1 and not data.multi_label:
        raise UsageError(
            f"all images of {options.dataset!r} are of class {data.class_names[0]!r}: give a folder for each of two "
            "classes or more"
        )
    resolve_amp(options.amp, device)  # says what is impossible before anything is made
    translate = default_translate(options.dataset) if options.translate is None else options.translate
    # Says whether images are large enough for these shifts, and whether they can be changed so.
    Loader(
        data.train,
        1,
        device,
        translate=translate,
        augmentation=options.augmentation,
        num_classes=data.num_classes,
        with_parts=True,
    )
    torch.manual_seed(options.seed)
    model = make_model(options, data)
    if data.multi_label and getattr(model, "returns_logits", False):
        raise UsageError(
            f"--model {options.model} gives a probability to each class, which add up to 1, and the images of "
            f"{options.dataset!r} show several classes: use a model of capsule lengths, such as capsnet_tiny"
        )
    cfg = model.pretrained_cfg
    options = fill_in(options, len(data.train), math.prod(data.train.image_shape))
    options = replace(options, mean=list(cfg["mean"]), std=list(cfg["std"]))
    criterion = make_criterion(options, model, data.train.labels)
    return trainer_of(model, criterion, options, data, device, folder=folder, ranks=ranks, **kwargs)


def trainer_of(
    model: torch.nn.Module,
    criterion: torch.nn.Module,
    options: TrainingOptions,
    data: DataSplits,
    device: torch.device,
    *,
    metadata: Mapping[str, Any] | None = None,
    ranks: Ranks = ALONE,
    **kwargs: Any,
) -> Trainer:
    """Make policy, optimizer and task for a model that is there, and the trainer that holds them.

    Args:
        model: The model; it is moved to the device.
        criterion: Its criterion.
        options: The options, with all defaults filled in.
        data: The data set, normalised as the model takes it.
        device: Where to train.
        metadata: More or other facts for the header of the weights' files.
        ranks: The processes that train together.
        kwargs: More for :class:`capszoo.engine.Trainer`.

    Raises:
        ValueError: For a policy, optimizer or precision that cannot be made.
    """
    keep_freed_memory(device=device)
    model.to(device)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    policy = make_policy(options, len(data.train))
    optimizer = create_optimizer(options, model)
    task = CapsuleTask(model, criterion, options.reconstruction_weight, device=device, verbose=False)
    if options.model_ema:
        task.setup_ema(options.model_ema_decay, options.model_ema_warmup)
    if ranks.count > 1:
        task.prepare_distributed([device.index] if device.type == "cuda" else None)
    if options.compile:
        task.compile()
    return Trainer(
        task,
        optimizer,
        policy,
        data.train,
        data.val,
        device=device,
        amp=resolve_amp(options.amp, device),
        seed=options.seed,
        translate=default_translate(options.dataset) if options.translate is None else options.translate,
        augmentation=options.augmentation,
        eval_batch_size=options.eval_batch_size,
        clip_grad=options.clip_grad,
        save_every=options.save_every,
        num_workers=options.workers,
        cuda_graphs=options.cuda_graphs,
        ranks=ranks,
        micro_batch=options.micro_batch,
        nonfinite=options.nonfinite,
        metadata=header_of(model, criterion, options, data, **(metadata or {})),
        options=options,
        **kwargs,
    )


def header_of(
    model: torch.nn.Module,
    criterion: torch.nn.Module,
    options: TrainingOptions,
    data: DataSplits,
    **more: Any,
) -> dict[str, Any]:
    """The header of the weights' files, with facts of the run and more of them."""
    facts = {
        "dataset": options.dataset,
        "class_names": data.class_names,
        **({"several_classes": True} if data.multi_label else {}),
        "policy": options.policy,
        "epochs": options.epochs,
        "seed": options.seed,
        "val_fraction": options.val_fraction,
    }
    return model_header(model, **{**facts, **criterion_header(criterion), **more})


def measure_test(trainer: Trainer, options: TrainingOptions, data: DataSplits) -> dict[str, Any]:
    """Measure the best epoch's weights on the test set, once, and write result.json.

    Where images show several classes, `eval_top1` and `test_top1` are exact-match accuracies, and there are a
    `test_mean_average_precision` and a `test_exact_top_k`, see :class:`capszoo.engine.Evaluation`.

    Raises:
        Stopped: If the trainer is asked to stop; nothing is written.
    """
    options = fill_in(options, len(data.train))
    load_weights(trainer.task.kept_model, trainer.folder / "best.safetensors")
    loader = trainer.make_loader(data.test, options.eval_batch_size, with_parts=True)
    test = evaluate(trainer.task, until_stopped(loader, trainer.should_stop), trainer.amp)
    best = trainer.best
    result = {
        "model": options.model,
        "dataset": options.dataset,
        "policy": options.policy,
        "parameters": sum(p.numel() for p in trainer.task.model.parameters()),
        "epochs": trainer.policy.epochs,
        "batch_size": trainer.policy.batch_size(trainer.policy.epochs - 1),
        "lr": options.lr,
        "best_epoch": best["epoch"],
        "eval_top1": best["eval_top1"],
        "test_top1": test.top1,
        **({"test_mean_average_precision": test.mean_average_precision} if data.multi_label else {}),
        **({"test_exact_top_k": test.exact_top_k} if data.multi_label else {}),
        "test_margin_loss": test.loss,
        "test_reconstruction_error": test.reconstruction_error,
        "total_seconds": trainer.position.total_seconds,
        "seed": options.seed,
        "amp": "none" if trainer.amp is None else str(trainer.amp).removeprefix("torch."),
        "device": torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "processes": trainer.ranks.count,
        "images_per_second": statistics.median(row["images_per_second"] for row in trainer.history),
        "torch": torch.__version__,
        "capszoo": __version__,
    }
    write_json(trainer.folder / "result.json", result)
    return result
