"""A messy folder of one's own images, trained on with augmentation, normalisation and class weights."""

import json
import os
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import capszoo
from capszoo.checkpoint import save_weights
from capszoo.data import Augmentation
from capszoo.engine.options import OPTIONS
from capszoo.fields import words
from capszoo.registry import model_header

NAMES = ("disc", "cross", "square", "triangle")
MODES = ("RGB", "L", "RGBA", "P", "I;16")
TRAINING = {
    "img_size": 24, "in_chans": 3, "epochs": 12, "lr": 0.002, "batch_size": 8, "val_fraction": 0, "decoder": False,
    "amp": "none", "model_kwargs": {"conv_dim": 48}, "follow_links": True, "workers": 0, "quiet": True,
    "mean": [0.6, 0.6, 0.6], "std": [0.25, 0.25, 0.25], "class_weights": ["balanced"],
    "hflip": 0.5, "rotate": 10.0, "rescale": [0.9, 1.1], "translate": 1, "reprob": 0.1, "remode": "const",
    "color_jitter": [0.1],
}  # fmt: skip


def save(path, pixels, number):
    """Write an image in one of several modes and sizes."""
    mode = MODES[number % len(MODES)]
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image = image.resize((28 + number % 7, 28 + number % 5))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(scope="module")
def messy(recipe, tmp_path_factory):
    """Bright shapes, of which there are half as many triangles, among what else lies about in folders."""
    root = tmp_path_factory.mktemp("own") / "images"
    for part, count, seed in (("train", 320, 0), ("test", 120, 1)):
        images, labels = recipe("starts").bright_shapes(count, seed=seed)
        for number, (pixels, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            if label == 3 and part == "train" and number % 8 == 3:
                continue
            folder = root / part / NAMES[label]
            save(folder / ("more/deeper" if number % 3 else "") / f"{number}.png", pixels, number // 4)
        for name in ("notes.txt", "Thumbs.db", ".DS_Store"):
            (root / part / name).write_bytes(b"not an image")
            (root / part / "disc" / name).write_bytes(b"not an image")
    linked = root.parent / "elsewhere"
    os.replace(root / "train" / "cross", linked)
    (root / "train" / "cross").symlink_to(linked, target_is_directory=True)
    return root


def argv(options):
    """The words of a command line that give these options."""
    return [word for name, value in options.items() for word in words(name, value, OPTIONS[name])]


def answers(folder, root):
    """The part of the test images of each class that `capszoo.predict` names right, from their files."""
    model = capszoo.load_model(folder / "best.safetensors")
    found = {}
    for name in NAMES:
        predictions = capszoo.predict(model, root / "test" / name)
        found[name] = sum(prediction.class_name == name for prediction in predictions) / len(predictions)
    return found


def test_trains_by_command_line_and_by_yaml_alike(recipe, messy, tmp_path, capsys):
    options = {**TRAINING, "dataset": str(messy), "output": str(tmp_path / "run")}
    train = recipe("train")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(options))
    by_words, by_yaml = train.parse_args(argv(options)), train.parse_args(["--config", str(tmp_path / "mine.yaml")])
    assert by_words == by_yaml and by_words.augmentation == Augmentation(
        hflip=0.5, rotate=10.0, rescale=[0.9, 1.1], reprob=0.1, remode="const", color_jitter=[0.1]
    )
    assert train.main(argv(options)) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test_top1"] >= 0.95

    header = capszoo.checkpoint.read_metadata(tmp_path / "run" / "best.safetensors")
    weights = json.loads(header["criterion"])["class_weights"]  # of classes in the order of their names
    assert weights == pytest.approx([280 / (4 * count) for count in (80, 80, 80, 40)])
    found = answers(tmp_path / "run", messy)
    assert sum(found.values()) / 4 == pytest.approx(result["test_top1"])


@pytest.mark.slow
def test_trains_through_all_of_timms_transforms_and_mixing_from_disk(recipe, messy, tmp_path, monkeypatch):
    """As above, with the images read from disk by two processes, and run twice, by words and by YAML."""
    monkeypatch.setattr("capszoo.engine.run.load_data", partial(capszoo.data.load_data, max_bytes=0))
    more = {
        "epochs": 16, "scale": [0.7, 1.0], "ratio": [0.9, 1.1], "aa": "rand-m3-n1-mstd0.5", "cutmix": 1.0, "mixup": 0.2,
        "mixup_mode": "elem", "mixup_prob": 0.3, "mixup_off_epoch": 10, "decoder": True, "workers": 2,
    }  # fmt: skip
    options = {**TRAINING, **more, "dataset": str(messy)}
    train = recipe("train")
    assert train.main(argv({**options, "output": str(tmp_path / "words")})) == 0
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**options, "output": str(tmp_path / "yaml")}))
    assert train.main(["--config", str(tmp_path / "mine.yaml")]) == 0
    results = [json.loads((tmp_path / name / "result.json").read_text())["test_top1"] for name in ("words", "yaml")]
    assert results[0] == results[1] >= 0.95
    one, other = (load_file(tmp_path / name / "last.safetensors") for name in ("words", "yaml"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert min(answers(tmp_path / "words", messy).values()) >= 0.9


def test_validate_says_the_balanced_accuracy_where_classes_are_unbalanced(recipe, messy, tmp_path, capsys):
    model = capszoo.create_model("capsnet_tiny", num_classes=4, in_chans=3, img_size=24, conv_dim=4)
    facts = {"dataset": str(messy), "class_names": sorted(NAMES)}
    save_weights(tmp_path / "best.safetensors", model, model_header(model, **facts))
    for split, said in (("train", True), ("test", False)):
        json_file = tmp_path / f"{split}.json"
        more = ["--follow-links", "--split", split, "--val-fraction", "0", "--json", str(json_file)]
        recipe("validate").main([str(tmp_path / "best.safetensors"), *more])
        measured, out = json.loads(json_file.read_text()), capsys.readouterr().out
        assert ("balanced accuracy" in out) is said
        confusion = torch.tensor(measured["confusion"]).double()
        recall = confusion.diagonal() / confusion.sum(dim=1)
        assert measured["recall"] == pytest.approx(dict(zip(sorted(NAMES), recall.tolist(), strict=True)))
        assert measured["balanced_accuracy"] == pytest.approx(recall.mean().item())
