"""The loaders that are fuzzed, each of the bytes of one file."""

import functools
import itertools
import json
from argparse import Namespace
from pathlib import Path

import torch
import yaml

import capszoo
from capszoo import pretrained
from capszoo.checkpoint import load_tensors, load_weights, read_metadata
from capszoo.command_line import add_result, key_value, parse_resumable
from capszoo.command_line.training import build_parser
from capszoo.data import load_data
from capszoo.engine.run_state import check_resume_state, load_state
from capszoo.losses import MarginLoss
from capszoo.models.capsnet import _cfg
from capszoo.prune.options import PruneOptions
from capszoo.prune.run import Run
from capszoo.recipes import benchmark, export

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
    path = folder / PRUNING_FILES[data[0] % 4 if data else 0]
    sound = path.read_bytes()
    path.write_bytes(data[1:])
    work = Run(PruneOptions(), MarginLoss(), None, [{}], folder, torch.device("cpu"), lambda text: None, lambda: False)
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
    path = folder / "MNIST/raw" / MNIST_FILES[data[0] % 4 if data else 0]
    sound = path.read_bytes()
    path.write_bytes(data[1:])
    try:
        check_splits(load_data("mnist", folder))
    finally:
        path.write_bytes(sound)


def load_cifar(folder: Path, data: bytes) -> None:
    path = folder / "cifar-10-batches-py" / CIFAR_FILES[data[0] % len(CIFAR_FILES) if data else 0]
    path.write_bytes(data[1:])
    load_data("cifar10", folder)
    raise AssertionError("files that are not CIFAR-10 were taken for it")


def load_cifar_binary(folder: Path, data: bytes) -> None:
    """The first byte chooses the file."""
    path = folder / "cifar-100-binary" / CIFAR_BINARY_FILES[data[0] % 3 if data else 0]
    sound = path.read_bytes()
    path.write_bytes(data[1:])
    try:
        check_splits(load_data("cifar100", folder, val_fraction=0))
    finally:
        path.write_bytes(sound)


def load_norb(folder: Path, data: bytes) -> None:
    """The first byte chooses the file, and whether it is packed by gzip."""
    path = folder / "small_norb" / NORB_FILES[data[0] % 4 if data else 0]
    packed = path.with_name(f"{path.name}.gz")
    sound = path.read_bytes()
    if data[:1] > b"\3":
        path.unlink()
        packed.write_bytes(data[1:])
    else:
        path.write_bytes(data[1:])
    try:
        check_splits(load_data("small_norb", folder, val_fraction=0, max_bytes=1 << 20))
    finally:
        packed.unlink(missing_ok=True)
        path.write_bytes(sound)


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


MNIST_FILES = [
    f"{part}-{kind}-ubyte" for part, kind in itertools.product(("train", "t10k"), ("images-idx3", "labels-idx1"))
]
PRUNING_FILES = ["round-1/round.json", "round-1/start.safetensors", "round-1/summary.csv", "result.json"]
CIFAR_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
CIFAR_BINARY_FILES = ["train.bin", "test.bin", "fine_label_names.txt"]
NORB_FILES = [
    f"smallnorb-5x{toys}x9x18x6x2x96x96-{part}-{kind}.mat"
    for toys, part in (("46789", "training"), ("01235", "testing"))
    for kind in ("dat", "cat")
]
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
    "cifar_binary": load_cifar_binary,
    "norb": load_norb,
    "images": load_images,
    "labels": load_labels,
}
