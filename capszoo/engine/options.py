"""A training run from a flat set of options: the options, the parts that they name, the run folder and its result.

recipes/train.py runs one of these from the command line, capszoo.explore many of them. Options are the attributes of an
`argparse.Namespace`, with the names and defaults of :func:`build_parser`; YAML files hold the same names.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple

from capszoo._version import __version__
from capszoo.checkpoint import load_weights
from capszoo.command_line.parser import OptionParser, SizeAction, add_policy_options, key_value
from capszoo.data import DataSplits, Loader, default_translate, load_data
from capszoo.errors import UsageError
from capszoo.files import write_atomically, write_json
from capszoo.losses import MarginLoss
from capszoo.policies import Policy, create_policy, list_policies, policy_options
from capszoo.precision import resolve_amp
from capszoo.pretrained import image_statistics
from capszoo.registry import check_arguments, create_model, model_header, model_keywords

from .criteria import criterion_header
from .distributed import ALONE, Ranks
from .evaluate import evaluate, until_stopped
from .task import CapsuleTask
from .trainer import Trainer

# Options that are keywords of models.
MODEL_OPTIONS = ("decoder", "num_routing", "routing", "squash", "drop_rate", "start")
# Options that belong to one call of the recipe and not to the run.
_NOT_SAVED = {"config", "resume", "output", "results"}


def build_parser() -> OptionParser:
    """The options of a training run, with their defaults."""
    parser = OptionParser(description="Train a capsule network.")
    group = parser.add_argument_group("what").add_argument
    group("--config", metavar="FILE.yaml", help="take options from a YAML file of 'option: value' lines")
    group("--model", default="capsnet_tiny", help="one of capszoo.list_models(), or local-dir:FOLDER")
    group("--dataset", default="digits", help="digits, mnist, fashion_mnist, cifar10, an image folder or a timm name")
    group("--data-dir", default="data", help="folder that has the data set")
    group("--download", action="store_true", help="let torchvision download the data set into --data-dir")
    group("--val-fraction", type=float, default=0.1, help="part of the training images kept for validation")
    group("--output", metavar="RUN_DIR", help="run folder; default runs/MODEL-DATASET-POLICY-TIME")
    group("--resume", metavar="RUN_DIR", help="go on with the run in this folder")
    group = parser.add_argument_group("model").add_argument
    group("--pretrained", action="store_true", help="start from the weights shipped for --model")
    group("--checkpoint", metavar="FILE", help="start from the weights in a safetensors file")
    group("--img-size", action=SizeAction, help="pixels of a side, or height and width; default the data set's")
    group("--in-chans", type=int, help="channels of the images; default the data set's")
    group("--num-routing", type=int, default=3, help="routing iterations")
    group("--routing", default="dynamic", help="kind of routing")
    group("--squash", default="exact", help="exact or approx")
    group("--decoder", action=argparse.BooleanOptionalAction, default=True, help="train with the decoder")
    group("--start", default="default", help="how a fresh network starts: default, plain or paper")
    group("--drop-rate", type=float, default=0.0, help="dropout rate of the primary capsules")
    group("--model-kwargs", nargs="*", type=key_value, default=[], metavar="NAME=VALUE", help="more for the model")
    group = parser.add_argument_group("training").add_argument
    group("--policy", default="one_cycle", help=", ".join(list_policies()))
    group("--epochs", type=int, default=30, help="passes over the training images")
    group(
        "--batch-size",
        type=int,
        help="images a step, for policies with a fixed batch size; default 128, 16 for fewer than 10,000 training "
        "images, 8 for fewer than 1,000",
    )
    group("--lr", type=float, default=0.001, help="base learning rate")
    group("--opt", default="adam", help="optimizer, by timm's names")
    group("--micro-batch", type=int, help="most images of one forward pass; gradients of a batch's parts are added up")
    group("--weight-decay", type=float, default=0.0, help="weight decay")
    group("--momentum", type=float, default=0.9, help="momentum, for optimizers that have it")
    group("--clip-grad", type=float, help="largest norm of the gradient")
    group("--m-plus", type=float, default=0.9, help="margin loss: length that a present class should reach")
    group("--m-minus", type=float, default=0.1, help="margin loss: length that an absent class should not pass")
    group("--margin-lambda", type=float, default=0.5, help="margin loss: weight of the absent classes")
    group(
        "--reconstruction-weight",
        type=float,
        help="weight of the reconstruction loss; default 0.0005, with --start paper 0.001",
    )
    group(
        "--mean",
        type=float,
        nargs="+",
        metavar="MEAN",
        help="subtracted from images in [0, 1], a number for each "
        "channel or one for all; default the training images' own, or those of the weights that training starts from",
    )
    group("--std", type=float, nargs="+", metavar="STD", help="what is left is divided by this; default likewise")
    group("--translate", type=int, help="random shift of training images, in pixels; default by data set, else 0")
    group("--nonfinite", default="stop", choices=["stop", "skip"], help="at a loss that is infinite or not a number")
    group("--seed", type=int, default=0, help="seed of initial weights, shuffling and augmentation")
    group = parser.add_argument_group("computing").add_argument
    group("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    group("--amp", default="auto", choices=["auto", "none", "bf16", "fp16"], help="precision of the computation")
    group("--compile", action="store_true", help="use torch.compile")
    group("--cuda-graphs", action=argparse.BooleanOptionalAction, default=True, help="replay captured steps on a GPU")
    group("--channels-last", action=argparse.BooleanOptionalAction, default=True, help="memory format of the maps")
    group("--eval-batch-size", type=int, default=256, help="images a step in evaluation")
    group("--workers", type=int, default=2, help="processes that read images, for sets too large for memory")
    group("--save-every", type=int, default=0, help="also save the resume state every so many steps")
    group = parser.add_argument_group("reporting").add_argument
    group("--tensorboard", action="store_true", help="also write TensorBoard files into the run folder")
    group("--results", metavar="FILE.csv", help="also add the result as a row to this table")
    group("--quiet", action="store_true", help="print the result alone")
    add_policy_options(parser, list_policies())
    return parser


def options_from(values: Mapping[str, Any], source: str = "options") -> argparse.Namespace:
    """Complete a flat mapping of options with the defaults, checked as those of a YAML file are.

    Args:
        values: Options by name.
        source: Where they come from, for error messages.

    Raises:
        UsageError: For an unknown option, or a value of the wrong kind.
    """
    parser = build_parser()
    parser.set_values(values, source)
    return parser.parse_args([])


def load_splits(args: argparse.Namespace) -> DataSplits:
    """Load the data set that the options name."""
    return load_data(
        args.dataset,
        args.data_dir,
        img_size=args.img_size,
        in_chans=args.in_chans,
        val_fraction=args.val_fraction,
        download=args.download,
    )


def model_arguments(args: argparse.Namespace, data: DataSplits) -> dict[str, Any]:
    """Keywords of the model for the images and classes of a data set.

    Raises:
        UsageError: If --model-kwargs contradicts the data set or another option.
        ValueError: If the model or a keyword is unknown, or a value is of the wrong type.
    """
    parser, known = build_parser(), model_keywords(args.model)
    of_data = {"num_classes": data.num_classes, "in_chans": data.in_chans, "img_size": data.img_size}
    # A model without routing or decoder is not told of them, unless the user changed something about them.
    options = {key: getattr(args, key) for key in MODEL_OPTIONS}
    options = {key: value for key, value in options.items() if key in known or value != parser.get_default(key)}
    more = check_arguments(args.model, dict(args.model_kwargs))
    more = {key: value for key, value in more.items() if value is not None}
    for key, value in more.items():
        given = f"--model-kwargs {key}={value}"
        if key in {"device", "dtype"} or key not in known:
            remedy = {"device": "use --device", "dtype": "use --amp"}.get(key, "leave it out")
            raise UsageError(f"{given} does not go with training: {remedy}")
        if key in of_data and to_2tuple(value) != to_2tuple(of_data[key]):
            remedy = f"use {' '.join(parser.words(key, value))}" if key in parser.destinations else "leave it out"
            raise UsageError(f"{given} contradicts the images of {args.dataset!r}, {key}={of_data[key]}: {remedy}")
        if key in options and options[key] not in (value, parser.get_default(key)):
            raise UsageError(f"{given} contradicts {' '.join(parser.words(key, options[key]))}: give one of them")
    return {**of_data, **options, **more}


def make_model(args: argparse.Namespace, data: DataSplits) -> torch.nn.Module:
    """Make the model for the images and classes of a data set, with the weights that the options name."""
    kwargs = model_arguments(args, data)
    model = create_model(args.model, pretrained=args.pretrained, **kwargs)
    if args.checkpoint:
        load_weights(model, args.checkpoint)
    model.creation_args = kwargs
    # Weights are used to images as they were trained on.
    own = image_statistics(model) if args.pretrained or args.checkpoint or ":" in args.model else data.statistics()
    given = args.mean, args.std
    args.mean, args.std = (list(o if g is None else g) for g, o in zip(given, own, strict=True))
    data.normalize(args.mean, args.std)
    model.pretrained_cfg = model.default_cfg = {
        **model.pretrained_cfg,
        "mean": tuple(args.mean),
        "std": tuple(args.std),
    }
    return model


def make_policy(args: argparse.Namespace, num_images: int) -> Policy:
    """Make the policy."""
    return policy_from(args, num_images)


def make_trainer(
    args: argparse.Namespace,
    data: DataSplits,
    device: torch.device,
    folder: Path | None = None,
    ranks: Ranks = ALONE,
    **kwargs: Any,
) -> Trainer:
    """Make model, policy, optimizer and task, and the trainer that holds them.

    Seeds torch's generator, so that equal options give equal initial weights. Fills in the options whose defaults
    depend on others (batch size, normalisation, warm-up, weight of the reconstruction loss).

    Args:
        args: The options.
        data: From :func:`load_splits`.
        device: Where to train.
        folder: Run folder, which must exist; None keeps nothing. It may also be set later, before the training.
        ranks: The processes that train together, from :func:`capszoo.engine.distributed.join_ranks`.
        kwargs: More for :class:`capszoo.engine.Trainer`: `on_step`, `on_epoch`, `should_stop`.

    Raises:
        ValueError: For a model, policy, optimizer or precision that cannot be made.
    """
    check_ranges(args)
    amp = resolve_amp(args.amp, device)
    translate = default_translate(args.dataset) if args.translate is None else args.translate
    Loader(data.train, 1, device, translate=translate)  # says whether images are large enough for these shifts
    torch.manual_seed(args.seed)
    model = make_model(args, data)
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    policy = make_policy(args, len(data.train))
    if args.reconstruction_weight is None:
        # The paper's code halves the margin loss, and so its 0.0005 is twice that of ours.
        args.reconstruction_weight = 0.001 if args.start == "paper" else 0.0005
    optimizer = create_optimizer(args, model)
    criterion = MarginLoss(args.m_plus, args.m_minus, args.margin_lambda)
    task = CapsuleTask(model, criterion, args.reconstruction_weight, device=device, verbose=False)
    if ranks.count > 1:
        task.prepare_distributed([device.index] if device.type == "cuda" else None)
    if args.compile:
        task.compile()
    return Trainer(
        task,
        optimizer,
        policy,
        data.train,
        data.val,
        folder=folder,
        device=device,
        amp=amp,
        seed=args.seed,
        translate=translate,
        eval_batch_size=args.eval_batch_size,
        clip_grad=args.clip_grad,
        save_every=args.save_every,
        num_workers=args.workers,
        cuda_graphs=args.cuda_graphs,
        ranks=ranks,
        micro_batch=args.micro_batch,
        nonfinite=args.nonfinite,
        metadata=_describe(args, data, task, policy),
        **kwargs,
    )


def options_text(args: argparse.Namespace, folder: Path) -> str:
    """The options as the text of a run folder's args.yaml, from which `--config` and `--resume` read them."""
    import yaml

    values = {key: value for key, value in vars(args).items() if key not in _NOT_SAVED}
    values["model_kwargs"] = dict(args.model_kwargs)
    return f"# python recipes/train.py --config {folder / 'args.yaml'}\n" + yaml.safe_dump(values, sort_keys=False)


def write_options(args: argparse.Namespace, folder: Path) -> None:
    """Write the options into the run folder as args.yaml."""
    text = options_text(args, folder)
    write_atomically(folder / "args.yaml", lambda temporary: temporary.write_text(text))


def measure_test(trainer: Trainer, args: argparse.Namespace, data: DataSplits) -> dict[str, Any]:
    """Measure the best epoch's weights on the test set, once, and write result.json.

    Where images show several classes, `eval_top1` and `test_top1` are exact-match accuracies, and there is a
    `test_mean_average_precision`, see :class:`capszoo.engine.Evaluation`.

    Raises:
        Stopped: If the trainer is asked to stop; nothing is written.
    """
    load_weights(trainer.task.model, trainer.folder / "best.safetensors")
    loader = Loader(data.test, args.eval_batch_size, trainer.device, num_workers=args.workers)
    test = evaluate(trainer.task, until_stopped(loader, trainer.should_stop), trainer.amp)
    best = trainer.best
    result = {
        "model": args.model,
        "dataset": args.dataset,
        "policy": args.policy,
        "parameters": sum(p.numel() for p in trainer.task.model.parameters()),
        "epochs": trainer.policy.epochs,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "best_epoch": best["epoch"],
        "eval_top1": best["eval_top1"],
        "test_top1": test.top1,
        **({"test_mean_average_precision": test.mean_average_precision} if data.multi_label else {}),
        "test_margin_loss": test.loss,
        "test_reconstruction_error": test.reconstruction_error,
        "total_seconds": trainer.position.total_seconds,
        "seed": args.seed,
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


def _describe(args: argparse.Namespace, data: DataSplits, task: CapsuleTask, policy: Policy) -> dict[str, Any]:
    """The header of the weights' files, with facts of the run."""
    return model_header(
        task.model,
        dataset=args.dataset,
        class_names=data.class_names,
        policy=args.policy,
        epochs=policy.epochs,
        seed=args.seed,
        **criterion_header(task.criterion),
    )


_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("micro_batch", "eval_batch_size", "grace"), ("1 or more, below 2^31", lambda value: 1 <= value < 2**31)
    ),
    **dict.fromkeys(("epochs", "seeds", "trials"), ("1 to 1,000,000", lambda value: 1 <= value <= 1_000_000)),
    **dict.fromkeys(("workers", "save_every", "translate"), ("0 or more", lambda value: value >= 0)),
    "seed": ("0 to 2^63 - 1", lambda value: 0 <= value < 2**63),
    **dict.fromkeys(("drop_rate", "momentum"), ("0 or more, below 1", lambda value: 0 <= value < 1)),
    "clip_grad": ("a number above 0", lambda value: 0 < value < math.inf),
    **dict.fromkeys(("weight_decay", "reconstruction_weight"), ("0 or more", lambda value: 0 <= value < math.inf)),
}


def policy_from(args: argparse.Namespace, num_images: int) -> Policy:
    """Make the policy of --policy and its options; fill in those whose defaults depend on it or on the data set."""
    if args.batch_size is None:  # of few images there are few steps
        args.batch_size = 128 if num_images >= 10_000 else 16 if num_images >= 1000 else 8
    # The first steps of Adam at batch 1 follow single images, see warmup_steps in capszoo.policies.
    if args.warmup_steps is None and args.policy in ("ada_batch", "warm_ada_batch"):
        args.warmup_steps = 1000
    names = {name for policy in list_policies() for name in policy_options(policy)}
    options = {name: value for name in sorted(names) if (value := getattr(args, name, None)) is not None}
    return create_policy(
        args.policy, lr=args.lr, batch_size=args.batch_size, epochs=args.epochs, num_images=num_images, **options
    )


def create_optimizer(args: argparse.Namespace, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of --opt, --lr, --weight-decay and, where the recipe has it, --momentum.

    Raises:
        UsageError: If there is no such optimizer, or it does not take these options.
    """
    from timm.optim import create_optimizer_v2, list_optimizers

    if args.opt not in list_optimizers():
        raise UsageError(f"unknown optimizer {args.opt!r}: see timm.optim.list_optimizers()")
    extra: dict[str, Any] = {"fused": True} if args.opt in ("adam", "adamw") else {}
    extra.update({"momentum": args.momentum} if "momentum" in args else {})
    try:
        optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay, **extra)
    except (ImportError, AssertionError, TypeError, ValueError) as error:
        raise UsageError(f"optimizer {args.opt!r} cannot be made: {error}") from None
    if getattr(optimizer, "is_second_order", False):
        # timm has one such, Adahessian, whose generator is not in its state_dict.
        raise UsageError(
            f"optimizer {args.opt!r} draws random numbers that no checkpoint holds, so that no run can be resumed: "
            f"use adam, or a loop of your own with backward(create_graph=True)"
        )
    return optimizer


def check_ranges(args: argparse.Namespace) -> None:
    """Check the numbers that options of training give, of those that a recipe has.

    Raises:
        UsageError: If one is out of range.
    """
    for name, (what, right) in _RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not right(value):
            raise UsageError(f"--{name.replace('_', '-')} {value} is out of range: give {what}")
