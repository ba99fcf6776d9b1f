"""`--help` of every recipe and of `capszoo predict`: each option has a text, and its default is in it."""

import argparse
import importlib
import re

import pytest

from capszoo.command_line.training import build_parser

PARSERS = "train validate predict show prune explore explorer export benchmark starts kernels".split()


def parser_of(name):
    if name == "train":
        return build_parser()
    folder = "command_line" if name == "predict" else "recipes"
    return importlib.import_module(f"capszoo.{folder}.{name}").build_parser()


def options_of(parser):
    """(parser, option) of a parser and of its subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for job in action.choices.values():
                yield from options_of(job)
        elif action.option_strings and action.dest != "help":
            yield parser, action


@pytest.mark.parametrize("name", PARSERS)
def test_every_default_is_shown(name):
    for parser, option in options_of(parser_of(name)):
        text = parser._get_formatter()._expand_help(option)
        assert text and "%(" not in text, option.option_strings
        if any(option.default is no for no in (None, False, argparse.SUPPRESS)) or option.required:
            continue
        if option.default == []:
            continue
        assert "default" in text, option.option_strings
        shown = text.split("default", 1)[1]
        values = option.default if isinstance(option.default, (list, tuple)) else [option.default]
        assert all(str(value) in shown for value in values), (option.option_strings, text)


@pytest.mark.parametrize("name", PARSERS)
def test_help_is_printed(name, capsys):
    with pytest.raises(SystemExit) as ended:
        parser_of(name).parse_args(["--help"])
    assert ended.value.code == 0 and "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train", "explore", "prune"])
def test_the_command_shows_them(name, capsys, recipe):
    with pytest.raises(SystemExit) as stopped:
        recipe(name).main(["--seed", "3", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert "folder that has the data set (default: data)" in shown and "(default: auto)" in shown
    assert re.search(r"seed of [a-z ,-]*\(default: 0\)", shown)
