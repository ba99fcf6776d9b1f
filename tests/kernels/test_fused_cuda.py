"""What is fused for a training step on a CUDA GPU: numbers against float64, autocast, graphs, and no waiting."""

import pytest
import torch

import capszoo
from capszoo.engine.task import CapsuleTask
from capszoo.kernels import centering, class_scores, dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# Autograd's names of what is fused.
FUSED = {"_LengthsBackward", "_MarginLossesBackward", "_FusedCenteredKernelsBackward"}


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to("cuda", dtype)


def margins(target):
    return lambda x: class_scores.margin_losses(x, target, 0.9, 0.1, 0.5)


def centred(weight):
    return centering.scaled_kernels(weight, torch.ones((), device="cuda"), torch.full((), 1 / 128, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("what", ["lengths", "margins", "filters"])
def test_numbers(what, dtype):
    function, x = {
        "lengths": (class_scores.capsule_lengths, draw(130, 10, 16, dtype=dtype)),
        "margins": (margins(torch.arange(130, device="cuda") % 10), draw(130, 10).sigmoid().to(dtype)),
        "filters": (centred, draw(6, 64, 9, 9, dtype=dtype).contiguous(memory_format=torch.channels_last)),
    }[what]
    results = []
    for values in (x.requires_grad_(), x.detach().double().requires_grad_()):
        result = function(values)
        results.append((result.detach(), *torch.autograd.grad(result.square().sum(), values)))
        assert (result.grad_fn.name() in FUSED) == (values.dtype != torch.float64)
        assert result.dtype in (torch.float32, values.dtype)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for actual, expected in zip(*results, strict=True):
        assert (actual.double() - expected).norm() <= bound * expected.norm()


def test_an_index_out_of_range_gives_nan_and_leaves_the_device_alive():
    losses = margins(torch.tensor([0, 10, -1], device="cuda"))(torch.full((3, 10), 0.5, device="cuda"))
    assert losses.isnan().tolist() == [False, True, True]


def test_bool_targets_and_autocast():
    lengths = draw(7, 10).sigmoid()
    target = lengths > 0.5
    torch.testing.assert_close(margins(target)(lengths), margins(target.float())(lengths))
    with torch.autocast("cuda", torch.bfloat16):
        assert class_scores.capsule_lengths(draw(3, 10, 16, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_a_training_step_takes_them_and_its_gradients_are_those_without(amp, monkeypatch):
    torch.manual_seed(0)
    model = capszoo.create_model("capsnet_tiny", decoder=True).to("cuda", memory_format=torch.channels_last)
    task, images = CapsuleTask(model, verbose=False), torch.rand(5, 1, 28, 28, device="cuda")
    labels, gradients = torch.arange(5, device="cuda"), []
    for fuses in (dispatch.fuses, lambda *tensors: False):
        monkeypatch.setattr(dispatch, "fuses", fuses)
        model.zero_grad()
        with torch.autocast("cuda", amp, enabled=amp is not None):
            loss = task(images, labels)["loss"]
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for actual, expected in zip(*gradients, strict=True):
        assert actual.isfinite().all()
        assert (actual - expected).norm() <= (1e-3 if amp is None else 3e-2) * expected.norm() + 1e-7


def test_a_graph_holds_them():
    lengths, target = draw(7, 10).sigmoid().requires_grad_(), torch.zeros(7, dtype=torch.long, device="cuda")
    capsules, weight = draw(7, 10, 16).requires_grad_(), draw(6, 64, 9, 9).requires_grad_()
    inputs, found = (lengths, capsules, weight), []

    def step():
        losses = margins(target)(lengths), class_scores.capsule_lengths(capsules), centred(weight)
        found[:] = torch.autograd.grad([loss.sum() for loss in losses], inputs)

    step()
    expected = [gradient.clone() for gradient in found]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    torch.cuda.synchronize()
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)
