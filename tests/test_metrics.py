"""Measures against scikit-learn's, and by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from capszoo.engine.metrics import average_precision, right_answers, right_sets


def test_right_answers():
    scores = torch.tensor([[0.2, 0.9, 0.6], [0.5, 0.1, 0.49], [0.1, 0.2, 0.3]])
    assert right_answers(scores, torch.tensor([1, 0, 1])).tolist() == [True, True, False]
    several = torch.tensor([[0.0, 1, 1], [1, 0, 1], [0, 0, 0]])
    assert right_answers(scores, several).tolist() == [True, False, True]
    assert right_answers(scores, several.bool()).tolist() == [True, False, True]
    assert right_answers(scores[:0], several[:0]).shape == (0,)


def test_right_sets():
    labels = torch.tensor([[0.0, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    scores = torch.tensor([[0.1, 0.2, 0.3], [0.9, 0.8, 0.7], [0.2, 0.3, 0.1], [0.9] * 3, [0.1] * 3, [0.2, 0.2, 0.1]])
    assert right_sets(scores, labels).tolist() == [True, False, True, True, True, False]  # the last has a tie
    assert right_sets(scores[:0], labels[:0]).shape == (0,)


@given(st.integers(0, 2**31), st.integers(1, 4))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_right_sets_are_those_of_the_highest_scores(seed, k):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(20, 5, generator=generator, dtype=torch.float64)
    labels = torch.zeros(20, 5).scatter(1, torch.rand(20, 5, generator=generator).topk(k).indices, 1.0)
    highest = torch.zeros(20, 5).scatter(1, scores.topk(k).indices, 1.0)
    expected = (highest == labels).all(dim=1).tolist()
    assert right_sets(scores, labels).tolist() == expected


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]), st.booleans()), min_size=1, max_size=30),
)
@settings(max_examples=200, deadline=None)
def test_average_precision_is_that_of_scikit_learn(column):
    scores, present = (torch.tensor(values)[:, None] for values in zip(*column, strict=True))
    found = average_precision(scores, present.float()).item()
    if present.any():
        assert found == pytest.approx(average_precision_score(present[:, 0].numpy(), scores[:, 0].numpy()), abs=1e-12)
    else:
        assert found != found


def test_average_precision_of_each_class():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.7, 0.5], [0.1, 0.6, 0.5]])
    labels = torch.tensor([[1.0, 0, 0], [0, 0, 1], [1, 1, 0]])
    found = average_precision(scores, labels)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor([(1 + 2 / 3) / 2, 1 / 2, 1 / 3], dtype=torch.float64))
    assert average_precision(torch.zeros(3, 0), torch.zeros(3, 0)).shape == (0,)
