"""Policies against the paper's formulas, written here a second time as plain loops over epochs and steps."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capszoo.policies import Progress, create_policy, policy_options

LR = 0.001
BATCH = 128
NAMES = ["fixed", "exp_decay", "one_cycle", "warm_restarts", "ada_batch", "warm_ada_batch", "lr_finder"]
CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"


def make(name, epochs=30, num_images=60000, lr=LR, batch_size=BATCH, **options):
    return create_policy(name, lr=lr, batch_size=batch_size, epochs=epochs, num_images=num_images, **options)


def error(name, **arguments):
    with pytest.raises(ValueError) as caught:
        make(name, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def paper_batches(name, epochs, num_images):
    """The batch size of each epoch, from the table in the paper, which counts epochs from 1."""
    sizes = []
    for epoch in range(1, epochs + 1):
        if name == "ada_batch":
            size = 1 if epoch <= 3 else 16 if epoch <= 33 else 32 if epoch <= 63 else 64
        elif name == "warm_ada_batch":
            size = 1 if epoch <= 3 else 16
        else:
            size = 128
        sizes.append(min(size, num_images))
    return sizes


def paper_schedule(name, epochs, num_images):
    """(epoch from 0, batch size, learning rate) of each step, from the table in the paper."""
    sizes = paper_batches(name, epochs, num_images)
    steps = [math.ceil(num_images / size) for size in sizes]
    total = sum(steps)
    step = 0
    for epoch in range(epochs):
        for i in range(steps[epoch]):
            if name in ("fixed", "ada_batch"):
                lr = 0.001
            elif name == "exp_decay":
                lr = 0.001 * 0.96 ** (step / 2000)
            elif name == "one_cycle":
                part = 100 * step / total
                if part <= 45:
                    lr = 0.001 + 0.009 * part / 45
                elif part <= 90:
                    lr = 0.010 - 0.009 * (part - 45) / 45
                else:
                    lr = 0.001 - 0.0009 * (part - 90) / 10
            elif name == "warm_restarts":
                cycle = min(10, epochs)
                done = (epoch % cycle + i / steps[epoch]) / cycle
                lr = 0.001 + 0.0045 * (1 + math.cos(math.pi * done))
            elif name == "warm_ada_batch":
                first = sum(steps[:3])
                done = step / first if epoch < 3 else (step - first) / (total - first)
                lr = 0.001 + 0.0045 * (1 + math.cos(math.pi * done))
            else:
                lr = 10 ** (step / 100 - 6)
            yield epoch, sizes[epoch], lr
            step += 1


def assert_is_paper(name, epochs, num_images):
    count = 0
    for got, want in itertools.zip_longest(
        make(name, epochs, num_images).schedule(), paper_schedule(name, epochs, num_images)
    ):
        if got is None or want is None or got[:2] != want[:2] or abs(got[2] - want[2]) > 1e-11 * want[2]:
            pytest.fail(f"{name}, {epochs} epochs of {num_images} images, step {count}: {got}, in the paper {want}")
        count += 1
    assert count == make(name, epochs, num_images).total_steps > 0


@pytest.mark.parametrize(
    "name, epochs, num_images",
    [
        run
        for run in itertools.product(NAMES, [5, 30, 100], [60000, 1437])
        if run
        != ("lr_finder", 100, 60000)  # its 46,900 steps would end beyond the largest float: test_errors_of_lr_finder
    ],
)
def test_every_step_is_the_papers(name, epochs, num_images):
    assert_is_paper(name, epochs, num_images)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(num_images=st.integers(1, 700), epochs=st.integers(4, 70))
@example(num_images=1, epochs=4)
@example(num_images=129, epochs=70)
def test_every_step_is_the_papers_for_any_data_set(name, num_images, epochs):
    assert_is_paper(name, epochs, num_images)


def test_the_figures_printed_in_the_paper():
    policy = make("warm_ada_batch", epochs=100)
    assert sum(policy.steps(epoch) for epoch in range(3)) == 180_000
    assert sum(policy.steps(epoch) for epoch in range(3, 100)) == 363_750
    assert policy.total_steps == 543_750
    assert policy.progress(0, 0) == Progress(0, 0, 543_750, 0, 0, 180_000)
    assert policy.progress(2, 59_999) == Progress(2, 179_999, 543_750, 0, 179_999, 180_000)
    assert policy.progress(3, 0) == Progress(3, 180_000, 543_750, 1, 0, 363_750)
    assert policy.progress(99, 3749) == Progress(99, 543_749, 543_750, 1, 363_749, 363_750)

    batches = [make("ada_batch", epochs=100).batch_size(epoch) for epoch in range(100)]
    assert batches == 3 * [1] + 30 * [16] + 30 * [32] + 37 * [64]
    assert make("fixed").total_steps == 30 * 469


def test_staircase_decays_at_whole_multiples_only():
    policy = make("exp_decay", num_images=10, epochs=7, batch_size=3, decay_rate=0.5, decay_steps=10, staircase=True)
    rates = [lr for _, _, lr in policy.schedule()]
    assert rates == 10 * [0.001] + 10 * [0.0005] + 8 * [0.00025]


def test_one_cycle_takes_corners_and_rates():
    policy = make("one_cycle", epochs=1, num_images=10, batch_size=1, max_lr=0.005, final_lr=0, rise=0.2, fall_end=0.6)
    want = [0.001, 0.003, 0.005, 0.004, 0.003, 0.002, 0.001, 0.00075, 0.0005, 0.00025]
    assert [lr for _, _, lr in policy.schedule()] == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("max_lr", ["4x", " 4X ", 0.004, "0.004", "4e-3"])
@pytest.mark.parametrize("name", ["warm_restarts", "warm_ada_batch"])
def test_rates_are_numbers_or_multiples(name, max_lr):
    policy = make(name, num_images=100, max_lr=max_lr)
    assert policy.lr(policy.progress(0, 0)) == pytest.approx(0.004, rel=1e-12)


def test_cycles_grow_and_the_last_is_cut_not_squeezed():
    policy = make("warm_restarts", epochs=9, num_images=8, batch_size=2, cycle_epochs=2, cycle_mult=2)
    assert [policy.progress(epoch, 0).phase for epoch in range(9)] == [0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert [policy.progress(epoch, 0).phase_steps for epoch in range(9)] == 2 * [8] + 4 * [16] + 3 * [32]
    assert policy.phases() == [(2, 2), (4, 2), (8, 2)]
    assert dataclasses.replace(policy, epochs=6).phases() == [(2, 2), (4, 2)]
    want = 0.001 + 0.0045 * (1 + math.cos(math.pi * 11 / 32))
    assert policy.lr(policy.progress(8, 3)) == pytest.approx(want, rel=1e-12)


def test_default_cycle_is_ten_epochs_or_the_whole_run():
    for epochs, cycle in ((4, 4), (10, 10), (25, 10)):
        for auto in ({}, {"cycle_epochs": None}, {"cycle_epochs": "auto"}):
            assert make("warm_restarts", epochs, 12800, **auto).progress(0, 0).phase_steps == 100 * cycle
    assert make("warm_restarts", 25, 12800, cycle_epochs="7").progress(0, 0).phase_steps == 700


def test_batches_grow_as_asked():
    options = {"warm_epochs": 1, "warm_batch": 3, "first_batch": 4, "grow_every": 2, "grow_factor": 3, "max_growths": 2}
    for name in ("ada_batch", "warm_ada_batch"):
        policy = make(name, epochs=8, num_images=1000, **options)
        assert [policy.batch_size(epoch) for epoch in range(8)] == [3, 4, 4, 12, 12, 36, 36, 36]
        assert [policy.progress(epoch, 0).phase for epoch in range(8)] == [0, 1, 1, 2, 2, 3, 3, 3]
    restarts = [policy.lr(policy.progress(epoch, 0)) for epoch in (0, 1, 3, 5)]
    assert restarts == pytest.approx([0.01] * 4, rel=1e-12)
    # growth ends exactly with the run: no empty phase behind it
    assert [phase.epochs for phase in make("ada_batch", epochs=5, num_images=9, **options).phases()] == [1, 2, 2]


def test_warm_phase_can_be_left_out():
    policy = make("warm_ada_batch", epochs=1, num_images=160, warm_epochs=0)
    assert policy.batch_size(0) == 16 and policy.progress(0, 9) == Progress(0, 9, 10, 0, 9, 10)


def test_batch_is_never_larger_than_the_data_set():
    assert [make("fixed", num_images=n).batch_size(0) for n in (1, 127, 128, 129)] == [1, 127, 128, 128]
    assert [make("fixed", num_images=n).steps(0) for n in (1, 127, 128, 129)] == [1, 1, 1, 2]
    policy = make("ada_batch", epochs=70, num_images=20)
    assert [policy.batch_size(epoch) for epoch in (0, 3, 33, 63)] == [1, 16, 20, 20]


def end_of(progress, whole_run):
    """The place just after the last step: where the formula arrives."""
    if whole_run:
        return progress._replace(step=progress.total_steps)
    return progress._replace(phase_step=progress.phase_steps)


@pytest.mark.parametrize("num_images", [60000, 1437])
def test_cosines_start_at_the_top_and_arrive_at_lr(num_images):
    for name, starts in (("warm_restarts", (0, 10, 20)), ("warm_ada_batch", (0, 3))):
        policy = make(name, num_images=num_images)
        for start in starts:
            first = policy.progress(start, 0)
            assert first.phase_step == 0
            assert policy.lr(first) == pytest.approx(0.01, rel=1e-12)
            assert policy.lr(end_of(first, whole_run=False)) == pytest.approx(0.001, rel=1e-12)


@pytest.mark.parametrize("num_images", [60000, 1437])
def test_one_cycle_is_continuous_and_arrives(num_images):
    policy = make("one_cycle", num_images=num_images)
    total = policy.total_steps
    rates = [lr for _, _, lr in policy.schedule()] + [policy.lr(end_of(policy.progress(0, 0), whole_run=True))]
    assert rates[0] == LR and rates[-1] == pytest.approx(0.0001, rel=1e-12)
    steepest = 0.009 / (0.45 * total)
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= steepest * (1 + 1e-9)
    assert 0.01 - steepest <= max(rates) <= 0.01
    assert abs(rates.index(max(rates)) / total - 0.45) <= 1 / total
    assert rates[round(0.9 * total)] == pytest.approx(LR, abs=steepest)


def test_smooth_policies_jump_only_at_restarts():
    for name, restarts in (("exp_decay", set()), ("warm_restarts", {10, 20}), ("warm_ada_batch", {3})):
        jumps = {
            now[0]
            for before, now in itertools.pairwise(make(name, num_images=6000).schedule())
            if now[2] > before[2] or before[2] - now[2] > 0.05 * LR
        }
        assert jumps == restarts, name


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_is_a_factor_on_the_first_steps(name):
    plain = list(make(name, epochs=5, num_images=1437).schedule())
    warmed = list(make(name, epochs=5, num_images=1437, warmup_steps=40).schedule())
    for step, ((*where, lr), (*other, warm)) in enumerate(zip(plain, warmed, strict=True)):
        assert where == other
        assert warm == (lr * ((step + 1) / 40) if step < 40 else lr)
    assert "warmup_steps" in error(name, warmup_steps=-1)


@pytest.mark.parametrize("name", NAMES)
def test_config_is_the_papers_run(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert text.splitlines()[0] == f"# python recipes/train.py --config recipes/configs/{name}.yaml"
    config = yaml.safe_load(text)
    shared = {key: config.pop(key) for key in ("model", "dataset", "policy", "epochs", "batch_size", "lr")}
    epochs = {"ada_batch": 100, "warm_ada_batch": 100, "lr_finder": 2}.get(name, 30)
    assert shared == {
        "model": "capsnet",
        "dataset": "mnist",
        "policy": name,
        "epochs": epochs,
        "batch_size": 128,
        "lr": 0.001,
    }
    assert set(config) == set(policy_options(name))
    warmup = config["warmup_steps"]
    assert warmup == (1000 if "ada_batch" in name else 0)
    expected = make(name, epochs, 1437, warmup_steps=warmup)
    assert list(make(name, epochs, 1437, **config).schedule()) == list(expected.schedule())
