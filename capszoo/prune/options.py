"""The options of a run of pruning: what to keep, and those of the training in each round."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from capszoo.data import Augmentation
from capszoo.engine.options import DEFAULTS, OPTIONS, TrainingOptions, flat_values, policy_option_fields, with_values
from capszoo.fields import Option, option, options_of, read_pair
from capszoo.files import yaml_text
from capszoo.policies import list_policies

from .parts import PARTS, SCORES

__all__ = ["FINE_TUNING", "PRUNE_OPTIONS", "PruneOptions", "flat_prune_values", "prune_options_text"]

# None where the weights tell.
FINE_TUNING = replace(DEFAULTS, dataset=None, val_fraction=None, decoder=None, epochs=5, lr=1e-4)


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """What a run of pruning is made from.

    `training` are the options of the training in each round, of which the command line has some.
    """

    weights: str | None = option(
        None, "a safetensors file of train.py or prune.py, or the name of shipped weights", "what", positional=True
    )
    keep: list[tuple[str, Any]] = option(
        [],
        f"what to keep of {', '.join(PARTS)}: a number, a fraction such as 0.25, or indices such as [0,3,5]; "
        "decoder takes a pair",
        "what",
        read=read_pair,
        many="*",
        metavar="PART=N",
    )
    score: str = option("taylor", f"what ranks the parts: {', '.join(SCORES)}", "what")
    score_images: int = option(2048, "training images that the score is measured on", "what", read=int)
    rounds: int = option(1, "rounds of pruning and training in which to get there", "what", read=int)
    training: TrainingOptions = FINE_TUNING

    @classmethod
    def of_values(cls, values: Mapping[str, Any]) -> "PruneOptions":
        """Make it from values by name, which are not checked; those of the training are among them."""
        own = {name: values[name] for name in options_of(cls)}
        return cls(**own, training=with_values(FINE_TUNING, values))


# The options of training that the command line has, in the order of its help.
_OF_TRAINING = (
    "config", "dataset", "data_dir", "download", "follow_links", "val_fraction", "decoder", "output", "resume",
    "policy", "epochs", "batch_size", "lr", "opt", "weight_decay", "clip_grad", "reconstruction_weight", "translate",
    *options_of(Augmentation), "seed",
    "device", "amp", "compile", "cuda_graphs", "channels_last", "eval_batch_size", "workers", "save_every",
    "results", "quiet",
)  # fmt: skip
# What help says otherwise than that of train.py.
_HELP = {
    "dataset": "data set; default the one that the weights were trained on",
    "val_fraction": "part of the training images kept for validation; default that of the weights' training, or 0.1",
    "decoder": "train with the decoder; default where the weights hold one",
    "output": "run folder; default runs/prune-WEIGHTS-DATASET-TIME",
    "policy": ", ".join(policy for policy in list_policies() if policy != "lr_finder"),
    "epochs": "passes over the training images in each round",
    "batch_size": "images a step, for policies with a fixed batch size; default 128, or 16 for fewer than 10,000 "
    "training images, 8 for fewer than 1,000",
    "lr": "base learning rate, a tenth of that of training from scratch",
    "reconstruction_weight": "weight of the reconstruction loss",
    "seed": "seed of shuffling and augmentation, and of the scored images",
    "amp": "precision of the training",
    "eval_batch_size": "images a step in evaluation and scoring",
}
_GROUP = {"decoder": "what"}
PRUNE_OPTIONS: dict[str, Option] = {
    **options_of(PruneOptions),
    **{
        name: replace(
            OPTIONS[name], help=_HELP.get(name, OPTIONS[name].help), group=_GROUP.get(name, OPTIONS[name].group)
        )
        for name in _OF_TRAINING
    },
    **policy_option_fields(policy for policy in list_policies() if policy != "lr_finder"),
}


def flat_prune_values(options: PruneOptions) -> dict[str, Any]:
    """The values of the options by name, as command lines and args.yaml have them."""
    values = {**flat_values(options.training), **{name: getattr(options, name) for name in options_of(PruneOptions)}}
    return {name: values[name] for name in PRUNE_OPTIONS if name in values}


def prune_options_text(options: PruneOptions, folder: Path) -> str:
    """The options as the text of a run folder's args.yaml, from which `--config` and `--resume` read them."""
    values = {name: value for name, value in flat_prune_values(options).items() if PRUNE_OPTIONS[name].saved}
    words = ["python", "recipes/prune.py", "--config", str(folder / "args.yaml")]
    return yaml_text(words, {**values, "keep": dict(options.keep)})
