"""Options from command lines and YAML files, and errors in one line."""

import argparse
from pathlib import Path

import pytest

from capszoo.command_line import ExtendAction, OptionParser, SizeAction, key_value, parse_resumable, run
from capszoo.engine.run_folder import hold_folder
from capszoo.errors import UsageError
from capszoo.files import read_yaml


def build_parser():
    parser = OptionParser()
    parser.add_argument("--config")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--amp", choices=["none", "bf16"], default="none")
    parser.add_argument("--decoder", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--model-kwargs", nargs="*", action=ExtendAction, type=key_value, default=[])
    parser.add_argument("--lr", type=float)
    return parser


def build_resumable_parser():
    parser = build_parser()
    parser.add_argument("weights", nargs="?")
    parser.add_argument("--img-size", action=SizeAction)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--checkpoint")
    parser.add_argument("--grid", nargs="+")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output")
    parser.add_argument("--resume")
    return parser


@pytest.fixture
def parser():
    return build_parser()


def yaml_file(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return str(path)


def test_command_line_beats_file_beats_default(parser, tmp_path):
    kwargs = "{conv_dim: 8, keep_types: [1, 2], keep_capsules: null, name: '7'}"
    path = yaml_file(tmp_path, f"epochs: 5\ndecoder: false\nmodel_kwargs: {kwargs}\nlr: 1e-3\n")
    args, given = parser.parse(["--config", path, "--epochs", "7"])
    assert (args.epochs, args.decoder, args.amp, args.lr) == (7, False, "none", 0.001)
    assert dict(args.model_kwargs) == {"conv_dim": 8, "keep_types": [1, 2], "keep_capsules": None, "name": "7"}
    assert given == {"config", "epochs", "decoder", "model_kwargs", "lr"}


def test_null_is_no_value(parser, tmp_path):
    args, given = parser.parse(["--config", yaml_file(tmp_path, "lr: null\nepochs: null\nmodel_kwargs: null\n")])
    assert (args.lr, args.epochs, args.model_kwargs, given) == (None, 30, [], {"config"})
    with pytest.raises(UsageError, match="unknown key 'epoch', did you mean 'epochs'"):
        parser.parse(["--config", yaml_file(tmp_path, "epoch: null\n")])


def test_small_numbers_of_a_file_stay_numbers(parser, tmp_path):
    """JSON writes 1e-05, which YAML would read as text."""
    args, _ = parser.parse(["--config", yaml_file(tmp_path, "model_kwargs: {drop_rate: 1.0e-05, dims: [1, 2.5]}\n")])
    assert dict(args.model_kwargs) == {"drop_rate": 1e-5, "dims": [1, 2.5]}
    for text in ("{a b: 1}", "{1: 2}", "[a, b]", "3"):
        with pytest.raises(UsageError, match="model_kwargs: .* is not of the form name=value"):
            parser.parse(["--config", yaml_file(tmp_path, f"model_kwargs: {text}\n")])


@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        (["28"], "28", 28),
        (["28"], "[28]", 28),
        (["28", "28"], "[28, 28]", 28),
        (["20", "32"], "[20, 32]", [20, 32]),
    ],
)
def test_sizes_of_images(words, text, expected, tmp_path):
    parser = build_resumable_parser()
    assert parser.parse(["--img-size", *words])[0].img_size == expected
    assert parser.parse(["--config", yaml_file(tmp_path, f"img_size: {text}\n")])[0].img_size == expected
    assert parser.parse(parser.words("img_size", expected))[0].img_size == expected
    parser.set_values({"img_size": tuple(map(int, words))}, "of Python")
    assert parser.parse([])[0].img_size == expected


@pytest.mark.parametrize("text", ["20x32", "(20, 32)", "1 2 3", "2.5", "-5", "9999999999", "true", "big", ""])
def test_sizes_that_are_none(text, tmp_path):
    config = yaml_file(tmp_path, f"img_size: '{text}'\n")
    for arguments in (["--img-size", text], ["--config", config]):
        with pytest.raises(UsageError) as caught:
            build_resumable_parser().parse(arguments)
        assert f"{text!r} is no size: give one number, or height and width such as 20 32" in str(caught.value)
    for value in ([1, 2, 3], [], [20, None], {"a": 1}):
        with pytest.raises(UsageError, match="img_size: .* is no size"):
            build_resumable_parser().set_values({"img_size": value}, "of Python")


def test_words_of_values():
    parser = build_resumable_parser()
    for key, value, expected in (
        ("epochs", 3, ["--epochs", "3"]),
        ("decoder", True, ["--decoder"]),
        ("decoder", False, ["--no-decoder"]),
        ("compile", True, ["--compile"]),
        ("compile", False, []),
        ("lr", None, []),
        ("model_kwargs", [], []),
        ("model_kwargs", [("a", [1, 2]), ("b", "7")], ["--model-kwargs", "a=[1, 2]", 'b="7"']),
        ("weights", "w.safetensors", ["the weights", "w.safetensors"]),
        ("grid", ["a", "b"], ["--grid", "a", "b"]),
    ):
        assert parser.words(key, value) == expected
        if expected and key != "weights":
            assert getattr(parser.parse(expected)[0], key) == value


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A run whose defaults were filled in, and the files that it names."""
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "pets", "mnist"):
        (tmp_path / folder).mkdir()
    for file in ("w.safetensors", "v.safetensors"):
        (tmp_path / file).touch()
    (tmp_path / "run/args.yaml").write_text(
        "weights: w.safetensors\nepochs: 3\namp: none\ndecoder: true\nlr: 0.001\nimg_size: [20, 32]\ncompile: false\n"
        "model_kwargs: {a: 1, b: [2, 3]}\ndataset: pets\ncheckpoint: w.safetensors\ngrid: [paper, pets]\ndevice: cpu\n"
    )
    return tmp_path


def resume(*words):
    return parse_resumable(build_resumable_parser, {"resume", "device"}, ["--resume", "run", *words])


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--epochs 3 --amp none --decoder --lr 1e-3 --img-size 20 32",
        "--model-kwargs b=[2,3] a=1 --output run",
        "--output ABSOLUTE/run --dataset ABSOLUTE/pets --checkpoint ABSOLUTE/w.safetensors --grid paper ABSOLUTE/pets",
        "--dataset ./pets/ --checkpoint run/../w.safetensors --output ./run/",
        "--config run/args.yaml",
        "--config again.yaml --epochs 3",
    ],
)
def test_options_that_a_run_has_already(words, run_folder):
    (run_folder / "again.yaml").write_text("img_size: [20, 32]\nmodel_kwargs: {b: [2, 3], a: 1}\nepochs: 5\nlr: null\n")
    args = resume(*words.replace("ABSOLUTE", str(run_folder)).split())
    expected = resume()
    assert args == expected and args.output == "run" and (args.lr, args.img_size) == (0.001, [20, 32])
    assert resume("w.safetensors") == resume(str(run_folder / "w.safetensors")) == expected
    assert resume("--device", "cuda").device == "cuda"


@pytest.mark.parametrize(
    ("words", "ours", "theirs"),
    [
        ("--amp bf16", "--amp bf16", "--amp none"),
        ("--lr 0.002", "--lr 0.002", "--lr 0.001"),
        ("--no-decoder", "--no-decoder", "--decoder"),
        ("--compile", "--compile", "no --compile"),
        ("--img-size 32 20", "--img-size 32 20", "--img-size 20 32"),
        ("--img-size 20", "--img-size 20", "--img-size 20 32"),
        ("--model-kwargs a=1", "--model-kwargs a=1", "--model-kwargs a=1 b=[2, 3]"),
        ("--dataset mnist", "--dataset mnist", "--dataset pets"),
        ("--checkpoint v.safetensors", "--checkpoint v.safetensors", "--checkpoint w.safetensors"),
        ("--grid pets paper", "--grid pets paper", "--grid paper pets"),
        ("--output other", "--output other", "--output run"),
        ("--config more.yaml", "--epochs 5", "--epochs 3"),
        ("v.safetensors", "the weights v.safetensors", "the weights w.safetensors"),
    ],
)
def test_options_that_a_run_does_not_have(words, ours, theirs, run_folder):
    (run_folder / "more.yaml").write_text("epochs: 5\n")
    with pytest.raises(UsageError) as caught:
        resume(*words.split())
    assert str(caught.value) == (
        f"{ours} cannot change when a run is resumed: the run has {theirs}; leave it out, or start a new run with "
        "--output"
    )


def test_folders_with_odd_names(run_folder):
    (run_folder / "run").rename(run_folder / "-1")
    args = parse_resumable(build_resumable_parser, {"resume"}, ["--resume=-1", "--output=./-1"])
    assert args.output == "-1" and args.epochs == 3
    for name in ("a\nb", "a\0b", "\udcff"):  # args.yaml could not be read again
        with pytest.raises(UsageError, match="has characters that cannot be shown"), hold_folder(Path(name), str):
            pass
    assert sorted(path.name for path in run_folder.iterdir()) == [
        "-1",
        "mnist",
        "pets",
        "v.safetensors",
        "w.safetensors",
    ]


def test_a_folder_with_the_name_of_a_data_set_is_not_it(run_folder):
    file = run_folder / "run/args.yaml"
    file.write_text(file.read_text().replace("dataset: pets", "dataset: mnist"))
    assert resume("--dataset", "mnist").dataset == "mnist"
    with pytest.raises(UsageError, match="the run has --dataset mnist"):
        resume("--dataset", "./mnist")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("epoch: 3", "did you mean 'epochs'"),
        ("epochs: 3.5", "epochs"),
        ("decoder: 3", "true or false"),
        ("amp: fp8", "amp"),
        ("- epochs", "option: value"),
        ("epochs: [", "no YAML"),
        ("config: other.yaml", "unknown key 'config'"),
    ],
)
def test_wrong_files(parser, tmp_path, text, expected):
    with pytest.raises(UsageError, match=expected) as caught:
        parser.parse(["--config", yaml_file(tmp_path, text)])
    assert "\n" not in str(caught.value)


def test_unknown_options_and_abbreviations(parser):
    with pytest.raises(UsageError, match="did you mean '--epochs'"):
        parser.parse(["--epoch", "3"])
    with pytest.raises(UsageError, match="invalid int value"):
        parser.parse(["--epochs", "x"])


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match="nowhere.yaml"):
        read_yaml(tmp_path / "nowhere.yaml")


def test_key_value():
    assert key_value("a=1") == ("a", 1) and key_value("b=[1, 2]") == ("b", [1, 2])
    assert key_value("c=x=y") == ("c", "x=y")
    for wrong in ("a", "=1", "a b=1"):
        with pytest.raises(argparse.ArgumentTypeError):
            key_value(wrong)


def test_run_turns_our_errors_into_a_line_and_leaves_bugs_alone(capsys):
    def fail():
        raise UsageError("no data\nsecond line")

    with pytest.raises(SystemExit) as ended:
        run(fail)
    assert ended.value.code == 2 and capsys.readouterr().err == "error: no data\n"

    def bug():
        return int("x")

    with pytest.raises(ValueError, match="invalid literal"):
        run(bug)
    with pytest.raises(SystemExit) as ended:
        run(lambda: 130)
    assert ended.value.code == 130


def test_an_option_of_pairs_may_be_given_again(parser, tmp_path):
    assert parser.parse([])[0].model_kwargs == []
    args, _ = parser.parse(["--model-kwargs", "a=1", "b=2", "--model-kwargs", "c=3"])
    assert args.model_kwargs == [("a", 1), ("b", 2), ("c", 3)]
    config = ["--config", yaml_file(tmp_path, "model_kwargs: {d: 4}\n")]
    assert parser.parse(config)[0].model_kwargs == [("d", 4)]
    assert parser.parse([*config, "--model-kwargs", "a=1"])[0].model_kwargs == [("a", 1)], "in place of the file's"
