"""Names, keywords and files: what `capszoo.create_model` and its companions accept, count and refuse."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from families import CAPSNETS, sizes_of
from PIL import Image
from timm.models import save_for_hf
from timm.utils.model import unwrap_model
from torch import nn

import capszoo
from capszoo import ModelInfo
from capszoo.checkpoint import load_tensors, read_metadata, save_weights
from capszoo.errors import CheckpointError, WriteError
from capszoo.models import CapsNet
from capszoo.prune import prune
from capszoo.registry import check_arguments

every_model = pytest.mark.parametrize("name", CAPSNETS)
SMALL = dict(conv_dim=8, img_size=20)

# Per capsule of the first convolution's map and of the primary capsules, as the paper's table of shapes gives them.
CONVOLUTIONS = 256 * 20 * 20 * 81 + 256 * 6 * 6 * 256 * 81


def routing_macs(I, K=8, J=10, D=16, R=3):  # noqa: E741
    votes, agreements, sums = I * K * J * D, (R - 1) * I * J * D, R * I * J * D
    return votes + agreements + sums


def refused(function, *args, **kwargs):
    """The one line in which a ValueError says what is wrong."""
    with pytest.raises(ValueError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def weights(monkeypatch):
    """As if weights had been shipped for two of the models."""
    monkeypatch.setattr(
        capszoo.registry, "list_pretrained", lambda *args: ["capsnet_ws.fashion_mnist", "capsnet_ws.mnist"]
    )


@every_model
def test_create(name):
    model = capszoo.create_model(name, num_classes=3, **SMALL)
    assert isinstance(model, CapsNet) and model(torch.rand(1, 1, 20, 20)).shape == (1, 3)


def test_create_passes_timm_keywords():
    model = capszoo.create_model("capsnet", features_only=True, out_indices=(0, 2), feature_cls="hook", **SMALL)
    assert model.feature_info.channels() == [8, 256]
    model = capszoo.create_model("capsnet", pretrained_cfg_overlay=dict(num_classes=4), scriptable=True, **SMALL)
    assert model.num_classes == 4
    assert capszoo.create_model("capsnet", img_size=None, num_classes=None).img_size == (28, 28)


@pytest.mark.parametrize(
    "name, near",
    [("capsnt", "capsnet"), ("capsnet-ws", "capsnet_ws"), ("capsnet_prune", "capsnet_pruned"), ("CapsNet_tiny", None)],
)
def test_unknown_model(name, near):
    message = refused(capszoo.create_model, name)
    assert message.startswith(f"unknown model {name!r}") and "Known: capsnet, " in message
    assert near is None or f"did you mean {near!r}?" in message
    assert all(known in message for known in capszoo.list_models())


@pytest.mark.parametrize("name", ["resnet18", "", "timm/capsnet", "mobilenetv3_small_100.lamb_in1k"])
def test_not_a_model_of_this_zoo(name):
    assert "unknown model" in refused(capszoo.create_model, name) and not capszoo.is_model(name)


@pytest.mark.parametrize("name", ["capsnet.foo", "capsnet_ws.mnst", "capsnet.mnist.v2"])
def test_unknown_weights(name):
    assert refused(capszoo.create_model, name).startswith(f"unknown weights {name!r}")
    assert refused(capszoo.create_model, name, pretrained=True).startswith(f"unknown weights {name!r}")


def test_unknown_weights_near_known_ones(weights):
    message = refused(capszoo.create_model, "capsnet_ws.mnst")
    assert "did you mean 'capsnet_ws.mnist'?" in message and "Known: capsnet_ws.fashion_mnist, " in message


def test_no_weights(weights):
    """A configuration without a file, whatever is shipped by now."""
    cfg = dict(num_classes=10, input_size=(1, 28, 28), fixed_input_size=True)
    message = refused(capszoo.create_model, "capsnet", pretrained=True, pretrained_cfg=cfg)
    assert message.startswith("no weights are shipped for 'capsnet' (there are: capsnet_ws.fashion_mnist,")
    assert message.endswith("use others, or none")


@pytest.mark.parametrize(
    "keyword, near",
    [("num_clases", "num_classes"), ("share_weight", "share_weights"), ("routin", "routing"), ("x", None)],
)
def test_unknown_keyword(keyword, near):
    message = refused(capszoo.create_model, "capsnet_ws", **{keyword: 1})
    assert message.startswith(f"unknown keyword {keyword!r} for model 'capsnet_ws'")
    assert (f"did you mean {near!r}?" in message) if near else ("did you mean" not in message)
    assert "num_routing" in message and "img_size" in message


@pytest.mark.parametrize("keyword", ["variant", "model_cls", "feature_cfg", "model_name", "self", "kwargs"])
def test_keywords_that_only_timm_fills_in(keyword):
    assert "unknown keyword" in refused(capszoo.create_model, "capsnet", **{keyword: "x"})


# What text of a command line, numbers of the wrong kind and lists of the wrong length are answered.
WRONG = [
    ("conv_dim", "abc", "'abc' is not possible: give a whole number"),
    ("conv_dim", "8", "'8' is not possible: give a whole number, conv_dim=8"),
    ("conv_dim", 8.0, "8.0 is not possible: give a whole number"),
    ("conv_dim", True, "True is not possible: give a whole number"),
    ("conv_dim", {"a": 1}, "{'a': 1} is not possible: give a whole number"),
    ("img_size", "(20, 32)", "'(20, 32)' is not possible: give a whole number or a list of 2 whole numbers, "
                             "img_size=[20, 32]"),
    ("img_size", "20x32", "'20x32' is not possible: give a whole number or a list of 2 whole numbers, "
                          "img_size=[20, 32]"),
    ("img_size", [20], "[20] is not possible: give a whole number or a list of 2 whole numbers"),
    ("img_size", (20, 20, 1), "(20, 20, 1) is not possible: give a whole number or a list of 2 whole numbers"),
    ("img_size", [20, 32.0], "[20, 32.0] is not possible: give a whole number or a list of 2 whole numbers"),
    ("decoder_dims", 64, "64 is not possible: give a list of 2 whole numbers"),
    ("decoder_dims", "64,128", "'64,128' is not possible: give a list of 2 whole numbers, decoder_dims=[64, 128]"),
    ("keep_types", ["a"], "['a'] is not possible: give a whole number or a list of whole numbers"),
    ("keep_types", "3", "'3' is not possible: give a whole number or a list of whole numbers, keep_types=3"),
    ("keep_capsules", 3, "3 is not possible: give a list of whole numbers"),
    ("share_weights", "maybe", "'maybe' is not possible: give true or false"),
    ("share_weights", 1, "1 is not possible: give true or false"),
    ("drop_rate", "high", "'high' is not possible: give a number"),
    ("drop_rate", "1e-3", "'1e-3' is not possible: give a number, drop_rate=0.001"),
    ("drop_rate", float("nan"), "nan is not possible: give a number"),
    ("drop_rate", True, "True is not possible: give a number"),
    ("routing", 3, "3 is not possible: give text"),
    ("device", 1.5, "1.5 is not possible: give a device or text"),
    ("dtype", "float16", "'float16' is not possible: give a floating-point torch.dtype"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "expected"), WRONG)
def test_values_of_the_wrong_type(key, value, expected):
    assert refused(capszoo.create_model, "capsnet_tiny", **{**SMALL, key: value}) == f"{key}={expected}"


@pytest.mark.parametrize(("key", "value", "expected"), [case for case in WRONG if case[0] not in ("device", "dtype")])
def test_values_of_the_wrong_type_in_files(key, value, expected, tmp_path):
    expected = f"{key}={expected}".replace("(20, 20, 1)", "[20, 20, 1]")  # as JSON holds it
    model = capszoo.create_model("capsnet_tiny", **SMALL)
    path = tmp_path / "model.safetensors"
    save_weights(path, model, {"model": "capsnet_tiny", "model_args": {**SMALL, key: value}})
    assert refused(capszoo.load_model, path) == f"{str(path)!r} was made with arguments that cannot be used: {expected}"
    save_for_hf(model, tmp_path / "folder", safe_serialization=True)
    config = json.loads((tmp_path / "folder/config.json").read_text())
    (tmp_path / "folder/config.json").write_text(json.dumps({**config, "model_args": {**SMALL, key: value}}))
    name = f"local-dir:{tmp_path / 'folder'}"
    assert refused(capszoo.create_model, name) == f"{name!r} describes no model that can be made: {expected}"


def test_arguments_beside_a_folders_own(tmp_path):
    save_for_hf(capszoo.create_model("cnn_baseline_tiny", **SMALL), tmp_path, safe_serialization=True)
    name = f"local-dir:{tmp_path}"
    assert capszoo.create_model(name, num_classes=np.int64(3), img_size=(20, 32)).img_size == (20, 32)
    assert refused(capszoo.create_model, name, img_size="20") == (
        "img_size='20' is not possible: give a whole number or a list of 2 whole numbers, img_size=20"
    )
    assert "did you mean 'num_classes'?" in refused(capszoo.create_model, name, num_clases=3)
    assert capszoo.registry.model_keywords(name) == capszoo.registry.model_keywords("cnn_baseline")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (dict(conv_dim=np.int64(6)), dict(conv_dim=6)),
        (dict(conv_dim=torch.tensor(6)), dict(conv_dim=6)),
        (dict(img_size=(20, 32)), dict(img_size=[20, 32])),
        (dict(img_size=torch.Size([20, 32])), dict(img_size=[20, 32])),
        (dict(img_size=np.array([20, 32])), dict(img_size=[20, 32])),
        (dict(img_size=(np.int32(20), 32)), dict(img_size=[20, 32])),
        (dict(keep_types=np.int64(2)), dict(keep_types=2)),
        (dict(keep_types=range(2)), dict(keep_types=[0, 1])),
        (dict(keep_types=torch.tensor([1, 3])), dict(keep_types=[1, 3])),
        (dict(keep_capsules=(5, np.int64(0))), dict(keep_capsules=[0, 5])),
        (dict(decoder_dims=np.array([3, 4])), dict(decoder_dims=[3, 4])),
        (dict(share_weights=np.bool_(False)), dict(share_weights=False)),
        (dict(drop_rate=0), dict(drop_rate=0)),
        (dict(drop_rate=np.float64(0.25)), dict(drop_rate=0.25)),
        (dict(squash=np.str_("approx")), dict(squash="approx")),
        (dict(num_classes=None, img_size=None, decoder=None), dict(num_classes=10, img_size=[28, 28], decoder=False)),
        (dict(device="meta", dtype=torch.float64), {}),
        (dict(device=torch.device("cpu"), dtype=float), {}),
    ],
    ids=str,
)
def test_values_of_the_right_type(given, expected):
    """As numpy and torch hold them too; what the model says of itself fits into a header."""
    model = capszoo.create_model("capsnet_tiny", **{**SMALL, **given})
    arguments = json.loads(json.dumps(model.arguments()))
    assert {key: arguments[key] for key in expected} == expected
    assert model.conv1.weight.dtype == (torch.float64 if "dtype" in given else torch.float32)
    assert model.conv1.weight.device == torch.device(given.get("device", "cpu"))


@pytest.mark.parametrize("name", ["capsnet", "cnn_baseline"])
def test_every_argument_has_a_type_that_is_checked(name):
    for key in capszoo.registry.model_keywords(name):
        assert refused(check_arguments, name, {key: object}).startswith(f"{key}=<class 'object'> is not possible: give")


def test_numbers_beyond_any_model():
    huge = 1 << 20_000  # Python writes out no number of so many digits
    assert refused(check_arguments, "capsnet", {"routing": huge}) == (
        "routing=(thousands of digits) is not possible: give text"
    )
    for value in (10**12, 10**30):
        message = refused(capszoo.create_model, "capsnet_tiny", num_classes=value)
        assert message.startswith("'capsnet_tiny' cannot be made (") and message.endswith("check its arguments")


def test_model_keywords():
    known = capszoo.registry.model_keywords("capsnet_ws")
    assert {"num_routing", "decoder", "num_classes", "img_size"} <= known
    assert not {"num_routing", "decoder"} & capszoo.registry.model_keywords("cnn_baseline")
    assert refused(capszoo.registry.model_keywords, "capsnt").startswith("unknown model 'capsnt'")
    assert refused(capszoo.registry.model_keywords, "capsnet.mnst").startswith("unknown weights 'capsnet.mnst'")
    message = refused(capszoo.create_model, "cnn_baseline", num_routing=3)
    assert message.startswith("unknown keyword 'num_routing' for model 'cnn_baseline'")


def test_list_models():
    names = capszoo.list_models()
    assert capszoo.list_models("cnn*") == ["cnn_baseline", "cnn_baseline_tiny"] and "efficient_capsnet" in names
    assert {"capsnet", "capsnet_ws", "capsnet_pruned", "capsnet_tiny"} <= set(names) and names == sorted(names)
    assert capszoo.list_models("*_ws") == ["capsnet_ws"]
    assert capszoo.list_models("capsnet") == ["capsnet"]
    assert capszoo.list_models(["*_ws", "*t_tiny"]) == ["capsnet_tiny", "capsnet_ws"]
    assert capszoo.list_models("resnet*") == []
    assert "capsnet_ws" not in capszoo.list_models(exclude_filters="*_ws")


def test_list_pretrained():
    for name in capszoo.list_pretrained():
        assert capszoo.is_model(name) and "." in name and not name.endswith(".untrained")
    assert set(capszoo.list_pretrained("capsnet_ws")) <= set(capszoo.list_pretrained("capsnet*"))
    assert capszoo.list_pretrained("resnet*") == []


@every_model
def test_is_model(name):
    assert capszoo.is_model(name) and capszoo.is_model(f"{name}.mnist") and not capszoo.is_model(f"{name}_")


@every_model
def test_model_info(name):
    info = capszoo.model_info(name)
    model = capszoo.create_model(name)
    assert info == capszoo.model_info(model) and isinstance(info, ModelInfo)
    assert info.name == name and info.input_size == (1, 28, 28)
    assert info.parameters == sum(p.numel() for p in model.parameters())
    assert info.weights == tuple(capszoo.list_pretrained(name))
    conv1, conv2 = model.conv1.weight.numel() * 20 * 20, model.primary_caps.conv.weight.numel() * 6 * 6
    assert info.macs == conv1 + conv2 + routing_macs(model.class_caps.num_capsules)


def test_model_info_of_the_baseline():
    assert CONVOLUTIONS == 199_397_376
    assert capszoo.model_info("capsnet").macs == CONVOLUTIONS + routing_macs(1152) == 201_793_536
    assert capszoo.model_info("capsnet", num_routing=1).macs == CONVOLUTIONS + routing_macs(1152, R=1)
    assert capszoo.model_info("capsnet", num_classes=0).macs == CONVOLUTIONS
    assert capszoo.model_info("capsnet", decoder=True).macs == 201_793_536  # forward never uses it
    assert capszoo.model_info("capsnet", decoder=True).parameters == 8_215_728


def test_model_info_where_pytorch_has_made_an_operator_anew():
    """As it does when a library that added to it is thrown away, at any time. In a process that may crash after it."""
    code = """
import os, torch, capszoo
names = "capsnet_tiny", "efficient_capsnet", "capsnet_conv_ia", "capsnet_em_mini"
before = [capszoo.model_info(name) for name in names]
kept = vars(torch.ops.capszoo).copy()
for operator in "dynamic_routing", "inverted_attention_routing", "mixture_moments", "self_attention_routing":
    delattr(torch.ops.capszoo, operator)
print(before == [capszoo.model_info(name) for name in names], flush=True)
os._exit(0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "True", result.stdout + result.stderr


def test_model_info_leaves_everything_as_it_was():
    """And it counts the same with the reference, whose sums are no operations to torch's counter."""
    expected = capszoo.model_info("capsnet_tiny")
    model = capszoo.create_model("capsnet_tiny", drop_rate=0.5)
    assert model.training
    capszoo.set_fused_routing(False)
    try:
        assert capszoo.model_info(model).macs == expected.macs
        assert not capszoo.layers.use_fused_routing() and model.training
    finally:
        capszoo.set_fused_routing(True)
    model.conv1.requires_grad_(False)
    assert capszoo.model_info(model.eval()).parameters == expected.parameters - (64 * 81 + 64)
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_model_info_of_half_precision_and_other_sizes():
    info = capszoo.model_info("capsnet", in_chans=3, img_size=(32, 24), dtype=torch.bfloat16)
    assert info.input_size == (3, 32, 24)
    assert info.macs == 256 * 24 * 16 * 243 + 256 * 8 * 4 * 256 * 81 + routing_macs(1024)


def test_model_info_of_unknown_models():
    assert "unknown model" in refused(capszoo.model_info, "capsnt")
    assert "unknown keyword" in refused(capszoo.model_info, "capsnet", num_clases=3)
    says = "is no model of capszoo's zoo: give a name, or what create_model makes"
    assert says in refused(capszoo.model_info, "capsnet_tiny", features_only=True)
    assert says in refused(capszoo.model_info, timm.create_model("resnet18", num_classes=3))


def test_model_info_needs_no_weights(recwarn):
    assert capszoo.model_info("capsnet_tiny", pretrained=True) == capszoo.model_info("capsnet_tiny")
    assert not recwarn.list


@every_model
def test_load_model(name, tmp_path):
    args = dict(num_classes=4, num_routing=2, in_chans=2, decoder=True, img_size=[20, 21], conv_dim=8)
    model = capszoo.create_model(name, **args).eval()
    path = tmp_path / "best.safetensors"
    save_weights(path, model, {"model": name, "model_args": args, "accuracy": 0.5})

    x = torch.rand(2, 2, 20, 21)
    loaded = capszoo.load_model(path).eval()
    assert loaded.pretrained_cfg["architecture"] == name
    assert torch.equal(loaded(x), model(x)) and torch.equal(loaded.reconstruct(x), model.reconstruct(x))
    plain = capszoo.load_model(str(path), decoder=False, num_routing=3).eval()
    assert plain.decoder is None and plain.class_caps.routing.num_iters == 3
    assert torch.equal(plain.conv1.weight, model.conv1.weight)
    assert "has shape" in refused(capszoo.load_model, path, num_classes=5)
    assert "unknown keyword" in refused(capszoo.load_model, path, num_clases=5)


def same_model(path, model, **kwargs):
    """Load a model that was saved, and compare all that must be the same."""
    loaded = capszoo.load_model(path, **kwargs)
    model = unwrap_model(model)
    assert type(loaded) is type(model) and loaded.arguments() == model.arguments()
    for key in ("architecture", "mean", "std"):
        assert loaded.pretrained_cfg[key] == model.pretrained_cfg[key]
    weights = loaded.state_dict()
    assert weights.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(weights[key], value.to(weights[key].dtype)), key
    x = torch.rand(2, model.in_chans, *model.img_size)
    scores = [net.eval()(x.to(next(net.parameters()).dtype)) for net in (loaded, model)]
    assert torch.equal(*scores)
    return loaded


@pytest.mark.parametrize("name", capszoo.list_models())
def test_save_model(name, tmp_path):
    """Round trips: as made, of other images, after each reset of the head, wrapped, pruned, in other dtypes."""
    path = tmp_path / "model.safetensors"
    own = {"decoder": True, "num_routing": 2, "squash": "approx", "couplings": "uniform", "num_passes": 3}
    known = capszoo.registry.model_keywords(name)
    own = {**sizes_of(name), **{key: value for key, value in own.items() if key in known}}
    model = capszoo.create_model(name, num_classes=4, in_chans=3, img_size=(20, 21), drop_rate=0.1, **own)
    capszoo.save_model(path, model, class_names=list("abcd"), accuracy=0.5)
    loaded = same_model(path, model)
    assert loaded.drop_rate == 0.1 and loaded.in_chans == 3 and loaded.img_size == (20, 21)
    header = read_metadata(path)
    assert json.loads(header["class_names"]) == list("abcd") and header["accuracy"] == "0.5"
    assert header["model"] == name and header["capszoo_version"] == capszoo.__version__
    statistics = [list(model.pretrained_cfg[key]) for key in ("mean", "std")]
    assert [json.loads(header[key]) for key in ("mean", "std")] == statistics

    for classes, pool in (7, None), (0, None), (0, ""), (3, "flat"):
        model.reset_classifier(classes, pool)
        capszoo.save_model(path, model)
        assert same_model(path, model).num_classes == classes
    capszoo.save_model(path, torch.compile(model, backend="eager"))
    same_model(path, model)

    model.pretrained_cfg["mean"], model.pretrained_cfg["std"] = (0.1, 0.2, 0.3), (0.5,)
    capszoo.save_model(path, model)
    assert same_model(path, model).default_cfg["mean"] == (0.1, 0.2, 0.3)
    capszoo.save_model(path, model, mean=[0.25], std=[0.5, 0.25, 1])
    assert capszoo.load_model(path).pretrained_cfg["std"] == (0.5, 0.25, 1.0)

    first = f"{model.pretrained_cfg['first_conv']}.weight"
    model = model.double()
    capszoo.save_model(path, model)
    assert load_tensors(path)[0][first].dtype == torch.float64
    assert capszoo.load_model(path).get_parameter(first).dtype == torch.float32
    assert same_model(path, model, dtype=torch.float64).get_parameter(first).dtype == torch.float64
    capszoo.save_model(path, model.half())
    assert load_tensors(path)[0][first].dtype == torch.float16
    assert torch.equal(capszoo.load_model(path).get_parameter(first), model.get_parameter(first).float())
    assert capszoo.load_model(path, dtype=torch.float16).get_parameter(first).dtype == torch.float16


@every_model
@pytest.mark.parametrize(
    "keep", [{"types": [1], "conv1": 3}, {"capsules": [0, 3, 4, 7]}, {"types": 1, "decoder": 0.5}], ids=str
)
def test_save_pruned_models(name, keep, tmp_path):
    small = dict(num_types=2, conv_dim=4, img_size=20, decoder=True, decoder_dims=(4, 6), keep_types=[0, 1])
    model, _ = prune(capszoo.create_model(name, **small), keep, score="magnitude")
    capszoo.save_model(tmp_path / "model.safetensors", model)
    same_model(tmp_path / "model.safetensors", model)
    model.reset_classifier(0)
    capszoo.save_model(tmp_path / "model.safetensors", model)
    same_model(tmp_path / "model.safetensors", model)


def test_save_model_refuses_what_could_not_be_loaded(tmp_path):
    path = tmp_path / "model.safetensors"
    model = capszoo.create_model("capsnet_tiny", **SMALL)
    for levels in [0], [1]:
        cut = copy.deepcopy(model)
        cut.prune_intermediate_layers(levels, prune_norm=True)
        assert "'capsnet_tiny' could not be made again: its 'primary_caps" in refused(capszoo.save_model, path, cut)
    features = capszoo.create_model("capsnet_tiny", features_only=True, **SMALL)
    for other in nn.Linear(2, 2), features, CapsNet(num_classes=2), timm.create_model("test_resnet"):
        message = refused(capszoo.save_model, path, other)
        assert message == f"this {type(other).__name__} was not made by capszoo.create_model: write it with safetensors"
    assert "'model_args' is what the header says" in refused(capszoo.save_model, path, model, model_args={})
    with pytest.raises(WriteError, match="cannot be written"):
        capszoo.save_model(tmp_path / "nowhere" / "model.safetensors", model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["mean", "std"])
@pytest.mark.parametrize("value", ["0.5", [], [0.1, 0.2], ["1"], [True], "[1", [float("nan")], 0.5])
def test_normalisation_of_a_damaged_header(key, value, tmp_path):
    path = tmp_path / "model.safetensors"
    capszoo.save_model(path, capszoo.create_model("capsnet_tiny", **SMALL), **{key: value})
    with pytest.raises(CheckpointError, match=f"is damaged \\(its '{key}' is .*, not a number for each channel"):
        capszoo.load_model(path)
    capszoo.save_model(path, capszoo.create_model("capsnet_tiny", **SMALL), mean=[0.0], std=[0.0])
    with pytest.raises(CheckpointError, match="its 'std' is"):
        capszoo.load_model(path)


def test_load_model_of_a_file_that_does_not_say(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(path, capszoo.create_model("capsnet", **SMALL), {})
    with pytest.raises(CheckpointError, match="does not say what model it holds: use create_model"):
        capszoo.load_model(path)
    assert capszoo.create_model("capsnet", checkpoint_path=path, **SMALL).num_classes == 10
    save_weights(path, capszoo.create_model("capsnet", **SMALL), {"model": "resnet18", "model_args": json.dumps({})})
    assert "unknown model 'resnet18'" in refused(capszoo.load_model, path)
    with pytest.raises(CheckpointError, match="check the path"):
        capszoo.load_model(tmp_path / "nothing.safetensors")


def test_checkpoint_of_another_model(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(path, capszoo.create_model("capsnet_ws", **SMALL), {"model": "capsnet_ws"})
    message = refused(capszoo.create_model, "capsnet", checkpoint_path=path, **SMALL)
    assert "holds weights of the model 'capsnet_ws'" in message and str(path) in message


def test_names_of_the_package():
    assert set(capszoo.__all__) <= set(dir(capszoo))
    assert capszoo.create_model.__doc__ and capszoo.__version__


def test_features_only_with_a_checkpoint_says_what_to_do(tmp_path):
    path = tmp_path / "w.safetensors"
    model = capszoo.create_model("capsnet_tiny", conv_dim=4)
    save_weights(path, model, {})
    with pytest.raises(ValueError, match="pretrained_cfg_overlay"):
        capszoo.create_model("capsnet_tiny", conv_dim=4, features_only=True, checkpoint_path=path)
    overlay = {"file": str(path)}
    features = capszoo.create_model(
        "capsnet_tiny", conv_dim=4, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay
    )
    assert torch.equal(features.model.conv1.weight, model.conv1.weight)


def test_a_file_in_the_configuration_is_described_by_its_header(tmp_path):
    model = capszoo.create_model("capsnet_tiny", conv_dim=4)
    names = list("abcdefghij")
    capszoo.save_model(tmp_path / "w.safetensors", model, mean=[0.3], std=[0.2], class_names=names)
    overlay = {"file": str(tmp_path / "w.safetensors")}
    kwargs = {"conv_dim": 4, "pretrained": True}
    found = capszoo.create_model("capsnet_tiny", pretrained_cfg_overlay=overlay, **kwargs)
    assert found.pretrained_cfg["mean"] == (0.3,) and found.pretrained_cfg["label_names"] == tuple(names)
    assert not found.pretrained_cfg.get("description") and not found.pretrained_cfg.get("notes")
    features = capszoo.create_model("capsnet_tiny", features_only=True, pretrained_cfg_overlay=overlay, **kwargs)
    assert timm.data.resolve_model_data_config(features)["std"] == (0.2,)
    given = capszoo.create_model("capsnet_tiny", pretrained_cfg_overlay={**overlay, "mean": (0.1,)}, **kwargs)
    assert given.pretrained_cfg["mean"] == (0.1,) and given.pretrained_cfg["std"] == (0.2,)
    capszoo.save_model(tmp_path / "w.safetensors", model, mean=[])
    assert "its 'mean' is '[]'" in refused(
        capszoo.create_model, "capsnet_tiny", pretrained_cfg_overlay=overlay, **kwargs
    )


def test_names_of_classes_go_with_the_head_that_learnt_them(tmp_path):
    names = capszoo.create_model("capsnet_tiny.fashion_mnist", pretrained=True).pretrained_cfg["label_names"]
    assert names[8] == "Bag"
    for kwargs in ({}, {"in_chans": 3}, {"img_size": 32}):
        model = capszoo.create_model("capsnet_tiny.fashion_mnist", pretrained=True, **kwargs)
        capszoo.save_model(tmp_path / "w.safetensors", model)
        for found in (model, capszoo.load_model(tmp_path / "w.safetensors")):
            assert tuple(found.pretrained_cfg["label_names"]) == tuple(names), kwargs
    model.reset_classifier(10)
    fresh = capszoo.create_model("capsnet_tiny.fashion_mnist")
    other = capszoo.create_model("capsnet_tiny.fashion_mnist", pretrained=True, num_classes=3)
    for found in (model, fresh, other):
        assert not found.pretrained_cfg.get("label_names")
    capszoo.save_model(tmp_path / "w.safetensors", fresh)
    assert "class_names" not in read_metadata(tmp_path / "w.safetensors")


def test_single_capsules_belong_to_their_image_size(tmp_path):
    options = dict(conv_dim=4, num_types=2, keep_capsules=[0, 5, 40])
    model = capszoo.create_model("capsnet", **options)
    save_weights(tmp_path / "model.safetensors", model, {"model": "capsnet", "model_args": options})
    assert capszoo.load_model(tmp_path / "model.safetensors", img_size=28).num_classes == 10
    for size, shown in ((32, "32"), ((20, 32), r"\[20, 32\]")):
        with pytest.raises(ValueError, match=f"keeps single capsules of images of 28x28: leave out img_size={shown}"):
            capszoo.load_model(tmp_path / "model.safetensors", img_size=size)
    assert "img_size='20x32' is not possible" in refused(
        capszoo.load_model, tmp_path / "model.safetensors", img_size="20x32"
    )
    save_weights(
        tmp_path / "null.safetensors", model, {"model": "capsnet", "model_args": {**options, "img_size": None}}
    )
    assert capszoo.load_model(tmp_path / "null.safetensors", img_size=(28, 28)).img_size == (28, 28)


def test_a_loaded_model_describes_its_own_weights(tmp_path):
    """And not those that are shipped: timm's transforms are right with it."""
    model = capszoo.create_model("capsnet_tiny", num_classes=3, in_chans=3, img_size=(20, 24), conv_dim=8)
    assert "label_names" not in model.pretrained_cfg and "notes" not in model.pretrained_cfg
    assert model.pretrained_cfg["input_size"] == (3, 20, 24) and model.pretrained_cfg["num_classes"] == 3
    names = ["cat", "dog", "bird"]
    facts = {"class_names": names, "dataset": "pets", "mean": [0.5] * 3, "std": [0.25] * 3}
    capszoo.save_model(tmp_path / "m.safetensors", model, **facts)
    loaded = capszoo.load_model(tmp_path / "m.safetensors")
    cfg = loaded.pretrained_cfg
    assert cfg["label_names"] == tuple(names) and cfg["description"] == "trained on pets" and cfg["num_classes"] == 3
    assert not {"notes", "license", "file", "tag", "url"} & cfg.keys()
    config = timm.data.resolve_model_data_config(loaded)
    assert (config["input_size"], config["mean"], config["std"]) == ((3, 20, 24), (0.5,) * 3, (0.25,) * 3)
    pixels = timm.data.create_transform(**config, is_training=False)(Image.new("RGB", (60, 50), (255, 0, 0)))
    assert pixels.shape == (3, 20, 24) and pixels[0].eq(2).all() and pixels[1].eq(-2).all()
    capszoo.save_model(tmp_path / "odd.safetensors", model, class_names=["cat"])  # says nothing of three classes
    assert "label_names" not in capszoo.load_model(tmp_path / "odd.safetensors").pretrained_cfg


def test_shipped_weights_are_described_by_their_table():
    model = capszoo.create_model("capsnet_tiny.mnist", pretrained=True)
    assert len(model.pretrained_cfg["label_names"]) == 10 and model.pretrained_cfg["notes"]
    other = capszoo.create_model("capsnet_tiny", num_classes=3)
    assert not {"label_names", "notes", "description"} & other.pretrained_cfg.keys()


def test_a_keyword_that_is_wrong_is_not_the_files_fault(tmp_path):
    capszoo.save_model(tmp_path / "model.safetensors", capszoo.create_model("capsnet_tiny", conv_dim=8))
    with pytest.raises(ValueError, match="^unknown keyword 'decodr' for model 'capsnet_tiny', did you mean 'decoder'"):
        capszoo.load_model(tmp_path / "model.safetensors", decodr=True)
