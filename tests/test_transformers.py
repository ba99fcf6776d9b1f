"""Folders of `recipes/export.py hub` in Hugging Face transformers, where that is installed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import capszoo
from capszoo import pretrained
from capszoo.checkpoint import load_tensors
from capszoo.losses import margin_loss

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def modelling():
    import capszoo.transformers

    return capszoo.transformers


@pytest.fixture(scope="module")
def export(recipe):
    return recipe("export")


@pytest.fixture
def grey(export, tmp_path):
    """The folder of shipped weights: float16, and older than the scales of convolutions."""
    export.main(["hub", "capsnet_tiny.mnist", "--output", str(tmp_path / "grey")])
    return str(tmp_path / "grey")


@pytest.fixture
def colour(export, make_run, tmp_path):
    """The folder of a run on colour images that are not square."""
    file = make_run("capsnet_tiny", "pets", in_chans=3, img_size=[20, 24], num_classes=3,
                    header={"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]})  # fmt: skip
    export.main(["hub", str(file), "--output", str(tmp_path / "colour")])
    return str(tmp_path / "colour")


def pictures():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 37, 52, 3), dtype=np.uint8)
    return [Image.fromarray(pixels[0]), Image.fromarray(pixels[1]).convert("L")]


@pytest.mark.parametrize("kind", ["grey", "colour"])
def test_same_answers_as_predict(modelling, kind, request):
    folder = request.getfixturevalue(kind)
    classify = transformers.pipeline("image-classification", model=folder, function_to_apply="none")
    model = capszoo.create_model(f"local-dir:{folder}", pretrained=True)
    for picture in pictures():
        expected = capszoo.predict(model, picture)
        found = classify(picture, top_k=2)
        assert [one["label"] for one in found] == [expected.class_name, expected.second_name]
        assert [one["score"] for one in found] == pytest.approx([expected.score, expected.second_score], abs=1e-5)
    names = model.pretrained_cfg["label_names"]
    assert classify.model.config.id2label == dict(enumerate(names)) and classify.model.dtype == torch.float32


def test_without_our_module(grey, monkeypatch):
    """transformers' own wrapper, for which `import capszoo` is enough, gives the same scores of grey images."""
    wrapper = transformers.TimmWrapperForImageClassification
    model, report = wrapper.from_pretrained(grey, output_loading_info=True)
    assert not any(report.values())
    picture = pictures()[1]
    processor = transformers.TimmWrapperImageProcessor.from_pretrained(grey)
    scores = model.eval()(**processor(picture)).logits[0]
    expected = capszoo.predict(capszoo.create_model("capsnet_tiny.mnist", pretrained=True), picture)
    assert scores.tolist() == pytest.approx(expected.scores, abs=1e-5)
    features = transformers.AutoModel.from_pretrained(grey)(**processor(picture))
    assert features.pooler_output.shape == (1, 2304)


def test_fine_tuning(modelling, grey, tmp_path):
    names = {0: "even", 1: "odd"}
    torch.manual_seed(0)
    model = transformers.AutoModelForImageClassification.from_pretrained(
        grey, id2label=names, num_labels=2, ignore_mismatched_sizes=True
    )
    model.config.label_names = [*names.values()]  # else transformers saves those of the folder
    # What the file did not hold begins as in a fresh model, and what it held is there.
    fresh = model.timm_model.class_caps
    assert fresh.weight.std().item() == pytest.approx(0.1, rel=0.1) and (fresh.bias == 0.1).all()
    source = capszoo.create_model("capsnet_tiny.mnist", pretrained=True)
    assert torch.equal(model.timm_model.conv1.weight * model.timm_model.conv1.scale,
                       source.conv1.weight * source.conv1.scale)  # fmt: skip
    images, labels = torch.rand(8, 1, 28, 28), torch.arange(8) % 2
    out = model.eval()(images, labels=labels)
    torch.testing.assert_close(out.loss, margin_loss(out.logits, labels))

    before = fresh.weight.detach().clone()
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        learning_rate=0.01, disable_tqdm=True,
    )  # fmt: skip
    items = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
    trainer = transformers.Trainer(model, arguments, train_dataset=items)
    assert trainer.train().global_step == 2 and not torch.equal(fresh.weight, before)

    trainer.save_model(str(tmp_path / "saved"))
    again = transformers.AutoModelForImageClassification.from_pretrained(str(tmp_path / "saved")).eval()
    assert torch.equal(again(images).logits, model.eval()(images).logits)
    assert again.config.id2label == names
    capszoo.save_model(tmp_path / "tuned.safetensors", model.timm_model, class_names=[*names.values()])
    tuned = capszoo.load_model(tmp_path / "tuned.safetensors").eval()
    assert torch.equal(tuned(images), model(images).logits)
    assert capszoo.predict(tuned, images[:1])[0].class_name in names.values()


def test_what_is_saved_of_a_model_keeps_images_and_classes(modelling, colour, tmp_path):
    model = transformers.AutoModelForImageClassification.from_pretrained(colour)
    capszoo.save_model(tmp_path / "saved.safetensors", model.timm_model)
    saved = capszoo.load_model(tmp_path / "saved.safetensors")
    source = capszoo.create_model(f"local-dir:{colour}", pretrained=True)
    for key in ("mean", "std", "label_names"):
        assert tuple(saved.pretrained_cfg[key]) == tuple(source.pretrained_cfg[key])
    assert saved.pretrained_cfg["mean"] == (0.4, 0.5, 0.6)
    for picture in pictures():
        assert capszoo.predict(saved, picture) == capszoo.predict(source, picture)
    other = transformers.AutoModelForImageClassification.from_pretrained(
        colour, num_labels=2, ignore_mismatched_sizes=True
    )
    assert "label_names" not in other.timm_model.pretrained_cfg and other.timm_model.pretrained_cfg["std"][0] == 0.2


def test_single_capsules_are_kept(modelling, export, make_run, tmp_path):
    """The index of the capsules that a pruned network keeps is in no file."""
    file = make_run("capsnet_tiny", keep_capsules=[5, 9, 200])
    export.main(["hub", str(file), "--output", str(tmp_path / "out")])
    model = transformers.AutoModelForImageClassification.from_pretrained(str(tmp_path / "out")).eval()
    x = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(model(x).logits, capszoo.load_model(file).eval()(x))


def test_a_fresh_model(modelling, grey):
    config = transformers.AutoConfig.from_pretrained(grey)
    model = transformers.AutoModelForImageClassification.from_config(config).timm_model
    usual = capszoo.create_model("capsnet_tiny")
    for layer in (model.conv1, model.primary_caps.conv):
        expected = dict(usual.named_modules())[next(n for n, m in model.named_modules() if m is layer)]
        assert torch.equal(layer.scale, expected.scale)
        assert layer.weight.std().item() == pytest.approx(expected.weight.std().item(), rel=0.1)


def test_code_of_the_page(modelling, export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export.main(["hub", "capsnet_tiny.mnist", "--output", "FOLDER"])
    pictures()[0].save("cat.png")
    page = (Path(__file__).parents[1] / "docs/timm.md").read_text()
    page = page.partition("\n## transformers\n")[2].partition("\n## ")[0]
    first, second = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    space = {"image": Image.open("cat.png"), "capszoo": capszoo}
    exec(first, space)
    expected = capszoo.predict(capszoo.create_model("capsnet_tiny.mnist", pretrained=True), "cat.png")
    assert space["answers"][0]["label"] == expected.class_name
    assert space["answers"][0]["score"] == pytest.approx(expected.score, abs=1e-5)
    scores = space["model"].eval()(**space["inputs"]).logits[0].tolist()
    assert scores == pytest.approx(expected.scores, abs=1e-5)
    exec(second, space)
    assert capszoo.predict(capszoo.load_model("tuned.safetensors"), "cat.png").class_name in ("cat", "dog")


def test_other_models_keep_what_transformers_does(modelling):
    config = transformers.TimmWrapperConfig(architecture="test_resnet", model_args={"in_chans": 1}, num_labels=3)
    model = transformers.AutoModelForImageClassification.from_config(config)
    images, labels = torch.rand(2, 1, 32, 32), torch.tensor([0, 2])
    out = model(images, labels=labels)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))


def test_weights_of_a_folder(grey):
    tensors, header = load_tensors(f"{grey}/model.safetensors")
    assert tensors["primary_caps.conv.weight"].dtype == torch.float16 and header["model"] == "capsnet_tiny"
    config = json.loads((Path(grey) / "config.json").read_text())
    assert config["pretrained_cfg"]["notes"] == [f"sha256 {pretrained.sha256_of(f'{grey}/model.safetensors')}"]
    source = capszoo.create_model("capsnet_tiny.mnist", pretrained=True).eval()
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(timm.create_model(f"local-dir:{grey}", pretrained=True).eval()(x), source(x))
