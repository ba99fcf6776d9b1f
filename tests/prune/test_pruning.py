"""What is left computes what the whole computes with the rest held at zero."""

import copy

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prune.networks import (
    PER_TYPE,
    as_created,
    assert_same,
    batches,
    every_model,
    hold_at_zero,
    images,
    small,
)
from safetensors.torch import save_file
from timm.models import save_for_hf

import capszoo
from capszoo.checkpoint import save_weights
from capszoo.models import CapsNet
from capszoo.prune import cost, count_parts, prune, scores, target_counts

KEPT = {
    "conv1": dict(conv1=(0, 2, 5)),
    "types": dict(types=(1, 3)),
    "capsules": dict(capsules=(0, 3, 4, 7, 12, 13, 14, 15, 17, 23)),
    "capsules of three types": dict(capsules=(0, 1, 2, 12, 23)),
    "decoder": dict(decoder=((1, 2, 6), (0, 8))),
    "all": dict(conv1=(1, 4), types=(0, 2, 3), decoder=((0, 5), (3, 4, 5))),
}


@every_model
@pytest.mark.parametrize("parts", KEPT)
def test_the_rest_held_at_zero(name, parts):
    model = small(name)
    before = copy.deepcopy(model.state_dict())
    smaller, report = prune(model, KEPT[parts])
    assert_same(smaller, hold_at_zero(model, **KEPT[parts]))
    assert_same(as_created(smaller), smaller, atol=0)
    assert report.kept.items() >= KEPT[parts].items()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(p.data_ptr() == q.data_ptr() for p, q in zip(model.parameters(), smaller.parameters(), strict=True))


def indices_below(total):
    return st.sets(st.integers(0, total - 1), min_size=1).map(lambda kept: tuple(sorted(kept)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("share_weights", [False, True])
def test_any_parts_twice(share_weights, data):
    """Pruned, and pruned again: indices count in the network at hand, and the report's in the first one."""
    model = small(share_weights=share_weights)
    once, first = prune(model, {"capsules": data.draw(indices_below(24))})
    counts = count_parts(once)
    keep = {"types": data.draw(indices_below(counts["types"])), "conv1": data.draw(indices_below(6))}
    keep["decoder"] = tuple(data.draw(indices_below(n)) for n in (7, 9))
    twice, second = prune(once, keep)
    last, third = prune(twice, {"capsules": data.draw(indices_below(count_parts(twice)["capsules"]))})
    assert_same(twice, hold_at_zero(once, **keep))
    assert_same(last, hold_at_zero(twice, capsules=third.kept["capsules"]))
    types_left = first.kept.get("types", range(4))
    of_types = [i for i in first.kept["capsules"] if types_left.index(i // PER_TYPE) in keep["types"]]
    assert count_parts(twice)["capsules"] == len(of_types)
    kept_of_first = [of_types[i] for i in third.kept["capsules"]]
    held = hold_at_zero(model, conv1=keep["conv1"], capsules=kept_of_first, decoder=keep["decoder"])
    assert_same(last, held)
    assert_same(as_created(last), last, atol=0)


def test_types_then_capsules_in_one_call():
    model = small("capsnet_ws")
    smaller, report = prune(model, {"capsules": (0, 1, 5, 8), "types": (1, 3)})
    # Capsules count among those of types 1 and 3.
    assert report.kept == {"types": (1, 3), "capsules": (6, 7, 11, 20)}
    assert_same(smaller, hold_at_zero(model, capsules=(6, 7, 11, 20)))
    smaller, report = prune(model, {"capsules": (7, 8), "types": (1, 3)})
    assert report.kept == {"types": (3,), "capsules": (19, 20)} and smaller.primary_caps.num_types == 1


def test_named_types_select_the_same_of_full_weights(tmp_path):
    full = small(img_size=28, num_classes=10)  # as the default configuration says
    full.float()
    save_file(full.state_dict(), tmp_path / "full.safetensors")
    smaller, _ = prune(full, {"types": (3, 1), "capsules": range(5, 40)})
    assert smaller.arguments()["keep_types"] == [1, 3]
    overlay = dict(file=str(tmp_path / "full.safetensors"))
    loaded = timm.create_model("capsnet", pretrained=True, pretrained_cfg_overlay=overlay, **smaller.creation_args)
    assert_same(loaded.eval(), smaller, atol=1e-6)
    again, _ = prune(smaller, {"types": [1]})
    assert again.keep_types == (3,)
    unnamed, _ = prune(small("capsnet_pruned"), {"types": (0, 2, 3)})
    assert unnamed.arguments()["keep_types"] == 3


@every_model
def test_saved_and_loaded(name, tmp_path):
    smaller, _ = prune(small(name).float(), {"conv1": 3, "capsules": 13, "decoder": (2, 3)}, "magnitude")
    header = {"model": smaller.pretrained_cfg["architecture"], "model_args": smaller.creation_args}
    save_weights(tmp_path / "pruned.safetensors", smaller, header)
    assert_same(capszoo.load_model(tmp_path / "pruned.safetensors").eval(), smaller, atol=0)
    assert capszoo.load_model(tmp_path / "pruned.safetensors", decoder=False).decoder is None
    save_for_hf(smaller, tmp_path / "folder", safe_serialization=True)
    assert_same(timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval(), smaller, atol=0)


def test_other_size_of_chosen_capsules(tmp_path):
    smaller, _ = prune(small().float(), {"capsules": 13}, "magnitude")
    save_for_hf(smaller, tmp_path, safe_serialization=True)
    with pytest.raises(ValueError, match="^keep_capsules chooses positions of 20x22 images.*means others at") as error:
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=24)
    assert "\n" not in str(error.value)
    with pytest.raises(AssertionError, match="a choice of 24 capsules got 80: make the model for this img_size"):
        smaller(images(dtype=torch.float32, size=(24, 26)))
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=24, num_classes=0)
    assert features(images(dtype=torch.float32, size=(24, 24))).shape == (4, features.head_hidden_size)


def test_weights_with_fewer_capsules_are_not_cut_as_if_whole(tmp_path):
    smaller, _ = prune(small(img_size=28, num_classes=10).float(), {"capsules": range(96)})
    assert smaller.primary_caps.num_types == 3
    save_file(smaller.state_dict(), tmp_path / "weights.safetensors")
    overlay = dict(file=str(tmp_path / "weights.safetensors"))
    arguments = {**smaller.creation_args, "keep_types": [0, 1], "keep_capsules": list(range(48))}
    with pytest.raises(ValueError, match="these weights do not fit 'capsnet'"):
        timm.create_model("capsnet", pretrained=True, pretrained_cfg_overlay=overlay, **arguments)


def test_what_the_network_keeps_beside_its_weights():
    model = small(dtype=torch.float32, drop_rate=0.25).train()
    model.primary_caps.eval()
    model.conv1.requires_grad_(False)
    model.class_caps.bias.requires_grad_(False)
    model.set_grad_checkpointing()
    model.to(memory_format=torch.channels_last)
    model.pretrained_cfg = {**model.pretrained_cfg, "tag": "mnist", "url": "https://x", "file": "w", "license": "mit"}
    torch.manual_seed(3)
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    smaller, _ = prune(model, {"types": 2, "capsules": 5}, "taylor", batches(dtype=torch.float32))
    assert torch.equal(torch.get_rng_state(), state)
    assert type(smaller) is CapsNet and smaller.training and not smaller.primary_caps.training
    assert modes == [module.training for module in model.modules()] and all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in (*model.modules(), *smaller.modules()))
    frozen = {name for name, p in smaller.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1.weight", "conv1.bias", "class_caps.bias"}
    assert all(p.is_leaf and p.dtype == torch.float32 for p in smaller.parameters())
    assert smaller.grad_checkpointing and smaller.drop_rate == 0.25
    assert smaller.primary_caps.conv.weight.is_contiguous(memory_format=torch.channels_last)
    cfg = smaller.pretrained_cfg
    assert (cfg["architecture"], cfg["num_classes"], cfg["input_size"]) == ("capsnet", 3, (1, 20, 22))
    assert cfg["pool_size"] == (2, 3) and cfg["license"] == "mit" and not {"tag", "url", "file"} & set(cfg)
    assert smaller.default_cfg is cfg and model.pretrained_cfg["tag"] == "mnist"


def test_after_reset_and_on_the_meta_device():
    model = small(num_classes=10)
    model.reset_classifier(4)
    smaller, _ = prune(model, {"types": (0, 2)})
    assert smaller.num_classes == 4 and smaller(images()).shape == (4, 4)
    meta, _ = prune(small(device="meta"), {"conv1": (0, 1), "types": (0, 2), "capsules": range(7)})
    assert meta(images().to("meta")).shape == (4, 3)
    meta.to_empty(device="cpu")
    whole, _ = prune(small(), {"conv1": (0, 1), "types": (0, 2), "capsules": range(7)})
    meta.load_state_dict(whole.state_dict())
    assert_same(meta, whole, atol=0)


def test_reset_classifier_of_chosen_capsules():
    smaller, _ = prune(small("capsnet_ws"), {"capsules": (0, 1, 2, 9, 23)})
    smaller.reset_classifier(0)
    assert smaller(images()).shape == (4, smaller.head_hidden_size)
    smaller.reset_classifier(7)
    assert smaller(images()).shape == (4, 7) and smaller.class_caps.num_capsules == 3 * 3
    assert as_created(
        type(
            "",
            (),
            dict(
                creation_args=smaller.arguments(), pretrained_cfg=smaller.pretrained_cfg, state_dict=smaller.state_dict
            ),
        )
    )(images()).equal(smaller(images()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    smaller, _ = prune(small().to(dtype), {"types": 2, "capsules": 8, "decoder": 0.5}, "taylor", batches())
    assert {p.dtype for p in smaller.parameters()} == {dtype}
    assert scores(small().to(dtype), "types", "coupling", batches()).isfinite().all()


def test_data_may_be_read_once():
    keep = {"conv1": 4, "capsules": 9}
    _, report = prune(small(), keep, "taylor", iter(batches()))
    assert report == prune(small(), keep, "taylor", batches())[1]


@settings(max_examples=30, deadline=None)
@given(fraction=st.floats(0, 1, exclude_min=True), number=st.integers(1, 24))
def test_numbers_and_fractions(fraction, number):
    model = small()
    keep = {"conv1": fraction, "capsules": number, "decoder": (fraction, 3)}
    targets = target_counts(model, keep)
    smaller, report = prune(model, keep, "magnitude")
    assert targets == {part: count_parts(smaller)[part] for part in keep}
    assert abs(targets["conv1"] - 6 * fraction) <= 0.5 or targets["conv1"] == 1
    best = scores(model, "conv1", "magnitude").topk(targets["conv1"]).indices.sort().values
    assert report.kept["conv1"] == tuple(best.tolist())
    assert len(report.kept["capsules"]) == number


def test_one_is_a_number_and_a_whole_a_fraction():
    assert count_parts(prune(small(), {"types": 1}, "magnitude")[0])["types"] == 1
    smaller, report = prune(small(), {"types": 1.0, "conv1": 1.0, "decoder": 1.0, "capsules": 24}, "magnitude")
    assert report.before == report.after and smaller.arguments() == small().arguments()
    assert_same(smaller, small(), atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_model
def test_cuda(name):
    model = small(name, dtype=torch.float32).cuda()
    keep = {"conv1": 4, "types": 3, "capsules": 10, "decoder": 0.5}
    for score in ("taylor", "magnitude"):
        smaller, report = prune(model, keep, score, batches(dtype=torch.float32))
        assert {p.device.type for p in smaller.parameters()} == {"cuda"}
        assert smaller(images(dtype=torch.float32).cuda()).shape == (4, 3)
        assert report.after == cost(smaller.cpu())
