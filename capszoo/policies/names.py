"""Policies by name."""

import difflib
from dataclasses import fields
from typing import Any

from .base import Policy
from .finder import LRFinder
from .schedules import AdaBatch, ExpDecay, Fixed, OneCycle, WarmAdaBatch, WarmRestarts

_POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Fixed, ExpDecay, OneCycle, WarmRestarts, AdaBatch, WarmAdaBatch, LRFinder)
}


def list_policies() -> list[str]:
    """The names that `create_policy` takes; "lr_finder" is among them, though it is not one to train with."""
    return list(_POLICIES)


def policy_options(name: str) -> dict[str, tuple[Any, str]]:
    """The options of a policy: name to (default, help), for command lines and configuration files."""
    return {
        option.name: (option.default, option.metadata["help"])
        for option in fields(_policy_class(name))
        if "help" in option.metadata
    }


def create_policy(name: str, *, lr: float, batch_size: int, epochs: int, num_images: int, **options: Any) -> Policy:
    """Make a policy by name.

    Args:
        name: One of `list_policies`.
        lr: The base learning rate.
        batch_size: Images a step, over all devices together, for the policies with a fixed batch size.
        epochs: Epochs of the whole run.
        num_images: Training images seen in an epoch.
        options: The policy's own, see `policy_options`.

    Raises:
        ValueError: The name, an option or a value is not known or does not fit; one line with the remedy.
    """
    policy = _policy_class(name)
    known = list(policy_options(name))
    for key in options:
        if key not in known:
            raise _unknown(f"policy '{name}' has no option", key, known)
    return policy(base_lr=lr, base_batch_size=batch_size, epochs=epochs, num_images=num_images, **options)


def _policy_class(name: str) -> type[Policy]:
    if name not in _POLICIES:
        raise _unknown("unknown policy", name, list(_POLICIES))
    return _POLICIES[name]


def _unknown(what: str, name: Any, known: list[str]) -> ValueError:
    near = difflib.get_close_matches(str(name), known, n=1)
    guess = f"did you mean '{near[0]}'? " if near else ""
    return ValueError(f"{what} {name!r}: {guess}" + (f"choose from {', '.join(known)}" if known else "it has none"))
