"""Criteria through the header of a weights' file."""

import json

import pytest
import torch

from capszoo.engine.criteria import criterion_header, read_criterion
from capszoo.losses import CrossEntropyLoss, MarginLoss, SpreadLoss


@pytest.mark.parametrize(
    "criterion",
    [MarginLoss(0.8, 0.2, 0.4), SpreadLoss(0.7, first_margin=0.1), SpreadLoss(0.5), CrossEntropyLoss(0.1)],
)
def test_back_from_the_header(criterion):
    header = {key: json.dumps(value) for key, value in criterion_header(criterion).items()}
    assert repr(read_criterion("file", header)) == repr(criterion)


def test_class_weights_are_not_in_the_header():
    assert criterion_header(CrossEntropyLoss(weight=torch.ones(3))) == {}
