"""The options of a training run: one frozen dataclass, whose fields carry their help, choices and checks.

recipes/train.py and recipes/prune.py make their command lines from it, args.yaml holds its values under the same names,
and :mod:`capszoo.engine.run` makes the parts of a run from it.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from capszoo import _moved
from capszoo.data import Augmentation
from capszoo.data.sets import VAL_FRACTION
from capszoo.errors import UsageError
from capszoo.fields import (
    BELOW_1,
    CONFIG,
    MILLION,
    NOT_NEGATIVE,
    POSITIVE,
    Option,
    OptionError,
    Range,
    check_needs,
    option,
    options_of,
    read_pair,
    read_size,
    read_values,
)
from capszoo.files import write_atomically, yaml_text
from capszoo.losses import default_reconstruction_weight
from capszoo.policies import Policy, create_policy, list_policies, policy_options

__all__ = [
    "BACKBONE_OPTIONS",
    "MODEL_OPTIONS",
    "POLICY_OPTIONS",
    "TrainingOptions",
    "check_ranges",
    "flat_values",
    "fill_in",
    "options_from",
    "options_text",
    "policy_of",
    "policy_option_fields",
    "with_values",
    "write_options",
]

# Options that are keywords of models.
BACKBONE_OPTIONS = ("backbone", "backbone_level", "backbone_pretrained")
MODEL_OPTIONS = ("decoder", "num_routing", "routing", "squash", "drop_rate", "start", *BACKBONE_OPTIONS)


_SEED = Range("0 to 2^63 - 1", lambda value: 0 <= value < 2**63)
_ABOVE_0 = Range("a number above 0", lambda value: 0 < value < math.inf)


def _read_class_weight(text: str) -> str | float:
    """Read a word of --class-weights."""
    try:
        return text if text in ("balanced", "none") else float(text)
    except ValueError:
        raise OptionError(f"{text!r} is unknown: give balanced, none, or a number for each class") from None


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Augmentation):
    """What a training run is made from; the options of augmentation are those of its base class.

    None stands for a default that depends on other options or on the data: :func:`fill_in` and
    :func:`capszoo.engine.run.make_trainer` know it. `policy_options` holds those options of the policy that are given,
    by name.
    """

    model: str = option("capsnet_tiny", "one of capszoo.list_models(), or local-dir:FOLDER", "what")
    dataset: str | None = option(
        "digits", "digits, mnist, fashion_mnist, cifar10, an image folder or a timm name", "what"
    )
    data_dir: str = option("data", "folder that has the data set", "what", may_change=True)
    download: bool = option(False, "let torchvision download the data set into --data-dir", "what", flag=True)
    follow_links: bool = option(
        False, "read what links out of an image folder lead to", "what", flag=True, may_change=True
    )
    val_fraction: float | None = option(VAL_FRACTION, "part of training images kept for validation", "what", read=float)
    output: str | None = option(
        None, "run folder; default runs/MODEL-DATASET-POLICY-TIME", "what", metavar="RUN_DIR", saved=False
    )
    resume: str | None = option(
        None, "go on with the run in this folder", "what", metavar="RUN_DIR", saved=False, may_change=True
    )
    pretrained: bool = option(False, "start from the weights shipped for --model", "model", flag=True)
    checkpoint: str | None = option(
        None,
        "start from the weights in a safetensors file, or the best of a run folder; of other classes or images, from "
        "those that fit",
        "model",
        metavar="FILE",
    )
    img_size: int | list[int] | None = option(
        None, "pixels of a side, or height and width; default the data set's", "model", many="+", join=read_size
    )
    in_chans: int | None = option(None, "channels of the images; default the data set's", "model", read=int)
    num_routing: int | None = option(None, "routing iterations; default the model's own", "model", read=int)
    routing: str | None = option(None, "kind of routing; default the model's own", "model")
    squash: str | None = option(None, "exact or approx; default the model's own", "model")
    decoder: bool | None = option(True, "train with the decoder", "model", flag=True, negatable=True)
    start: str = option("default", "how a fresh network starts: default, plain or paper", "model")
    drop_rate: float = option(0.0, "dropout rate of the primary capsules", "model", read=float, within=BELOW_1)
    backbone: str | None = option(
        None, "a timm network before the capsules, such as resnet18, or stem for strided convolutions", "model"
    )
    backbone_level: int | None = option(
        None, "level of its features; default the last with a map of 12 pixels each way", "model", read=int
    )
    backbone_pretrained: bool = option(False, "start from timm's weights of the backbone", "model", flag=True)
    model_kwargs: Mapping[str, Any] = option(
        {}, "more for the model", "model", read=read_pair, many="*", metavar="NAME=VALUE"
    )
    policy: str = option("one_cycle", ", ".join(list_policies()), "training")
    epochs: int = option(30, "passes over the training images", "training", read=int, within=MILLION)
    batch_size: int | None = option(
        None,
        "images a step, for policies with a fixed batch size; default 128, 16 for fewer than 10,000 training images, "
        "8 for fewer than 1,000",
        "training",
        read=int,
    )
    lr: float = option(0.001, "base learning rate", "training", read=float)
    opt: str = option("adam", "optimizer, by timm's names", "training")
    micro_batch: int | None = option(
        None,
        "most images of one forward pass; gradients of a batch's parts are added up",
        "training",
        read=int,
        within=POSITIVE,
        may_change=True,
    )
    weight_decay: float = option(0.0, "weight decay", "training", read=float, within=NOT_NEGATIVE)
    momentum: float = option(0.9, "momentum, for optimizers that have it", "training", read=float, within=BELOW_1)
    clip_grad: float | None = option(None, "largest norm of the gradient", "training", read=float, within=_ABOVE_0)
    m_plus: float = option(0.9, "margin loss: length that a present class should reach", "training", read=float)
    m_minus: float = option(0.1, "margin loss: length that an absent class should not pass", "training", read=float)
    margin_lambda: float = option(0.5, "margin loss: weight of the absent classes", "training", read=float)
    smoothing: float | None = option(
        None,
        "label smoothing of a model that trains on the cross-entropy; default its own",
        "training",
        read=float,
        within=BELOW_1,
    )
    class_weights: list[str | float] | None = option(
        None,
        "by how much images of each class count: balanced for N / (J N_j), none, or a number for each class",
        "training",
        read=_read_class_weight,
        many="+",
        metavar="WEIGHT",
    )
    reconstruction_weight: float | None = option(
        None,
        "weight of the reconstruction loss; default 0.0005, for more than 784 values in an image less, and with "
        "--start paper twice as much",
        "training",
        read=float,
        within=NOT_NEGATIVE,
    )
    mean: list[float] | None = option(
        None,
        "subtracted from images in [0, 1], a number for each channel or one for all; default the training images' own, "
        "or those of the weights that training starts from",
        "training",
        read=float,
        many="+",
        metavar="MEAN",
    )
    std: list[float] | None = option(
        None, "what is left is divided by this; default likewise", "training", read=float, many="+", metavar="STD"
    )
    translate: int | None = option(
        None,
        "random shift of training images, in pixels; default by data set, else 0",
        "augmentation",
        read=int,
        within=NOT_NEGATIVE,
    )
    model_ema: bool = option(
        False, "measure and keep the exponential moving average of the weights", "training", flag=True
    )
    model_ema_decay: float = option(
        0.9995,
        "part of the average that a step leaves as it is",
        "training",
        read=float,
        within=BELOW_1,
        needs=("model_ema",),
    )
    model_ema_warmup: bool = option(
        True,
        "let the average follow the weights faster at first",
        "training",
        flag=True,
        negatable=True,
        needs=("model_ema",),
    )
    nonfinite: str = option(
        "stop", "at a loss that is infinite or not a number", "training", choices=("stop", "skip"), may_change=True
    )
    seed: int = option(0, "seed of initial weights, shuffling and augmentation", "training", read=int, within=_SEED)
    device: str = option("auto", "auto, cpu, cuda, cuda:1 ...", "computing", may_change=True)
    amp: str = option("auto", "precision of the computation", "computing", choices=("auto", "none", "bf16", "fp16"))
    compile: bool = option(False, "use torch.compile", "computing", flag=True)
    cuda_graphs: bool = option(True, "replay captured steps on a GPU", "computing", flag=True, negatable=True)
    channels_last: bool = option(True, "memory format of the maps", "computing", flag=True, negatable=True)
    eval_batch_size: int = option(
        256, "images a step in evaluation", "computing", read=int, within=POSITIVE, may_change=True
    )
    workers: int = option(
        2,
        "processes that read images, for sets too large for memory and for changes of colours",
        "computing",
        read=int,
        within=NOT_NEGATIVE,
        may_change=True,
    )
    save_every: int = option(
        0, "also save the resume state every so many steps", "computing", read=int, within=NOT_NEGATIVE, may_change=True
    )
    tensorboard: bool = option(
        False, "also write TensorBoard files into the run folder", "reporting", flag=True, may_change=True
    )
    report: bool = option(
        True, "write report.html into the run folder", "reporting", flag=True, negatable=True, may_change=True
    )
    results: str | None = option(
        None,
        "also add the result as a row to this table",
        "reporting",
        metavar="FILE.csv",
        saved=False,
        may_change=True,
    )
    quiet: bool = option(False, "print the result alone", "reporting", flag=True, may_change=True)
    policy_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def augmentation(self) -> Augmentation:
        """The options of the augmentation alone, but for `translate`, whose default is the data set's."""
        return Augmentation(**{name: getattr(self, name) for name in options_of(Augmentation)})


def policy_option_fields(policies: Iterable[str]) -> dict[str, Option]:
    """Every option of these policies, None where it is not given."""
    takers: dict[str, list[str]] = {}
    for policy in policies:
        for name in policy_options(policy):
            takers.setdefault(name, []).append(policy)
    found = {}
    for name, names in takers.items():
        default, text = policy_options(names[0])[name]
        # Rates such as "10x" and a cycle of None ("auto") are text that the policy reads.
        read = str if default is None or isinstance(default, (bool, str)) else type(default)
        found[name] = Option(
            help=f"{', '.join(names)}: {text}",
            group="policy options (default: the policy's own)",
            read=read,
            flag=isinstance(default, bool),
            negatable=isinstance(default, bool),
        )
    return found


# Those of the base class would come first.
_OWN = dict(sorted(options_of(TrainingOptions).items(), key=lambda item: item[1].group == "augmentation"))
POLICY_OPTIONS = policy_option_fields(list_policies())
OPTIONS = {"config": CONFIG, **_OWN, **POLICY_OPTIONS}
DEFAULTS = TrainingOptions()


def options_from(
    values: Mapping[str, Any], source: Any = "options", defaults: TrainingOptions = DEFAULTS
) -> TrainingOptions:
    """Complete a flat mapping of options with the defaults, checked as those of a YAML file are.

    Args:
        values: Options by name, those of the policy among them; None for those that are not given.
        source: Where they come from, for error messages.
        defaults: The values of all others.

    Raises:
        UsageError: For an unknown option, or a value of the wrong kind.
    """
    return with_values(defaults, read_values(values, OPTIONS, source))


def with_values(options: TrainingOptions, values: Mapping[str, Any]) -> TrainingOptions:
    """Options with other values, which are not checked.

    Args:
        options: The options.
        values: Values by name, those of the policy among them; names that are not theirs are left out.
    """
    own = {name: values[name] for name in _OWN if name in values}
    if "model_kwargs" in own:
        own["model_kwargs"] = dict(own["model_kwargs"])
    of_policy = {name: values[name] for name in POLICY_OPTIONS if values.get(name) is not None}
    return replace(options, **own, policy_options={**options.policy_options, **of_policy})


def flat_values(options: TrainingOptions) -> dict[str, Any]:
    """The values of options by name, those of the policy among them; None for those that are not given."""
    own = {name: getattr(options, name) for name in _OWN}
    return {**own, **{name: options.policy_options.get(name) for name in POLICY_OPTIONS}}


def options_text(options: TrainingOptions, folder: Path) -> str:
    """The options as the text of a run folder's args.yaml, from which `--config` and `--resume` read them."""
    values = {name: value for name, value in flat_values(options).items() if OPTIONS[name].saved}
    return yaml_text(["python", "recipes/train.py", "--config", str(folder / "args.yaml")], values)


def write_options(options: TrainingOptions, folder: Path) -> None:
    """Write the options into the run folder as args.yaml."""
    text = options_text(options, folder)
    write_atomically(folder / "args.yaml", lambda temporary: temporary.write_text(text, encoding="utf-8"))


def fill_in(options: TrainingOptions, num_images: int, num_values: int = 1) -> TrainingOptions:
    """Give values to the options whose defaults depend on others, or on the training images and the values in each.

    Those of the images' normalisation depend on the model, too: :func:`capszoo.engine.run.make_trainer` has them.
    """
    if options.batch_size is None:  # of few images there are few steps
        options = replace(options, batch_size=128 if num_images >= 10_000 else 16 if num_images >= 1000 else 8)
    changes: dict[str, Any] = {}
    # The first steps of Adam at batch 1 follow single images, see warmup_steps in capszoo.policies.
    if options.policy in ("ada_batch", "warm_ada_batch"):
        try:
            warmup = min(1000, policy_of(options, num_images).progress(0, 0).phase_steps // 2)
        except (TypeError, ValueError):  # refused again where the run makes its policy
            warmup = 0
        changes["policy_options"] = {"warmup_steps": warmup, **options.policy_options}
    if options.reconstruction_weight is None:
        # The paper's code halves the margin loss, and so its 0.0005 is twice that of ours.
        weight = default_reconstruction_weight(num_values)
        changes["reconstruction_weight"] = 2 * weight if options.start == "paper" else weight
    return replace(options, **changes)


def policy_of(options: TrainingOptions, num_images: int) -> Policy:
    """The policy of options that have a batch size, for so many training images; a ValueError if it refuses them."""
    return create_policy(
        options.policy,
        lr=options.lr,
        batch_size=options.batch_size,
        epochs=options.epochs,
        num_images=num_images,
        **{name: options.policy_options[name] for name in sorted(options.policy_options)},
    )


# Of recipes/explore.py.
_MORE_RANGES = {"grace": POSITIVE, "seeds": MILLION, "trials": MILLION}


def check_ranges(options: Any) -> None:
    """Check the numbers that options of training give, of those that are there.

    Args:
        options: An object that has them as its attributes, such as :class:`TrainingOptions`.

    Raises:
        UsageError: If one is out of range.
    """
    for name, within in {**{name: what.within for name, what in OPTIONS.items()}, **_MORE_RANGES}.items():
        value = getattr(options, name, None)
        if within is not None and value is not None and not within.holds(value):
            raise UsageError(f"--{name.replace('_', '-')} {value} is out of range: give {within.text}")
    if isinstance(options, Augmentation):
        options.check()
    if isinstance(options, TrainingOptions):
        _check_together(options)


def _check_together(options: TrainingOptions) -> None:
    for name in ("checkpoint", "resume", "output"):
        if getattr(options, name) == "":
            raise UsageError(f"--{name} is empty: give a path, or leave it out")
    check_needs(options)
    if options.pretrained and options.checkpoint:
        raise UsageError(f"--pretrained and --checkpoint {options.checkpoint} are two starts: give one of them")


__getattr__ = _moved.getter(__name__)
