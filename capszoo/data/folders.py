"""Image folders: a folder for each class, or a table that says which classes an image shows."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from timm.utils.misc import natural_key
from torch import Tensor

from capszoo.errors import DataError, one_line

from .decoding import Size, header, not_an_image, sizes_differ
from .readers import FileReader

_logger = logging.getLogger(__name__)

_FOLDER_LAYOUT = "expected train/<class>/<image> and test/<class>/<image> (val, valid or validation will do for test)"
# Of a folder whose images may show several classes, in each of its parts.
_TABLE = "labels.csv"
_TABLE_FORMAT = "expected a line 'file,<class>,<class>,...' and for each image a line 'cat.png,0,1,...'"
# Suffixes of the formats that are decoded.
_SUFFIXES = {
    ".bmp", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".pbm", ".pgm",
    ".png", ".apng", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
# The files of each part of an image folder, and their labels.
_Files = dict[str, tuple[list[Path], Tensor]]


def is_image_name(path: Path) -> bool:
    """Whether a file's suffix says that it is an image; one without a suffix may be."""
    return path.suffix.lower() in _SUFFIXES or not path.suffix


def images_below(folder: Path) -> list[Path]:
    """The images of a folder and of those below it, in order; hidden files and those of other kinds are left out.

    Raises:
        OSError: If a folder cannot be read.
    """
    walk = Walk(folder, follow_links=True)
    return [path for path in walk.files(folder) if not walk.skips(path)]


def image_folder(
    root: Path, img_size: Size | None = None, in_chans: int | None = None, follow_links: bool = False
) -> tuple[list[str], dict[str, tuple[FileReader, Tensor]]]:
    """Open a folder of `train/<class>/<image>` and `test/<class>/<image>`, or of `train` and `test` with a table each.

    Images of a class may lie in folders below the class's own. Hidden files are passed over, and so are files with
    other suffixes than those of images, of which a warning counts how many; what is left must be an image.

    Where images may show several classes, or none, `train/labels.csv` and `test/labels.csv` say which: in UTF-8, a
    first line that names the classes (`file,cat,dog`) and a line for each image, its path below `train` or `test` and
    0 or 1 for each class (`pets/1.png,0,1`). All parts have the same classes in the same order.

    Args:
        root: The folder.
        img_size: The size to give the images; by default their own, which must then be the same for all.
        in_chans: The channels to give them, 1 or 3; by default 1 if all are grey.
        follow_links: Read what links out of the folder lead to.

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
    held_out = [root / part for part in ("test", "val", "valid", "validation") if (root / part).is_dir()]
    if not folders["train"].is_dir():
        raise DataError(f"image folder '{root}' has no training images (looked for {root / 'train'}): {_FOLDER_LAYOUT}")
    if not held_out:
        raise DataError(f"image folder '{root}' has no test images (looked for {root / 'test'}): {_FOLDER_LAYOUT}")
    folders["test"] = held_out[0]
    if held_out[0].name == "test" and len(held_out) > 1:
        folders["val"] = held_out[1]
    others = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    unread = [name for name in others if root / name not in folders.values()]
    if unread:
        _logger.warning("of image folder '%s' nothing is read below %s", root, ", ".join(map(repr, unread)))

    walk = Walk(root, follow_links)
    for folder in folders.values():
        walk.check_inside(folder)
    tables = [folder / _TABLE for folder in folders.values()]
    if any(table.exists() for table in tables):
        class_names, files = _read_tables(folders, walk)
    else:
        class_names, files = _read_class_folders(folders, walk)
    if walk.skipped:
        _logger.warning(
            "%d files of '%s' are passed over, as their names are not those of images, such as '%s'",
            len(walk.skipped),
            root,
            walk.skipped[0].name,
        )

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


def test_folder(
    root: Path, class_names: Sequence[str], img_size: Size, in_chans: int, follow_links: bool = False
) -> tuple[FileReader, Tensor] | None:
    """Open the test images alone of a folder for classes that are known, as those of trained weights are.

    They are those of `test/<class>/<image>`, or of `<class>/<image>` where there is no `train`. A class may have none.

    Args:
        root: The folder.
        class_names: The classes, in the order of the labels.
        img_size: The size to give the images.
        in_chans: The channels to give them, 1 or 3.
        follow_links: Read what links out of the folder lead to.

    Returns:
        The images and their labels, int64 `[N]`; None for a folder of another layout.

    Raises:
        DataError: As :func:`image_folder`, and for a class that is not among them.
    """
    folder = root / "test"
    if not folder.is_dir():
        folder = root
    if (folder == root and any((root / part).exists() for part in ("train", "val", "valid", "validation"))) or (
        folder / _TABLE
    ).exists():
        return None
    walk = Walk(root, follow_links)
    walk.check_inside(folder)
    classes = _class_files(folder, walk)
    for extra in sorted(classes.keys() - set(class_names)):
        if folder != root and (root / "train").is_dir():  # by which the classes can be told
            return None
        raise DataError(
            f"'{folder / extra}' is a class that the weights do not have (they have {', '.join(class_names[:10])}"
            f"{', ...' if len(class_names) > 10 else ''}): rename or move it"
        )
    paths = [path for name in class_names for path in classes.get(name, ())]
    labels = [place for place, name in enumerate(class_names) for _ in classes.get(name, ())]
    return FileReader(paths, (in_chans, *img_size)), torch.tensor(labels)


def _read_class_folders(folders: dict[str, Path], walk: Walk) -> tuple[list[str], _Files]:
    """Return the class names, and the images of each part by its folders of one class each."""
    found = {part: _class_files(folder, walk) for part, folder in folders.items()}
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


def _read_tables(folders: dict[str, Path], walk: Walk) -> tuple[list[str], _Files]:
    """Return the class names, and the images of each part by its table."""
    for folder in folders.values():
        if not (folder / _TABLE).exists():
            having = next(folder / _TABLE for folder in folders.values() if (folder / _TABLE).exists())
            raise DataError(f"'{folder / _TABLE}' does not exist, but '{having}' does: add it, {_TABLE_FORMAT}")
    class_names: list[str] = []
    files = {}
    for part, folder in folders.items():
        names, paths, labels = _read_table(folder, walk)
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


def _read_table(folder: Path, walk: Walk) -> tuple[list[str], list[Path], Tensor]:
    """Return the class names, files and labels of the table of one part."""
    table = folder / _TABLE
    walk.check_inside(table)
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

    present = {path.relative_to(folder): path for path in walk.files(folder) if path != table}
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
        if walk.skips(present[path]):
            continue
        raise DataError(f"'{table}' has no line for '{present[path]}': add one, or delete the file")
    return class_names, list(paths.values()), torch.tensor(labels)


def _class_files(folder: Path, walk: Walk) -> dict[str, list[Path]]:
    """Return the images of each class below `folder`."""
    classes = {}
    for entry in walk.entries(folder):
        if not entry.is_dir():
            if walk.skips(entry):
                continue
            raise DataError(f"'{entry}' is not a folder of images of one class: delete or move it, {_FOLDER_LAYOUT}")
        above = frozenset({os.path.realpath(folder)})
        classes[entry.name] = [path for path in walk.files(entry, above) if not walk.skips(path)]
        if not classes[entry.name]:
            raise DataError(f"class folder '{entry}' holds no images: add some or delete it")
        for path in classes[entry.name]:
            if not path.is_file():
                raise DataError(f"'{path}' is not an image file: delete or move it, {_FOLDER_LAYOUT}")
    if not classes:
        raise DataError(f"'{folder}' holds no images: {_FOLDER_LAYOUT}")
    return classes


class Walk:
    """Goes through the files of a folder, such as that of a data set.

    Args:
        root: Its folder.
        follow_links: Whether links may lead out of it. A folder from elsewhere must not make other files be read.
    """

    def __init__(self, root: Path, follow_links: bool):
        self.root, self.follow_links = root, follow_links
        self.skipped: list[Path] = []

    def check_inside(self, path: Path) -> None:
        """Refuse a link out of the data set's folder, unless those are followed."""
        if self.follow_links or not path.is_symlink():
            return
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.root)):
            raise DataError(f"'{path}' is a link out of '{self.root}': put a copy in its place, or give --follow-links")

    def entries(self, folder: Path) -> list[Path]:
        """What is in a folder, without hidden files, in order."""
        found = sorted(path for path in folder.iterdir() if path.name[0] != ".")
        for path in found:
            self.check_inside(path)
        return found

    def files(self, folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
        """The files of a folder and of those below it; a link to a folder above it is not followed in a circle."""
        real = os.path.realpath(folder)
        if real in above:
            return
        for entry in self.entries(folder):
            if entry.is_dir():
                yield from self.files(entry, above | {real})
            else:
                yield entry

    def skips(self, path: Path) -> bool:
        """Whether a file is passed over; it is counted then."""
        skipped = not is_image_name(path) or (not path.suffix and not _is_image(path))
        if skipped:
            self.skipped.append(path)
        return skipped


def _is_image(path: Path) -> bool:
    try:
        return path.is_file() and bool(header(path))  # a pipe would be waited for
    except Exception:
        return False
