"""Commands of the README and docs about images of one's own run as they stand there, one after the other, in a folder
that has what they name: path/to/images, cat.png, more/images, and runs/NAME as soon as a run is there."""

import re
import shlex
from pathlib import Path

import numpy as np
import processes
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ABOUT_OWN_IMAGES = re.compile(r"path/to/images|runs/NAME|cat\.png|capszoo predict")
# Of timm's scripts, of a search or of a pruning: not about images of one's own.
ELSEWHERE = re.compile(r"runpy|explore\.py|prune\.py --resume|--nproc|torchrun")
CAPSZOO = "import sys; sys.stdin = open({!r}); from capszoo.command_line.main import entry_point; entry_point()"


def commands():
    """The commands, once each: those that train first, then what continues a run, then what looks at it."""
    found = {}
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if ABOUT_OWN_IMAGES.search(line) and not ELSEWHERE.search(line):
                    found.setdefault(tuple(shlex.split(line, comments=True)), page.name)
    order = [*found]
    return sorted(order, key=lambda words: ("path/to/images" not in words, "--resume" not in words, order.index(words)))


def make_images(folder, count=12, size=40):
    """Squares, stripes and discs of noise in train and test."""
    random, place = np.random.default_rng(0), np.indices((size, size))
    kinds = {
        "disc": ((place - size / 2) ** 2).sum(0) < 150,
        "square": (abs(place - size / 2) < 10).all(0),
        "stripes": place[0] // 5 % 2 == 0,
    }
    for part in ("train", "test"):
        for name, mask in kinds.items():
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 60, (size, size, 3)) + 190 * mask[..., None]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{number}.png")


def run(words, folder):
    """Run a command line that begins with python or capszoo; `< FILE` at its end is standard input."""
    # Weights that timm has come from the network, which no test needs.
    program, *words = [word for word in words if word != "--backbone-pretrained"]
    given = "/dev/null"
    if "<" in words:
        given, words = words[words.index("<") + 1], words[: words.index("<")]
    words = words if program == "python" else ["-c", CAPSZOO.format(given), *words]
    assert program in ("python", "capszoo")
    return processes.run(*words, cwd=folder)


@pytest.mark.slow
def test_they_run_as_they_stand_there(tmp_path):
    make_images(tmp_path / "path/to/images")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    Image.open(tmp_path / "path/to/images/test/disc/0.png").save(tmp_path / "cat.png")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/images").symlink_to(tmp_path / "path/to/images/test")
    (tmp_path / "names").write_text("cat.png\nmore/images\n")
    printed = {}
    for words in commands():
        done = run(words, tmp_path)
        assert done.returncode == 0, (words, done.stderr)
        printed[words] = done.stdout
        if not (tmp_path / "runs/NAME").exists():
            (made,) = (tmp_path / "runs").iterdir()
            (tmp_path / "runs/NAME").symlink_to(made)
    top1 = [float(found) for found in re.findall(r"test top1 (0\.\d+|1\.0+)", "".join(printed.values()))]
    assert top1 and top1[0] > 0.6
    (answers,) = [out for words, out in printed.items() if "more/images" in words and "predict" in words]
    assert len(answers.splitlines()) == 1 + 1 + 36 and "disc" in answers
    for name in ("drawn.png", "FOLDER/model.safetensors"):
        assert (tmp_path / name).is_file()


def test_what_is_about_own_images_is_found():
    found = [" ".join(words) for words in commands()]
    assert "--dataset path/to/images" in found[0] and any("--resume runs/NAME" in line for line in found)
    for wanted in (
        "capszoo predict runs/NAME cat.png more/images",
        "recipes/validate.py runs/NAME",
        "export.py hub runs",
    ):
        assert any(wanted in line for line in found), wanted
