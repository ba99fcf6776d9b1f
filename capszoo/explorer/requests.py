"""What a request of the page may hold: JSON of the right keys, types, ranges and sizes, and nothing else."""

import json
import math
from collections.abc import Sequence
from typing import Any, NoReturn

from capszoo.errors import CapszooError

from .looking import Network

__all__ = ["RequestError", "answer_draw", "answer_look", "longest_body", "read_json"]

# Capsules of any network are far below; beyond, a decoder would draw nothing but noise.
LARGEST_NUMBER = 1000.0


class RequestError(CapszooError):
    """A request that cannot be answered; the message is one line that says what is wrong.

    Attributes:
        status: The status of the answer.
    """

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


def longest_body(networks: Sequence[Network]) -> int:
    """Bytes of the longest request that can be right."""
    sizes = (max(5 * math.prod(n.shape), 26 * n.dims * len(n.classes)) for n in networks)
    return 1024 + max(sizes)


def read_json(body: bytes) -> dict[str, Any]:
    """Read the body of a request.

    Raises:
        RequestError: If it is not an object of JSON.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        values = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError):
        raise RequestError("the body is not JSON: send an object") from None
    if not isinstance(values, dict):
        raise RequestError("the body is not an object of JSON: send one")
    return values


def answer_look(networks: Sequence[Network], values: dict[str, Any]) -> dict[str, Any]:
    """Answer ``{"model": 0, "pixels": [0 to 255, ...], "target": null or a class}``, see :meth:`Network.look`."""
    _check_keys(values, ("model", "pixels"), ("target",))
    network = networks[_index(values["model"], len(networks), "model")]
    count = math.prod(network.shape)
    pixels = values["pixels"]
    if not isinstance(pixels, list) or len(pixels) != count:
        raise RequestError(f"pixels must be a list of {count} numbers")
    if not all(type(value) is int and 0 <= value <= 255 for value in pixels):
        raise RequestError("pixels must be whole numbers from 0 to 255")
    target = values.get("target")
    return network.look(pixels, None if target is None else _index(target, len(network.classes), "target"))


def answer_draw(networks: Sequence[Network], values: dict[str, Any]) -> dict[str, Any]:
    """Answer ``{"model": 0, "target": a class, "capsules": [numbers]}``, see :meth:`Network.draw`."""
    _check_keys(values, ("model", "capsules", "target"), ())
    network = networks[_index(values["model"], len(networks), "model")]
    if network.drawing is None:
        raise RequestError(f"model {values['model']} has no decoder to draw with")
    capsules, count = values["capsules"], network.dims * len(network.classes)
    if not isinstance(capsules, list) or len(capsules) != count:
        raise RequestError(f"capsules must be a list of {count} numbers")
    if not all(type(v) in (int, float) and -LARGEST_NUMBER <= v <= LARGEST_NUMBER for v in capsules):
        raise RequestError(f"capsules must be numbers from {-LARGEST_NUMBER:g} to {LARGEST_NUMBER:g}")
    return network.draw(capsules, _index(values["target"], len(network.classes), "target"))


def _check_keys(values: dict[str, Any], needed: Sequence[str], possible: Sequence[str]) -> None:
    for key in needed:
        if key not in values:
            raise RequestError(f"the request has no {key!r}")
    for key in values:
        if key not in needed and key not in possible:
            raise RequestError(f"the request has an unknown key {key[:40]!r}")


def _index(value: Any, count: int, name: str) -> int:
    if type(value) is not int or not 0 <= value < count:
        raise RequestError(f"{name} must be a whole number from 0 to {count - 1}")
    return value
