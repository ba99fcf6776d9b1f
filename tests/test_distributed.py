"""Training by several processes: the same weights as by one, exact sums, and one that writes."""

import csv
import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import load_file

from capszoo.data.loader import Loader, Split
from capszoo.engine import Trainer
from capszoo.engine.distributed import ALONE, Ranks, join_ranks
from capszoo.engine.task import CapsuleTask
from capszoo.errors import RanksError, TrainingError
from capszoo.policies import create_policy

ROOT = Path(__file__).parents[1]
POLICIES = {
    "fixed": {},
    "exp_decay": {"decay_steps": 5},
    "one_cycle": {},
    "warm_restarts": {"cycle_epochs": 1},
    "ada_batch": {"warm_epochs": 1, "warm_batch": 4},
    "warm_ada_batch": {"warm_epochs": 1, "warm_batch": 4},
}
# 61 images in batches of 16 leave 13, in batches of 12 a single one: parts differ, and some are empty.
TRAIN = textwrap.dedent("""
    import json, os, sys
    import torch, torch.distributed as dist
    from torch import nn
    import capszoo
    from capszoo.engine.distributed import join_ranks, leave_ranks
    from capszoo.engine import Trainer, evaluate
    from capszoo.data.loader import Loader, Split
    from capszoo.policies import create_policy
    from capszoo.engine.task import CapsuleTask
    from safetensors.torch import save_file

    def train(policy, options, ranks, batch_size=16, several_classes=False, **kwargs):
        torch.manual_seed(3)
        model = capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2, decoder=True, decoder_dims=(4, 8))
        model.double().conv1.register_forward_pre_hook(lambda conv, inputs: inputs[0].double())
        task = CapsuleTask(model, verbose=False)
        if ranks.count > 1:
            task.prepare_distributed()
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (61, 1, 28, 28), generator=generator, dtype=torch.uint8)
        labels = torch.randint(10, (61,), generator=generator)
        if several_classes:
            labels = (torch.rand(61, 10, generator=generator) < 0.2).float()
        split, val = Split(labels, images), Split(labels[:23], images[:23])
        policy = create_policy(policy, lr=1e-3, batch_size=batch_size, epochs=2, num_images=61, **options)
        trainer = Trainer(task, torch.optim.Adam(model.parameters()), policy, split, val, seed=1, translate=2,
                          eval_batch_size=5, clip_grad=0.5, ranks=ranks, **kwargs)
        assert trainer.fit()
        return model, trainer

    if __name__ == "__main__":
        torch.set_num_threads(1)
        ranks, _ = join_ranks("cpu")
        out, policies = sys.argv[1], json.loads(sys.argv[2])
        for name, options in policies.items():
            model, trainer = train(name, options, ranks)
            history = [{k: v for k, v in row.items() if "second" not in k} for row in trainer.history]
            everyone = [None] * ranks.count
            if ranks.count > 1:
                dist.all_gather_object(everyone, history)
                assert all(one == history for one in everyone), "all ranks know the same"
            if ranks.is_first:
                save_file(model.state_dict(), f"{out}/{name}-{ranks.count}.safetensors")
                json.dump(history, open(f"{out}/{name}-{ranks.count}.json", "w"))
        model, _ = train("fixed", {}, ranks, batch_size=12)
        if ranks.is_first:
            save_file(model.state_dict(), f"{out}/odd-{ranks.count}.safetensors")
        model, _ = train("fixed", {}, ranks, micro_batch=3)
        if ranks.is_first:
            save_file(model.state_dict(), f"{out}/micro-{ranks.count}.safetensors")
        model, trainer = train("fixed", {}, ranks, batch_size=12, several_classes=True)
        share = ranks.rank, ranks.count
        measured = evaluate(model, Loader(trainer.val_split, 5, "cpu", share=share), ranks=ranks)
        few = evaluate(model, Loader(Split(trainer.val_split.labels[:1], trainer.val_split.images[:1]), 5, "cpu",
                                     share=share), ranks=ranks)
        if ranks.is_first:
            save_file(model.state_dict(), f"{out}/classes-{ranks.count}.safetensors")
            facts = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in vars(measured).items()}
            json.dump([facts, few.top1, few.mean_average_precision], open(f"{out}/classes-{ranks.count}.json", "w"))
        del model, trainer  # with them goes the last reference to the process group
        leave_ranks()
""")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(count, script, *arguments):
    """Run a script in several processes, as torchrun would; return what each printed."""
    port = str(free_port())
    started = []
    for rank in range(count):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}  # fmt: skip
        started.append(processes.start(script, *arguments, env=environment, stderr=subprocess.STDOUT))
    outputs = [process.communicate(timeout=300)[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder with the weights of every policy after training by 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "script.py").write_text(TRAIN)
    for count in (1, 2, 4):
        start_ranks(count, folder / "script.py", folder, json.dumps(POLICIES))
    return folder


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_ranks_end_with_the_weights_of_one(trained, policy, count):
    one, several = (load_file(trained / f"{policy}-{n}.safetensors") for n in (1, count))
    for key, value in one.items():
        torch.testing.assert_close(several[key], value, rtol=1e-10, atol=1e-10)
    expected, found = (json.loads((trained / f"{policy}-{n}.json").read_text()) for n in (1, count))
    for row, other in zip(expected, found, strict=True):
        assert other == pytest.approx(row, rel=1e-9), "metrics are sums over all ranks"


@pytest.mark.parametrize("count", [2, 4])
def test_batches_that_leave_ranks_without_an_image(trained, count):
    one, several = (load_file(trained / f"odd-{n}.safetensors") for n in (1, count))
    for key, value in one.items():
        torch.testing.assert_close(several[key], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("count", [2, 4])
def test_several_classes(trained, count):
    one, several = (load_file(trained / f"classes-{n}.safetensors") for n in (1, count))
    for key, value in one.items():
        torch.testing.assert_close(several[key], value, rtol=1e-10, atol=1e-10)
    (expected, *few), (found, *same_few) = (json.loads((trained / f"classes-{n}.json").read_text()) for n in (1, count))
    assert found.pop("class_confusion") == expected.pop("class_confusion")
    assert found.pop("confusion") is expected.pop("confusion") is None
    precisions = found.pop("average_precision"), expected.pop("average_precision")
    assert precisions[0] == pytest.approx(precisions[1], rel=1e-9, nan_ok=True)
    assert found == pytest.approx(expected, rel=1e-9) and 0 < found["mean_average_precision"] < 1
    assert same_few == few


@pytest.mark.parametrize("count", [1, 2, 4])
def test_gradients_of_parts_are_those_of_the_batch(trained, count):
    whole, parts = load_file(trained / "fixed-1.safetensors"), load_file(trained / f"micro-{count}.safetensors")
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("count", "batch_size", "start_step"), [(2, 16, 0), (3, 7, 2), (4, 3, 0)])
def test_shares_make_up_the_batch(count, batch_size, start_step):
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    split = Split(torch.arange(50), images)
    options = {"shuffle": True, "seed": 5, "epoch": 1, "translate": 1, "start_step": start_step}
    whole = list(Loader(split, batch_size, "cpu", **options))
    parts = [list(Loader(split, batch_size, "cpu", share=(rank, count), **options)) for rank in range(count)]
    for step, (pixels, labels) in enumerate(whole):
        shares = [part[step] for part in parts]
        assert torch.equal(torch.cat([share[1] for share in shares]), labels)
        assert torch.equal(torch.cat([share[0] for share in shares]), pixels)
        sizes = [len(share[1]) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_batches_too_small_for_the_ranks_are_refused():
    import capszoo

    model = capszoo.create_model("capsnet_tiny", conv_dim=4, num_types=2)
    policy = create_policy("ada_batch", lr=1e-3, batch_size=16, epochs=2, num_images=50, warm_epochs=1)
    split = Split(torch.zeros(50, dtype=torch.int64), torch.zeros(50, 1, 28, 28, dtype=torch.uint8))
    task = CapsuleTask(model, verbose=False)
    trainer = Trainer(task, torch.optim.Adam(model.parameters()), policy, split, ranks=Ranks(0, 2, 0))
    with pytest.raises(TrainingError, match="of 1 in epoch 1 cannot be shared by 2 processes: .*--warm-batch 2"):
        trainer.fit()


def test_ranks_of_torchrun():
    assert join_ranks("auto", {}) == (ALONE, None) and join_ranks("cuda:1", {"WORLD_SIZE": "1"}) == (ALONE, None)
    with pytest.raises(RanksError, match="RANK is not: start the processes with torchrun"):
        join_ranks("cpu", {"WORLD_SIZE": "2"})
    ranks = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    with pytest.raises(RanksError, match="--device cuda:0 is one device for 2 processes"):
        join_ranks("cuda:0", ranks)
    if not torch.cuda.is_available():
        with pytest.raises(RanksError, match=r"process 2 of this machine has no GPU \(there are 0\)"):
            join_ranks("cuda", ranks)


def torchrun(count, *arguments, env=None):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += [str(ROOT / "recipes/train.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


SMALL = "--policy fixed --batch-size 64 --amp none --model-kwargs conv_dim=8 num_types=2 --device cpu".split()


def test_the_recipe_under_torchrun_resumes_with_other_ranks(tmp_path):
    done = torchrun(2, *SMALL, "--epochs", 2, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test top1") == 1 and "2 processes" in done.stdout, "one process prints"
    with open(tmp_path / "run/summary.csv", newline="") as file:
        two = list(csv.DictReader(file))
    processes.run(ROOT / "recipes/train.py", *SMALL, "--epochs", 2, "--output", tmp_path / "one", check=True)
    with open(tmp_path / "one/summary.csv", newline="") as file:
        one = list(csv.DictReader(file))
    for a, b in zip(one, two, strict=True):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-3)
        assert a["lr"] == b["lr"] and a["batch_size"] == b["batch_size"]
    # One process takes up what two began: the state after the first epoch, as a killed run leaves it.
    text = (tmp_path / "run/args.yaml").read_text().replace("epochs: 2", "epochs: 3")
    (tmp_path / "run/args.yaml").write_text(text)
    resumed = processes.run(ROOT / "recipes/train.py", "--resume", tmp_path / "run")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at epoch 3, step 0" in resumed.stdout
    text = (tmp_path / "run/args.yaml").read_text().replace("epochs: 3", "epochs: 4")
    (tmp_path / "run/args.yaml").write_text(text)
    again = "".join(start_ranks(2, ROOT / "recipes/train.py", "--resume", tmp_path / "run"))
    assert "resumed at epoch 4, step 0" in again and again.count("epoch   4/4") == 1
