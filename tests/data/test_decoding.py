"""capszoo.data.decoding and readers: modes, sizes and orientation of images, what is none, reading while used."""

import numpy as np
import pytest
import torch
from PIL import Image

from capszoo.data import Loader, load_data
from capszoo.data.decoding import decode


def test_colour_and_size_of_grey_images(write_mnist, tmp_path):
    write_mnist(tmp_path)
    grey = load_data("mnist", tmp_path)
    colour = load_data("mnist", tmp_path, in_chans=3)
    assert colour.in_chans == 3 and torch.equal(colour.train.images, grey.train.images.expand(-1, 3, -1, -1))
    small = load_data("mnist", tmp_path, img_size=np.int64(7))
    assert small.img_size == (7, 7)
    assert grey.train.images.float().std() > 70 and small.train.images.float().std() < 20  # antialiased: noise averages
    wide = load_data("mnist", tmp_path, img_size=(28, 40))
    assert wide.test.images.shape == (20, 1, 28, 40)


def test_image_folder_resizes_and_converts(write_folder, tmp_path):
    root = write_folder(tmp_path)
    data = load_data(root, img_size=(6, 4), in_chans=1, val_fraction=0)
    assert data.train.images.shape == (12, 1, 6, 4)
    image = Image.open(root / "train/cat/0.png").convert("L").resize((4, 6), Image.Resampling.BILINEAR)
    assert np.array_equal(data.train.images[0, 0], np.asarray(image))


@pytest.mark.parametrize("mode, in_chans", [("L", 1), ("1", 1), ("LA", 1), ("P", 3), ("RGBA", 3)])
def test_image_modes(write_folder, mode, in_chans, tmp_path):
    data = load_data(write_folder(tmp_path, mode=mode))
    assert data.in_chans == in_chans and data.train.images.shape[1:] == (in_chans, 8, 10)


def test_sixteen_bit_images_keep_their_contrast(write_folder, tmp_path):
    root = write_folder(tmp_path, classes=("a",), count=2)
    ramp = (np.arange(80, dtype=np.uint16) * 800).reshape(8, 10)
    Image.fromarray(ramp).save(root / "test/a/0.png")
    data = load_data(root, in_chans=1, val_fraction=0)
    assert np.array_equal(data.test.images[0, 0], ramp >> 8)


def test_exif_orientation(write_folder, tmp_path):
    root = write_folder(tmp_path, classes=("a",), count=2)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    for path in root.glob("*/*/*.png"):
        Image.open(path).save(path, exif=exif)
    data = load_data(root, val_fraction=0)
    assert data.img_size == (10, 8)
    plain = np.asarray(Image.open(root / "train/a/0.png"))
    assert np.array_equal(data.train.images[0].permute(1, 2, 0), np.rot90(plain, -1))


def test_images_of_different_sizes_need_a_size(raises, write_folder, tmp_path):
    root = write_folder(tmp_path)
    Image.new("RGB", (5, 4)).save(root / "test" / "dog" / "0.png")
    with raises(root, "different sizes", "4x5", "8x10", "--img-size"):
        load_data(root)
    assert load_data(root, img_size=8).test.images.shape == (12, 3, 8, 8)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("file", ["text.png", "empty.png"])
def test_file_that_is_no_image(raises, write_folder, file, streamed, tmp_path):
    path = write_folder(tmp_path) / "test" / "cat" / file
    path.write_text("" if file == "empty.png" else "notes\non these images")
    with raises(path, "not an image", "delete"):
        load_data(tmp_path, img_size=8, in_chans=3, max_bytes=0 if streamed else 1 << 30)


def test_truncated_image(raises, write_folder, tmp_path):
    path = write_folder(tmp_path, size=(64, 64)) / "test" / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:3000])
    with raises(path, "not an image", "delete"):
        load_data(tmp_path)
    streamed = load_data(tmp_path, max_bytes=0)
    for num_workers in (0, 1):
        with raises(path, "not an image", "delete"):
            list(Loader(streamed.test, 4, "cpu", num_workers=num_workers))


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("mnist", {}),
        ("mnist", {"img_size": (30, 17), "in_chans": 3}),
        ("torch/mnist", {"img_size": 20}),
        ("folder", {}),
        ("folder", {"img_size": 7, "in_chans": 1}),
    ],
)
def test_streamed_set_equals_the_same_in_memory(write_mnist, write_folder, name, kwargs, tmp_path):
    root = write_folder(tmp_path) if name == "folder" else write_mnist(tmp_path)
    memory, streamed = (load_data(name, root, max_bytes=limit, **kwargs) for limit in (1 << 30, 0))
    assert (memory.img_size, memory.in_chans, memory.class_names) == (
        streamed.img_size,
        streamed.in_chans,
        streamed.class_names,
    )
    for part, num_workers in (("train", 1), ("val", 0), ("test", 0)):
        one, other = getattr(memory, part), getattr(streamed, part)
        assert one.images is not None and other.images is None
        assert len(one) == len(other) and one.image_shape == other.image_shape
        pairs = zip(
            Loader(one, 3, "cpu", shuffle=True, translate=2, start_step=0),
            Loader(other, 3, "cpu", shuffle=True, translate=2, start_step=0, num_workers=num_workers),
            strict=True,
        )
        assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def test_max_bytes_counts_all_pixels(write_mnist, tmp_path):
    write_mnist(tmp_path)
    assert load_data("mnist", tmp_path, max_bytes=60 * 784).train.images is not None
    assert load_data("mnist", tmp_path, max_bytes=60 * 784 - 1).train.images is None


def test_integers_of_8_bits_are_not_taken_for_16():
    values = np.arange(256, dtype=np.int32).reshape(16, 16)
    assert torch.equal(decode(Image.fromarray(values), 1, None)[0], torch.from_numpy(values).byte())
    assert torch.equal(decode(Image.fromarray(values * 256), 1, None)[0], torch.from_numpy(values).byte())
