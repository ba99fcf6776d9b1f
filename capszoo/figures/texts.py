"""Values of trials as text."""

import json
import math
from collections.abc import Iterable
from typing import Any


def flat(options: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Options as pairs of strings, those of the model among the others."""
    for key, value in options.items():
        if isinstance(value, dict):
            yield from flat(value)
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            yield str(key), text if len(text) <= 80 else text[:79] + "…"


def percent(value: float) -> str:
    """An accuracy."""
    return f"{100 * value:.2f} %"


def seconds_text(value: float) -> str:
    """Seconds, without their unit."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def is_number(value: Any) -> bool:
    """Whether a value is there, and finite."""
    return value is not None and math.isfinite(value)
