"""Options from command lines and YAML files, and errors in one line."""

import argparse

import pytest

from capszoo.command_line import OptionParser, UsageError, key_value, read_yaml, run


@pytest.fixture
def parser():
    parser = OptionParser()
    parser.add_argument("--config")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--amp", choices=["none", "bf16"], default="none")
    parser.add_argument("--decoder", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--model-kwargs", nargs="*", type=key_value, default=[])
    parser.add_argument("--lr", type=float)
    return parser


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
    args, _ = parser.parse(["--config", yaml_file(tmp_path, "lr: null\n")])
    assert args.lr is None


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
