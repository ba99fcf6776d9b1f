"""What tests of shipped weights share: runs that look finished, and a folder of weights that is not capszoo's own."""

import copy
import gc
import importlib.util
import json
import os
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm.models._registry
import torch

import capszoo
from capszoo import pretrained
from capszoo.checkpoint import save_weights

ROOT = Path(__file__).parents[1]

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Workers share the cores: threads beyond them would wait for each other, in here and in processes started here.
    threads = max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)


def pytest_collection_finish(session):
    """What is imported and collected stays: the garbage collector need not look at a million objects each time."""
    gc.collect()
    gc.freeze()


# Tests whose module trains something for all of them, which two workers would do twice.
TOGETHER = (
    "tests/test_distributed.py",
    "tests/explore/test_exploration.py",
    "tests/recipes/test_benchmark.py",
    "tests/recipes/test_explore.py",
    "tests/recipes/test_prune.py",
    "tests/recipes/test_train.py",
)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """Give the tests of such a module to one worker, and any other to whichever is free."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path, _, test = nodeid.partition("::")
            if test == "test_through_the_interpreter":  # one process runs those of all files
                return test
            return path if path in TOGETHER else nodeid

    return Scheduling(config, log)


def load_module(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", autouse=True)
def reports_are_left_out():
    """Drawing a report takes longer than the training of most tests; see tests/report for those that draw one."""
    import capszoo.report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capszoo.report, "write_run_report", lambda folder, *_: folder / "report.html")
        yield


@pytest.fixture(scope="session")
def recipe():
    """A recipe as a module."""
    return lambda name: load_module(ROOT / "recipes" / f"{name}.py", f"recipe_{name}")


@pytest.fixture(scope="session")
def write_mnist():
    def write_mnist(root, folder="MNIST", train=40, test=20):
        """Write a tiny set in MNIST's format whose images all differ."""
        raw = root / folder / "raw"
        raw.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for prefix, count in (("train", train), ("t10k", test)):
            images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
            labels = (np.arange(count) % 10).astype(np.uint8)
            (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
                struct.pack(">4i", 0x803, count, 28, 28) + images.tobytes()
            )
            (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels.tobytes())
        return root

    return write_mnist


@pytest.fixture
def pretended_graphs(monkeypatch):
    """CUDA graphs of CPU operators; the list of those that were captured."""
    return load_module(ROOT / "tests" / "pretended_cuda.py", "pretended_cuda").pretend_graphs(monkeypatch)


@pytest.fixture
def make_run(tmp_path):
    """Make the folder of a finished run with random weights; return the path of best.safetensors."""

    def make(name="capsnet_tiny", dataset="mnist", seed=0, header=None, result=None, args=None, **kwargs):
        torch.manual_seed(seed)
        kwargs = {"num_classes": 10, "img_size": [28, 28], **kwargs}
        if "decoder" in capszoo.registry.model_keywords(name):
            kwargs.setdefault("decoder", True)
        model = capszoo.create_model(name, **kwargs)
        folder = tmp_path / "runs" / f"{name}-{dataset}-{seed}"
        folder.mkdir(parents=True)
        facts = {
            "capszoo_version": "0.1.0",
            "model": name,
            "model_args": kwargs,
            "dataset": dataset,
            "class_names": [f"class {i}" for i in range(model.num_classes)],
            "policy": "one_cycle",
            "epochs": 3,
            "epoch": 2,
            "seed": seed,
            "eval_top1": 0.5,
        }
        save_weights(folder / "best.safetensors", model, {**facts, **(header or {})})
        outcome = {"best_epoch": 2, "eval_top1": 0.98765, "test_top1": 0.97654, "amp": "none", **(result or {})}
        (folder / "result.json").write_text(json.dumps(outcome))
        lines = {"model": name, "dataset": dataset, "data_dir": "/elsewhere", "epochs": 3, "lr": 0.002, **(args or {})}
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items())
        (folder / "args.yaml").write_text(f"# python recipes/train.py --config {folder / 'args.yaml'}\n{text}")
        return folder / "best.safetensors"

    return make


@pytest.fixture
def weights_dir(tmp_path, monkeypatch):
    """A folder that takes the place of capszoo/weights."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setattr(pretrained, "WEIGHTS_DIR", folder)
    return folder


@pytest.fixture
def ship(weights_dir, recipe, make_run, monkeypatch):
    """Ship random weights under a name and register the models anew, as the next import would."""
    for key in dir(timm.models._registry):
        if key.startswith(("_model_", "_module_to")) and isinstance(getattr(timm.models._registry, key), (dict, set)):
            monkeypatch.setattr(timm.models._registry, key, copy.deepcopy(getattr(timm.models._registry, key)))

    def register():
        families = "capsnet cnn_baseline deepcaps efficient_capsnet inverted_attention matrix_capsnet self_routing"
        for family in families.split():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # timm says that names are registered a second time
                load_module(ROOT / "capszoo/models" / f"{family}.py", f"registered_anew.{family}")

    def ship(*names, **kwargs):
        export = recipe("export")
        for seed, name in enumerate(names):
            model, dataset = name.split(".")
            file = make_run(model, dataset, seed=seed, **kwargs)
            assert export.main(["ship", str(file), "--name", name]) == 0
        register()

    yield ship
    for key in [key for key in sys.modules if key.startswith("registered_anew.")]:
        del sys.modules[key]


@pytest.fixture(autouse=True)
def same_numbers():
    """A test draws the same numbers whatever its worker ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def untuned_kernels(request, monkeypatch):
    """GPU tests take the first tile sizes: tuning takes long, and tests side by side would measure each other."""
    from capszoo.kernels import dispatch

    if request.node.get_closest_marker("gpu") and dispatch.triton_routing is not None:
        from capszoo.kernels import tuning

        monkeypatch.setattr(tuning, "MAX_TILES", 1)
