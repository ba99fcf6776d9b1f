"""Images by index: out of a tensor, out of the files of an image folder, out of one of timm's data sets.

A reader decodes, converts and resizes an image when it is asked for it, and gives the same pixels whether a data set is
read as a whole or while it is used.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from timm.utils.misc import natural_key
from torch import Tensor

from capszoo.errors import DataError, one_line

Size = tuple[int, int]  # height, width

_FOLDER_LAYOUT = "expected train/<class>/<image> and test/<class>/<image> (val or validation will do for test)"
# Of a folder whose images may show several classes, in each of its parts.
_TABLE = "labels.csv"
_TABLE_FORMAT = "expected a line 'file,<class>,<class>,...' and for each image a line 'cat.png,0,1,...'"
_LITTER = {"thumbs.db", "desktop.ini"}
_GREY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}
_EXIF_ORIENTATION = 0x0112


# Without those that run another program (EPS) or that nobody keeps images for training in.
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


class Reader(Protocol):
    """Images by index, decoded and resized when asked for."""

    image_shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Tensor:
        """Return the images at `indices` as uint8 `[len(indices), C, H, W]`."""
        ...


class ArrayReader:
    """Images out of one uint8 tensor `[N, C, H, W]`.

    Args:
        images: The images.
        img_size: The size to give them; by default their own.
        in_chans: The channels to give them, 1 or 3; by default their own.
    """

    def __init__(self, images: Tensor, img_size: Size | None = None, in_chans: int | None = None):
        self.images = images
        self.image_shape = (in_chans or images.shape[1], *(img_size or images.shape[2:]))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> Tensor:
        images = self.images[list(indices)]
        channels, *size = self.image_shape
        if channels == 1 and images.shape[1] == 3:  # ITU-R 601-2, as PIL's "L"
            images = (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        if list(images.shape[2:]) != size:
            images = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
        return to_uint8(images).expand(-1, channels, -1, -1).contiguous()


def to_uint8(images: Tensor) -> Tensor:
    """Return pixels in [0, 255] of any type as uint8, rounded and clamped."""
    return images if images.dtype == torch.uint8 else images.round().clamp(0, 255).to(torch.uint8)


class FileReader:
    """Images out of files.

    Args:
        paths: The files.
        image_shape: Channels (1 or 3), height and width to give them.
    """

    def __init__(self, paths: list[Path], image_shape: tuple[int, int, int]):
        self.paths = paths
        self.image_shape = image_shape

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> Tensor:
        images = []
        for index in indices:
            try:
                images.append(_decode(self.paths[index], self.image_shape[0], self.image_shape[1:]))
            except Exception as error:  # PIL's decoders raise anything at damaged files
                raise _not_an_image(self.paths[index], error) from error
        return torch.stack(images)


class TimmReader:
    """Images out of one of timm's map-style data sets.

    Args:
        name: Name of the data set, for error messages.
        dataset: What `timm.data.create_dataset` returned.
        img_size: The size to give the images; by default that of the first, which must then be that of all.
        in_chans: The channels to give them, 1 or 3; by default those of the first.
    """

    def __init__(self, name: str, dataset: Any, img_size: Size | None = None, in_chans: int | None = None):
        self.name = name
        # timm's ImageDataset puts the next image in the place of one that cannot be decoded; its reader does not.
        self.items = getattr(dataset, "reader", dataset)
        self.resize = img_size is not None
        try:
            size, grey = _header(self.items[0][0])
        except Exception as error:
            raise self._damaged(0, error) from error
        self.image_shape = (in_chans or (1 if grey else 3), *(img_size or size))

    def __len__(self) -> int:
        return len(self.items)

    def read(self, indices: Sequence[int]) -> Tensor:
        channels, size = self.image_shape[0], self.image_shape[1:]
        images = []
        for index in indices:
            try:
                images.append(_decode(self.items[index][0], channels, size if self.resize else None))
            except Exception as error:
                raise self._damaged(index, error) from error
            found = images[-1].shape[1], images[-1].shape[2]
            if found != size:
                raise sizes_differ(f"data set {self.name!r}", size, found)
        return torch.stack(images)

    def _damaged(self, index: int, error: Exception) -> DataError:
        return DataError(
            f"image {index} of data set {self.name!r} cannot be decoded ({one_line(error)}): download the set anew"
        )


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
        DataError: A missing folder, a class without images, a file that is no image, images of different sizes; a table
            that is missing or damaged, names files that are not there, or not all that are, or other classes.
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
            headers.append(_header(path))
        except Exception as error:
            raise _not_an_image(path, error) from error
    in_chans = in_chans or (1 if all(grey for _, grey in headers) else 3)
    sizes = sorted({size for size, _ in headers})
    if img_size is None and len(sizes) > 1:
        raise sizes_differ(f"image folder '{root}'", sizes[0], sizes[-1])

    image_shape = (in_chans, *(img_size or sizes[0]))
    return class_names, {part: (FileReader(paths, image_shape), labels) for part, (paths, labels) in files.items()}


# The files of each part of an image folder, and their labels.
_Files = dict[str, tuple[list[Path], Tensor]]


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


class _BoundedFile(io.BufferedReader):
    """A file that is asked for no more than it has: PIL reads as much as a header says, Python takes that memory."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self.size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        rest = max(0, self.size - self.tell())
        return super().read(rest if size is None or size < 0 else min(size, rest))


@contextmanager
def _open(file: Path | IO[bytes] | Image.Image) -> Iterator[Image.Image]:
    if isinstance(file, Image.Image):
        with file:
            yield file
        return
    with ExitStack() as stack:
        if isinstance(file, Path):
            file = stack.enter_context(_BoundedFile(file))
        image = stack.enter_context(Image.open(file, formats=_FORMATS))
        # PIL warns of such a size and refuses twice of it; a file of some bytes can claim it.
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width}x{image.height} are more than {Image.MAX_IMAGE_PIXELS:,} pixels")
        yield image


def _header(file: Path | IO[bytes] | Image.Image) -> tuple[Size, bool]:
    """Return height and width of an image as it will be decoded, and whether it is grey."""
    with _open(file) as image:
        exif = Image.Image.getexif(image)  # of the base class: PNG's own decodes the whole image
        turned = exif.get(_EXIF_ORIENTATION, 1) >= 5  # 5 to 8 swap the axes
        return image.size if turned else image.size[::-1], image.mode in _GREY_MODES


def _decode(file: Path | IO[bytes] | Image.Image, in_chans: int, img_size: Size | None) -> Tensor:
    """Return an image as uint8 `[in_chans, H, W]`, in its own size if `img_size` is None."""
    with _open(file) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("floating-point pixels, save it with 8 or 16 bits")
        if image.mode.startswith("I"):  # 16 bits, which PIL would clip to 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        image = image.convert("L" if in_chans == 1 else "RGB")
        height, width = img_size or (image.height, image.width)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image).reshape(height, width, in_chans)).permute(2, 0, 1)


def _not_an_image(path: Path, error: Exception) -> DataError:
    return DataError(f"'{path}' is not an image that can be decoded ({one_line(error)}): delete or mend it")


def sizes_differ(what: str, one: Size, other: Size) -> DataError:
    return DataError(
        f"{what} has images of different sizes ({one[0]}x{one[1]} and {other[0]}x{other[1]}): give --img-size, to "
        "which all are resized"
    )
