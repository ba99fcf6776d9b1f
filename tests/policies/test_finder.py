"""The learning-rate finder's answer."""

import math
import random

import pytest

from capszoo.policies import create_policy, suggest_lr

LR = 0.001
BATCH = 128


def make(name, epochs=30, num_images=60000, lr=LR, batch_size=BATCH, **options):
    return create_policy(name, lr=lr, batch_size=batch_size, epochs=epochs, num_images=num_images, **options)


def finder_run(loss, noise=0.0):
    policy = make("lr_finder", epochs=2)
    draw = random.Random(1)
    lrs = [lr for _, _, lr in policy.schedule()]
    return lrs, [loss(math.log10(lr)) * (1 + noise * draw.uniform(-1, 1)) for lr in lrs]


def falls_at(exponent, then=lambda x: 0.0):
    """A loss from 1 to 0.1, falling most steeply at 10^exponent."""
    return lambda x: 0.1 + 0.9 / (1 + math.exp(5 * (x - exponent))) + then(x)


@pytest.mark.parametrize("exponent", [-4.5, -3, -1.2])
@pytest.mark.parametrize("noise, within", [(0, 0.011), (0.03, 0.2)])
def test_suggested_rate_is_where_the_loss_falls_steepest(exponent, noise, within):
    lrs, losses = finder_run(falls_at(exponent), noise)
    suggested = suggest_lr(lrs, losses)
    assert suggested in lrs and abs(math.log10(suggested) - exponent) <= within


@pytest.mark.parametrize(
    "then",
    [
        lambda x: math.nan if x > -1 else 0.0,
        lambda x: math.inf if x > -1 else 0.0,
        lambda x: 50 * math.sin(20 * x) ** 2 if x > -1 else 0.0,  # swings, far steeper than the descent
        lambda x: 0.25 * math.cos(9 * x) ** 2 if x > -1 else 0.0,  # all below 4 times the lowest
        lambda x: 10 * (-0.8 - x) if -1 < x < -0.8 else 0.0,
    ],
    ids=["nan", "inf", "swings", "small swings", "spike"],
)
def test_suggestion_ignores_what_follows_divergence(then):
    lrs, losses = finder_run(falls_at(-3, then))
    assert abs(math.log10(suggest_lr(lrs, losses)) + 3) <= 0.011


def test_errors_of_suggest_lr():
    lrs = [10 ** (step / 100 - 6) for step in range(60)]
    falling = [2 - step / 60 for step in range(60)]
    for arguments, words in (
        ((lrs, falling[:-1]), "60 learning rates and 59 losses"),
        ((lrs[::-1], falling), "do not increase"),
        (([0.0, *lrs[1:]], falling), "do not increase"),
        ((lrs, falling[::-1]), "the loss never falls"),
        ((lrs, [1.0] * 60), "the loss never falls"),
        ((lrs, [*falling[:20], math.nan, *falling[21:]]), "20 steps with a finite loss, fewer than window=21"),
        ((lrs, falling, 1), "window=1"),
        (([], []), "0 steps with a finite loss"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            suggest_lr(*arguments)
        assert "\n" not in str(caught.value)
