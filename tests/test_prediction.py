"""capszoo.predict: classes of files, pictures, arrays and tensors."""

import numpy as np
import pytest
import torch
from PIL import Image

import capszoo
from capszoo.data import load_data
from capszoo.errors import DataError
from capszoo.prediction import class_names_of, reconstruct, to_pixels


@pytest.fixture(scope="module")
def model():
    return capszoo.create_model("capsnet_tiny.mnist", pretrained=True, decoder=True)


@pytest.fixture(scope="module")
def digits():
    """Images uint8 `[20, 1, 28, 28]` and labels."""
    test = load_data("digits", val_fraction=0).test
    return test.images[:20], test.labels[:20]


def test_images_of_all_kinds_are_the_same(model, digits, tmp_path):
    image = digits[0][3]
    array = image[0].numpy()
    Image.fromarray(array).save(tmp_path / "3.png")
    kinds = [tmp_path / "3.png", str(tmp_path / "3.png"), Image.fromarray(array), array, array[:, :, None],
             array[None], image, image.float() / 255, (array / 255).astype(np.float64)]  # fmt: skip
    expected = model.eval()(image[None].float() / 255)[0].tolist()
    for kind in kinds:
        found = capszoo.predict(model, kind)
        assert found.scores == pytest.approx(expected, abs=1e-6)
        assert found.score == max(found.scores) == found.scores[found.class_index]
        assert found.second_score == sorted(found.scores)[-2]
        assert (found.class_name, found.second_name) == tuple(
            class_names_of(model)[place] for place in np.argsort(found.scores)[[-1, -2]]
        )


def test_many_images_at_once(model, digits, tmp_path):
    images, _ = digits
    model.train()
    found = capszoo.predict(model, images, batch_size=7)
    assert model.training and len(found) == 20
    with torch.no_grad():
        assert [one.class_index for one in found] == model.eval()(images.float() / 255).argmax(1).tolist()
    assert capszoo.predict(model, list(images)) == capszoo.predict(model, images)
    for batch in (images.numpy(), images.permute(0, 2, 3, 1).numpy()):
        assert capszoo.predict(model, batch) == capszoo.predict(model, images)
    (tmp_path / "below").mkdir()
    for place in range(3):
        Image.fromarray(images[place, 0].numpy()).save(tmp_path / "below" / f"{place}.png")
    (tmp_path / "notes.txt").touch()
    in_folder = capszoo.predict(model, tmp_path)
    assert [one.class_index for one in in_folder] == [one.class_index for one in found[:3]]


def test_colour_and_size_become_those_of_the_model(digits):
    colour = capszoo.create_model("capsnet_tiny", in_chans=3, img_size=(20, 24), num_classes=2)
    grey = capszoo.create_model("capsnet_tiny", img_size=20)
    assert to_pixels(digits[0][0], colour).shape == (3, 20, 24)
    red = np.zeros((9, 7, 3), np.uint8)
    red[..., 0] = 255
    assert to_pixels(red, grey).shape == (1, 20, 20) and to_pixels(red, grey).mean() == pytest.approx(0.298, abs=0.01)
    assert capszoo.predict(colour, red).class_name in ("0", "1")


def test_stereo_images(tmp_path):
    stereo = capszoo.create_model("capsnet_tiny", in_chans=2, img_size=20, num_classes=2)
    pixels = torch.rand(2, 20, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_pixels(pixels, stereo), pixels)
    array = (pixels.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    assert torch.equal(to_pixels(array, stereo), torch.from_numpy(array).permute(2, 0, 1) / 255)
    large = np.zeros((40, 40, 2), np.uint8)
    large[:, :, 1] = 51
    assert torch.equal(to_pixels(large, stereo)[:, 3, 7], torch.tensor([0.0, 0.2]))
    Image.new("L", (20, 20)).save(tmp_path / "grey.png")
    for image in (tmp_path / "grey.png", Image.new("L", (20, 20))):
        with pytest.raises(DataError, match="takes images of 2 channels, which no file has: give an array"):
            to_pixels(image, stereo)
    with pytest.raises(DataError, match="is not possible: give the model's 2 channels"):
        to_pixels(np.zeros((20, 20, 3), np.uint8), stereo)


def test_images_are_normalised(digits, tmp_path):
    torch.manual_seed(0)
    model = capszoo.create_model("capsnet_tiny", num_classes=3).eval()
    capszoo.save_model(tmp_path / "m.safetensors", model, mean=[0.5], std=[0.25], class_names=["a", "b", "c"])
    found = capszoo.predict(capszoo.load_model(tmp_path / "m.safetensors"), digits[0][0])
    expected = model((digits[0][:1].float() / 255 - 0.5) / 0.25)[0]
    assert found.scores == pytest.approx(expected.tolist(), abs=1e-6) and found.class_name in "abc"


def test_one_class():
    found = capszoo.predict(capszoo.create_model("capsnet_tiny", num_classes=1), np.zeros((28, 28), np.uint8))
    assert (found.class_name, found.second_name, found.second_score) == ("0", None, None)


def test_reconstructions(model, digits):
    pixels = digits[0].float() / 255
    drawn = reconstruct(model.eval(), pixels)
    assert drawn.shape == pixels.shape and 0 <= drawn.min() and drawn.max() <= 1
    torch.testing.assert_close(drawn, model.reconstruct(pixels).detach())
    with pytest.raises(DataError, match="no decoder"):
        reconstruct(capszoo.create_model("capsnet_tiny"), pixels)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("nowhere.png", "no image at 'nowhere.png'"),
        (5, "'int' is not an image"),
        (torch.zeros(28, 28), r"a tensor of shape \[28, 28\] is not an image"),
        (np.zeros((5, 5, 4), np.uint8), r"shape \[5, 5, 4\] is not possible"),
        (np.zeros((0, 5), np.uint8), r"shape \[0, 5\] is not possible"),
        (np.zeros((5, 5), np.int64), "pixels of type int64"),
        (np.full((5, 5), 1.5), "pixels beyond 0 to 1"),
        (np.full((5, 5), np.nan), "pixels beyond 0 to 1"),
        (Image.new("F", (5, 5)), "a PIL image of mode 'F' cannot be used"),
    ],
)
def test_what_is_not_an_image(model, image, expected):
    with pytest.raises(DataError, match=expected) as caught:
        capszoo.predict(model, image)
    assert "\n" not in str(caught.value)


def test_floats_that_numpy_lacks(model, digits):
    pixels = digits[0][0].float() / 255
    expected = capszoo.predict(model, pixels.bfloat16().float())
    assert capszoo.predict(model, pixels.bfloat16()) == expected
    assert capszoo.predict(model, pixels.bfloat16()[None]) == [expected]


def test_no_images_at_a_time(model, digits):
    with pytest.raises(DataError, match="batch_size=0 is out of range: give 1 or more"):
        capszoo.predict(model, digits[0], batch_size=0)


def test_a_model_without_classes():
    with pytest.raises(DataError, match="no classes"):
        capszoo.predict(capszoo.create_model("capsnet_tiny", num_classes=0), np.zeros((28, 28), np.uint8))
