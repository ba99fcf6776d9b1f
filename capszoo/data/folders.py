"""Image folders: a folder for each class, or a table that says which classes an image shows."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from timm.utils.misc import natural_key
from torch import Tensor

from capszoo.errors import DataError, one_line

from .decoding import Size, header, not_an_image, sizes_differ
from .readers import FileReader

_FOLDER_LAYOUT = "expected train/<class>/<image> and test/<class>/<image> (val or validation will do for test)"
# Of a folder whose images may show several classes, in each of its parts.
_TABLE = "labels.csv"
_TABLE_FORMAT = "expected a line 'file,<class>,<class>,...' and for each image a line 'cat.png,0,1,...'"
_LITTER = {"thumbs.db", "desktop.ini"}
# The files of each part of an image folder, and their labels.
_Files = dict[str, tuple[list[Path], Tensor]]


def image_folder(
    root: Path, img_size: Size | None = None, in_chans: int | None = None
) -> tuple[list[str], dict[str, tuple[FileReader, Tensor]]]:
    """Open a folder of `train/<class>/<image>` and `test/<class>/<image>`, or of `train` and `test` with a table each.

    Hidden files and what file managers leave behind are passed over; all else must be an image.

    Where images may show several classes, or none, `train/labels.csv` and `test/labels.csv` say which: in UTF-8, a
    first line that names the classes (`file,cat,dog`) and a line for each image, its path below `train` or `test` and
    0 or 1 for each class (`pets/1.png,0,1`). All parts have the same classes in the same order.

    Args:
        root: The folder.
        img_size: The size to give the images; by default their own, which must then be the same for all.
        in_chans: The channels to give them, 1 or 3; by default 1 if all are grey.

    Returns:
        The class names, and the images with their labels (int64 `[N]`, from tables float32 `[N, J]`) of "train", "test"
        and, if there is one beside "test", "val".

    Raises:
        DataError: A missing folder, a class without images, a file that is not an image, images of different sizes; a
            table that is missing or damaged, names files that are not there, or not all that are, or other classes.
    """
    if not root.is_dir():
        raise DataError(f"image folder '{root}' does not exist: give the path of a folder, {_FOLDER_LAYOUT}")
    folders = {"train": root / "train"}
    held_out = [root / part for part in ("test", "val", "validation") if (root / part).is_dir()]
    if not folders["train"].is_dir():
        raise DataError(f"image folder '{root}' has no training images (looked for {root / 'train'}): {_FOLDER_LAYOUT}")
    if not held_out:
        raise DataError(f"image folder '{root}' has no test images (looked for {root / 'test'}): {_FOLDER_LAYOUT}")
    folders["test"] = held_out[0]
    if held_out[0].name == "test" and len(held_out) > 1:
        folders["val"] = held_out[1]

    for folder in folders.values():
        _check_inside(folder, root)
    tables = [folder / _TABLE for folder in folders.values()]
    if any(table.exists() for table in tables):
        class_names, files = _read_tables(folders, root)
    else:
        class_names, files = _read_class_folders(folders, root)

    headers = []
    for path in (path for paths, _ in files.values() for path in paths):
        try:
            headers.append(header(path))
        except Exception as error:
            raise not_an_image(path, error) from error
    in_chans = in_chans or (1 if all(grey for _, grey in headers) else 3)
    sizes = sorted({size for size, _ in headers})
    if img_size is None and len(sizes) > 1:
        raise sizes_differ(f"image folder '{root}'", sizes[0], sizes[-1])

    image_shape = (in_chans, *(img_size or sizes[0]))
    return class_names, {part: (FileReader(paths, image_shape), labels) for part, (paths, labels) in files.items()}


def _read_class_folders(folders: dict[str, Path], root: Path) -> tuple[list[str], _Files]:
    """Return the class names, and the images of each part by its folders of one class each."""
    found = {part: _class_files(folder, root) for part, folder in folders.items()}
    class_names = sorted(found["train"], key=lambda label: (natural_key(label), label))  # timm's order
    files = {}
    for part, classes in found.items():
        for extra in sorted(classes.keys() - found["train"].keys()):
            raise DataError(
                f"'{folders[part] / extra}' is a class that '{folders['train']}' does not have: add training images of "
                "it, or delete it"
            )
        paths = [path for label in class_names for path in classes.get(label, ())]
        labels = [i for i, label in enumerate(class_names) for _ in classes.get(label, ())]
        files[part] = paths, torch.tensor(labels)
    return class_names, files


def _read_tables(folders: dict[str, Path], root: Path) -> tuple[list[str], _Files]:
    """Return the class names, and the images of each part by its table."""
    for folder in folders.values():
        if not (folder / _TABLE).exists():
            having = next(folder / _TABLE for folder in folders.values() if (folder / _TABLE).exists())
            raise DataError(f"'{folder / _TABLE}' does not exist, but '{having}' does: add it, {_TABLE_FORMAT}")
    class_names: list[str] = []
    files = {}
    for part, folder in folders.items():
        names, paths, labels = _read_table(folder, root)
        class_names = class_names or names  # those of train, which is the first
        if names != class_names:
            differing = next(i for i in range(len(names) + 1) if names[i : i + 1] != class_names[i : i + 1])
            one, other = (repr(some[differing]) if differing < len(some) else "none" for some in (names, class_names))
            raise DataError(
                f"'{folder / _TABLE}' has other classes than '{folders['train'] / _TABLE}' (class {differing + 1} is "
                f"{one}, there {other}): give both the same columns"
            )
        files[part] = paths, labels
    for name, present in zip(class_names, files["train"][1].any(dim=0).tolist(), strict=True):
        if not present:
            raise DataError(
                f"no image of '{folders['train'] / _TABLE}' shows the class {name!r}: add some, or delete its column "
                "from all tables"
            )
    return class_names, files


def _read_table(folder: Path, root: Path) -> tuple[list[str], list[Path], Tensor]:
    """Return the class names, files and labels of the table of one part."""
    table = folder / _TABLE
    _check_inside(table, root)
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except (csv.Error, UnicodeError) as error:
        raise DataError(f"'{table}' is not a table ({one_line(error)}): {_TABLE_FORMAT}") from error
    lines = [(number, cells) for number, cells in lines if any(cells)]
    if len(lines) < 2:
        raise DataError(f"'{table}' names no images: {_TABLE_FORMAT}")
    class_names = lines[0][1][1:]
    if not class_names:
        raise DataError(f"'{table}' names no classes in its first line: {_TABLE_FORMAT}")
    for index, name in enumerate(class_names):
        if not name or name in class_names[:index]:
            raise DataError(f"'{table}' names the class {name!r} {'twice' if name else 'in its first line'}: mend it")

    present = {path.relative_to(folder): path for path in _files_below(folder, root) if path != table}
    paths: dict[Path, Path] = {}
    labels = []
    for number, (name, *cells) in lines[1:]:
        line, path = f"'{table}', line {number}", Path(name)
        if len(cells) != len(class_names):
            raise DataError(f"{line}: {len(cells)} values for {len(class_names)} classes: {_TABLE_FORMAT}")
        for cell, class_name in zip(cells, class_names, strict=True):
            if cell not in ("0", "1"):
                raise DataError(f"{line}: {cell!r} for the class {class_name!r}: give 0 or 1")
        if path in paths:
            raise DataError(f"{line}: {name!r} is there twice: delete one of the lines")
        if path not in present:
            raise DataError(f"{line}: there is no image {name!r} in '{folder}': add it, or delete the line")
        paths[path] = present[path]
        labels.append([float(cell) for cell in cells])
    for path in sorted(present.keys() - paths.keys()):
        raise DataError(f"'{table}' has no line for '{present[path]}': add one, or delete the file")
    return class_names, list(paths.values()), torch.tensor(labels)


def _files_below(folder: Path, root: Path) -> Iterator[Path]:
    """Go through the files of a folder and of those in it."""
    folders = [folder]
    while folders:
        for entry in _entries(folders.pop()):
            _check_inside(entry, root)
            if not entry.is_dir():
                yield entry
            elif entry.is_symlink():  # it may lead in a circle
                raise DataError(f"'{entry}' is a link to a folder: put the folder in its place")
            else:
                folders.append(entry)


def _class_files(folder: Path, root: Path) -> dict[str, list[Path]]:
    """Return the files of each class below `folder`."""
    classes = {}
    for entry in _entries(folder):
        _check_inside(entry, root)
        if not entry.is_dir():
            raise DataError(f"'{entry}' is not a folder of images of one class: delete or move it, {_FOLDER_LAYOUT}")
        classes[entry.name] = _entries(entry)
        if not classes[entry.name]:
            raise DataError(f"class folder '{entry}' holds no images: add some or delete it")
        for path in classes[entry.name]:
            _check_inside(path, root)
            if not path.is_file():
                raise DataError(f"'{path}' is not an image file: delete or move it, {_FOLDER_LAYOUT}")
    if not classes:
        raise DataError(f"'{folder}' holds no images: {_FOLDER_LAYOUT}")
    return classes


def _check_inside(path: Path, root: Path) -> None:
    """Refuse a link out of the data set's folder; a folder from elsewhere must not make other files be read."""
    if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise DataError(f"'{path}' is a link out of '{root}': put a copy in its place")


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name[0] != "." and path.name.lower() not in _LITTER)
