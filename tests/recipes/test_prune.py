"""recipes/prune.py as a person runs it."""

import csv
import importlib.util
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import processes
import pytest
import torch
import yaml
from safetensors.torch import load_file

import capszoo
from capszoo.checkpoint import read_metadata, save_weights
from capszoo.data import Loader, load_data
from capszoo.engine import CapsuleTask, evaluate
from capszoo.engine.criteria import criterion_header
from capszoo.engine.step import TrainingStep
from capszoo.losses import MarginLoss
from capszoo.prune import cost, count_parts
from capszoo.prune import run as pruning_run

ROOT = Path(__file__).parents[2]
# 4 types of 6x6 positions; float32, where a CPU gives the same bits each time.
MODEL = dict(conv_dim=8, num_types=4, img_size=28, decoder=True, decoder_dims=[12, 16])
SMALL = "--amp none --score-images 64 --batch-size 64 --val-fraction 0.7".split()


def load_recipe(name):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe = load_recipe("prune")


def run(*arguments, code=0):
    assert recipe.main([str(argument) for argument in arguments]) == code


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A network trained for an epoch."""
    folder = tmp_path_factory.mktemp("given")
    arguments = "--amp none --epochs 1 --quiet --model-kwargs conv_dim=8 num_types=4 decoder_dims=[12,16]".split()
    assert load_recipe("train").main([*arguments, "--output", str(folder / "run")]) == 0
    return folder / "run" / "best.safetensors"


@pytest.fixture(scope="module")
def finished(given, tmp_path_factory):
    """A finished run: two rounds of two epochs."""
    folder = tmp_path_factory.mktemp("pruned") / "run"
    arguments = [given, *SMALL, "--rounds", 2, "--epochs", 2, "--output", folder]
    run(*arguments, "--keep", "types=1", "conv1=4", "decoder=[3,4]", "--results", folder.parent / "results.csv")
    return folder


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def same_weights(one, other):
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_run_folder_has_all_that_was_promised(finished, given):
    assert {p.name for p in finished.iterdir()} == {
        "args.yaml",
        "summary.csv",
        "last.safetensors",
        "best.safetensors",
        "result.json",
        "pareto.csv",
        "pareto.png",
        "round-0",
        "round-1",
        "round-2",
    }
    assert (finished / "pareto.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = read_rows(finished / "pareto.csv")
    # 4 -> 1 types in the same proportion, 8 -> 4 filters, 12 -> 3 and 16 -> 4 units.
    assert [[int(row[key]) for key in ("types", "conv1", "decoder_1", "decoder_2")] for row in rows] == [
        [4, 8, 12, 16],
        [2, 6, 6, 8],
        [1, 4, 3, 4],
    ]
    assert [row["val_top1_before"] == "" for row in rows] == [True, False, False]
    for number, row in enumerate(rows):
        model = capszoo.load_model(finished / f"round-{number}" / "best.safetensors")
        found = cost(model)
        assert all(int(row[key]) == value for key, value in vars(found).items())
        assert int(row["capsules"]) == count_parts(model)["capsules"]
    assert same_weights(finished / "round-0/best.safetensors", given)
    assert same_weights(finished / "round-2/best.safetensors", finished / "best.safetensors")
    summary = read_rows(finished / "summary.csv")
    assert [(row["round"], row["epoch"]) for row in summary] == [("1", "1"), ("1", "2"), ("2", "1"), ("2", "2")]
    for number in (1, 2):
        epochs = [row for row in summary if row["round"] == str(number)]
        best = max(epochs, key=lambda row: (float(row["eval_top1"]), -float(row["eval_loss"])))
        assert rows[number]["val_top1"] == best["eval_top1"] and rows[number]["best_epoch"] == best["epoch"]
    result = json.loads((finished / "result.json").read_text())
    assert result["eval_top1"] == float(rows[2]["val_top1"]) and result["parameters"] == int(rows[2]["parameters"])
    assert result["eval_top1_unpruned"] == float(rows[0]["val_top1"]) and result["dataset"] == "digits"
    (table,) = read_rows(finished.parent / "results.csv")
    assert float(table["test_top1"]) == result["test_top1"] and "recipes/prune.py" in table["command"]
    header = read_metadata(finished / "best.safetensors")
    assert (header["model"], header["dataset"], header["round"]) == ("capsnet_tiny", "digits", "2")
    assert header["pruned_from"] == str(given)


def test_accuracies_are_those_of_the_saved_weights(finished):
    data, rows = load_data("digits", val_fraction=0.7), read_rows(finished / "pareto.csv")
    for name, split, expected in [
        ("best", "test", json.loads((finished / "result.json").read_text())["test_top1"]),
        ("best", "val", rows[2]["val_top1"]),
        ("round-1/start", "val", rows[1]["val_top1_before"]),
        ("round-0/best", "val", rows[0]["val_top1"]),
    ]:
        model = capszoo.load_model(finished / f"{name}.safetensors")
        data.normalize(model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
        assert evaluate(model, Loader(getattr(data, split), 256, "cpu")).top1 == pytest.approx(float(expected))


def test_saved_arguments_repeat_the_run(finished, tmp_path, given):
    saved = yaml.safe_load((finished / "args.yaml").read_text())
    assert saved["keep"] == {"types": 1, "conv1": 4, "decoder": [3, 4]} and saved["dataset"] == "digits"
    run("--config", finished / "args.yaml", "--output", tmp_path / "again", "--quiet")
    assert same_weights(tmp_path / "again/best.safetensors", finished / "best.safetensors")
    assert same_weights(tmp_path / "again/last.safetensors", finished / "last.safetensors")


def test_finished_run_resumes_to_the_same_result(finished, given, monkeypatch):
    before = (finished / "result.json").read_text(), (finished / "pareto.csv").read_text()
    monkeypatch.setattr(pruning_run, "trainer_of", None)  # nothing is trained again
    run("--resume", finished)
    same = ["--rounds", 2, "--epochs", 2, "--output", finished, "--keep", "decoder=[3,4]", "conv1=4", "types=1"]
    run(given, *SMALL, "--dataset", "digits", *same, "--resume", finished)
    assert ((finished / "result.json").read_text(), (finished / "pareto.csv").read_text()) == before


def untimed(path):
    timed = ("epoch_seconds", "images_per_second", "train_seconds")
    return [{key: value for key, value in row.items() if key not in timed} for row in read_rows(path)]


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "moment",
    [
        "at the start",
        "while pruning",
        "in the first round",
        "between epochs",
        "before the second round",
    ],
)
def test_killed_and_resumed_to_the_same_bits(moment, given, finished, tmp_path, monkeypatch):
    folder = tmp_path / "killed"
    count = 0

    def kill(*args, **kwargs):
        raise Killed

    def kill_at_call(original, number):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            return kill() if count == number else original(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        if moment == "at the start":
            patch.setattr(pruning_run, "save_weights", kill)
        elif moment == "while pruning":
            patch.setattr(pruning_run, "prune_once", kill_at_call(pruning_run.prune_once, 2))
        elif moment == "in the first round":
            patch.setattr(TrainingStep, "__call__", kill_at_call(TrainingStep.__call__, 10))
        elif moment == "between epochs":
            patch.setattr(pruning_run.Run, "show_epoch", kill_at_call(pruning_run.Run.show_epoch, 3))
        else:
            patch.setattr(pruning_run, "plot_pareto", kill_at_call(pruning_run.plot_pareto, 2))
        arguments = [given, *SMALL, "--rounds", 2, "--epochs", 2, "--save-every", 3, "--output", folder, "--quiet"]
        with pytest.raises(Killed):
            run(*arguments, "--keep", "types=1", "conv1=4", "decoder=[3,4]")
    assert not (folder / "result.json").exists()
    (folder / ".best.safetensors.1.tmp").write_text("half")
    run("--resume", folder)
    assert not (folder / ".best.safetensors.1.tmp").exists()
    for name in ("best", "last", "round-1/best"):
        assert same_weights(folder / f"{name}.safetensors", finished / f"{name}.safetensors")
    assert untimed(folder / "summary.csv") == untimed(finished / "summary.csv")
    assert untimed(folder / "pareto.csv") == untimed(finished / "pareto.csv")
    results = [json.loads((f / "result.json").read_text()) for f in (folder, finished)]
    assert results[0]["test_top1"] == results[1]["test_top1"]


def test_resume_needs_the_given_file_no_more(given, tmp_path, monkeypatch):
    shutil.copy(given, tmp_path / "given.safetensors")
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(recipe.StopSignal, "__call__", lambda self: True)
        run(tmp_path / "given.safetensors", *SMALL, "--keep", "types=2", "--epochs", 1, "--output", folder, code=130)
    (tmp_path / "given.safetensors").unlink()
    run("--resume", folder, "--quiet")
    assert count_parts(capszoo.load_model(folder / "best.safetensors"))["types"] == 2


def test_indices_fractions_and_capsules(given, tmp_path):
    keep = ["types=[0,2,3]", "capsules=0.25"]
    run(given, *SMALL, "--keep", *keep, "--score", "coupling", "--epochs", 1, "--output", tmp_path / "run")
    model = capszoo.load_model(tmp_path / "run/best.safetensors")
    assert count_parts(model)["capsules"] == 27 and set(model.keep_types) <= {0, 2, 3}
    assert len(model.keep_capsules) == 27 and model.decoder is not None
    run(
        tmp_path / "run/best.safetensors",
        *SMALL,
        "--keep",
        "capsules=9",
        "--rounds",
        2,
        "--epochs",
        1,
        "--no-decoder",
        "--output",
        tmp_path / "further",
    )
    rows = read_rows(tmp_path / "further/pareto.csv")
    assert [row["capsules"] for row in rows] == ["27", "16", "9"] and rows[0]["decoder_1"] == ""
    assert capszoo.load_model(tmp_path / "further/best.safetensors").decoder is None


def test_other_margins_are_those_of_the_weights(given, tmp_path):
    """A network is scored, trained and measured by the criterion that its file names."""
    model, header = capszoo.load_model(given), read_metadata(given)
    criterion = MarginLoss(0.8, 0.2, 0.6)
    header = {**header, "criterion": json.dumps(criterion_header(criterion)["criterion"])}
    save_weights(tmp_path / "given.safetensors", model, header)
    used = []

    def prune_and_note(*args, **kwargs):
        used.append(args[-1])
        return prune_once(*args, **kwargs)

    prune_once = pruning_run.prune_once
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning_run, "prune_once", prune_and_note)
        run(tmp_path / "given.safetensors", *SMALL, "--keep", "types=2", "--epochs", 1, "--output", folder, "--quiet")
    assert [(c.m_plus, c.m_minus, c.lambda_) for c in used] == [(0.8, 0.2, 0.6)]
    assert read_metadata(folder / "best.safetensors")["criterion"] == header["criterion"]
    data = load_data("digits", val_fraction=0.7)
    for number, row in enumerate(read_rows(folder / "pareto.csv")):
        model = capszoo.load_model(folder / f"round-{number}/best.safetensors")
        data.normalize(model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
        found = evaluate(CapsuleTask(model, criterion, verbose=False), Loader(data.val, 256, "cpu"))
        assert found.loss == pytest.approx(float(row["val_loss"]), rel=1e-5)


def test_validate_reads_what_prune_wrote(finished, capsys):
    assert load_recipe("validate").main([str(finished / "best.safetensors")]) == 0
    result = json.loads((finished / "result.json").read_text())
    assert f"top1 {result['test_top1']:.4f}" in capsys.readouterr().out


def test_killed_from_outside_and_resumed_to_the_same_bits(given, finished, tmp_path):
    folder = tmp_path / "killed"
    arguments = [
        given,
        *SMALL,
        "--rounds",
        2,
        "--epochs",
        2,
        "--save-every",
        3,
        "--output",
        folder,
        "--keep",
        "types=1",
        "conv1=4",
        "decoder=[3,4]",
    ]
    for attempt in range(3):
        process = processes.start(ROOT / "recipes/prune.py", *arguments, stderr=subprocess.STDOUT)
        if attempt < 2:
            while not list(folder.glob(f"round-{attempt + 1}/resume.safetensors")) and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL if attempt != 1 else signal.SIGTERM)
        process.communicate(timeout=300)
        arguments = ["--resume", folder]
    assert process.returncode == 0
    for name in ("best", "last"):
        assert same_weights(folder / f"{name}.safetensors", finished / f"{name}.safetensors")


# Each is one clear line and exit code 2, and leaves nothing behind.
KEEP = ["--keep", "types=2"]
BAD = {
    "no weights": (KEEP, "no weights are named"),
    "missing weights": (["nowhere.safetensors", *KEEP], "'nowhere.safetensors' is no file and no shipped weights"),
    "foreign file": (["foreign.safetensors", *KEEP], "foreign.safetensors"),
    "file without a model": (["bare.safetensors", *KEEP], "does not say what model it holds"),
    "nothing to keep": (["given.safetensors"], "such as --keep types=8"),
    "unknown option": (["given.safetensors", *KEEP, "--round", "2"], "did you mean '--rounds'"),
    "unknown part": (["given.safetensors", "--keep", "type=2"], "did you mean 'types'"),
    "part twice": (["given.safetensors", "--keep", "types=2", "types=3"], "names a part twice"),
    "part again": (["given.safetensors", "--keep", "types=2", "--keep", "types=3"], "names a part twice"),
    "no use of a folder": (
        ["given.safetensors", *KEEP, "--data-dir", "nowhere"],
        "is not used by the data set 'digits'",
    ),
    "too far": (["given.safetensors", *KEEP, "--translate", "28"], "can shift a whole 28x28 image out of sight"),
    "no pair": (["given.safetensors", "--keep", "types"], "not of the form name=value"),
    "too many": (["given.safetensors", "--keep", "types=5"], "types=5 is not possible: there are 4"),
    "too many capsules": (["given.safetensors", "--keep", "types=2", "capsules=73"], "there are 72"),
    "indices in rounds": (["given.safetensors", "--keep", "types=[0,1]", "--rounds", "2"], "names indices"),
    "word": (["given.safetensors", "--keep", "types=few"], "types='few' is not possible"),
    "no decoder": (["given.safetensors", "--keep", "decoder=0.5", "--no-decoder"], "no decoder to prune"),
    "unknown score": (["given.safetensors", *KEEP, "--score", "tailor"], "did you mean 'taylor'"),
    "score of another part": (["given.safetensors", "--keep", "conv1=2", "--score", "coupling"], "use another score"),
    "no rounds": (["given.safetensors", *KEEP, "--rounds", "0"], "--rounds 0 is not possible"),
    "no images to score": (["given.safetensors", *KEEP, "--score-images", "0"], "--score-images 0 is not possible"),
    "no epochs": (["given.safetensors", *KEEP, "--epochs", "0"], "epochs"),
    "unknown policy": (["given.safetensors", *KEEP, "--policy", "one_cicle"], "did you mean 'one_cycle'"),
    "finder": (["given.safetensors", *KEEP, "--policy", "lr_finder"], "recipes/train.py"),
    "unknown optimizer": (["given.safetensors", *KEEP, "--opt", "adma"], "adma"),
    "no validation": (["given.safetensors", *KEEP, "--val-fraction", "0"], "--val-fraction above 0"),
    "no data": (["given.safetensors", *KEEP, "--dataset", "mnist", "--data-dir", "."], "mnist"),
    "other classes": (["five.safetensors", *KEEP], "has 10 classes, the model has 5"),
    "unknown data set": (["silent.safetensors", *KEEP], "give --dataset"),
    "resume of nothing": (["--resume", "nowhere"], "nowhere"),
    "too many rounds": (["given.safetensors", *KEEP, "--rounds", "9" * 20], "give 1 to 1000"),
    "resume of other weights": (
        ["five.safetensors", "--resume", "run"],
        "the weights five.safetensors cannot change when a run is resumed: the run has the weights given.safetensors;",
    ),
    "resume with other options": (
        ["given.safetensors", *KEEP, "--resume", "run", "--epochs", "3"],
        "--epochs 3 cannot change when a run is resumed: the run has --epochs 5; leave it out",
    ),
    "resume with another part": (["--resume", "run", "--keep", "types=3"], "the run has --keep types=2;"),
    "folder in use": (["given.safetensors", *KEEP, "--output", "run"], "--resume"),
}


@pytest.fixture(scope="module")
def bad_folder(given, tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    shutil.copy(given, root / "given.safetensors")
    (root / "foreign.safetensors").write_bytes(b"\x80\x04\x95 a pickle, say")
    save_weights(root / "bare.safetensors", capszoo.create_model("capsnet_tiny", **MODEL), {})
    header = dict(model="capsnet_tiny", model_args=MODEL)
    save_weights(root / "silent.safetensors", capszoo.create_model("capsnet_tiny", **MODEL), header)
    header = dict(model="capsnet_tiny", model_args={**MODEL, "num_classes": 5}, dataset="digits")
    save_weights(root / "five.safetensors", capszoo.create_model("capsnet_tiny", **header["model_args"]), header)
    (root / "run").mkdir()
    (root / "run/args.yaml").write_text("weights: given.safetensors\nkeep: {types: 2}\n")
    return root


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, bad_folder, monkeypatch, capsys):
    arguments, expected = BAD[case]
    monkeypatch.chdir(bad_folder)
    before = sorted(str(p) for p in bad_folder.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        capszoo.command_line.run(lambda: recipe.main(arguments))
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and expected in err, err
    assert out == ""
    assert sorted(str(p) for p in bad_folder.rglob("*")) == before
