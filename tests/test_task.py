"""CapsuleTask in the hands of timm's training loop: losses, evaluation model, moving average, compilation, DDP."""

import shutil

import pytest
import torch
from torch import nn

import capszoo
from capszoo.engine.options import fill_in, options_from
from capszoo.engine.task import CapsuleTask, Normalization, class_to_reconstruct
from capszoo.losses import MarginLoss, SpreadLoss, margin_loss, reconstruction_loss


def make(**kwargs):
    torch.manual_seed(0)
    return capszoo.create_model("capsnet_tiny", conv_dim=8, **{**dict(decoder=True, img_size=20), **kwargs})


def batch(size=4):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, 1, 20, 20, generator=generator), torch.arange(size) % 10


def make_task(model=None, **kwargs):
    return CapsuleTask(make() if model is None else model, verbose=False, **kwargs)


@pytest.fixture
def process_group(tmp_path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this build of torch has no gloo backend")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("weight", [0.0005, 0.0, 0.392])
def test_losses(weight):
    images, target = batch()
    task = make_task(reconstruction_weight=weight)
    result = task(images, target)
    assert set(result) == {"loss", "output", "margin_loss", "reconstruction_loss"}
    lengths = task.model(images)
    margin = margin_loss(lengths, target)
    reconstruction = reconstruction_loss(task.model.reconstruct(images, target), images)
    torch.testing.assert_close(result["output"], lengths)
    torch.testing.assert_close(result["margin_loss"], margin.detach())
    torch.testing.assert_close(result["reconstruction_loss"], reconstruction.detach())
    torch.testing.assert_close(result["loss"], margin + weight * reconstruction)
    assert result["loss"].requires_grad and not result["margin_loss"].requires_grad
    assert not result["reconstruction_loss"].requires_grad


def pairs(size=4):
    """Images of two classes each, and the two images that each is composed of."""
    parts = torch.rand(size, 2, 1, 20, 20, generator=torch.Generator().manual_seed(1))
    target = torch.zeros(size, 10).scatter(1, torch.tensor([[7, 2], [0, 9], [3, 4], [5, 1]])[:size], 1.0)
    return parts.sum(dim=1).clamp(max=1), target, parts


@pytest.mark.parametrize("compiled", [False, True])
def test_each_part_is_reconstructed_from_the_capsule_of_its_class(compiled):
    images, target, parts = pairs()
    task = make_task(reconstruction_weight=0.01)
    if compiled:
        task.compile(backend="eager")
    result = task(images, target, parts)
    loss = sum(
        reconstruction_loss(task.model.reconstruct(images, torch.tensor(classes)), parts[:, place])
        for place, classes in enumerate([(2, 0, 3, 1), (7, 9, 4, 5)])  # of each image the lower one, then the higher
    )
    torch.testing.assert_close(result["reconstruction_loss"], loss.detach())
    margin = margin_loss(task.model(images), target)
    torch.testing.assert_close(result["margin_loss"], margin.detach())
    torch.testing.assert_close(result["loss"], margin + 0.01 * loss)
    result["loss"].backward()
    assert all(parameter.grad is not None for parameter in task.model.parameters())
    torch.testing.assert_close(task(images, target.bool(), parts)["reconstruction_loss"], loss.detach())


def test_parts_without_decoder_or_classes():
    images, target, parts = pairs()
    assert make_task(make(decoder=False))(images, target, parts)["reconstruction_loss"] == 0
    with pytest.raises(ValueError, match=r"images of 2 parts.*shape \[4\].*give weights"):
        make_task()(images, torch.arange(4), parts)
    empty = make_task()(images[:0], target[:0], parts[:0])
    assert empty["output"].shape == (0, 10)


def test_paper_weight_is_the_default():
    assert make_task().reconstruction_weight == 0.0005
    # The loss is a sum over the values of an image: 56x56 have four times as many.
    assert make_task(make(img_size=56)).reconstruction_weight == pytest.approx(0.0005 / 4)
    assert fill_in(options_from({}), 1000, 3 * 28 * 28).reconstruction_weight == pytest.approx(0.0005 / 3)


def test_gradients_reach_everything():
    task = make_task()
    task(*batch())["loss"].backward()
    for key, parameter in task.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


def test_the_reconstruction_trains_the_capsules_too():
    task = make_task(reconstruction_weight=1.0, criterion=nn.MultiMarginLoss(margin=0.0))
    task(*batch())["loss"].backward()
    assert task.model.decoder.fc1.weight.grad.abs().sum() > 0
    assert task.model.conv1.weight.grad.abs().sum() > 0


def test_without_decoder():
    images, target = batch()
    task = make_task(make(decoder=False))
    result = task(images, target)
    torch.testing.assert_close(result["loss"], margin_loss(task.model(images), target))
    assert result["reconstruction_loss"].item() == 0
    result["loss"].backward()
    assert all(p.grad is not None for p in task.model.parameters())


def test_another_criterion():
    images, target = batch()
    task = make_task(criterion=SpreadLoss(0.2), reconstruction_weight=0.0)
    assert task(images, target)["loss"].item() == pytest.approx(SpreadLoss(0.2)(task.model(images), target).item())


def test_no_capsule_network():
    with pytest.raises(ValueError, match="^Linear is no capsule network: CapsuleTask needs a model of capszoo$"):
        CapsuleTask(nn.Linear(2, 2))


def test_eval_model():
    model = make().eval()
    task = make_task(model)
    assert task.get_eval_model() is model and task.model is model
    assert torch.equal(task.get_eval_model()(batch()[0]), model(batch()[0]))
    assert task.get_checkpoint_state()["state_dict"].keys() == model.state_dict().keys()


def test_training_lowers_the_losses():
    torch.manual_seed(0)
    task = make_task().train()
    optimizer = torch.optim.Adam(task.model.parameters(), lr=3e-3)
    images, target = batch(10)
    first = task(images, target)
    for _ in range(30):
        optimizer.zero_grad()
        result = task(images, target)
        result["loss"].backward()
        optimizer.step()
    assert result["margin_loss"] < 0.5 * first["margin_loss"]
    assert result["reconstruction_loss"] < first["reconstruction_loss"]


def test_moving_average():
    task = make_task()
    assert task.get_eval_model(ema=True) is None and not task.has_ema()
    task.setup_ema(decay=0.75)
    average = task.get_eval_model(ema=True)
    assert type(average) is type(task.model) and average is not task.model
    before = {key: value.clone() for key, value in average.state_dict().items()}
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter += 1
    task.update_ema()
    parameters = dict(task.model.named_parameters())
    for key, value in task.get_eval_model(ema=True).state_dict().items():
        torch.testing.assert_close(value, before[key] + (0.25 if key in parameters else 0))
    state = task.get_checkpoint_state(ema=True)["state_dict_ema"]
    assert state.keys() == task.model.state_dict().keys()
    task.load_checkpoint_state(before, ema=True)
    assert torch.equal(task.get_eval_model(ema=True).conv1.weight, before["conv1.weight"])


def test_checkpoint_state_round_trip():
    source, task = make_task(), make_task(make(drop_rate=0.1))
    with torch.no_grad():
        source.model.conv1.weight += 1
    task.load_checkpoint_state(source.get_checkpoint_state()["state_dict"])
    assert torch.equal(task.model.conv1.weight, source.model.conv1.weight)


@pytest.mark.parametrize(
    ("backend", "decoder"),
    [("eager", False), ("eager", True), ("inductor", True), pytest.param("inductor", False, marks=pytest.mark.slow)],
)
def test_compile(backend, decoder):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    images, target = batch()
    expected = make_task(make(decoder=decoder))(images, target)
    task = make_task(make(decoder=decoder))
    torch._dynamo.reset()
    compiled = task.compile(backend=backend, fullgraph=True)
    assert compiled is task.get_eval_model() and compiled is not task.model
    result = task(images, target)
    for key in expected:
        torch.testing.assert_close(result[key], expected[key], rtol=1e-4, atol=1e-5)
    result["loss"].backward()
    assert all(p.grad is not None for p in task.model.parameters())
    torch.testing.assert_close(compiled(images), expected["output"], rtol=1e-4, atol=1e-5)
    assert task.get_checkpoint_state()["state_dict"].keys() == make(decoder=decoder).state_dict().keys()


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_distributed(process_group, decoder, compiled):
    images, target = batch()
    plain = make_task(make(decoder=decoder))
    expected = plain(images, target)
    expected["loss"].backward()

    task = make_task(make(decoder=decoder))
    if compiled:
        torch._dynamo.reset()
        task.compile(backend="eager")
    assert task.prepare_distributed() is task
    assert isinstance(task.trainable_module, nn.parallel.DistributedDataParallel)
    for _ in range(2):  # the second step fails where the first left parameters without gradient
        task.zero_grad()
        result = task(images, target)
        result["loss"].backward()
    torch.testing.assert_close(result["loss"], expected["loss"])
    for found, wanted in zip(task.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)

    keys = make(decoder=decoder).state_dict().keys()
    assert task.model.state_dict().keys() == keys
    assert task.get_checkpoint_state()["state_dict"].keys() == keys
    assert task.get_eval_model()(images).shape == (4, 10)
    with task.no_sync():
        task(images, target)["loss"].backward()
    task.setup_ema(decay=0.5)
    task.update_ema()
    assert task.get_checkpoint_state(ema=True)["state_dict_ema"].keys() == keys


def test_device_and_type():
    task = make_task().double()
    images, target = batch()
    assert task.dtype == torch.float64
    assert task(images.double(), target)["loss"].dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = make_task()(images, target)
    assert result["loss"].dtype == torch.float32 and result["reconstruction_loss"].dtype == torch.float32
    result["loss"].backward()


def test_mixed_labels_draw_the_heavier_class():
    torch.manual_seed(0)
    task, images = make_task(), torch.rand(4, 1, 20, 20)
    hard = torch.tensor([1, 0, 2, 2])
    soft = torch.nn.functional.one_hot(hard, 10) * 0.7 + 0.3 / 10
    assert task(images, soft)["reconstruction_loss"] == task(images, hard)["reconstruction_loss"]
    assert task(images, soft)["margin_loss"] != task(images, hard)["margin_loss"]


def test_the_decoder_reconstructs_pixels_whatever_the_normalisation():
    model, (pixels, target) = make(), batch()
    mean, std = (0.3,), (0.2,)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": mean, "std": std}
    images = (pixels - 0.3) / 0.2
    found = make_task(model)(images, target)["reconstruction_loss"]
    torch.testing.assert_close(found, reconstruction_loss(model.reconstruct(images, target), pixels).detach())
    normalization = Normalization(model)
    torch.testing.assert_close(normalization(pixels), images)
    torch.testing.assert_close(normalization.undo(images), pixels)


def test_images_that_are_not_normalised_keep_their_bits():
    pixels, _ = batch()
    assert Normalization(make()).undo(pixels) is pixels


def test_class_to_reconstruct():
    lengths = torch.tensor([[0.2, 0.9, 0.6], [0.3, 0.1, 0.8], [0.4, 0.5, 0.1]])
    for indices in torch.tensor([2, 0, 1]), torch.tensor([2, 0, 1], dtype=torch.uint8):
        assert class_to_reconstruct(lengths, indices).tolist() == [2, 0, 1]
    mixed = torch.tensor([[0.7, 0.3, 0.0], [0.4, 0.6, 0.0], [0.5, 0.0, 0.5]])
    assert class_to_reconstruct(lengths, mixed).tolist() == [0, 1, 0]  # of equal weights the longest
    several = torch.tensor([[1.0, 0, 1], [1, 1, 0], [0, 0, 0]])
    for target in several, several.bool(), several.double():
        found = class_to_reconstruct(lengths.bfloat16(), target)
        assert found.tolist() == [2, 0, 1] and found.dtype == torch.int64


def test_several_classes():
    torch.manual_seed(0)
    task, (images, _) = make_task(), batch()
    target = torch.tensor([[1.0, 0, 1] + [0.0] * 7, [0.0] * 10, [1.0] * 10, [0.0] * 9 + [1]])
    result = task(images, target)
    chosen = class_to_reconstruct(result["output"], target)
    assert chosen[0] in (0, 2) and chosen[3] == 9
    expected = reconstruction_loss(task.model.reconstruct(images, chosen), images)
    torch.testing.assert_close(result["reconstruction_loss"], expected.detach())
    torch.testing.assert_close(result["margin_loss"], margin_loss(result["output"], target).detach())
    result["loss"].backward()
    assert torch.equal(task(images, target.bool())["loss"], task(images, target)["loss"])


@pytest.mark.parametrize("decoder", [False, True])
def test_targets_that_do_not_fit(decoder):
    task, (images, target) = make_task(make(decoder=decoder)), batch()
    for wrong in target[:, None], target.float(), target[:2], target + 10, torch.zeros(4, 9):
        with pytest.raises(ValueError, match="^target has .*: give "):
            task(images, wrong)
    assert torch.equal(task(images, target.int())["loss"], task(images, target)["loss"])


def test_criterion_that_is_no_scalar():
    with pytest.raises(ValueError, match="^MarginLoss has reduction='none': training needs a scalar, give 'mean'$"):
        make_task(criterion=MarginLoss(reduction="none"))
