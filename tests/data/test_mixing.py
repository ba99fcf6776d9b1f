"""Mixup and CutMix against timm's, whose draws are replaced by ours."""

import numpy as np
import pytest
import timm.data.mixup
import torch

from capszoo.data import Augmentation, Loader, Split
from capszoo.data.mixing import Mixing

CPU = torch.device("cpu")
BOTH = {"mixup": 0.8, "cutmix": 1.0}


def make_split(count=50, multi_label=False):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (count,), generator=generator)
    if multi_label:
        labels = (torch.rand(count, 5, generator=generator) < 0.4).float()
    return Split(labels, torch.randint(0, 256, (count, 3, 12, 10), generator=generator, dtype=torch.uint8))


def batches(split, batch_size=16, options=BOTH, **kwargs):
    return list(Loader(split, batch_size, "cpu", augmentation=Augmentation(**options), num_classes=5, **kwargs))


def make_mixing(options, count=1000, batch_size=10, epoch=0):
    return Mixing(Augmentation(**options), (12, 10), count, batch_size, 5, 0, epoch, CPU)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("more", [{}, {"cutmix": 0.0}, {"mixup": 0.0}, {"cutmix_minmax": [0.2, 0.8]}])
def test_batches_are_those_of_timm(monkeypatch, mode, more):
    split = make_split(48)
    options = {**BOTH, "mixup_mode": mode, "mixup_prob": 0.8, **more}
    plain = list(Loader(split, 16, "cpu", shuffle=True))
    mixing = Mixing(Augmentation(**options), (12, 10), 48, 16, 5, 0, 0, CPU)
    mixed = 0
    for step, ((images, labels), (found, targets)) in enumerate(
        zip(plain, batches(split, options=options, shuffle=True), strict=True)
    ):
        here = slice(16 * step, 16 * step + {"pair": 8}.get(mode, 16))
        boxes, shares = mixing.boxes[here].numpy(), mixing.shares[here].numpy().astype(np.float64)
        cuts = boxes[:, 1] > boxes[:, 0]
        theirs = timm.data.mixup.Mixup(
            options["mixup"] or 0.0, options["cutmix"] or 0.0, options.get("cutmix_minmax"), mode=mode,
            label_smoothing=0.0, num_classes=5,
        )  # fmt: skip
        drawn = iter([(tuple(box), share) for box, share, cut in zip(boxes, shares, cuts, strict=True) if cut])
        monkeypatch.setattr(timm.data.mixup, "cutmix_bbox_and_lam", lambda *args, drawn=drawn, **kwargs: next(drawn))
        monkeypatch.setattr(theirs, "_params_per_batch", lambda s=shares, c=cuts: (float(s[0]), bool(c[0])))
        monkeypatch.setattr(theirs, "_params_per_elem", lambda size, s=shares, c=cuts: (s.astype(np.float32), c))
        wanted, weights = theirs(images.clone(), labels)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(targets, weights)
        mixed += (found != images).flatten(1).any(dim=1).sum()
    assert mixed > 8


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_draws_have_timms_distribution(mode):
    """Means and spreads of the shares, and how often boxes are cut, over many batches of timm's and ours."""
    options = {"mixup": 0.4, "cutmix": 2.0, "mixup_prob": 0.7, "mixup_switch_prob": 0.3}
    ours = make_mixing({**options, "mixup_mode": mode}, 40_000, 20)
    np.random.seed(0)
    theirs = timm.data.mixup.Mixup(0.4, 2.0, prob=0.7, switch_prob=0.3, mode="elem")
    shares, cuts = theirs._params_per_elem(20_000)
    boxes = [
        timm.data.mixup.cutmix_bbox_and_lam((3, 12, 10), share)[1] if cut and share != 1 else share
        for share, cut in zip(shares.astype(float), cuts, strict=True)
    ]
    found, wanted = ours.shares.double(), torch.tensor(np.array(boxes, dtype=np.float64))
    tolerance = 0.03 if mode == "batch" else 0.015
    for measure in (torch.mean, torch.std, lambda x: (x == 1).double().mean(), lambda x: (x < 0.3).double().mean()):
        assert abs(measure(found) - measure(wanted)) < tolerance
    assert abs((ours.boxes[:, 1] > ours.boxes[:, 0]).double().mean() - np.mean(cuts & (shares < 1))) < 0.03


def test_one_draw_a_batch_a_pair_or_an_image():
    for mode, most in (("batch", 100), ("pair", 500), ("elem", 1000)):
        mixing = make_mixing({"mixup": 1.0, "mixup_mode": mode})
        assert len(mixing.shares.unique()) == pytest.approx(most, rel=0.01)
        if mode != "elem":
            assert torch.equal(mixing.shares, mixing.shares[mixing.partners])


def test_targets_are_weights_that_add_up_to_one():
    for images, targets in batches(make_split()):
        assert targets.shape == (len(images), 5) and targets.dtype == torch.float32
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(len(images)))


def test_a_last_batch_may_be_odd():
    (images, targets) = batches(make_split(49), 16, {"mixup": 1.0})[-1]
    assert torch.equal(images, list(Loader(make_split(49), 16, "cpu"))[-1][0]) and targets.max() == 1


def test_mixing_ends_after_some_epochs_and_keeps_the_kind_of_labels():
    options = {**BOTH, "mixup_off_epoch": 2}
    split = make_split(48)
    plain = list(Loader(split, 16, "cpu"))
    for epoch, mixed in ((1, True), (2, False), (3, False)):
        for (images, targets), (unmixed, labels) in zip(
            batches(split, options=options, epoch=epoch), plain, strict=True
        ):
            assert torch.equal(images, unmixed) != mixed or not mixed
            if not mixed:
                assert torch.equal(targets, torch.nn.functional.one_hot(labels, 5).float())


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_parts_of_a_batch_are_mixed_as_the_whole(mode):
    split, options = make_split(50), {**BOTH, "mixup_mode": mode, "hflip": 0.5, "reprob": 0.5}
    kwargs = dict(options=options, shuffle=True, seed=2, epoch=1, translate=1)
    whole = batches(split, **kwargs)
    rest = batches(split, start_step=2, **kwargs)
    for (one, a), (other, b) in zip(rest, whole[2:], strict=True):
        assert torch.equal(one, other) and torch.equal(a, b)
    parts = [batches(split, share=(rank, 3), **kwargs) for rank in range(3)]
    for (images, targets), *shares in zip(whole, *parts, strict=True):
        torch.testing.assert_close(torch.cat([x for x, _ in shares]), images, rtol=1e-6, atol=1e-6)
        assert torch.equal(torch.cat([y for _, y in shares]), targets)


def test_images_of_several_classes_are_blended():
    split = make_split(48, multi_label=True)
    mixing = Mixing(Augmentation(mixup=1.0), (12, 10), 48, 16, 5, 0, 0, CPU)
    targets = torch.cat([y for _, y in batches(split, options={"mixup": 1.0})])
    share = mixing.shares[:, None]
    torch.testing.assert_close(targets, share * split.labels + (1 - share) * split.labels[mixing.partners])
