"""recipes/explorer.py: it serves until it is asked to end, exports pages, and says what cannot be."""

import json
import re
import signal
import urllib.request
from pathlib import Path

import processes
import pytest

from capszoo.command_line import run
from capszoo.recipes import explorer

RECIPE = Path(__file__).parents[2] / "recipes" / "explorer.py"


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_asked_to_end(asked):
    process = processes.start(RECIPE, "--port", 0, "--no-browser")
    try:
        line = b""
        while not line.endswith(b"\n"):
            line += process.stdout.read(1)
        url = re.search(r"http://127\.0\.0\.1:[0-9]+/", line.decode())[0]
        assert line.startswith(b"capsnet_tiny.mnist at ")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url + "models.json", timeout=20) as answer:
            assert json.load(answer)[0]["name"] == "capsnet_tiny.mnist"
        process.send_signal(asked)
        out, err = process.communicate(20)
        assert (process.returncode, out.split(), err) == (0, ["ended"], "")
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["capsnet_tny.mnist"], "'capsnet_tny.mnist' is no file and no shipped weights"),
        (
            ["capsnet_resnet_sr"],
            "no weights are shipped for 'capsnet_resnet_sr' alone, did you mean 'capsnet_resnet_sr.",
        ),
        (["--port", "70000"], "--port 70000 is not a port: give a number from 0 to 65535"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is reached from other machines"),
        (["--onnxruntime-web", "x"], "--onnxruntime-web is for --export: give both, or neither"),
        (["--export", "site", "--onnxruntime-web", "x"], "is not the unpacked npm package onnxruntime-web"),
        (["--exprt", "site"], "unknown option '--exprt', did you mean '--export'?"),
    ],
)
def test_errors_are_one_line(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(lambda: explorer.main(arguments))
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert expected in err and not any(tmp_path.iterdir())


def test_an_export_says_what_it_wrote(capsys, tmp_path, monkeypatch):
    """Its graphs are the subject of tests/explorer/test_static.py."""
    written = tmp_path / "index.html"
    written.write_bytes(bytes(3 * 2**20))
    monkeypatch.setattr(explorer, "runtime_from_folder", lambda folder: {folder: b""})
    monkeypatch.setattr(explorer, "write_static", lambda *_: [written, written])
    assert explorer.main(["--export", str(tmp_path / "site"), "--onnxruntime-web", "web"]) == 0
    out = capsys.readouterr().out
    assert out == f"{written}, and 1 more files, 6.0 MiB: put the folder on any web host\n"
