"""What tests of data sets share: small sets on disk, and errors of one line."""

import numpy as np
import pytest
from PIL import Image

from capszoo.errors import DataError


def _escape(part):
    return "".join("\\" + c if c in r"\.()[]{}*+?^$|" else c for c in str(part))


@pytest.fixture(scope="session")
def raises():
    def raises(*parts):
        """Expect a DataError of one line that holds all `parts`, in this order."""
        return pytest.raises(DataError, match="^" + "[^\n]*".join(["", *map(_escape, parts), ""]) + "$")

    return raises


@pytest.fixture(scope="session")
def write_folder():
    def write_folder(root, parts=("train", "test"), classes=("cat", "dog"), count=6, size=(8, 10), mode="RGB"):
        """Write an image folder whose images all differ; `size` is height and width."""
        rng = np.random.default_rng(0)
        for part in parts:
            for label in classes:
                (root / part / label).mkdir(parents=True)
                for i in range(count):
                    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                    Image.fromarray(pixels).convert(mode).save(root / part / label / f"{i}.png")
        return root

    return write_folder


@pytest.fixture(scope="session")
def rows():
    def rows(split):
        """Return the images of a split as a set of bytes."""
        return {image.numpy().tobytes() for image in split.images}

    return rows


@pytest.fixture(scope="session")
def write_tables():
    def write_tables(root, parts=("train", "test"), classes=("cat", "dog", "bird"), count=9, size=(8, 10)):
        """Write a folder whose images show several classes: image i those whose bits i has; the last lies deeper."""
        rng = np.random.default_rng(0)
        for part in parts:
            (root / part / "more").mkdir(parents=True)
            lines = [",".join(["file", *classes])]
            for i in range(count):
                name = f"{i}.png" if i < count - 1 else "more/last.png"
                Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(root / part / name)
                lines.append(",".join([name, *(str(i >> j & 1) for j in range(len(classes)))]))
            (root / part / "labels.csv").write_text("\n".join(lines) + "\n")
        return root

    return write_tables
