import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capszoo.data import Loader, Split
from capszoo.data.readers import ArrayReader
from capszoo.errors import DataError


def make_split(count=50, channels=1, height=6, width=5, streamed=False, seed=0):
    """Return a split whose pixels are all above 0, to tell them from zero fill; labels number the images."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)
    if streamed:
        rows = torch.randperm(count, generator=generator)
        stored = torch.empty_like(images)
        stored[rows] = images
        return Split(torch.arange(count), reader=ArrayReader(stored), indices=rows)
    return Split(torch.arange(count), images)


def batches(split, batch_size, **kwargs):
    return list(Loader(split, batch_size, "cpu", **kwargs))


def same(one, other):
    assert len(one) == len(other)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, other, strict=True))


def shift(image, down, right):
    """Move one image `[C, H, W]` pixel by pixel."""
    moved = np.zeros_like(image)
    _, height, width = image.shape
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                moved[:, y, x] = image[:, y - down, x - right]
    return moved


def test_plain_epoch_is_the_split_in_order():
    split = make_split(10)
    got = batches(split, 4)
    assert [len(labels) for _, labels in got] == [4, 4, 2]
    images, labels = (torch.cat(part) for part in zip(*got, strict=True))
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.equal(images, split.images.float() / 255) and torch.equal(labels, split.labels)


@settings(deadline=None, max_examples=40)
@given(
    channels=st.sampled_from([1, 3]),
    height=st.integers(3, 7),
    width=st.integers(3, 7),
    translate=st.integers(0, 2),
    batch_size=st.integers(1, 14),
    streamed=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_translation_against_pixel_loop(channels, height, width, translate, batch_size, streamed, channels_last, seed):
    kept = make_split(12, channels, height, width, seed=seed % 1000)
    split = make_split(12, channels, height, width, streamed, seed=seed % 1000)
    reach = range(-translate, translate + 1)
    seen = []
    for images, labels in Loader(
        split, batch_size, "cpu", shuffle=True, seed=seed, translate=translate, channels_last=channels_last
    ):
        assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        for image, label in zip(images, labels.tolist(), strict=True):
            original = (kept.images[label].float() / 255).numpy()
            assert any(np.array_equal(image, shift(original, down, right)) for down in reach for right in reach)
            seen.append(label)
    assert sorted(seen) == list(range(12))


def test_every_shift_occurs_about_equally_often():
    images = torch.zeros(5000, 1, 7, 7, dtype=torch.uint8)
    images[:, :, 3, 3] = 255
    split = Split(torch.zeros(5000, dtype=torch.int64), images)
    sums = torch.cat([images for images, _ in Loader(split, 64, "cpu", translate=2)]).sum(0)[0]
    assert sums[1:6, 1:6].min() > 130 and sums[1:6, 1:6].max() < 270  # 200 each, 5 standard deviations
    assert sums.sum() == 5000


def test_images_are_shifted_independently_of_labels_and_neighbours():
    images = torch.zeros(64, 1, 7, 7, dtype=torch.uint8)
    images[:, :, 3, 3] = 255
    got = torch.cat([images for images, _ in Loader(Split(torch.arange(64), images), 16, "cpu", translate=3)])
    assert len({tuple(place) for place in got.nonzero()[:, 2:].tolist()}) > 20


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 16, 100, 300])
def test_resume_gives_the_rest_of_the_epoch(batch_size, streamed):
    kwargs = dict(shuffle=True, seed=3, epoch=2, translate=2)
    split = make_split(601, streamed=streamed)
    whole = batches(split, batch_size, **kwargs)
    for start in sorted({0, 1, len(whole) // 2, len(whole) - 1, len(whole)}):
        loader = Loader(split, batch_size, "cpu", start_step=start, **kwargs)
        rest = list(loader)
        assert len(loader) == len(whole)
        assert same(rest, whole[start:])
        for (one, _), (other, _) in zip(rest, whole[start:], strict=True):  # a kernel may depend on alignment
            assert one.data_ptr() % 64 == other.data_ptr() % 64


def test_iterating_again_gives_the_same():
    loader = Loader(make_split(), 7, "cpu", shuffle=True, translate=1)
    assert same(list(loader), list(loader))


def test_seed_and_epoch_decide_order_and_shifts():
    split = make_split()
    places = [{"seed": seed, "epoch": epoch} for seed in (0, 1, 2**32, 2**40) for epoch in (0, 1, 2)]
    orders = {tuple(next(iter(Loader(split, 50, "cpu", shuffle=True, **place)))[1].tolist()) for place in places}
    shifted = {next(iter(Loader(split, 50, "cpu", translate=2, **place)))[0].numpy().tobytes() for place in places}
    assert len(orders) == len(shifted) == len(places)


def test_epoch_does_not_depend_on_batch_size():
    split = make_split()
    one, other = (batches(split, size, shuffle=True, translate=2) for size in (1, 16))
    assert torch.equal(torch.cat([x for x, _ in one]), torch.cat([x for x, _ in other]))
    assert torch.equal(torch.cat([y for _, y in one]), torch.cat([y for _, y in other]))


def test_drop_last():
    split = make_split(10)
    assert [len(labels) for _, labels in batches(split, 4, drop_last=True)] == [4, 4]
    assert len(Loader(split, 4, "cpu", drop_last=True)) == 2
    assert len(Loader(split, 5, "cpu", drop_last=True)) == len(Loader(split, 5, "cpu")) == 2


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("translate", [0, 2])
def test_streaming_equals_memory(num_workers, translate):
    kwargs = dict(shuffle=True, seed=1, epoch=4, start_step=5, translate=translate)
    kept, streamed = make_split(301, 3), make_split(301, 3, streamed=True)
    assert same(batches(kept, 8, **kwargs), batches(streamed, 8, num_workers=num_workers, **kwargs))


class BrokenReader(ArrayReader):
    def read(self, indices):
        raise DataError("'x.png' is broken")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_error_while_streaming_stays_one_line(num_workers):
    split = Split(torch.arange(3), reader=BrokenReader(torch.zeros(3, 1, 4, 4)), indices=torch.arange(3))
    with pytest.raises(DataError, match="^'x.png' is broken$"):
        batches(split, 2, num_workers=num_workers)


def test_global_random_state_is_left_alone():
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for streamed, num_workers in ((False, 0), (True, 0), (True, 1)):
        batches(make_split(streamed=streamed), 8, shuffle=True, translate=2, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_split_is_neither_changed_nor_copied_again():
    split = make_split()
    images = split.images.clone()
    for batch, _ in Loader(split, 8, "cpu", translate=2):
        batch.zero_()
    assert torch.equal(split.images, images)
    assert split.to("cpu") is split
    assert split.padded(2) is split.padded(2)
    assert split.to("meta") is split.to("meta")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"batch_size": 0},
        {"batch_size": 10**20},
        {"seed": -1},
        {"epoch": -1},
        {"start_step": -1},
        {"start_step": 8},
        {"translate": -1},
        {"translate": 5},
        {"num_workers": -1},
        {"batch_size": 51, "drop_last": True},
    ],
)
def test_arguments_out_of_range(kwargs):
    with pytest.raises(DataError, match=r"^[^\n]+$") as raised:
        Loader(make_split(), **{"batch_size": 8, "device": "cpu", **kwargs})
    assert str(next(iter(kwargs.values()))) in str(raised.value)


@pytest.mark.parametrize("batch_size, most", [(1, 4), (16, 4), (128, 8), (1000, 1)])
def test_small_batches_are_gathered_many_at_a_time(batch_size, most, monkeypatch):
    gathers = []
    windows = Loader._windows
    monkeypatch.setattr(Loader, "_windows", lambda *args: gathers.append(1) or windows(*args))
    batches(make_split(1000, 1, 28, 28), batch_size, shuffle=True, translate=2)
    assert len(gathers) <= most  # one for each of 1,000 steps would take 20 us a step, not 2


def test_chunks_of_large_images_stay_small(monkeypatch):
    sizes = []
    windows = Loader._windows
    monkeypatch.setattr(Loader, "_windows", lambda self, *args: sizes.append(len(args[1])) or windows(self, *args))
    batches(make_split(12, 3, 500, 500), 1)
    assert max(sizes) * 3 * 500 * 500 * 4 <= 8 << 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_gpu_sees_the_images_the_cpu_sees():
    for streamed in (False, True):
        split = make_split(301, 3, streamed=streamed)
        kwargs = dict(shuffle=True, translate=2, start_step=3)
        for (one, a), (other, b) in zip(
            Loader(split, 8, "cpu", **kwargs), Loader(split, 8, "cuda", **kwargs), strict=True
        ):
            assert other.is_cuda and b.is_cuda
            torch.testing.assert_close(one, other.cpu(), rtol=1e-6, atol=0)
            assert torch.equal(a, b.cpu())


@pytest.mark.parametrize("streamed", [False, True])
def test_normalised_images_are_those_of_timms_transforms(streamed):
    from torchvision.transforms.functional import normalize

    split = make_split(channels=3, streamed=streamed)
    plain = batches(split, 8, shuffle=True, translate=2)
    for mean, std in (((0.2, 0.5, 0.7), (0.1, 0.2, 0.3)), ((0.5,), (0.25,))):
        split.mean, split.std = mean, std
        found = batches(split, 8, shuffle=True, translate=2)
        expected = [(normalize(images, mean, std), labels) for images, labels in plain]
        for (images, labels), (wanted, wanted_labels) in zip(found, expected, strict=True):
            torch.testing.assert_close(images, wanted)
            assert torch.equal(labels, wanted_labels)


def test_parts_come_as_their_images_do():
    """Shuffled, shifted and shared out like the images, in [0, 1] whatever the images are normalised by."""
    split = make_split(50, channels=2)
    parts = torch.stack([split.images, 255 - split.images, split.images // 2], dim=1)
    split = Split(split.labels, split.images, mean=(0.5,), std=(0.25,), parts=parts)
    kwargs = dict(shuffle=True, seed=3, epoch=1, translate=2)
    whole = list(Loader(split, 8, "cpu", with_parts=True, **kwargs))
    plain = list(Loader(split, 8, "cpu", **kwargs))
    assert len(whole) == len(plain) == 7 and all(len(batch) == 2 for batch in plain)
    for (images, labels, shown), (same, same_labels) in zip(whole, plain, strict=True):
        assert torch.equal(images, same) and torch.equal(labels, same_labels)
        assert shown.shape == (len(labels), 3, *images.shape[1:])
        pixels = images * 0.25 + 0.5
        torch.testing.assert_close(shown[:, 0], pixels)
        inside = shown[:, 0] > 0  # no pixel of these images is black
        torch.testing.assert_close(shown[:, 1], torch.where(inside, 1 - pixels, 0.0))
    resumed = list(Loader(split, 8, "cpu", with_parts=True, start_step=4, **kwargs))
    assert len(resumed) == 3
    for batch, expected in zip(resumed, whole[4:], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(batch, expected, strict=True))
    shares = [list(Loader(split, 8, "cpu", with_parts=True, share=(rank, 3), **kwargs)) for rank in range(3)]
    for step, batch in enumerate(whole):
        for place, values in enumerate(batch):
            assert torch.equal(torch.cat([share[step][place] for share in shares]), values)
    assert all(len(batch) == 2 for batch in Loader(make_split(9), 4, "cpu", with_parts=True))
