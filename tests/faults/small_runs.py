"""Small runs to which things happen."""

import torch
from torch import nn

import capszoo
from capszoo.checkpoint import load_tensors
from capszoo.data import Split
from capszoo.engine import Trainer
from capszoo.engine.task import CapsuleTask
from capszoo.losses import MarginLoss
from capszoo.policies import create_policy

EPOCHS = 3
STEPS = 4  # of 16 images, 50 in all


class PoisonedLoss(nn.Module):
    """The margin loss, but for some forward passes of a training, counted from 1."""

    def __init__(self, bad=(), value=float("nan"), gradient_only=False):
        super().__init__()
        self.bad, self.value, self.gradient_only, self.calls = set(bad), value, gradient_only, 0
        self.loss = MarginLoss()

    def forward(self, lengths, target):
        if not torch.is_grad_enabled():  # an evaluation
            return self.loss(lengths, target)
        self.calls += 1
        loss = self.loss(lengths, target)
        if self.calls not in self.bad:
            return loss
        if self.gradient_only:
            lengths.register_hook(lambda gradient: gradient * self.value)
            return loss
        return loss * self.value


def make_splits():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (70, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (70,), generator=generator)
    return Split(labels[:50], images[:50]), Split(labels[50:], images[50:])


def make_trainer(splits, folder, criterion=None, **kwargs):
    train, val = splits
    torch.manual_seed(0)
    model = capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2, img_size=train.image_shape[1:], drop_rate=0.2)
    policy = create_policy("one_cycle", lr=1e-3, batch_size=16, epochs=EPOCHS, num_images=len(train))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    task = CapsuleTask(model, criterion, verbose=False)
    folder.mkdir(exist_ok=True)
    return Trainer(task, optimizer, policy, train, val, folder=folder, translate=2, eval_batch_size=8, **kwargs)


def assert_same_bits(one, other):
    one, other = one.task.model.state_dict(), other.task.model.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


def go_on(splits, folder, whole, **kwargs):
    """Resume, and end with the bits of a run that nothing happened to."""
    trainer = make_trainer(splits, folder, **kwargs)
    assert trainer.resume()
    position = trainer.position.epoch, trainer.position.step
    assert trainer.fit()
    assert_same_bits(trainer, whole)
    assert trainer.position.best_epoch == whole.position.best_epoch
    best, expected = (load_tensors(t.folder / "best.safetensors")[0] for t in (trainer, whole))
    assert all(torch.equal(best[key], expected[key]) for key in expected)
    return position
