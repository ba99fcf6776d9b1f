"""Whoever asks a network something leaves each of its parts in the mode that it was in."""

import pytest
import torch

import capszoo
from capszoo.data import Loader, Split
from capszoo.engine import evaluate
from capszoo.engine.robustness import measure_robustness
from capszoo.engine.watch import measure_saturation
from capszoo.modes import evaluation_mode
from capszoo.report.findings import find

IMAGES = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def loader():
    return Loader(Split(torch.arange(4), (IMAGES * 255).byte()), 4, "cpu")


QUESTIONS = {
    "model_info": capszoo.model_info,
    "predict": lambda model: capszoo.predict(model, IMAGES),
    "evaluate": lambda model: evaluate(model, loader()),
    "robustness": lambda model: measure_robustness(model, loader()),
    "saturation": lambda model: measure_saturation(model, IMAGES),
    "report": lambda model: find(model, [(IMAGES, torch.arange(4))], [str(j) for j in range(10)]),
    "receptive fields": capszoo.inspect.receptive_fields,
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_frozen_parts_stay_frozen(question):
    model = capszoo.create_model("capsnet_tiny", backbone="stem", backbone_level=0).train()
    model.backbone.eval()
    before = {name: module.training for name, module in model.named_modules()}
    QUESTIONS[question](model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert set(before.values()) == {False, True}


def test_an_error_leaves_the_mode_as_it_was():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2).eval())
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        assert not model.training and not model[0].training
        raise ZeroDivisionError
    assert model.training and model[0].training and not model[1].training
