"""Options as fields of dataclasses."""

from dataclasses import dataclass, fields, replace

import pytest

from capszoo.command_line import OptionParser, add_options
from capszoo.engine.options import DEFAULTS, OPTIONS, TrainingOptions, flat_values, with_values
from capszoo.errors import UsageError
from capszoo.fields import option, options_of, read_pair, read_size, read_values, words


@dataclass(frozen=True)
class Meal:
    soup: str = option("hot", "which soup, by 50 %", "first", choices=("hot", "cold"))
    guests: int = option(2, "how many", "first", read=int)
    bread: bool = option(True, "with bread", "first", flag=True, negatable=True)
    wine: bool = option(False, "with wine", "second", flag=True)
    size: int | list[int] | None = option(None, "of the table", "second", many="+", join=read_size)
    orders: list = option([], "what is ordered", "second", read=read_pair, many="*")


def parser():
    parser = OptionParser(prog="meal")
    add_options(parser, options_of(Meal), vars(Meal()))
    return parser


VALUES = {
    "soup": ("cold", ["--soup", "cold"]),
    "guests": (3, ["--guests", "3"]),
    "bread": (False, ["--no-bread"]),
    "wine": (True, ["--wine"]),
    "size": ([20, 32], ["--size", "20", "32"]),
    "orders": ([("pie", 2), ("sauce", "none")], ["--orders", "pie=2", 'sauce="none"']),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_of_files_and_of_words_are_the_same(name):
    value, expected = VALUES[name]
    assert read_values({name: value if name != "orders" else dict(value)}, options_of(Meal), "mine") == {name: value}
    assert words(name, value, options_of(Meal)[name]) == expected
    assert getattr(parser().parse_args(expected), name) == value
    assert words(name, None, options_of(Meal)[name]) == []


def test_defaults_and_help():
    assert vars(parser().parse_args([])) == vars(Meal()) and Meal().orders is not Meal().orders
    text = parser().format_help()
    assert "which soup, by 50 % (default: hot)" in text and text.index("first:") < text.index("second:")
    assert read_values({"soup": None, "guests": None}, options_of(Meal), "mine") == {}


WRONG = {
    "name": ({"guest": 3}, "mine: unknown key 'guest', did you mean 'guests'?"),
    "null of a wrong name": ({"guest": None}, "mine: unknown key 'guest', did you mean 'guests'?"),
    "number": ({"guests": "many"}, "mine: guests: invalid int value: 'many'"),
    "choice": ({"soup": "blue"}, "mine: soup: invalid choice: 'blue' (choose from 'hot', 'cold')"),
    "flag": ({"bread": 1}, "mine: bread must be true or false, not 1"),
    "list": ({"guests": [1, 2]}, "mine: guests takes one value, not [1, 2]"),
    "size": ({"size": [1, 2, 3]}, "mine: size: '1 2 3' is no size: give one number, or height and width such as"),
    "pair": ({"orders": ["pie"]}, "mine: orders: 'pie' is not of the form name=value"),
    "name of a pair": ({"orders": {"a b": 1}}, "mine: orders: 'a b=' is not of the form name=value"),
    "thousands of digits": ({"guests": 10**5000}, "mine: guests: "),
    "thousands of digits, true or false": ({"bread": 10**5000}, "mine: bread: "),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_one_line(case):
    values, expected = WRONG[case]
    with pytest.raises(UsageError) as caught:
        read_values(values, options_of(Meal), "mine")
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)
    # The values of a file on the command line are read by the same.
    with pytest.raises(UsageError) as again:
        parser().set_values(values, "mine")
    assert str(again.value) == str(caught.value)


def test_training_options_survive_being_flat():
    options = replace(DEFAULTS, seed=3, model_kwargs={"conv_dim": 8}, policy_options={"rise": 0.3})
    values = flat_values(options)
    assert with_values(DEFAULTS, values) == options and values["rise"] == 0.3 and values["max_lr"] is None
    assert list(values) == [name for name in OPTIONS if name != "config"]
    documented = set(options_of(TrainingOptions)) | {"policy_options"}
    assert documented == {field.name for field in fields(TrainingOptions)}
    assert all(option.help and option.group for option in OPTIONS.values())
