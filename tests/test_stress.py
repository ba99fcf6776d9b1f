"""Numerics under stress: training on extreme images in every precision, and the operators on extreme numbers.

float16 ends at 65504. Convolutions of images of 1e4 can exceed it, at full size soon do: no scale of the loss helps
then, GradScaler leaves each such step out and halves its scale in vain. So only there may a loss or a gradient be
infinite or NaN, and the others must go on afterwards.
"""

import pytest
import torch
from families import sizes_of
from hypothesis import given, settings
from hypothesis import strategies as st

import capszoo
from capszoo.engine.batch_norm import has_batch_norm
from capszoo.engine.task import CapsuleTask
from capszoo.kernels import dynamic_routing, reference, squash
from capszoo.layers import set_fused_routing, use_fused_routing
from capszoo.models import CapsNet, CNNBaseline, EfficientCapsNet
from capszoo.registry import family_of, model_keywords

MODELS = capszoo.list_models()
AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
BEYOND_FLOAT16 = ("1e4", "outliers")


@pytest.fixture(params=[True, False], ids=["fused", "reference"])
def fused(request):
    before = use_fused_routing()
    set_fused_routing(request.param)
    yield
    set_fused_routing(before)


def make_model(name, small, **options):
    """Small in every size, or as the zoo has it; with decoder where there is one."""
    known = model_keywords(name)
    if small:
        # The smallest size whose capsules are several; float16 takes a CPU long.
        img_size = 14 if name.startswith("efficient") else 20
        sizes = {"num_types": 2, **sizes_of(name), "img_size": img_size, "decoder_dims": (16, 16)}
        if name == "capsnet_pruned":
            sizes["keep_types"] = 1
        options = {**sizes, **options}
    options = {"decoder": True, **options}
    torch.manual_seed(0)
    return capszoo.create_model(name, **{key: value for key, value in options.items() if key in known}).train()


def make_batches(model, count):
    """Name, images and labels of each extreme."""
    generator = torch.Generator().manual_seed(0)
    shape = count, model.in_chans, *model.img_size
    images = torch.rand(shape, generator=generator)
    labels = torch.randint(model.num_classes, (count,), generator=generator)
    outliers = torch.where(torch.rand(shape, generator=generator) < 0.02, 1e4, images)
    return [
        ("zeros", torch.zeros(shape), labels),
        ("ones", torch.ones(shape), labels),
        ("1e4", torch.full(shape, 1e4), labels),
        ("outliers", outliers, labels),
        ("one sample", images[:1], labels[:1]),
        ("one class", images, torch.zeros_like(labels)),
        ("tiny", images * 1e-8, labels),
    ]


def beyond_float16(model):
    """Batches whose gradients float16 cannot hold; normalisation multiplies those of constants by 1 / sqrt(eps)."""
    normalises = has_batch_norm(model) or any(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
    return BEYOND_FLOAT16 + (("zeros", "ones", "tiny") if normalises else ())


def all_finite(tensors):
    return all(bool(t.isfinite().all()) for t in tensors)


def train(model, precision, steps, count=4, dtype=torch.float32):
    """Train and check every step; in bfloat16 and float32 nothing may be infinite or NaN at any time."""
    task = CapsuleTask(model, verbose=False)
    params = list(model.parameters())
    optimizer = torch.optim.Adam(params, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "float16")
    autocast = torch.autocast("cpu", dtype=AUTOCAST[precision], enabled=precision != "float32")
    batches = make_batches(model, count)
    for step in range(steps):
        if step == steps - len(batches):  # it still learns in the last cycle
            before = [p.detach().clone() for p in params]
        cycle, kind = divmod(step, len(batches))
        kind, images, labels = batches[kind]
        where = f"step {step}, {kind}, scale {scaler.get_scale()}"
        may_overflow = precision == "float16" and kind in beyond_float16(model)
        if may_overflow and cycle >= 10 // len(beyond_float16(model)):
            continue
        optimizer.zero_grad()
        # It raises an error at the first NaN of a backward pass. The stacks that it keeps take longer than the rest.
        with torch.autograd.set_detect_anomaly(cycle % 5 == 2 and not may_overflow):
            with autocast:
                loss = task(images.to(dtype), labels)["loss"]
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        finite = all_finite([p.grad for p in params])
        assert may_overflow or loss.isfinite(), where
        # The first scales are too large for some gradients by design.
        too_large = precision == "float16" and cycle < 2
        assert may_overflow or too_large or finite, where
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        assert (scaler.get_scale() < scale) == (not finite), where
        assert all_finite(params), where
    assert scaler.get_scale() >= 1
    for (key, param), other in zip(model.named_parameters(), before, strict=True):
        # In bfloat16 no step of 0.001 leads away from a normalisation's weights of 1, and a number that is added to all
        # logits has a gradient of rounding errors.
        stays = dtype == torch.bfloat16 and param.dim() == 1 and (bool((other == 1).all()) or param.numel() == 1)
        assert not torch.equal(param, other) or stays, key


@pytest.mark.parametrize("precision", AUTOCAST)
@pytest.mark.parametrize("name", MODELS)
def test_training_small_networks(name, precision):
    # Of the deeper families fewer steps: what overflows does so in the first of them, and the slow tests take all.
    flat = issubclass(family_of(name), (CapsNet, CNNBaseline, EfficientCapsNet))
    train(make_model(name, small=True), precision, steps=210 if flat else 21)


@pytest.mark.slow
@pytest.mark.parametrize("precision", AUTOCAST)
@pytest.mark.parametrize("name", MODELS)
def test_training_full_networks(name, precision):
    train(make_model(name, small=False), precision, steps=210 if name.endswith("_tiny") else 49, count=2)


@pytest.mark.parametrize("precision", AUTOCAST)
@pytest.mark.parametrize(
    "name, options",
    [
        ("capsnet", {"num_routing": 1, "squash": "approx", "num_classes": 2}),
        ("capsnet", {"num_routing": 8, "drop_rate": 0.5}),
        ("capsnet_ws", {"num_routing": 8, "squash": "approx", "num_classes": 101}),
    ],
)
def test_training_with_options(name, options, precision, fused):
    train(make_model(name, small=True, **options), precision, steps=42)


@pytest.mark.parametrize("precision", AUTOCAST)
def test_training_the_baseline_with_dropout(precision):
    train(make_model("cnn_baseline", small=True, drop_rate=0.5, num_classes=101), precision, steps=42)


@pytest.mark.parametrize("name", MODELS)
def test_training_with_bfloat16_weights(name):
    train(make_model(name, small=True).bfloat16(), "float32", steps=42, dtype=torch.bfloat16)


# No training: Adam's eps of 1e-8 is 0 in float16. Images of 1e4 are within the range of small networks.
@pytest.mark.parametrize("name", MODELS)
def test_passes_with_float16_weights(name):
    model = make_model(name, small=True).half()
    task = CapsuleTask(model, verbose=False)
    for kind, images, labels in make_batches(model, 4):
        if has_batch_norm(model) and kind in beyond_float16(model):
            continue
        model.zero_grad()
        with torch.autograd.set_detect_anomaly(True):
            loss = task(images.half(), labels)["loss"]
            loss.backward()
        assert loss.isfinite() and all_finite([p.grad for p in model.parameters()]), kind


# ---------------------------------------------------------------------------------------------------------------------
# Operators
# ---------------------------------------------------------------------------------------------------------------------

# The error allowed to squash and to routing, by the length of what is right: of a vector, and of a tensor. The least
# numbers that the dtype holds to all its digits are allowed besides.
TOLERANCES = {torch.float32: (1e-6, 1e-4), torch.float16: (1e-3, 2e-3)}
# The reference squares without a scale below 1: lengths up to 1e-19 pass on less of a gradient than that, or nothing.
UNDERFLOW = 1e-18
OPERATORS = {"fused": (squash, dynamic_routing), "reference": (reference.squash, reference.dynamic_routing)}


def exponents(dtype):
    return st.floats(-30, 30) if dtype == torch.float32 else st.floats(-7, 4.2)


def gradients(function, inputs, grad):
    inputs = [t.detach().requires_grad_() for t in inputs]
    v = function(*inputs)
    with torch.autograd.set_detect_anomaly(True):
        return v.detach(), *torch.autograd.grad(v, inputs, grad)


def assert_close(actual, exact, tolerance, slack=0.0, dim=None):
    """Along `dim` or over all; where the dtype cannot hold what is right, nothing is asked."""
    held = exact.abs() <= torch.finfo(actual.dtype).max
    assert actual[held].isfinite().all()
    norm = torch.linalg.vector_norm(exact, dim=dim, keepdim=dim is not None)
    error = torch.where(held, (actual.double() - exact).abs(), 0.0)
    allowed = tolerance * norm + slack + 10 * torch.finfo(actual.dtype).tiny
    assert (error <= allowed).all(), (error.max(), allowed)


@pytest.mark.parametrize("operators", OPERATORS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), approximate=st.booleans(), dtype=st.sampled_from(list(TOLERANCES)), seed=st.integers(0, 2**20))
def test_squash_of_extremes(operators, data, approximate, dtype, seed):
    """Every vector has a magnitude of its own, and so have the numbers in it if they are mixed; one is zero."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.tensor(data.draw(st.lists(exponents(dtype), min_size=5, max_size=5)))[:, None]
    if data.draw(st.booleans(), label="mixed"):
        powers = powers * torch.rand(5, 7, generator=generator)
    x = (torch.randn(5, 7, generator=generator).clamp(-1.5, 1.5).double() * 10.0 ** powers.double()).to(dtype)
    x[0] = 0
    grad_power = data.draw(st.floats(-10, 25) if dtype == torch.float32 else st.floats(-3, 4))
    grad = (torch.randn(5, 7, generator=generator).clamp(-1.5, 1.5).double() * 10.0**grad_power).to(dtype)
    function = OPERATORS[operators][0]
    v, dx = gradients(lambda x: function(x, approximate), [x], grad)
    exact_v, exact_dx = gradients(lambda x: reference.squash(x, approximate), [x.double()], grad.double())
    tolerance, _ = TOLERANCES[dtype]
    assert_close(v, exact_v, tolerance, dim=1)
    slack = UNDERFLOW * grad.abs().max().item() if operators == "reference" and dtype == torch.float32 else 0.0
    assert_close(dx, exact_dx, tolerance, slack, dim=1)


@pytest.mark.parametrize("operators", OPERATORS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    data=st.data(),
    batch=st.sampled_from([2, 6]),  # by votes and by products of matrices
    num_iters=st.sampled_from([1, 3, 8]),
    approximate=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCES)),
    bias_scale=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**20),
)
def test_routing_of_extremes(operators, data, batch, num_iters, approximate, dtype, bias_scale, seed):
    """Capsules and matrices of any magnitude whose votes float32 can add up.

    From votes of about 1 on, eight iterations magnify rounding until it chooses the couplings: what is computed then
    need only be finite.
    """
    generator = torch.Generator().manual_seed(seed)
    power = data.draw(exponents(dtype), label="power of the capsules")
    weight_power = data.draw(st.floats(-30 - min(power, 0), 30 - max(power, 0)), label="power of the matrices")
    shapes = (batch, 6, 4), (3, 4, 5, 7), (5, 7), (batch, 5, 7)
    scales = 10.0**power, 10.0**weight_power, bias_scale, 1.0
    normal = [torch.randn(shape, generator=generator, dtype=torch.float64).clamp(-1.5, 1.5) for shape in shapes]
    x, weight, bias, grad = (scale * t for scale, t in zip(scales, normal, strict=True))
    x[0, 0] = 0
    # Weights stay float32 where capsules come in half precision, as under autocast.
    x, weight, bias, grad = x.to(dtype), weight.float(), bias.float(), grad.to(dtype)
    function = OPERATORS[operators][1]
    results = gradients(lambda *t: function(*t, num_iters, approximate), [x, weight, bias], grad)
    exact = gradients(
        lambda *t: reference.dynamic_routing(*t, num_iters, approximate),
        [t.double() for t in (x, weight, bias)],
        grad.double(),
    )
    slack = 0.0
    if operators == "reference" and bias_scale == 0:
        slack = UNDERFLOW * max(t.abs().max().item() for t in (grad, x, weight)) * len(x[0])
    for name, actual, right in zip(("v", "dx", "dweight", "dbias"), results, exact, strict=True):
        if power + weight_power > -0.5:
            assert actual[right.abs() <= torch.finfo(actual.dtype).max].isfinite().all(), name
        else:
            assert_close(actual, right, TOLERANCES[dtype][1], slack)
