"""Reports: what is found, what is drawn, the page, and the one that training leaves."""

import html.parser
import re

import pytest
import torch
from families import sizes_of
from PIL import Image

import capszoo
from capszoo import report
from capszoo.data import Loader, Split, load_data
from capszoo.engine import evaluate
from capszoo.errors import InspectionError, UsageError
from capszoo.figures import network, style
from capszoo.recipes import show, train
from capszoo.report.findings import Shown, _measure
from capszoo.report.of_run import write_run_report

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run with the report that training leaves."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ["--device", "cpu", "--amp", "none", "--epochs", "2", "--batch-size", "64", "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_run_report", write_run_report)
        assert train.main([*options, "--output", str(folder)]) == 0
    return folder


def images_of(page):
    """Pictures in a page, and headings; whatever else it would load fails."""
    found = {"img": [], "h2": []}

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            for key, value in attributes:
                assert key not in ("src", "href") or value.startswith("data:image/png;base64,"), value[:50]
            if tag in found:
                found[tag].append(dict(attributes))

    Parser().feed(page.read_text())
    return found


def test_training_leaves_a_report(run_folder):
    page = run_folder / "report.html"
    text = page.read_text()
    assert "<h1>run</h1>" in text and "2 epochs; the best, " in text and "default-src 'none'" in text
    assert re.search(r"<th>test accuracy</th><td>\d+\.\d\d%</td>", text)
    assert {path.stem for path in (run_folder / "report").iterdir()} >= {"training", "right", "confusion"}
    assert all(path.read_bytes().startswith(PNG) for path in (run_folder / "report").iterdir())
    assert len(images_of(page)["img"]) == len(list((run_folder / "report").iterdir()))


def test_what_hinders_a_report_is_one_line(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise ImportError('figures need matplotlib: pip install "capszoo[train]"')

    monkeypatch.setattr(report, "write_run_report", fail)
    options = ["--device", "cpu", "--amp", "none", "--epochs", "1", "--batch-size", "256", "--no-decoder"]
    assert train.main([*options, "--output", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "no report.html: figures need matplotlib" in out and "next: capszoo validate" in out
    monkeypatch.setattr(report, "write_run_report", lambda *args: pytest.fail("asked for a report"))
    assert train.main([*options, "--no-report", "--output", str(tmp_path / "other")]) == 0


def test_show_a_run(run_folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert show.main([str(run_folder), "--device", "cpu", "--limit", "60", "--output", str(page)]) == 0
    assert f"{page}, and" in capsys.readouterr().out
    headings = re.findall("<h2>(.*?)</h2>", page.read_text())
    for expected in ("Training", "Recognised", "Confusion", "Calibration", "Robustness", "Couplings over the image",
                     "What routing decides"):  # fmt: skip
        assert expected in headings
    assert sum(heading.startswith("What the capsule of") for heading in headings) == 2
    assert "60 of the 360 test images of digits" in page.read_text()


def test_show_images_of_which_the_class_is_not_known(run_folder, tmp_path, monkeypatch, capsys):
    for number in range(3):
        Image.new("RGB", (40, 30), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_text("not an image")
    monkeypatch.chdir(tmp_path)
    assert show.main([str(run_folder / "best.safetensors"), "--device", "cpu", "."]) == 0
    assert capsys.readouterr().err.startswith("left out: '3.png'")
    text = (tmp_path / "best.html").read_text()
    assert "3 images" in text and "<h2>Images</h2>" in text and "Confusion" not in text and "accuracy" not in text


FAMILIES = {
    "efficient_capsnet": {},
    "capsnet_resnet_ia": {},
    "capsnet_resnet_sr": {},
    "capsnet_vb_mini": {},
    "deepcaps": {},
    "capsnet_head": {"head": "self_routing"},
}


# Of images this small, the capsules that are routed see the whole.
ONE_PLACE = {"efficient_capsnet", "capsnet_vb_mini"}


@pytest.mark.parametrize("name", FAMILIES)
def test_show_a_network_of_each_family(name, tmp_path, monkeypatch, capsys):
    """By `capszoo show`, on images of unknown classes: what its capsules and its routing have, and no more."""
    torch.manual_seed(0)
    model = capszoo.create_model(name, in_chans=1, num_classes=3, img_size=20, **sizes_of(name), **FAMILIES[name])
    capszoo.save_model(tmp_path / "model.safetensors", model)
    Image.new("L", (20, 20), 90).save(tmp_path / "0.png")
    monkeypatch.chdir(tmp_path)
    assert show.main(["model.safetensors", "--device", "cpu", "0.png"]) == 0
    headings = re.findall("<h2>(.*?)</h2>", (tmp_path / "model.html").read_text())
    places = [] if name in ONE_PLACE else ["Couplings over the image"]
    assert headings == ["Images", *places, "What routing decides"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "page.png"], "--output 'page.png' is not the name of an HTML file: let it end in .html"),
        (["--output", "no/page.html"], "--output 'no/page.html' is in a folder that is not there: make it first"),
        (["a.png", "--limit", "2"], "--limit is of data sets, and images are given: leave it out"),
        (["--limit", "0"], "--limit 0 is out of range: give 1 or more"),
        (["nothing.png"], "no image at 'nothing.png': check the path"),
        (["--dataset", "nothing"], "unknown data set 'nothing'"),
    ],
)
def test_refused(run_folder, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        show.main([str(run_folder), "--device", "cpu", *arguments])


def test_findings_are_those_of_evaluate():
    torch.manual_seed(0)
    data = load_data("digits")
    model = capszoo.create_model("capsnet_tiny", img_size=data.img_size, in_chans=1)
    found = report.find(model, list(Loader(data.val, 50, "cpu")), data.class_names, changes=False)
    measured = evaluate(model, Loader(data.val, 50, "cpu"))
    assert found.top1 == pytest.approx(measured.top1) and torch.equal(found.confusion, measured.confusion)
    assert found.count == len(data.val) == sum(count for _, _, count in found.calibration)
    assert found.sweep is None and len(found.entropy) == 3 and found.part_maps.shape[:2] == (3, 4)
    row, column, count = found.confused[0]
    names = data.class_names
    assert measured.confusion[names.index(row), names.index(column)] == count
    assert count == measured.confusion.clone().fill_diagonal_(0).max()
    scores = [shown.score for shown in found.wrong]
    assert scores == sorted(scores, reverse=True) and all(shown.truth != shown.predicted for shown in found.wrong)


def test_no_part_maps_of_capsules_that_all_see_the_whole_image():
    torch.manual_seed(0)
    model = capszoo.create_model("efficient_capsnet", img_size=28)
    found = report.find(model, [(torch.rand(5, 1, 28, 28), torch.arange(5))], [*"abcdefghij"], changes=False)
    assert found.part_maps is None and len(found.entropy) == 1


def test_calibration_error():
    found = report.Findings(count=4, class_names=["a", "b"])
    scores = torch.tensor([[0.95, 0.0], [0.95, 0.0], [0.0, 0.65], [0.65, 0.0]])
    _measure(found, scores, torch.tensor([0, 1, 1, 0]))
    expected = [(pytest.approx(0.65), 1.0, 2), (pytest.approx(0.95), 0.5, 2)]
    assert found.calibration == expected and found.calibration_error == pytest.approx((0.35 + 0.45) / 2)


def test_a_model_without_capsules_or_decoder():
    torch.manual_seed(0)
    model = capszoo.create_model("cnn_baseline_tiny", img_size=20)
    found = report.find(model, [(torch.rand(5, 1, 20, 20), torch.arange(5))], [*"abcdefghij"])
    assert found.sweep is None and found.part_maps is None and found.entropy == () and len(found.robustness) == 3
    assert model.training
    with pytest.raises(InspectionError, match="^there are no images to look at"):
        report.find(model, [], [*"abcdefghij"])


def test_names_are_escaped(tmp_path):
    section = report.Section("x", "<b>", "a & b", table=[("<i>",), ("<script>",)])
    report.write_sheet(tmp_path / "page.html", "<title>", {"<a>": "<c>"}, [section])
    text = (tmp_path / "page.html").read_text()
    assert "<b>" not in text and "&lt;script&gt;" in text and "<script></script>" in text


def test_pictures_of_an_earlier_page_are_replaced(tmp_path):
    page, folder = tmp_path / "page.html", tmp_path / "page"
    sections = [report.Section(name, "x", "y", style.make_figure(1, 1)) for name in ("right", "parts")]
    report.write_sheet(page, "title", {}, sections)
    (folder / "mine.png").touch()
    report.check_sheet(page, "--output")
    report.write_sheet(page, "title", {}, sections[:1])
    assert sorted(path.name for path in folder.iterdir()) == ["mine.png", "right.png"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_has_the_name_of_the_pictures_stays(tmp_path, kind):
    taken = tmp_path / "page"
    if kind == "file":
        taken.touch()
    else:
        taken.mkdir()
        (taken / "right.png").touch()
    with pytest.raises(UsageError, match="^--output '.*page.html' .*'.*page', which has others: choose another"):
        report.check_sheet(tmp_path / "page.html", "--output")


def test_equal_couplings_are_drawn_as_equal():
    """And not their rounding, over the whole scale of colours."""
    item = Shown(torch.rand(1, 8, 8), None, None, "a", 0.5)
    maps = 0.1 + 1e-7 * torch.rand(1, 1, 2, 8, 8)
    figure = network.draw_part_maps([item], maps, ["a", "b"])
    low, high = figure.axes[1].images[-1].get_clim()
    assert low < 0.0996 and high > 0.1004


def test_long_names_stay_apart():
    names = [f"a species of number {number:03}" for number in range(3)]
    items = [Shown(torch.rand(1, 8, 8), None, None, name, 0.5) for name in names]
    titles = [axes.get_title() for axes in network.draw_images(items).axes]
    assert len(set(titles)) == 3 and all(len(title.split("\n")[0]) == 14 for title in titles)


def test_letters_that_no_font_has_cost_one_line(monkeypatch, caplog, recwarn):
    from matplotlib import font_manager

    own = [entry for entry in font_manager.fontManager.ttflist if entry.name.startswith("DejaVu")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    style._families_with.cache_clear()
    for name in ("\u732b", "\u732b"):
        figure = style.make_figure(2, 1)
        figure.subplots().set_title(name)
        assert style.png(figure, dpi=50).startswith(b"\x89PNG")
    style._families_with.cache_clear()
    (message,) = caplog.messages
    assert "no font here has \u732b" in message and not recwarn.list


def test_a_part_of_a_split_has_images_of_all_classes():
    """Image folders lie class by class: their first images are of one."""
    labels = torch.arange(3).repeat_interleave(400)
    split = Split(labels, (labels[:, None, None, None] * 50).expand(-1, 1, 8, 8).byte())
    batches = list(report.first_batches(split, 300, torch.device("cpu")))
    seen = torch.cat([classes for _, classes in batches])
    assert len(seen) == 300 and torch.bincount(seen).min() > 60
    for images, classes in batches:
        assert torch.equal((images[:, 0, 0, 0] * 255 / 50).round().long(), classes)
    again = torch.cat([classes for _, classes in report.first_batches(split, 300, torch.device("cpu"))])
    assert torch.equal(again, seen)
