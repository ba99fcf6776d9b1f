"""The options of a run."""

import pytest
import yaml

from capszoo.command_line.training import build_parser
from capszoo.engine.options import (
    DEFAULTS,
    TrainingOptions,
    check_ranges,
    fill_in,
    flat_values,
    options_from,
    with_values,
    write_options,
)
from capszoo.engine.run import make_policy
from capszoo.errors import UsageError

SMALL = {"model_kwargs": {"conv_dim": 8, "num_types": 2, "decoder_dims": [4, 8]}, "amp": "none"}


def test_no_options_are_the_command_lines_defaults():
    assert options_from({}) == TrainingOptions() == DEFAULTS
    given = vars(build_parser().parse_args([]))
    assert given == {"config": None, **flat_values(DEFAULTS), "model_kwargs": []}
    assert with_values(DEFAULTS, given) == DEFAULTS


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"epoch": 3}, "mine: unknown key 'epoch', did you mean 'epochs'"),
        ({"epochs": "many"}, "mine: epochs: .*many"),
        ({"amp": "bf17"}, "mine: amp: .*bf17"),
        ({"decoder": 3}, "mine: decoder must be true or false, not 3"),
    ],
)
def test_options_are_checked(values, expected):
    with pytest.raises(UsageError, match=expected):
        options_from(values, "mine")


def test_rate_and_batch_size_default_by_policy_and_data():
    for policy, num_images, expected in (
        ("fixed", 1000, (1e-3, 16, None)),
        ("fixed", 10_000, (1e-3, 128, None)),
        ("fixed", 999, (1e-3, 8, None)),
        ("warm_ada_batch", 10, (1e-3, 8, 15)),
        ("ada_batch", 10_000, (1e-3, 128, 1000)),
    ):
        options = options_from({"policy": policy})
        filled = fill_in(options, num_images)
        assert (filled.lr, filled.batch_size, filled.policy_options.get("warmup_steps")) == expected
        made = make_policy(options, num_images)
        assert (made.base_batch_size, made.warmup_steps) == (filled.batch_size, expected[2] or 0)
        assert options == options_from({"policy": policy}) and fill_in(filled, num_images) == filled


def test_written_options_are_read_back(tmp_path):
    args = options_from({**SMALL, "lr": 0.5, "policy": "one_cycle", "max_lr": "3x"})
    write_options(args, tmp_path)
    assert options_from(yaml.safe_load((tmp_path / "args.yaml").read_text())) == args


def test_warm_up_is_no_longer_than_half_of_the_first_phase():
    for values, expected in (
        ({"warm_epochs": 1, "warm_batch": 4}, 12),
        ({"warm_epochs": 0, "first_batch": 10, "epochs": 4}, 20),
        ({"warm_epochs": 0, "first_batch": 10, "grow_every": 2}, 10),
        ({"warmup_steps": 77}, 77),
        ({"warm_epochs": 9, "warm_batch": 1, "epochs": 20}, 450),
    ):
        options = options_from({"policy": "ada_batch", "epochs": 10, **values})
        assert fill_in(options, 100).policy_options["warmup_steps"] == expected, values


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model_ema_decay": 0.5}, "--model-ema-decay 0.5 has no effect without --model-ema: give one, or leave it"),
        ({"model_ema_warmup": False}, "--no-model-ema-warmup has no effect without --model-ema"),
        ({"pretrained": True, "checkpoint": "a.safetensors"}, "--pretrained and --checkpoint a.safetensors are two"),
        ({"checkpoint": ""}, "--checkpoint is empty: give a path, or leave it out"),
        ({"output": ""}, "--output is empty"),
    ],
)
def test_options_that_have_no_effect_are_refused(values, expected):
    with pytest.raises(UsageError, match=expected):
        check_ranges(options_from(values))


def test_powers_of_ten_need_not_be_whole():
    assert options_from({"policy": "lr_finder", "start_exponent": -6.5}).policy_options == {"start_exponent": -6.5}
