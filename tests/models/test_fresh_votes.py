"""Fresh networks, and weights of other sizes: class capsules of middling length whatever the size of the images."""

import math

import pytest
import torch
import torch.nn.functional as F

import capszoo


def mean_score(model, size, chans):
    noise = torch.randn(4, chans, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = model.eval()(4 * F.avg_pool2d(noise, 5, 1, 2))  # smooth images of about unit variance
    return float(scores.mean()), float(scores.std(dim=0).max())


@pytest.mark.parametrize(("name", "most"), [("capsnet_tiny", 0.75), ("capsnet_ws", 0.92), ("capsnet_pruned", 0.75)])
def test_class_capsules_do_not_grow_with_the_images(name, most):
    for size in (28, 48, 80):
        torch.manual_seed(0)
        mean, spread = mean_score(capszoo.create_model(name, img_size=size, in_chans=3), size, 3)
        assert 0.15 < mean < most and spread > 0.01, size


def test_matrices_of_28_pixels_start_as_ever():
    torch.manual_seed(0)
    assert float(capszoo.create_model("capsnet").class_caps.weight.std()) == pytest.approx(0.1, rel=0.01)


def test_shared_matrices_of_other_sizes_are_scaled():
    """A matrix that 36 positions shared serves 400 at 56x56: their votes would add up to eleven times as much."""
    small = capszoo.create_model("capsnet_tiny.mnist", pretrained=True)
    large = capszoo.create_model("capsnet_tiny.mnist", pretrained=True, img_size=56)
    torch.testing.assert_close(large.class_caps.weight, small.class_caps.weight * 36 / 400)
    assert mean_score(large, 56, 1)[0] < 0.9


@pytest.mark.parametrize("more", [{}, {"backbone": "stem", "backbone_level": 0}])
def test_files_of_shared_matrices_open_at_other_sizes(more, tmp_path):
    file = tmp_path / "small.safetensors"
    small = capszoo.create_model("capsnet_tiny", conv_dim=4, **more)
    capszoo.save_model(file, small)
    opened = [capszoo.load_model(file, img_size=56)]
    opened += [capszoo.create_model("capsnet_tiny", conv_dim=4, img_size=56, checkpoint_path=file)] if not more else []
    for large in opened:
        ratio = math.prod(small.grid_size) / math.prod(large.grid_size)
        assert ratio < 0.3
        torch.testing.assert_close(large.class_caps.weight, small.class_caps.weight * ratio)
    assert torch.equal(capszoo.load_model(file).class_caps.weight, small.class_caps.weight)


@pytest.mark.slow
def test_the_default_learns_at_64_pixels():
    """Bright shapes of 64x64 pixels, on which the default stayed at chance."""
    from capszoo.data import DataSplits, Loader, Split
    from capszoo.engine import evaluate
    from capszoo.engine.options import TrainingOptions
    from capszoo.engine.run import make_trainer
    from capszoo.recipes.starts import bright_shapes

    train, val = (Split(*reversed(bright_shapes(count, 3, 64, seed))) for count, seed in ((180, 0), (60, 1)))
    data = DataSplits("shapes", train, None, val, ["disc", "cross", "square"], 3, 3, (64, 64))
    options = TrainingOptions(epochs=20, device="cpu", amp="none")
    trainer = make_trainer(options, data, torch.device("cpu"))
    trainer.fit()
    assert evaluate(trainer.task, Loader(val, 60, "cpu")).top1 > 0.9
