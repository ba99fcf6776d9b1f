"""What all policies share: no state, and places in the run."""

import dataclasses
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest

from capszoo.policies import create_policy

LR = 0.001
BATCH = 128
NAMES = ["fixed", "exp_decay", "one_cycle", "warm_restarts", "ada_batch", "warm_ada_batch", "lr_finder"]


def make(name, epochs=30, num_images=60000, lr=LR, batch_size=BATCH, **options):
    return create_policy(name, lr=lr, batch_size=batch_size, epochs=epochs, num_images=num_images, **options)


@pytest.mark.parametrize("name", NAMES)
def test_progress_is_where_iterating_arrives(name):
    policy = make(name, epochs=40, num_images=333, batch_size=50)
    places, step, phase_starts = [], 0, {}
    for epoch in range(policy.epochs):
        for i in range(policy.steps(epoch)):
            place = policy.progress(epoch, i)
            assert (place.epoch, place.step, place.total_steps) == (epoch, step, policy.total_steps)
            assert place.phase_step == step - phase_starts.setdefault(place.phase, step) < place.phase_steps
            places.append((epoch, i, place, policy.lr(place)))
            step += 1
    assert step == policy.total_steps and list(phase_starts) == list(range(len(phase_starts)))

    random.Random(0).shuffle(places)
    resumed = pickle.loads(pickle.dumps(make(name, epochs=40, num_images=333, batch_size=50)))
    for epoch, i, place, lr in places:
        assert resumed.progress(epoch, i) == place == policy.progress(epoch, i)
        assert resumed.lr(place) == lr == policy.lr(place)


@pytest.mark.parametrize("name", NAMES)
def test_policies_are_frozen_values(name):
    policy = make(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.epochs = 3
    assert policy.total_steps > 0 and policy == make(name) and hash(policy) == hash(make(name))
    assert policy != make(name, epochs=29)
    # a changed copy does not inherit what the original worked out
    assert dataclasses.replace(policy, num_images=600).total_steps == make(name, num_images=600).total_steps
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.lr = None


def test_policies_need_the_standard_library_only():
    path = Path(sys.modules["capszoo.policies"].__file__)
    lines = [
        "import importlib.util, sys",
        f"spec = importlib.util.spec_from_file_location('policies', {str(path)!r})",
        "sys.modules['policies'] = module = importlib.util.module_from_spec(spec)",
        "spec.loader.exec_module(module)",
        "extra = {m.split('.')[0] for m in sys.modules} - set(sys.stdlib_module_names) - {'__main__'}",
        "print(sorted(extra & {'torch', 'numpy', 'timm', 'capszoo', 'yaml'}))",
    ]
    run = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_errors_of_places_outside_the_run():
    policy = make("fixed", epochs=2, num_images=256)
    for epoch in (-1, 2):
        for ask in (policy.batch_size, policy.steps, lambda e: policy.progress(e, 0)):
            with pytest.raises(ValueError, match=f"epoch {epoch} is not in this run"):
                ask(epoch)
    for step in (-1, 2):
        with pytest.raises(ValueError, match=f"step {step} is not in epoch 1 .* 2 steps"):
            policy.progress(1, step)
