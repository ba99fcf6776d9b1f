"""What timm's validate.py and inference.py call, in order, gives the classes and scores of `capszoo predict`."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform, resolve_data_config, resolve_model_data_config

import capszoo


def save_pictures(root, mode="RGB"):
    """Images of two classes, neither square nor of the model's size."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 31, 45, 3), dtype=np.uint8)
    for place, image in enumerate(pixels):
        folder = root / ("cat", "dog")[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).convert(mode).resize((45 + place, 31)).save(folder / f"{place}.png")
    return root


def loaded_as_timm_does(model, root, input_img_mode):
    """Scores of all images of a folder and their paths, as the scripts compute them."""
    config = resolve_data_config({}, model=model, use_test_size=True)
    dataset = create_dataset(root=str(root), name="", split="validation", input_img_mode=input_img_mode)
    loader = create_loader(dataset, batch_size=4, use_prefetcher=True, num_workers=0, persistent_workers=False,
                           device=torch.device("cpu"), **config)  # fmt: skip
    with torch.inference_mode():
        scores = torch.cat([model.eval()(images) for images, _ in loader])
    return scores, [Path(root) / name for name in dataset.filenames()]


@pytest.mark.parametrize(("mode", "size", "mean", "std"), [
    ("RGB", [20, 24], [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]),
    ("L", [22, 22], [0.3], [0.2]),
])  # fmt: skip
def test_an_exported_folder(recipe, make_run, tmp_path, mode, size, mean, std):
    channels = len(mean)
    file = make_run("capsnet_tiny", "pets", in_chans=channels, img_size=size, num_classes=6,
                    header={"mean": mean, "std": std})  # fmt: skip
    recipe("export").main(["hub", str(file), "--output", str(tmp_path / "hub")])
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    root = save_pictures(tmp_path / "images")
    scores, paths = loaded_as_timm_does(model, root, mode)
    expected = capszoo.predict(capszoo.load_model(file), paths)
    assert scores.argmax(1).tolist() == [one.class_index for one in expected]
    torch.testing.assert_close(scores, torch.tensor([one.scores for one in expected]), rtol=1e-4, atol=1e-5)
    # inference.py names the classes by these.
    names = model.pretrained_cfg["label_names"]
    assert [names[place] for place in scores.argmax(1).tolist()] == [one.class_name for one in expected]


def test_a_checkpoint(make_run, tmp_path):
    """--checkpoint reads tensors alone: what the model is stands on the command line."""
    file = make_run("capsnet_tiny", "pets", in_chans=3, img_size=[24, 24], num_classes=4)
    model = timm.create_model("capsnet_tiny", num_classes=4, in_chans=3, img_size=24)
    timm.models.load_checkpoint(model, str(file))
    scores, paths = loaded_as_timm_does(model, save_pictures(tmp_path / "images"), "RGB")
    assert scores.argmax(1).tolist() == [one.class_index for one in capszoo.predict(capszoo.load_model(file), paths)]


def test_transforms_of_a_loaded_model(make_run, tmp_path):
    file = make_run(
        "cnn_baseline_tiny", "pets", in_chans=3, img_size=[20, 24], header={"mean": [0.5] * 3, "std": [0.2] * 3}
    )
    model = capszoo.load_model(file).eval()
    transform = create_transform(**resolve_model_data_config(model))
    for path in save_pictures(tmp_path / "images").rglob("*.png"):
        pixels = transform(Image.open(path).convert("RGB"))
        assert pixels.shape == (3, 20, 24)
        torch.testing.assert_close(model(pixels[None])[0], torch.tensor(capszoo.predict(model, path).scores))
