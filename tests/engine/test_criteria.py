"""Criteria through the header of a weights' file."""

import json

import numpy as np
import pytest
import torch

from capszoo.engine.criteria import (
    class_weights,
    criterion_header,
    read_criterion,
    weigh_classes,
    without_weights,
)
from capszoo.errors import CheckpointError, UsageError
from capszoo.losses import CrossEntropyLoss, MarginLoss, SpreadLoss


@pytest.mark.parametrize(
    "criterion",
    [MarginLoss(0.8, 0.2, 0.4), SpreadLoss(0.7, first_margin=0.1), SpreadLoss(0.5), CrossEntropyLoss(0.1)],
)
def test_back_from_the_header(criterion):
    header = {key: json.dumps(value) for key, value in criterion_header(criterion).items()}
    assert repr(read_criterion("file", header)) == repr(criterion)


def test_class_weights_come_back_from_the_header():
    criterion = MarginLoss()
    weigh_classes(criterion, torch.tensor([1.0, 2.0, 0.5]))
    header = {key: json.dumps(value) for key, value in criterion_header(criterion).items()}
    found = read_criterion("file", header)
    assert found.weight.tolist() == [1.0, 2.0, 0.5] and found.reduction == criterion.reduction == "batchmean"
    for damage in ("[1, 0, 2]", "[1, -1, 2]", "3", '["a", 1, 1]', "[1, NaN, 2]"):
        damaged = {"criterion": header["criterion"].replace("[1.0, 2.0, 0.5]", damage)}
        with pytest.raises(CheckpointError, match="^'file' is damaged .*: use another checkpoint$"):
            read_criterion("file", damaged)
    model = torch.nn.Identity()
    model.num_classes = 2
    with pytest.raises(CheckpointError, match="3 class weights for 2 classes"):
        read_criterion("file", header, model)


def test_balanced_weights_are_those_of_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight

    labels = torch.tensor([0] * 6 + [1] * 3 + [3])
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels.numpy())
    found = class_weights(["balanced"], labels, 4)
    assert found[[0, 1, 3]].tolist() == pytest.approx(expected) and found[2] == 1  # of no image
    assert found[labels].mean().item() == pytest.approx(1)
    several = torch.nn.functional.one_hot(labels, 4).float()
    several[0, 3] = 1
    assert class_weights(["balanced"], several, 4).tolist() == pytest.approx([10 / 18, 10 / 9, 1, 10 / 6])
    assert class_weights(["none"], labels, 4) is class_weights(None, labels, 4) is None
    assert class_weights([1.0, 2.0, 3.0, 4.0], labels, 4).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ([1.0, 2.0], "--class-weights 1.0 2.0 has 2 numbers for 3 classes: give one for each"),
        ([1.0, 0.0, 1.0], "--class-weights 1.0 0.0 1.0 is out of range: give numbers above 0"),
        ([1.0, float("nan"), 1.0], "is out of range"),
        (["balanced", 1.0], "--class-weights balanced 1.0 is unknown: give balanced, none, or a number for each class"),
    ],
)
def test_class_weights_that_are_refused(choice, expected):
    with pytest.raises(UsageError, match=f"^[^\n]*{expected}[^\n]*$"):
        class_weights(choice, torch.tensor([0, 1, 2]), 3)


@pytest.mark.parametrize("kind", [MarginLoss, CrossEntropyLoss, SpreadLoss])
def test_weighted_criteria_count_alike_in_parts_and_in_small_batches(kind):
    scores, target = torch.rand(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 0, 1])
    weight = torch.tensor([1.0, 4.0, 0.5])
    criterion = kind()
    weigh_classes(criterion, weight)
    whole = criterion(scores, target)
    parts = torch.stack([criterion(scores[i : i + 1], target[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(whole, parts.mean())
    plain = torch.stack([kind()(scores[i : i + 1], target[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(parts, plain * weight[target])
    torch.testing.assert_close(without_weights(criterion)(scores, target), plain.mean())
    assert criterion.weight is not None and without_weights(kind()) is not None
    soft = torch.nn.functional.one_hot(target, 3).double()
    torch.testing.assert_close(criterion(scores, soft), whole)


def test_criteria_of_families():
    cross_entropy = torch.nn.CrossEntropyLoss()
    weigh_classes(cross_entropy, torch.ones(3))
    assert cross_entropy.weight.tolist() == [1, 1, 1] and cross_entropy.reduction == "mean"
    with pytest.raises(UsageError, match="--class-weights: MSELoss, which the model trains on, takes none"):
        weigh_classes(torch.nn.MSELoss(), torch.ones(3))
