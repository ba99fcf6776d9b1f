"""Runs with augmentation, mixed labels and class weights: from the options to the loss, resumed to the same bits."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import yaml

import capszoo
from capszoo.command_line.training import build_parser
from capszoo.data import Augmentation, Loader, Split, load_data
from capszoo.engine import CapsuleTask, Trainer, evaluate
from capszoo.engine.criteria import read_criterion
from capszoo.engine.options import DEFAULTS, TrainingOptions, flat_values, options_from, options_text
from capszoo.engine.run import load_splits, make_criterion, make_trainer
from capszoo.errors import UsageError
from capszoo.fields import options_of
from capszoo.losses import CrossEntropyLoss, MarginLoss, SpreadLoss, margin_loss
from capszoo.policies import create_policy

CPU = torch.device("cpu")
SMALL = {"model_kwargs": {"conv_dim": 4, "num_types": 2, "decoder_dims": [4, 8]}, "amp": "none", "workers": 0}
ALL = {
    "hflip": 0.5, "vflip": 0.5, "scale": [0.5, 1.0], "rotate": 15.0, "shear": 5.0, "rescale": [0.9, 1.1], "reprob": 0.3,
    "color_jitter": [0.3], "aa": "rand-m3-n1", "mixup": 0.2, "cutmix": 1.0, "mixup_mode": "pair",
    "translate": 1, "mean": [0.1], "std": [0.3],
}  # fmt: skip


@pytest.fixture
def few():
    data = load_data("digits")
    for split, count in ((data.train, 50), (data.val, 20)):
        split.images, split.labels = split.images[:count], split.labels[:count]
    return data


def make_small_trainer(few, folder=None, mixed=None, criterion=None, cuda_graphs=False, epochs=2, **kwargs):
    torch.manual_seed(0)
    model = capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2, decoder=True)
    policy = create_policy("one_cycle", lr=1e-3, batch_size=16, epochs=epochs, num_images=len(few.train))
    task = CapsuleTask(model, criterion, verbose=False)
    return Trainer(
        task, torch.optim.Adam(model.parameters(), lr=1e-3), policy, few.train, few.val, folder=folder,
        augmentation=Augmentation(**(mixed or {})), cuda_graphs=cuda_graphs, **kwargs,
    )  # fmt: skip


# Options


def test_options_reach_the_loader_by_every_way(few):
    own = {key: value for key, value in ALL.items() if key in options_of(Augmentation)}
    options = options_from({**SMALL, **ALL})
    assert options == replace(TrainingOptions(**SMALL), **ALL)
    assert options.augmentation == Augmentation(**own) != DEFAULTS.augmentation == Augmentation()
    trainer = make_trainer(options, few, CPU)
    assert trainer.augmentation == Augmentation(**own) and trainer.translate == 1
    assert few.train.mean == (0.1,) and few.train.std == (0.3,)
    words = "--hflip 0.5 --scale 0.5 1 --color-jitter 0.3 --mixup 0.2 --class-weights balanced".split()
    parsed = vars(build_parser().parse_args(words))
    assert (parsed["scale"], parsed["color_jitter"], parsed["class_weights"]) == ([0.5, 1.0], [0.3], ["balanced"])
    assert options_from({"class_weights": "balanced"}).class_weights == ["balanced"]
    assert options_from({"class_weights": [1, 2.5]}).class_weights == [1.0, 2.5]


def test_options_are_written_and_read_back(tmp_path):
    options = options_from({**SMALL, **ALL, "class_weights": [1, 2], "smoothing": 0.1})
    values = yaml.safe_load(options_text(options, tmp_path))
    assert options_from(values) == options
    assert list(values).index("model") < list(values).index("policy") < list(values).index("hflip")
    assert list(flat_values(options))[:2] == ["model", "dataset"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"scale": [0.5, 2]}, "--scale 0.5 2.0 is out of range"),
        ({"aa": "rnd"}, "--aa rnd: unknown policy 'rnd', did you mean 'rand'"),
        ({"hflip": 2}, "--hflip 2.0 is out of range: give 0 to 1"),
    ],
)
def test_bad_values_are_refused_before_the_data_is_read(values, expected):
    with pytest.raises(UsageError, match=f"^{expected}[^\n]*$"):
        load_splits(options_from({"dataset": "nowhere at all", **values}))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"mixup": 0.2, "batch_size": 1}, "--mixup 0.2 mixes pairs of images, and a batch has 1: give an even"),
        ({"cutmix": 1.0, "batch_size": 5}, "--cutmix 1.0 mixes pairs of images, and a batch has 5"),
        ({"mixup": 0.2, "policy": "ada_batch", "epochs": 4}, "and a batch has 1: .*--warm-batch"),
        ({"smoothing": 0.1}, "--smoothing 0.1 is for the cross-entropy, and 'capsnet_tiny' trains on the MarginLoss"),
        ({"class_weights": [1, 2]}, "--class-weights 1.0 2.0 has 2 numbers for 10 classes"),
        ({"grayscale_prob": 0.5}, "--grayscale-prob 0.5 changes no grey image"),
    ],
)
def test_what_does_not_go_together_is_refused_before_work_starts(few, values, expected):
    with pytest.raises(UsageError, match=f"^[^\n]*{expected}[^\n]*$"):
        make_trainer(options_from({**SMALL, **values}), few, CPU)


def test_words_of_class_weights_are_numbers():
    with pytest.raises(UsageError, match="'balance' is unknown: give balanced, none, or a number for each class"):
        options_from({"class_weights": "balance"})


# Runs


def test_a_resumed_run_sees_the_same_images(few, tmp_path):
    def trainer(folder, should_stop=lambda: False):
        folder.mkdir(exist_ok=True)
        options = options_from({**SMALL, **ALL, "epochs": 2, "mixup_off_epoch": 1})
        return make_trainer(options, few, CPU, folder=folder, should_stop=should_stop)

    whole = trainer(tmp_path / "whole")
    assert whole.fit()
    asked = iter(range(100))
    stopped = trainer(tmp_path / "stopped", lambda: next(asked) == 4)
    assert not stopped.fit() and stopped.position.step == 5
    resumed = trainer(tmp_path / "stopped")
    assert resumed.resume() and resumed.fit()
    for (name, one), other in zip(
        whole.task.model.state_dict().items(), resumed.task.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("criterion", [MarginLoss(), CrossEntropyLoss(0.1), SpreadLoss()])
def test_losses_take_mixed_labels(few, criterion):
    trainer = make_small_trainer(few, mixed={"mixup": 0.5, "cutmix": 1.0, "mixup_mode": "elem"}, criterion=criterion)
    assert trainer.mixed_labels and trainer.fit()
    assert trainer.history[-1]["train_loss"] > 0
    assert trainer.history[-1]["train_reconstruction_loss"] > 0


def test_of_mixed_images_the_larger_share_is_the_right_answer(few):
    trainer = make_small_trainer(few, mixed={"cutmix": 1.0, "mixup_mode": "elem"}, epochs=1)
    right = []

    def count(module, inputs, result):
        images, labels = inputs
        assert labels.shape == (len(images), 10) and labels.dtype == torch.float32
        right.extend((result["output"].argmax(dim=1) == labels.argmax(dim=1)).tolist())

    trainer.task.register_forward_hook(count)
    trainer._train_epoch()
    assert trainer.running_means()["top1"] == pytest.approx(sum(right) / len(right))


def test_mixed_images_are_reconstructed_from_the_class_of_the_larger_share(few):
    model = capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2, decoder=True).eval()
    task = CapsuleTask(model, verbose=False)
    augmentation = Augmentation(mixup=0.5, mixup_mode="elem")
    images, labels = next(iter(Loader(few.train, 16, "cpu", augmentation=augmentation, num_classes=10)))
    with torch.no_grad():
        capsules, lengths = model.forward_capsules(images)
        drawn = model.decoder(capsules, labels.argmax(dim=1))
        result = task(images, labels)
    expected = (drawn - task.normalization.undo(images)).square().flatten(1).sum(dim=1).mean()
    torch.testing.assert_close(result["reconstruction_loss"], expected)
    torch.testing.assert_close(result["margin_loss"], margin_loss(lengths, labels))


def test_captured_steps_take_mixed_labels_to_the_end(few, pretended_graphs):
    mixed = {"mixup": 0.5, "mixup_off_epoch": 1}
    plain = make_small_trainer(few, mixed=mixed, epochs=3)
    captured = make_small_trainer(few, mixed=mixed, epochs=3, cuda_graphs=True)
    assert plain.fit() and captured.fit()
    for one, other in zip(plain.task.model.parameters(), captured.task.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


# Smoothing and class weights


class OnCrossEntropy:
    """Has a model of the zoo train on the cross-entropy, as families with logits do."""

    def default_criterion(self):
        return CrossEntropyLoss()


def test_smoothing_is_that_of_the_cross_entropy(few):
    model = capszoo.create_model("cnn_baseline_tiny", num_classes=10)
    model.default_criterion = OnCrossEntropy().default_criterion
    assert make_criterion(options_from({}), model).label_smoothing == 0
    criterion = make_criterion(options_from({"smoothing": 0.2, "class_weights": "balanced"}), model, few.train.labels)
    assert criterion.label_smoothing == 0.2 and criterion.weight.shape == (10,)
    scores, labels = torch.randn(4, 10), torch.tensor([0, 1, 2, 3])
    expected = F.cross_entropy(scores, labels, label_smoothing=0.2, reduction="none") * criterion.weight[labels]
    torch.testing.assert_close(criterion(scores, labels), expected.mean())


def test_class_weights_count_in_training_and_not_in_evaluation(few, tmp_path):
    few.train.labels = few.train.labels.clamp(max=1)  # most are 1, and classes 2 to 9 have no image
    options = options_from({**SMALL, "class_weights": "balanced", "epochs": 1, "output": str(tmp_path)})
    trainer = make_trainer(options, few, CPU, folder=tmp_path)
    counts = few.train.labels.bincount().double()
    weight = trainer.task.criterion.weight
    assert weight.tolist() == pytest.approx([*(50 / (2 * counts)).tolist(), *[1.0] * 8])
    images, labels = next(iter(Loader(few.train, 50, "cpu")))
    model = trainer.task.model.eval()
    with torch.no_grad():
        losses = margin_loss(model(images), labels, reduction="none")
        torch.testing.assert_close(trainer.task(images, labels)["margin_loss"], (losses * weight[labels]).mean())
    assert evaluate(trainer.task, Loader(few.train, 16, "cpu")).loss == pytest.approx(float(losses.mean()), rel=1e-5)
    assert trainer.fit()
    header = capszoo.checkpoint.read_metadata(tmp_path / "best.safetensors")
    torch.testing.assert_close(read_criterion("file", header, model).weight, weight)


def test_class_weights_are_the_same_in_parts_of_batches(few):
    def trained(**kwargs):
        options = options_from({**SMALL, "class_weights": [1.0 + j for j in range(10)], "epochs": 1, **kwargs})
        trainer = make_trainer(options, few, CPU)
        trainer.fit()
        return torch.cat([p.detach().flatten() for p in trainer.task.model.parameters()])

    torch.testing.assert_close(trained(batch_size=16), trained(batch_size=16, micro_batch=3), rtol=1e-4, atol=1e-6)


def test_recall_of_each_class_and_the_balanced_accuracy():
    model = capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2, num_classes=4)
    split = Split(torch.tensor([0] * 6 + [1] * 2 + [3]), (torch.arange(9 * 784) % 251).byte().view(9, 1, 28, 28))
    measured = evaluate(model, Loader(split, 4, "cpu"))
    with torch.no_grad():
        ((images, labels),) = Loader(split, 9, "cpu")
        found = model(images).argmax(dim=1) == labels
    recall = [found[labels == label].double().mean().item() for label in (0, 1, 3)]
    assert measured.recall[[0, 1, 3]].tolist() == recall and measured.recall[2].isnan()
    assert measured.balanced_accuracy == pytest.approx(sum(recall) / 3)
