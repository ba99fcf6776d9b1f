"""The static page: its graphs give PyTorch's numbers, its files are all that it needs, and what cannot be is said."""

import functools
import io
import json
import re
import sys
import tarfile
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch

import capszoo
from capszoo.errors import UsageError
from capszoo.explorer import Network, runtime, runtime_from_folder, runtime_from_registry, write_static
from capszoo.explorer.graphs import export_graphs
from capszoo.opening import OpenedModel, open_model

RUNTIME = {"ort.js": b"js", "ort.wasm": b"wasm"}


def fresh(name, **kwargs):
    torch.manual_seed(0)
    return Network(OpenedModel(capszoo.create_model(name, **kwargs), name, Path(name), {}, None))


def check_graphs(network, folder, files):
    """Numbers of the files against the network's own; the names of what the first gives."""
    import onnxruntime

    pixels = torch.rand(1, *network.shape, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(folder / files["look"], providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"pixels": pixels.numpy()}), strict=True))
    with torch.no_grad():
        expected = dict(zip(names, network.looking(pixels), strict=False))
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name].numpy(), rtol=0, atol=1e-5, err_msg=name)
    if files["draw"] is not None:
        session = onnxruntime.InferenceSession(folder / files["draw"], providers=["CPUExecutionProvider"])
        for target in (0, 7):
            inputs = {"capsules": found["capsules"], "target": np.array([target])}
            (drawn,) = session.run(["drawn"], inputs)
            with torch.no_grad():
                right = network.drawing(torch.from_numpy(found["capsules"]), torch.tensor([target]))
            np.testing.assert_allclose(drawn, right.numpy(), rtol=0, atol=1e-5)
    return names


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of shipped weights, and its files."""
    folder = tmp_path_factory.mktemp("page") / "below" / "site"
    network = Network(open_model("capsnet_tiny.mnist"))
    return network, folder, write_static(folder, [network], RUNTIME)


def test_graphs_give_the_numbers_of_pytorch(page):
    network, folder, _ = page
    (about,) = json.loads((folder / "models.json").read_text())
    names = check_graphs(network, folder / "models", about)
    assert names == ["scores", "capsules", "shares", "presence"]
    assert {key: about[key] for key in network.describe()} == network.describe()


@pytest.mark.slow
def test_graphs_of_a_network_without_places(tmp_path):
    network = fresh("efficient_capsnet", decoder=True, decoder_dims=(16, 24))
    files = export_graphs(network, tmp_path, "efficient")
    assert files["centers"] == []
    assert check_graphs(network, tmp_path, files) == ["scores", "capsules"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kwargs", "parts"),
    [
        ("capsnet_pruned.mnist", {}, True),
        ("capsnet", {"decoder": True, "squash": "approx"}, True),
        ("efficient_capsnet", {"decoder": True}, False),
        ("capsnet_resnet_sr", {"img_size": 24, "in_chans": 3}, True),
        ("deepcaps", {"img_size": 28, "in_chans": 1, "decoder": True}, True),
        ("capsnet_conv_ia", {"img_size": 28, "in_chans": 1}, None),
        ("capsnet_em_mini", {"img_size": 28, "in_chans": 1}, None),
        ("cnn_baseline_tiny", {}, False),
    ],
)
def test_graphs_of_other_families(name, kwargs, parts, tmp_path):
    """Those whose couplings ONNX does not have lose the lines, and nothing else."""
    network = Network(open_model(name)) if "." in name else fresh(name, **kwargs)
    files = export_graphs(network, tmp_path, "graph")
    names = check_graphs(network, tmp_path, files)
    assert ("shares" in names) == bool(files["centers"])
    if parts is not None:
        assert ("shares" in names) == parts


def test_the_page_needs_its_own_files_alone(page):
    _, folder, files = page
    assert {path for path in folder.rglob("*") if path.is_file()} == set(files)
    assert files[0] == folder / "index.html" and folder / "onnxruntime" / "ort.wasm" in files
    html = files[0].read_text()
    assert 'src="onnx.js"' in html and "script-src 'self' 'wasm-unsafe-eval'" in html
    names = {path.name for path in files}
    for path in files:
        if path.suffix not in (".html", ".css", ".js") or path.parent.name == "onnxruntime":
            continue
        text = path.read_text()
        for address in re.findall(r"""(?:src|href)="([^"]+)"|from "([^"]+)"|url\(([^)]+)\)""", text):
            address = "".join(address)
            assert not re.match(r"[a-z]+:|/", address), (path, address)  # in a sub-folder, too
            assert address.removeprefix("./").removeprefix("onnxruntime/") in names, (path, address)


def test_networks_that_left_the_page_leave_the_folder(tmp_path, monkeypatch):
    """It may be for anybody to read."""

    def write(network, folder, stem):
        (folder / f"{stem}.look.onnx").write_bytes(b"graph")
        return {"look": f"{stem}.look.onnx", "draw": None}

    monkeypatch.setattr("capszoo.explorer.static.export_graphs", write)
    first, second = (fresh(name, img_size=20) for name in ("cnn_baseline_tiny", "capsnet_tiny"))
    write_static(tmp_path, [first, second], RUNTIME)
    (tmp_path / "models" / "notes.txt").touch()
    write_static(tmp_path, [second], RUNTIME)
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["1-capsnet_tiny.look.onnx", "notes.txt"]


def test_an_export_that_ended_early_is_repeated(tmp_path, monkeypatch):
    def stop(network, folder, stem):
        (folder / f"{stem}.look.onnx").write_bytes(b"graph")
        (folder / f".{stem}.draw.onnx.17.tmp").write_bytes(b"gra")
        raise KeyboardInterrupt

    network = fresh("cnn_baseline_tiny", img_size=20)
    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("capszoo.explorer.static.export_graphs", stop)
            write_static(tmp_path, [network], RUNTIME)
    (tmp_path / "models" / "weights.onnx").touch()
    with pytest.raises(UsageError, match="holds other files"):
        write_static(tmp_path, [network], RUNTIME)


def test_without_the_exporter_nothing_is_begun(tmp_path, monkeypatch):
    network = fresh("cnn_baseline_tiny", img_size=20)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match="pip install onnx onnxscript"):
        write_static(tmp_path / "site", [network], RUNTIME)
    assert list(tmp_path.iterdir()) == []


def test_where_a_page_may_be_written(page, tmp_path):
    network, folder, _ = page
    (tmp_path / "thesis.tex").touch()
    for wrong in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(UsageError, match="give (one|a folder) that is empty or not there yet"):
            write_static(wrong, [network], RUNTIME)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def package(folder, name="onnxruntime-web"):
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": name}))
    (folder / "dist" / "ort.wasm.bundle.min.mjs").write_bytes(b"js")
    (folder / "dist" / "ort-wasm-simd-threaded.wasm").write_bytes(b"wasm")
    return folder


def test_runtime_from_a_folder(tmp_path):
    files = runtime_from_folder(package(tmp_path / "right"))
    assert files["ort.js"] == b"js" and files["ort.wasm"] == b"wasm" and b"MIT License" in files["LICENSE.txt"]
    package(tmp_path / "other", "left-pad")
    package(tmp_path / "old")
    (tmp_path / "old" / "dist" / "ort.wasm.bundle.min.mjs").unlink()
    for name in ("other", "old", "absent"):
        with pytest.raises(UsageError, match="is not the unpacked npm package onnxruntime-web .*run `npm install"):
            runtime_from_folder(tmp_path / name)


def archive():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as made:
        for path, content in (("../evil", b"x"), *((f"package/{path}", path.encode()) for path in runtime._FILES)):
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            made.addfile(entry, io.BytesIO(content))
    return data.getvalue()


def test_runtime_from_the_registry(monkeypatch):
    asked = []
    data = archive()

    def answer(address, timeout):
        asked.append(address)
        return io.BytesIO(data)

    monkeypatch.setattr(runtime.urllib.request, "urlopen", answer)
    monkeypatch.delenv("npm_config_registry", raising=False)
    with pytest.raises(UsageError, match="sha512 differs"):
        runtime_from_registry()
    assert asked == [f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{runtime.RUNTIME_VERSION}.tgz"]
    digest = functools.partial(runtime.hashlib.sha512, data)().digest()
    monkeypatch.setattr(runtime, "INTEGRITY", runtime.base64.b64encode(digest).decode())
    assert runtime_from_registry()["ort.wasm"] == b"dist/ort-wasm-simd-threaded.wasm"
    monkeypatch.setenv("npm_config_registry", "https://npm.example.org/")
    runtime_from_registry()
    assert asked[-1].startswith("https://npm.example.org/onnxruntime-web/-/")
    monkeypatch.setenv("npm_config_registry", "file:///etc")
    with pytest.raises(UsageError, match="is not an address"):
        runtime_from_registry()


def test_no_network_is_said(monkeypatch):
    def fail(address, timeout):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(runtime.urllib.request, "urlopen", fail)
    with pytest.raises(UsageError, match="cannot be fetched .*check the network, or give --onnxruntime-web FOLDER"):
        runtime_from_registry()
