"""Hostile files: whatever bytes a loader is given, it returns or says in one line what is wrong.

Each case is a file made hostile: bytes changed at random, or fields of its header or its text set to what an attacker
would write there. A loader may return, or raise an error of capszoo of one line; meanwhile it must run no code, open
no file outside the folder, take no more than `MEMORY` bytes and no longer than `SECONDS`.

`python tests/test_fuzz.py LOADER COUNT SEED` runs one loader for long; the tests marked `slow` do so for all.
"""

import csv
import functools
import io
import itertools
import json
import linecache
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from argparse import ArgumentTypeError, Namespace
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from timm.models import save_for_hf

import capszoo
from capszoo import pretrained
from capszoo.checkpoint import load_tensors, load_weights, read_metadata, save_weights
from capszoo.command_line import add_result, key_value, parse_resumable
from capszoo.command_line.training import build_parser
from capszoo.data import load_data
from capszoo.engine.run_state import check_resume_state, load_state, random_state, save_state
from capszoo.files import write_csv
from capszoo.models.capsnet import _cfg
from capszoo.prune.pareto import PARETO_COLUMNS
from capszoo.recipes import benchmark, export, prune

ROOT = Path(__file__).parents[1]
MEMORY = 3 << 30  # the largest image that PIL reads takes about 1.5 GiB
SECONDS = 20  # parsing the longest YAML takes 5 on an idle core

# ---- What no loader may do


class Forbidden(BaseException):
    """What a loader did and must not; no `except Exception` hides it."""


_watched: list[Path] = []
_crimes: list[str] = []
_OURS = [os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, ROOT, "/proc", "/sys", os.devnull)]
_PROGRAMS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn")
_OTHERS = ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "ctypes.dlopen", "shutil.rmtree")


def _audit(event: str, args: tuple) -> None:
    if not _watched:
        return
    crime = ""
    if event in _PROGRAMS or event in _OTHERS:
        crime = f"{event} {args!r}"
    elif event in ("open", "os.listdir", "os.scandir", "os.remove", "os.rename") and isinstance(args[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(args[0]))
        if not any(os.path.commonpath([path, str(folder)]) == str(folder) for folder in (_watched[0], *_OURS)):
            crime = f"{event} {path}"
    if crime:
        _crimes.append(crime)
        raise Forbidden(crime)


sys.addaudithook(_audit)


@contextmanager
def limits():
    """Bound the memory of this process, so that an allocation without bound fails at once."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _too_long(number, frame):
    raise Forbidden(f"more than {SECONDS} seconds")


def attempt(loader: str, folder: Path, data: bytes) -> str:
    """Give data to a loader; return 'result' or the type of the error, and raise if it did what it must not."""
    _crimes.clear()
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    _watched.append(folder)
    try:
        LOADERS[loader](folder, data)
        outcome = "result"
    except (ValueError, ArgumentTypeError) as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        text, cause = str(error), error
        while cause is not None:  # no error that stands for an allocation that failed
            assert not isinstance(cause, MemoryError) and "llocate" not in str(cause), repr(cause)
            cause = cause.__cause__ or cause.__context__
        assert len(text.splitlines()) == 1, text
        trace = error.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        frame = trace.tb_frame
        line = linecache.getline(frame.f_code.co_filename, trace.tb_lineno)
        # Not one of Python's own that passed through.
        ours = frame.f_globals.get("__name__", "").startswith("capszoo") and line.strip().startswith("raise")
        if not ours or not (
            type(error).__module__.startswith("capszoo") or type(error) in (ValueError, ArgumentTypeError)
        ):
            raise
        outcome = type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        _watched.clear()
    assert not _crimes, _crimes
    return outcome


# ---- Loaders, each of one file's bytes

SMALL = dict(img_size=8, kernel_size=3, conv_dim=3, num_classes=3)


@functools.cache
def _receiver() -> torch.nn.Module:
    return tiny()


def tiny(**kwargs) -> torch.nn.Module:
    return capszoo.create_model("capsnet_tiny", **{**SMALL, "num_types": 2, "decoder_dims": [3, 4], **kwargs})


def load_checkpoint(folder: Path, data: bytes) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(data)
    tensors, metadata = load_tensors(path)
    assert read_metadata(path) == metadata and all(isinstance(value, str) for value in metadata.values())
    load_weights(_receiver(), path)


def load_resume_state(folder: Path, data: bytes) -> None:
    path = folder / "resume.safetensors"
    path.write_bytes(data)
    check_resume_state(load_state(path), path)


def load_model(folder: Path, data: bytes) -> None:
    path = folder / "best.safetensors"
    path.write_bytes(data)
    model = capszoo.load_model(path)
    assert not any(value.is_meta for value in model.state_dict().values())
    assert sum(value.numel() for value in model.parameters()) <= len(data)


def load_folder(folder: Path, data: bytes) -> None:
    """config.json of a folder; its weights are sound, and pickles lie beside them."""
    (folder / "config.json").write_bytes(data)
    capszoo.create_model(f"local-dir:{folder}", pretrained=len(data) % 2 == 0)


def load_pretrained(folder: Path, data: bytes) -> None:
    """The file that timm reads."""
    path = folder / "model.safetensors"
    path.write_bytes(data)
    if len(data) % 2:
        capszoo.create_model(f"local-dir:{folder}", pretrained=True)
    else:
        options = {**SMALL, "num_types": 2, "decoder_dims": [3, 4]}
        capszoo.create_model("capsnet_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **options)


def load_table(folder: Path, data: bytes) -> None:
    (folder / "weights.json").write_bytes(data)
    before, pretrained.WEIGHTS_DIR = pretrained.WEIGHTS_DIR, folder
    try:
        for cfg in pretrained.shipped_cfgs(["capsnet_tiny"], _cfg).values():
            assert "file" not in cfg or Path(cfg["file"]).parent == folder
        pretrained.check_shipped("capsnet_tiny", {"file": str(folder / "capsnet_tiny.mnist.safetensors")})
    finally:
        pretrained.WEIGHTS_DIR = before


def load_config(folder: Path, data: bytes) -> None:
    path = folder / "config.yaml"
    path.write_bytes(data)
    args, _ = build_parser().parse(["--config", str(path)])
    assert len(repr(args)) < 100 * len(data) + 10_000  # no alias is written out


def resume_run(folder: Path, data: bytes) -> None:
    (folder / "args.yaml").write_bytes(data)
    assert parse_resumable(build_parser, {"resume", "device"}, ["--resume", str(folder)]).output == str(folder)


def load_key_value(folder: Path, data: bytes) -> None:
    key_value("name=" + data.decode("utf-8", "replace"))


def load_results(folder: Path, data: bytes) -> None:
    path = folder / "results.csv"
    path.write_bytes(data)
    try:
        add_result(path, {"top1": 0.5}, "train.py", [])
    except ValueError:
        assert path.read_bytes() == data  # nothing of it is lost
        raise


def load_card(folder: Path, data: bytes) -> None:
    """The first byte chooses: the weights of a run, or the result.json beside sound ones."""
    path, output = folder / ("run.safetensors" if data[:1] > b"\0" else "best.safetensors"), folder / "hub"
    (path if data[:1] > b"\0" else folder / "result.json").write_bytes(data[1:])
    try:
        export.hub(Namespace(weights=str(path), output=str(output), license=None))
        assert yaml.safe_load((output / "README.md").read_text().split("---\n")[1])["library_name"] == "timm"
    finally:
        if output.exists():
            for file in output.iterdir():
                file.unlink()
            output.rmdir()
        (folder / "result.json").unlink(missing_ok=True)


def load_recipe(folder: Path, data: bytes) -> None:
    (folder / "args.yaml").write_bytes(data)
    export.read_recipe(folder)


def resume_pruning(folder: Path, data: bytes) -> None:
    """The first byte chooses the file of a run of prune.py."""
    path = folder / _PRUNING[data[0] % 4 if data else 0]
    sound = path.read_bytes()
    path.write_bytes(data[1:])
    work = prune.Run(Namespace(quiet=True), None, None, [{}], folder, torch.device("cpu"), None, None, None)
    try:
        if path.name == "start.safetensors":
            work.begin(1)
        elif path.name == "summary.csv":
            work.write_summary()
        else:
            work.rows = [json.loads((folder / "round-0/round.json").read_text())]
            work.add_row(1)
            work.finish()
    finally:
        path.write_bytes(sound)


def load_timings(folder: Path, data: bytes) -> None:
    (folder / "timings.csv").write_bytes(data)
    benchmark.plot_again(Namespace(plot_only=str(folder / "timings.csv"), plots=str(folder / "plots")))


def load_mnist(folder: Path, data: bytes) -> None:
    """The first byte chooses the file."""
    path = folder / "MNIST/raw" / _MNIST[data[0] % 4 if data else 0]
    sound = path.read_bytes()
    path.write_bytes(data[1:])
    try:
        check_splits(load_data("mnist", folder))
    finally:
        path.write_bytes(sound)


def load_cifar(folder: Path, data: bytes) -> None:
    path = folder / "cifar-10-batches-py" / _CIFAR[data[0] % len(_CIFAR) if data else 0]
    path.write_bytes(data[1:])
    load_data("cifar10", folder)
    raise AssertionError("files that are not CIFAR-10 were taken for it")


def load_images(folder: Path, data: bytes) -> None:
    """The first byte chooses whether images are resized."""
    (folder / "train/a/0.png").write_bytes(data[1:])
    size = 5 if data[:1] > b"\x7f" else None
    splits = load_data(folder, img_size=size, val_fraction=0, max_bytes=1 << 20)
    check_splits(splits)
    if splits.train.images is None:
        splits.train.reader.read([0])


def load_labels(folder: Path, data: bytes) -> None:
    """The table of a folder whose images show several classes."""
    (folder / "train/labels.csv").write_bytes(data)
    splits = load_data(folder, val_fraction=0)
    check_splits(splits)
    assert splits.train.labels.shape == (len(splits.train), splits.num_classes)


def check_splits(splits) -> None:
    for split in (splits.train, splits.test):
        shape = split.reader.image_shape if split.images is None else tuple(split.images.shape[1:])
        assert shape == (splits.in_chans, *splits.img_size) and len(split) == len(split.labels) > 0
        assert 0 <= split.labels.min() and split.labels.max() < splits.num_classes == len(splits.class_names)


_MNIST = [f"{part}-{kind}-ubyte" for part, kind in itertools.product(("train", "t10k"), ("images-idx3", "labels-idx1"))]
_PRUNING = ["round-1/round.json", "round-1/start.safetensors", "round-1/summary.csv", "result.json"]
_CIFAR = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
LOADERS = {
    "checkpoint": load_checkpoint,
    "state": load_resume_state,
    "model": load_model,
    "folder": load_folder,
    "pretrained": load_pretrained,
    "table": load_table,
    "config": load_config,
    "resume": resume_run,
    "key_value": load_key_value,
    "results": load_results,
    "card": load_card,
    "recipe": load_recipe,
    "pruning": resume_pruning,
    "timings": load_timings,
    "mnist": load_mnist,
    "cifar": load_cifar,
    "images": load_images,
    "labels": load_labels,
}

# Cases of the nightly run: more where a case takes little, and where a file comes from strangers.
NIGHTLY = {
    "checkpoint": 30_000,
    "state": 25_000,
    "model": 8_000,
    "folder": 3_000,
    "pretrained": 3_000,
    "table": 10_000,
    "config": 3_000,
    "resume": 1_000,
    "key_value": 8_000,
    "results": 5_000,
    "card": 2_000,
    "recipe": 1_000,
    "pruning": 1_000,
    "timings": 300,
    "mnist": 3_000,
    "cifar": 500,
    "images": 10_000,
    "labels": 5_000,
}


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.write_text, (self.mark, "code ran"))


def make_sound(loader: str, folder: Path) -> list[bytes]:
    """Put what a loader needs into a folder; return sound contents of the file that is made hostile."""
    torch.manual_seed(0)
    seeds = []
    if loader in ("checkpoint", "model", "pretrained"):
        path = folder / "seed.safetensors"
        for name, options in (
            _MODELS if loader == "model" else [("capsnet_tiny", {}), ("capsnet_tiny", {"decoder": True})]
        ):
            options = {**SMALL, **options}
            model = capszoo.create_model(name, **options) if loader == "model" else tiny(**options)
            facts = {"model_args": model.arguments(), "mean": [0.5], "std": [0.25], "epoch": 3}
            save_weights(path, model, {"model": name, **facts})
            seeds.append(path.read_bytes())
        path.unlink()
    if loader in ("pretrained", "folder"):
        save_for_hf(tiny(), folder, safe_serialization="both")
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / "mark")))
        shutil.copy(folder / "pytorch_model.bin", folder / "weights.pth")
    if loader == "folder":
        seeds.append((folder / "config.json").read_bytes())
    if loader == "state":
        save_state(folder / "seed.safetensors", make_state())
        seeds.append((folder / "seed.safetensors").read_bytes())
    if loader == "table":
        table = json.loads((ROOT / "capszoo/weights/weights.json").read_text())
        table = {name: table[name] for name in ("capsnet_tiny.mnist", "capsnet_tiny.fashion_mnist")}
        for name, entry in table.items():
            (folder / f"{name}.safetensors").write_bytes(name.encode())
            entry["sha256"] = pretrained.sha256_of(folder / f"{name}.safetensors")
        seeds.append(json.dumps(table).encode())
    if loader in ("config", "resume"):
        defaults = {k: a.default for k, a in build_parser().destinations.items() if k not in ("config", "resume")}
        chosen = {k: defaults[k] for k in list(defaults)[:8]}
        small = {
            "model": "capsnet_tiny",
            "epochs": 3,
            "lr": 1e-3,
            "model_kwargs": {"conv_dim": 8, "keep_types": [0, 2]},
        }
        seeds += [yaml.safe_dump(values).encode() for values in (small, {**chosen, **small})]
    if loader == "key_value":
        seeds += [
            b"1",
            b"[1, 2, 3]",
            b"{a: 1e-3, b: [x, null]}",
            b"2001-01-01",
            b"0x1F",
            b"1:30",
            b"'text'",
            b"!!set {a, b}",
        ]
    if loader == "results":
        text = io.StringIO()
        writer = csv.DictWriter(text, ["top1", "date", "command"], lineterminator="\n")
        writer.writeheader()
        writer.writerow({"top1": 0.9, "date": "2025-01-01", "command": 'python train.py --lr "1, 2"'})
        seeds.append(text.getvalue().encode())
    if loader == "card":
        result = {"best_epoch": 3, "eval_top1": 0.5, "test_top1": 0.5, "amp": "none"}
        header = {"model": "capsnet_tiny", "dataset": "digits", "class_names": ["a", "b", "c"], **result, "epoch": 3}
        model = tiny()
        save_weights(folder / "best.safetensors", model, {**header, "model_args": model.arguments()})
        seeds += [b"\1" + (folder / "best.safetensors").read_bytes(), b"\0" + json.dumps(result).encode()]
    if loader == "recipe":
        for recipe in ("train", "prune"):
            values = {"model": "capsnet_tiny", "epochs": 3, "keep": {"types": [0, 2]}, "model_kwargs": {"conv_dim": 8}}
            seeds.append(f"# python recipes/{recipe}.py --config x\n{yaml.safe_dump(values)}".encode())
    if loader == "pruning":
        number = dict.fromkeys(PARETO_COLUMNS, 1)
        for i in (0, 1):
            (folder / f"round-{i}").mkdir()
            (folder / f"round-{i}/round.json").write_text(json.dumps({**number, "round": i}))
        (folder / "round-0/round.json").write_text(
            json.dumps({**number, "round": 0, "val_top1_before": None, "val_loss_before": None})
        )
        save_weights(folder / "best.safetensors", tiny(), {})
        header = {"model": "capsnet_tiny", "model_args": tiny().arguments(), "before": {"top1": 0.5, "loss": 1.0}}
        save_weights(folder / _PRUNING[1], tiny(), header)
        write_csv(folder / _PRUNING[2], prune.SUMMARY_COLUMNS, [dict.fromkeys(prune.SUMMARY_COLUMNS, 1)])
        (folder / _PRUNING[3]).write_text(json.dumps({"test_top1": 0.5, "total_seconds": 1.0}))
        seeds += [bytes([i]) + (folder / name).read_bytes() for i, name in enumerate(_PRUNING)]
    if loader in ("pruning", "timings"):  # matplotlib looks for its fonts once
        figure = Figure()
        figure.suptitle("text")
        figure.savefig(io.BytesIO(), format="png")
    if loader == "timings":
        path = folder / "timings.csv"
        base = {"median_ms": 1.0, "ratio_to_fused": 2.0, "peak_mib": 3.0, "precision": "float32", "model": "capsnet"}
        cells = [("routing", "", "plain"), ("training step", "", "fused"), ("layer", "routing", "fused")]
        rows = [{**base, "batch_size": 2, "subject": s, "layer": name, "variant": v} for s, name, v in cells]
        write_csv(path, benchmark.COLUMNS, rows)
        seeds.append(path.read_bytes())
    if loader == "mnist":
        (folder / "MNIST/raw").mkdir(parents=True)
        (folder / "MNIST/processed").mkdir()
        for name in ("training.pt", "test.pt"):  # torchvision prefers them
            (folder / "MNIST/processed" / name).write_bytes(pickle.dumps(Bomb(folder / "mark")))
        for i, name in enumerate(_MNIST):
            shape = (20,) if "labels" in name else (20, 6, 5)
            values = bytes(range(10)) * 2 if "labels" in name else bytes(range(200)) * 3
            content = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + values
            (folder / "MNIST/raw" / name).write_bytes(content)
            seeds.append(bytes([i]) + content)
    if loader == "cifar":
        (folder / "cifar-10-batches-py").mkdir()
        for i, name in enumerate(_CIFAR):
            content = pickle.dumps([Bomb(folder / "mark"), {"data": b"", "labels": []}])
            (folder / "cifar-10-batches-py" / name).write_bytes(content)
            seeds.append(bytes([i]) + content)
    if loader == "labels":
        for part in ("train", "test"):
            (folder / part / "b").mkdir(parents=True)
            for name in ("0.png", "b/1.png"):
                Image.new("RGB", (6, 5), "red").save(folder / part / name)
            (folder / part / "labels.csv").write_text('file,cat,"dog, too"\n0.png,0,1\n"b/1.png",1,1\n')
        seeds.append((folder / "train/labels.csv").read_bytes())
    if loader == "images":
        for part in ("train", "test"):
            (folder / part / "a").mkdir(parents=True)
            Image.new("RGB", (6, 5), "red").save(folder / part / "a/0.png")
        seeds += [bytes([i]) + content for content in make_images() for i in (0, 255)]
    return seeds


_MODELS = [
    ("capsnet_tiny", {"num_types": 2, "decoder_dims": [3, 4], "decoder": True}),
    ("capsnet_tiny", {"num_types": 3, "keep_types": [2, 0], "keep_capsules": [0, 3, 4]}),
    ("capsnet", {"num_types": 3, "keep_types": 2, "keep_capsules": [1, 5], "caps_dim": 2}),
    ("cnn_baseline_tiny", {}),
]


def make_state() -> dict:
    """What engine.Trainer writes."""
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    position = dict(epoch=1, step=2, seconds=0.5, total_seconds=3.0, skipped=0, best={"epoch": 1})
    return {
        "position": {**position, "history": [{"epoch": 1, "eval_top1": 0.5, "eval_loss": None}]},
        "sums": torch.zeros(5, dtype=torch.float64),
        "lr": 1e-3,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {},
        "random": random_state(),
    }


def make_images() -> list[bytes]:
    """Images of many formats: also those that are refused, and those that hold more than pixels."""
    rng = random.Random(0)
    image = Image.frombytes("RGB", (6, 5), rng.randbytes(90))
    exif = Image.Exif()
    exif[0x0112] = 6
    several = {"save_all": True, "append_images": [image.rotate(90)], "duration": 10}
    files = [
        *((image, name, {}) for name in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "EPS", "ICO", "TGA")),
        *((image, name, several) for name in ("PNG", "GIF", "TIFF", "WEBP")),
        (image, "JPEG", {"exif": exif}),
        (image, "TIFF", {"compression": "tiff_lzw"}),
        (image.convert("P"), "PNG", {"transparency": 0}),
        (image.convert("L").convert("I;16"), "PNG", {}),
        (image.convert("F"), "TIFF", {}),
        (image.convert("RGBA"), "WEBP", {"lossless": True}),
    ]
    contents = []
    for picture, name, options in files:
        file = io.BytesIO()
        picture.save(file, name, **options)
        contents.append(file.getvalue())
    return contents


# ---- Hostile contents

BIG, DEEP, FLAT = "@BIG@", "@DEEP@", "@FLAT@"  # too large to build for every case: put into the text at the end
_TEXTS = {BIG: "9" * 5000, DEEP: "[" * 20_000 + "]" * 20_000, FLAT: "[" + "0," * 5_000 + "0]"}
_LEAVES = [
    *(
        None,
        True,
        False,
        0,
        1,
        2,
        3,
        -1,
        -2,
        7,
        28,
        100,
        10**5,
        10**6,
        10**9,
        10**12,
        2**31,
        2**32,
        2**62,
        2**63,
        2**64,
    ),
    *(-(2**63), 10**30, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), float("-inf")),
    *("", "x", "0", "../canary", "/etc/passwd", "../../canary.safetensors", "local-dir:..", "hf-hub:a/b", "cuda:99"),
    *(
        "meta",
        "__tensor__",
        "__dict__",
        "float16",
        "é\n\x00\u2028",
        "a" * 3000,
        "*a",
        "!!python/object:os.system",
        "file:///etc",
    ),
    *([], {}, [[]], [0], [1, 2, 3], [10**9, 10**9], [0, 2**62], [-1, 5], ["a"], [None], {"a": 1}, {"__tensor__": "x"}),
    *({"__dict__": 3}, {"__dict__": [[[], 1]]}, {"__dict__": [["a", 1], ["a", 2]]}, list(range(40)), BIG, DEEP, FLAT),
]
_KEYS = [
    *("model", "model_args", "num_classes", "img_size", "in_chans", "conv_dim", "num_types", "caps_dim", "class_dim"),
    *("kernel_size", "keep_types", "keep_capsules", "share_weights", "decoder", "decoder_dims", "num_routing", "dtype"),
    *(
        "device",
        "drop_rate",
        "global_pool",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
    ),
    *(
        "file",
        "url",
        "hf_hub_id",
        "hf_hub_filename",
        "custom_load",
        "source",
        "state_dict",
        "architecture",
        "input_size",
    ),
    *(
        "fixed_input_size",
        "first_conv",
        "classifier",
        "label_offset",
        "features_only",
        "out_indices",
        "feature_cls",
        "name",
    ),
    *(
        "__metadata__",
        "shape",
        "data_offsets",
        "capszoo",
        "state",
        "cache_dir",
        "path",
        "self",
        "x",
        "",
        "..",
        "config",
    ),
    *("resume", "output", "epochs", "lr", "sha256", "label_names", "pool_size", "../../x.y", "capsnet_tiny.x/../y"),
]
_DTYPES = "F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F8_E8M0 F4 F6_E2M3 F6_E3M2 I64 I32 I16 I8 U64 U32 U16 U8 BOOL C64 X".split()
_LENGTHS = [
    0,
    1,
    2,
    7,
    8,
    100,
    10**8,
    10**8 + 1,
    2**31 - 1,
    2**31,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 8,
    2**64 - 1,
]

# One integer draws a case and the generator makes it: ten times as fast as drawing each choice, and as many shapes.
cases = st.integers(0, 2**64 - 1)


def places(tree) -> list[tuple]:
    """All places of a tree of JSON, as (container, key)."""
    found, left = [], [tree]
    while left:
        node = left.pop()
        if isinstance(node, (dict, list)):
            for key in node if isinstance(node, dict) else range(len(node)):
                found.append((node, key))
                left.append(node[key])
    return found


def edit(tree, rng: random.Random):
    """Make some places of a tree of JSON hostile."""
    box = [tree]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        node, key = rng.choice(places(box))
        job = rng.random()
        leaf = json.loads(json.dumps(rng.choice(_LEAVES)))
        if job < 0.55 or node is box:
            node[key] = leaf if node is not box or rng.random() < 0.05 else node[key]
        elif job < 0.7:
            del node[key]
        elif job < 0.85:
            other, name = rng.choice(places(box))
            node[key] = json.loads(json.dumps(other[name]))
        elif isinstance(node, dict):
            node[rng.choice(_KEYS)] = leaf
        else:
            node.insert(rng.randrange(len(node) + 1), leaf)
    return box[0]


def dump(tree) -> str:
    text = json.dumps(tree)
    for mark, meaning in _TEXTS.items():
        text = text.replace(f'"{mark}"', meaning)
    return text


def damage(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert, repeat or overwrite bytes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 64) + 1)
        job = rng.randrange(7)
        if job == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif job == 1:
            del data[at:]
        elif job == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 20))
        elif job == 3:
            del data[at : at + rng.randrange(1, 20)]
        elif job == 4:
            end = at + rng.randrange(1, 50)
            data[at:at] = data[at:end] * rng.choice((1, 2, 50))
        else:
            size, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
            data[at : at + size] = (rng.choice(_LENGTHS) % 256**size).to_bytes(size, order)
    return bytes(data)


def hostile_tensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a hostile header."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    job = rng.random()
    if job < 0.45:  # what capszoo reads of the header
        metadata = header["__metadata__"]
        inner = [key for key in ("model_args", "state", "mean", "std") if key in metadata]
        if inner and rng.random() < 0.8:
            key = inner[0] if rng.random() < 0.8 else rng.choice(inner)
            metadata[key] = dump(edit(json.loads(metadata[key]), rng))
        else:
            edit(metadata, rng)
            header["__metadata__"] = {
                key: value if isinstance(value, str) else dump(value) for key, value in metadata.items()
            }
    elif job < 0.75:  # tensors of other names, types and shapes, for which the file has room
        names = [name for name in header if name != "__metadata__"]
        for _ in range(rng.choice((1, 1, 2, 5))):
            name = rng.choice(names)
            if rng.random() < 0.2:
                header[rng.choice((*_KEYS, *names))] = header.get(name, {"dtype": "F32", "shape": [2]})
            elif rng.random() < 0.3:
                header.pop(name, None)
            elif name in header:
                shape = header[name]["shape"]
                if rng.random() < 0.5:
                    header[name]["dtype"] = rng.choice(_DTYPES)
                elif shape:
                    shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 9, 2**40))
                else:
                    shape.append(rng.choice((0, 1, 2)))
        at = 0
        for name, entry in header.items():
            if name != "__metadata__":
                bits = {"F4": 4, "F6": 6, "F8": 8}.get(entry["dtype"][:2]) or int(
                    "".join(c for c in entry["dtype"] if c.isdigit()) or 8
                )
                size = bits
                for side in entry["shape"]:
                    size *= side
                header[name] = {**entry, "data_offsets": [at, at + size // 8]}
                at += size // 8
        body = (body + bytes(max(0, min(at, 1 << 16) - len(body))))[: min(at, 1 << 16)]
    else:
        header = edit(header, rng)
    text = dump(header).encode()
    if rng.random() < 0.1:
        text = damage(text, rng)
    length = len(text) if rng.random() < 0.93 else rng.choice((*_LENGTHS, max(0, len(text) - 1), len(text) + 1))
    return length.to_bytes(8, "little") + text + body


def hostile_json(data: bytes, rng: random.Random) -> bytes:
    return dump(edit(json.loads(data), rng)).encode()


_YAML = [
    *(
        "a: &a [x, x]\n",
        "b: &b [*a, *a]\n",
        "model: *a\n",
        "<<: *a\n",
        "model: &x [*x]\n",
        "lr: !!python/object/apply:os.system [ls]\n",
    ),
    *(
        "lr: !!timestamp x\n",
        "epochs: !!int x\n",
        "lr: !!float x\n",
        "decoder: !!bool x\n",
        "model: !!binary '*'\n",
        "lr: .nan\n",
    ),
    *(
        "epochs: 0x_\n",
        "epochs: 0b_\n",
        "epochs: 1:99:99\n",
        "model: 2001-99-99\n",
        "model: 2001-01-01T99:99:99Z\n",
        "epochs: ._\n",
    ),
    *(
        "? [a, b]\n: 1\n",
        "1: 2\n",
        "null: x\n",
        "model_kwargs: {conv_dim: {a: [1, {b: 2}]}}\n",
        "--- \n",
        "...\n",
        "%YAML 9.9\n",
    ),
    *(
        "%TAG ! tag:yaml.org,2002:python/\n--- !object:x\n",
        "config: x\n",
        "resume: ..\n",
        "output: ../x\n",
        "model: |\n",
        "\t",
        "\x00",
    ),
    *(
        "model: " + "[" * 900 + "\n",
        "- " * 2000 + "\n",
        "model: " + "{a: " * 1000,
        "epochs: " + "9" * 6000 + "\n",
        "? " * 1500,
    ),
    *(
        "epochs: " + "1:" * 3000 + "1\n",
        "model: '" + "a\n" * 500,
        "lr: 1e" + "9" * 400 + "\n",
        "k" * 5000 + ": 1\n",
        "#" * 9999,
    ),
    *(
        "model_kwargs: [" + "a=1, " * 2000 + "]\n",
        "model_kwargs: ['a=[[[', 'b=*x', 'c=!!int x']\n",
        "decoder: [true]\n",
    ),
]


def hostile_text(data: bytes, rng: random.Random) -> bytes:
    """Lines of YAML among those of a sound file."""
    if rng.random() < 0.4:
        tree = yaml.safe_load(data)
        return dump(edit(tree, rng)).encode()  # JSON is YAML
    lines = data.decode("utf-8", "replace").splitlines(keepends=True)
    for _ in range(rng.choice((1, 1, 2, 5))):
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(_YAML))
    return "".join(lines).encode()


def hostile_value(data: bytes, rng: random.Random) -> bytes:
    """A value as a command line has it: text that means something to YAML."""
    pieces = [
        *"[]{},:&*!|>'\"%@`?-#\n \t",
        "&a ",
        "*a",
        "!!int ",
        "!!timestamp ",
        "<<: ",
        "0x",
        "1:",
        "2001-01-",
        "9" * 50,
        "a",
        "[" * 999,
    ]
    text = data.decode() if rng.random() < 0.5 else rng.choice(_YAML).partition(": ")[2]
    for _ in range(rng.randrange(6)):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(pieces) + text[at:]
    return text.encode()


def hostile_table(data: bytes, rng: random.Random) -> bytes:
    pieces = [
        b'"',
        b",",
        b"\n",
        b"\r",
        b"\x00",
        b'""',
        b"\xff",
        b"a" * 140_000,
        b",,,,,,",
        b"=cmd()",
        b"top1,top1\n",
        "é".encode(),
    ]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice(pieces) + data[at:]
    return data


def hostile_idx(data: bytes, rng: random.Random) -> bytes:
    """One of MNIST's files with other types and sizes, some of which agree with its length."""
    count = data[4]
    shape = list(struct.unpack(f">{count}I", data[5 : 5 + 4 * count]))
    body = data[5 + 4 * count :]
    job = rng.randrange(4)
    if job == 0:
        shape[rng.randrange(count)] = rng.choice((0, 1, 2, 9, 11, 2**31, 2**32 - 1))
    elif job == 1:
        shape = rng.choice(
            [[len(body)], [1, len(body)], [len(body), 1, 1], [1, 1, len(body)], [20, 3, 10], [20, 30, 1], [0, 0, 0]]
        )
    elif job == 2:
        body = bytes(rng.choice((0, 9, 10, 11, 255)) for _ in body)
    else:
        shape = [rng.choice((1, 9, 2**16, 2**20)) for _ in range(rng.choice((0, 1, 2, 3, 4, 255)))]
    kind = 8 if rng.random() < 0.8 else rng.choice((0, 9, 10, 11, 12, 13, 14, 255))
    ndim = len(shape) if rng.random() < 0.9 else rng.randrange(256)
    return data[:1] + struct.pack(f">HBB{len(shape)}I", 0, kind, ndim, *shape) + body


def hostile_image(data: bytes, rng: random.Random) -> bytes:
    """An image whose header claims other sizes; PNG with its checksums set right."""
    import zlib

    choose, data = data[:1], bytearray(data[1:])
    size = rng.choice((0, 1, 7, 300, 9000, 9500, 20_000, 65_535, 2**24, 2**31 - 1, 2**31, 2**32 - 1))
    if data[:4] == b"\x89PNG":
        at = rng.choice((16, 20))
        data[at : at + 4] = size.to_bytes(4, "big")
        if rng.random() < 0.3:
            data[rng.choice((24, 25, 28))] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16))
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    elif data[:2] == b"BM":
        at = rng.choice((18, 22, 14, 28, 30, 46))
        data[at : at + 4] = size.to_bytes(4, "little")
    elif data[:2] == b"P6":
        return (
            choose
            + f"P{rng.randrange(9)} {size} {rng.choice((size, 5))} {rng.choice((255, 65535, 0, -1, 9))}\n".encode()
            + data[11:]
        )
    elif data[:3] == b"GIF":
        at = rng.choice((6, 8))
        data[at : at + 2] = (size % 65536).to_bytes(2, "little")
    elif data[:2] == b"\xff\xd8" and (at := data.find(b"\xff\xc0")) > 0:
        at += rng.choice((5, 7))
        data[at : at + 2] = (size % 65536).to_bytes(2, "big")
    elif data[:2] in (b"II", b"MM"):  # an entry of the directory
        start = int.from_bytes(data[4:8], "little")
        count = int.from_bytes(data[start : start + 2], "little")
        at = start + 2 + 12 * rng.randrange(max(1, count)) + rng.choice((0, 2, 4, 8))
        data[at : at + 4] = size.to_bytes(4, "little")
    else:
        return choose + damage(bytes(data), rng)
    return choose + bytes(data)


HOSTILE = {
    **dict.fromkeys(("checkpoint", "state", "model", "pretrained"), hostile_tensors),
    **dict.fromkeys(("folder", "table"), hostile_json),
    **dict.fromkeys(("config", "resume"), hostile_text),
    "key_value": hostile_value,
    "results": hostile_table,
    "labels": hostile_table,
    "timings": hostile_table,
    "recipe": hostile_text,
    "card": lambda data, rng: data[:1] + (hostile_tensors if data[0] else hostile_json)(data[1:], rng),
    "pruning": lambda data, rng: (
        data[:1] + (hostile_json, hostile_tensors, hostile_table, hostile_json)[data[0]](data[1:], rng)
    ),
    "mnist": hostile_idx,
    "images": hostile_image,
}


def make_case(loader: str, seeds: list[bytes], number: int) -> bytes:
    """The case of a number: mostly a file with hostile fields, else damaged bytes, or both."""
    rng = random.Random(number)
    data, job = rng.choice(seeds), rng.random()
    if loader in HOSTILE and job < 0.8:
        data = HOSTILE[loader](data, rng)
    if loader not in HOSTILE or job > 0.75:
        data = damage(data, rng)
    return data


@contextmanager
def place(loader: str):
    """A folder of its own within one that holds what no case may reach; the contents of sound files."""
    with tempfile.TemporaryDirectory() as outer:
        outer = Path(outer).resolve()
        (outer / "folder").mkdir()
        seeds = make_sound(loader, outer / "folder")
        (outer / "canary").write_text("model: capsnet\n")
        save_weights(outer / "canary.safetensors", tiny(), {"model": "capsnet_tiny"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for data in seeds:  # sound as they are, and whatever is loaded late is loaded
                attempt(loader, outer / "folder", data)
            yield outer / "folder", seeds
        assert not list(outer.rglob("mark")), "code of a pickle ran"


def fuzz(loader: str, count: int, number: int = 0) -> tuple[Counter, float]:
    """Run `count` cases; return how often each outcome came, and the seconds of the slowest."""
    outcomes, slowest = Counter(), 0.0
    with place(loader) as (folder, seeds), limits():

        @seed(number)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(cases)
        def check(case):
            nonlocal slowest
            data = make_case(loader, seeds, case)
            start = time.perf_counter()
            outcomes[attempt(loader, folder, data)] += 1
            slowest = max(slowest, time.perf_counter() - start)

        check()
    return outcomes, slowest


# ---- Tests


@pytest.mark.parametrize("loader", LOADERS)
def test_fuzz(loader):
    outcomes, _ = fuzz(loader, 60)
    assert outcomes.total() == 60 and outcomes.keys() - {"result"}


@pytest.mark.slow
def test_nightly(tmp_path):
    """At least 100,000 cases, each loader in a process of its own, one after the other."""
    number = int(time.time()) // 86_400  # other cases each day; the number is in the output
    total = 0
    for loader, count in NIGHTLY.items():
        command = [sys.executable, __file__, loader, str(count), str(number)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=env)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
        total += json.loads(done.stdout.splitlines()[-1])["cases"]
        print(done.stdout.splitlines()[-1])
    assert total >= 100_000


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_atheris(loader, tmp_path):
    """Cases that reach new branches breed others; see fuzz_atheris.py."""
    pytest.importorskip("atheris")
    command = [sys.executable, str(Path(__file__).with_name("fuzz_atheris.py")), loader, "-runs=2000", "-seed=1"]
    # libFuzzer ends the process where it stands, and leaves its folders.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "Done 2000 runs" in done.stderr


if __name__ == "__main__":
    loader, count, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    start = time.perf_counter()
    outcomes, slowest = fuzz(loader, count, number)
    seconds = round(time.perf_counter() - start, 1)
    facts = {"loader": loader, "seed": number, "cases": outcomes.total(), "seconds": seconds}
    print(json.dumps({**facts, "slowest": round(slowest, 2), **outcomes}))
