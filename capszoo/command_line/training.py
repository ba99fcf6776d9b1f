"""The command line of a training run, made from its options."""

import argparse
from collections.abc import Sequence

from capszoo.engine.options import DEFAULTS, OPTIONS, flat_values, policy_option_fields

from .parser import OptionParser, add_options

# Options that only say where and how a run is computed may change when it is resumed.
MAY_CHANGE_ON_RESUME = {name for name, option in OPTIONS.items() if option.may_change}


def build_parser() -> OptionParser:
    """The options of a training run, with their defaults."""
    parser = OptionParser(description="Train a capsule network.")
    add_options(parser, OPTIONS, flat_values(DEFAULTS))
    return parser


def add_policy_options(parser: argparse.ArgumentParser, policies: Sequence[str]) -> None:
    """Give a recipe an option for every option of these policies, None where it is not given."""
    add_options(parser, policy_option_fields(policies), {})
