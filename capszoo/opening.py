"""Open a model with its weights, from the name of shipped weights or from a file, and data for it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg
from torch import nn

from .checkpoint import read_metadata
from .data import DataSplits, Split, list_datasets, load_data, load_test_folder
from .data.sets import VAL_FRACTION
from .errors import UsageError, nearest
from .pretrained import image_statistics, read_table, weights_path
from .registry import (
    create_model,
    header_arguments,
    is_model,
    list_models,
    list_pretrained,
    load_model,
    model_keywords,
)

__all__ = ["OpenedModel", "is_shipped_name", "load_data_for", "load_split_for", "open_model", "warn_of_split"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedModel:
    """A model with its weights, and what is known of them.

    Attributes:
        model: The model.
        name: Its name for people: `model.tag` of shipped weights, else model and file.
        file: The file of the weights.
        header: The metadata in the file's header.
        dataset: The data set that the weights were trained on, if known.
    """

    model: nn.Module
    name: str
    file: Path
    header: dict[str, str]
    dataset: str | None

    def val_fraction(self, dataset: str, given: float | None = None) -> float:
        """The part of the training images to take as the validation split.

        Args:
            dataset: The data set; where the weights were trained on it, their own validation split is the default.
            given: What the user asks for instead; see `warn_of_split`.
        """
        own = _trained_with(self.header) if self.dataset == dataset else None
        return next(part for part in (given, own, VAL_FRACTION) if part is not None)

    def load_split(
        self, dataset: str, data_dir: str | Path, split: str, val_fraction: float | None = None, **kwargs: Any
    ) -> tuple[Split, list[str]]:
        """Load the images to measure the model on: `load_split_for`, with the weights' own validation split.

        Args:
            dataset: Name or folder of the data set.
            data_dir: Folder that has it.
            split: 'train', 'val' or 'test'.
            val_fraction: As `val_fraction` above takes it; the log says if it is another than that of the training.
            **kwargs: More for `load_split_for`, which also has what is returned and raised.
        """
        fraction = self.val_fraction(dataset, val_fraction)
        if split == "val":
            warn_of_split(self.header, dataset, fraction)
        return load_split_for(self.model, dataset, data_dir, split, val_fraction=fraction, **kwargs)


def open_model(
    name_or_file: str | Path, *, model_name: str | None = None, decoder: bool | None = None, **kwargs: Any
) -> OpenedModel:
    """Open shipped weights by name, or a safetensors file.

    Args:
        name_or_file: Name of a model with shipped weights, with or without a tag, or a file such as
            `runs/NAME/best.safetensors`, or a run folder, of which the best weights are opened, or a model folder of
            `recipes/export.py hub`.
        model_name: Model of the weights, for a file whose header does not say it.
        decoder: Open it with or without the decoder; if None with it, where the weights may have one.
        **kwargs: More keywords of the model, in place of the header's.

    Raises:
        UsageError: If there is neither such a file nor such a name, or `model_name` does not go with it.
        ValueError: If the weights are damaged, or do not fit the model.
    """
    source = str(name_or_file).removeprefix("local-dir:")  # of timm's names, for a model folder
    if is_shipped_name(source):
        if model_name is not None:
            raise UsageError(f"{source!r} says what model it is, --model {model_name} is for files: leave it out")
        if decoder is None and "decoder" in model_keywords(source):
            decoder = _ships_decoder(source)
        model = create_model(source, pretrained=True, **_with_decoder(decoder, kwargs))
        cfg: Any = model.pretrained_cfg
        name = f"{source.partition('.')[0]}.{cfg['tag']}"
        file = weights_path(name)
        return OpenedModel(model, name, file, read_metadata(file), read_table()[name]["dataset"])
    source = str(weights_in(source))
    if Path(source).is_dir():
        raise UsageError(
            f"folder {source!r} holds neither best.safetensors nor model.safetensors: give a run folder whose training "
            "has saved weights, or a model folder"
        )
    if not Path(source).is_file():
        near = nearest(source, [*list_models(), *list_pretrained()])
        known = ", ".join(list_pretrained()) or "none yet"
        rest = f", did you mean {near!r}?" if near else f" (there are: {known}): check the path"
        raise UsageError(f"{source!r} is no file and no shipped weights{rest}")
    header, kwargs = read_metadata(source), _with_decoder(decoder, kwargs)
    if model_name is None:
        name = f"{header.get('model', '')} {source}".strip()
        return OpenedModel(load_model(source, **kwargs), name, Path(source), header, header.get("dataset"))
    if header.get("model", model_name) != model_name:
        raise UsageError(f"{source!r} holds weights of the model {header['model']!r}: leave out --model {model_name}")
    kwargs = {**header_arguments(source, model_name, header), **kwargs}
    model = create_model(model_name, checkpoint_path=source, **kwargs)
    return OpenedModel(model, f"{model_name} {source}", Path(source), header, header.get("dataset"))


def is_shipped_name(source: str) -> bool:
    """Whether weights are named as those of a model, and not by a file or a folder.

    Raises:
        UsageError: If it is the name of both.
    """
    if is_model(source) and weights_in(source).is_file():
        raise UsageError(
            f"{source!r} is a model's name, and that of a run folder here: give ./{source} for the folder, or rename "
            "it for the shipped weights"
        )
    return is_model(source)


def _ships_decoder(name: str) -> bool:
    """Whether the shipped weights of this name, or of a model without a tag, have a decoder."""
    cfg = get_pretrained_cfg(name)
    if cfg is None or not cfg.file:  # nothing is shipped, which `create_model` says
        return False
    return header_arguments(cfg.file, name, read_metadata(cfg.file)).get("decoder", False)


def weights_in(path: str | Path) -> Path:
    """The best weights of a run folder, or those of a model folder, where `path` is one; else `path`."""
    files = (Path(path) / name for name in ("best.safetensors", "model.safetensors"))
    return next((file for file in files if file.is_file()), Path(path))


def _with_decoder(decoder: bool | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs if decoder is None else {"decoder": decoder, **kwargs}


def load_data_for(model: nn.Module, dataset: str, data_dir: str | Path, **kwargs: Any) -> DataSplits:
    """Load a data set with images of a model's size.

    Classes of other names than the weights have are told in the log.

    Args:
        model: The model.
        dataset: Name or folder of the data set.
        data_dir: Folder that has it.
        **kwargs: More for :func:`capszoo.data.load_data`.

    Raises:
        UsageError: If it has another number of classes than the model, or the weights' in another order.
        DataError: If it cannot be loaded.
    """
    size: dict[str, Any] = {"img_size": model.img_size, "in_chans": model.in_chans}
    data = load_data(dataset, str(data_dir), **size, **kwargs)
    if data.num_classes != model.num_classes:
        raise UsageError(
            f"{dataset!r} has {data.num_classes} classes, the model has {model.num_classes}: check --dataset"
        )
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    _compare_classes(dataset, data.class_names, list(cfg.get("label_names") or []))
    return data


def load_split_for(
    model: Any,
    dataset: str,
    data_dir: str | Path,
    split: str,
    *,
    val_fraction: float = VAL_FRACTION,
    download: bool = False,
    follow_links: bool = False,
) -> tuple[Split, list[str]]:
    """Load the images to measure a model on, normalised as it takes them.

    Of a folder with `test/<class>/<image>`, or with `<class>/<image>` alone, only these are read if they are asked for.

    Args:
        model: The model.
        dataset: Name or folder of the data set.
        data_dir: Folder that has it.
        split: 'train', 'val' or 'test'.
        val_fraction: As in :func:`capszoo.data.load_data`, as are the others.
        download: See there.
        follow_links: See there.

    Returns:
        The images, and the names of their classes.

    Raises:
        UsageError: As :func:`load_data_for`, and if there is no validation split.
        DataError: If it cannot be loaded.
    """
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    names, found = list(cfg.get("label_names") or []), None
    if (
        split == "test"
        and len(names) == model.num_classes
        and dataset not in list_datasets()
        and Path(dataset).is_dir()
    ):
        found = load_test_folder(dataset, names, model.img_size, model.in_chans, follow_links=follow_links)
    if found is None:
        data = load_data_for(
            model, dataset, data_dir, val_fraction=val_fraction, download=download, follow_links=follow_links
        )
        names, found = data.class_names, {"train": data.train, "val": data.val, "test": data.test}[split]
    if found is None:
        raise UsageError(f"{dataset!r} has no validation split with --val-fraction {val_fraction}: give more")
    found.mean, found.std = image_statistics(model)
    return found, names


def _compare_classes(dataset: str, names: list[str], of_weights: list[str]) -> None:
    if of_weights == names or len(of_weights) != len(names):
        return
    # '0 - zero' is another way to write '0'.
    pairs = [(a, b) for a, b in zip(names, of_weights, strict=True) if not (a.startswith(b) or b.startswith(a))]
    if not pairs:
        return
    ours, theirs = pairs[0]
    if sorted(of_weights) == sorted(names):
        raise UsageError(
            f"{dataset!r} has its classes in another order than the weights, {ours!r} where they have {theirs!r}: "
            "name its classes so that they sort as theirs"
        )
    _logger.warning(
        f"{dataset!r} has classes of other names than the weights, such as {ours!r} where they have {theirs!r}: "
        "answers are compared by their order"
    )


def warn_of_split(header: Mapping[str, str], dataset: str, val_fraction: float) -> None:
    """Say in the log if a validation split may have images that weights were trained on: it is not their own.

    Splits of other sizes are not parts of each other.

    Args:
        header: The header of the weights.
        dataset: The data set that the split is of.
        val_fraction: Its part of the training images.
    """
    trained = _trained_with(header)
    if trained is not None and header.get("dataset") == dataset and trained != val_fraction:
        _logger.warning(
            f"the weights were trained with --val-fraction {trained:g}: of the validation split of {val_fraction:g} "
            f"they know images; give --val-fraction {trained:g}"
        )


def _trained_with(header: Mapping[str, str]) -> float | None:
    """The part of the training images that was kept for validation, where a header says it."""
    try:
        return float(header["val_fraction"])
    except (KeyError, ValueError):
        return None
