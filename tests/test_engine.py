"""Training and evaluation loops: numbers against plain code, and runs that resume to the same bits."""

import csv
import itertools
import math
import os
import types
from functools import partial

import pytest
import torch
from sklearn.metrics import average_precision_score, multilabel_confusion_matrix

import capszoo
from capszoo import checkpoint
from capszoo.data import Loader, load_data
from capszoo.engine import Trainer, evaluate, find_lr, graphs
from capszoo.engine.distributed import ALONE, Ranks
from capszoo.engine.optimizers import FusedSGD
from capszoo.engine.run_folder import SUMMARY_COLUMNS
from capszoo.engine.run_state import load_state, save_state
from capszoo.engine.task import CapsuleTask
from capszoo.engine.warm_up import warm_up
from capszoo.errors import CheckpointError, TrainingError
from capszoo.files import read_rows
from capszoo.losses import MarginLoss, margin_loss, reconstruction_loss
from capszoo.policies import create_policy
from capszoo.precision import resolve_amp


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


@pytest.fixture(scope="module")
def few(digits):
    """The first images of the digits alone, for speed."""
    train, val = (
        type(digits.train)(images=s.images[:n], labels=s.labels[:n]) for s, n in ((digits.train, 50), (digits.val, 20))
    )
    return train, val


def make_trainer(
    splits, folder=None, epochs=3, policy="one_cycle", drop_rate=0.2, device="cpu", optimizer=torch.optim.Adam, **kwargs
):
    train, val = splits
    torch.manual_seed(0)
    model = capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2, decoder=True, drop_rate=drop_rate)
    model.to(device, memory_format=torch.channels_last)
    options = {"lr": 1e-3, "batch_size": 16, "epochs": epochs, "num_images": len(train)}
    optimizer = optimizer(model.parameters(), lr=1e-3, fused=True)
    task = CapsuleTask(model, verbose=False)
    policy = create_policy(policy, **options)
    return Trainer(task, optimizer, policy, train, val, folder=folder, translate=2, device=device, **kwargs)


def weights(trainer):
    return {key: value.clone() for key, value in trainer.task.model.state_dict().items()}


def untimed(history):
    return [{k: v for k, v in row.items() if k not in ("epoch_seconds", "images_per_second")} for row in history]


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


def assert_same_file(one, other):
    (tensors, header), (other_tensors, other_header) = checkpoint.load_tensors(one), checkpoint.load_tensors(other)
    assert header == other_header
    assert_same_bits(tensors, other_tensors)


def test_evaluate_against_plain_code(digits):
    model = capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2, decoder=True).train()
    result = evaluate(model, Loader(digits.val, 50, "cpu"))
    assert model.training
    model.eval()
    images, labels = next(iter(Loader(digits.val, len(digits.val), "cpu")))
    with torch.no_grad():
        lengths = model(images)
        assert result.top1 == (lengths.argmax(1) == labels).double().mean().item()
        assert result.margin_loss == pytest.approx(margin_loss(lengths, labels).item(), rel=1e-5)
        drawn = model.reconstruct(images)
        assert result.reconstruction_error == pytest.approx(reconstruction_loss(drawn, images).item(), rel=1e-5)
    few = type(digits.val)(images=digits.val.images, labels=digits.val.labels.to(torch.uint8))
    assert torch.equal(evaluate(model, Loader(few, 50, "cpu")).confusion, result.confusion)
    for true, predicted in itertools.product(range(10), repeat=2):
        count = ((labels == true) & (lengths.argmax(1) == predicted)).sum()
        assert result.confusion[true, predicted] == count


def several_classes(split, num_classes=10):
    """The images of a split with labels of no class, one or two."""
    one = torch.nn.functional.one_hot(split.labels, num_classes).float()
    other = one.roll(1, dims=0)
    rows = torch.arange(len(one))[:, None]
    return type(split)(
        images=split.images, labels=torch.where(rows % 5 == 0, 0, torch.where(rows % 2 == 0, one, other.maximum(one)))
    )


def test_evaluate_several_classes_against_plain_code(digits):
    torch.manual_seed(0)
    model = capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2, decoder=True, start="plain")
    with torch.no_grad():
        model.class_caps.weight *= 20  # lengths on both sides of 0.5
    split = several_classes(digits.val)
    result = evaluate(model, Loader(split, 50, "cpu"))
    images, labels = next(iter(Loader(split, len(split), "cpu")))
    with torch.no_grad():
        lengths = model(images)
    assert result.confusion is None
    right = ((lengths >= 0.5).float() == labels).all(dim=1)
    assert result.top1 == right.double().mean().item()
    assert result.margin_loss == pytest.approx(margin_loss(lengths, labels).item(), rel=1e-5)
    drawn = model.reconstruct(images)
    assert result.reconstruction_error == pytest.approx(reconstruction_loss(drawn, images).item(), rel=1e-5)
    expected = [average_precision_score(labels[:, j].numpy(), lengths[:, j].numpy()) for j in range(10)]
    assert result.average_precision.tolist() == pytest.approx(expected, abs=1e-6)
    assert result.mean_average_precision == pytest.approx(sum(expected) / 10, abs=1e-6)
    counts = multilabel_confusion_matrix(labels.numpy(), (lengths >= 0.5).numpy())
    assert result.class_confusion.tolist() == counts.tolist() and 0 < counts[:, 1, 1].sum() < counts[:, 1].sum()


def test_evaluate_classes_that_are_not_shown(digits):
    model = capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2)
    labels = torch.zeros(len(digits.val), 10)
    nothing = evaluate(model, Loader(type(digits.val)(images=digits.val.images, labels=labels), 64, "cpu"))
    assert nothing.mean_average_precision is None and nothing.average_precision.isnan().all()
    labels[:, 3] = 1
    one = evaluate(model, Loader(type(digits.val)(images=digits.val.images, labels=labels), 64, "cpu"))
    assert one.mean_average_precision == 1.0 and one.average_precision.isnan().sum() == 9


def test_training_of_several_classes(few, tmp_path):
    train, val = (several_classes(split) for split in few)
    trainer = make_trainer((train, val), tmp_path, epochs=2, drop_rate=0.0)
    reference = make_trainer((train, val), epochs=1, drop_rate=0.0)
    assert trainer.fit()
    right = 0
    for step, (images, labels) in enumerate(Loader(train, 16, "cpu", shuffle=True, translate=2)):
        reference.optimizer.param_groups[0]["lr"] = trainer.policy.lr(trainer.policy.progress(0, step))
        result = reference.task(images, labels)
        reference.optimizer.zero_grad()
        result["loss"].backward()
        reference.optimizer.step()
        right += ((result["output"] >= 0.5) == (labels == 1)).all(dim=1).sum().item()
    assert trainer.history[0]["train_top1"] == right / 50
    best = trainer.best
    capszoo.checkpoint.load_weights(trainer.task.model, tmp_path / "best.safetensors")
    measured = evaluate(trainer.task.model, Loader(val, 20, "cpu"))
    assert best["eval_top1"] == measured.top1 and best["eval_loss"] == pytest.approx(measured.margin_loss, rel=1e-6)


def test_the_run_is_evaluated_by_its_own_criterion(few, tmp_path):
    trainer = make_trainer(few, tmp_path, epochs=2)
    trainer.task.criterion = MarginLoss(m_plus=0.6, m_minus=0.3)
    assert trainer.fit()
    capszoo.checkpoint.load_weights(trainer.task.model, tmp_path / "best.safetensors")
    loader = Loader(few[1], len(few[1]), "cpu")
    ((images, labels),) = loader
    with torch.no_grad():
        own = float(trainer.task.criterion(trainer.task.model.eval()(images), labels))
    assert trainer.best["eval_loss"] == pytest.approx(own, rel=1e-5)
    assert evaluate(trainer.task, loader).loss == pytest.approx(own, rel=1e-5)
    by_default = evaluate(trainer.task.model, loader).loss
    assert by_default == pytest.approx(float(margin_loss(trainer.task.model(images), labels)), rel=1e-5)
    assert abs(by_default - own) > 0.01


class WithBatchNorm(torch.nn.Module):
    """A family of somebody else's: a stem with BatchNorm, and scores that are no lengths."""

    num_classes, in_chans, img_size = 10, 1, (28, 28)

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 9, stride=4), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        self.fc = torch.nn.Linear(100, 10)

    def arguments(self):
        return {}

    def forward_features(self, x):
        return self.stem(x)

    def forward_head(self, x):
        return self.fc(x.flatten(1)).sigmoid()

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def make_trainer_with_batch_norm(splits, folder=None, **kwargs):
    torch.manual_seed(0)
    model = WithBatchNorm()
    policy = create_policy("fixed", lr=1e-3, batch_size=16, epochs=2, num_images=len(splits[0]))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    task = CapsuleTask(model, verbose=False)
    return Trainer(task, optimizer, policy, *splits, folder=folder, **kwargs)


def test_networks_with_batch_norm_load_back(few, tmp_path):
    trainer = make_trainer_with_batch_norm(few, tmp_path)
    assert trainer.fit() and trainer.best["eval_loss"] is not None
    model = WithBatchNorm()
    checkpoint.load_weights(model, tmp_path / "last.safetensors")
    assert_same_bits(model.state_dict(), weights(trainer))
    assert model.stem[1].num_batches_tracked == 8


def test_steps_left_out_leave_the_statistics_of_batch_norm(few):
    trainer = make_trainer_with_batch_norm(few, nonfinite="skip")
    images, labels = next(iter(Loader(few[0], 16, "cpu")))
    trainer.task.train()
    before = weights(trainer)
    trainer.step(torch.full_like(images, torch.nan), labels, 1e-3, 16, 16)
    assert trainer.step.skipped == 1
    assert_same_bits(weights(trainer), before)
    trainer.step(images, labels, 1e-3, 16, 16)
    assert trainer.task.model.stem[1].num_batches_tracked == 1


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"micro_batch": 8}, "--micro-batch 8 would give BatchNorm the statistics of parts"),
        ({"ranks": Ranks(0, 2)}, "cannot be shared by 2 processes on CPUs"),
        ({"ranks": Ranks(0, 3), "device": "meta"}, "the last batch of an epoch has 2 of 16 images"),
    ],
)
def test_batch_norm_is_refused_where_batches_are_computed_in_parts(few, kwargs, match):
    with pytest.raises(TrainingError, match=match):
        make_trainer_with_batch_norm(few, **kwargs)


def test_evaluate_without_decoder_or_images(digits):
    model = capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2)
    assert evaluate(model, Loader(digits.val, 64, "cpu")).reconstruction_error is None
    with pytest.raises(TrainingError, match="no images"):
        evaluate(model, [])


def test_training_equals_a_plain_loop(few, tmp_path):
    trainer = make_trainer(few, epochs=2, drop_rate=0.0)
    reference = make_trainer(few, epochs=2, drop_rate=0.0)
    assert trainer.fit() and trainer.finished
    policy, task, optimizer = reference.policy, reference.task, reference.optimizer
    for epoch in range(2):
        loader = Loader(few[0], policy.batch_size(epoch), "cpu", shuffle=True, seed=0, epoch=epoch, translate=2)
        total, right = 0.0, 0
        for step, (images, labels) in enumerate(loader):
            optimizer.param_groups[0]["lr"] = policy.lr(policy.progress(epoch, step))
            result = task(images, labels)
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
            total += result["loss"].item() * len(labels)
            right += (result["output"].argmax(1) == labels).sum().item()
        row = trainer.history[epoch]
        assert row["train_loss"] == pytest.approx(total / 50, rel=1e-6)
        assert row["train_top1"] == right / 50
    assert_same_bits(weights(trainer), weights(reference))


def test_run_folder(few, tmp_path):
    trainer = make_trainer(few, tmp_path, epochs=3, metadata={"model": "capsnet_tiny", "class_names": ["a"]})
    assert trainer.fit()
    assert {p.name for p in tmp_path.iterdir()} == {
        "summary.csv",
        "last.safetensors",
        "best.safetensors",
        "resume.safetensors",
        "resume-previous.safetensors",
    }
    with open(tmp_path / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == SUMMARY_COLUMNS and [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        assert 0 <= float(row["train_top1"]) <= 1 and 0 <= float(row["eval_top1"]) <= 1
        assert float(row["images_per_second"]) == pytest.approx(50 / float(row["epoch_seconds"]))
        parts = float(row["train_margin_loss"]) + 0.0005 * float(row["train_reconstruction_loss"])
        assert float(row["train_loss"]) == pytest.approx(parts, rel=1e-5)
    best = max(rows, key=lambda row: (float(row["eval_top1"]), -float(row["eval_loss"])))
    header = checkpoint.read_metadata(tmp_path / "best.safetensors")
    assert header["epoch"] == best["epoch"] == str(trainer.best["epoch"])
    assert header["model"] == "capsnet_tiny"


def test_without_validation_the_last_epoch_is_best(few, tmp_path):
    trainer = make_trainer((few[0], None), tmp_path, epochs=2)
    trainer.fit()
    assert trainer.best["epoch"] == 2 and trainer.best["eval_top1"] is None
    assert "2,,," not in (tmp_path / "summary.csv").read_text()
    assert (tmp_path / "best.safetensors").read_bytes()


@pytest.mark.parametrize("policy", ["one_cycle", "ada_batch"])
def test_stopped_anywhere_and_resumed_to_the_same_bits(few, tmp_path, policy):
    whole = make_trainer(few, tmp_path / "whole", epochs=4, policy=policy)
    (tmp_path / "whole").mkdir()
    whole.fit()
    total = whole.policy.total_steps
    for stop_after in (1, total // 3, total // 2 + 1, total - 1):
        folder = tmp_path / f"stopped{stop_after}"
        folder.mkdir()
        count = itertools.count(1)
        trainer = make_trainer(few, folder, epochs=4, policy=policy, should_stop=lambda: next(count) >= stop_after)  # noqa: B023
        assert not trainer.fit()
        torch.manual_seed(99)  # another process has another state
        resumed = make_trainer(few, folder, epochs=4, policy=policy)
        assert resumed.resume() and resumed.fit()
        assert_same_bits(weights(resumed), weights(whole))
        assert untimed(resumed.history) == untimed(whole.history)
        assert_same_file(folder / "best.safetensors", tmp_path / "whole/best.safetensors")


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


def test_killed_at_every_rename_and_resumed_to_the_same_bits(few, tmp_path, monkeypatch):
    whole = make_trainer(few, tmp_path / "whole", epochs=2)
    (tmp_path / "whole").mkdir()
    whole.fit()
    real = os.replace
    for at, after in ((at, after) for at in itertools.count(1) for after in (False, True)):
        folder = tmp_path / f"killed{at}{after}"
        folder.mkdir()
        renames = itertools.count(1)

        def replace(source, target):
            last = next(renames) == at  # noqa: B023
            if not last or after:  # noqa: B023
                real(source, target)
            if last:
                (folder / ".half.1.tmp").write_bytes(b"half")  # noqa: B023
                raise Killed

        trainer = make_trainer(few, folder, epochs=2, save_every=3)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                trainer.fit()
                break  # fewer renames than `at`: all have been tried
            except Killed:
                pass
        resumed = make_trainer(few, folder, epochs=2, save_every=3)
        resumed.resume()
        resumed.fit()
        assert_same_bits(weights(resumed), weights(whole))
        assert not list(folder.glob(".*.tmp"))
        assert_same_file(folder / "best.safetensors", tmp_path / "whole/best.safetensors")
    assert at > 6


def test_resume_of_another_model_is_refused(few, tmp_path):
    trainer = make_trainer(few, tmp_path, epochs=1)
    assert not trainer.resume()
    trainer.fit()
    trainer.task.model.conv1 = torch.nn.Conv2d(1, 5, 9)
    with pytest.raises(checkpoint.CheckpointError, match="another model"):
        trainer.resume()


def test_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_saved(few, tmp_path):
    trainer = make_trainer(few, tmp_path, epochs=3)

    def spoil(trainer, row):
        trainer.task.model.conv1.weight.data.fill_(float("nan"))

    trainer.on_epoch = spoil
    with pytest.raises(TrainingError, match="epoch 2"):
        trainer.fit()
    state = load_state(tmp_path / "resume.safetensors")
    assert state["position"]["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_clip_grad_limits_the_step(few):
    trainer = make_trainer(few, epochs=1, clip_grad=1e-3, should_stop=lambda: True)
    trainer.fit()
    norms = [p.grad.norm() for p in trainer.task.model.parameters()]
    assert torch.stack(norms).norm() <= 1.001e-3


def test_find_lr_raises_the_rate_and_stops_on_divergence(digits):
    trainer = make_trainer((digits.train, None), epochs=1, policy="lr_finder")
    before = trainer.should_stop
    rates, losses = find_lr(trainer, max_steps=40)
    assert len(rates) == len(losses) == 40
    assert rates == [10 ** (step / 100 - 6) for step in range(40)]
    assert trainer.should_stop is before
    assert all(torch.isfinite(torch.tensor(losses)))


def test_find_lr_looks_at_means_of_losses():
    """At batch 1 one image soon has four times the loss of another."""

    class Run:
        finished, lr, position = False, 1e-6, types.SimpleNamespace(epoch=0, step=0)
        calm, wild = [0.2, 0.9] * 40, [5.0] * 40

        def should_stop(self):
            return False

        def _train_epoch(self):
            for loss in self.calm + self.wild:
                self.loss = loss
                if self.should_stop():
                    return False
            self.finished = True
            return True

    _, losses = find_lr(Run())
    # 4 * 0.53 is passed by a mean of 21 that has 8 of the new losses: (8 * 5 + 13 * 0.55) / 21.
    assert len(losses) == 80 + 8


def test_resolve_amp():
    cpu = torch.device("cpu")
    assert resolve_amp("none", cpu) is None and resolve_amp("bf16", cpu) is torch.bfloat16
    assert resolve_amp("auto", cpu) in (None, torch.bfloat16)
    for wrong in ("fp16", "fp8"):
        with pytest.raises(TrainingError, match=wrong):
            resolve_amp(wrong, cpu)


def test_captured_steps_take_every_batch_and_rate(few, pretended_graphs):
    plain, captured = make_trainer(few, drop_rate=0.0), make_trainer(few, drop_rate=0.0)
    plain.fit()
    captured.step.cuda_graphs = True
    captured.fit()
    # 50 images: three full batches and one of two in each epoch; the fourth full one is captured.
    assert captured.step.cuda_graphs and len(pretended_graphs) == 1 and captured.step.captured.batch[0].shape[0] == 16
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(captured)[key], value, rtol=1e-4, atol=1e-6)
    for row, expected in zip(captured.history, plain.history, strict=True):
        assert row["lr"] == expected["lr"] and row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)


def test_a_graph_for_each_batch_size(few, pretended_graphs):
    trainer = make_trainer(few)
    trainer.policy = create_policy(
        "warm_ada_batch", lr=1e-4, batch_size=8, epochs=3, num_images=50, warm_epochs=1, warm_batch=4, first_batch=8
    )
    trainer.step.cuda_graphs = True
    trainer.fit()
    assert trainer.step.cuda_graphs and len(pretended_graphs) == 2 and trainer.step.captured.batch_size == 8


def test_a_step_that_cannot_be_captured_is_taken_as_it_is(few, pretended_graphs, monkeypatch, caplog):
    def fail(step):
        raise graphs.CaptureError("not permitted")

    plain, trainer = make_trainer(few, drop_rate=0.0), make_trainer(few, drop_rate=0.0)
    plain.fit()
    trainer.step.cuda_graphs = True
    monkeypatch.setattr(graphs, "_capture", fail)
    trainer.fit()
    assert not trainer.step.cuda_graphs and len([r for r in caplog.records if "CUDA graphs" in r.getMessage()]) == 1
    for key, value in weights(plain).items():
        torch.testing.assert_close(weights(trainer)[key], value, rtol=1e-4, atol=1e-6)


def losses_of(splits, captured, folder=None, stop_after=None, **kwargs):
    """Train; return the trainer and `trainer.loss` as it was after each step, by epoch and step."""
    losses = {}

    def note(trainer):
        losses[trainer.position.epoch, trainer.position.step] = float(trainer.loss)

    trainer = make_trainer(
        splits, folder, drop_rate=0.0, on_step=note, should_stop=lambda: len(losses) == stop_after, **kwargs
    )
    trainer.step.cuda_graphs = captured
    if folder is not None:
        trainer.resume()
    trainer.fit()
    assert trainer.step.cuda_graphs == captured
    return trainer, losses


def watch_task(monkeypatch):
    """The loss of each forward pass and its images, as the task computes them."""
    found = []
    forward = CapsuleTask.forward

    def watched(self, images, labels):
        result = forward(self, images, labels)
        if torch.is_grad_enabled():
            found.append((result["loss"].item(), len(labels)))
        return result

    monkeypatch.setattr(CapsuleTask, "forward", watched)
    return found


@pytest.mark.parametrize("kwargs", [{}, {"micro_batch": 6}, {"nonfinite": "skip"}], ids=["whole", "parts", "skip"])
def test_the_loss_is_that_of_the_step(few, kwargs, monkeypatch):
    """50 images, in batches of 16: four steps an epoch, the last one of two images."""
    with monkeypatch.context() as patch:
        found = watch_task(patch)
        _, losses = losses_of(few, False, **kwargs)
    passes = iter(found)
    for (_, step), expected in losses.items():
        own = [next(passes) for _ in range(3 if "micro_batch" in kwargs and step != 4 else 1)]
        images = sum(count for _, count in own)
        assert images == (16, 16, 16, 2)[step - 1]
        assert expected == pytest.approx(sum(loss * count for loss, count in own) / images, rel=1e-6)
    assert next(passes, None) is None and len(losses) == 12


@pytest.mark.parametrize("kwargs", [{}, {"micro_batch": 6}], ids=["whole", "parts"])
def test_the_loss_is_that_of_the_step_in_every_epoch_of_a_captured_run(few, kwargs, tmp_path, pretended_graphs):
    _, expected = losses_of(few, False, epochs=4, **kwargs)
    _, losses = losses_of(few, True, epochs=4, **kwargs)
    assert losses == pytest.approx(expected, rel=1e-3) and len(set(losses.values())) == 16
    _, begun = losses_of(few, True, tmp_path, stop_after=7, epochs=4, **kwargs)
    trainer, resumed = losses_of(few, True, tmp_path, epochs=4, **kwargs)
    assert {**begun, **resumed} == pytest.approx(expected, rel=1e-3) and len(resumed) == 9
    for epoch, row in enumerate(trainer.history):
        total = sum(expected[epoch, step] * images for step, images in enumerate((16, 16, 16, 2), start=1))
        assert row["train_loss"] == pytest.approx(total / 50, rel=1e-3)


def test_captured_step_whose_loss_is_not_finite_ends_the_run(few, pretended_graphs):
    def spoil(trainer):
        if (trainer.position.epoch, trainer.position.step) == (2, 1):
            trainer.task.model.conv1.weight.data.fill_(float("nan"))

    trainer = make_trainer(few, on_step=spoil)
    trainer.step.cuda_graphs = True
    with pytest.raises(TrainingError, match="the loss is nan at step 2 of epoch 3"):
        trainer.fit()


def test_find_lr_sees_the_losses_of_captured_steps(few, pretended_graphs):
    found = []
    for captured in (False, True):
        trainer = make_trainer(few, epochs=3, policy="lr_finder", drop_rate=0.0)
        trainer.step.cuda_graphs = captured
        found.append(find_lr(trainer, max_steps=10))
        assert trainer.step.cuda_graphs == captured
    assert found[1][0] == found[0][0] and found[1][1] == pytest.approx(found[0][1], rel=1e-3)


class Normalised(torch.nn.Sequential):
    """A layer with buffers that every pass in training mode changes."""

    def __init__(self, act):
        super().__init__(act, torch.nn.BatchNorm2d(4))


@pytest.mark.parametrize("micro_batch", [None, 6])
def test_warm_up_changes_nothing(few, micro_batch):
    states = []
    for warm in (False, True):
        trainer = make_trainer(few, epochs=2, micro_batch=micro_batch)
        model = trainer.task.model
        model.act1 = Normalised(model.act1)
        torch.rand(3)
        if warm:
            before, random = weights(trainer), torch.get_rng_state()
            warm_up(trainer)
            assert_same_bits(weights(trainer), before)
            assert torch.equal(torch.get_rng_state(), random)
            assert all(p.grad is None for p in model.parameters()) and trainer.step.sums.eq(0).all()
        trainer.fit()
        states.append((weights(trainer), untimed(trainer.history)))
    assert_same_bits(states[1][0], states[0][0])
    assert states[1][1] == states[0][1]


@pytest.mark.parametrize("micro_batch", [None, 6])
@pytest.mark.parametrize("ranks", [ALONE, Ranks(2, 3), Ranks(0, 5)])
def test_warm_up_meets_every_size_of_the_run(few, micro_batch, ranks, monkeypatch):
    monkeypatch.setattr(Ranks, "sum_", lambda self, *tensors: None)  # the other ranks are not there
    monkeypatch.setattr(Ranks, "max_", lambda self, tensor: tensor)
    sizes = {True: set(), False: set()}
    trainer = make_trainer(few, micro_batch=micro_batch, ranks=ranks, eval_batch_size=16)
    trainer.policy = create_policy(
        "ada_batch", lr=1e-3, batch_size=16, epochs=3, num_images=50, warm_epochs=1, warm_batch=5, first_batch=8,
        grow_every=1,
    )  # fmt: skip
    model = trainer.task.model
    forward = model.forward_capsules
    monkeypatch.setattr(model, "forward_capsules", lambda x: sizes[model.training].add(len(x)) or forward(x))
    warm_up(trainer)
    warm = {training: set(found) for training, found in sizes.items()}
    for found in sizes.values():
        found.clear()
    trainer.fit()
    assert warm == sizes and len(warm[True]) > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, partial(FusedSGD, momentum=0.9)])
@pytest.mark.parametrize("policy", ["one_cycle", "warm_ada_batch"])
def test_captured_steps_on_a_gpu(few, policy, optimizer, tmp_path, caplog):
    """Graphs change the order of nothing: the losses are those of steps launched one kernel at a time."""
    histories = []
    for name, captured in (("plain", False), ("captured", True)):
        (tmp_path / name).mkdir()
        trainer = make_trainer(
            few, tmp_path / name, 6, policy, device="cuda", optimizer=optimizer, cuda_graphs=captured
        )
        assert trainer.step.cuda_graphs == captured
        trainer.fit()
        assert trainer.step.cuda_graphs == captured, caplog.text
        histories.append(untimed(trainer.history))
    # Later epochs drift apart: cuDNN adds in no fixed order, and Adam at batch 1 amplifies it.
    assert histories[1][0]["train_loss"] == pytest.approx(histories[0][0]["train_loss"], rel=5e-2)
    assert all(row["train_loss"] < 2 for row in histories[1])
    assert trainer.step.captured.replay is not None
    # The state of a captured run is taken up on either side.
    for captured in (True, False):
        more = {"device": "cuda", "optimizer": optimizer, "cuda_graphs": captured}
        again = make_trainer(few, tmp_path / "captured", 7, policy, **more)
        assert again.resume() and again.fit()


def test_a_run_goes_on_with_the_fused_steps_of_its_own_device(few, tmp_path):
    def plain(parameters, lr, fused):
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9)

    kinds = [partial(FusedSGD, momentum=0.9), plain]
    for number, (first, then) in enumerate((kinds, kinds[::-1])):
        (tmp_path / str(number)).mkdir()
        assert make_trainer(few, tmp_path / str(number), 1, optimizer=first).fit()
        again = make_trainer(few, tmp_path / str(number), 2, optimizer=then)
        expected = [group["fused"] for group in again.optimizer.param_groups]
        assert again.resume() and [group["fused"] for group in again.optimizer.param_groups] == expected
        assert again.optimizer.state_dict()["state"][0]["momentum_buffer"].any() and again.fit()


def test_a_run_goes_on_where_steps_are_computed_otherwise(few, tmp_path, monkeypatch):
    def nadam(parameters, lr, fused):
        return torch.optim.NAdam(parameters, lr=lr)

    assert make_trainer(few, tmp_path, 1, optimizer=nadam).fit()
    again = make_trainer(few, tmp_path, 2, optimizer=nadam)
    again.step.cuda_graphs = True  # as on a GPU: the optimizer's counts must move to it as they are loaded
    again.step.scaler = torch.amp.GradScaler("cpu", enabled=True)  # as where there is float16 alone
    seen = []
    load = again.optimizer.load_state_dict
    monkeypatch.setattr(
        again.optimizer, "load_state_dict", lambda state: (seen.append(state["param_groups"]), load(state))
    )
    assert again.resume()
    assert [group["capturable"] for group in seen[0]] == [True]
    assert again.step.scaler.get_scale() == torch.amp.GradScaler("cpu").get_scale()


def test_a_run_without_its_state_is_not_trained_again(few, tmp_path):
    assert make_trainer(few, tmp_path, 2).fit()
    before = (tmp_path / "best.safetensors").read_bytes()
    for name in ("resume.safetensors", "resume-previous.safetensors"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(checkpoint.CheckpointError, match=r"has results but no resume.safetensors, .*start a new run"):
        make_trainer(few, tmp_path, 2).resume()
    assert (tmp_path / "best.safetensors").read_bytes() == before
    # One epoch may have been written when a run was killed before its first checkpoint.
    (tmp_path / "summary.csv").write_text("".join((tmp_path / "summary.csv").open().readlines()[:2]))
    assert not make_trainer(few, tmp_path, 2).resume()
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(checkpoint.CheckpointError, match="has results but no"):
        make_trainer(few, tmp_path, 2).resume()


def test_saturation_is_said_once_with_the_remedy_and_changes_nothing(few, caplog):
    trainer = make_trainer(few)
    with torch.no_grad():
        trainer.task.model.primary_caps.conv.bias.fill_(1e4)
    trainer.fit()
    (record,) = [record for record in caplog.records if "saturated" in record.message]
    for part in ("at step 4 of epoch 1 100% of the primary capsules", "--warmup-steps", "--lr"):
        assert part in record.message
    caplog.clear()
    healthy = make_trainer(few)
    healthy.fit()
    unwatched = make_trainer(few)
    unwatched._check_saturation = lambda: None
    unwatched.fit()
    assert_same_bits(weights(healthy), weights(unwatched))
    assert "saturated" not in caplog.text


def test_images_normalised_otherwise_than_the_model_takes_them_are_refused(digits):
    train = type(digits.train)(images=digits.train.images[:20], labels=digits.train.labels[:20], mean=(0.5,))
    with pytest.raises(TrainingError, match=r"normalised by mean=\(0.5,\), the model takes those of mean=\(0.0,\)"):
        make_trainer((train, None))


def test_a_policy_for_another_number_of_images_is_refused(few):
    train, val = few
    for images, steps in ((100, 7), (30, 2)):
        policy = create_policy("one_cycle", lr=1e-3, batch_size=16, epochs=2, num_images=images)
        model = capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2)
        with pytest.raises(TrainingError, match=f"{steps} steps of 16 images in epoch 1, and there are 50 .*=50$"):
            Trainer(CapsuleTask(model, verbose=False), torch.optim.Adam(model.parameters()), policy, train, val)


def test_a_run_does_not_go_on_with_other_images(few, tmp_path):
    train, val = few
    stopped = make_trainer(few, tmp_path, should_stop=lambda: True)
    assert not stopped.fit() and stopped.position.step == 1
    more = type(train)(images=train.images.repeat(2, 1, 1, 1), labels=train.labels.repeat(2))
    with pytest.raises(CheckpointError, match="has 50 images to train on and 20 to validate, .* has 100 and 20: give"):
        make_trainer((more, val), tmp_path).resume()
    other = type(train)(images=train.images, labels=train.labels.flip(0))
    with pytest.raises(CheckpointError, match="has 50 images .* the data set at hand has as many with other labels"):
        make_trainer((other, val), tmp_path).resume()
    with pytest.raises(CheckpointError, match="has 50 images to train on and 20 to validate, .* has 50 and 0"):
        make_trainer((train, None), tmp_path).resume()
    state = load_state(tmp_path / "resume.safetensors")
    del state["data"]  # of an earlier version
    save_state(tmp_path / "resume.safetensors", state)
    assert make_trainer(few, tmp_path).resume()


class Endless(torch.nn.Module):
    """A loss that is never finite."""

    def forward(self, lengths, target):
        return lengths.sum() * torch.inf


def test_means_of_no_step_are_no_numbers(few, tmp_path):
    trainer = make_trainer(few, tmp_path, nonfinite="skip", epochs=1)
    assert all(math.isnan(value) for value in trainer.running_means().values())
    trainer.task.criterion = Endless()
    assert trainer.fit()
    (row,) = read_rows(tmp_path / "summary.csv", "")
    assert (row["train_loss"], row["train_top1"], row["skipped_steps"]) == ("nan", "nan", "4")
    with torch.no_grad():
        next(trainer.task.model.parameters()).fill_(torch.nan)
    trainer.position.epoch = 0
    with pytest.raises(TrainingError, match="weights are not finite .*: lower --lr, or compute in float32 with"):
        trainer.fit()
