"""Sound files to start from, and what must never run."""

import csv
import gzip
import io
import json
import pickle
import random
import shutil
import struct
from pathlib import Path

import torch
import yaml
from loaders import CIFAR_BINARY_FILES, CIFAR_FILES, MNIST_FILES, NORB_FILES, PRUNING_FILES, SMALL, tiny
from matplotlib.figure import Figure
from PIL import Image
from timm.models import save_for_hf

import capszoo
from capszoo import pretrained
from capszoo.checkpoint import save_weights
from capszoo.command_line.training import build_parser
from capszoo.engine.run_folder import SUMMARY_COLUMNS
from capszoo.engine.run_state import random_state, save_state
from capszoo.files import write_csv
from capszoo.prune.pareto import PARETO_COLUMNS
from capszoo.recipes import benchmark

ROOT = Path(__file__).parents[2]


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
        save_weights(folder / PRUNING_FILES[1], tiny(), header)
        write_csv(folder / PRUNING_FILES[2], SUMMARY_COLUMNS, [dict.fromkeys(SUMMARY_COLUMNS, 1)])
        (folder / PRUNING_FILES[3]).write_text(json.dumps({"test_top1": 0.5, "total_seconds": 1.0}))
        seeds += [bytes([i]) + (folder / name).read_bytes() for i, name in enumerate(PRUNING_FILES)]
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
        for i, name in enumerate(MNIST_FILES):
            shape = (20,) if "labels" in name else (20, 6, 5)
            values = bytes(range(10)) * 2 if "labels" in name else bytes(range(200)) * 3
            content = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + values
            (folder / "MNIST/raw" / name).write_bytes(content)
            seeds.append(bytes([i]) + content)
    if loader == "cifar":
        (folder / "cifar-10-batches-py").mkdir()
        for i, name in enumerate(CIFAR_FILES):
            content = pickle.dumps([Bomb(folder / "mark"), {"data": b"", "labels": []}])
            (folder / "cifar-10-batches-py" / name).write_bytes(content)
            seeds.append(bytes([i]) + content)
    if loader == "cifar_binary":
        (folder / "cifar-100-binary").mkdir()
        records = b"".join(bytes([i % 20, i % 100]) + bytes([i]) * 3072 for i in range(20))
        for i, name in enumerate(CIFAR_BINARY_FILES):
            content = "\n".join(f"name{j}" for j in range(100)).encode() if name.endswith(".txt") else records
            (folder / "cifar-100-binary" / name).write_bytes(content)
            seeds.append(bytes([i]) + content)
    if loader == "norb":
        (folder / "small_norb").mkdir()
        for i, name in enumerate(NORB_FILES):
            shape, magic, values = (10, 2, 6, 5), 0x1E3D4C55, bytes(range(200)) * 3
            if "cat" in name:
                shape, magic, values = (10, 1, 1), 0x1E3D4C54, struct.pack("<10i", *range(5), *range(5))
            content = struct.pack(f"<Ii{len(shape)}i", magic, 1 if "cat" in name else 4, *shape) + values
            (folder / "small_norb" / name).write_bytes(content)
            seeds += [bytes([i]) + content, bytes([i + 4]) + gzip.compress(content, mtime=0)]
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
