"""Seeded runs of every policy take the same steps, and end with the same weights, as they did when they were recorded.

    python tests/test_recorded_runs.py     # adds those of this machine to recorded_runs.json

The hash `steps` is of what the steps are made of (learning rate, labels, images): the same on every machine. `weights`
is of the weights after the run, the same with equal versions of torch on processors of one kind.
"""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

from capszoo.engine.options import options_from
from capszoo.engine.run import load_splits, make_trainer
from capszoo.policies import list_policies

RECORDS = Path(__file__).with_name("recorded_runs.json")
POLICIES = [name for name in list_policies() if name != "lr_finder"]
OPTIONS = {
    "epochs": 2,
    "amp": "none",
    "translate": 2,
    "model_kwargs": {"conv_dim": 8, "num_types": 2, "decoder_dims": [16, 16]},
}
OF_POLICY = {
    "warm_restarts": {"cycle_epochs": 1},
    "ada_batch": {"warm_epochs": 1, "warm_batch": 4, "warmup_steps": 1000},
    "warm_ada_batch": {"warm_epochs": 1, "warm_batch": 4, "warmup_steps": 1000},
}


def machine():
    """The version of torch and the kind of processor, on which the order of additions depends."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    facts = [value.strip() for key, value in facts.items() if key.strip() in ("model name", "cpu family", "model")]
    return ", ".join([f"torch {torch.__version__.split('+')[0]}", *sorted(facts)])


def run_policy(policy):
    """Hashes of the steps and of the weights of a short run."""
    args = options_from({**OPTIONS, "policy": policy, **OF_POLICY.get(policy, {})})
    data = load_splits(args)
    # Images of their own: those of digits are resized, and versions of torch round differently.
    data.train.images = (torch.arange(200 * 28 * 28) * 7919 % 251).to(torch.uint8).view(200, 1, 28, 28)
    data.train.labels = data.train.labels[:200]
    steps = hashlib.sha256()
    trainer = make_trainer(args, data, torch.device("cpu"))

    def record_batch(task, batch):
        pixels = (task.normalization.undo(batch[0]) * 255).round().to(torch.uint8)
        steps.update(pixels.contiguous().numpy().tobytes() + batch[1].long().numpy().tobytes())

    trainer.task.register_forward_pre_hook(record_batch)
    trainer.on_step = lambda trainer: steps.update(f"{trainer.lr:.6e}".encode())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several add in another order
    try:
        trainer.fit()
    finally:
        torch.set_num_threads(threads)
    weights = hashlib.sha256()
    for key, value in sorted(trainer.task.model.state_dict().items()):
        weights.update(key.encode() + value.contiguous().numpy().tobytes())
    return {"steps": steps.hexdigest(), "weights": weights.hexdigest()}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_seeded_run_takes_the_recorded_steps(policy):
    records = json.loads(RECORDS.read_text())
    found = run_policy(policy)
    assert found["steps"] == records["steps"][policy]
    if machine() in records["weights"]:
        assert found["weights"] == records["weights"][machine()][policy]


if __name__ == "__main__":
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {"steps": {}, "weights": {}}
    found = {policy: run_policy(policy) for policy in POLICIES}
    records["steps"] = {policy: hashes["steps"] for policy, hashes in found.items()}
    records["weights"][machine()] = {policy: hashes["weights"] for policy, hashes in found.items()}
    RECORDS.write_text(json.dumps(records, indent=2) + "\n")
    sys.exit(0)
