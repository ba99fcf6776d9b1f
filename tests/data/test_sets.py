"""capszoo.data.sets: arguments of load_data."""

import pytest

from capszoo.data import load_data


@pytest.mark.parametrize(
    "kwargs",
    [
        {"val_fraction": -0.1},
        {"val_fraction": 1.0},
        {"val_fraction": float("nan")},
        {"seed": -1},
        {"in_chans": 2},
        {"img_size": 0},
        {"img_size": (28, 0)},
        {"img_size": (1, 28, 28)},
        {"img_size": "20x32"},
        {"img_size": (20, 32.0)},
    ],
)
def test_arguments_out_of_range(raises, kwargs):
    ((key, value),) = kwargs.items()
    with raises(f"{key}={value}", "give"):
        load_data("digits", **kwargs)
