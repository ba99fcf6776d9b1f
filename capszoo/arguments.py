"""Arguments of models: held against the annotations of their constructors, and those that a search varies."""

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

# What an argument takes, by the types that annotations name.
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping of names to values",
    torch.device: "a device",
    torch.dtype: "a floating-point torch.dtype",
}


@dataclass(frozen=True)
class SearchedArgument:
    """An argument of a model that :mod:`capszoo.explore` varies: what a model's `search_space()` gives a list of.

    Attributes:
        keyword: Keyword of the model's constructor.
        values: What it may be. A range is searched as whole numbers, of which neighbours are alike; all else is choices
            (true, false, numbers, text), or maps such choices to values. Of the value None the argument is left out.
        first: The choice of the network that is not reduced, which is tried first; that of `values` by default.
        name: Its name in a study; the keyword by default.
        needs: An argument before this one that must be true, else this one is left out.
    """

    keyword: str
    values: range | Sequence[Any] | Mapping[Any, Any]
    first: Any = None
    name: str = ""
    needs: str = ""

    @property
    def study_name(self) -> str:
        """Its name in a study."""
        return self.name or self.keyword

    @property
    def first_choice(self) -> Any:
        """The choice that is tried first."""
        return next(iter(self.values)) if self.first is None else self.first


def check_value(key: str, value: Any, annotation: Any) -> Any:
    """Return an argument as Python's own numbers, lists and text, if it is what the annotation says."""
    plain = _plain(value)
    if plain is None or _is_kind(plain, annotation):
        return plain
    try:
        shown = " ".join(reprlib.repr(value).split())  # arrays take lines
    except ValueError:
        shown = "(thousands of digits)"
    numbers = _numbers(value) if isinstance(value, str) else []
    meant = [item for item in ([*numbers, numbers] if len(numbers) == 1 else [numbers]) if _is_kind(item, annotation)]
    hint = f", {key}={meant[0]}" if numbers and meant else ""
    raise ValueError(f"{key}={shown} is not possible: give {_describe(annotation)}{hint}")


def _plain(value: Any) -> Any:
    """Numbers and sequences, those of numpy and torch too, as Python's own numbers and lists; the rest as it is."""
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item) for item in value]
    return value


def _is_kind(value: Any, annotation: Any) -> bool:
    """Whether a value, as `_plain` gives it, is of the type that an annotation names."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(_is_kind(value, kind) for kind in inner)
    if origin is tuple and inner[-1] is not Ellipsis:
        return type(value) is list and len(value) == len(inner) and all(map(_is_kind, value, inner))
    if origin in (tuple, list, Sequence):
        return type(value) is list and all(_is_kind(item, inner[0]) for item in value)
    if annotation is float:
        return _is_kind(value, int) or (isinstance(value, float) and math.isfinite(value))
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is torch.device:  # a number is that of a GPU
        return isinstance(value, torch.device) or _is_kind(value, int)
    if annotation is torch.dtype:
        return value is float or (isinstance(value, torch.dtype) and value.is_floating_point)
    return isinstance(value, annotation)


def _describe(annotation: Any) -> str:
    """What an annotation says that an argument takes, in words."""
    origin, inner = get_origin(annotation), [kind for kind in get_args(annotation) if kind is not NoneType]
    if origin in (Union, UnionType):
        return " or ".join(map(_describe, inner))
    if origin in (tuple, list, Sequence):
        count = f"{len(inner)} " if origin is tuple and inner[-1] is not Ellipsis else ""
        return f"a list of {count}{_describe(inner[0]).removeprefix('a ')}s"
    return _KINDS[annotation]


def _numbers(text: str) -> list[int | float]:
    """The numbers that a text such as '(20, 32)', '20x32' or '1e-3' stands for; none if it is anything else."""
    try:
        return [int(word) if word.isdecimal() else float(word) for word in re.split("[ ,x]+", text.strip("[( )]"))]
    except ValueError:
        return []
