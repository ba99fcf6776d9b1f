"""`capszoo predict` as a person runs it."""

import csv
import io
import json

import processes
import pytest
from PIL import Image

import capszoo
from capszoo.command_line import run
from capszoo.command_line.main import main
from capszoo.data import load_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five digits, one of them in a folder below, one in colour, and files that are no images."""
    root = tmp_path_factory.mktemp("images")
    test = load_data("digits", val_fraction=0).test
    (root / "more").mkdir()
    for place in range(5):
        image = Image.fromarray(test.images[place, 0].numpy())
        image = image.convert("RGB") if place == 1 else image
        image.save(root / "more/4.png" if place == 4 else root / f"{place}.png")
    (root / "notes.txt").write_text("about these images")
    return root


def predict(capsys, *argv):
    code = main(["predict", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def test_table(folder, capsys):
    code, out, err = predict(capsys, "capsnet_tiny.mnist", folder / "0.png", folder / "more")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    model = capszoo.create_model("capsnet_tiny.mnist", pretrained=True)
    assert lines[0].split() == ["image", "class", "score", "second", "best", "score"]
    for line, path in zip(lines[1:], (folder / "0.png", folder / "more/4.png"), strict=True):
        found = capszoo.predict(model, path)
        assert line.split()[0] == str(path) and found.class_name in line and f"{found.score:.3f}" in line


def test_json_and_csv(folder, capsys):
    code, out, _ = predict(capsys, "capsnet_tiny.mnist", folder, "--json")
    values = json.loads(out)
    assert code == 0 and [value["image"] for value in values] == [
        str(folder / name) for name in ("0.png", "1.png", "2.png", "3.png", "more/4.png")
    ]
    assert all(len(value["scores"]) == 10 and value["score"] == max(value["scores"]) for value in values)
    code, out, _ = predict(capsys, "capsnet_tiny.mnist", folder, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and [row["class"] for row in rows] == [value["class"] for value in values]
    assert [float(row["second_score"]) for row in rows] == [value["second_score"] for value in values]


def test_names_from_standard_input(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{folder / '2.png'}\n\n{folder / 'more'}\n"))
    code, out, _ = predict(capsys, "capsnet_tiny.mnist", "-", "--json")
    assert code == 0 and [value["image"] for value in json.loads(out)] == [
        str(folder / "2.png"), str(folder / "more/4.png"),
    ]  # fmt: skip


def test_what_cannot_be_read_costs_its_line_alone(folder, tmp_path, capsys):
    (tmp_path / "bad.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    names = [tmp_path / "bad.png", folder / "0.png", tmp_path / "nowhere.png", tmp_path / "empty"]
    code, out, err = predict(capsys, "capsnet_tiny.mnist", *names, "--json")
    assert code == 2 and [value["image"] for value in json.loads(out)] == [str(folder / "0.png")]
    lines = err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
    assert "bad.png" in lines[0] and "nowhere.png" in lines[1] and "holds no images" in lines[2]


def test_a_run_folder_and_a_colour_model(folder, make_run, capsys):
    file = make_run("capsnet_tiny", "pets", in_chans=3, img_size=[20, 24], num_classes=2)
    code, out, _ = predict(capsys, file.parent, folder / "0.png", folder / "1.png", "--json")
    assert code == 0 and {value["class"] for value in json.loads(out)} <= {"class 0", "class 1"}


def test_reconstructions(folder, tmp_path, capsys):
    code, _, _ = predict(capsys, "capsnet_tiny.mnist", folder, "--reconstruct", tmp_path / "drawn.png")
    image = Image.open(tmp_path / "drawn.png")
    assert code == 0 and image.size == (10 * 30 + 2, 30 + 2)  # five pairs, with lines of two pixels between


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["nowhere.safetensors", "x.png"], "is no file and no shipped weights"),
        (["capsnet_tiny.mnist"], "IMAGE"),
        (["capsnet_tiny.mnist", "x.png", "--json", "--csv"], "--json does not go with --csv"),
        (["capsnet_tiny.mnist", "x.png", "--reconstruct", "x.jpg"], "let it end in .png"),
        (["cnn_baseline_tiny.mnist", "x.png", "--reconstruct", "x.png"], "no decoder for --reconstruct"),
        (["capsnet_tiny.mnist", "x.png", "--jsn"], "did you mean '--json'"),
    ],
)
def test_bad_input_is_one_line(argv, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if argv[0].startswith("cnn") and not capszoo.list_pretrained("cnn*"):
        model = capszoo.create_model("cnn_baseline_tiny")
        capszoo.save_model("cnn.safetensors", model)
        argv = ["cnn.safetensors", *argv[1:]]
    with pytest.raises(SystemExit) as ended:
        run(lambda: main(["predict", *argv]))
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and expected in err


def test_python_m_capszoo(folder):
    done = processes.run("-c", "import runpy, sys; sys.argv = ['capszoo', 'list']; runpy.run_module('capszoo', "
                         "run_name='__main__')")  # fmt: skip
    assert done.returncode == 0 and "capsnet_tiny" in done.stdout.split()
