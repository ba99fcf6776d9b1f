"""recipes/explore.py from the command line: searches that end, are killed, are shared; and what it refuses."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import yaml

import capszoo
from capszoo.engine.options import options_from
from capszoo.engine.run import make_model
from capszoo.explore.grid import read_grid

optuna = pytest.importorskip("optuna")
pytest.importorskip("plotly")

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/explore.py"
SMALL = ["--set", "model_kwargs={conv_dim: 8, num_types: 2, decoder_dims: [4, 8]}", "amp=none"]


def run(*arguments):
    """Run the recipe to its end; return what it printed."""
    done = processes.run(RECIPE, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def grid(folder, count, **options):
    """Write a folder of rows that differ in nothing but the learning rate."""
    folder.mkdir()
    for n in range(count):
        values = {"policy": "fixed", "batch_size": 64, "epochs": 2, "lr": 0.001 * (n + 1), **options}
        (folder / f"{n}-row{n}.yaml").write_text(yaml.safe_dump(values))
    return folder


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search of twelve trials, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "search"
    arguments = ["--trials", 12, "--epochs", 2, *SMALL, "policy=one_cycle", "--output", folder]
    return folder, run(*arguments)


def test_without_plotly_all_but_the_page_is_written(tmp_path, monkeypatch, capsys):
    from capszoo.recipes import explore

    monkeypatch.setitem(sys.modules, "plotly", None)
    rows, folder, results = grid(tmp_path / "rows", 1, epochs=1), tmp_path / "run[red]", tmp_path / "table.csv"
    assert not explore.main(
        ["--grid", str(rows), *SMALL, "dataset=digits", "--output", str(folder), "--results", str(results)]
    )
    out = capsys.readouterr().out
    assert out.count('it needs plotly, pip install "capszoo[explore]"') == 1 and "left out: report.html" in out
    assert f"folder {folder}" in out, "brackets are no markup"
    assert not (folder / "report.html").exists() and table(results)[0]["name"] == "row0"
    assert len(table(folder / "trials.csv")) == 1 and (folder / "accuracy.png").exists()


def test_a_search_writes_tables_figures_and_a_page(searched):
    folder, out = searched
    trials, front = table(folder / "trials.csv"), table(folder / "front.csv")
    assert len(trials) == 12 and 1 <= len(front) <= 12 and "caution: no baseline is complete" in out
    for name in ("front", "tradeoff", "accuracy", "time_to_best"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    page = (folder / "report.html").read_text()
    assert {int(n) for n in re.findall(r'<tr[^>]*data-trial="(\d+)"', page)} >= {int(row["number"]) for row in trials}
    assert len(re.findall(r"^trial +\d+ ", out, re.M)) == 12 and f"front of {len(front)} Pareto-optimal" in out
    points = [(-float(r["accuracy"]), float(r["seconds"]), int(r["parameters"])) for r in front]
    for a in points:
        assert not any(b != a and all(y <= x for x, y in zip(a, b, strict=True)) for b in points)


def test_it_goes_on_by_the_command_that_began_it(searched, recipe):
    folder, _ = searched
    explore, alone = recipe("explore"), ["--resume", str(folder)]

    def parse(*words):
        return capszoo.command_line.parse_resumable(
            explore.build_parser, explore.MAY_CHANGE_ON_RESUME, [*words, *alone]
        )

    began = ["--trials", "12", "--epochs", "2", *SMALL, "policy=one_cycle", "--output", str(folder)]
    filled_in = ["--model", "capsnet_tiny", "--dataset", "digits"]
    reordered = ["--set", "policy=one_cycle", "amp=none", *SMALL[1:2]]
    assert parse(*began) == parse(*filled_in) == parse(*reordered) == parse()
    for words, expected in (
        (["--trials", "13"], "--trials 13 cannot change when a run is resumed: the run has --trials 12;"),
        (["--model", "capsnet"], "the run has --model capsnet_tiny;"),
        (["--objectives", "accuracy"], "the run has --objectives accuracy seconds parameters;"),
        (["--set", "amp=none"], "the run has --set model_kwargs={"),
    ):
        with pytest.raises(ValueError, match=re.escape(expected)):
            parse(*words)
    with pytest.raises(ValueError, match="--results is of no use without a --grid: leave it out"):
        explore.main([*alone, "--results", "rows.csv"])


def test_a_grid_that_is_resumed_takes_more_seeds_and_rows(searched, recipe, tmp_path):
    explore, folder, results = recipe("explore"), tmp_path / "grid", tmp_path / "table.csv"
    rows, other = grid(tmp_path / "rows", 1, epochs=1), grid(tmp_path / "other", 2, epochs=1)
    run("--grid", rows, *SMALL, "dataset=digits", "--output", folder)
    run("--resume", folder, "--grid", other / "1-row1.yaml", "--seeds", 2, "--results", results)
    assert [(row["name"], row["runs"]) for row in table(results)] == [("row0", "2"), ("row1", "2")]
    assert not explore.main(["--resume", str(folder)]), "it says by itself what it grew to"
    assert len(table(folder / "trials.csv")) == 4
    with pytest.raises(ValueError, match="2 seeds, not 1: give that many or more"):
        explore.main(["--resume", str(folder), "--seeds", "1"])
    with pytest.raises(ValueError, match="is a search, and takes no --grid: leave it out"):
        explore.main(["--resume", str(searched[0]), "--grid", str(rows)])


def test_a_search_of_before_goes_on_with_the_loss_that_it_allowed(searched, recipe, tmp_path):
    explore, folder = recipe("explore"), shutil.copytree(searched[0], tmp_path / "search")

    def parse(*words):
        return capszoo.command_line.parse_resumable(explore.build_parser, explore.MAY_CHANGE_ON_RESUME, [*words])

    text = (folder / "args.yaml").read_text()
    assert "max_drop: 0.0\n" in text
    (folder / "args.yaml").write_text(text.replace("max_drop: 0.0", "loss: 0.25"))
    assert parse("--resume", str(folder)).max_drop == 0.25
    assert parse("--resume", str(folder), "--loss", "1%").max_drop == 0.01
    (tmp_path / "config.yaml").write_text("loss: 0.1%\n")
    assert parse("--config", str(tmp_path / "config.yaml")).max_drop == 0.001
    assert parse("--resume", str(folder), "--config", str(tmp_path / "config.yaml")).max_drop == 0.001


def test_rows_of_images_that_are_not_square(tmp_path):
    rows = grid(tmp_path / "rows", 1, epochs=1, img_size=[20, 32])
    (rows / "1-other.yaml").write_text((rows / "0-row0.yaml").read_text())
    out = run("--grid", rows, *SMALL, "val_fraction=0.8", "--output", tmp_path / "grid")
    assert "front of" in out and "no baseline" not in out
    for trial in ("0000", "0001"):
        assert capszoo.load_model(tmp_path / "grid/trials" / trial / "best.safetensors").img_size == (20, 32)
    assert yaml.safe_load((tmp_path / "grid/chosen.yaml").read_text())["img_size"] == [20, 32]


def test_rows_of_one_size_that_is_written_in_two_ways(recipe, tmp_path, monkeypatch):
    explore = recipe("explore")
    rows = grid(tmp_path / "rows", 3, epochs=1, img_size=20)
    (rows / "1-row1.yaml").write_text("img_size: [20, 20]\nepochs: 1\n")
    loaded = []

    def load(args):
        loaded.append(args.img_size)
        raise capszoo.command_line.UsageError("that is all")

    monkeypatch.setattr(explore, "load_splits", load)
    arguments = ["--grid", str(rows), "--output", str(tmp_path / "grid")]
    with pytest.raises(ValueError, match="that is all"):
        explore.main(arguments)
    assert loaded == [20]
    (rows / "2-row2.yaml").write_text("img_size: [20, 32]\nepochs: 1\n")
    with pytest.raises(ValueError, match=re.escape("rows of different img_size (20, [20, 32]): give --set img_size=")):
        explore.main(arguments)


def test_the_chosen_solution_trains_with_the_printed_command(searched, tmp_path):
    folder, out = searched
    chosen = re.search(r"chosen \(fastest\): trial (\d+)", out)
    printed = re.search(r"train it: python (\S+) --config (\S+)", out)
    assert printed[1] == "recipes/train.py" and printed[2] == str(folder / "chosen.yaml")
    done = processes.run(ROOT / printed[1], "--config", printed[2], "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    trial = next(row for row in table(folder / "trials.csv") if row["number"] == chosen[1])
    assert result["parameters"] == int(trial["parameters"]) and result["eval_top1"] == float(trial["accuracy"])


def test_killed_and_resumed_it_loses_no_finished_trial(tmp_path):
    folder = tmp_path / "search"
    rows = grid(tmp_path / "rows", 4, epochs=3)
    process = processes.start(RECIPE, "--grid", rows, *SMALL, "--output", folder, stdout=subprocess.DEVNULL)
    # In the third trial, after its first epoch.
    third = folder / "trials/0002/resume.safetensors"
    wait_for(third.exists)
    process.kill()
    process.wait()
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder / 'study.db'}")
    before = {t.number: t.values for t in study.trials if t.state.name == "COMPLETE"}
    assert set(before) >= {0, 1} and (folder / "trials/0002/args.yaml").exists()
    run("--resume", folder)
    trials = table(folder / "trials.csv")
    complete = {row["name"]: row for row in trials if row["state"] == "complete"}
    assert sorted(complete) == [f"row{n}" for n in range(4)], "each row once"
    assert len([row for row in trials if row["state"] == "complete"]) == 4
    after = {t.number: t.values for t in study.trials if t.state.name == "COMPLETE"}
    assert all(after[number] == values for number, values in before.items())
    assert complete["row2"]["folder"].endswith("trials/0002"), "it went on in the folder of the killed trial"


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """A PostgreSQL server of our own; its URL."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    initdb = shutil.which("initdb") or (str(found[-1]) if found else None)
    if initdb is None:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg")
    binaries = Path(initdb).resolve().parent
    # The server refuses to run as root, and its account must reach the folder.
    account = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
    import tempfile

    home = Path(tempfile.mkdtemp(prefix="capszoo-postgres-"))
    if account:
        shutil.chown(home, "postgres", "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = [str(binaries / "initdb"), "-D", str(home / "data"), "-U", "me", "--auth=trust", "--no-sync"]
    subprocess.run(base, check=True, capture_output=True, cwd=home, **account)
    server = subprocess.Popen(
        [str(binaries / "postgres"), "-D", str(home / "data"), "-k", str(home), "-p", str(port), "-h", "127.0.0.1"],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=home, **account,
    )  # fmt: skip
    try:
        ready = [str(binaries / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
        wait_for(lambda: subprocess.run(ready, capture_output=True).returncode == 0, 30)
        yield f"postgresql+psycopg://me@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=30)
        shutil.rmtree(home, ignore_errors=True)


def start_workers(count, tmp_path, *arguments):
    return [processes.start(RECIPE, *arguments, "--output", tmp_path / f"worker{n}") for n in range(count)]


def finished(study):
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]


def test_workers_on_one_database_share_a_grid(postgres, tmp_path):
    rows = grid(tmp_path / "rows", 6)
    common = ["--storage", postgres, "--study", "shared", "--grid", rows, *SMALL, "--seeds", 2]
    workers = start_workers(2, tmp_path, *common)
    for worker in workers:
        out, err = worker.communicate(timeout=300)
        assert worker.returncode == 0, err
        assert "front of" in out and "no baseline" not in out
    study = optuna.load_study(study_name="shared", storage=postgres)
    runs = [(t.user_attrs["name"], t.user_attrs["options"]["seed"]) for t in finished(study)]
    assert sorted(runs) == [(f"row{n}", seed) for n in range(6) for seed in (0, 1)], "each run once, by someone"
    machines = {t.user_attrs["machine"] for t in finished(study)}
    assert len(machines) == 2, "both took part"
    assert len([t for t in study.trials if t.user_attrs.get("surplus") is None]) == 12
    # Both end with the whole study.
    assert len(table(tmp_path / "worker0/front.csv")) == len(table(tmp_path / "worker1/front.csv"))


def test_a_killed_workers_trial_is_run_by_another(postgres, tmp_path):
    rows = grid(tmp_path / "rows", 3, epochs=4)
    common = ["--storage", postgres, "--study", "killed", "--grid", rows, *SMALL]
    (first,) = start_workers(1, tmp_path, *common)
    wait_for((tmp_path / "worker0/trials/0000/resume.safetensors").exists)
    first.kill()
    first.communicate()
    run(*common, "--output", tmp_path / "second")
    study = optuna.load_study(study_name="killed", storage=postgres)
    assert sorted(t.user_attrs["name"] for t in finished(study)) == ["row0", "row1", "row2"]
    trials = table(tmp_path / "second/trials.csv")
    assert sum(row["state"] == "interrupted" and row["reason"] == "worker died" for row in trials) == 1


def test_a_dead_workers_trial_on_another_machine_is_found_by_its_silence(postgres, tmp_path):
    rows = grid(tmp_path / "rows", 2, epochs=1)
    common = ["--storage", postgres, "--study", "silent", "--grid", rows, *SMALL, "--grace", 4]
    (first,) = start_workers(1, tmp_path, *common)
    wait_for((tmp_path / "worker0/trials/0000/args.yaml").exists)
    first.kill()
    first.communicate()
    study = optuna.load_study(study_name="silent", storage=postgres)
    running = [t for t in study.trials if t.state.name == "RUNNING"]
    # No process of this machine: only the missing heartbeat can tell.
    for trial in running:
        study._storage.set_trial_user_attr(trial._trial_id, "machine", "elsewhere:1 cpu")
    run(*common, "--output", tmp_path / "second")
    assert sorted(t.user_attrs["name"] for t in finished(study)) == ["row0", "row1"]


BAD = [
    (["--objectives", "accuracy", "speed"], "unknown objective 'speed'"),
    (["--storage", "postgresql+psycopg://me@127.0.0.1:1/none"], "storage postgresql+psycopg://me@127.0.0.1:1/none"),
    (["--budget", "0.0001s"], "too short for one trial: an epoch of capsnet_tiny on digits takes about"),
    (["--budget", "soon"], "'soon' is no time"),
    (["--grid", "papers"], "no grid 'papers'"),
    (["--set", "polcy=fixed"], "unknown key 'polcy', did you mean 'policy'?"),
    (["--set", "policy=fixd"], "unknown policy 'fixd'"),
    (["--set", "model_kwargs={num_classes: 3}"], "num_classes=3 contradicts the images of 'digits'"),
    (["--set", "model_kwargs={conv_dim: many}", "--trials", "1"], "conv_dim='many' is not possible"),
    (["--grid", "paper_tiny", "--dataset", "digits", "--set", "model_kwargs={squash: 3}"], "squash=3 is not possible"),
    (["--grid", "paper_tiny", "--trials", "3"], "--trials is of no use to a --grid: leave it out, the trials are"),
    (["--retime"], "--retime is of no use without a --grid: leave it out"),
    (["--epochs", "3", "--set", "epochs=5"], "--epochs 3 and --set epochs=5 contradict each other: give one of them"),
    (["--set", "policy=lr_finder"], "policy=lr_finder compares no trainings"),
    (["--set", "img_size=20x32"], "'20x32' is no size: give one number, or height and width"),
    (["--img-size", "20", "--set", "img_size=30"], "--img-size 20 and --set img_size=30 contradict each other"),
    (["--trials", "0"], "--trials 0 is out of range: give 1 to 1,000,000"),
    (["--trials", "9" * 20], "is out of range: give 1 to 1,000,000"),
    (["--epochs", "9" * 20, "--trials", "1"], "is out of range: give 1 to 1,000,000"),
    (["--seed", "-1"], "--seed -1 is out of range"),
    (["--set", "seed=-1"], "--seed -1 is out of range"),
    (["--seed", str(2**31)], "--seed 2147483648 is out of range: give 0 to 2^31 - 1"),
    (["--storage", "sqlite://{a}", "--trials", "1"], "storage sqlite://{a} cannot be used"),
    (["--max-drop", "2"], "'2' is no accuracy to lose"),
    (["--val-fraction", "0", "--trials", "1"], "--val-fraction above 0"),
    (["--model", "capsnet_tny"], "capsnet_tny"),
    (["--dataset", "mnist", "--data-dir", "nowhere"], "nowhere"),
    (["--resume", "nowhere"], "--resume 'nowhere' is no run folder"),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(recipe, tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    explore = recipe("explore")
    with pytest.raises(SystemExit) as ended:
        capszoo.command_line.run(lambda: explore.main(arguments))
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and expected in err, err
    assert not any(tmp_path.iterdir())


def test_searches_of_the_same_second_have_folders_of_their_own(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    explore = recipe("explore")
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    args = explore.build_parser().parse_args([])
    options = {"model": "capsnet_tiny", "dataset": "digits"}
    with explore.claim_folder(args, options) as first, explore.claim_folder(args, options) as second:
        assert first.is_dir() and second.is_dir()
        assert second.name == f"{first.name}-1"
    with pytest.raises(KeyError), explore.claim_folder(args, options) as third:
        raise KeyError
    assert third.name == f"{first.name}-2" and sorted(Path("runs").iterdir()) == [first, second]


def test_a_folder_of_another_data_set_is_refused(searched, recipe, tmp_path, capsys):
    folder, _ = searched
    copy = shutil.copytree(folder, tmp_path / "copy")
    text = (copy / "args.yaml").read_text()
    (copy / "args.yaml").write_text(text.replace("val_fraction: 0.1", "val_fraction: 0.2"))
    with pytest.raises(SystemExit) as ended:
        capszoo.command_line.run(lambda: recipe("explore").main(["--resume", str(copy)]))
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "was made for images" in err and err.count("\n") == 1


def test_the_paper_has_eight_rows():
    rows = read_grid(["paper"], {})
    assert read_grid(["paper/1-baseline.yaml"], {})[0].options == rows[0].options
    assert [row.name for row in rows] == [
        "baseline", "exp_decay", "one_cycle", "warm_restarts", "ada_batch", "warm_ada_batch", "weight_sharing",
        "warm_ada_batch_weight_sharing",
    ]  # fmt: skip
    published = table(ROOT / "recipes/results/paper-published.csv")
    assert [r["name"] for r in published if r["dataset"] == "mnist"] == [row.name for row in rows]
    import torch

    digits = capszoo.data.load_data("digits", "data")
    as_coded = {row.name: row.options for row in read_grid(["paper_as_coded"], {})}
    for row in rows:
        with torch.device("meta"):
            model = make_model(options_from(row.options), digits)
        shared = row.name.endswith("weight_sharing")
        # The paper counts the 11,520 coupling coefficients as parameters.
        coded = as_coded.pop(f"{row.name}_as_coded", row.options)
        assert (coded["model"], coded["start"]) == (row.options["model"], row.options["start"])
        counted = next(int(r["parameters"]) for r in published if r["name"] == row.name)
        assert sum(p.numel() for p in model.parameters()) + 11_520 == counted, shared
    assert not as_coded  # each is another form of a row of the paper
    scaled = read_grid(["paper"], {"model": "capsnet_tiny", "epochs": 8, "warm_epochs": 1})
    assert [row.options.get("warm_epochs") for row in scaled] == [None] * 4 + [1, 1, None, 1]
    assert {(row.options["model"], row.options["epochs"]) for row in scaled} == {("capsnet_tiny", 8)}
