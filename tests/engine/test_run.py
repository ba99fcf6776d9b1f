"""A run from its options: the parts that they name, and the result."""

from dataclasses import replace

import pytest
import torch

import capszoo
from capszoo.checkpoint import load_weights
from capszoo.engine import evaluate
from capszoo.engine.options import (
    options_from,
)
from capszoo.engine.run import load_splits, make_model, make_trainer, measure_test, model_arguments
from capszoo.errors import UsageError

SMALL = {"model_kwargs": {"conv_dim": 8, "num_types": 2, "decoder_dims": [4, 8]}, "amp": "none"}


@pytest.fixture(scope="module")
def digits():
    return load_splits(options_from({}))


def test_equal_options_make_equal_networks(digits):
    first, second, other = (
        make_trainer(options_from({**SMALL, "seed": seed}), digits, torch.device("cpu")) for seed in (1, 1, 2)
    )
    weights = [trainer.task.model.state_dict() for trainer in (first, second, other)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


def test_a_checkpoint_of_other_classes_and_images_gives_what_fits(digits, tmp_path):
    torch.manual_seed(1)
    trained = capszoo.create_model("capsnet_tiny", conv_dim=8, num_classes=3, in_chans=3, img_size=20, decoder=True)
    capszoo.save_model(tmp_path / "pets.safetensors", trained, mean=[0.2, 0.4, 0.6], std=[0.25])
    options = {"model_kwargs": {"conv_dim": 8}, "checkpoint": str(tmp_path / "pets.safetensors")}
    model = make_model(options_from(options), digits)
    assert (model.num_classes, model.in_chans, model.img_size) == (10, 1, (28, 28))
    assert torch.equal(model.primary_caps.conv.weight, trained.primary_caps.conv.weight)
    assert torch.equal(model.conv1.bias, trained.conv1.bias) and model.pretrained_cfg["mean"] == (0.4,)
    with pytest.raises(ValueError, match="these weights do not fit 'capsnet_tiny'"):
        make_model(options_from({**options, "model_kwargs": {"conv_dim": 16}}), digits)


def test_a_checkpoint_computes_as_it_was_trained_to(digits, tmp_path):
    kwargs = {"conv_dim": 8, "num_types": 2, "share_weights": True}
    own = {"num_routing": 1, "squash": "approx", "keep_capsules": [0, 5, 40]}
    trained = capszoo.create_model("capsnet_tiny", **kwargs, **own, decoder=True).eval()
    file = tmp_path / "trained.safetensors"
    capszoo.save_model(file, trained)
    options = {"model_kwargs": kwargs, "checkpoint": str(file)}
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(make_model(options_from(options), digits).eval()(x), trained(x))
    assert torch.equal(capszoo.create_model("capsnet_tiny", checkpoint_path=file, **kwargs).eval()(x), trained(x))
    given = make_model(options_from({**options, "num_routing": 3, "squash": "exact"}), digits).arguments()
    assert (given["num_routing"], given["squash"], given["keep_capsules"]) == (3, "exact", [0, 5, 40])
    larger = load_splits(options_from({"img_size": 36}))
    found = make_model(options_from({**options, "img_size": 36}), larger).arguments()
    assert found["num_routing"] == 1 and not found.get("keep_capsules")


def test_a_checkpoint_of_a_backbone_goes_to_larger_images(digits, tmp_path):
    trained = capszoo.create_model("capsnet_tiny", backbone="stem", img_size=64, num_types=2)
    capszoo.save_model(tmp_path / "trained.safetensors", trained)
    options = {
        "model_kwargs": {"num_types": 2},
        "backbone": "stem",
        "checkpoint": str(tmp_path / "trained.safetensors"),
    }
    options |= {"img_size": 96, "decoder": False}
    model = make_model(options_from(options), load_splits(options_from({"img_size": 96})))
    assert model.img_size == (96, 96)
    assert torch.equal(model.primary_caps.conv.weight, trained.primary_caps.conv.weight)


def test_a_run_goes_on_without_the_weights_that_it_began_with(digits, tmp_path):
    file = tmp_path / "trained.safetensors"
    capszoo.save_model(file, capszoo.create_model("capsnet_tiny", conv_dim=8, num_routing=1), mean=[0.25], std=[0.5])
    (tmp_path / "run").mkdir()
    options = options_from({"model_kwargs": {"conv_dim": 8}, "checkpoint": str(file), "decoder": False, "epochs": 1})
    begun = make_trainer(options, digits, torch.device("cpu"), tmp_path / "run", should_stop=lambda: True)
    assert not begun.fit()
    resumed = replace(begun.options, resume=str(tmp_path / "run"))
    file.unlink()
    trainer = make_trainer(resumed, digits, torch.device("cpu"), tmp_path / "run")
    assert trainer.resume() and trainer.position.step == 1
    model = trainer.task.model
    assert model.arguments()["num_routing"] == 1 and trainer.options.mean == [0.25] and trainer.options.std == [0.5]
    assert trainer.metadata == begun.metadata
    for key, value in model.state_dict().items():
        assert torch.equal(value, begun.task.model.state_dict()[key]), key
    (tmp_path / "run/last.safetensors").unlink()
    with pytest.raises(ValueError, match="no checkpoint at .*trained.safetensors': check the path"):
        make_trainer(resumed, digits, torch.device("cpu"), tmp_path / "run")


def test_options_reach_what_they_name(digits):
    args = options_from({
        **SMALL, "policy": "warm_ada_batch", "epochs": 4, "warm_epochs": 1, "lr": 0.002, "opt": "sgd", "momentum": 0.5,
        "num_routing": 2, "translate": 1, "clip_grad": 3.0, "reconstruction_weight": 0.25, "m_plus": 0.8,
    })  # fmt: skip
    trainer = make_trainer(args, digits, torch.device("cpu"))
    assert [phase.batch_size for phase in trainer.policy.phases()] == [
        1,
        16,
    ] and trainer.policy.warmup_steps == 1293 // 2
    assert trainer.optimizer.defaults["momentum"] == 0.5 and trainer.optimizer.defaults["lr"] == 0.002
    assert trainer.task.model.arguments()["num_routing"] == 2 and trainer.task.reconstruction_weight == 0.25
    assert (trainer.translate, trainer.step.clip_grad, trainer.task.criterion.m_plus) == (1, 3.0, 0.8)
    assert trainer.metadata["model_args"]["conv_dim"] == 8 and trainer.metadata["policy"] == "warm_ada_batch"
    assert trainer.metadata["criterion"] == {"name": "margin", "m_plus": 0.8, "m_minus": 0.1, "lambda": 0.5}


def test_arguments_of_the_model(digits):
    of_data = {"num_classes": 10, "in_chans": 1, "img_size": (28, 28)}
    own = {"decoder": True, "drop_rate": 0.0}
    own["start"] = "default"
    assert model_arguments(options_from({}), digits) == {**of_data, **own}
    assert model_arguments(options_from({"model": "cnn_baseline"}), digits) == {**of_data, "drop_rate": 0.0}
    # What says the same, or says more, or nothing.
    same = {"num_classes": 10, "in_chans": None, "img_size": [28, 28], "num_routing": 2, "conv_dim": 8, "decoder": None}
    expected = {**of_data, **own, "img_size": [28, 28], "num_routing": 2, "conv_dim": 8}
    assert model_arguments(options_from({"model_kwargs": same}), digits) == expected
    assert model_arguments(options_from({"model_kwargs": same, "num_routing": 2}), digits) == expected
    small = options_from({"model_kwargs": {"drop_rate": 1e-5}})
    assert model_arguments(small, digits)["drop_rate"] == 1e-5


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_classes": 3}, "num_classes=3 contradicts the images of 'digits', num_classes=10: leave it out"),
        ({"in_chans": 3}, "in_chans=3 contradicts the images of 'digits', in_chans=1: use --in-chans 3"),
        ({"img_size": 32}, "img_size=32 contradicts the images of 'digits', img_size=(28, 28): use --img-size 32"),
        ({"img_size": [20, 32]}, "img_size=[20, 32] contradicts the images of 'digits', img_size=(28, 28): use "
                                 "--img-size 20 32"),
        ({"num_routing": 4}, "num_routing=4 contradicts --num-routing 2: give one of them"),
        ({"decoder": True}, "decoder=True contradicts --no-decoder: give one of them"),
        ({"device": "meta"}, "device=meta does not go with training: use --device"),
        ({"dtype": None, "features_only": True}, "features_only=True does not go with training: leave it out"),
    ],
)  # fmt: skip
def test_arguments_of_the_model_that_contradict(digits, values, expected):
    args = options_from({"model_kwargs": values, "num_routing": 2, "decoder": False})
    with pytest.raises(UsageError) as caught:
        model_arguments(args, digits)
    assert str(caught.value) == f"--model-kwargs {expected}"


def test_test_set_is_measured_with_the_best_epochs_weights(digits, tmp_path):
    args = options_from({**SMALL, "epochs": 2, "batch_size": 64, "policy": "fixed"})
    trainer = make_trainer(args, digits, torch.device("cpu"), tmp_path)
    assert trainer.fit()
    result = measure_test(trainer, args, digits)
    model = make_model(args, digits)
    load_weights(model, tmp_path / "best.safetensors")
    from capszoo.data import Loader

    assert result["test_top1"] == evaluate(model, Loader(digits.test, 100, "cpu")).top1
    assert result["eval_top1"] == max(row["eval_top1"] for row in trainer.history)
    assert (tmp_path / "result.json").is_file()


def test_seconds_are_those_of_the_clock(digits):
    ticks = iter(range(10_000))
    args = options_from({**SMALL, "epochs": 1, "batch_size": 256, "policy": "fixed"})
    trainer = make_trainer(args, digits, torch.device("cpu"), clock=lambda: next(ticks))
    assert trainer.fit()
    # One look before the first of the 6 steps, one after each, one at the end.
    assert trainer.position.total_seconds == 7


def test_images_are_normalised_by_their_own_statistics(digits):
    args = options_from(SMALL)
    trainer = make_trainer(args, digits, torch.device("cpu"))
    mean, std = digits.statistics()
    assert (trainer.options.mean, trainer.options.std) == (list(mean), list(std)) and 0.1 < mean[0] < 0.2 < std[0] < 0.4
    assert (digits.val.mean, digits.test.std) == (mean, std)
    assert trainer.task.model.pretrained_cfg["mean"] == mean and trainer.metadata["std"] == list(std)
    args = options_from({**SMALL, "mean": [0.0], "std": [1.0]})
    make_trainer(args, digits, torch.device("cpu"))
    assert (digits.train.mean, digits.train.std) == ((0.0,), (1.0,))


def test_shipped_weights_keep_the_normalisation_that_they_were_trained_with(digits):
    args = options_from({"model": "capsnet_tiny.mnist", "pretrained": True, "amp": "none"})
    options = make_trainer(args, digits, torch.device("cpu")).options
    assert (options.mean, options.std) == ([0.0], [1.0])


def test_the_papers_start(digits):
    args = options_from({"start": "paper", "amp": "none"})
    trainer = make_trainer(args, digits, torch.device("cpu"))
    model = trainer.task.model
    assert trainer.options.reconstruction_weight == trainer.task.reconstruction_weight == 0.001
    assert float(model.conv1.scale) == 1 and float(model.primary_caps.conv.scale) == 1 / 8  # 1 / num_types
    biases = (model.conv1.bias, model.primary_caps.conv.bias, model.class_caps.bias)
    assert not any(bias.any() for bias in biases)
    assert float(model.class_caps.weight.std()) == pytest.approx(1.0, rel=0.05)
    assert float(model.primary_caps.conv.weight.std()) == pytest.approx((3 * 5184) ** -0.5, rel=0.05)
    default = make_trainer(options_from({"amp": "none"}), digits, torch.device("cpu"))
    assert default.task.reconstruction_weight == 0.0005
