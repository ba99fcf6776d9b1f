"""Images composed of several, each the target of the decoder for the capsule of its class."""

import pytest
import torch

import capszoo
from capszoo.data import Loader, load_data
from capszoo.data.composed import pair_digits
from capszoo.engine import CapsuleTask, Trainer, evaluate
from capszoo.losses import reconstruction_loss
from capszoo.policies import create_policy
from capszoo.prune.ranking import scores


@pytest.fixture(scope="module")
def pairs():
    """A few pairs of digits, as of multi_mnist."""
    data = load_data("digits")
    few = ((data.train, "train", 50), (data.val, "val", 20))
    return [pair_digits(type(some)(some.labels[:n], some.images[:n]), part, 10) for some, part, n in few]


def make_model():
    torch.manual_seed(0)
    return capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2, img_size=36, decoder=True)


def train(splits, captured=False, **kwargs):
    model = make_model()
    policy = create_policy("one_cycle", lr=1e-3, batch_size=16, epochs=3, num_images=50)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    trainer = Trainer(CapsuleTask(model, verbose=False), optimizer, policy, *splits, translate=2, **kwargs)
    trainer.step.cuda_graphs = captured
    trainer.fit()
    return trainer


def weights(trainer):
    return trainer.task.model.state_dict()


def test_evaluate_against_plain_code(pairs):
    model, split = make_model(), pairs[1]
    result = evaluate(model, Loader(split, 7, "cpu", with_parts=True))
    images, labels, parts = next(iter(Loader(split, 20, "cpu", with_parts=True)))
    classes = torch.stack([row.nonzero().flatten() for row in labels])
    with torch.no_grad():
        lengths = model(images)
        error = sum(reconstruction_loss(model.reconstruct(images, classes[:, i]), parts[:, i]) for i in (0, 1))
    assert result.reconstruction_error == pytest.approx(error.item(), rel=1e-5)
    longest = lengths.topk(2).indices.sort(dim=1).values
    assert result.exact_top_k == (longest == classes).all(dim=1).double().mean().item()
    assert evaluate(model, Loader(split, 7, "cpu")).exact_top_k == result.exact_top_k


def test_training(pairs, pretended_graphs):
    """Whole, in micro-batches and captured it comes to the same, and to another than training on the images alone."""
    plain = train(pairs)
    first, last = plain.history[0], plain.history[-1]
    assert last["train_reconstruction_loss"] < first["train_reconstruction_loss"]
    captured = train(pairs, captured=True)
    assert captured.step.cuda_graphs and len(captured.step.captured.batch) == 3 and len(pretended_graphs) == 1
    for other in (train(pairs, micro_batch=5), captured):
        for key, value in weights(plain).items():
            torch.testing.assert_close(weights(other)[key], value, rtol=1e-4, atol=1e-5)
    merged = train([type(split)(split.labels, split.images) for split in pairs])
    assert not torch.allclose(weights(merged)["decoder.fc3.bias"], weights(plain)["decoder.fc3.bias"], atol=1e-4)


def test_ranking_by_the_loss_of_training(pairs):
    """The Taylor score of the decoder's units is zero where their images are drawn right, whatever the sum is."""
    model = make_model()
    images, labels, parts = next(iter(Loader(pairs[1], 8, "cpu", with_parts=True)))
    classes = labels.topk(2).indices.sort(dim=1).values
    drawn = torch.stack([model.reconstruct(images, classes[:, i]).detach() for i in (0, 1)], dim=1)
    score = scores(model, "decoder", "taylor", [(images, labels, drawn)])
    assert score.abs().max() < 1e-6 < scores(model, "decoder", "taylor", [(images, labels, parts)]).abs().max()
