"""Losses against loops written from the papers, and what they do at the margins and in half precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capszoo.losses import MarginLoss, ReconstructionLoss, SpreadLoss, margin_loss, reconstruction_loss, spread_loss

# Lengths are below 1 by squash; 1.25 shows that nothing depends on it.
lengths_and_targets = st.integers(1, 4).flatmap(
    lambda batch: st.integers(1, 6).flatmap(
        lambda classes: st.tuples(
            st.lists(
                st.lists(st.floats(0, 1.25, width=32), min_size=classes, max_size=classes),
                min_size=batch,
                max_size=batch,
            ),
            st.lists(st.integers(0, classes - 1), min_size=batch, max_size=batch),
        )
    )
)


@given(lengths_and_targets, st.floats(0.5, 1), st.floats(0, 0.5, exclude_max=True), st.floats(0, 2))
@settings(max_examples=100, deadline=None)
def test_margin_loss(example, m_plus, m_minus, lambda_):
    rows, targets = example
    expected = 0.0
    for row, target in zip(rows, targets, strict=True):
        for k, length in enumerate(row):
            if k == target:
                expected += max(0.0, m_plus - length) ** 2
            else:
                expected += lambda_ * max(0.0, length - m_minus) ** 2
    expected /= len(rows)
    lengths, target = torch.tensor(rows, dtype=torch.float64), torch.tensor(targets)
    assert margin_loss(lengths, target, m_plus, m_minus, lambda_).item() == pytest.approx(expected, abs=1e-12)
    assert MarginLoss(m_plus, m_minus, lambda_)(lengths, target).item() == pytest.approx(expected, abs=1e-12)
    assert margin_loss(lengths.float(), target, m_plus, m_minus, lambda_).item() == pytest.approx(expected, abs=1e-4)


@given(lengths_and_targets, st.floats(0.1, 1))
@settings(max_examples=100, deadline=None)
def test_spread_loss(example, margin):
    rows, targets = example
    expected = 0.0
    for row, target in zip(rows, targets, strict=True):
        for k, length in enumerate(row):
            if k != target:
                expected += max(0.0, margin - (row[target] - length)) ** 2
    expected /= len(rows)
    lengths, target = torch.tensor(rows, dtype=torch.float64), torch.tensor(targets)
    assert spread_loss(lengths, target, margin).item() == pytest.approx(expected, abs=1e-12)
    assert SpreadLoss(margin)(lengths, target).item() == pytest.approx(expected, abs=1e-12)


@given(
    st.tuples(*[st.integers(1, 4)] * 4).flatmap(
        lambda shape: st.tuples(st.just(shape), st.integers(0, 2**16), st.integers(0, 2**16))
    )
)
@settings(max_examples=50, deadline=None)
def test_reconstruction_loss(example):
    shape, *seeds = example
    drawn, images = (
        torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds
    )
    pairs = zip(drawn.flatten().tolist(), images.flatten().tolist(), strict=True)
    expected = sum((a - b) ** 2 for a, b in pairs) / shape[0]
    assert reconstruction_loss(drawn, images).item() == pytest.approx(expected, abs=1e-12)
    assert ReconstructionLoss()(drawn, images).item() == pytest.approx(expected, abs=1e-12)


def test_paper_constants():
    assert margin_loss(torch.zeros(3, 10), torch.tensor([0, 4, 9])).item() == pytest.approx(0.81)
    assert margin_loss(torch.ones(3, 10), torch.tensor([0, 4, 9])).item() == pytest.approx(9 * 0.5 * 0.81)


def test_soft_targets():
    lengths, target = torch.rand(4, 5), torch.tensor([0, 3, 3, 1])
    hard = torch.nn.functional.one_hot(target, 5)
    for soft in hard.half(), hard.float(), hard.double(), hard.bool():
        assert torch.equal(margin_loss(lengths, soft), margin_loss(lengths, target))
        torch.testing.assert_close(spread_loss(lengths, soft), spread_loss(lengths, target))
    hard = hard.float()
    other = hard[[1, 0, 3, 2]]
    mixed = 0.3 * hard + 0.7 * other
    expected = 0.3 * margin_loss(lengths, target) + 0.7 * margin_loss(lengths, other)
    torch.testing.assert_close(margin_loss(lengths, mixed), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    target = torch.tensor([2, 0, 1])
    lengths = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    for loss in margin_loss, spread_loss:
        found = loss(lengths.clone().requires_grad_(), target)
        assert found.dtype == torch.float32 and torch.equal(found, loss(lengths.float(), target))
    a, b = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    found = reconstruction_loss(a.to(dtype), b.to(dtype))
    assert found.dtype == torch.float32 and torch.equal(found, reconstruction_loss(a.to(dtype).float(), b.to(dtype)))
    leaf = lengths.clone().requires_grad_()
    margin_loss(leaf, target).backward()
    assert leaf.grad.dtype == dtype and leaf.grad.isfinite().all()


def test_float64_stays():
    lengths = torch.rand(2, 3, dtype=torch.float64)
    assert margin_loss(lengths, torch.tensor([0, 1])).dtype == torch.float64
    assert spread_loss(lengths, torch.tensor([0, 1])).dtype == torch.float64


def test_no_gradient_within_the_margins():
    lengths = torch.tensor([[0.95, 0.05, 0.0], [0.1, 0.9, 0.09]], requires_grad=True)
    loss = margin_loss(lengths, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == 0 and (lengths.grad == 0).all()

    lengths = torch.tensor([[0.95, 0.05, 0.0], [0.3, 0.8, 0.0]], requires_grad=True)
    margin_loss(lengths, torch.tensor([0, 1])).backward()
    assert (lengths.grad[0] == 0).all()
    assert lengths.grad[1, 0] > 0 > lengths.grad[1, 1] and lengths.grad[1, 2] == 0


@pytest.mark.parametrize("margin", [0.2, 0.3, 0.9])
def test_spread_loss_is_zero_beyond_the_margin(margin):
    """Exactly zero: the target's own gap, m squared, does not come back as a rounding error."""
    lengths = torch.tensor([[0.97, 0.01, 0.02], [0.0, 0.05, 0.96]], requires_grad=True)
    loss = spread_loss(lengths, torch.tensor([0, 2]), margin)
    loss.backward()
    assert loss.item() == 0 and (lengths.grad == 0).all()


def test_gradients():
    lengths = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([3, 0, 1])
    assert torch.autograd.gradcheck(lambda x: margin_loss(x, target), lengths)
    assert torch.autograd.gradcheck(lambda x: spread_loss(x, target), lengths)


nan = float("nan")


@pytest.mark.parametrize("m_plus, m_minus", [(0.1, 0.9), (0.5, 0.5), (0.9, -0.1), (nan, 0.1), (0.9, nan)])
def test_margins_that_are_not_possible(m_plus, m_minus):
    module = MarginLoss()
    module.m_plus, module.m_minus = m_plus, m_minus
    message = f"m_minus={m_minus} and m_plus={m_plus} are not possible"
    for call in (
        lambda: MarginLoss(m_plus, m_minus),
        lambda: module(torch.rand(2, 3), torch.tensor([0, 1])),
        lambda: margin_loss(torch.rand(2, 3), torch.tensor([0, 1]), m_plus, m_minus),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("value", [-0.1, nan, float("inf")])
def test_other_settings_that_are_not_possible(value):
    lengths, target = torch.rand(2, 3), torch.tensor([0, 1])
    for call in lambda: MarginLoss(lambda_=value), lambda: margin_loss(lengths, target, lambda_=value):
        with pytest.raises(ValueError, match=f"lambda_={value} is not possible"):
            call()
    for call in lambda: SpreadLoss(value), lambda: spread_loss(lengths, target, value):
        with pytest.raises(ValueError, match=f"margin={value} is not possible"):
            call()


def test_unknown_reduction():
    lengths, target, images = torch.rand(2, 3), torch.tensor([0, 1]), torch.rand(2, 1, 4, 4)
    for call in (
        lambda: MarginLoss(reduction="avg"),
        lambda: SpreadLoss(reduction="avg"),
        lambda: ReconstructionLoss("avg"),
        lambda: margin_loss(lengths, target, reduction="avg"),
        lambda: spread_loss(lengths, target, reduction="avg"),
        lambda: reconstruction_loss(images, images, "avg"),
    ):
        with pytest.raises(ValueError, match="^unknown reduction 'avg'. Known: none, mean, sum, batchmean$"):
            call()


losses_of_scores = pytest.mark.parametrize(
    "loss", [margin_loss, spread_loss, MarginLoss(), SpreadLoss()], ids=["margin", "spread", "Margin", "Spread"]
)


@losses_of_scores
@pytest.mark.parametrize(
    "target",
    [
        torch.zeros(4, 1, dtype=torch.int64),  # what a column of a table gives: broadcast, it trained to a loss of -15
        torch.zeros(4, 1),
        torch.zeros(1, 3),
        torch.zeros(3),
        torch.zeros(4),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros((), dtype=torch.int64),
        torch.zeros(4, dtype=torch.bool),
        torch.zeros(4, dtype=torch.int16),
        torch.zeros(4, 3, dtype=torch.int64),
        torch.zeros(4, 3, 1),
        torch.zeros(4, 3, dtype=torch.complex64),
    ],
    ids=lambda target: f"{list(target.shape)}-{target.dtype}",
)
def test_targets_of_another_shape_or_type(loss, target):
    lengths = torch.tensor([[0.9, 0.1, 0.1]]).expand(4, 3)
    with pytest.raises(ValueError) as error:
        loss(lengths, target)
    assert str(error.value) == (
        f"target has shape {list(target.shape)} and is {target.dtype}, lengths have shape [4, 3]: give class indices "
        "[B] (int64, int32 or uint8) or weights of the classes [B, J] (bool, or target.float())"
    )
    assert margin_loss(lengths, torch.zeros(4, dtype=torch.int64)) == 0


@losses_of_scores
@pytest.mark.parametrize(
    "target, message",
    [
        (torch.tensor([0, 3]), "class indices from 0 to 3: give 0 to J - 1 = 2"),
        (torch.tensor([-1, 2], dtype=torch.int32), "class indices from -1 to 2: give 0 to J - 1 = 2"),
        (torch.tensor([[0.0, 2, 0], [0, 0, 1]]), r"weights of the classes from 0 to 2: give numbers in \[0, 1\]"),
        (torch.tensor([[0, -0.5, 0], [0, 0, 1]]), "weights of the classes from -0.5 to 1: give"),
        (torch.tensor([[0, nan, 0], [0, 0, 1]]), "weights of the classes from nan to nan: give"),
    ],
)
def test_values_of_targets(loss, target, message):
    with pytest.raises(ValueError, match=f"^target has {message}"):
        loss(torch.rand(2, 3), target)


@losses_of_scores
def test_scores_and_weights_of_another_shape_or_type(loss):
    target = torch.tensor([0, 1])
    for lengths in torch.rand(2), torch.rand(2, 3, 1), torch.zeros(2, 3, dtype=torch.int64):
        with pytest.raises(ValueError, match=r"^lengths have shape .*: give floating \[B, J\]$"):
            loss(lengths, target)
    function = {MarginLoss: margin_loss, SpreadLoss: spread_loss}.get(type(loss), loss)
    for weight in torch.ones(2), torch.ones(3, 1), torch.ones(3, dtype=torch.int64):
        with pytest.raises(ValueError, match=r"^weight has shape .*: give floating \[J\], J=3$"):
            function(torch.rand(2, 3), target, weight=weight)


def test_images_of_another_shape_or_type():
    images = torch.rand(2, 1, 4, 4)
    for target in torch.rand(1, 1, 4, 4), torch.rand(2, 3, 4, 4), torch.rand(2, 16):
        for loss in reconstruction_loss, ReconstructionLoss():
            with pytest.raises(ValueError, match=r"^images have shape \[2, 1, 4, 4\], target .*: give both as"):
                loss(images, target)
    with pytest.raises(ValueError, match=r"^images are torch.float32, target torch.uint8: .* images / 255$"):
        reconstruction_loss(images, images.byte())
    with pytest.raises(ValueError, match=r"give both as \[B, C, H, W\]"):
        reconstruction_loss(torch.rand(4), torch.rand(4))


@losses_of_scores
def test_indices_of_any_type(loss):
    lengths = torch.rand(4, 5)
    target = torch.tensor([0, 3, 3, 1])
    for dtype in torch.int32, torch.uint8:
        assert torch.equal(loss(lengths, target.to(dtype)), loss(lengths, target))


def test_weights_that_are_not_quite_1():
    lengths, target = torch.rand(1, 2), torch.tensor([[0.7, 0.3]], dtype=torch.bfloat16)
    assert margin_loss(lengths, target + target.flip(1)).isfinite()  # 1.0039


def test_empty_batch():
    for target in torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3):
        for loss in margin_loss, spread_loss:
            assert loss(torch.rand(0, 3), target, reduction="sum") == 0
            assert loss(torch.rand(0, 3), target, reduction="none").shape == (0,)


@given(lengths_and_targets, st.integers(0, 2**16))
@settings(max_examples=50, deadline=None)
def test_class_weights_and_reductions(example, seed):
    """By class indices as in torch's nll_loss, and the same by one-hot weights of the classes."""
    rows, targets = example
    lengths, target = torch.tensor(rows, dtype=torch.float64), torch.tensor(targets)
    weight = torch.rand(lengths.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    one_hot = torch.nn.functional.one_hot(target, lengths.shape[1]).double()
    for function, module in (margin_loss, MarginLoss), (spread_loss, SpreadLoss):
        each = torch.stack(
            [function(lengths[i : i + 1], target[i : i + 1]) for i in range(len(target))]
        )  # means over one image
        for reduction in "none", "sum", "mean":
            plain = function(lengths, target, reduction=reduction)
            torch.testing.assert_close(plain, each if reduction == "none" else getattr(each, reduction)())
            expected = torch.nn.functional.nll_loss(
                -each[:, None].expand_as(lengths), target, weight, reduction=reduction
            )
            for labels in target, one_hot:
                found = function(lengths, labels, weight=weight.float(), reduction=reduction)
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
                made = module(weight=weight, reduction=reduction)
                torch.testing.assert_close(made(lengths, labels), expected)
    images, other = torch.rand(3, 2, 4, 4), torch.rand(3, 2, 4, 4)
    each = torch.stack([reconstruction_loss(images[i : i + 1], other[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(ReconstructionLoss("none")(images, other), each)
    torch.testing.assert_close(ReconstructionLoss("sum")(images, other), each.sum())


def test_class_weights_of_several_classes():
    weight, lengths = torch.tensor([1.0, 3.0, 5.0]), torch.rand(3, 3)
    target = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0.25, 0.75, 0]])
    each = margin_loss(lengths, target, reduction="none")
    counts = torch.tensor([(1 + 5) / 2, 1.0, 0.25 * 1 + 0.75 * 3])
    torch.testing.assert_close(margin_loss(lengths, target, weight=weight, reduction="none"), each * counts)
    torch.testing.assert_close(margin_loss(lengths, target, weight=weight), (each * counts).sum() / counts.sum())


@given(
    st.integers(1, 4).flatmap(
        lambda classes: st.lists(
            st.lists(
                st.tuples(st.floats(0, 1.25, width=32), st.sampled_from([0, 0.25, 1])),
                min_size=classes,
                max_size=classes,
            ),
            min_size=1,
            max_size=4,
        )
    ),
    st.floats(0.1, 1),
)
@settings(max_examples=50, deadline=None)
def test_spread_loss_of_several_classes(rows, margin):
    expected = 0.0
    for row in rows:
        for t, (present, present_weight) in enumerate(row):
            for i, (absent, other_weight) in enumerate(row):
                if i != t:
                    expected += present_weight * (1 - other_weight) * max(0.0, margin - (present - absent)) ** 2
    both = torch.tensor(rows, dtype=torch.float64)
    assert spread_loss(both[..., 0], both[..., 1], margin).item() == pytest.approx(expected / len(rows), abs=1e-9)


@losses_of_scores
def test_vmap_and_per_sample_gradients(loss):
    lengths, target = torch.rand(4, 5, 3), torch.randint(0, 3, (4, 5))
    one_hot = torch.nn.functional.one_hot(target, 3).float()
    expected = torch.stack([loss(lengths[i], target[i]) for i in range(4)])
    torch.testing.assert_close(torch.func.vmap(loss)(lengths, target), expected)
    torch.testing.assert_close(torch.func.vmap(loss)(lengths, one_hot), expected)
    shared = torch.func.vmap(loss, in_dims=(None, 0))(lengths[0], target)
    torch.testing.assert_close(shared, torch.stack([loss(lengths[0], labels) for labels in target]))
    gradients = torch.func.vmap(torch.func.grad(loss))(lengths, target)
    leaf = lengths.clone().requires_grad_()
    torch.stack([loss(leaf[i], target[i]) for i in range(4)]).sum().backward()
    torch.testing.assert_close(gradients, leaf.grad)
    with pytest.raises(ValueError, match=r"target has shape \[5, 1\]"):
        torch.func.vmap(loss)(lengths, target[..., None])
    with pytest.raises(RuntimeError, match="out of bounds"):
        torch.func.vmap(loss)(lengths, target + 1)


@losses_of_scores
def test_whole_graph(loss):
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in 2, 5:
        lengths, target = torch.rand(size, 3), torch.randint(0, 3, (size,))
        for labels in target, torch.nn.functional.one_hot(target, 3).bool():
            torch.testing.assert_close(compiled(lengths, labels), loss(lengths, labels))
    with pytest.raises(Exception, match="give class indices|ValueError"):
        compiled(lengths, target[:, None])
    with pytest.raises(RuntimeError, match="out of bounds"):
        compiled(lengths, target + 3)


def test_no_wait_for_a_device():
    """Nothing is read from a tensor that is not on the CPU; `meta` has nothing to read."""
    lengths = torch.rand(2, 3, device="meta")
    for target in torch.zeros(2, dtype=torch.int64, device="meta"), torch.zeros(2, 3, device="meta"):
        for loss in margin_loss, spread_loss:
            assert loss(lengths, target, weight=torch.ones(3, device="meta")).is_meta


@pytest.mark.parametrize(
    "module, args",
    [
        (MarginLoss(), "m_plus=0.9"),
        (SpreadLoss(0.2), "margin=0.2"),
        (MarginLoss(weight=torch.tensor([1.0, 2.0, 3.0]), reduction="none"), "reduction='none'"),
        (SpreadLoss(weight=torch.tensor([1.0, 2.0, 3.0]), reduction="sum"), "reduction='sum'"),
    ],
)
def test_modules_show_their_settings_and_can_be_scripted(module, args):
    assert args in repr(module)
    lengths, target = torch.rand(2, 3), torch.tensor([1, 2])
    scripted = torch.jit.script(module)
    assert torch.equal(scripted(lengths, target), module(lengths, target))
    multi_hot = torch.tensor([[True, False, True], [False, False, False]])
    assert torch.equal(scripted(lengths, multi_hot), module(lengths, multi_hot))
    with pytest.raises(torch.jit.Error, match=r"target has shape \[2, 1\].*give class indices \[B\]"):
        scripted(lengths, target[:, None])


def test_class_weights_move_with_the_module():
    module = MarginLoss(weight=torch.ones(3)).double()
    assert module.weight.dtype == torch.float64 and MarginLoss().weight is None
    assert torch.jit.script(ReconstructionLoss())(torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)) == 4


def test_the_margin_is_the_last_until_progress_is_told():
    """Whoever trains without telling it does not stay at the first margin, at which most images cost nothing."""
    criterion = SpreadLoss(margin=0.9, first_margin=0.2)
    lengths, target = torch.tensor([[0.7, 0.3]]), torch.tensor([0])
    torch.testing.assert_close(criterion(lengths, target), torch.tensor(0.25))  # (0.9 - 0.4)^2
    criterion.set_progress(0.0)
    assert criterion(lengths, target) == 0
    torch.testing.assert_close(criterion.eval()(lengths, target), torch.tensor(0.25))
