"""Which parts there are, and what may be asked of them."""

import pytest
import torch
from prune.networks import images, small

import capszoo
from capszoo.models import CapsNet
from capszoo.prune import prune

WRONG = {
    "unknown part": (dict(keep={"type": 2}), "unknown part 'type', did you mean 'types'"),
    "unknown score": (dict(keep={"types": 2}, score="tailor"), "unknown score 'tailor', did you mean 'taylor'"),
    "nothing": (dict(keep={}), "keep is empty"),
    "zero": (dict(keep={"types": 0}), "types=0 is not possible: there are 4, keep 1 to 4"),
    "too many": (dict(keep={"capsules": 25}), "capsules=25 is not possible: there are 24"),
    "too many of few types": (dict(keep={"types": 2, "capsules": 13}), "capsules=13 is not possible: there are 12"),
    "negative": (dict(keep={"conv1": -1}), "conv1=-1 is not possible"),
    "fraction of nothing": (dict(keep={"conv1": 0.0}), "conv1=0.0 is not possible: a fraction"),
    "fraction above one": (dict(keep={"conv1": 1.5}), "conv1=1.5 is not possible: a fraction"),
    "not a number": (dict(keep={"conv1": float("nan")}), "conv1=nan is not possible: a fraction"),
    "boolean": (dict(keep={"conv1": True}), "conv1=True is not possible: give a number"),
    "text": (dict(keep={"conv1": "8"}), "conv1='8' is not possible"),
    "none": (dict(keep={"conv1": None}), "conv1=None is not possible"),
    "no indices": (dict(keep={"types": []}), "keep at least one"),
    "twice": (dict(keep={"types": [1, 2, 1]}), "types holds index 1 twice"),
    "out of range": (dict(keep={"types": [0, 4]}), "types holds index 4: there are 4, give indices from 0 to 3"),
    "broken indices": (dict(keep={"types": [0, 1.5]}), "indices are whole numbers"),
    "one number for two layers": (dict(keep={"decoder": 5}), "decoder=5 is not possible: give a pair"),
    "three layers": (dict(keep={"decoder": (5, 5, 5)}), "give a pair"),
    "wide decoder": (dict(keep={"decoder": (8, 5)}), "decoder=8 is not possible: there are 7"),
    "no data": (dict(keep={"types": 2}, score="taylor"), "score 'taylor' needs data"),
    "no data for couplings": (dict(keep={"types": 2}, score="coupling"), "score 'coupling' needs data"),
    "no images": (dict(keep={"types": 2}, data=[]), "data holds no images"),
    "couplings of filters": (dict(keep={"conv1": 2}, score="coupling"), "ranks types and capsules, not 'conv1'"),
    "other images": (dict(keep={"types": 2}, data=[(images(2).mT, torch.tensor([0, 1]))]), "(2, 1, 22, 20)"),
    "other classes": (dict(keep={"types": 2}, data=[(images(2), torch.tensor([0, 3]))]), "labels outside 0 to 2"),
    "weights of other classes": (dict(keep={"types": 2}, data=[(images(2), torch.rand(2, 4))]), "give class indices"),
    "broken images": (dict(keep={"types": 2}, data=[(images(2) * torch.nan, torch.tensor([0, 1]))]), "is not finite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    arguments, message = WRONG[case]
    with pytest.raises(ValueError) as error:
        prune(small(), **arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: torch.nn.Linear(2, 2), "Linear cannot be pruned"),
        (
            lambda: capszoo.create_model("cnn_baseline_tiny"),
            "^cnn_baseline_tiny cannot be pruned: give a CapsNet that ",
        ),
        (lambda: CapsNet(device="meta"), "that capszoo.create_model made"),
        (lambda: small(num_classes=0), "num_classes=0 and no class capsules"),
        (lambda: small(features_only=True), "cannot be pruned"),
        (lambda: small(decoder=False), "has no decoder to prune"),
    ],
)
def test_wrong_models(model, message):
    with pytest.raises(ValueError, match=message):
        prune(model(), {"decoder": (1, 1)})
