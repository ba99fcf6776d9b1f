"""What capszoo does with one family it does with all: exploring, policies, pruning or a clear refusal of it."""

import itertools
import re
from collections.abc import Mapping

import pytest
import torch
from exporting import check_export, check_onnx
from families import sizes_of
from timm.models import group_parameters

import capszoo
from capszoo import prune
from capszoo.contract import Explorable, Prunable
from capszoo.data import Split
from capszoo.engine import CapsuleTask, Trainer, find_lr
from capszoo.engine.options import options_from
from capszoo.engine.run import load_splits, make_model
from capszoo.models import list_heads
from capszoo.policies import create_policy, list_policies
from capszoo.pretrained import image_statistics
from capszoo.registry import family_of, model_keywords

# A model of each family, and each head; images are as small as all of them take.
CASES = {
    **{name: (name, {}) for name in ("capsnet", "cnn_baseline_tiny", "deepcaps", "efficient_capsnet")},
    **{name: (name, {}) for name in ("capsnet_conv_ia", "capsnet_resnet_sr", "capsnet_em_mini", "capsnet_vb_mini")},
    **{f"head {head}": ("capsnet_head", {"head": head}) for head in list_heads()},
}
# Networks whose layers are named otherwise than those of the others.
MORE = {
    "residual": ("capsnet_resnet_ia", {}),
    "inner capsules": ("capsnet_resnet_sr", {"num_layers": 3}),
}
every_case = pytest.mark.parametrize("case", CASES)

# Policies whose first phases take epochs of their own.
OPTIONS = {
    "ada_batch": {"warm_epochs": 1, "warm_batch": 2, "first_batch": 4},
    "warm_ada_batch": {"warm_epochs": 1, "warm_batch": 2, "first_batch": 4},
}


def make(case, **more):
    name, kwargs = {**CASES, **MORE}[case]
    torch.manual_seed(0)
    return capszoo.create_model(
        name, **{**sizes_of(name), "in_chans": 1, "img_size": 20, "num_classes": 3, **kwargs, **more}
    )


def images(count=6):
    return torch.randint(256, (count, 1, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_all_families_are_here():
    families = {family_of(name) for name in capszoo.list_models()}
    assert {family_of(name) for name, _ in CASES.values()} == families


def space_of(model):
    """Arguments that a search varies, and for each choice the keywords that it stands for, the unreduced one first."""
    for argument in model.search_space() if isinstance(model, Explorable) else ():
        choices, first = argument.values, argument.first_choice
        named = choices if isinstance(choices, Mapping) else dict(zip(map(str, choices), choices, strict=True))
        needed = {argument.needs: True} if argument.needs else {}
        ways = [needed | ({} if value is None else {argument.keyword: value}) for value in named.values()]
        place = list(named).index(first if isinstance(choices, Mapping) else str(first))
        yield argument, [ways[place], *ways[:place], *ways[place + 1 :]]


@every_case
def test_default_options_train_the_model_as_it_is_made(case):
    """What is not given on a command line is the model's own, such as two iterations of a mini."""
    name, kwargs = CASES[case]
    kwargs = {**sizes_of(name), **kwargs}
    data = load_splits(options_from({"dataset": "digits", "img_size": 20, "in_chans": 1}))
    options = options_from({"model": name, "dataset": "digits", "img_size": 20, "in_chans": 1, "model_kwargs": kwargs})
    trained = make_model(options, data)
    plain = capszoo.create_model(
        name, in_chans=1, img_size=20, **kwargs, **({"decoder": True} if "decoder" in model_keywords(name) else {})
    )
    assert str(trained) == str(plain)
    assert attributes(trained) == attributes(plain)


def attributes(model):
    """Numbers and words of all modules, such as iterations of routing."""
    return [
        {key: value for key, value in vars(module).items() if isinstance(value, int | float | str)}
        for module in model.modules()
    ]


@every_case
def test_search_space_is_of_networks_that_train(case):
    x, target = images().float() / 255, torch.arange(6) % 3
    for _, (_, *others) in space_of(make(case)):  # the first is the network that all other tests train
        for kwargs in others:
            model = make(case, **kwargs).train()
            loss = CapsuleTask(model, verbose=False)(x, target)["loss"]
            loss.backward()
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            assert loss.isfinite() and gradients and all(map(is_finite, gradients)), kwargs


@every_case
def test_the_unreduced_network_comes_first(case):
    """Of what a search does not add, such as the decoder, the first choice is that of the network itself."""
    model = make(case)
    arguments = model.arguments()
    for argument, (first, *_) in space_of(model):
        if argument.keyword not in ("decoder", *argument.needs) and not argument.needs:
            assert arguments[argument.keyword] == first.get(argument.keyword), argument.keyword


def train(case, policy):
    model = make(case)
    epochs = 2 if policy in OPTIONS else 1
    mean, std = image_statistics(model)
    split = Split(torch.arange(6) % 3, images(), mean=mean, std=std)
    options = dict(lr=1e-3, batch_size=2, epochs=epochs, num_images=6, **OPTIONS.get(policy, {}))
    made = create_policy(policy, **options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    task, optimizer = CapsuleTask(model, verbose=False), torch.optim.Adam(model.parameters())
    trainer = Trainer(task, optimizer, made, split, None, cuda_graphs=False)
    if policy == "lr_finder":
        rates, losses = find_lr(trainer)
        assert len(rates) == len(losses) >= 2 and all(loss > 0 for loss in losses)
    else:
        trainer.fit()
        assert len(trainer.history) == epochs and trainer.finished
    assert any(not torch.equal(value, before[key]) for key, value in model.named_parameters())
    assert all(map(is_finite, model.state_dict().values()))


def is_finite(x):
    return bool(x.isfinite().all())


# Each family once, and each policy at least once; all others with the long tests.
PAIRS = [*zip(CASES, itertools.cycle(list_policies()))]  # noqa: B905


@pytest.mark.parametrize(("case", "policy"), PAIRS)
def test_policies_train_families(case, policy):
    train(case, policy)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "policy"), [pair for pair in itertools.product(CASES, list_policies()) if pair not in PAIRS]
)
def test_every_policy_trains_every_family(case, policy):
    train(case, policy)


@every_case
def test_pruned_or_refused_in_one_line(case):
    name, _ = CASES[case]
    model = make(case)
    if isinstance(model, Prunable) and model.prunable_parts():
        smaller, _ = prune.prune(model, {"conv1": 4}, "magnitude")
        assert smaller(torch.rand(2, 1, 20, 20)).shape == (2, 3)
        return
    message = re.escape(f"{name} cannot be pruned: give a ")
    for part in prune.PARTS:
        with pytest.raises(ValueError, match=f"^{message}.*CapsNet.* that capszoo.create_model made, not wrapped$"):
            prune.prune(model, {part: 1}, "magnitude")
    with pytest.raises(ValueError, match=f"^{message}"):
        prune.scores(model, "types", "magnitude")


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("fused", [True, False])
def test_exported_with_an_open_batch_size(case, fused):
    with capszoo.set_fused_routing(fused):
        check_export(make(case).eval(), images(2).float() / 255)


@pytest.mark.slow
@every_case
def test_onnx_with_an_open_batch_size(case, tmp_path):
    check_onnx(make(case).eval(), images(2).float() / 255, tmp_path / "model.onnx")


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("case", [*CASES, *MORE])
def test_groups_of_parameters_follow_the_forward_pass(case, coarse):
    """Layer decay and freezing by groups begin with the layers that come first."""
    model = make(case)
    groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    numbers = [groups[key] for key, _ in model.named_parameters()]
    assert numbers == sorted(numbers) and len(set(numbers)) > 1
    capsules = {groups[key] for key, _ in model.named_parameters() if "caps" in key}
    assert len(capsules) > 1 or case.startswith(("cnn", "deepcaps"))


def saved(model, x):
    """Values that a forward pass keeps for the backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        model(x)
    return sum(sizes)


@pytest.mark.parametrize("case", [*CASES, *MORE])
def test_grad_checkpointing_keeps_less_and_changes_nothing(case):
    x = images().float() / 255
    results, kept = [], []
    for enable in (False, True):
        model = make(case).train()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        results.append([*(p.grad for p in model.parameters()), *model.buffers()])
        kept.append(saved(model, x))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert kept[1] < kept[0]


@pytest.mark.parametrize("case", ["capsnet_resnet_sr", "capsnet_vb_mini"])
def test_grad_checkpointing_compiles(case):
    x = images().float() / 255
    model, expected = make(case).train(), make(case).train()
    model.set_grad_checkpointing()
    found = torch.compile(model, backend="aot_eager")(x)
    found.sum().backward()
    wanted = expected(x)
    wanted.sum().backward()
    torch.testing.assert_close(found, wanted)
    for a, b in zip(
        [*model.parameters(), *model.buffers()], [*expected.parameters(), *expected.buffers()], strict=True
    ):
        torch.testing.assert_close(a, b)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("case", [*CASES, *MORE])
def test_all_levels_are_features(case):
    x = images().float() / 255
    extractor = make(case, features_only=True).eval()
    whole = make(case).eval()
    assert len(extractor(x)) == len(whole.feature_info) == len(extractor.feature_info)
    for level, features in enumerate(extractor(x)):
        assert features.shape[1] == whole.feature_info[level]["num_chs"]
    with pytest.raises(ValueError, match=r"^out_indices=\[0\] has no effect without features_only=True"):
        make(case, out_indices=[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *MORE])
def test_scripted_without_classes(case):
    x = images().float() / 255
    model = make(case, num_classes=0).eval()
    assert torch.equal(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize("feature_cls", ["list", "dict"])
@pytest.mark.parametrize("name", ["efficient_capsnet", "deepcaps"])
def test_levels_of_the_outermost_modules_are_features_of_timms_lists(name, feature_cls):
    plain = make(name, features_only=True)
    extractor = make(name, features_only=True, feature_cls=feature_cls).eval()
    names = plain.feature_info.module_name()
    assert extractor.feature_info.module_name() == [name for name in names if "." not in name] != []
    found = extractor(images().float() / 255)
    assert len(found) == len(extractor.feature_info.module_name())


@pytest.mark.parametrize("feature_cls", ["hook", "fx"])
def test_all_levels_are_features_of_timms_other_extractors(feature_cls):
    extractor = make("deepcaps", features_only=True, feature_cls=feature_cls).eval()
    assert len(extractor(images().float() / 255)) == 4
