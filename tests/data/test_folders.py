"""capszoo.data.folders: image folders of a class each, and with tables."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from capszoo.data import Loader, load_data


@pytest.mark.parametrize("held_out", ["test", "val", "validation"])
def test_image_folder(write_folder, held_out, tmp_path):
    root = write_folder(tmp_path, ("train", held_out), ("img10", "img2"), count=5)
    (root / "train" / ".hidden").mkdir()
    for litter in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (root / "train" / litter).touch()
        (root / "train" / "img2" / litter).touch()
    (root / "README.txt").write_text("about these images")
    data = load_data(root, val_fraction=0.2)
    assert data.class_names == ["img2", "img10"]
    assert (len(data.train), len(data.val), len(data.test)) == (8, 2, 10)
    assert data.val.labels.tolist() == [0, 1]
    assert (data.in_chans, data.img_size) == (3, (8, 10))
    first = np.asarray(Image.open(root / held_out / "img10" / "0.png"))
    assert np.array_equal(data.test.images[5].permute(1, 2, 0), first) and data.test.labels[5] == 1


def test_image_folder_by_other_names(write_folder, tmp_path, monkeypatch):
    write_folder(tmp_path / "sets" / "pets")
    direct = load_data(tmp_path / "sets" / "pets")
    monkeypatch.chdir(tmp_path)
    for name, data_dir in (
        ("sets/pets", None),
        ("folder/sets/pets", None),
        ("folder/pets", "sets"),
        ("folder", "sets/pets"),
        ("torch/image_folder", "sets/pets"),
    ):
        assert torch.equal(load_data(name, data_dir).train.images, direct.train.images)


def test_validation_folder_beside_test_is_the_validation_split(write_folder, tmp_path):
    root = write_folder(tmp_path, ("train", "val", "test"), count=3)
    data = load_data(root)
    assert (len(data.train), len(data.val), len(data.test)) == (6, 6, 6)
    assert np.array_equal(data.val.images[0].permute(1, 2, 0), np.asarray(Image.open(root / "val/cat/0.png")))
    without = load_data(root, val_fraction=0)
    assert without.val is None and len(without.train) == 6


def test_image_folder_of_one_held_out_part_has_no_part_twice(write_folder, rows, tmp_path):
    data = load_data(write_folder(tmp_path, ("train", "val", "validation")), val_fraction=0.25)
    assert not rows(data.val) & rows(data.test)
    assert len(data.train) == 9


def test_tables(write_folder, write_tables, tmp_path):
    root = write_tables(tmp_path)
    (root / "train" / ".hidden").touch()
    (root / "train" / "more" / "Thumbs.db").touch()
    text = (root / "test" / "labels.csv").read_text()
    (root / "test" / "labels.csv").write_text("\ufeff" + text.replace(",", " , ").replace("\n", "\r\n") + "\r\n,,,\r\n")
    data = load_data(root, val_fraction=0)
    assert data.class_names == ["cat", "dog", "bird"] and data.num_classes == 3 and data.multi_label
    assert (len(data.train), data.val, len(data.test)) == (9, None, 9)
    assert (data.in_chans, data.img_size) == (1, (8, 10))
    expected = torch.tensor([[i & 1, i >> 1 & 1, i >> 2 & 1] for i in range(9)]).float()
    for split in data.train, data.test:
        assert torch.equal(split.labels, expected) and split.labels.dtype == torch.float32
    for i, name in ((3, "3.png"), (8, "more/last.png")):
        assert np.array_equal(data.test.images[i, 0], np.asarray(Image.open(root / "test" / name)))
    batches = list(Loader(data.train, 4, "cpu", shuffle=True))
    order = Loader(data.train, 4, "cpu", shuffle=True).order()
    assert torch.equal(torch.cat([labels for _, labels in batches]), expected[order])
    assert not load_data(write_folder(tmp_path / "pets")).multi_label


def test_tables_that_do_not_fit_into_memory(write_tables, tmp_path):
    root = write_tables(tmp_path, ("train", "val", "test"))
    whole, read = load_data(root), load_data(root, max_bytes=0)
    assert len(whole.val) == 9 and read.train.images is None
    for one, other in zip(Loader(whole.train, 4, "cpu"), Loader(read.train, 4, "cpu"), strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def edit(old, new, part="train"):
    def change(root):
        table = root / part / "labels.csv"
        text = table.read_text()
        assert old in text
        table.write_text(text.replace(old, new, 1))

    return change


TABLE_FAULTS = {
    "no table of test": (lambda root: (root / "test/labels.csv").unlink(), "test/labels.csv' does not exist, but"),
    "no table of train": (lambda root: (root / "train/labels.csv").unlink(), "train/labels.csv' does not exist, but"),
    "missing image": (lambda root: (root / "train/3.png").unlink(), "line 5: there is no image '3.png' in"),
    "image without a line": (lambda root: (root / "test/3.png").rename(root / "test/x.png"), "no image '3.png'"),
    "extra image": (lambda root: (root / "train/x.png").touch(), "has no line for '", "train/x.png"),
    "extra image below": (lambda root: (root / "train/more/x.jpg").touch(), "has no line for '", "more/x.jpg"),
    "image twice": (edit("3.png", "./2.png"), "line 5: './2.png' is there twice"),
    "outside": (edit("3.png", "../test/3.png"), "line 5: there is no image '../test/3.png'"),
    "absolute": (edit("3.png", "/3.png"), "line 5: there is no image '/3.png'"),
    "word": (edit("3.png,1,1,0", "3.png,1,yes,0"), "line 5: 'yes' for the class 'dog': give 0 or 1"),
    "number": (edit("3.png,1,1,0", "3.png,1,2,0"), "line 5: '2' for the class 'dog': give 0 or 1"),
    "empty": (edit("3.png,1,1,0", "3.png,1,,0"), "line 5: '' for the class 'dog': give 0 or 1"),
    "short line": (edit("3.png,1,1,0", "3.png,1,1"), "line 5: 2 values for 3 classes"),
    "long line": (edit("3.png,1,1,0", "3.png,1,1,0,0"), "line 5: 4 values for 3 classes"),
    "other name": (edit("dog", "doc", "test"), "has other classes than", "class 2 is 'doc', there 'dog'"),
    "other order": (edit("cat,dog", "dog,cat", "test"), "class 1 is 'dog', there 'cat'"),
    "name twice": (edit("dog", "cat"), "names the class 'cat' twice"),
    "no name": (edit("dog", ""), "names the class '' in its first line"),
    "no classes": (lambda root: (root / "train/labels.csv").write_text("file\n0.png\n"), "names no classes"),
    "no lines": (lambda root: (root / "train/labels.csv").write_text("file,cat\n"), "names no images"),
    "nothing": (lambda root: (root / "train/labels.csv").write_text(""), "names no images"),
    "not text": (lambda root: (root / "train/labels.csv").write_bytes(b"\xff\xfe\0"), "is not a table (UnicodeDecode"),
    "open quote": (edit("3.png", '"3.png'), "is not a table (Error: unexpected end of data)"),
    "not an image": (lambda root: (root / "train/3.png").write_text("hello"), "3.png' is not an image"),
}


@pytest.mark.parametrize("fault", TABLE_FAULTS)
def test_faults_of_tables(raises, write_tables, fault, tmp_path):
    change, *parts = TABLE_FAULTS[fault]
    change(write_tables(tmp_path))
    with raises(*parts):
        load_data(tmp_path)


def test_class_that_no_training_image_shows(raises, write_tables, tmp_path):
    write_tables(tmp_path, count=4)  # of three bits
    with raises("train/labels.csv' shows the class 'bird': add some, or delete its column from all tables"):
        load_data(tmp_path)


def test_classes_that_only_one_part_has(raises, write_tables, tmp_path):
    write_tables(tmp_path)
    table = tmp_path / "test" / "labels.csv"
    table.write_text("".join(line.rpartition(",")[0] + "\n" for line in table.read_text().splitlines()))
    with raises("has other classes than", "class 3 is none, there 'bird'"):
        load_data(tmp_path)


def test_table_elsewhere(raises, write_tables, tmp_path):
    root = write_tables(tmp_path / "set")
    (root / "train/labels.csv").rename(tmp_path / "labels.csv")
    (root / "train/labels.csv").symlink_to(tmp_path / "labels.csv")
    with raises("train/labels.csv' is a link out of"):
        load_data(root)


def test_broken_layouts(raises, write_folder, tmp_path):
    with raises(tmp_path, "no training images", tmp_path / "train", "train/<class>/<image>"):
        load_data(tmp_path)
    (tmp_path / "train").mkdir()
    with raises(tmp_path, "no test images", tmp_path / "test", "test/<class>/<image>"):
        load_data(tmp_path)
    (tmp_path / "test").mkdir()
    with raises(tmp_path / "train", "no images"):
        load_data(tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    with raises(tmp_path / "train/cat", "no images", "delete"):
        load_data(tmp_path)
    (tmp_path / "train/cat/.DS_Store").touch()
    with raises(tmp_path / "train/cat", "no images"):
        load_data(tmp_path)
    Image.new("L", (4, 4)).save(tmp_path / "train/cat/0.png")
    with raises(tmp_path / "test", "no images"):
        load_data(tmp_path)
    write_folder(tmp_path, ("test",), ("dgo",))
    with raises(tmp_path / "test/dgo", "class", "train", "does not have"):
        load_data(tmp_path)
    Image.new("L", (4, 4)).save(tmp_path / "train/0.png")
    with raises(tmp_path / "train/0.png", "not a folder"):
        load_data(tmp_path)


def test_missing_folder(raises, tmp_path):
    with raises("unknown data set", tmp_path / "nowhere", "no such folder"):
        load_data(tmp_path / "nowhere")
    with raises("image folder", tmp_path / "nowhere", "does not exist"):
        load_data("folder/nowhere", tmp_path)


def test_unreadable_folder(raises, write_folder, tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    write_folder(tmp_path)
    monkeypatch.setattr("capszoo.data.folders.Walk.entries", lambda self, path: refuse(path))
    with raises("Permission denied", tmp_path / "train"):
        load_data(tmp_path)


def test_stray_files_are_passed_over_and_counted_once(write_folder, tmp_path, caplog):
    root = write_folder(tmp_path, count=2)
    for stray in (
        "train/notes.txt",
        "train/cat/notes.txt",
        "train/dog/Thumbs.db",
        "test/cat/README",
        "test/cat/.hidden",
    ):
        (root / stray).write_text("about these images")
    (root / "train/dog/0.png").rename(root / "train/dog/by-its-content")
    data = load_data(root, val_fraction=0)
    assert (len(data.train), len(data.test), data.class_names) == (4, 4, ["cat", "dog"])
    (message,) = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert message.startswith("4 files of ") and "such as 'notes.txt'" in message


def test_a_damaged_image_is_an_error_whatever_lies_beside_it(raises, write_folder, tmp_path):
    root = write_folder(tmp_path)
    (root / "train/cat/7.jpg").write_text("no image")
    with raises("train/cat/7.jpg' is not an image"):
        load_data(root)


def test_images_of_a_class_in_folders_below(write_folder, tmp_path):
    root = write_folder(tmp_path, count=2)
    (root / "train/cat/2025/may").mkdir(parents=True)
    Image.new("RGB", (10, 8)).save(root / "train/cat/2025/may/0.png")
    data = load_data(root, val_fraction=0)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]


def test_links(raises, write_folder, tmp_path):
    root, elsewhere = (
        write_folder(tmp_path / "set", count=2),
        write_folder(tmp_path / "other", ("train",), ("bird",), 3),
    )
    for part in ("train", "test"):
        (root / part / "bird").symlink_to(elsewhere / "train/bird")
    with raises("train/bird' is a link out of", "--follow-links"):
        load_data(root)
    data = load_data(root, val_fraction=0, follow_links=True)
    assert data.class_names == ["bird", "cat", "dog"] and data.train.labels.tolist() == [0, 0, 0, 1, 1, 2, 2]
    for part in ("train", "test"):
        (root / part / "bird").unlink()
    (root / "train/cat/again").symlink_to(root / "train/cat")  # in a circle
    assert len(load_data(root, val_fraction=0).train) == 4
    (root / "train/all").symlink_to(root / "train")
    with raises("train/all' holds no images"):
        load_data(root)


def test_links_to_folders_of_images_with_a_table(write_tables, tmp_path):
    root = write_tables(tmp_path)
    (root / "train/loop").symlink_to(root / "train")
    (root / "train/notes.txt").touch()
    assert len(load_data(root, val_fraction=0).train) == 9


def test_folders_that_are_not_read_are_told(write_folder, tmp_path, caplog):
    write_folder(tmp_path / "set")
    (tmp_path / "set" / "test").rename(tmp_path / "set" / "valid")
    assert len(load_data(tmp_path / "set").test)
    assert "nothing is read below" not in caplog.text
    (tmp_path / "set" / "unlabelled").mkdir()
    load_data(tmp_path / "set")
    assert "nothing is read below 'unlabelled'" in caplog.text


def test_a_fraction_that_a_validation_folder_makes_idle_is_told(write_folder, tmp_path, caplog):
    write_folder(tmp_path / "set")
    shutil.copytree(tmp_path / "set" / "test", tmp_path / "set" / "val")
    load_data(tmp_path / "set")
    assert not caplog.records
    load_data(tmp_path / "set", val_fraction=0.5)
    assert "has validation images of its own: val_fraction 0.5 has no effect" in caplog.text
    assert load_data(tmp_path / "set", val_fraction=0).val is None
    assert "are not used, as val_fraction is 0" in caplog.text
