"""Losses and gradients that are not finite."""

import json

import pytest
import torch
from small_runs import EPOCHS, STEPS, PoisonedLoss, assert_same_bits, go_on, make_trainer

from capszoo.data import seeded_generator
from capszoo.engine import watch
from capszoo.errors import TrainingError
from capszoo.policies import create_policy


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_loss_that_is_not_finite(value, splits, whole, tmp_path):
    folder = tmp_path / "run"
    trainer = make_trainer(splits, folder, PoisonedLoss({STEPS + 2}, value))  # evaluations do not count
    with pytest.raises(TrainingError) as caught:
        trainer.fit()
    facts = json.loads((folder / "nonfinite.json").read_text())
    assert (facts["epoch"], facts["step"], facts["loss"]) == (2, 2, str(value))
    order = torch.randperm(50, generator=seeded_generator(0, 1, 0))
    assert facts["images"] == order[16:32].tolist()
    first = ", ".join(map(str, facts["images"][:4]))
    assert f"the loss is {value} at step 2 of epoch 2 (lr=" in str(caught.value)
    assert f"training images {first}, ..., see {folder}/nonfinite.json" in str(caught.value)
    assert "the last good checkpoint is that of epoch 2, step 0" in str(caught.value)
    assert "--nonfinite skip" in str(caught.value) and "\n" not in str(caught.value)
    assert go_on(splits, folder, whole) == (1, 0)


def test_gradient_that_is_not_finite_is_never_saved(splits, tmp_path):
    trainer = make_trainer(splits, tmp_path / "run", PoisonedLoss({2}, gradient_only=True), save_every=2)
    with pytest.raises(TrainingError, match="the weights are not finite at step 2 of epoch 1 .*there is no checkpoint"):
        trainer.fit()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["nonfinite.json"]


@pytest.mark.parametrize("gradient_only", [False, True])
def test_steps_that_are_not_finite_can_be_left_out(gradient_only, splits, tmp_path):
    bad = {2, 3, STEPS + 1}
    loss = PoisonedLoss(bad, gradient_only=gradient_only)
    trainer = make_trainer(splits, tmp_path / "run", loss, nonfinite="skip")
    updates = []
    trainer.optimizer.register_step_post_hook(lambda *_: updates.append(loss.calls))
    assert trainer.fit()
    assert updates == [call for call in range(1, EPOCHS * STEPS + 1) if call not in bad]
    assert [row["skipped_steps"] for row in trainer.history] == [2, 1, 0]
    assert all(0 < row["train_loss"] < 10 for row in trainer.history)
    assert "skipped_steps" in (tmp_path / "run/summary.csv").read_text().splitlines()[0]


def test_leaving_out_changes_nothing_else(splits, whole, tmp_path):
    trainer = make_trainer(splits, tmp_path / "run", nonfinite="skip")
    assert trainer.fit()
    assert_same_bits(trainer, whole)


@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_steps_in_float16_can_be_left_out(clip_grad, splits, tmp_path):
    trainer = make_trainer(
        splits, tmp_path / "run", PoisonedLoss({2, 3}), amp=torch.float16, nonfinite="skip", clip_grad=clip_grad
    )
    trainer.step.scaler = torch.amp.GradScaler("cpu", init_scale=256)  # no gradient of these images overflows
    assert trainer.fit()
    assert [row["skipped_steps"] for row in trainer.history] == [2, 0, 0]
    assert trainer.step.scaler.get_scale() == 256  # the data were at fault


def test_steps_are_not_left_out_for_ever(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "_MOST_SKIPPED_IN_A_ROW", 5)
    trainer = make_trainer(splits, tmp_path / "run", PoisonedLoss(range(3, 100)), nonfinite="skip")
    with pytest.raises(TrainingError, match="5 steps one after the other were .*, the last at step 3 of epoch 2"):
        trainer.fit()


def test_float16_that_cannot_hold_the_gradients(splits, tmp_path):
    loss = PoisonedLoss(range(1, 1000), float("inf"), gradient_only=True)
    trainer = make_trainer(splits, tmp_path / "run", loss, amp=torch.float16)
    trainer.policy = create_policy("fixed", lr=1e-3, batch_size=16, epochs=20, num_images=50)
    with pytest.raises(TrainingError, match=r"their scale has fallen to 0.000488281 in epoch 7.*--amp bf16 or none"):
        trainer.fit()
