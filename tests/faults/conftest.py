"""What tests of faults share: a run that nothing happened to. Their helpers are also those of a script, kills.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from small_runs import make_splits, make_trainer


@pytest.fixture(scope="module")
def splits():
    return make_splits()


@pytest.fixture(scope="module")
def whole(splits, tmp_path_factory):
    """A run that nothing happened to."""
    trainer = make_trainer(splits, tmp_path_factory.mktemp("whole"))
    assert trainer.fit()
    return trainer
