"""What tests of exploring share: the digits, solutions by hand, and small searches."""

import pytest

from capszoo.data import load_data
from capszoo.explore import Exploration, Solution, Space

SMALL = {"conv_dim": 8, "num_types": 2, "decoder_dims": [4, 8]}
OPTIONS = {"dataset": "digits", "model": "capsnet_tiny", "model_kwargs": SMALL, "amp": "none"}


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", "data", val_fraction=0.1)


@pytest.fixture(scope="session")
def solution():
    """Makes a complete solution of a few values."""

    def make(number, accuracy=0.9, seconds=10.0, parameters=1000, **kwargs):
        return Solution(number, kwargs.pop("name", "fixed"), kwargs.pop("state", "complete"), accuracy=accuracy,
                        seconds=seconds, parameters=parameters, **kwargs)  # fmt: skip

    return make


@pytest.fixture(scope="session")
def explore():
    """Makes a study of small networks."""

    def make(plan, digits, folder, **kwargs):
        folder.mkdir(exist_ok=True)
        return Exploration(plan, OPTIONS, digits, folder, **kwargs)

    return make


@pytest.fixture(scope="session")
def small_space():
    """Makes a space of one policy and a small network."""

    def make(digits, epochs):
        return Space("capsnet_tiny", digits, epochs, fixed={"policy": "fixed", "model_kwargs": SMALL})

    return make


@pytest.fixture(scope="module")
def searched(digits, tmp_path_factory, explore, small_space):
    """A finished search of ten small trials."""
    folder = tmp_path_factory.mktemp("searched")
    exploration = explore(small_space(digits, 2), digits, folder, trials=10)
    assert exploration.run()
    return exploration, folder
