"""The page of a network: one HTML file that needs nothing else, and its pictures as PNG files."""

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capszoo.errors import UsageError, WriteError
from capszoo.figures import network, style
from capszoo.figures.template import PAGE, STYLE
from capszoo.files import check_target, write_atomically

from .findings import Findings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Section", "check_sheet", "sections_of", "training_section", "write_sheet"]

# Pictures have a white ground, on dark pages too.
_STYLE = """
figure { margin: .4rem 0 1rem; overflow-x: auto; }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
figure.wide img { max-width: none; }
.pairs td, .pairs th { padding: .1rem 1.2rem .1rem 0; text-align: left; }
"""


# Of the sections below, and of `training_section`.
_PICTURE = re.compile(r"(training|right|wrong|confusion|calibration|robustness|sweep-\d+|parts|entropy)\.png")


class Section:
    """A heading, a sentence, and a picture or a table.

    Args:
        name: Name of the picture's file, without its suffix.
        heading: The heading.
        note: What to see there.
        figure: The picture.
        table: Rows of a table, the first its headings.
    """

    def __init__(
        self,
        name: str,
        heading: str,
        note: str,
        figure: "Figure | None" = None,
        table: Sequence[Sequence[object]] = (),
    ):
        self.name, self.heading, self.note, self.figure, self.table = name, heading, note, figure, table

    def html(self, data: bytes | None) -> str:
        parts = [f"<h2>{escape(self.heading)}</h2><p>{escape(self.note)}</p>"]
        if data is not None:
            source = base64.b64encode(data).decode("ascii")
            parts.append(f'<figure><img alt="{escape(self.heading)}" src="data:image/png;base64,{source}"></figure>')
        if self.table:
            head, *rows = self.table
            cells = "".join(f"<th scope=col>{escape(str(cell))}</th>" for cell in head)
            body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
            parts.append(f"<table class=pairs><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>")
        return "".join(parts)


def training_section(rows: Sequence[Mapping[str, Any]]) -> Section:
    """The curves of a run, of the rows of its `summary.csv`."""
    # As the trainer chooses it: of equal accuracies that of the lower loss.
    best = max(rows, key=lambda row: (float(row["eval_top1"] or 0), -float(row["eval_loss"] or 0)))
    validated = f"; the best, {float(best['eval_top1']):.2%}, is of epoch {best['epoch']}" if best["eval_top1"] else ""
    return Section("training", "Training", f"{len(rows)} epochs{validated}.", network.draw_training(rows))


def sections_of(found: Findings) -> list[Section]:
    """All that a report says of what was found."""
    sections = []
    if found.right:
        known = found.top1 is not None
        heading = "Recognised" if known else "Images"
        note = "Each image with the predicted class and its score; below it, what the decoder draws from that capsule."
        if found.right[0].drawn is None:
            note = "Each image with the predicted class and its score."
        sections.append(Section("right", heading, note, network.draw_images(found.right)))
    if found.wrong:
        note = "The surest mistakes: true class, predicted class and its score."
        sections.append(Section("wrong", "Mistaken", note, network.draw_images(found.wrong)))
    if found.confused:
        table = [("true class", "predicted class", "images"), *found.confused]
        sections.append(Section("pairs", "Most confused pairs", "The most frequent mistakes.", table=table))
    if found.confusion is not None and len(found.class_names) > 1:
        figure = network.draw_confusion(found.confusion, found.class_names)
        note = "Images of each true class by predicted class; colours are shares of a row, on a square-root scale."
        sections.append(Section("confusion", "Confusion", note, figure))
    if found.calibration:
        note = (
            f"Whether scores mean what they say: expected calibration error {found.calibration_error:.4f}. Lengths of "
            "capsules are trained towards 0.9 and 0.1, and are not probabilities."
        )
        sections.append(Section("calibration", "Calibration", note, network.draw_calibration(found.calibration)))
    if found.robustness:
        note = f"Accuracy on {min(found.count, 500)} of the images, turned, moved and resized; zeros come from outside."
        sections.append(Section("robustness", "Robustness", note, network.draw_robustness(found.robustness)))
    if found.sweep is not None:
        for number, drawn in enumerate(found.sweep):
            image = found.looked[number]
            note = f"Each row changes one number of the capsule of {image.predicted!r} by the amounts on top."
            heading = f"What the capsule of {image.predicted!r} encodes"
            sections.append(
                Section(f"sweep-{number + 1}", heading, note, network.draw_sweep(drawn, found.sweep_values))
            )
    if found.part_maps is not None:
        figure = network.draw_part_maps(found.looked, found.part_maps, found.class_names)
        note = "Which parts of an image vote for its predicted class, after each iteration of routing."
        sections.append(Section("parts", "Couplings over the image", note, figure))
    if found.entropy:
        note = "Entropy of the couplings, over that of equal ones: 1 where routing decides nothing, 0 where all."
        sections.append(Section("entropy", "What routing decides", note, network.draw_entropy(found.entropy)))
    return sections


def check_sheet(path: Path, option: str) -> None:
    """Check that a page and its pictures can be written, before they are made.

    Args:
        path: Of the page.
        option: What names it, for the message.

    Raises:
        UsageError: If its folder is not there or may not be written to, or that of the pictures is something else's.
    """
    check_target(path, option)
    folder = path.with_suffix("")
    if folder.exists() and not (folder.is_dir() and (path.is_file() or not any(folder.iterdir()))):
        raise UsageError(
            f"{option} {str(path)!r} keeps its pictures in {str(folder)!r}, which has others: choose another"
        )


def write_sheet(path: str | Path, title: str, facts: Mapping[str, object], sections: Sequence[Section]) -> list[Path]:
    """Write the page, and beside it each picture in a folder of the page's name, in place of an earlier page's.

    Args:
        path: HTML file to write; its folder must exist.
        title: Heading of the page.
        facts: Names and values to show on top.
        sections: What follows.

    Returns:
        The files that were written, the page first.

    Raises:
        WriteError: If a file cannot be written.
        ImportError: If matplotlib is not installed.
    """
    path = Path(path)
    folder = path.with_suffix("")
    if path.is_file() and folder.is_dir():
        for picture in folder.iterdir():
            if _PICTURE.fullmatch(picture.name):
                picture.unlink()
    rows = [f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>" for name, value in facts.items()]
    body = [f"<h1>{escape(title)}</h1><table class=facts>{''.join(rows)}</table>"]
    written = [path]
    for section in sections:
        data = None
        if section.figure is not None:
            data = style.png(section.figure, dpi=120)
            picture = folder / f"{section.name}.png"
            try:
                folder.mkdir(exist_ok=True)
            except OSError as error:
                raise WriteError(f"folder {str(folder)!r} cannot be made ({error.strerror}): remove it") from None
            write_atomically(picture, lambda temporary, data=data: Path(temporary).write_bytes(data))
            written.append(picture)
        body.append(section.html(data))
    page = PAGE.format(title=escape(title), style=STYLE + _STYLE, body="\n".join(body), script="")
    encoded = page.encode("utf-8", "backslashreplace")
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(encoded))
    return written
