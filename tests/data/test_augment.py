"""Augmentation of batches: against torchvision and timm, from (seed, epoch) alone, and what is refused."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from capszoo.data import Augmentation, Loader, Split
from capszoo.data.affine import inverse_maps, sample_affine
from capszoo.data.batch_transforms import BatchTransforms
from capszoo.data.image_transforms import ImageTransform
from capszoo.data.readers import ArrayReader
from capszoo.errors import DataError, UsageError

ALL_ON_DEVICE = {
    "hflip": 0.5, "vflip": 0.5, "scale": [0.3, 1.0], "rotate": 20.0, "shear": 5.0, "rescale": [0.8, 1.2],
    "reprob": 0.5, "recount": 2, "train_interpolation": "random",
}  # fmt: skip
COLOURS = {"aa": "rand-m5-n2-mstd0.5", "color_jitter": [0.4], "grayscale_prob": 0.2, "hflip": 0.5}


def make_split(count=64, channels=3, height=12, width=10, streamed=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 5
    split = (
        Split(labels, reader=ArrayReader(images), indices=torch.arange(count)) if streamed else Split(labels, images)
    )
    split.mean, split.std = (0.4,) * channels, (0.3,) * channels
    return split


def batches(split, batch_size=16, options=None, **kwargs):
    augmentation = None if options is None else Augmentation(**options)
    return list(Loader(split, batch_size, "cpu", augmentation=augmentation, num_classes=5, **kwargs))


def joined(split, *args, **kwargs):
    return torch.cat([images for images, _ in batches(split, *args, **kwargs)])


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True)
    )


def test_no_option_changes_no_bit():
    split = make_split()
    assert same(batches(split, shuffle=True, translate=2), batches(split, options={}, shuffle=True, translate=2))


# Flips


@pytest.mark.parametrize(("option", "axis"), [("hflip", 3), ("vflip", 2)])
def test_flips_of_all_and_of_half(option, axis):
    split = make_split(2000, 1, 4, 3)
    plain = joined(split)
    assert torch.equal(joined(split, options={option: 1.0}), plain.flip(axis))
    found = joined(split, options={option: 0.5})
    flipped = (found == plain.flip(axis)).flatten(1).all(dim=1)
    assert torch.equal(found[~flipped], plain[~flipped])
    assert 880 < flipped.sum() < 1120  # 1,000, 5 standard deviations


def test_alternate_flips_take_turns_from_a_random_side():
    split = make_split(1000, 1, 4, 3)
    plain = joined(split)
    epochs = [joined(split, options={"alternate_flip": True}, epoch=epoch, seed=3) for epoch in range(4)]
    assert torch.equal(epochs[0], epochs[2]) and torch.equal(epochs[1], epochs[3])
    assert torch.equal(epochs[0].flip(3), epochs[1])
    assert 400 < (epochs[0] == plain).flatten(1).all(dim=1).sum() < 600
    order = Loader(split, 16, "cpu", shuffle=True, seed=3, epoch=5).order()
    shuffled = joined(split, options={"alternate_flip": True}, shuffle=True, epoch=5, seed=3)
    assert torch.equal(shuffled, epochs[1][order])  # the turn is the image's, wherever it comes


# Maps


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    angle=st.floats(-180, 180),
    scale=st.floats(0.5, 2),
    shear=st.floats(-40, 40),
    height=st.integers(5, 12),
    width=st.integers(5, 12),
)
def test_maps_are_torchvisions_affine(angle, scale, shear, height, width):
    image = torch.rand(1, 2, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angle_, scale_, shear_ = (torch.tensor([value], dtype=torch.float64) for value in (angle, scale, shear))
    found = sample_affine(image, inverse_maps(angle_.deg2rad(), scale_, shear_.deg2rad().tan()))
    expected = tv.affine(image, angle, [0, 0], scale, [shear, 0.0], InterpolationMode.BILINEAR)
    # torchvision samples in float32, which moves a point at the very edge.
    assert (found - expected).abs().mean() < 1e-3 and (found - expected).abs().median() < 1e-5


@pytest.mark.parametrize("options", [{"rotate": 90.0}, {"shear": 30.0}, {"rescale": [0.5, 1.5]}])
def test_moved_images_have_zeros_from_outside_whatever_the_mean(options):
    split = Split(
        torch.zeros(300, dtype=torch.int64),
        torch.full((300, 1, 9, 9), 255, dtype=torch.uint8),
    )
    split.mean, split.std = (0.5,), (0.25,)
    images = joined(split, options=options) * 0.25 + 0.5
    assert images.min().abs() < 1e-6 and (images.max() - 1).abs() < 1e-6
    assert (images[:, 0, 4, 4] > 0.999).all() and images[:, 0, 0, 0].min() < 0.01


def test_rotation_is_uniform_up_to_the_angle():
    transforms = BatchTransforms(
        Augmentation(rotate=30.0), (1, 8, 8), torch.arange(5000), 0, 0, torch.device("cpu"), crops=True
    )
    angles = torch.atan2(transforms._maps[:, 0, 1], transforms._maps[:, 0, 0]).rad2deg()
    assert angles.abs().max() <= 30.001 and abs(angles.mean()) < 1.3 and abs(angles.std() - 30 / 3**0.5) < 0.7


def test_crops_are_those_of_torchvision():
    split = make_split(200, 2, 16, 12)
    augmentation = Augmentation(scale=[0.2, 0.9], ratio=[0.5, 2.0])
    transforms = BatchTransforms(augmentation, (2, 16, 12), torch.arange(200), 4, 2, torch.device("cpu"), crops=True)
    boxes = transforms._draw_crops()
    top, left, height, width = boxes.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 16).all() and (left + width <= 12).all()
    area, ratio = height * width / 192, width / height
    assert area.min() > 0.14 and area.max() < 1 and area.std() > 0.15
    assert ratio.min() > 0.39 and ratio.max() < 2.6 and ratio.std() > 0.3
    split.mean, split.std = (0.0,), (1.0,)
    found = joined(split, options={"scale": [0.2, 0.9], "ratio": [0.5, 2.0]}, seed=4, epoch=2)
    for image, original, box in zip(found, split.images.float() / 255, boxes.tolist(), strict=True):
        wanted = tv.resized_crop(original, *box, [16, 12], InterpolationMode.BILINEAR, antialias=False)
        # Next to its edge torchvision repeats the crop, where there may be more of the image.
        y, x = (-(-full // (2 * part)) for full, part in ((16, box[2]), (12, box[3])))
        torch.testing.assert_close(
            image[:, y : 16 - y, x : 12 - x], wanted[:, y : 16 - y, x : 12 - x], atol=2e-5, rtol=0
        )


def test_a_crop_of_all_changes_nothing():
    split = make_split(20, 3, 8, 8)
    torch.testing.assert_close(joined(split, options={"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}), joined(split))


def test_interpolation_by_chance_is_one_of_both():
    split = make_split(40, 3, 9, 9)
    options = {"rotate": 40.0, "scale": [0.5, 0.9]}
    chance, *both = (
        joined(split, options={**options, "train_interpolation": mode}) for mode in ("random", "bilinear", "bicubic")
    )
    counts = [sum(torch.equal(a, b) for a, b in zip(chance, one, strict=True)) for one in both]
    assert sum(counts) == 40 and min(counts) > 8
    pixels = both[1] * 0.3 + 0.4
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6  # bicubic overshoots


# Erasing


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erased_boxes(mode):
    split = make_split(1500, 3, 20, 16)
    plain, found = joined(split), joined(split, options={"reprob": 0.6, "remode": mode})
    changed = (plain != found).any(dim=1)
    erased = changed.flatten(1).any(dim=1)
    assert 800 < erased.sum() < 1000
    areas = []
    for image, mask in zip(found[erased], changed[erased], strict=True):
        rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
        box = image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        areas.append(box[0].numel() / 320)
        if mode == "const":
            assert (box == 0).all()  # the mean of normalised images, as timm has it
        elif mode == "rand":
            assert (box.flatten(1).std(dim=1, unbiased=False) < 1e-5).all()
    assert 0.015 < min(areas) < 0.05 and 0.25 < max(areas) < 0.36
    if mode != "const":
        noise = found.permute(0, 2, 3, 1)[changed]
        assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1


def test_several_erased_boxes_are_smaller():
    split = make_split(500, 1, 20, 20)
    split.images.fill_(255)
    one, four = (
        (joined(split, options={"reprob": 1.0, "remode": "const", "recount": count}) == 0).float().mean()
        for count in (1, 4)
    )
    assert 0.1 < four < one < 0.25


def test_parts_move_as_the_image_that_they_make_up():
    split = make_split(40, 1, 11, 9)
    first = torch.where(torch.rand(split.images.shape) < 0.5, split.images, 0)
    split.parts = torch.stack([first, split.images - first], dim=1)
    split.mean, split.std = (0.0,), (1.0,)
    options = {key: value for key, value in ALL_ON_DEVICE.items() if "re" not in key[:2] or key == "rescale"}
    options["train_interpolation"] = "bilinear"
    for images, _, parts in batches(split, options=options, translate=2, shuffle=True, with_parts=True):
        torch.testing.assert_close(parts.sum(dim=1), images)
    for share in ((0, 2), (1, 2)):
        for images, _, parts in batches(split, options=options, share=share, with_parts=True):
            torch.testing.assert_close(parts.sum(dim=1), images)


# What every change has in common


def test_options_do_not_change_what_others_draw():
    split = make_split(200, 1, 9, 9)
    plain, found = (joined(split, options=options) for options in ({"hflip": 0.5}, {"hflip": 0.5, "reprob": 0.5}))
    untouched = (plain == found).flatten(1).all(dim=1)
    assert 60 < untouched.sum() < 140


@pytest.mark.parametrize("options", [ALL_ON_DEVICE, COLOURS], ids=["device", "pil"])
@pytest.mark.parametrize("streamed", [False, True])
def test_batches_come_from_seed_and_epoch_alone(options, streamed):
    split = make_split(100, streamed=streamed)
    kwargs = dict(options=options, shuffle=True, seed=3, epoch=2, translate=1)
    whole = batches(split, 16, **kwargs)
    assert same(whole, batches(split, 16, **kwargs))
    assert same(batches(split, 16, start_step=4, **kwargs), whole[4:])
    assert same(batches(split, 16, num_workers=2, **kwargs), whole)
    torch.testing.assert_close(torch.cat([x for x, _ in whole]), joined(split, 7, **kwargs), rtol=1e-6, atol=1e-6)
    parts = [batches(split, 16, share=(rank, 3), **kwargs) for rank in range(3)]
    for batch, *shares in zip(whole, *parts, strict=True):
        torch.testing.assert_close(torch.cat([images for images, _ in shares]), batch[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(torch.cat([labels for _, labels in shares]), batch[1])
    for other in ({"seed": 4}, {"epoch": 3}):
        assert not torch.equal(batches(split, 16, **{**kwargs, "shuffle": False, **other})[0][0], whole[0][0])


def test_images_on_disk_and_in_memory_are_changed_alike():
    options = {key: value for key, value in ALL_ON_DEVICE.items() if key != "scale"}
    kwargs = dict(options=options, shuffle=True, seed=1, epoch=4, translate=2)
    assert same(batches(make_split(), **kwargs), batches(make_split(streamed=True), num_workers=1, **kwargs))
    for colours in (COLOURS, {**COLOURS, "scale": [0.3, 1.0]}):
        kwargs = dict(options=colours, shuffle=True, seed=1)
        assert same(batches(make_split(), **kwargs), batches(make_split(streamed=True), **kwargs))


def test_global_random_states_are_left_alone():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for options in ({**ALL_ON_DEVICE, "mixup": 0.2, "cutmix": 1.0}, COLOURS):
        for streamed in (False, True):
            batches(make_split(streamed=streamed), options=options, shuffle=True)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("options", [{**ALL_ON_DEVICE, "mixup": 0.2, "cutmix": 1.0, "mixup_mode": "elem"}, COLOURS])
def test_a_gpu_sees_the_images_that_the_cpu_sees(options):
    kwargs = dict(augmentation=Augmentation(**options), num_classes=5, shuffle=True, translate=2)
    pairs = zip(*(Loader(make_split(), 16, device, **kwargs) for device in ("cpu", "cuda")), strict=True)
    for (images, labels), (others, other_labels) in pairs:
        assert others.is_cuda and other_labels.is_cuda
        torch.testing.assert_close(images, others.cpu(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(labels, other_labels.cpu())


def test_images_stay_channels_last():
    options = {**ALL_ON_DEVICE, "mixup": 0.2, "cutmix": 1.0, "mixup_mode": "elem"}
    for images, _ in batches(make_split(), options=options, channels_last=True):
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_the_split_is_left_as_it_is():
    split = make_split()
    before = split.images.clone()
    for translate in (0, 2):
        batches(split, options={**ALL_ON_DEVICE, "mixup": 1.0}, translate=translate)
        batches(split, options=COLOURS, translate=translate)
    assert torch.equal(split.images, before)


# timm's transforms


def test_images_go_through_timms_transforms():
    split = make_split(6, 3, 24, 24)
    split.mean, split.std = (0.0,), (1.0,)
    plain = joined(split)
    grey = joined(split, options={"grayscale_prob": 1.0})
    for image, original in zip(grey, plain, strict=True):
        wanted = tv.pil_to_tensor(tv.rgb_to_grayscale(tv.to_pil_image((original * 255).round().byte()), 3)) / 255
        torch.testing.assert_close(image, wanted)
    for options in (
        {"color_jitter": [0.4]},
        {"color_jitter": [0.1, 0.2, 0.3, 0.1], "color_jitter_prob": 0.9},
        {"gaussian_blur_prob": 1.0},
        {"aa": "augmix-m5-w2"},
        {"aa": "original-mstd0.5"},
        {"aa": "rand-m9-t3a", "color_jitter": [0.4]},
    ):
        found = joined(split, options=options)
        assert found.shape == plain.shape and not torch.equal(found, plain)
        assert found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize("aa", ["rand-m9-n2", "augmix-m3", "v0", "originalr", "3a"])
def test_automatic_augmentation_of_grey_images(aa):
    found = joined(make_split(12, 1, 24, 24), options={"aa": aa, "color_jitter": [0.3]})
    assert found.shape == (12, 1, 24, 24)


@pytest.mark.parametrize("aa", ["rand-m1-n15", "rand-m10-n15-inc1", "augmix-m1-w5", "augmix-m10-w5"])
def test_images_are_posterized_to_one_bit_at_least(aa):
    assert joined(make_split(60, 3, 24, 24), options={"aa": aa}).isfinite().all()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_transform_that_fails_is_not_the_images_fault(monkeypatch, streamed):
    broken = property(lambda self: [lambda image: 1 / 0], lambda self, value: None)
    monkeypatch.setattr(ImageTransform, "_steps", broken, raising=False)
    with pytest.raises(DataError, match=r"^an image of 10x12 cannot be augmented \(ZeroDivisionError: [^\n]*--aa"):
        batches(make_split(streamed=streamed), options=COLOURS)


# What is refused


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"hflip": 1.5}, "--hflip 1.5 is out of range: give 0 to 1"),
        ({"vflip": float("nan")}, "--vflip nan is out of range"),
        ({"hflip": 0.5, "alternate_flip": True}, "--alternate-flip does not go with --hflip 0.5"),
        ({"scale": [0.5, 2.0]}, "--scale 0.5 2.0 is out of range: give two numbers above 0, up to 1"),
        ({"scale": [0.5]}, "--scale 0.5 is out of range: give two"),
        ({"ratio": [2.0, 0.5]}, "--ratio 2.0 0.5 is out of range"),
        ({"rescale": [0.0, 1.0]}, "--rescale 0.0 1.0 is out of range"),
        ({"rotate": 200.0}, "--rotate 200.0 is out of range: give degrees from 0 to 180"),
        ({"shear": 90.0}, "--shear 90.0 is out of range"),
        ({"color_jitter": [0.1, 0.2]}, "--color-jitter 0.1 0.2 are 2 numbers"),
        ({"color_jitter": [0.1, 0.2, 0.3, 0.6]}, "--color-jitter .* is out of range"),
        ({"color_jitter_prob": 0.5}, "--color-jitter-prob 0.5 has no effect without --color-jitter"),
        ({"remode": "const"}, "--remode const has no effect without --reprob"),
        ({"reprob": 0.5, "remode": "pixels"}, "--remode pixels is unknown: give one of const, rand, pixel"),
        ({"reprob": 0.5, "recount": 0}, "--recount 0 is out of range"),
        ({"train_interpolation": "bicubic"}, "--train-interpolation bicubic has no effect without --scale or"),
        ({"mixup": -0.1}, "--mixup -0.1 is out of range"),
        ({"mixup_mode": "elem"}, "--mixup-mode elem has no effect without --mixup or --cutmix"),
        ({"cutmix_minmax": [0.2, 0.21]}, "--cutmix-minmax 0.2 0.21 leaves no choice of a box in images of 12x10"),
        ({"aa": "rnd-m9"}, "--aa rnd-m9: unknown policy 'rnd', did you mean 'rand'"),
        ({"aa": "rand-mst0.5"}, "--aa rand-mst0.5: unknown section 'mst', did you mean 'mstd'"),
        ({"aa": "rand-m9.5"}, "--aa rand-m9.5: m9.5 is not a whole number: give m9"),
        ({"aa": "v0-n3"}, "--aa v0-n3: unknown section 'n'"),
        ({"gaussian_blur_prob": 0.5}, "--gaussian-blur-prob 0.5 blurs by 23 pixels, and images have 12x10"),
    ],
)
def test_values_that_are_refused(options, expected):
    with pytest.raises(UsageError, match=f"^{expected}[^\n]*$"):
        batches(make_split(), options=options)


def test_what_images_do_not_go_with():
    for options in ({"grayscale_prob": 0.5}, {"color_jitter": [0.1, 0.1, 0.1, 0.1]}):
        with pytest.raises(UsageError, match="grey"):
            batches(make_split(channels=1), options=options)
    split = make_split()
    split.labels = torch.rand(64, 5).round()
    batches(split, options={"mixup": 0.2})
    for options in ({"cutmix": 1.0}, {"cutmix_minmax": [0.2, 0.8]}):
        with pytest.raises(UsageError, match="--cutmix.* may cut out one of several classes"):
            batches(split, options=options)


def test_images_of_two_channels_or_of_parts_cannot_go_through_pil():
    for options in (COLOURS, {"aa": "v0"}):
        with pytest.raises(UsageError, match="^--aa .* does not go with images of 2 channels: leave it out$"):
            batches(make_split(channels=2), options=options)
    batches(make_split(channels=2), options=ALL_ON_DEVICE)
    with pytest.raises(UsageError, match="^--scale 0.3 1.0 does not go with images of 2 channels"):
        batches(make_split(channels=2, streamed=True), options=ALL_ON_DEVICE)
    split = make_split()
    split.parts = split.images[:, None]
    for options in ({"mixup": 0.2}, {"aa": "v0"}):
        with pytest.raises(UsageError, match="does not go with images that are composed of others"):
            batches(split, options=options, with_parts=True)


def test_odd_batches_cannot_be_mixed():
    augmentation = Augmentation(cutmix=1.0, mixup_off_epoch=2)
    augmentation.check_batches([8, 2, 1])
    with pytest.raises(UsageError, match="^--cutmix 1.0 mixes pairs of images, and a batch has 1: give an even"):
        augmentation.check_batches([8, 1])
    Augmentation().check_batches([1, 3])
