"""The average of the weights: what is averaged, measured, kept and resumed."""

import json

import pytest
import torch

from capszoo.checkpoint import load_tensors
from capszoo.data import load_data
from capszoo.engine.evaluate import evaluate
from capszoo.engine.options import TrainingOptions
from capszoo.engine.run import load_splits, make_trainer, measure_test
from capszoo.errors import UsageError


@pytest.fixture(scope="module")
def data():
    return load_data("digits", val_fraction=0.1)


def options(**more):
    return TrainingOptions(epochs=2, batch_size=256, amp="none", device="cpu", model_ema=True, **more)


def test_the_average_is_that_of_the_formula(data):
    weights = []
    chosen = options(model_ema_decay=0.9, model_ema_warmup=False)
    trainer = make_trainer(chosen, data, torch.device("cpu"), on_step=lambda t: weights.append(copy(t.task.model)))
    trainer.fit()
    average = weights[0]  # of the first step the average is the weights themselves
    for later in weights[1:]:
        average = {key: 0.9 * average[key] + 0.1 * later[key] for key in later}
    for key, value in trainer.task.kept_model.state_dict().items():
        torch.testing.assert_close(value, average[key], atol=1e-6, rtol=1e-5)


def copy(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_the_average_is_measured_and_kept(data, tmp_path):
    trainer = make_trainer(options(), data, torch.device("cpu"), folder=tmp_path)
    trainer.fit()
    kept, trained = trainer.task.kept_model, trainer.task.model
    assert not torch.equal(kept.conv1.weight, trained.conv1.weight)
    assert torch.equal(load_tensors(tmp_path / "last.safetensors")[0]["conv1.weight"], kept.conv1.weight)
    loader = trainer.make_loader(data.val, 256)
    assert trainer.history[-1]["eval_top1"] == evaluate(kept, loader).top1
    result = measure_test(trainer, trainer.options, data)
    assert result["test_top1"] == evaluate(kept, trainer.make_loader(data.test, 256)).top1
    assert json.loads((tmp_path / "result.json").read_text())["test_top1"] == result["test_top1"]


def test_a_stopped_run_ends_with_the_same_average(data, tmp_path):
    whole = make_trainer(options(), data, torch.device("cpu"))
    whole.fit()
    steps = []
    stopped = make_trainer(
        options(), data, torch.device("cpu"), folder=tmp_path, should_stop=lambda: steps.append(1) or len(steps) == 8
    )
    assert not stopped.fit()
    resumed = make_trainer(options(), data, torch.device("cpu"), folder=tmp_path)
    assert resumed.resume() and resumed.fit()
    for model in ("model", "kept_model"):
        expected = getattr(whole.task, model).state_dict()
        for key, value in getattr(resumed.task, model).state_dict().items():
            assert torch.equal(value, expected[key]), key


def test_logits_and_images_of_several_classes(tmp_path, monkeypatch):
    from capszoo.models import CapsNet

    (tmp_path / "train").mkdir(), (tmp_path / "test").mkdir()
    from PIL import Image

    for part in "train", "test":
        Image.new("L", (28, 28)).save(tmp_path / part / "1.png")
        (tmp_path / part / "labels.csv").write_text("file,cat,dog\n1.png,1,1\n")
    chosen = TrainingOptions(dataset=str(tmp_path), val_fraction=0.0, device="cpu")
    data = load_splits(chosen)
    monkeypatch.setattr(CapsNet, "returns_logits", True, raising=False)
    with pytest.raises(UsageError, match="^--model capsnet_tiny gives a probability to each class, .*: use a model of"):
        make_trainer(chosen, data, torch.device("cpu"))
