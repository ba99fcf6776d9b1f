"""capszoo.data.composed: overlapping pairs of digits, and digits moved about a canvas."""

import os
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from capszoo.data import Loader, Split, default_translate, list_datasets, load_data
from capszoo.data.composed import move_digits, pair_digits
from capszoo.data.sources import uses_data_dir


def find(digit, canvas):
    """The rows and columns at which a digit lies on a canvas as it is."""
    windows = canvas.unfold(0, digit.shape[0], 1).unfold(1, digit.shape[1], 1)
    return [tuple(place) for place in (windows == digit).flatten(2).all(dim=2).nonzero().tolist()]


@pytest.fixture(scope="module")
def mnist(write_mnist, tmp_path_factory):
    """A tiny set in MNIST's format, whose images all differ."""
    return write_mnist(tmp_path_factory.mktemp("data"))


def test_names():
    assert {"multi_mnist", "mnist_affine"} < set(list_datasets())
    assert uses_data_dir("multi_mnist") and uses_data_dir("mnist_affine")
    assert (default_translate("multi_mnist"), default_translate("mnist_affine")) == (0, 6)


def test_pairs(mnist):
    plain = load_data("mnist", mnist, val_fraction=0.25)
    pairs = load_data("multi_mnist", mnist, val_fraction=0.25)
    assert (len(pairs.train), len(pairs.val), len(pairs.test)) == (30, 10, 20)
    assert pairs.multi_label and (pairs.in_chans, pairs.img_size, pairs.num_classes) == (1, (36, 36), 10)
    for part in ("train", "val", "test"):
        digits, pair = getattr(plain, part), getattr(pairs, part)
        assert pair.labels.dtype == torch.float32 and pair.parts.shape == (len(pair), 2, 1, 36, 36)
        assert (pair.labels.sum(dim=1) == 2).all() and set(pair.labels.unique().tolist()) == {0, 1}
        assert torch.equal(pair.images, pair.parts.int().sum(dim=1).clamp(max=255).to(torch.uint8))
        firsts = 0
        for index in range(len(pair)):
            classes = pair.labels[index].nonzero().flatten().tolist()
            for image, label in zip(pair.parts[index, :, 0], classes, strict=True):
                members = [i for i in range(len(digits)) if digits.labels[i] == label]
                found = {i: find(digits.images[i, 0], image) for i in members}  # of this split alone
                assert sum(map(len, found.values())) == 1
                (i, ((down, right),)), *_ = [(i, places) for i, places in found.items() if places]
                assert image.count_nonzero() == digits.images[i].count_nonzero()
                firsts += i == index
        assert firsts >= len(pair)  # each image is the first of a pair


def test_pairs_are_those_of_the_seed(mnist):
    one, same = (load_data("multi_mnist", mnist).train for _ in range(2))
    other = load_data("multi_mnist", mnist, seed=1).train
    assert torch.equal(one.images, same.images) and torch.equal(one.parts, same.parts)
    assert not torch.equal(one.images, other.images)


def test_partners_and_shifts_are_uniform():
    count = 6000
    images = torch.zeros(count, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 14, 14] = torch.randint(1, 120, (count, 1), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    labels = torch.arange(count) % 3
    pairs = pair_digits(Split(labels, images), "train", 3)
    chosen = pairs.labels[:, [0, 1]].sum(dim=1) == 2  # 0 and 1 against the others
    assert float(chosen.float().mean()) == pytest.approx(1 / 3, abs=0.03)
    places = pairs.parts.flatten(0, 1)[:, 0].flatten(1).argmax(dim=1)
    down, right = places // 36, places % 36
    for axis in (down, right):
        counts = axis.bincount(minlength=36)
        assert counts[14:23].min() > 0.9 * 2 * count / 9 and counts.sum() == counts[14:23].sum()


def test_more_pairs_of_each_image(mnist):
    digits = load_data("mnist", mnist, val_fraction=0).train
    pairs = pair_digits(digits, "train", 10, pairs_per_image=3)
    assert len(pairs) == 3 * len(digits) and pairs.parts.shape == (120, 2, 1, 36, 36)
    assert len({image.numpy().tobytes() for image in pairs.images}) == 120
    counts = pairs.labels.sum(dim=0)
    assert (counts >= 12).all() and counts.sum() == 240


def test_pairs_need_two_classes(raises):
    with raises("all images are of one class", "use other"):
        pair_digits(Split(torch.ones(3, dtype=torch.int64), torch.zeros(3, 1, 4, 4, dtype=torch.uint8)), "test", 10)


def test_other_sizes_and_channels(raises, mnist):
    own = load_data("multi_mnist", mnist, val_fraction=0)
    pairs = load_data("multi_mnist", mnist, val_fraction=0, img_size=18, in_chans=3, max_bytes=0)
    assert (pairs.in_chans, pairs.img_size) == (3, (18, 18))
    assert pairs.test.images.shape == (20, 3, 18, 18) and pairs.test.parts.shape == (20, 2, 3, 18, 18)
    smaller = F.interpolate(own.test.parts[:, 1].float(), (18, 18), mode="bilinear", antialias=True)
    assert torch.equal(pairs.test.parts[:, 1, 2:], smaller.round().clamp(0, 255).to(torch.uint8))
    with raises("in_chans=2 is not possible", "give 1 or 3"):
        load_data("multi_mnist", mnist, in_chans=2)
    with raises("data set 'mnist' not found", "--data-dir"):
        load_data("multi_mnist", mnist / "nowhere")


def test_training_digits_stand_in_the_middle(mnist):
    plain, moved = load_data("mnist", mnist), load_data("mnist_affine", mnist)
    assert (moved.in_chans, moved.img_size, moved.class_names) == (1, (40, 40), plain.class_names)
    assert torch.equal(moved.train.images, F.pad(plain.train.images, [6] * 4))
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(moved, part).labels, getattr(plain, part).labels)
    # As the loader shifts them, they are anywhere on the canvas.
    images, _ = next(iter(Loader(moved.train, len(moved.train), "cpu", translate=6, seed=1)))
    places = [find(digit[0], image[0]) for digit, image in zip(plain.train.images / 255, images, strict=True)]
    assert all(len(found) == 1 for found in places) and len({found[0] for found in places}) > 25


def test_validation_digits_stand_anywhere(mnist):
    plain, moved = (load_data(name, mnist, val_fraction=0.5) for name in ("mnist", "mnist_affine"))
    places = [find(a[0], b[0]) for a, b in zip(plain.val.images, moved.val.images, strict=True)]
    assert all(len(found) == 1 for found in places)
    rows = {found[0][0] for found in places}
    assert len(rows) > 6 and min(rows) >= 0 and max(rows) <= 12


def write_digits(root, count=200):
    """MNIST's files with bars of 6x20 in the middle, of which class and brightness are known."""
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    images = np.zeros((count, 28, 28), dtype=np.uint8)
    images[:, 4:24, 11:17] = 200
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, count, 28, 28) + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels.tobytes())
    return root


def test_test_digits_are_transformed(tmp_path):
    test = load_data("mnist_affine", write_digits(tmp_path)).test
    images = test.images[:, 0].double() / 200
    assert images.shape == (200, 40, 40)
    mass = images.sum(dim=(1, 2))
    area = 6 * 20  # times what both axes are stretched by
    assert 0.64 * area - 3 < mass.min() < 0.75 * area and 1.25 * area < mass.max() < 1.44 * area + 3
    # None of it is lost at the edges: what lies at the outermost pixels is what bilinear sampling smears there.
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    centres = [(images * axis).sum(dim=(1, 2)) / mass - 19.5 for axis in (rows, columns)]
    assert centres[0].std() > 2 and centres[1].std() > 4  # bars have more room to the sides
    second = [
        (images * (axis - 19.5 - centre[:, None, None]) ** 2).sum(dim=(1, 2)) / mass
        for axis, centre in zip((rows, columns), centres, strict=True)
    ]
    cross = (images * (rows - 19.5 - centres[0][:, None, None]) * (columns - 19.5 - centres[1][:, None, None])).sum(
        dim=(1, 2)
    )
    slant = torch.atan2(2 * cross / mass, second[0] - second[1]).rad2deg() / 2
    assert slant.abs().max() < 35 and slant.std() > 8  # 20 degrees, and a shear of 0.2


def test_the_whole_digit_stays_on_the_canvas(tmp_path):
    """The same digit on a larger canvas has the same sum: nothing was cut off."""
    images = torch.zeros(500, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 4:24, 4:24] = 255
    moved = move_digits(Split(torch.zeros(500, dtype=torch.int64), images), "test", 10).images[:, 0]
    edge = torch.cat([moved[:, 0], moved[:, -1], moved[:, :, 0], moved[:, :, -1]], dim=1)
    assert (edge.amax(dim=1) < 255).all()  # a pixel of a digit that reaches the edge is a smeared one
    empty = move_digits(Split(torch.zeros(2, dtype=torch.int64), torch.zeros_like(images[:2])), "test", 10)
    assert empty.images.count_nonzero() == 0


def test_smaller_canvas_is_said(mnist, caplog):
    data = load_data("mnist_affine", mnist, img_size=28, in_chans=3, val_fraction=0)
    assert (data.img_size, data.in_chans) == ((28, 28), 3)
    assert "canvas of 40x40 are resized to 28x28" in caplog.records[0].getMessage()


@pytest.mark.skipif("CAPSZOO_TEST_DATA" not in os.environ, reason="CAPSZOO_TEST_DATA names no folder")
def test_real_digits():
    root = os.environ["CAPSZOO_TEST_DATA"]
    pairs = load_data("multi_mnist", root)
    assert (len(pairs.train), len(pairs.val), len(pairs.test)) == (54_000, 6_000, 10_000)
    boxes = []
    for digit in pairs.test.parts[:2000, :, 0].flatten(0, 1) > 0:
        rows, columns = digit.any(dim=1).nonzero().flatten(), digit.any(dim=0).nonzero().flatten()
        centre = (rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2
        boxes.append(torch.stack(centre))
    apart = (torch.stack(boxes).unflatten(0, (-1, 2)).diff(dim=1)[:, 0]).abs()
    overlap = ((20 - apart).clamp(min=0) / 20).prod(dim=1).mean()
    assert float(overlap) == pytest.approx(0.75, abs=0.08)  # the paper: 80 % on average
    moved = load_data("mnist_affine", root)
    assert (len(moved.train), len(moved.val), len(moved.test)) == (54_000, 6_000, 10_000)
    still = load_data("mnist", root, val_fraction=0).test.images.double().sum(dim=(1, 2, 3))
    ratio = moved.test.images.double().sum(dim=(1, 2, 3)) / still
    assert 0.6 < ratio.min() and ratio.max() < 1.5 and float(ratio.mean()) == pytest.approx(1.0, abs=0.02)
