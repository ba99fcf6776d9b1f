"""A family of models outside the package goes everywhere that the zoo's own go, by the contract alone.

Its stem has BatchNorm, its capsules are not routed, and its scores are sigmoids beside the capsules, not their lengths.
"""

import csv
import json

import pytest
import timm
import torch
from timm.models import _registry, build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

import capszoo
from capszoo.benchmark.steps import layer_names
from capszoo.checkpoint import load_tensors, read_metadata
from capszoo.engine import evaluate
from capszoo.errors import UsageError
from capszoo.recipes import benchmark, explore, export, prune, train, validate
from capszoo.testing import check_model

NAME = "outside_caps"


class OutsideCaps(nn.Module):
    """A pose and an activation for each class, linear in the features."""

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | tuple[int, int] = 28,
        global_pool: str = "flat",
        width: int = 8,
        pose_dim: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_chans, self.global_pool = in_chans, global_pool
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.width, self.pose_dim = width, pose_dim
        self.num_features = width
        self.head_hidden_size = width * ((self.img_size[0] - 5) // 4 + 1) * ((self.img_size[1] - 5) // 4 + 1)
        self.stem = nn.Conv2d(in_chans, width, 5, stride=4, **dd)
        self.norm = nn.BatchNorm2d(width, **dd)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        dd = {"device": self.stem.weight.device, "dtype": self.stem.weight.dtype}
        self.num_classes = num_classes
        width = num_classes * (self.pose_dim + 1)
        self.votes = nn.Linear(self.head_hidden_size, width, **dd) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.votes

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.stem(x)).relu()

    def class_capsules(self, features: Tensor) -> tuple[Tensor, Tensor]:
        votes = self.votes(features.flatten(1)).unflatten(1, (self.num_classes, self.pose_dim + 1))
        return votes[..., 1:], votes[..., 0].sigmoid()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x.flatten(1) if pre_logits or not self.num_classes else self.class_capsules(x)[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_capsules(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.class_capsules(self.forward_features(x))

    def arguments(self) -> dict:
        own = {"width": self.width, "pose_dim": self.pose_dim, "global_pool": self.global_pool}
        return {"num_classes": self.num_classes, "in_chans": self.in_chans, "img_size": list(self.img_size), **own}

    def auxiliary_modules(self) -> dict:
        return {}

    def capsule_layers(self) -> dict:
        return {"votes": self.votes} if self.num_classes else {}


default_cfgs = generate_default_cfgs({
    f"{NAME}.untrained": {
        "num_classes": 10, "input_size": (1, 28, 28), "fixed_input_size": True, "first_conv": "stem",
        "classifier": "votes", "mean": (0.0,), "std": (1.0,),
    },
})  # fmt: skip


def outside_caps(pretrained: bool = False, **kwargs) -> OutsideCaps:
    """A model that capszoo does not know."""
    return build_model_with_cfg(OutsideCaps, NAME, pretrained, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Registered with timm for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        for key, table in vars(_registry).items():
            if key.startswith("_mod") and isinstance(table, (dict, set)):
                patch.setattr(_registry, key, table.copy())
        register_model(outside_caps)
        yield
    assert not capszoo.is_model(NAME)


@pytest.fixture(scope="module")
def run(registered, tmp_path_factory):
    """The folder of a run on digits."""
    folder = tmp_path_factory.mktemp("family") / "run"
    argv = ["--model", NAME, "--device", "cpu", "--amp", "none", "--epochs", "1", "--batch-size", "32", "--quiet"]
    assert train.main([*argv, "--lr", "0.01", "--model-kwargs", "width=16", "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def weights(run):
    return str(run / "best.safetensors")


def test_listed_and_made():
    assert NAME in capszoo.list_models() and NAME in timm.list_models() and capszoo.is_model(NAME)
    info = capszoo.model_info(NAME)
    assert info.parameters == sum(p.numel() for p in timm.create_model(NAME).parameters()) and info.macs > 0
    with pytest.raises(ValueError, match="unknown keyword 'widht' for model 'outside_caps', did you mean 'width'"):
        capszoo.create_model(NAME, widht=3)


@pytest.mark.parametrize("kwargs", [{}, dict(num_classes=3, in_chans=2, img_size=(20, 33), width=5)], ids=str)
def test_contract(kwargs):
    check_model(NAME, **kwargs)


def test_trained(run, weights):
    result = json.loads((run / "result.json").read_text())
    assert result["model"] == NAME and result["test_reconstruction_error"] is None and result["test_top1"] > 0.5
    with open(run / "summary.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["train_reconstruction_loss"]) == 0 and float(row["train_loss"]) > 0
    model = capszoo.load_model(weights)
    assert isinstance(model, OutsideCaps) and model.width == 16 and int(model.norm.num_batches_tracked) > 0
    assert read_metadata(weights)["model"] == NAME


def test_its_options_repeat_the_run_to_the_same_bits(run, weights, tmp_path):
    argv = (run / "args.yaml").read_text()
    again = tmp_path / "again"
    (tmp_path / "args.yaml").write_text(argv)
    assert train.main(["--config", str(tmp_path / "args.yaml"), "--output", str(again)]) == 0
    one, other = (load_tensors(folder / "best.safetensors")[0] for folder in (run, again))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_evaluated_and_saved(weights, tmp_path):
    model = capszoo.load_model(weights)
    images, labels = torch.rand(6, 1, *model.img_size), torch.arange(6)
    measured = evaluate(model, [(images, labels)])
    capszoo.save_model(tmp_path / "model.safetensors", model)
    again = evaluate(capszoo.load_model(tmp_path / "model.safetensors"), [(images, labels)])
    assert measured.reconstruction_error is None and again.margin_loss == measured.margin_loss


def test_validated_and_exported(weights, tmp_path, capsys):
    assert validate.main([weights, "--device", "cpu", "--robustness", "--json", str(tmp_path / "facts.json")]) == 0
    assert "reconstruction error - (no decoder)" in capsys.readouterr().out
    assert json.loads((tmp_path / "facts.json").read_text())["top1"] > 0.5
    assert export.main(["hub", weights, "--output", str(tmp_path / "hub")]) == 0
    model = capszoo.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    images = torch.rand(2, 1, *model.img_size)
    assert torch.equal(model(images), capszoo.load_model(weights).eval()(images))


def test_pruning_is_refused_in_one_line(weights, tmp_path):
    with pytest.raises(ValueError, match="^outside_caps cannot be pruned: .*$"):
        prune.main([weights, "--keep", "types=0.5", "--device", "cpu", "--output", str(tmp_path / "pruned")])


def test_explored(tmp_path):
    argv = ["--model", NAME, "--trials", "2", "--epochs", "1", "--device", "cpu", "--quiet"]
    assert explore.main([*argv, "--output", str(tmp_path / "study")]) == 0


def test_benchmarked(tmp_path):
    argv = ["--models", NAME, "--batch-sizes", "2", "--rounds", "1", "--device", "cpu", "--amp", "none"]
    assert benchmark.main([*argv, "--output", str(tmp_path / "times.csv")]) == 0
    with open(tmp_path / "times.csv", newline="") as file:
        rows = [(row["subject"], row["variant"], float(row["median_ms"]) > 0) for row in csv.DictReader(file)]
    # It has no large convolutions and no form without routing, which would be variants.
    wanted = [(subject, "fused") for subject in ("training step", "inference")]
    wanted += [("layer", "fused")] * len(layer_names(NAME))
    assert sorted(rows) == sorted((*pair, True) for pair in wanted)
    with pytest.raises(UsageError, match="^model 'outside_caps' has no routing to measure: .*$"):
        benchmark.main([*argv, "--subjects", "routing"])


def test_a_loss_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(OutsideCaps, "default_criterion", lambda self: nn.CrossEntropyLoss(), raising=False)
    argv = ["--model", NAME, "--device", "cpu", "--amp", "none", "--epochs", "1", "--quiet"]
    with pytest.raises(UsageError, match="^--m-plus 0.8 is for the margin loss, and 'outside_caps' trains on its own"):
        train.main([*argv, "--m-plus", "0.8", "--output", str(tmp_path / "refused")])
    assert not (tmp_path / "refused").exists()
    assert train.main([*argv, "--output", str(tmp_path / "run")]) == 0
    loss = json.loads((tmp_path / "run/result.json").read_text())["test_margin_loss"]
    assert 1.46 < loss < 2.4, "the cross-entropy of scores from 0 to 1, which the margin loss never reaches"
