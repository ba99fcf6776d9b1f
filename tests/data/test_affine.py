"""capszoo.data.affine: positions by hand, and draws within the published ranges."""

import math

import pytest
import torch

from capszoo.data.affine import draw_affine, sample_affine
from capszoo.data.loader import seeded_generator


def test_no_change_into_a_larger_frame_is_padding():
    x = torch.rand(3, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, [3, 3, 2, 2])
    torch.testing.assert_close(sample_affine(x, torch.eye(2), size=(9, 13)), padded, rtol=0, atol=1e-12)
    shifted = sample_affine(x, torch.eye(2), torch.tensor([[3, -2]] * 3), (9, 13))
    torch.testing.assert_close(shifted[:, :, :5, 6:], x, rtol=0, atol=1e-6)


def test_each_image_has_its_own_transformation():
    x = torch.zeros(2, 1, 21, 21, dtype=torch.float64)
    x[..., 10, 14] = 1  # 4 to the right of the centre
    linear = torch.tensor([[[1.5, 0], [0, 1]], [[0, -1], [1, 0]]])
    moved = sample_affine(x, linear.inverse(), torch.tensor([[0, 3], [1, 0]]))
    rows, columns = torch.meshgrid(torch.arange(21.0) - 10, torch.arange(21.0) - 10, indexing="ij")
    for image, (across, down) in zip(moved[:, 0], ((6, 3), (1, 4)), strict=True):
        at = (image * columns).sum() / image.sum(), (image * rows).sum() / image.sum()
        assert at == pytest.approx((across, down), abs=1e-6)


def test_draws_have_the_published_ranges():
    linear = draw_affine(20_000, seeded_generator(0))
    angle = torch.atan2(linear[:, 1, 0], linear[:, 0, 0])
    cos, sin = angle.cos(), angle.sin()
    back = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], dim=1) @ linear
    across, down, shear = back[:, 0, 0], back[:, 1, 1], back[:, 0, 1] / back[:, 1, 1]
    assert back[:, 1, 0].abs().max() < 1e-12
    angle = angle * 180 / math.pi
    for values, middle, most in ((angle, 0, 20), (shear, 0, 0.2), (across, 1, 0.2), (down, 1, 0.2)):
        away = values - middle
        assert 0.99 * most < -away.min() <= most + 1e-9 and 0.99 * most < away.max() <= most + 1e-9
        assert away.mean() == pytest.approx(0, abs=0.02 * most)
    assert torch.equal(draw_affine(5, seeded_generator(0)), draw_affine(5, seeded_generator(0)))
    generator = seeded_generator(1)
    pieces = torch.cat([draw_affine(n, generator) for n in (1, 40, 7)])
    assert torch.equal(pieces, draw_affine(48, seeded_generator(1)))
