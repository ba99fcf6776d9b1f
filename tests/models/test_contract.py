"""timm's model contract, for every capsule network of the zoo: what timm's own tests and scripts ask of a model."""

import copy
import pickle

import pytest
import timm
import torch
from families import CAPSNETS
from timm.data.model_config import resolve_input_data_config
from timm.models import group_parameters
from timm.models._manipulate import reinit_non_persistent_buffers
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.task import ClassificationTask
from torch.testing import assert_close

NAMES = CAPSNETS
every_model = pytest.mark.parametrize("name", NAMES)

# The channels of the first convolution are not the point anywhere here, and neither is the size of the image.
SMALL = dict(conv_dim=8, img_size=20)


def small(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **kwargs})


def images(batch_size=2, in_chans=1, size=(20, 20), seed=1):
    return torch.rand(batch_size, in_chans, *size, generator=torch.Generator().manual_seed(seed))


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {key: p.grad.clone() for key, p in model.named_parameters()}


@every_model
def test_registered_with_timm(name):
    assert timm.is_model(name) and name in timm.list_models("capsnet*")
    assert timm.models.is_model_in_modules(name, ["capsnet"])
    assert timm.models.model_entrypoint(name).__doc__
    model = small(name)
    assert model.pretrained_cfg["architecture"] == name and model.default_cfg is model.pretrained_cfg


@every_model
@pytest.mark.parametrize("batch_size", [0, 1, 3])
def test_forward(name, batch_size):
    lengths = small(name, num_classes=7).eval()(images(batch_size))
    assert lengths.shape == (batch_size, 7)
    assert ((lengths > 0) & (lengths < 1)).all()


@every_model
def test_backward_reaches_every_parameter(name):
    model = small(name, num_classes=42).train()
    model(images()).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, key


@every_model
def test_default_cfg(name):
    model = timm.create_model(name).eval()
    cfg = model.default_cfg
    x = images(1, *cfg["input_size"][:1], cfg["input_size"][1:])
    features = model.forward_features(x)
    assert features.shape == (1, model.num_features, *cfg["pool_size"])
    assert model(x).shape == (1, cfg["num_classes"])

    flat = model.forward_head(features, pre_logits=True)
    assert torch.equal(flat, features.flatten(1)) and flat.shape == (1, model.head_hidden_size)

    weights = model.state_dict()
    assert f"{cfg['first_conv']}.weight" in weights
    assert f"{cfg['classifier']}.weight" in weights and f"{cfg['classifier']}.bias" in weights
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])

    model.reset_classifier(0)
    assert torch.equal(model(x), flat) and not list(model.get_classifier().parameters())
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    model.reset_classifier(3, "flat")
    assert model(x).shape == (1, 3) and model.num_classes == 3


@every_model
@pytest.mark.parametrize("global_pool", ["flat", ""])
def test_no_classes(name, global_pool):
    model = small(name, num_classes=0, global_pool=global_pool, decoder=True).eval()
    assert model.decoder is None
    features = model.forward_features(images())
    assert torch.equal(model(images()), features.flatten(1) if global_pool == "flat" else features)
    assert torch.equal(model.forward_head(features, pre_logits=True), model(images()))


@every_model
def test_data_config(name):
    config = timm.data.resolve_model_data_config(timm.create_model(name))
    assert config["input_size"] == (1, 28, 28) and config["crop_pct"] == 1.0
    assert config["mean"] == (0.0,) and config["std"] == (1.0,)
    config = resolve_input_data_config(small(name, in_chans=3))  # as timm's scripts do
    assert config["input_size"] == (3, 20, 20)


@every_model
@pytest.mark.parametrize("feature_cls", ["getter", "hook", "fx"])
def test_features_only(name, feature_cls):
    model = small(name).eval()
    extractor = small(name, features_only=True, feature_cls=feature_cls).eval()
    features = extractor(images())
    channels, reductions = extractor.feature_info.channels(), extractor.feature_info.reduction()
    assert len(features) == len(channels) == 3
    assert [f.shape[1] for f in features] == channels
    assert [f.shape[2:] for f in features] == [(12, 12), (2, 2), (2, 2)]
    assert reductions == [20 // f.shape[2] for f in features]
    assert (features[0] >= 0).all()
    # What is traced convolves by PyTorch's own form.
    assert_close(features[1], model.primary_caps.conv(features[0]))
    assert_close(features[2], model.forward_features(images()))


@every_model
@pytest.mark.parametrize("feature_cls", ["getter", "hook", "fx"])
@pytest.mark.parametrize(
    "indices, levels", [((1,), [1]), ((0, 2), [0, 2]), ((-1,), [2]), ((-3, -2), [0, 1]), ((0,), [0])]
)
def test_features_only_out_indices(name, feature_cls, indices, levels):
    everything = small(name, features_only=True)(images())
    extractor = small(name, features_only=True, feature_cls=feature_cls, out_indices=indices)
    features = extractor(images())
    assert extractor.feature_info.channels() == [everything[i].shape[1] for i in levels]
    assert len(features) == len(levels)
    assert_close(features, [everything[i] for i in levels])


@every_model
def test_features_of_any_image_size(name):
    """Convolutions alone take any size; only class capsules are bound to one."""
    shapes = [f.shape[2:] for f in small(name, features_only=True)(images(size=(24, 40)))]
    assert shapes == [(16, 32), (4, 12), (4, 12)]


@every_model
def test_forward_intermediates(name):
    model, x = small(name).eval(), images()
    final, intermediates = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    expected = small(name, features_only=True)(x)
    assert all(torch.equal(*pair) for pair in zip(intermediates, expected, strict=True))
    assert torch.equal(model.forward_head(final), model(x))

    last = model.forward_intermediates(x, indices=2, intermediates_only=True)
    assert len(last) == 2 and torch.equal(last[1], expected[2])
    first = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert len(first) == 1 and torch.equal(first[0], expected[0])
    negative = model.forward_intermediates(x, indices=[-2], intermediates_only=True)
    assert torch.equal(negative[0], expected[1])
    with pytest.raises(AssertionError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NHWC")
    with pytest.raises(AssertionError, match="intermediates_only"):
        model.forward_intermediates(x, stop_early=True)
    with pytest.raises(AssertionError, match="out of range"):
        model.forward_intermediates(x, indices=[3])


@every_model
def test_prune_intermediate_layers(name):
    x = images()
    expected = small(name, features_only=True)(x)
    for indices, kept in ([1], [1]), (1, [2]), ([-1], [2]), ([0], [0]):
        model = small(name)
        total = sum(p.numel() for p in model.parameters())
        assert model.prune_intermediate_layers(indices) == kept
        assert model.num_classes == 0 and sum(p.numel() for p in model.parameters()) < total
        found = model.forward_intermediates(x, indices=kept, intermediates_only=True)
        assert torch.equal(found[0], expected[kept[0]])
        assert ("primary_caps.conv.weight" in model.state_dict()) == (kept != [0])
        assert model(x).shape[1] == model.num_features
    model = small(name)
    model.prune_intermediate_layers([2], prune_head=False)
    assert torch.equal(model(x), small(name)(x))


@every_model
def test_prune_norm_takes_the_squash_away(name):
    """With prune_norm features end at the last level that is kept, as timm's models do, and there is no level after."""
    x, expected = images(), small(name, features_only=True)(images())
    for level, left in (0, 1), (1, 2), (2, 3):
        model = small(name)
        model.prune_intermediate_layers([level], prune_norm=True)
        assert torch.equal(model.forward_features(x), expected[level])
        final, intermediates = model.forward_intermediates(x)
        assert len(intermediates) == left and torch.equal(final, expected[level])
        assert all(map(torch.equal, intermediates, expected))
        with pytest.raises(AssertionError, match="out of range"):
            model.forward_intermediates(x, indices=[left])
        whole = small(name, num_classes=0)
        whole.load_state_dict(model.state_dict(), strict=level > 0)
        assert torch.equal(whole.conv1.weight, model.conv1.weight)
    squashed = small(name)
    squashed.prune_intermediate_layers([1])
    assert torch.equal(squashed.forward_features(x), expected[2])


@every_model
@pytest.mark.parametrize("level", [0, 1, 2])
def test_stop_early(name, level):
    """What comes after the last level asked for is not computed."""
    model, x = small(name), images()
    expected = small(name, features_only=True)(x)
    called = []
    for module in (model.act1, model.primary_caps.conv, model.primary_caps.squash):
        module.register_forward_hook(lambda module, args, output: called.append(module))
    (found,) = model.forward_intermediates(x, indices=[level], stop_early=True, intermediates_only=True)
    assert torch.equal(found, expected[level]) and len(called) == level + 1


@every_model
def test_grad_checkpointing(name):
    model = small(name).train()

    def saved_values():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            gradients(model, images())
        return sum(sizes)

    expected, stored = gradients(model, images()), saved_values()
    output = model(images())
    model.set_grad_checkpointing()
    assert torch.equal(model(images()), output)
    found = gradients(model, images())
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert saved_values() < stored
    model.set_grad_checkpointing(False)
    assert saved_values() == stored


@every_model
def test_group_matcher(name):
    model = small(name, decoder=True)
    groups = group_parameters(model, model.group_matcher())
    keys = [key for group in groups.values() for key in group]
    assert sorted(keys) == sorted(key for key, _ in model.named_parameters()) and len(groups) > 1

    scales = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay()):
        for parameter in group["params"]:
            scales[parameter] = group["lr_scale"]
    by_key = {key: scales[parameter] for key, parameter in model.named_parameters()}
    assert by_key["conv1.weight"] < by_key["primary_caps.conv.weight"] < by_key["class_caps.weight"] == 1.0
    assert by_key["decoder.fc1.weight"] == 1.0


@every_model
def test_optimizer(name):
    model = small(name)
    assert model.no_weight_decay() <= {key for key, _ in model.named_parameters()}
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    decayed = {p for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    weights = {p for key, p in model.named_parameters() if key.endswith("weight")}
    assert decayed == weights
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 1
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    gradients(model, images())
    optimizer.step()
    assert all(not torch.equal(p, before[key]) for key, p in model.named_parameters())


@every_model
def test_timm_classification_task(name):
    task = ClassificationTask(small(name), verbose=False)
    result = task(images(), torch.tensor([3, 5]))
    result["loss"].backward()
    assert result["output"].shape == (2, 10) and result["loss"].isfinite()


@every_model
def test_meta_device(name):
    model = small(name, device="meta", decoder=True)
    assert all(p.is_meta for p in model.parameters())
    assert model(images().to("meta")).shape == (2, 10)
    model = model.to_empty(device="cpu")
    model.load_state_dict(small(name, decoder=True).state_dict())
    assert torch.equal(model(images()), small(name)(images()))


class Holder(torch.nn.Module):
    """What wraps a model (a task, an ensemble) calls `_apply` of its parts, and not their `to_empty`."""

    def __init__(self, model):
        super().__init__()
        self.model = model


@pytest.mark.parametrize("share_weights", [False, True])
def test_chosen_capsules_follow_the_weights(share_weights):
    """Their index is in no state dict: whoever moves or fills the model makes it anew."""
    kwargs = dict(num_types=4, keep_capsules=[3, 9, 10], share_weights=share_weights)
    source = small("capsnet", **kwargs)
    expected, weights = source(images()), source.state_dict()
    assert "capsule_index" not in weights

    def check(model):
        assert model.capsule_index.device == model.conv1.weight.device
        assert torch.equal(model.capsule_index, source.capsule_index) and torch.equal(model(images()), expected)

    model = small("capsnet", device="meta", **kwargs)
    model.load_state_dict(weights, assign=True)
    check(model)
    holder = Holder(small("capsnet", device="meta", **kwargs))
    holder.load_state_dict({f"model.{key}": value for key, value in weights.items()}, assign=True)
    check(holder.model)

    for device in ("meta", "cpu"):  # memory that to_empty does not fill
        for model in (small("capsnet", device=device, **kwargs), copy.deepcopy(small("capsnet", **kwargs))):
            model.capsule_index.fill_(-1)
            Holder(model).to_empty(device="cpu")
            model.load_state_dict(weights)
            check(model)

    model = small("capsnet", device="meta", **kwargs)
    assert reinit_non_persistent_buffers(model) == ["(root)"] and model.capsule_index.is_meta
    model.load_state_dict(weights, assign=True)
    model.capsule_index.fill_(0)
    reinit_non_persistent_buffers(model)  # as timm does after it has filled a model
    check(model)

    index = model.capsule_index
    assert model.to("cpu").capsule_index is index and model.double().capsule_index is index
    model.load_state_dict({key: value.to("meta") for key, value in weights.items()}, assign=True)
    assert model.capsule_index.is_meta
    check(pickle.loads(pickle.dumps(source)))
    check(copy.deepcopy(source))


@every_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype(name, dtype):
    model = small(name, dtype=dtype, decoder=True)
    assert all(p.dtype == dtype for p in model.parameters())
    output = model(images().to(dtype))
    assert output.dtype == dtype
    expected = small(name)
    expected.load_state_dict(model.state_dict())
    bound = 1e-5 if dtype == torch.float64 else 0.02
    torch.testing.assert_close(output.float(), expected(images()), rtol=0, atol=bound)
    assert model.reconstruct(images().to(dtype)).dtype == dtype


@every_model
def test_unknown_keyword(name):
    with pytest.raises(TypeError, match="num_heads"):
        small(name, num_heads=4)


@every_model
@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("size", [17, (18, 25), (32, 32), [20, 31]])
def test_input_variants(name, in_chans, size):
    model = small(name, in_chans=in_chans, img_size=size, num_classes=5, decoder=True).eval()
    height, width = (size, size) if isinstance(size, int) else size
    x = images(2, in_chans, (height, width))
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, (height - 17) // 2 + 1, (width - 17) // 2 + 1)
    assert features[0].numel() == model.head_hidden_size
    assert model(x).shape == (2, 5)
    assert model.reconstruct(x).shape == x.shape


@every_model
@pytest.mark.parametrize("size", [(22, 22), (20, 22), (32, 20)])
def test_images_of_another_size(name, size):
    """(32, 20) gives a whole multiple of the capsules, which the vote matrices would take."""
    with pytest.raises(AssertionError, match="make the model for this img_size"):
        small(name)(images(size=size))


@every_model
def test_reset_classifier_keeps_its_state(name):
    model = small(name, decoder=True, dtype=torch.float64)
    model.eval()
    model.class_caps.requires_grad_(False)
    model.reset_classifier(4)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.class_caps.parameters())
    assert all(p.requires_grad for p in model.decoder.parameters())
    assert model(images().double()).shape == (2, 4)
    assert model.reconstruct(images().double(), torch.tensor([3, 0])).shape == (2, 1, 20, 20)

    model = small(name, decoder=True, device="meta").train()
    model.decoder.requires_grad_(False)
    model.reset_classifier(4)
    assert all(p.is_meta for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.class_caps.parameters())
    assert not any(p.requires_grad for p in model.decoder.parameters())


@every_model
def test_copies(name):
    """Copied, as by timm's moving average, and pickled, as by workers."""
    model = small(name, decoder=True).eval()
    expected = model(images())
    assert torch.equal(copy.deepcopy(model)(images()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images()), expected)
