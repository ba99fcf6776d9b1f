"""capszoo.explore.space: what a search may vary, whichever family the model is of."""

import copy
import inspect

import pytest
import timm
import torch
from timm.layers import to_2tuple
from torch import nn

from capszoo import load_model
from capszoo.arguments import SearchedArgument
from capszoo.engine.options import options_from
from capszoo.engine.run import make_model, make_policy, model_arguments
from capszoo.errors import UsageError
from capszoo.explore import Exploration, ExplorationError, Space, seconds_of_an_epoch
from capszoo.explore.space import plan_space

optuna = pytest.importorskip("optuna")

SMALL = {"conv_dim": 8, "num_types": 2, "decoder_dims": [4, 8]}
ROW = {"policy": "fixed", "epochs": 1, "batch_size": 64}
OPTIONS = {"dataset": "digits", "model": "capsnet_tiny", "model_kwargs": SMALL, "amp": "none"}


def draw(space, count, seed=0):
    study = optuna.create_study(directions=["maximize"] * 3, sampler=optuna.samplers.RandomSampler(seed))
    for point in space.queue():
        study.enqueue_trial(point)
    return [space.suggest(study.ask()) for _ in range(count)]


@pytest.mark.parametrize("name", ["capsnet", "capsnet_ws", "capsnet_pruned", "capsnet_tiny", "cnn_baseline_tiny"])
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_all_that_the_space_draws_can_be_trained(digits, name):
    space = Space(name, digits, epochs=7, amps=["none", "bf16"])
    policies = set()
    for policy, options in draw(space, 60):
        policies.add(policy)
        args = options_from({"dataset": "digits", **options})
        made = make_policy(args, len(digits.train))
        assert 1 <= made.epochs <= 7 and args.policy == policy
        with torch.device("meta"):
            model = make_model(args, digits)
        if name.startswith("capsnet"):
            assert (model.decoder is not None) == options["decoder"]
            assert len(model.keep_types) in (0, options["model_kwargs"].get("keep_types", 0))
    assert policies == {"fixed", "exp_decay", "one_cycle", "warm_restarts", "ada_batch", "warm_ada_batch"}


def test_schedules_are_what_was_drawn(digits):
    space = Space("capsnet_tiny", digits, epochs=12)
    seen = set()
    for policy, options in draw(space, 200):
        made = make_policy(options_from({"dataset": "digits", **options}), len(digits.train))
        if policy == "warm_restarts":
            assert made.epochs % options["cycle_epochs"] == 0, "the last cycle is whole"
            seen.add(made.epochs // options["cycle_epochs"])
        elif "batch" in policy:
            assert made.warm_epochs >= 1 and len(made.phases()) == 2 + options["max_growths"]
            assert made.warmup_steps <= made.warm_epochs * made.steps(0) / 2
            seen.add((made.warm_epochs, options["max_growths"]))
    assert {1, 2, 3, 4, (1, 0), (1, 1), (1, 2)} <= seen
    fixed = Space("capsnet_tiny", digits, epochs=10, fixed={"policy": "warm_restarts", "epochs": 10})
    assert {10 / options["cycle_epochs"] for _, options in draw(fixed, 30)} == {1, 2}


@pytest.mark.parametrize(
    ("fixed", "least"),
    [
        ({"policy": "ada_batch"}, 2),
        ({"policy": "warm_ada_batch", "warm_epochs": 3}, 4),
        ({"policy": "warm_restarts", "cycle_epochs": 5}, 5),
        ({"policy": "one_cycle", "batch_size": 1024}, 2),
    ],
)
def test_what_is_fixed_bounds_the_epochs(digits, fixed, least):
    options = {**OPTIONS, **fixed}
    space = plan_space(options, fixed, digits, torch.device("cpu"), epochs=6)
    assert space.epochs == 6
    drawn = [options["epochs"] for _, options in draw(space, 30)]
    assert min(drawn) == least and max(drawn) == 6
    for _, values in draw(space, 10):
        make_policy(options_from({**OPTIONS, **values}), len(digits.train))
    if least > 2:
        with pytest.raises(ValueError, match="epochs"):
            plan_space(options, fixed, digits, torch.device("cpu"), epochs=2)


def test_what_cannot_be_searched_is_refused_before_it_begins(digits, monkeypatch):
    monkeypatch.setattr("capszoo.explore.space.seconds_of_an_epoch", lambda *args: 5.0)

    def plan(**fixed):
        return plan_space({**OPTIONS, **fixed}, fixed, digits, torch.device("cpu"), budget=300)

    assert plan(policy="ada_batch", warm_epochs=3).epochs == 5 and plan(epochs=9).epochs == 9
    with pytest.raises(UsageError, match="--epochs 30 take about 150 s here, more than a quarter of --budget"):
        plan(epochs=30)
    with pytest.raises(UsageError, match="policy=lr_finder compares no trainings: leave it out"):
        plan(policy="lr_finder")


def test_first_trial_is_the_unreduced_network_at_one_rate(digits):
    (policy, options), *others = draw(Space("capsnet_ws", digits, epochs=12), 6)
    args = options_from({"dataset": "digits", **options})
    with torch.device("meta"):
        assert sum(p.numel() for p in make_model(args, digits).parameters()) == 8_215_728
    assert (policy, args.lr, args.epochs, args.num_routing, args.squash) == ("fixed", 1e-3, 12, 3, "exact")
    assert [name for name, _ in others] == [
        "exp_decay", "one_cycle", "warm_restarts", "ada_batch", "warm_ada_batch"
    ]  # fmt: skip
    assert {made["epochs"] for _, made in others} == {3, 4}, "a third; three cycles have three epochs"
    assert others[-1][1]["warm_batch"] == 1 and others[-1][1]["first_batch"] == 16


def test_what_is_fixed_is_not_varied(digits):
    fixed = {"policy": "one_cycle", "epochs": 3, "lr": 0.002, "model_kwargs": {"share_weights": True}, "decoder": False}
    for policy, options in draw(Space("capsnet", digits, epochs=9, fixed=fixed), 10):
        kwargs = options["model_kwargs"]
        assert policy == "one_cycle" and options["epochs"] == 3 and options["lr"] == 0.002
        assert kwargs["share_weights"] is True and options["decoder"] is False and "small_decoder" not in kwargs


def test_an_epoch_is_measured(digits):
    args = options_from({**OPTIONS, **ROW})
    seconds = seconds_of_an_epoch(args, digits, torch.device("cpu"), limit=0.2)
    assert 0 < seconds < 1000
    larger = options_from({**OPTIONS, **ROW, "batch_size": 1, "epochs": 1})
    assert seconds_of_an_epoch(larger, digits, torch.device("cpu"), limit=0.2) > seconds, "64 times the steps"


def test_arguments_of_models_that_are_options_too_are_fixed(digits):
    fixed = {"model_kwargs": {**SMALL, "num_routing": 2, "decoder": False}}
    for _, options in draw(Space("capsnet_tiny", digits, epochs=9, fixed=fixed), 4):
        assert (options["num_routing"], options["decoder"]) == (2, False)
        arguments = model_arguments(options_from(options), digits)
        assert (arguments["num_routing"], arguments["decoder"]) == (2, False)
    with pytest.raises(ValueError, match="num_classes=3 contradicts the images of 'digits'"):
        Space("capsnet_tiny", digits, epochs=9, fixed={"model_kwargs": {"num_classes": 3}})
    with pytest.raises(ValueError, match="conv_dim='many' is not possible: give a whole number"):
        Space("capsnet_tiny", digits, epochs=9, fixed={"model_kwargs": {"conv_dim": "many"}})


@pytest.mark.parametrize("values", [{"epoch": 3}, {"epochs": "many"}, {"amp": "bf17"}, {"decoder": 3}])
def test_options_of_a_trial_are_checked(values):
    with pytest.raises(UsageError):
        options_from(values)


# A family from outside the package


class Outsider(nn.Module):
    """Scores by two linear layers; keeps of the contract what training and exploring need."""

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: int | tuple[int, int] = 8,
        width: int = 4,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.sizes = {"num_classes": num_classes, "in_chans": in_chans, "img_size": img_size, "width": width}
        height, breadth = to_2tuple(img_size)
        self.hidden = nn.Linear(in_chans * height * breadth, width, device=device)
        self.head = nn.Linear(width, num_classes, device=device)

    def forward_features(self, images):
        return self.hidden(images.flatten(1)).tanh()

    def forward_head(self, features, pre_logits=False):
        return features if pre_logits else self.head(features).sigmoid()

    def forward(self, images):
        return self.forward_head(self.forward_features(images))

    def arguments(self):
        return self.sizes

    def auxiliary_modules(self):
        return {}

    def capsule_layers(self):
        return {}


class Searchable(Outsider):
    def search_space(self):
        return [SearchedArgument("width", {"narrow": 2, "wide": 16}, first="wide")]


class Mistaken(Outsider):
    def search_space(self):
        return [SearchedArgument("depth", [1, 2])]


def outsider(pretrained=False, **kwargs) -> Outsider:
    return make_outsider(Outsider, kwargs)


def searchable_outsider(pretrained=False, **kwargs) -> Searchable:
    return make_outsider(Searchable, kwargs)


def mistaken_outsider(pretrained=False, **kwargs) -> Mistaken:
    return make_outsider(Mistaken, kwargs)


def make_outsider(family, kwargs):
    names = {Outsider: "outsider", Searchable: "searchable_outsider", Mistaken: "mistaken_outsider"}
    keywords = inspect.signature(family).parameters
    model = family(**{key: value for key, value in kwargs.items() if key in keywords})
    model.pretrained_cfg = {"architecture": names[family], "mean": (0.0,), "std": (1.0,)}
    return model


@pytest.fixture
def outsiders(monkeypatch):
    """Register the family with timm, for this test alone."""
    for key in dir(timm.models._registry):
        if key.startswith(("_model_", "_module_to")) and isinstance(getattr(timm.models._registry, key), (dict, set)):
            monkeypatch.setattr(timm.models._registry, key, copy.deepcopy(getattr(timm.models._registry, key)))
    for entrypoint in (outsider, searchable_outsider, mistaken_outsider):
        timm.models.register_model(entrypoint)


def test_a_model_from_outside_decides_what_is_searched(outsiders, digits):
    space = Space("searchable_outsider", digits, epochs=7)
    drawn = [options["model_kwargs"] for _, options in draw(space, 30)]
    assert drawn[:6] == [{"width": 16}] * 6 and {kwargs["width"] for kwargs in drawn} == {2, 16}
    fixed = Space("searchable_outsider", digits, epochs=7, fixed={"model_kwargs": {"width": 3}})
    assert all(options["model_kwargs"] == {"width": 3} for _, options in draw(fixed, 8))


def test_of_a_model_without_search_space_the_training_alone_is_searched(outsiders, digits):
    drawn = draw(Space("outsider", digits, epochs=7), 30)
    assert all(options["model_kwargs"] == {} for _, options in drawn) and len({policy for policy, _ in drawn}) == 6
    assert not {"decoder", "num_routing", "squash"} & set().union(*(options for _, options in drawn))


def test_a_search_space_names_keywords_of_its_model(outsiders, digits):
    expected = (
        r"search_space\(\) of 'mistaken_outsider' names 'depth', which is not a keyword of it: leave it out there"
    )
    with pytest.raises(ExplorationError, match=expected):
        Space("mistaken_outsider", digits, epochs=7)


def test_a_model_from_outside_is_explored(outsiders, digits, tmp_path):
    options = {"dataset": "digits", "model": "searchable_outsider", "amp": "none"}
    space = Space("searchable_outsider", digits, epochs=1, fixed={"policy": "fixed"})
    exploration = Exploration(space, options, digits, tmp_path, trials=4)
    assert exploration.run()
    solutions = exploration.solutions()
    assert {s.state for s in solutions} <= {"complete", "stopped"} and solutions[0].options["model_kwargs"] == {
        "width": 16
    }
    model = load_model(f"{solutions[0].folder}/best.safetensors")
    assert isinstance(model, Searchable) and solutions[0].parameters == sum(p.numel() for p in model.parameters())
