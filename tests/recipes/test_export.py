"""recipes/export.py: weights shipped with their card, weights refused, and folders that timm loads."""

import json
import shlex
import shutil

import pytest
import timm
import torch
import yaml
from safetensors import safe_open

import capszoo
from capszoo import pretrained
from capszoo.checkpoint import load_tensors, save_tensors, save_weights
from capszoo.command_line import run
from capszoo.errors import UsageError

CARD = {
    "capszoo_version",
    "model",
    "model_args",
    "mean",
    "std",
    "dataset",
    "class_names",
    "recipe",
    "policy",
    "epochs",
    "epoch",
    "seed",
    "amp",
    "eval_top1",
    "test_top1",
    "precision",
    "license",
    "date",
    "format",
}


@pytest.fixture
def export(recipe, weights_dir, capsys):
    """Run the recipe as a shell would: what it printed, or the one line of an error."""

    def call(*argv):
        with pytest.raises(SystemExit) as ended:
            run(lambda: recipe("export").main([str(word) for word in argv]))
        out, err = capsys.readouterr()
        if ended.value.code:
            assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and not out
        return out or err

    return call


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_ship(export, make_run, weights_dir):
    file = make_run(args={"drop_rate": 0.25, "channels_last": False, "model_kwargs": {"class_dim": 16}, "seed": 5})
    out = export("ship", file, "--name", "capsnet_tiny.mnist", "--license", "cc-by-4.0")
    assert out.startswith("capsnet_tiny.mnist: 0.9 MB, test top1 of the run 0.9765, ")
    assert set(files(weights_dir)) == {"capsnet_tiny.mnist.safetensors", "weights.json"}
    path = weights_dir / "capsnet_tiny.mnist.safetensors"
    tensors, card = load_tensors(path)
    source, _ = load_tensors(file)
    assert tensors.keys() == source.keys()
    for key, value in tensors.items():
        assert value.dtype == torch.float16 and torch.equal(value, source[key].half())
    assert set(card) == CARD
    assert card["recipe"] == (
        "python recipes/train.py --model capsnet_tiny --dataset mnist --epochs 3 --lr 0.002 --drop-rate 0.25 "
        "--no-channels-last --model-kwargs class_dim=16 --seed 5"
    )
    assert json.loads(card["test_top1"]) == 0.97654 and json.loads(card["eval_top1"]) == 0.98765  # of the whole run
    assert json.loads(card["mean"]) == [0.0] and json.loads(card["std"]) == [1.0]
    assert card["license"] == "cc-by-4.0" and card["precision"] == "float16" and card["amp"] == "none"
    entry = json.loads((weights_dir / "weights.json").read_text())["capsnet_tiny.mnist"]
    assert entry["sha256"] == pretrained.sha256_of(path) and entry["top1"] == 0.97654
    assert entry["recipe"] == card["recipe"] and entry["license"] == "cc-by-4.0" and entry["dataset"] == "mnist"
    assert (entry["num_classes"], entry["input_size"], entry["pool_size"]) == (10, [1, 28, 28], [6, 6])


def test_recipe_repeats_the_options(recipe, make_run):
    more = {"img_size": [20, 32], "download": True, "model_kwargs": {"conv_dim": 8, "decoder_dims": [4, 8]}}
    file = make_run(args={"seed": 3, "decoder": False, "rise": 0.3, "max_lr": "5x", "clip_grad": 1.5, **more})
    command = recipe("export").read_recipe(file.parent)
    args = recipe("train").parse_args(shlex.split(command)[2:])
    assert (args.model, args.dataset, args.epochs, args.lr, args.seed) == ("capsnet_tiny", "mnist", 3, 0.002, 3)
    assert args.decoder is False and args.clip_grad == 1.5
    assert (args.policy_options["rise"], args.policy_options["max_lr"]) == (0.3, "5x")
    assert args.img_size == [20, 32] and args.model_kwargs == {"conv_dim": 8, "decoder_dims": [4, 8]}
    assert (args.data_dir, args.download) == ("data", False)  # where the data was is no part of it


def test_ship_again(export, make_run, weights_dir):
    export("ship", make_run(), "--name", "capsnet_tiny.mnist")
    other = make_run(seed=1)
    before = files(weights_dir)
    message = export("ship", other, "--name", "capsnet_tiny.mnist")
    assert "weights 'capsnet_tiny.mnist' are there already" in message and files(weights_dir) == before
    export("ship", other, "--name", "capsnet_tiny.second")
    export("ship", other, "--name", "capsnet_tiny.mnist", "--replace")
    assert list(pretrained.read_table()) == ["capsnet_tiny.mnist", "capsnet_tiny.second"]
    one, two = (load_tensors(pretrained.weights_path(name))[0] for name in pretrained.read_table())
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_pruned_weights_fit_their_own_entrypoint(export, make_run, weights_dir):
    """Which types were kept does not matter to the shapes; what the entrypoint's name says does."""
    kept = dict(keep_types=[1, 2, 3, 5, 8, 13, 21, 30], conv_dim=192, decoder_dims=(256, 512))
    file = make_run("capsnet_pruned", **kept)
    export("ship", file, "--name", "capsnet_pruned.mnist")
    model = capszoo.load_model(pretrained.weights_path("capsnet_pruned.mnist"))
    assert model.keep_types == tuple(kept["keep_types"])
    other = make_run("capsnet", seed=1, **kept)  # the same network by another name
    assert export("ship", other, "--name", "capsnet_pruned.two").startswith("capsnet_pruned.two: ")
    assert capszoo.load_model(pretrained.weights_path("capsnet_pruned.two")).keep_types == ()
    message = export("ship", other, "--name", "capsnet.mnist")
    assert "do not fit 'capsnet': 'conv1.weight' has shape (192, 1, 9, 9), the model needs" in message


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(conv_dim=32), "'conv1.weight' has shape (32, 1, 9, 9), the model needs (64, 1, 9, 9)"),
        (dict(decoder_dims=[64, 100]), "'decoder.fc2.weight' has shape (100, 64), the model needs (128, 64)"),
        (dict(num_routing=2), "they were trained with num_routing=2, the model has num_routing=3"),
        (dict(squash="approx"), "they were trained with squash='approx', the model has squash='exact'"),
    ],
)
def test_misfit(export, make_run, weights_dir, kwargs, message):
    error = export("ship", make_run(**kwargs), "--name", "capsnet_tiny.mnist")
    assert f"the weights do not fit 'capsnet_tiny': {message}" in error
    assert files(weights_dir) == {}


def test_foreign_tensor(export, make_run, weights_dir):
    file = make_run("cnn_baseline_tiny", seed=2)
    tensors, header = load_tensors(file)
    save_tensors(file, {**tensors, "more": torch.zeros(1)}, header)
    message = export("ship", file, "--name", "cnn_baseline_tiny.mnist")
    assert "this model has no 'more'" in message
    save_tensors(file, tensors, header)
    assert export("ship", file, "--name", "cnn_baseline_tiny.mnist").startswith("cnn_baseline_tiny.mnist: ")
    assert "do not fit 'capsnet_tiny'" in export("ship", file, "--name", "capsnet_tiny.mnist")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(result={"best_epoch": 3}), "holds epoch 2, and "),
        (dict(result={"test_top1": None}), "comes without test_top1"),
        (dict(header={"class_names": None}), "comes without class_names"),
        (dict(header={"model": "resnet18"}), "unknown model 'resnet18'"),
        (dict(args={"checkpoint": "/home/me/w.safetensors"}), "a path of this machine"),
    ],
)
def test_unusable_run(export, make_run, weights_dir, change, message):
    assert message in export("ship", make_run(**change), "--name", "capsnet_tiny.mnist")
    assert files(weights_dir) == {}


def test_run_that_has_not_ended(export, make_run, weights_dir):
    file = make_run()
    (file.parent / "args.yaml").unlink()
    assert "has no args.yaml of a recipe: give --recipe" in export("ship", file, "--name", "capsnet_tiny.mnist")
    (file.parent / "result.json").unlink()
    assert "comes without test_top1" in export("ship", file, "--name", "capsnet_tiny.mnist")
    save_weights(file, capszoo.create_model("capsnet_tiny", decoder=True), {})
    assert "does not say what model it holds" in export("ship", file, "--name", "capsnet_tiny.mnist")
    file.write_bytes(file.read_bytes()[:5000])
    assert "damaged" in export("ship", file, "--name", "capsnet_tiny.mnist")
    assert files(weights_dir) == {}


def test_recipe_of_a_pruned_network(recipe, make_run):
    file = make_run()
    (file.parent / "args.yaml").write_text(
        "# python recipes/prune.py --config x\nkeep: {types: 8, decoder: [64, 128]}\nweights: runs/a/best.safetensors\n"
    )
    command = recipe("export").read_recipe(file.parent)
    assert command == "python recipes/prune.py runs/a/best.safetensors --keep types=8 'decoder=[64, 128]'"
    (file.parent / "args.yaml").write_text("epochs: 3\n")
    assert recipe("export").read_recipe(file.parent) is None


def test_recipe_by_hand(export, make_run, weights_dir):
    file = make_run()
    (file.parent / "args.yaml").unlink()
    export("ship", file, "--name", "capsnet_tiny.mnist", "--recipe", "python recipes/prune.py runs/x --to 8")
    with safe_open(pretrained.weights_path("capsnet_tiny.mnist"), "pt") as opened:
        assert opened.metadata()["recipe"] == "python recipes/prune.py runs/x --to 8"


def test_numbers_that_float16_cannot_hold(export, make_run, weights_dir):
    file = make_run()
    tensors, header = load_tensors(file)
    tensors["conv1.bias"][3] = 1e6
    save_tensors(file, tensors, header)
    error = export("ship", file, "--name", "capsnet_tiny.mnist")
    assert "'conv1.bias' holds numbers that float16 cannot: the largest is 1e+06" in error
    assert files(weights_dir) == {}


def test_no_more_than_a_clone_should_carry(export, recipe, make_run, weights_dir, monkeypatch):
    module = recipe("export")
    assert module.MAX_BYTES == 50_000_000
    monkeypatch.setattr(module, "MAX_BYTES", 1_500_000)
    one, other = make_run(), make_run(seed=1)
    assert module.main(["ship", str(one), "--name", "capsnet_tiny.mnist"]) == 0
    with pytest.raises(UsageError, match="0.9 MB more than 0.9 MB would pass 2 MB"):
        module.main(["ship", str(other), "--name", "capsnet_tiny.other"])
    assert module.main(["ship", str(other), "--name", "capsnet_tiny.mnist", "--replace"]) == 0


@pytest.mark.parametrize(
    "argv, message",
    [
        (["ship", "nowhere", "--name", "capsnet_tiny.mnist"], "no checkpoint at 'nowhere'"),
        (["ship", "nowhere", "--name", "capsnet_tny.mnist"], "did you mean 'capsnet_tiny'?"),
        (["ship", "nowhere", "--name", "capsnet_tiny"], "needs a tag in small letters, such as capsnet_tiny.mnist"),
        (["ship", "nowhere", "--name", "capsnet_tiny.../x"], "needs a tag"),
        (["ship", "nowhere"], "--name"),
        (["ship", "nowhere", "--nam", "capsnet_tiny.mnist"], "--name"),
        (["hub", "nowhere", "--output", "new"], "'nowhere' is no file and no shipped weights"),
        (["hub", "capsnet_tiny.mnist", "--output", "new"], "no weights are shipped as 'capsnet_tiny.mnist'"),
        (["hub", "nowhere"], "--output"),
        (["push"], "invalid choice: 'push'"),
        ([], "job"),
    ],
)
def test_wrong_command_line(export, argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in export(*argv)
    assert not (tmp_path / "new").exists()


def front_matter(folder):
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.mark.parametrize("of", ["name", "file"])
def test_hub_folder(export, make_run, weights_dir, tmp_path, of):
    file = make_run(dataset="fashion_mnist", num_routing=3)
    if of == "name":
        export("ship", file, "--name", "capsnet_tiny.fashion_mnist")
        file = pretrained.weights_path("capsnet_tiny.fashion_mnist")
    folder = tmp_path / "hub" / "folder"
    out = export("hub", "capsnet_tiny.fashion_mnist" if of == "name" else file, "--output", folder)
    assert "capsnet_tiny.fashion_mnist" in out
    licence = "mit" if of == "name" else None  # of weights of one's own nobody else says it
    assert ("it names no licence" in out) == (licence is None)
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert (folder / "model.safetensors").read_bytes() == file.read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "capsnet_tiny" and config["label_names"][3] == "class 3"
    assert config["pretrained_cfg"]["tag"] == "fashion_mnist" and "file" not in config["pretrained_cfg"]
    assert config["pretrained_cfg"].get("license") == licence
    assert config["pretrained_cfg"]["notes"] == [f"sha256 {pretrained.sha256_of(file)}"]
    assert str(tmp_path) not in json.dumps(config)

    source = capszoo.load_model(file).eval()
    x = torch.rand(2, 1, 28, 28)
    for create in timm.create_model, capszoo.create_model:
        model = create(f"local-dir:{folder}", pretrained=True).eval()
        assert torch.equal(model(x), source(x)) and torch.equal(model.reconstruct(x), source.reconstruct(x))
        assert model.pretrained_cfg["label_names"][3] == "class 3" and model.conv1.weight.dtype == torch.float32
        plain = create(f"local-dir:{folder}", pretrained=True, decoder=False, num_classes=4)
        assert plain(x).shape == (2, 4) and plain.decoder is None

    front, text = front_matter(folder)
    assert front["library_name"] == "timm" and front.get("license") == licence and front["metrics"] == ["accuracy"]
    assert {"timm", "image-classification"} <= set(front["tags"])
    assert front["datasets"] == ["zalando-datasets/fashion_mnist"]
    (result,) = front["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.97654}]
    assert text.startswith("# capsnet_tiny.fashion_mnist\n") and "python recipes/train.py" in text
    assert "import capszoo" in text and "458,032" in text


def test_hub_of_other_images(export, make_run, tmp_path):
    file = make_run(
        "capsnet_ws",
        "shapes",
        conv_dim=8,
        num_types=4,
        decoder_dims=[6, 7],
        img_size=[20, 22],
        in_chans=3,
        num_classes=4,
    )
    export("hub", file, "--output", tmp_path / "out", "--license", "apache-2.0")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.rand(1, 3, 20, 22)
    assert torch.equal(model(x), capszoo.load_model(file).eval()(x))
    assert front_matter(tmp_path / "out")[0]["license"] == "apache-2.0"


def test_hub_of_a_lone_file(export, make_run, tmp_path):
    """Without run folder there is less to say, and nothing made up."""
    file = shutil.copy(make_run("cnn_baseline_tiny"), tmp_path / "alone.safetensors")
    export("hub", file, "--output", tmp_path / "out")
    front, text = front_matter(tmp_path / "out")
    assert "model-index" not in front and "Recipe" not in text and "Test top-1" not in text
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).capsule_layers() == {}


def test_hub_of_a_file_whose_facts_are_null(export, make_run, tmp_path):
    """They say as much as missing ones."""
    tensors, header = load_tensors(make_run("cnn_baseline_tiny"))
    facts = ("dataset", "license", "recipe", "eval_top1", "epochs", "class_names")
    save_tensors(tmp_path / "alone.safetensors", tensors, {**header, **dict.fromkeys(facts, "null")})
    export("hub", tmp_path / "alone.safetensors", "--output", tmp_path / "out")
    front, text = front_matter(tmp_path / "out")
    assert "license" not in front and "datasets" not in front
    assert "# cnn_baseline_tiny.custom" in text and "None" not in text


def test_hub_of_a_data_set_whose_name_is_a_number(export, make_run, tmp_path):
    tensors, header = load_tensors(make_run("cnn_baseline_tiny"))
    save_tensors(tmp_path / "alone.safetensors", tensors, {**header, "dataset": "2024"})
    export("hub", tmp_path / "alone.safetensors", "--output", tmp_path / "out")
    front, _ = front_matter(tmp_path / "out")
    assert front["datasets"] == ["2024"] or front["datasets"] == "2024"


def test_hub_refuses_folders_in_use_and_damaged_weights(export, make_run, weights_dir, tmp_path):
    export("ship", make_run(), "--name", "capsnet_tiny.mnist")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes.txt").write_text("mine")
    assert "is not empty: choose another --output" in export("hub", "capsnet_tiny.mnist", "--output", tmp_path / "used")
    assert files(tmp_path / "used") == {"notes.txt": b"mine"}
    assert "is not empty" in export("hub", "capsnet_tiny.mnist", "--output", tmp_path / "used/notes.txt")
    path = pretrained.weights_path("capsnet_tiny.mnist")
    path.write_bytes(path.read_bytes() + b"\0")
    assert "are damaged" in export("hub", "capsnet_tiny.mnist", "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    assert "empty" in export("hub", make_run(seed=1), "--output", tmp_path / "empty")
