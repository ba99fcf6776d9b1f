"""The console command: every job, with and without what a machine may lack."""

import json
import subprocess
import sys

import pytest
import torch

import capszoo
from capszoo import cli
from capszoo.command_line import run


def call(capsys, *arguments):
    """Call the command in this process; return exit code, output and error output."""
    with pytest.raises(SystemExit) as ended:
        run(lambda: cli.main([*map(str, arguments)]))
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_list(capsys):
    assert call(capsys, "list") == (0, "\n".join(capszoo.list_models()) + "\n", "")
    assert call(capsys, "list", "*_ws")[1] == "capsnet_ws\n"
    assert call(capsys, "list", "--pretrained")[1].split() == capszoo.list_pretrained()


def test_info(capsys):
    code, out, _ = call(capsys, "info", "capsnet_ws")
    assert code == 0 and out.startswith("capsnet_ws: 5,370,784 parameters, ") and "images of 1x28x28" in out
    assert "  capsnet_ws.mnist: mnist, top-1 99." in out
    assert "no weights are shipped" in call(capsys, "info", "cnn_baseline")[1]


def test_info_of_a_file(capsys, tmp_path):
    model = capszoo.create_model("capsnet_tiny", conv_dim=8, num_classes=3)
    capszoo.save_model(tmp_path / "best.safetensors", model, dataset="pets", eval_top1=0.5)
    code, out, _ = call(capsys, "info", str(tmp_path))
    first, second = out.splitlines()
    assert code == 0 and first == str(capszoo.model_info(model))
    assert second.endswith("best.safetensors: dataset pets, eval_top1 0.5, capszoo_version " + capszoo.__version__)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["lst"], "unknown command 'lst', did you mean 'list'?"),
        (["info"], "required: model"),
        (["list", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["info", "capsnet_tny"], "did you mean 'capsnet_tiny'"),
        (["train", "--dataset", "pets"], "unknown data set 'pets'"),
        (["train", "../pets"], "'../pets' has no option before it: did you mean --dataset ../pets?"),
        (["train", "--epoch", "3"], "unknown option '--epoch', did you mean '--epochs'"),
        (["validate"], "give either weights"),
        ([], "required: COMMAND"),
    ],
)
def test_errors_are_one_line(capsys, arguments, expected):
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and expected in err


@pytest.mark.parametrize("recipe", cli.RECIPES)
def test_every_recipe_has_its_command(capsys, recipe):
    code, out, _ = call(capsys, recipe, "--help")
    assert code == 0 and out.startswith(f"usage: capszoo {recipe} ")


def test_a_recipe_runs(capsys, tmp_path):
    options = "--epochs 1 --policy fixed --batch-size 128 --amp none --quiet --model-kwargs conv_dim=8 num_types=2"
    code, out, _ = call(capsys, "train", *options.split(), "--output", tmp_path / "run")
    assert code == 0 and out.startswith("test top1 ")
    assert json.loads((tmp_path / "run/result.json").read_text())["dataset"] == "digits"


def test_doctor_tells_what_runs_and_why(capsys, monkeypatch):
    code, out, _ = call(capsys, "doctor")
    found = dict(line.split("  ", 1) for line in out.splitlines())
    assert code == 0 and found["capszoo"].strip() == capszoo.__version__
    assert found["torch"].strip().split("+")[0] == torch.__version__.split("+")[0]
    assert found["routing on cpu"].strip() == "PyTorch tiles: Triton has no kernels for cpu"
    assert found["weights"].strip() == f"{len(capszoo.list_pretrained())} shipped, none damaged"
    capszoo.set_fused_routing(False)
    try:
        assert "plain reference: CAPSZOO_FUSED_ROUTING=0" in call(capsys, "doctor")[1]
    finally:
        capszoo.set_fused_routing(True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_doctor_without_gpu(capsys):
    assert "finds no GPU" in call(capsys, "doctor")[1] or "without CUDA" in call(capsys, "doctor")[1]


def test_doctor_finds_damaged_weights(capsys, ship, weights_dir):
    ship("capsnet_tiny.mnist")
    (weights_dir / "capsnet_tiny.mnist.safetensors").write_bytes(b"nothing")
    code, out, _ = call(capsys, "doctor")
    assert code == 1 and "1 shipped, 1 damaged" in out and "wrong: the shipped weights 'capsnet_tiny.mnist'" in out


def test_doctor_where_triton_is_not_installed():
    script = """
import importlib.metadata, sys
sys.modules["triton"] = None
real = importlib.metadata.version
def version(name):
    if name == "triton":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
from capszoo.command_line.main import main
sys.exit(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Triton cannot be used here (import of triton halted" in done.stdout and "not installed" in done.stdout
    assert done.stderr == ""


def test_backend_of_a_gpu(monkeypatch):
    monkeypatch.setattr(cli.dispatch, "triton_problem", lambda device: None)
    assert cli.routing_backend("cuda:0")[0] == "Triton kernels"
    monkeypatch.setattr(cli.dispatch, "triton_problem", lambda device: "The GPU is too old")
    assert cli.routing_backend("cuda:0") == ("PyTorch tiles", "The GPU is too old")


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            2,
            "error: out of memory (CUDA out of memory. Tried",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            2,
            "give smaller batches (--micro-",
        ),
        (MemoryError(), 2, "error: out of memory"),
        (PermissionError(13, "Permission denied", "runs/x"), 2, "error: 'runs/x': Permission denied: mend its perm"),
    ],
)
def test_what_no_option_says_ends_in_one_line(error, code, expected, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit) as ended:
        run(fail)
    err = capsys.readouterr().err
    assert ended.value.code == code and expected in err and err.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    for bug in (RuntimeError("shapes differ"), PermissionError("of nothing")):

        def fail(bug=bug):
            raise bug

        with pytest.raises(type(bug)):
            run(fail)
