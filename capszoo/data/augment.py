"""Augmentation of training images: the options, by timm's names where timm has them, and their checks.

Flips, shifts, crops, rotations and erased boxes are drawn for a whole epoch and applied to batches on the device
(:mod:`.batch_transforms`), mixing too (:mod:`.mixing`). What timm has for PIL images alone (automatic augmentation,
colours, blur) goes through timm's own transforms in processes that read images (:mod:`.image_transforms`); so do the
random crops of images that are read from disk, which are cut out of the whole file and resized once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from capszoo.errors import UsageError, unknown_name
from capszoo.fields import NOT_NEGATIVE, Range, check_needs, option, options_of, words

__all__ = ["Augmentation"]

_GROUP = "augmentation"
_PROBABILITY = Range("0 to 1", lambda value: 0 <= value <= 1)
_DEGREES = Range("degrees from 0 to 180", lambda value: 0 <= value <= 180)
_SHEAR = Range("degrees from 0, below 90", lambda value: 0 <= value < 90)
_BLOCKS = Range("1 to 100", lambda value: 1 <= value <= 100)

# What bounds each pair, and what to give otherwise.
_PAIRS = {
    "scale": (0.0, 1.0, "two numbers above 0, up to 1, the smaller first, such as 0.5 1"),
    "ratio": (0.0, 1e6, "two numbers above 0, the smaller first, such as 0.75 1.33"),
    "rescale": (0.0, 1e6, "two numbers above 0, the smaller first, such as 0.8 1.2"),
    "cutmix_minmax": (0.0, 1.0, "two numbers above 0, up to 1, the smaller first, such as 0.2 0.8"),
}
# What mixes images.
_MIXING = ("mixup", "cutmix", "cutmix_minmax")
# timm's policies and the sections that may follow their names.
_OF_AUTO = ("mstd",)
_POLICIES = {
    "rand": ("m", "n", "p", "mstd", "mmax", "inc"),
    "augmix": ("m", "w", "d", "a", "b", "mstd"),
    "original": _OF_AUTO,
    "originalr": _OF_AUTO,
    "v0": _OF_AUTO,
    "v0r": _OF_AUTO,
    "3a": _OF_AUTO,
}
_RAND_SETS = ("tweights", "t3a", "t3aw")
_WHOLE_SECTIONS = ("m", "n", "mmax", "inc", "w", "d", "b")
# torchvision's blur, whose kernel timm makes this wide, reflects half of it.
_BLUR_KERNEL = 23


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images are changed at random; by default not at all.

    Every change is drawn from (seed, epoch) and the place of the image in the epoch. Pixels from outside an image are
    zero, before it is normalised.
    """

    hflip: float = option(0.0, "probability of a flip from left to right", _GROUP, read=float, within=_PROBABILITY)
    vflip: float = option(0.0, "probability of a flip upside down", _GROUP, read=float, within=_PROBABILITY)
    alternate_flip: bool = option(
        False,
        "flip each image from left to right in every other epoch, the first or the second by chance",
        _GROUP,
        flag=True,
    )
    scale: list[float] | None = option(
        None,
        "crop this part of the area at random and resize it; 0.08 1 if --ratio is given alone",
        _GROUP,
        read=float,
        many="+",
        metavar=("LEAST", "MOST"),
    )
    ratio: list[float] | None = option(
        None,
        "width over height of these crops; 0.75 1.33 if --scale is given alone",
        _GROUP,
        read=float,
        many="+",
        metavar=("LEAST", "MOST"),
    )
    train_interpolation: str = option(
        "bilinear",
        "how crops and rotated images are resampled",
        _GROUP,
        choices=("bilinear", "bicubic", "random"),
        needs=("scale", "ratio", "rotate", "shear", "rescale", "aa"),
    )
    rotate: float = option(
        0.0, "rotate by up to so many degrees either way", _GROUP, read=float, within=_DEGREES, metavar="DEGREES"
    )
    shear: float = option(
        0.0,
        "shear along the rows by up to so many degrees either way",
        _GROUP,
        read=float,
        within=_SHEAR,
        metavar="DEGREES",
    )
    rescale: list[float] | None = option(
        None,
        "enlarge the content about the centre by a factor in this range; the frame stays",
        _GROUP,
        read=float,
        many="+",
        metavar=("LEAST", "MOST"),
    )
    color_jitter: list[float] | None = option(
        None,
        "change brightness, contrast and saturation by up to this part; or one number for each, and for the hue",
        _GROUP,
        read=float,
        many="+",
        metavar="PART",
    )
    color_jitter_prob: float | None = option(
        None, "probability of it; default 1", _GROUP, read=float, within=_PROBABILITY, needs=("color_jitter",)
    )
    grayscale_prob: float = option(0.0, "probability of a grey image", _GROUP, read=float, within=_PROBABILITY)
    gaussian_blur_prob: float = option(0.0, "probability of a blur", _GROUP, read=float, within=_PROBABILITY)
    aa: str | None = option(
        None,
        "automatic augmentation as timm writes it: rand-m9-mstd0.5, augmix-m5, original, v0, 3a ...",
        _GROUP,
        metavar="POLICY",
    )
    reprob: float = option(0.0, "probability of random erasing", _GROUP, read=float, within=_PROBABILITY)
    remode: str = option(
        "pixel",
        "erase with the mean colour, a random colour, or random pixels",
        _GROUP,
        choices=("const", "rand", "pixel"),
        needs=("reprob",),
    )
    recount: int = option(1, "boxes that are erased in an image", _GROUP, read=int, within=_BLOCKS, needs=("reprob",))
    mixup: float = option(
        0.0,
        "alpha of mixup: the share of an image in a mixed one is drawn from Beta(alpha, alpha)",
        _GROUP,
        read=float,
        within=NOT_NEGATIVE,
    )
    cutmix: float = option(
        0.0, "alpha of cutmix, likewise the part of the area", _GROUP, read=float, within=NOT_NEGATIVE
    )
    cutmix_minmax: list[float] | None = option(
        None,
        "cutmix whose box has sides in this range, in parts of the image's",
        _GROUP,
        read=float,
        many="+",
        metavar=("LEAST", "MOST"),
    )
    mixup_prob: float = option(
        1.0, "probability of mixup or cutmix", _GROUP, read=float, within=_PROBABILITY, needs=_MIXING
    )
    mixup_switch_prob: float = option(
        0.5, "probability of cutmix where both are given", _GROUP, read=float, within=_PROBABILITY, needs=_MIXING
    )
    mixup_mode: str = option(
        "batch",
        "mix by one share a batch, a pair, or an image",
        _GROUP,
        choices=("batch", "pair", "elem"),
        needs=_MIXING,
    )
    mixup_off_epoch: int = option(
        0, "mix no more after so many epochs; 0 for always", _GROUP, read=int, within=NOT_NEGATIVE, needs=_MIXING
    )

    @property
    def crops(self) -> bool:
        """Whether a part of each image is cut out and resized."""
        return self.scale is not None or self.ratio is not None

    @property
    def moves(self) -> bool:
        """Whether images are rotated, sheared or rescaled."""
        return bool(self.rotate or self.shear or self.rescale)

    @property
    def needs_pil(self) -> bool:
        """Whether an image must go through PIL."""
        return bool(self.color_jitter or self.grayscale_prob or self.gaussian_blur_prob or self.aa)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, so that labels are weights of the classes."""
        return bool(self.mixup or self.cutmix or self.cutmix_minmax)

    def check(self) -> None:
        """Check the values.

        Raises:
            UsageError: If one is out of range, or has no effect because of another.
        """
        for name, what in options_of(Augmentation).items():
            value = getattr(self, name)
            if what.within is not None and value is not None and not what.within.holds(value):
                raise UsageError(f"{self._given(name)} is out of range: give {what.within.text}")
            if what.choices and value not in what.choices:
                raise UsageError(f"{self._given(name)} is unknown: give one of {', '.join(what.choices)}")
        for name, (least, most, remedy) in _PAIRS.items():
            pair = getattr(self, name)
            if pair is not None and not (len(pair) == 2 and least < pair[0] <= pair[1] <= most):
                raise UsageError(f"{self._given(name)} is out of range: give {remedy}")
        check_needs(self)
        if self.alternate_flip and self.hflip:
            raise UsageError(f"--alternate-flip does not go with {self._given('hflip')}: give one of them")
        if self.color_jitter is not None:
            self._check_color_jitter(self.color_jitter)
        if self.aa is not None:
            _check_policy(self.aa)

    def check_images(
        self,
        image_shape: tuple[int, int, int],
        multi_label: bool = False,
        on_disk: bool = False,
        has_parts: bool = False,
    ) -> None:
        """Check that images can be changed so.

        Args:
            image_shape: Their channels, height and width.
            multi_label: Whether they may show several classes.
            on_disk: Whether they are read while they are used.
            has_parts: Whether they are composed of others, which must change as they do.

        Raises:
            UsageError: If they cannot.
        """
        channels, height, width = image_shape
        through_pil = ["aa", "color_jitter", "grayscale_prob", "gaussian_blur_prob"]
        through_pil += ["scale", "ratio"] if on_disk else []
        impossible = [("images of 2 channels", through_pil if channels == 2 else [])]
        impossible += [("images that are composed of others", [*through_pil, *_MIXING] if has_parts else [])]
        for what, names in impossible:
            for name in names:
                if getattr(self, name):
                    raise UsageError(f"{self._given(name)} does not go with {what}: leave it out")
        if channels == 1 and self.grayscale_prob:
            raise UsageError(f"{self._given('grayscale_prob')} changes no grey image: leave it out, or --in-chans 3")
        if channels == 1 and any((self.color_jitter or [])[3:]):
            raise UsageError(f"{self._given('color_jitter')} has a hue, and images are grey: give one number")
        if self.gaussian_blur_prob and min(height, width) <= _BLUR_KERNEL // 2:
            raise UsageError(
                f"{self._given('gaussian_blur_prob')} blurs by {_BLUR_KERNEL} pixels, and images have {height}x{width}:"
                " leave it out, or give a larger --img-size"
            )
        if multi_label and (self.cutmix or self.cutmix_minmax):
            name = "cutmix" if self.cutmix else "cutmix_minmax"
            raise UsageError(
                f"{self._given(name)} may cut out one of several classes that an image shows: use --mixup, or images "
                "of one class each"
            )
        if self.cutmix_minmax and any(
            int(side * self.cutmix_minmax[0]) >= int(side * self.cutmix_minmax[1]) for side in (height, width)
        ):
            raise UsageError(
                f"{self._given('cutmix_minmax')} leaves no choice of a box in images of {height}x{width}: give numbers "
                "further apart"
            )

    def check_batches(self, batch_sizes: Iterable[int]) -> None:
        """Check that batches of these sizes, one of each epoch, can be mixed; images are mixed in pairs.

        Raises:
            UsageError: If one is odd.
        """
        sizes = list(batch_sizes)
        sizes = sizes[: self.mixup_off_epoch] if self.mixup_off_epoch else sizes
        odd = sorted({size for size in sizes if size % 2})
        if self.mixes and odd:
            name = next(name for name in _MIXING if getattr(self, name))
            raise UsageError(
                f"{self._given(name)} mixes pairs of images, and a batch has {odd[0]}: give an even --batch-size (with "
                f"a policy that begins with small batches also --warm-batch), or leave --{name.replace('_', '-')} out"
            )

    def _given(self, name: str) -> str:
        """The words that give an option its value."""
        return " ".join(words(name, getattr(self, name), options_of(Augmentation)[name]))

    def _check_color_jitter(self, parts: list[float]) -> None:
        if len(parts) not in (1, 3, 4):
            raise UsageError(
                f"{self._given('color_jitter')} are {len(parts)} numbers: give one, three (brightness, contrast, "
                "saturation), or four (and hue)"
            )
        if not all(0 <= part < math.inf for part in parts) or any(part > 0.5 for part in parts[3:]):
            raise UsageError(f"{self._given('color_jitter')} is out of range: give 0 or more, as a hue 0 to 0.5")


def _check_policy(text: str) -> None:
    """Check a policy of automatic augmentation, of which timm passes over sections that it does not know."""
    name, *sections = str(text).split("-")
    if name not in _POLICIES:
        raise UsageError(
            f"--aa {text}: " + unknown_name("policy", name, _POLICIES, f"give one of {', '.join(_POLICIES)}")
        )
    known = _POLICIES[name]
    for section in sections:
        if name == "rand" and section in _RAND_SETS:
            continue
        found: Any = re.fullmatch(r"([a-z]+)(\d+)(\.\d+)?", section)
        if not found or found[1] not in known:
            given = found[1] if found else section
            more = f" or {', '.join(_RAND_SETS)}" if name == "rand" else ""
            otherwise = f"give {', '.join(known)} with a number each{more}, such as {name}-{known[0]}5"
            raise UsageError(f"--aa {text}: " + unknown_name("section", given, [*known, *_RAND_SETS], otherwise))
        if found[1] in _WHOLE_SECTIONS and found[3]:
            raise UsageError(f"--aa {text}: {section} is not a whole number: give {found[1]}{found[2]}")
