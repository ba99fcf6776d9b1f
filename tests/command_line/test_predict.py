"""`capszoo predict` as a person runs it."""

import csv
import io
import json
import os
import shutil

import numpy as np
import processes
import pytest
import torch
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


def odd_images(root, array):
    """Files that hold the same digit in many ways, by name, and files that hold none."""
    image, colour = Image.fromarray(array), np.dstack([array] * 3)
    same = {
        "16 bits.png": lambda path: Image.fromarray(array.astype(np.uint16) * 257).save(path),
        "alpha.png": lambda path: Image.fromarray(np.dstack([colour, np.full_like(array, 255)])).save(path),
        "[bold]naïve ü.png": image.save,
        "lossless.webp": lambda path: image.save(path, lossless=True),
        "moving.gif": lambda path: image.save(path, save_all=True, append_images=[image.rotate(90)]),
        "palette.png": lambda path: Image.fromarray(colour).quantize(256).save(path, transparency=b"\0"),
        "upper.PNG": image.save,
        "no suffix": lambda path: image.save(path, format="png"),
    }
    other = {
        "bits.png": image.convert("1").save,
        "cmyk.jpg": image.convert("CMYK").save,
        "long.png": image.resize((3000, 2)).save,
        "one pixel.png": image.resize((1, 1)).save,
    }
    for name, save in {**same, **other}.items():
        save(root / name)
    (root / "empty.png").touch()
    (root / "cut.png").write_bytes((root / "upper.PNG").read_bytes()[:150])
    (root / "text.png").write_text("<svg/>")
    (root / "LICENSE").write_text("passed over, as its name is not that of an image")
    (root / "folder.png").mkdir()
    Image.fromarray(array.astype(np.float32)).save(root / "floats.tif")
    return set(same), set(other)


def test_odd_images(tmp_path, capsys):
    array = load_data("digits", val_fraction=0).test.images[3, 0].numpy()
    same, other = odd_images(tmp_path, array)
    expected = capszoo.predict(capszoo.create_model("capsnet_tiny.mnist", pretrained=True), array)
    code, out, err = predict(capsys, "capsnet_tiny.mnist", tmp_path, "--json")
    scores = {value["image"].removeprefix(f"{tmp_path}/"): value["scores"] for value in json.loads(out)}
    assert code == 2 and scores.keys() == same | other
    for name in same - {"palette.png"}:
        assert scores[name] == pytest.approx(expected.scores, abs=1e-6), name
    assert scores["palette.png"] == pytest.approx(expected.scores, abs=0.05)
    lines = err.splitlines()
    assert len(lines) == 4 and "<" not in err
    for line, (name, reason) in zip(lines, [("cut.png", "truncated"), ("empty.png", "it is empty"),
                                            ("floats.tif", "8 or 16 bits"), ("text.png", "its format is not known")],
                                    strict=True):  # fmt: skip
        assert line.startswith("error: ") and name in line and reason in line


def test_names_that_are_not_text(folder, tmp_path, monkeypatch):
    """Bytes that are not UTF-8 go through as they are, in more than one batch."""
    odd = os.fsencode(tmp_path) + b"/\xff.png"
    try:
        shutil.copy(folder / "0.png", odd)
    except OSError:
        pytest.skip("this file system takes only text")
    names = io.BytesIO(odd + b"\n" + 600 * (os.fsencode(folder / "0.png") + b"\r\n"))
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(names, encoding="utf-8"))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="utf-8", write_through=True))
    assert main(["predict", "capsnet_tiny.mnist", "-", "--csv"]) == 0
    rows = printed.getvalue().splitlines()
    assert len(rows) == 602 and rows[1].startswith(odd + b",") and rows[1].split(b",")[1:] == rows[2].split(b",")[1:]


def test_standard_input_without_names(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert predict(capsys, "capsnet_tiny.mnist", "-") == (
        2, "", "error: standard input names no images: give a line for each\n",
    )  # fmt: skip


def test_a_folder_that_cannot_be_read(folder, capsys, monkeypatch):
    def refuse(walk, path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("capszoo.data.folders.Walk.entries", refuse)
    code, out, err = predict(capsys, "capsnet_tiny.mnist", folder / "0.png", folder, "--csv")
    assert code == 2 and len(out.splitlines()) == 2
    assert err.count("\n") == 1 and "Permission denied" in err and "mend its permissions" in err


def test_several_classes(folder, make_run, capsys):
    """Of a model of images that may show several classes, and of any with --threshold."""
    file = make_run("capsnet_tiny", "pets", num_classes=3, header={"several_classes": True})
    values = json.loads(predict(capsys, file, folder, "--json", "--threshold", "0.05")[1])
    names = [f"class {place}" for place in range(3)]
    for value in values:
        assert value["shows"] == [n for n, score in zip(names, value["scores"], strict=True) if score >= 0.05]
    assert {*map(len, (value["shows"] for value in values))} != {0}
    half = json.loads(predict(capsys, file, folder, "--json")[1])
    assert [value["shows"] for value in half] == [
        [n for n, score in zip(names, value["scores"], strict=True) if score >= 0.5] for value in half
    ]
    out = predict(capsys, file, folder / "0.png", "--csv", "--threshold", "0")[1]
    assert out.splitlines()[0].endswith(",shows") and out.splitlines()[1].endswith(",class 0;class 1;class 2")
    out = predict(capsys, file, folder / "0.png", "--threshold", "2")[1]
    assert out.splitlines()[0].split()[-1] == "shows" and out.splitlines()[1].split()[-1] == "-"
    assert "shows" not in predict(capsys, "capsnet_tiny.mnist", folder)[1]


def test_probabilities_of_a_model_that_gives_logits(folder, make_run, capsys, monkeypatch):
    file = make_run("cnn_baseline_tiny", "pets", num_classes=3)
    plain = json.loads(predict(capsys, file, folder / "0.png", "--json")[1])[0]["scores"]
    monkeypatch.setattr(capszoo.models.CNNBaseline, "returns_logits", True, raising=False)
    (value,) = json.loads(predict(capsys, file, folder / "0.png", "--json")[1])
    assert value["scores"] == pytest.approx(torch.tensor(plain).softmax(0).tolist())
    assert sum(value["scores"]) == pytest.approx(1) and value["score"] == max(value["scores"])


def test_names_are_printed_as_they_are(folder, tmp_path, capsys):
    shutil.copy(folder / "0.png", tmp_path / "10:100:5 [red].png")
    _, out, _ = predict(capsys, "capsnet_tiny.mnist", tmp_path)
    assert "10:100:5 [red].png" in out


def test_a_model_folder(folder, recipe, tmp_path, capsys):
    recipe("export").main(["hub", "capsnet_tiny.mnist", "--output", str(tmp_path / "hub")])
    capsys.readouterr()
    weights = ("capsnet_tiny.mnist", tmp_path / "hub", f"local-dir:{tmp_path / 'hub'}")
    answers = [predict(capsys, name, folder, "--csv")[1] for name in weights]
    assert answers[0].splitlines()[0] == answers[1].splitlines()[0] and answers[1] == answers[2]
    for one, other in zip(*(csv.DictReader(io.StringIO(answer)) for answer in answers[:2]), strict=True):
        assert one["class"] == other["class"] and float(one["score"]) == pytest.approx(float(other["score"]), abs=1e-6)


def test_reconstructions(folder, tmp_path, capsys):
    code, _, _ = predict(capsys, "capsnet_tiny.mnist", folder, "--reconstruct", tmp_path / "drawn.png")
    image = Image.open(tmp_path / "drawn.png")
    assert code == 0 and image.size == (10 * 30 + 2, 30 + 2)  # five pairs, with lines of two pixels between


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([".", "x.png"], "folder '.' holds neither best.safetensors nor model.safetensors"),
        (["capsnet_tiny.mnist", "x.png", "--threshold", "nan"], "--threshold nan is not a score"),
        (["nowhere.safetensors", "x.png"], "is no file and no shipped weights"),
        (["capsnet_tiny.mnist"], "IMAGE"),
        (["capsnet_tiny.mnist", "x.png", "--json", "--csv"], "--json does not go with --csv"),
        (["capsnet_tiny.mnist", "x.png", "--reconstruct", "x.jpg"], "let it end in .png"),
        (["capsnet_tiny.mnist", "x.png", "--reconstruct", "cat.png"], "--reconstruct 'cat.png' is there already"),
        (["capsnet_tiny.mnist", "x.png", "--reconstruct", "no/a.png"], "is in a folder that is not there: make it"),
        (["cnn_baseline_tiny.mnist", "x.png", "--reconstruct", "x.png"], "no decoder for --reconstruct"),
        (["capsnet_tiny.mnist", "x.png", "--jsn"], "did you mean '--json'"),
    ],
)
def test_bad_input_is_one_line(argv, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.png").write_bytes(b"a photograph")
    if argv[0].startswith("cnn") and not capszoo.list_pretrained("cnn*"):
        model = capszoo.create_model("cnn_baseline_tiny")
        capszoo.save_model("cnn.safetensors", model)
        argv = ["cnn.safetensors", *argv[1:]]
    with pytest.raises(SystemExit) as ended:
        run(lambda: main(["predict", *argv]))
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and expected in err
    assert (tmp_path / "cat.png").read_bytes() == b"a photograph"


def test_python_m_capszoo(folder):
    done = processes.run("-c", "import runpy, sys; sys.argv = ['capszoo', 'list']; runpy.run_module('capszoo', "
                         "run_name='__main__')")  # fmt: skip
    assert done.returncode == 0 and "capsnet_tiny" in done.stdout.split()
