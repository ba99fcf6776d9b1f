"""Policies by name, and the errors of their options."""

import math

import pytest

from capszoo.policies import create_policy, list_policies, policy_options

LR = 0.001
BATCH = 128
NAMES = ["fixed", "exp_decay", "one_cycle", "warm_restarts", "ada_batch", "warm_ada_batch", "lr_finder"]


def make(name, epochs=30, num_images=60000, lr=LR, batch_size=BATCH, **options):
    return create_policy(name, lr=lr, batch_size=batch_size, epochs=epochs, num_images=num_images, **options)


def error(name, **arguments):
    with pytest.raises(ValueError) as caught:
        make(name, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_names_are_listed_and_near_matches_offered():
    assert list_policies() == NAMES
    assert "did you mean 'warm_ada_batch'?" in error("warm_adabatch")
    assert "did you mean 'one_cycle'?" in error("OneCycle".lower())
    far = error("zzzzzz")
    assert "did you mean" not in far and all(name in far for name in NAMES)
    with pytest.raises(ValueError, match="did you mean 'exp_decay'"):
        policy_options("expdecay")
    assert "no option 'warm_epoch': did you mean 'warm_epochs'?" in error("ada_batch", warm_epoch=2)
    assert "no option 'maxlr': did you mean 'max_lr'?" in error("one_cycle", maxlr=2)
    assert "'fixed' has no option 'max_lr'" in error("fixed", max_lr=2)
    assert "no option 'base_lr'" in error("one_cycle", base_lr=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "argument, values",
    [
        ("lr", [0, -0.1, math.nan, math.inf, "1e-3", None, True]),
        ("batch_size", [0, -1, 2.0, "128", None, True]),
        ("epochs", [0, -1, 30.0, "30", None, True, 10**20]),
        ("num_images", [0, -1, 1e4, None]),
    ],
)
def test_errors_of_shared_arguments(name, argument, values):
    for value in values:
        message = error(name, **{argument: value})
        assert f"'{name}'" in message and f"{argument}={value!r}" in message and "pass a" in message


@pytest.mark.parametrize("name", ["ada_batch", "warm_ada_batch"])
def test_errors_of_epochs_that_do_not_fit(name):
    assert error(name, epochs=2) == (
        f"policy '{name}' needs more than warm_epochs=3 epochs, got epochs=2: raise epochs to 4 or more, "
        "or set warm_epochs=1"
    )
    assert "set warm_epochs=2" in error(name, epochs=3)
    for epochs, warm_epochs in ((4, 3), (2, 1), (1, 0)):  # the remedies hold
        make(name, epochs=epochs, warm_epochs=warm_epochs)
    for option in ("warm_batch", "first_batch", "grow_factor"):
        assert f"{option}=0: pass a whole number, 1 or more" in error(name, **{option: 0})
    for option in ("warm_epochs", "grow_every", "max_growths"):
        assert f"{option}=-1: pass a whole number, 0 or more" in error(name, **{option: -1})
        assert f"{option}=1.5" in error(name, **{option: 1.5})


@pytest.mark.parametrize("name", ["one_cycle", "warm_restarts", "warm_ada_batch"])
def test_errors_of_rates(name):
    for value in ("ten", "x", "10 y", "", "nan", "infx", None, True, [1]):
        assert f"max_lr={value!r}" in error(name, max_lr=value) and '"10x"' in error(name, max_lr=value)
    for value in ("0.5x", 0.0009, -1, "-3x", 0):
        assert f"max_lr={value!r}, which is below 0.001" in error(name, max_lr=value)
    make(name, max_lr="1x")


def test_errors_of_one_cycle():
    assert "final_lr='low'" in error("one_cycle", final_lr="low") and "below 0" in error("one_cycle", final_lr=-1)
    for rise, fall_end in ((0.9, 0.9), (0.95, 0.9), (0.5, 1), (0.5, 1.5)):
        assert "0 < rise < fall_end < 1" in error("one_cycle", rise=rise, fall_end=fall_end)
    assert "rise=0: pass a fraction" in error("one_cycle", rise=0)
    assert "fall_end='late'" in error("one_cycle", fall_end="late")
    assert "at least 3 steps to rise, fall and end, got 2" in error("one_cycle", epochs=2, num_images=100)
    make("one_cycle", epochs=3, num_images=100)


def test_errors_of_warm_restarts():
    message = error("warm_restarts", epochs=8, cycle_epochs=9)
    assert "cycle_epochs=9, longer than the run, epochs=8" in message and "set cycle_epochs=8" in message
    make("warm_restarts", epochs=8, cycle_epochs=8)
    for value in (0, -1, 2.5, "soon", "-3", True):
        assert f"cycle_epochs={value!r}" in error("warm_restarts", cycle_epochs=value)
    for value in (0, 1.5):
        assert f"cycle_mult={value!r}" in error("warm_restarts", cycle_mult=value)


def test_errors_of_exp_decay():
    for option, values in (("decay_rate", (0, -1, 1.01, "fast")), ("decay_steps", (0, 10.0)), ("staircase", ("no", 1))):
        for value in values:
            assert f"{option}={value!r}" in error("exp_decay", **{option: value})


def test_errors_of_lr_finder():
    assert "to 10^463 in its 46900 steps (epochs=100): lower epochs" in error("lr_finder", epochs=100)
    for option, value in (("steps_per_decade", 0), ("steps_per_decade", 1.5), ("start_exponent", "low")):
        assert f"{option}={value!r}" in error("lr_finder", **{option: value})


@pytest.mark.parametrize("name", NAMES)
def test_options_have_defaults_and_help(name):
    options = policy_options(name)
    assert make(name, **{option: default for option, (default, _) in options.items()}) == make(name)
    assert all(help and "\n" not in help and "%" not in help for _, help in options.values())
    assert not {"lr", "batch_size", "epochs", "num_images", "name"} & set(options)
