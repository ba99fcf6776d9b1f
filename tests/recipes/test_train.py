"""recipes/train.py and validate.py as a person runs them."""

import csv
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import processes
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import capszoo
import capszoo.engine.run
from capszoo.data import Loader, load_data
from capszoo.engine import evaluate
from capszoo.engine.run_folder import _lock
from capszoo.errors import DataError, UsageError

ROOT = Path(__file__).parents[2]
# Small enough for a few seconds a run; float32, where a CPU gives the same bits each time.
SMALL = "--model-kwargs conv_dim=8 num_types=2 --amp none --epochs 3".split()


def start(script, *args, cwd):
    return processes.start(ROOT / "recipes" / script, *args, cwd=cwd)


def run(script, *args, cwd, code=0):
    process = start(script, *args, cwd=cwd)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out if code == 0 else err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run folder, and what the run printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, run("train.py", *SMALL, "--output", folder, cwd=folder.parent)


def test_run_folder_has_all_that_was_promised(trained):
    folder, out = trained
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "args.yaml",
        "summary.csv",
        "last.safetensors",
        "best.safetensors",
        "resume.safetensors",
        "resume-previous.safetensors",
        "result.json",
    }
    rows = list(csv.DictReader((folder / "summary.csv").open()))
    result = json.loads((folder / "result.json").read_text())
    best = max(rows, key=lambda row: (float(row["eval_top1"]), -float(row["eval_loss"])))
    assert result["best_epoch"] == int(best["epoch"]) and result["eval_top1"] == float(best["eval_top1"])
    assert (result["model"], result["dataset"], result["policy"]) == ("capsnet_tiny", "digits", "one_cycle")
    assert 0 <= result["test_top1"] <= 1
    assert result["total_seconds"] == pytest.approx(sum(float(row["epoch_seconds"]) for row in rows))
    model = capszoo.load_model(folder / "best.safetensors")
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert args["epochs"] == 3 and args["batch_size"] == 16
    assert out.count("epoch ") == 3 + 1 and "\x1b" not in out  # plain lines where the output is no terminal
    assert f"test top1 {result['test_top1']:.4f}" in out


def test_validate_repeats_the_test_accuracy(trained, tmp_path):
    folder, _ = trained
    out = run("validate.py", folder / "best.safetensors", "--json", tmp_path / "v.json", cwd=tmp_path)
    measured = json.loads((tmp_path / "v.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    assert measured["top1"] == pytest.approx(result["test_top1"], abs=1e-9)
    assert measured["margin_loss"] == pytest.approx(result["test_margin_loss"], rel=1e-5)
    confusion = torch.tensor(measured["confusion"])
    assert confusion.shape == (10, 10) and confusion.sum() == measured["images"] == 360
    assert "true class by predicted class" in out


def test_finished_run_resumes_to_the_same_result(trained):
    folder, _ = trained
    before = json.loads((folder / "result.json").read_text())
    run("train.py", "--resume", folder, cwd=folder.parent)
    assert json.loads((folder / "result.json").read_text()) == before
    # By the command that began it, and by what it filled in.
    train, alone = load_recipe("train"), ["--resume", str(folder)]
    for more in ([*SMALL, "--output", str(folder)], ["--batch-size", "16", "--lr", "1e-3"]):
        assert train.parse_args([*more, *alone]) == train.parse_args(alone)
    with pytest.raises(UsageError, match="--batch-size 32 cannot change .*: the run has --batch-size 16;"):
        train.parse_args(["--batch-size", "32", *alone])


def test_saved_arguments_repeat_the_run(trained, tmp_path):
    folder, _ = trained
    run("train.py", "--config", folder / "args.yaml", "--output", "again", cwd=tmp_path)
    one, other = load_file(folder / "last.safetensors"), load_file(tmp_path / "again/last.safetensors")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_killed_at_random_moments_and_resumed_to_the_same_bits(trained, tmp_path):
    folder, _ = trained
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    killed = tmp_path / "killed"
    arguments = [*SMALL, "--output", killed, "--save-every", 20]
    deadline = 2 + 2.5 * rng.random()
    for attempt in range(12):
        process = start("train.py", *arguments, cwd=tmp_path)
        if attempt < 4:
            # From the moment that the run folder is there: any point of training, saving or testing.
            while not (killed / "args.yaml").exists() and process.poll() is None:
                time.sleep(0.01)
            wait = deadline * rng.random() if attempt == 0 else 5 + 3 * rng.random()
            try:
                process.wait(wait)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=300)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
        arguments = ["--resume", killed]
    assert (killed / "result.json").exists(), f"seed {seed}"
    for name in ("last.safetensors", "best.safetensors"):
        one, other = load_file(folder / name), load_file(killed / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), f"{name}, seed {seed}"
    timed = ("epoch_seconds", "images_per_second")
    rows, expected = (list(csv.DictReader((f / "summary.csv").open())) for f in (killed, folder))
    for row, other in zip(rows, expected, strict=True):
        assert {k: v for k, v in row.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_signal_saves_and_resume_goes_on(number, code, trained, tmp_path):
    folder, _ = trained
    stopped = tmp_path / "stopped"
    process = start("train.py", *SMALL, "--output", stopped, cwd=tmp_path)
    while not (stopped / "summary.csv").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert "Traceback" not in err
    if "test top1" not in out:  # else it was done before the signal
        assert process.returncode == code and "stopped and saved: go on with --resume" in out
        run("train.py", "--resume", stopped, cwd=tmp_path)
    one, other = load_file(folder / "last.safetensors"), load_file(stopped / "last.safetensors")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch, recipe):
    train = recipe("train")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.time, "strftime", lambda layout: "20260101-000000")
    monkeypatch.setattr(train.Trainer, "fit", lambda trainer: False)
    for _ in range(3):
        train.main([*SMALL, "--quiet"])
    name = "capsnet_tiny-digits-one_cycle-20260101-000000"
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [name, f"{name}-1", f"{name}-2"]
    for folder in (tmp_path / "runs").iterdir():
        assert f"--config runs/{folder.name}/args.yaml" in (folder / "args.yaml").read_text()


@pytest.mark.skipif(os.name != "posix", reason="needs locks on folders")
def test_folder_that_another_process_trains_in(tmp_path, recipe, monkeypatch):
    train = recipe("train")
    fit = train.Trainer.fit
    said = []

    def fit_again(trainer):
        monkeypatch.setattr(train.Trainer, "fit", fit)
        said.append(run("train.py", "--output", tmp_path / "run", cwd=tmp_path, code=2))
        with pytest.raises(UsageError, match="another process trains in"):
            _lock(tmp_path / "run", seconds=0.2)
        return fit(trainer)

    monkeypatch.setattr(train.Trainer, "fit", fit_again)
    assert train.main([*SMALL, "--epochs", "1", "--quiet", "--output", str(tmp_path / "run")]) == 0
    assert said[0].startswith(f"error: another process trains in '{tmp_path / 'run'}'") and said[0].count("\n") == 1
    assert _lock(tmp_path / "run", seconds=0) is not None


@pytest.mark.parametrize(
    "options",
    [
        "--micro-batch 0",
        "--micro-batch -1",
        f"--seed {2**70}",
        "--seed -1",
        "--drop-rate 2",
        "--device meta",
        "--device tpu9",
        "--clip-grad -1",
        "--clip-grad nan",
        "--weight-decay -1",
        "--save-every -1",
        "--eval-batch-size 0",
        "--workers -1",
        "--translate 100",
        "--translate -1",
        "--reconstruction-weight nan",
        "--opt adahessian",
        "--results /dev/null/x.csv",
        "--results .",
    ],
)
def test_options_out_of_range_are_refused_before_there_is_a_folder(options, tmp_path, recipe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        recipe("train").main([*SMALL, *options.split(), "--output", "run"])
    assert len(str(error.value).splitlines()) == 1 and options.split()[1][:5] in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="writes to a full device")
def test_output_that_cannot_be_written(tmp_path):
    with open("/dev/full", "w") as full:
        done = processes.run(ROOT / "recipes/train.py", *SMALL, "--output", tmp_path / "run", stdout=full)
    assert done.returncode == 2
    assert done.stderr == "error: the output cannot be written (No space left on device): write it elsewhere\n"


def make_folder(root: Path, size=(20, 20)) -> Path:
    for split, count in (("train", 6), ("test", 2)):
        for index, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", size, 40 * i + index).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def landscape(tmp_path_factory):
    """A finished run on images of 20x32, made of such of 40x30."""
    root = make_folder(tmp_path_factory.mktemp("landscape") / "pets", (40, 30)).parent
    options = f"--dataset {root}/pets --img-size 20 32 --val-fraction 0.4 --batch-size 4 --translate 2 --quiet".split()
    small = "--model-kwargs conv_dim=8 num_types=2 decoder_dims=[4,8] --amp none --epochs 2".split()
    assert load_recipe("train").main([*options, *small, "--output", str(root / "run")]) == 0
    return root, [*options, *small]


def test_images_that_are_not_square_train(landscape):
    root, options = landscape
    train, folder = load_recipe("train"), root / "run"
    assert yaml.safe_load((folder / "args.yaml").read_text())["img_size"] == [20, 32]
    model = capszoo.load_model(folder / "best.safetensors")
    assert model.img_size == (20, 32) and model.grid_size == (2, 8)
    before, result = load_file(folder / "last.safetensors"), (folder / "result.json").read_text()
    assert train.main([*options, "--resume", str(folder)]) == 0
    assert (folder / "result.json").read_text() == result
    assert train.main(["--config", str(folder / "args.yaml"), "--output", str(root / "again"), "--quiet"]) == 0
    again = load_file(root / "again/last.safetensors")
    assert all(torch.equal(again[key], value) for key, value in before.items())
    with pytest.raises(UsageError, match="--img-size 32 20 cannot change .*: the run has --img-size 20 32;"):
        train.main(["--resume", str(folder), "--img-size", "32", "20"])


def test_images_that_are_not_square_are_measured_and_pruned(landscape, recipe, monkeypatch, capsys):
    root, _ = landscape
    monkeypatch.chdir(root)
    options = ["--robustness", "--val-fraction", "0.4", "--json", "v.json"]
    assert recipe("validate").main(["run/best.safetensors", *options]) == 0
    measured, result = (json.loads(Path(name).read_text()) for name in ("v.json", "run/result.json"))
    assert measured["top1"] == result["test_top1"] and 0 <= measured["top1_shift_6"] <= 1
    prune = "--keep types=1 capsules=4 decoder=[2,4] --epochs 1 --amp none --batch-size 2 --score-images 4".split()
    command = ["run/best.safetensors", *prune, "--val-fraction", "0.4", "--output", "pruned", "--quiet"]
    assert recipe("prune").main(command) == 0
    smaller = capszoo.load_model("pruned/best.safetensors")
    assert smaller.img_size == (20, 32) and smaller.num_primary == 2 * 8 and len(smaller.keep_capsules) == 4
    assert recipe("prune").main([*command, "--resume", "pruned"]) == 0
    with pytest.raises(ValueError, match=r"keeps single capsules of images of 20x32: leave out img_size=\[32, 20\]"):
        capszoo.load_model("pruned/best.safetensors", img_size=(32, 20))
    assert recipe("export").main(["hub", "run/best.safetensors", "--output", "hub"]) == 0
    assert capszoo.create_model("local-dir:hub", pretrained=True).img_size == (20, 32)
    card = Path("hub/README.md").read_text()
    assert "20 x 32, 1 channel" in card and "--img-size 20 32" in card


def test_image_folder_trains(tmp_path):
    make_folder(tmp_path / "pets")
    run("train.py", "--dataset", "pets", *SMALL, "--val-fraction", 0.2, "--output", "run", cwd=tmp_path)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["dataset"] == "pets" and result["test_top1"] in (0, 0.25, 0.5, 0.75, 1)
    out = run("validate.py", "run/best.safetensors", cwd=tmp_path)
    assert "cat" in out and "dog" in out


def test_a_run_whose_images_have_moved(tmp_path, recipe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "pets")
    main, small = recipe("train").main, [*SMALL, "--val-fraction", "0.2", "--quiet", "--output", "run"]
    assert main(["--dataset", "pets", *small]) == 0
    make_folder(tmp_path / "others")
    with pytest.raises(UsageError, match="--dataset others cannot change when a run is resumed"):
        main(["--resume", "run", "--dataset", "others"])
    (tmp_path / "pets").rename(tmp_path / "moved")
    with pytest.raises(DataError, match="where its folder has moved, give --dataset with the new one"):
        main(["--resume", "run"])
    assert main(["--resume", "run", "--dataset", "moved"]) == 0
    (tmp_path / "moved/train/cat").rename(tmp_path / "moved/train/bat")
    (tmp_path / "moved/test/cat").rename(tmp_path / "moved/test/bat")
    with pytest.raises(UsageError, match="'moved' has the classes bat, dog, the run has cat, dog: give --dataset"):
        main(["--resume", "run", "--dataset", "moved"])


def make_several_classes(root: Path) -> Path:
    """Images of bars: left, right and top, any of them or none."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 96), ("val", 24), ("test", 24)):
        (root / split).mkdir(parents=True)
        labels = torch.randint(2, (count, 3), generator=generator)
        lines = ["file,left,right,top"]
        for i, (left, right, top) in enumerate(labels.tolist()):
            image = torch.randint(60, (20, 20), generator=generator)
            image[:, 2:6] += 160 * left
            image[:, 14:18] += 160 * right
            image[2:5] += 30 * top
            Image.fromarray(image.byte().numpy()).save(root / split / f"{i}.png")
            lines.append(f"{i}.png,{left},{right},{top}")
        (root / split / "labels.csv").write_text("\n".join(lines))
    return root


def test_several_classes(tmp_path, recipe, capsys, monkeypatch):
    """Trained, measured, pruned and exported: what is counted is the exact match, and it is called so."""
    monkeypatch.chdir(tmp_path)
    make_several_classes(tmp_path / "bars")
    options = (
        "--dataset bars --policy fixed --epochs 12 --lr 0.003 --batch-size 16 --amp none --device cpu --output run"
    )
    model = "--model-kwargs conv_dim=16 num_types=2"
    assert recipe("train").main([*options.split(), *model.split()]) == 0
    out = capsys.readouterr().out
    result = json.loads(Path("run/result.json").read_text())
    assert "images show several classes: exact is" in out and out.count(" eval exact ") == 12 and "top1 0" not in out
    precision = result["test_mean_average_precision"]
    assert f"test exact {result['test_top1']:.4f} mean average precision {precision:.4f}" in out
    assert result["test_top1"] > 0.5 and precision > 0.9  # by chance an eighth, and a half
    data = load_data("bars")
    trained = capszoo.load_model("run/best.safetensors")
    data.normalize(trained.pretrained_cfg["mean"], trained.pretrained_cfg["std"])
    measured = evaluate(trained, Loader(data.test, 24, "cpu"))
    assert measured.top1 == pytest.approx(result["test_top1"])
    assert measured.mean_average_precision == pytest.approx(precision)
    assert measured.exact_top_k == pytest.approx(result["test_exact_top_k"]) and measured.exact_top_k > 0.5

    assert recipe("validate").main(["run/best.safetensors", "--json", "v.json", "--robustness", "--device", "cpu"]) == 0
    out, found = capsys.readouterr().out, json.loads(Path("v.json").read_text())
    assert f"exact match {measured.top1:.4f}  mean average precision {precision:.4f}" in out and "recall" in out
    assert found["top1"] == measured.top1 and found["mean_average_precision"] == pytest.approx(precision)
    assert found["class_confusion"]["top"] == measured.class_confusion[2].tolist() and "confusion" not in found
    assert found["average_precision"]["left"] == pytest.approx(float(measured.average_precision[0]))
    assert 0 <= found["top1_shift_6"] <= 1 and found["exact_top_k"] == measured.exact_top_k
    assert f"mean average precision {precision:.4f}  k longest {measured.exact_top_k:.4f}" in out

    monkeypatch.setattr(capszoo, "list_pretrained", lambda: [])
    also = ["--all", "--also", "run/best.safetensors", "--results-dir", ".", "--no-robustness", "--device", "cpu"]
    assert recipe("validate").main(also) == 0
    (row,) = csv.DictReader(Path("results-bars.csv").open())
    assert float(row["mean_average_precision"]) == pytest.approx(precision) and float(row["top1"]) == measured.top1
    assert float(row["exact_top_k"]) == measured.exact_top_k

    options = "run/best.safetensors --keep types=1 --epochs 1 --amp none --device cpu --output pruned"
    assert recipe("prune").main(options.split()) == 0
    assert "images show several classes: top1 is" in capsys.readouterr().out
    pruned = json.loads(Path("pruned/result.json").read_text())
    assert pruned["types"] == 1 and 0 < pruned["test_mean_average_precision"] <= 1

    assert recipe("export").main(["hub", "run/best.safetensors", "--output", "hub"]) == 0
    card = Path("hub/README.md").read_text()
    assert f"**Test exact-match accuracy (float32):** {result['test_top1']:.4f}" in card
    assert f"**Test mean average precision (float32):** {precision:.4f}" in card and "top-1" not in card


def test_lr_finder(tmp_path):
    out = run("train.py", *SMALL, "--policy", "lr_finder", "--steps-per-decade", 20, "--output", "run", cwd=tmp_path)
    rows = list(csv.DictReader((tmp_path / "run/lr_finder.csv").open()))
    assert "suggested learning rate" in out
    assert float(rows[20]["lr"]) == pytest.approx(1e-5)


# Each is one clear line and exit code 2, and leaves nothing behind.
BAD = {
    "unknown option": (["--modle", "x"], "did you mean '--model'"),
    "unknown model": (["--model", "capsnet_w"], "did you mean 'capsnet_ws'"),
    "unknown data set": (["--dataset", "mnits"], "did you mean 'mnist'"),
    "finder of few steps": (
        ["--policy", "lr_finder", "--epochs", "1", "--batch-size", "128"],
        "--policy lr_finder has 11 steps and needs 21: give more --epochs or a smaller --batch-size",
    ),
    "finder with results": (
        ["--policy", "lr_finder", "--results", "t.csv"],
        "--results has no effect with --policy lr",
    ),
    "no momentum": (["--opt", "sgd", "--momentum", "0"], "(timm's sgd is Nesterov's): use --opt momentum"),
    "empty resume": (["--resume", ""], "--resume is empty: give a run folder, or leave it out"),
    "unknown policy": (["--policy", "warm_adabatch"], "did you mean 'warm_ada_batch'"),
    "unknown optimizer": (["--opt", "adma"], "adma"),
    "optimizer of second order": (["--opt", "adahessian"], "draws random numbers that no checkpoint holds"),
    "option of another policy": (["--policy", "fixed", "--warm-epochs", "3"], "warm_epochs"),
    "missing data folder": (["--dataset", "mnist", "--data-dir", "nowhere"], "nowhere"),
    "missing data": (["--dataset", "mnist", "--data-dir", "."], "train-images-idx3-ubyte"),
    "too few epochs": (["--policy", "warm_ada_batch", "--epochs", "2"], "raise epochs to 4"),
    "no number": (["--epochs", "three"], "three"),
    "precision": (["--amp", "fp16", "--device", "cpu"], "fp16"),
    "no such device": (["--device", "tpu9"], "tpu9"),
    "no weights": (["--pretrained", "--model", "cnn_baseline"], "no weights are shipped for 'cnn_baseline'"),
    "routing of a model without": (["--model", "cnn_baseline", "--num-routing", "2"], "unknown keyword 'num_routing'"),
    "truncated weights": (["--checkpoint", "truncated.safetensors"], "truncated.safetensors"),
    "foreign file": (["--checkpoint", "foreign.safetensors"], "foreign.safetensors"),
    "weights of another shape": (["--checkpoint", "capsnet8.safetensors"], "this model needs"),
    "weights of another architecture": (
        ["--model", "capsnet_ws", "--checkpoint", "capsnet8.safetensors"],
        "weights of",
    ),
    "folder that is not used": (["--data-dir", "pets"], "--data-dir 'pets' is not used by the data set 'digits'"),
    "file that is no image": (["--dataset", "pets"], "notes.png"),
    "unknown key": (["--config", "unknown.yaml"], "did you mean 'epochs'"),
    "wrong value": (["--config", "wrong.yaml"], "epochs"),
    "no yaml": (["--config", "broken.yaml"], "broken.yaml"),
    "missing config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "resume of nothing": (["--resume", "nowhere"], "nowhere"),
    "resume with other options": (
        ["--resume", "run", "--lr", "0.1", "--epochs", "3"],
        "--lr 0.1 cannot change when a run is resumed: the run has --lr 0.001; leave it out, or start a new run",
    ),
    "folder in use": (["--output", "run"], "--resume"),
    "small images": (["--img-size", "12"], "12x12"),
    "routing": (["--num-routing", "0"], "num_routing=0"),
    "model keyword": (["--model-kwargs", "conv_dims=3"], "did you mean 'conv_dim'"),
    "type of a model keyword": (["--model-kwargs", "decoder_dims=64"], "decoder_dims=64 is not possible: give a list"),
    "types in a file": (["--config", "types.yaml"], "keep_types=['a'] is not possible: give a whole number or a list"),
    "classes": (["--model-kwargs", "num_classes=3"], "contradicts the images of 'digits', num_classes=10: leave it"),
    "size": (["--model-kwargs", "img_size=[20, 32]"], "img_size=(28, 28): use --img-size 20 32"),
    "three sizes": (["--img-size", "20", "32", "1"], "give one number, or height and width"),
    "too many epochs": (["--epochs", "9" * 20], "is out of range: give 1 to 1,000,000"),
    "too large a micro batch": (["--micro-batch", "9" * 20], "--micro-batch 99999999999999999999 is out of range"),
    "momentum": (["--opt", "sgd", "--momentum", "nan"], "--momentum nan is out of range: give 0 or more, below 1"),
    "no memory": (["--model-kwargs", f"num_types={10**12}"], "'capsnet_tiny' cannot be made ("),
    "margins": (["--m-plus", "0.05"], "m_plus=0.05"),
    "batch": (["--batch-size", "0"], "batch_size"),
}


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    make_folder(root / "pets")
    (root / "pets/train/cat/notes.png").write_text("no image")
    capszoo.checkpoint.save_weights(root / "capsnet8.safetensors", capszoo.create_model("capsnet_tiny", conv_dim=8), {})
    (root / "truncated.safetensors").write_bytes((root / "capsnet8.safetensors").read_bytes()[:5000])
    (root / "foreign.safetensors").write_bytes(b"\x80\x04\x95 a pickle, say")
    (root / "unknown.yaml").write_text("epoch: 3\n")
    (root / "wrong.yaml").write_text("epochs: many\n")
    (root / "broken.yaml").write_text("epochs: [3\n")
    (root / "types.yaml").write_text("model_kwargs: {keep_types: [a]}\n")
    (root / "run").mkdir()
    (root / "run/args.yaml").write_text("epochs: 3\n")
    return root


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, bad_folder, monkeypatch, capsys):
    # In this process: an interpreter for each of these cases would take minutes.
    arguments, expected = BAD[case]
    monkeypatch.chdir(bad_folder)
    before = sorted(str(p) for p in bad_folder.rglob("*"))
    train = load_recipe("train")
    with pytest.raises(SystemExit) as ended:
        capszoo.command_line.run(lambda: train.main(arguments))
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and expected in err, err
    assert out == ""
    assert sorted(str(p) for p in bad_folder.rglob("*")) == before


def load_recipe(name):
    import importlib.util

    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bad_input_from_the_shell(bad_folder):
    for script, arguments in (("train.py", ["--dataset", "pets"]), ("validate.py", ["nowhere.safetensors"])):
        err = run(script, *arguments, cwd=bad_folder, code=2)
        assert err.startswith("error: ") and err.count("\n") == 1


def test_validate_refuses_what_does_not_fit(trained, bad_folder, monkeypatch, capsys):
    folder, _ = trained
    validate = load_recipe("validate")
    monkeypatch.chdir(bad_folder)
    for arguments, expected in (
        (["capsnet_tiny.nothing"], "capsnet_tiny.nothing"),
        ([str(bad_folder / "truncated.safetensors")], "truncated.safetensors"),
        ([str(bad_folder / "capsnet8.safetensors")], "does not say what model"),
        ([str(folder / "best.safetensors"), "--dataset", "mnist"], "data set 'mnist'"),
        ([str(folder / "best.safetensors"), "--model", "cnn_baseline"], "leave out --model cnn_baseline"),
    ):
        with pytest.raises(SystemExit) as ended:
            capszoo.command_line.run(lambda: validate.main(arguments))  # noqa: B023
        err = capsys.readouterr().err
        assert ended.value.code == 2 and expected in err and err.count("\n") == 1, err


def test_every_policy_configuration_is_accepted():
    train = load_recipe("train")
    for path in sorted((ROOT / "recipes/configs").glob("*.yaml")):
        args = train.parse_args(["--config", str(path)])
        assert capszoo.engine.run.make_policy(args, 60_000).epochs == args.epochs
        overridden = train.parse_args(["--config", str(path), "--epochs", "7"])
        assert overridden.epochs == 7 and overridden.policy == args.policy


def test_results_table_grows_and_keeps_old_rows(tmp_path):
    train = load_recipe("train")
    table = tmp_path / "new/results.csv"
    train.add_result(table, {"model": "a", "test_top1": 0.5}, "python recipes/train.py", ["--epochs", "1"])
    train.add_result(table, {"model": "b", "eval_top1": None, "device": "x, y"}, "python recipes/train.py", [])
    rows = list(csv.DictReader(table.open()))
    assert [row["model"] for row in rows] == ["a", "b"]
    assert rows[0]["test_top1"] == "0.5" and rows[0]["command"] == "python recipes/train.py --epochs 1"
    assert rows[1]["device"] == "x, y" and rows[1]["test_top1"] == rows[1]["eval_top1"] == ""
