"""capszoo.lightning: trained by Lightning's Trainer, where that is installed, as by capszoo's own loop."""

import importlib
import re
import sys

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import capszoo
from capszoo.engine import CapsuleTask
from capszoo.errors import TrainingError, UsageError
from capszoo.losses import SpreadLoss
from capszoo.policies import create_policy, list_policies


def test_without_lightning_it_says_what_to_install(monkeypatch):
    for name in ("lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "capszoo.lightning", raising=False)
    message = 'capszoo.lightning needs Lightning: pip install lightning, or "capszoo[lightning]"'
    with pytest.raises(ModuleNotFoundError, match=f"^{re.escape(message)}$"):
        importlib.import_module("capszoo.lightning")


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning")


@pytest.fixture
def make(lightning):
    from capszoo.lightning import CapsuleModule

    def make(model="capsnet_tiny", **kwargs):
        torch.manual_seed(0)
        sizes = {"conv_dim": 8, "num_types": 4, "img_size": 20, "num_classes": 3}
        return CapsuleModule(model, sizes | kwargs.pop("model_args", {}) if isinstance(model, str) else None, **kwargs)

    return make


@pytest.fixture
def trainer(lightning, tmp_path):
    def trainer(**kwargs):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        options = {"max_epochs": 2, "accelerator": "cpu", "enable_checkpointing": False, "default_root_dir": tmp_path}
        return lightning.Trainer(**quiet | options | kwargs)

    return trainer


def loader(count=10, batch_size=4):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 1, 20, 20, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(count) % 3), batch_size=batch_size)


pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and GPUs


@pytest.mark.parametrize(
    ("policy", "options"),
    [("fixed", {}), ("exp_decay", {"decay_steps": 2}), ("one_cycle", {}), ("warm_restarts", {"cycle_epochs": 1})],
)
def test_steps_are_those_of_a_plain_loop_at_the_policys_rates(lightning, make, trainer, policy, options):
    seen = []

    class Rates(lightning.pytorch.callbacks.Callback):
        def on_train_batch_start(self, trainer, module, *batch):
            seen.append(module.optimizers().param_groups[0]["lr"])

    module = make(policy=policy, policy_options=options, model_args={"decoder": True})
    fresh = {key: value.clone() for key, value in module.model.state_dict().items()}
    run = trainer(callbacks=[Rates()])
    run.fit(module, loader())
    assert run.global_step == 6

    made = create_policy(policy, lr=1e-3, batch_size=4, epochs=2, num_images=10, **options)
    assert seen == pytest.approx([lr for _, _, lr in made.schedule()])
    model = capszoo.create_model("capsnet_tiny", **module.model.arguments())
    model.load_state_dict(fresh)
    task, optimizer = CapsuleTask(model, verbose=False), torch.optim.Adam(model.parameters())
    for epoch in range(2):
        for step, batch in enumerate(loader()):
            optimizer.param_groups[0]["lr"] = made.lr(made.progress(epoch, step))
            optimizer.zero_grad()
            task(*batch)["loss"].backward()
            optimizer.step()
    for key, value in module.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-4, atol=1e-5)


def test_policies_that_change_the_batch_size_are_refused(make):
    taken = []
    for policy in list_policies():
        try:
            make(policy=policy)
            taken.append(policy)
        except UsageError as error:
            assert "\n" not in str(error) and f"policy '{policy}'" in str(error)
            assert "choose fixed, exp_decay, one_cycle or warm_restarts" in str(error)
    assert taken == ["fixed", "exp_decay", "one_cycle", "warm_restarts"]
    with pytest.raises(UsageError, match="unknown policy 'one_cicle': did you mean 'one_cycle'"):
        make(policy="one_cicle")
    with pytest.raises(UsageError, match="has no option 'max_rl'"):
        make(policy="one_cycle", policy_options={"max_rl": 1})
    with pytest.raises(UsageError, match="model_args are for a model by name, and a CapsNet is given: leave"):
        type(make())(capszoo.create_model("capsnet_tiny"), {"decoder": True})


def test_runs_of_unknown_length_are_refused(make, trainer):
    for options in ({"max_epochs": -1}, {"max_steps": 3, "max_epochs": None}):
        with pytest.raises(TrainingError, match="needs the length of the run: give the Trainer max_epochs"):
            trainer(**options).fit(make(policy="one_cycle"), loader())


def test_accumulated_batches_are_one_step(make, trainer):
    run = trainer(accumulate_grad_batches=2, max_epochs=3)
    module = make(policy="one_cycle")
    run.fit(module, loader())  # 3 batches, 2 steps an epoch
    assert run.global_step == 6
    last = create_policy("one_cycle", lr=1e-3, batch_size=1, epochs=3, num_images=2)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(last.lr(last.progress(2, 1)))


def test_the_loss_is_told_how_far_the_run_is(lightning, make, trainer):
    margins = []

    class Watch(lightning.Callback):
        def on_train_batch_start(self, run, module, batch, batch_idx):
            margins.append(module.task.criterion.current_margin)

    module = make()
    module.task.criterion = criterion = SpreadLoss(first_margin=0.2)
    trainer(max_epochs=4, callbacks=[Watch()]).fit(module, loader(4))
    expected = []
    for epoch in range(4):
        criterion.set_progress(epoch / 4)
        expected.append(criterion.current_margin)
    assert margins == expected == sorted(set(expected))


def test_logged_values_are_those_of_the_task(make, trainer):
    module = make(model_args={"decoder": True})
    run = trainer()
    (found,) = run.validate(module, loader(), verbose=False)
    images, labels = loader(batch_size=10).dataset.tensors
    with torch.no_grad():
        expected = module.task(images, labels)
    assert found["val_margin_loss"] == pytest.approx(expected["margin_loss"].item(), rel=1e-4)
    assert found["val_reconstruction_loss"] == pytest.approx(expected["reconstruction_loss"].item(), rel=1e-4)
    assert found["val_loss"] == pytest.approx(expected["loss"].item(), rel=1e-4)
    right = (expected["output"].argmax(1) == labels).float().mean().item()
    assert found["val_top1"] == pytest.approx(right)
    scores = torch.cat(run.predict(module, loader()))
    torch.testing.assert_close(scores, expected["output"])
    (found,) = run.test(module, loader(), verbose=False)
    assert found["test_top1"] == pytest.approx(right)


def test_pixels_are_normalised_in_the_module(make, trainer):
    model = capszoo.create_model(
        "capsnet_tiny", conv_dim=8, num_types=4, img_size=20, num_classes=3, decoder=True,
        pretrained_cfg_overlay={"mean": (0.5,), "std": (0.25,)},
    )  # fmt: skip
    module = make(model)
    (found,) = trainer().validate(module, loader(), verbose=False)
    images, labels = loader(batch_size=10).dataset.tensors
    with torch.no_grad():
        expected = CapsuleTask(model.eval(), verbose=False)((images - 0.5) / 0.25, labels)
        capsules, scores = model.forward_capsules((images - 0.5) / 0.25)
        drawn = model.decoder(capsules, labels)
    assert found["val_margin_loss"] == pytest.approx(expected["margin_loss"].item(), rel=1e-4)
    pixels = (drawn - images).square().sum() / len(images)
    assert found["val_reconstruction_loss"] == pytest.approx(pixels.item(), rel=1e-4)


def test_saved_file_and_checkpoint(make, trainer, tmp_path):
    model = capszoo.create_model(
        "efficient_capsnet", conv_dims=[4, 5, 6], img_size=20, num_classes=3,
        pretrained_cfg_overlay={"mean": (0.5,), "std": (0.25,)},
    )  # fmt: skip
    module = make(model, policy="warm_restarts", lr=2e-3)
    run = trainer(max_epochs=1)
    run.fit(module, loader())
    module.save(tmp_path / "model.safetensors", class_names=["a", "b", "c"])
    images = loader().dataset.tensors[0]
    expected = module.eval()(images)
    loaded = capszoo.load_model(tmp_path / "model.safetensors").eval()
    torch.testing.assert_close(loaded((images - 0.5) / 0.25), expected)
    answers = torch.tensor([answer.scores for answer in capszoo.predict(loaded, images)])
    torch.testing.assert_close(answers, torch.cat(run.predict(module, loader())))  # of the same pixels
    assert loaded.pretrained_cfg["label_names"] == ("a", "b", "c") and loaded.pretrained_cfg["mean"] == (0.5,)

    run.save_checkpoint(tmp_path / "last.ckpt")
    again = type(module).load_from_checkpoint(tmp_path / "last.ckpt").eval()
    assert torch.equal(again(images), expected)
    assert (again.policy, again.lr) == ("warm_restarts", 2e-3)
    assert tuple(again.model.pretrained_cfg["mean"]) == (0.5,)


def test_a_resumed_run_goes_on_with_its_rates(lightning, make, trainer, tmp_path):
    keep = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, resumed = make(policy="one_cycle"), make(policy="one_cycle")
    trainer(max_epochs=4, callbacks=[keep], enable_checkpointing=True).fit(whole, loader())
    run = trainer(max_epochs=4)
    run.fit(resumed, loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert run.global_step == 12
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
