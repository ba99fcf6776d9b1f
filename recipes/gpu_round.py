"""All GPU evidence in one call, within one deadline, without a network and without capszoo installed.

    bash recipes/gpu_round.sh [OUTPUT_FOLDER] [DATA_FOLDER]      # default runs/gpu_round and data
    ROUND_SECONDS=780 bash recipes/gpu_round.sh                  # default 520
    DEVICE=cpu bash recipes/gpu_round.sh                         # tries every part in little, where there is no GPU

First, side by side, what only has to be right: the GPU tests, which also compile what is timed later, memcheck, the
paper's rows and the short cycles on MNIST by several workers, and capsnet_resnet_ia on CIFAR-10, for whose sake workers
are stopped if its time runs out. Then, alone on the machine, what is timed: the epochs of those rows, a training of
capsnet on MNIST towards 99.37 % on the test set (the accuracy of FasTrCaps's baseline), and the benchmark.

Needs torch, timm, safetensors, rich, pytest and hypothesis; the rows need optuna, figures matplotlib. What is missing
is said first. DATA_FOLDER has MNIST/raw/*-ubyte, or the same files as .gz, which are unpacked elsewhere, and
cifar-10-batches-bin, which may also come while the round runs; what has no data is left out.

OUTPUT_FOLDER gets round.tar.gz with versions, logs, tables, figures and results, made anew after each part, and the
weights in pieces of 15 MB (cat NAME.safetensors.* > NAME.safetensors). Exit code 1 if a part failed.
"""

import argparse
import contextlib
import csv
import gzip
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "timm", "safetensors", "rich", "pytest", "hypothesis", "yaml")
PIECE = 15_000_000
# Of the whole time, what all runs side by side in.
TOGETHER = 0.66
EPOCHS_OF_ROWS, EPOCHS_OF_CIFAR = 15, 60
ROWS = [
    "paper/1-baseline", "paper/6-warm_ada_batch", "paper/5-ada_batch", "paper/8-warm_ada_batch_weight_sharing",
    "paper/2-exp_decay", "paper/3-one_cycle", "paper/4-warm_restarts", "paper_as_coded/4-warm_restarts_as_coded",
    "paper/7-weight_sharing", "fast_gpu",
]  # fmt: skip
CIFAR = "recipes/configs/cifar10_ia.yaml"
FAMILIES = (
    "efficient_capsnet capsnet_conv_ia capsnet_resnet_ia capsnet_resnet_sr capsnet_em_mini capsnet_vb_mini".split()
)


class Part:
    """A command that runs in the background, into its log."""

    def __init__(self, name: str, log: Path, command: list[Any], **environment: str):
        self.name, self.started, self.log, self.stopped, self.told = name, time.monotonic(), log, False, False
        with open(log, "a") as out:
            self.process = subprocess.Popen(
                [str(word) for word in command], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                env={**os.environ, **environment}, start_new_session=True,
            )  # fmt: skip

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def pause(self, stopped: bool) -> None:
        self.stopped = stopped
        self.send(signal.SIGSTOP if stopped else signal.SIGCONT)

    def end(self, grace: float = 8) -> None:
        """Ask it to save and end; it is killed if it does not."""
        if self.code is None:
            self.pause(False)
            self.send(signal.SIGTERM)
            try:
                self.process.wait(grace)
            except subprocess.TimeoutExpired:
                self.send(signal.SIGKILL)
                self.process.wait()


class Round:
    """The parts, their time, and what they leave behind."""

    def __init__(self, out: Path, data: Path, work: Path):
        self.out, self.data, self.work, self.round = out, data, work, work / "round"
        self.device = os.environ.get("DEVICE", "cuda")
        self.total = float(os.environ.get("ROUND_SECONDS", "520"))
        self.start, self.failed, self.parts = time.monotonic(), False, []
        (work / "data/MNIST/raw").mkdir(parents=True)
        self.round.mkdir()
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {  # of the parts
            # Packages are found from the root, which has links where an installation has folders.
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "TRITON_PRINT_AUTOTUNING": "1",  # the tile sizes chosen, in the logs
        }

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def left(self, share: float = 1.0) -> float:
        """Seconds until so much of the whole time is over, but for 10 to pack what there is."""
        return self.start + share * self.total - 10 - time.monotonic()

    def say(self, text: str) -> None:
        print(text, flush=True)
        with open(self.round / "parts.txt", "a") as file:
            file.write(text + "\n")

    def launch(self, name: str, *command: Any, **environment: str) -> Part:
        part = Part(name, self.round / f"{name}.log", list(command), **{**self.environment, **environment})
        self.parts.append(part)
        return part

    def background(self, name: str, *arguments: Any) -> Part:
        """Start Python with these arguments."""
        return self.launch(name, sys.executable, *arguments)

    def tell(self, part: Part, cut: bool = False) -> None:
        """Say once how a part ended; one that ended by itself and badly shows its last lines."""
        if part.told or part.code is None:
            return
        part.told = True
        how = "cut off" if cut else f"exit code {part.code}"
        self.say(f"{part.name}: {how} after {time.monotonic() - part.started:.0f} s")
        if part.code and not cut:
            self.failed = True
            print("\n".join(part.log.read_text(errors="replace").splitlines()[-12:]), flush=True)
        self.pack()

    def alone(self, name: str, share: float, *command: Any) -> None:
        """Run a part with nothing beside it, at most until so much of the whole time is over."""
        if self.left(share) < 5:
            self.say(f"{name}: left out, no time")
            return
        part = self.background(name, *command)
        try:
            part.process.wait(self.left(share))
        except subprocess.TimeoutExpired:
            part.end()
            self.tell(part, cut=True)
        self.tell(part)

    def pack(self) -> None:
        """What there is so far, so that a round that is cut short leaves it."""
        archive = self.work / "round.tar.gz"
        with tarfile.open(archive, "w:gz") as file:
            for path in sorted(self.round.rglob("*")):
                if path.suffix != ".safetensors" and path.is_file() and not path.name.endswith("-journal"):
                    file.add(path, path.relative_to(self.work))
        shutil.move(archive, self.out / "round.tar.gz")

    def keep_weights(self, folder: Path, name: str) -> None:
        """Copy the best weights of a training in pieces."""
        if (folder / "best.safetensors").is_file():
            content = (folder / "best.safetensors").read_bytes()
            for number, begin in enumerate(range(0, len(content), PIECE)):
                (self.out / f"{name}.safetensors.{number:02}").write_bytes(content[begin : begin + PIECE])

    def has_mnist(self) -> bool:
        """Make MNIST ready from links or the unpacked files."""
        raw = self.work / "data/MNIST/raw"
        for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
            source, target = self.data / f"MNIST/raw/{name}-ubyte", raw / f"{name}-ubyte"
            if source.is_file():
                target.symlink_to(source)
            elif source.with_name(source.name + ".gz").is_file():
                with gzip.open(source.with_name(source.name + ".gz")) as packed, open(target, "wb") as file:
                    shutil.copyfileobj(packed, file)
        return len(list(raw.iterdir())) == 4


def check_machine(round: Round) -> None:
    """Say what is here; leave before anything is started if something that all needs is not."""
    lines = []
    for name in (*NEEDED, "optuna", "matplotlib", "triton", "numpy"):
        try:
            lines.append(f"{name} {importlib.metadata.version({'yaml': 'pyyaml'}.get(name, name))}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} not installed")
    lines.append(f"python {platform.python_version()}")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f"gpu_round.sh needs {', '.join(missing)}: install them first")
    if round.on_gpu:
        import torch

        if not torch.cuda.is_available():
            sys.exit("gpu_round.sh needs a CUDA GPU, and torch that sees it; DEVICE=cpu tries it without")
        lines.append(f"GPU {torch.cuda.get_device_name()}, compute capability {torch.cuda.get_device_capability()}")
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv"]
        lines.append(subprocess.run(query, capture_output=True, text=True).stdout.strip())
    (round.round / "versions.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def write_rows(round: Round) -> Path:
    """The rows of the grid, shorter than the paper's; those with phases at batch 1 take as long as all others."""
    folder = round.work / "rows"
    folder.mkdir()
    rows = ROWS if round.on_gpu else ["paper_tiny/1-baseline"]
    for number, row in enumerate(rows):
        text = (ROOT / f"recipes/configs/{row}.yaml").read_text()
        if row.startswith("paper"):
            epochs = EPOCHS_OF_ROWS if round.on_gpu else 1
            text = re.sub(r"^epochs:.*", f"epochs: {epochs}", text, flags=re.M)
        (folder / f"{number:02}-{re.sub(r'^[0-9]+-', '', Path(row).name)}.yaml").write_text(text)
    return folder


def start_worker(round: Round, number: int, rows: Path) -> Part:
    return round.background(
        f"worker{number}", "-m", "capszoo.recipes.explore", "--grid", rows, "--seeds", 3 if round.on_gpu else 1,
        "--test", "--data-dir", round.work / "data", "--device", round.device, "--storage", f"sqlite:///{round.round}/grid.db",
        "--study", "grid", "--output", round.work / f"worker{number}", "--quiet",
        "--budget", f"{max(1, round.left(TOGETHER)):.0f}s",
    )  # fmt: skip


def start_cifar(round: Round) -> Part:
    epochs = EPOCHS_OF_CIFAR if round.on_gpu else 1
    small = [] if round.on_gpu else ["--model", "capsnet_tiny"]
    return round.background(
        "cifar10", "-m", "capszoo.recipes.train", "--config", CIFAR, *small, "--data-dir", round.data,
        "--device", round.device, "--epochs", epochs, "--save-every", 1_000_000, "--quiet",
        "--output", round.work / "cifar10",
    )  # fmt: skip


def epochs_done(folder: Path) -> int:
    try:
        with open(folder / "summary.csv", newline="") as file:
            return sum(1 for _ in csv.DictReader(file))
    except OSError:
        return 0


def give_way(round: Round, workers: list[Part], seen: list[tuple[float, int]]) -> None:
    """Stop a worker if the long training will not be done in time beside it, and let it go on if it will."""
    done = epochs_done(round.work / "cifar10")
    if done and (not seen or done >= seen[-1][1] + 3):
        seen.append((time.monotonic(), done))
        if len(seen) > 1:
            (before, first), (now, last) = seen[-2:]
            needed = (EPOCHS_OF_CIFAR - last) * (now - before) / (last - first)
            running = [worker for worker in workers if worker.code is None]
            stopped = [worker for worker in running if worker.stopped]
            if needed > round.left(TOGETHER) - 15 and len(stopped) < len(running):
                next(worker for worker in reversed(running) if not worker.stopped).pause(True)
            elif needed < 0.75 * round.left(TOGETHER) and stopped:
                stopped[0].pause(False)


def side_by_side(round: Round, has_mnist: bool) -> None:
    """What only has to be right."""
    # Processes that share the cores must not each start as many threads as there are.
    round.environment["OMP_NUM_THREADS"] = "2" if round.on_gpu else "1"
    command = ["-m", "pytest", "-m", "gpu", "-q", "-rfE", "-p", "no:cacheprovider"]
    command += ["-n", "8"] if round.on_gpu and find_spec("xdist") else []
    tests = round.background("tests", *command, "tests" if round.on_gpu else "tests/kernels")
    workers, cifar, memcheck, seen = [], None, None, []
    if not has_mnist:
        round.say("rows: left out, no MNIST")
    elif find_spec("optuna") is None:
        round.say("rows: left out, no optuna")
    else:
        rows = write_rows(round)
        workers = [start_worker(round, number, rows) for number in range(4 if round.on_gpu else 1)]
    while round.left(TOGETHER) > 0:
        time.sleep(1)
        for part in round.parts:
            round.tell(part)
        if cifar is None and (round.data / "cifar-10-batches-bin/test_batch.bin").is_file():
            cifar = start_cifar(round)
        if cifar is not None and cifar.code is None:
            give_way(round, workers, seen)
        elif cifar is not None:
            for worker in filter(lambda worker: worker.stopped, workers):
                worker.pause(False)
        if tests.code is not None and memcheck is None and round.on_gpu and shutil.which("compute-sanitizer"):
            which = [f"tests/kernels/test_{name}_cuda.py" for name in ("routings", "fused")]
            which += ["-k", "not step and not graph and not sizes3 and not case2"]
            memcheck = round.launch(
                "memcheck", "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", 1,
                sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *which,
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )  # fmt: skip
        if all(part.code is not None for part in round.parts) and (cifar or not round.on_gpu):
            break
    for part in round.parts:
        cut = part.code is None
        part.end()
        round.tell(part, cut)
    if cifar is not None:
        round.keep_weights(round.work / "cifar10", "cifar10")
        for name in ("summary.csv", "args.yaml", "result.json"):
            if (round.work / "cifar10" / name).is_file():
                shutil.copy(round.work / "cifar10" / name, round.round / f"cifar10-{name}")
    del round.environment["OMP_NUM_THREADS"]


def one_by_one(round: Round, has_mnist: bool) -> None:
    """What is timed."""
    data = round.work / "data"
    if (round.work / "worker0/args.yaml").is_file():
        round.alone(
            "rows", 0.78, "-m", "capszoo.recipes.explore", "--resume", round.work / "worker0", "--retime",
            "--budget", "0.001s", "--data-dir", data, "--results", round.round / "paper-mnist.csv",
        )  # fmt: skip
    train = ["--model", "capsnet", "--epochs", 20, "--batch-size", 128]
    models, sizes, rounds, families = ["capsnet", "capsnet_ws"], [1, 16, 128], 11, FAMILIES
    if not round.on_gpu:
        train = ["--model", "capsnet_tiny", "--epochs", 1, "--batch-size", 16]
        models, sizes, rounds, families = ["capsnet_tiny"], [2], 1, ["efficient_capsnet"]
    bench = ["-m", "capszoo.recipes.benchmark", "--device", round.device, "--rounds", rounds]
    tables = {
        "benchmark-main": [
            *("--models", *models, "--subjects", "routing", "training", "inference", "--batch-sizes", *sizes)
        ],
        "benchmark-families": ["--models", *families, "--subjects", "training", "--batch-sizes", sizes[-1]],
        "benchmark-layers": ["--models", models[0], "--subjects", "layer", "epoch", "--batch-sizes", sizes[-1]],
    }
    for (name, what), share in zip(tables.items(), (0.88, 0.94, 0.97), strict=True):
        compiled = ["--compile-batch-sizes", *(sizes[-1:] if name == "benchmark-main" else [])]
        limit = ["--time-limit", f"{max(1, 0.8 * round.left(share)):.0f}"]
        output = ["--data-dir", data, "--output", round.round / f"{name}.csv"]
        round.alone(name, share, *bench, *what, *compiled, *limit, *output)
    if has_mnist:
        round.alone(
            "training", 1.0, "-m", "capszoo.recipes.train", *train, "--dataset", "mnist", "--data-dir", data,
            "--device", round.device, "--policy", "one_cycle", "--lr", "5e-4", "--max-lr", "4x", "--rise", "0.3",
            "--val-fraction", "0.05", "--output", round.round / "mnist",
        )  # fmt: skip
        round.keep_weights(round.round / "mnist", "best")
    else:
        round.say(f"training: left out, no MNIST in '{round.data}'")


def summarize(round: Round) -> None:
    for name, lines in (("tests", 12), ("rows", 30), ("benchmark-main", 45), ("benchmark-families", 20)):
        log = round.round / f"{name}.log"
        if log.is_file():
            print(
                f"-- {name}", *(line[:160] for line in log.read_text(errors="replace").splitlines()[-lines:]), sep="\n"
            )
    for name, file in (("capsnet on MNIST", "mnist/result.json"), ("CIFAR-10", "cifar10-result.json")):
        if (round.round / file).is_file():
            found = json.loads((round.round / file).read_text())
            text = f"{name}: test top1 {found['test_top1']:.4f} after {found['epochs']} epochs in "
            text += f"{found['total_seconds']:.1f} s"
            if file.startswith("mnist"):
                text += f" (99.37 % {'reached' if found['test_top1'] >= 0.9937 else 'NOT reached'})"
            print("-- " + text)
            with open(round.round / "training.txt", "a") as out:
                out.write(text + "\n")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="All GPU evidence in one call, within one deadline.")
    parser.add_argument("output", nargs="?", default="runs/gpu_round", help="folder of what the round leaves behind")
    parser.add_argument("data", nargs="?", default="data", help="folder that has the data sets")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    out, data = Path(args.output).resolve(), Path(args.data).resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.safetensors.[0-9]*"):  # of an earlier round, which may have had more pieces
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        round = Round(out, data, Path(folder))
        check_machine(round)
        has_mnist = round.has_mnist()
        if round.left(TOGETHER) > 5:
            side_by_side(round, has_mnist)
        else:
            round.say("tests: left out, no time")
        one_by_one(round, has_mnist)
        summarize(round)
        round.pack()
        return int(round.failed)


if __name__ == "__main__":
    sys.exit(main())
