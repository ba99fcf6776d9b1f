"""Changed images: exact where a change needs no interpolation, and the same for the same images."""

import pytest
import torch

import capszoo
from capszoo.engine.robustness import ROBUSTNESS_COLUMNS, draw_shifts, measure_robustness, transform


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


SHAPES = [(3, 1, 28, 28), (2, 3, 20, 31), (4, 2, 7, 7), (1, 1, 1, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_nothing_to_do_changes_nothing(shape, dtype):
    x = images(*shape).to(dtype)
    for same in (transform(x), transform(x, shifts=torch.zeros(len(x), 2))):
        assert same.dtype == dtype
        torch.testing.assert_close(same, x, rtol=0, atol=1e-12 if dtype == torch.float64 else 0)


@pytest.mark.parametrize("turns", [1, 2, 3, -1])
@pytest.mark.parametrize("size", [28, 9])
def test_quarter_turns(size, turns):
    x = images(2, 3, size, size)
    torch.testing.assert_close(transform(x, 90 * turns), torch.rot90(x, turns, (-2, -1)), rtol=0, atol=1e-6)


def test_half_turn_of_oblong_images():
    x = images(2, 1, 12, 30)
    torch.testing.assert_close(transform(x, 180), x.flip(-2, -1), rtol=0, atol=1e-6)


def test_rotation_keeps_angles_in_oblong_images():
    """A dot to the right of the centre goes to the same distance above it, whatever the frame."""
    x = torch.zeros(1, 1, 21, 41)
    x[..., 10, 26] = 1.0
    turned = transform(x, 90)
    assert turned[0, 0, 4, 20] == pytest.approx(1.0) and turned.sum() == pytest.approx(1.0)
    turned = transform(x, 30)
    rows, columns = torch.meshgrid(torch.arange(21.0), torch.arange(41.0), indexing="ij")
    mass = turned[0, 0]
    centre = (mass * columns).sum() / mass.sum() - 20, (mass * rows).sum() / mass.sum() - 10
    assert centre[0] == pytest.approx(6 * 3**0.5 / 2, abs=0.2) and centre[1] == pytest.approx(-3, abs=0.2)


@pytest.mark.parametrize("height, width", [(28, 28), (20, 31)])
def test_shifts_move_by_whole_pixels(height, width):
    x = images(5, 2, height, width)
    shifts = torch.tensor([[0, 0], [6, -6], [-1, 5], [3, 0], [0, -2]])
    moved = transform(x, shifts=shifts)
    for image, result, (right, down) in zip(x, moved, shifts.tolist(), strict=True):
        expected = torch.zeros_like(image)
        rows, columns = range(max(down, 0), height + min(down, 0)), range(max(right, 0), width + min(right, 0))
        expected[:, rows.start : rows.stop, columns.start : columns.stop] = image[
            :, rows.start - down : rows.stop - down, columns.start - right : columns.stop - right
        ]
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_half_a_pixel_is_the_mean_of_two():
    x = images(1, 1, 6, 6)
    moved = transform(x, shifts=torch.tensor([[0.5, 0.0]]))
    torch.testing.assert_close(moved[..., 1:], (x[..., 1:] + x[..., :-1]) / 2)


def test_out_of_the_frame_is_black():
    assert transform(images(2, 1, 8, 8), shifts=torch.tensor([[8, 0], [0, -9]])).abs().max() < 1e-12


def test_scale():
    x = torch.zeros(1, 1, 29, 29)
    x[..., 4:25, 4:25] = 1.0
    for scale in (0.8, 1.2, 0.5):
        result = transform(x, scale=scale)
        assert result.sum().sqrt() == pytest.approx(21 * scale, abs=0.6)
        torch.testing.assert_close(result, result.flip(-1))
    ramp = torch.arange(29.0).expand(1, 1, 29, 29)
    torch.testing.assert_close(transform(ramp, scale=2.0)[0, 0, 14], 14 + (torch.arange(29.0) - 14) / 2)


@pytest.mark.parametrize("scale", [0, -1.0])
def test_impossible_scale(scale):
    with pytest.raises(ValueError, match="must be above 0"):
        transform(images(1, 1, 4, 4), scale=scale)


def test_shifts_are_uniform_and_do_not_depend_on_the_batches():
    shifts = draw_shifts(5000, torch.Generator().manual_seed(3))
    counts = torch.bincount(shifts.flatten() + 6)
    assert len(counts) == 13 and (counts - 10_000 / 13).abs().max() < 5 * (10_000 / 13) ** 0.5
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(torch.cat([draw_shifts(n, generator) for n in (1, 700, 299, 4000)]), shifts)


class Corner(torch.nn.Module):
    """Says 1 where the brightest pixel is the top left one, and counts what it saw."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, x):
        assert not self.training
        self.seen += len(x)
        first = (x.flatten(1).argmax(dim=1) == 0) & (x.flatten(1).amax(dim=1) > 0.5)
        return torch.stack([~first, first], dim=1).float()


def test_measures_count_the_right_answers():
    model = Corner().train()
    x = torch.zeros(10, 1, 15, 15)
    x[:, :, 0, 0] = 1.0  # any rotation, growing or shift but one to the lower right takes the dot out of the frame
    labels = torch.tensor([1] * 6 + [0] * 4)
    result = measure_robustness(model, [(x[:7], labels[:7]), (x[7:], labels[7:])])
    assert model.training and model.seen == 10 * 8
    assert tuple(result) == ROBUSTNESS_COLUMNS
    unmoved = (draw_shifts(10, capszoo.data.loader.seeded_generator(0)) == 0).all(dim=1)
    assert not unmoved.any()
    assert result == dict.fromkeys(ROBUSTNESS_COLUMNS, 0.4)


def test_measures_repeat_whatever_the_batch_size():
    torch.manual_seed(0)
    model = capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2, img_size=20)
    x, labels = images(23, 1, 20, 20), torch.randint(0, 10, (23,))
    whole = measure_robustness(model, [(x, labels)])
    assert whole == measure_robustness(model, zip(x.split(5), labels.split(5), strict=True))
    assert all(0 <= value <= 1 for value in whole.values())


def test_several_classes_are_an_exact_match():
    x = torch.zeros(10, 1, 15, 15)
    x[:, :, 0, 0] = 1.0
    # The corner is out of the frame in all measures, so the first class alone is predicted.
    labels = torch.tensor([[1.0, 0]] * 3 + [[1, 1]] * 4 + [[0, 0]] * 3)
    assert measure_robustness(Corner(), [(x, labels)]) == dict.fromkeys(ROBUSTNESS_COLUMNS, 0.3)


def test_no_images():
    with pytest.raises(ValueError, match="no images"):
        measure_robustness(Corner(), [])


def test_normalised_images_are_changed_as_their_pixels_are():
    torch.manual_seed(0)
    model = capszoo.create_model("capsnet_tiny", conv_dim=8).eval()
    pixels, labels = images(12, 1, 28, 28), torch.arange(12) % 10
    expected = measure_robustness(model, [(pixels, labels)])

    class Normalised(torch.nn.Module):
        """The same network on images that are normalised: it undoes that itself."""

        pretrained_cfg = {"mean": (0.4,), "std": (0.2,)}

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x * 0.2 + 0.4)

    found = measure_robustness(Normalised().eval(), [((pixels - 0.4) / 0.2, labels)])
    assert found == pytest.approx(expected)
