"""The small report that a training run leaves at its end."""

from pathlib import Path
from typing import Any

import torch

from capszoo.data import DataSplits
from capszoo.engine.run_folder import read_summary

from .findings import find, first_batches
from .sheet import sections_of, training_section, write_sheet

__all__ = ["write_run_report"]

# Images of the test set that it shows the answers for.
SEEN = 1000


def write_run_report(
    folder: Path, model: Any, data: DataSplits, device: torch.device, facts: dict[str, object], title: str
) -> Path:
    """Write `report.html`: the curves of training, and answers on the test set; `capszoo show` writes the large one.

    Args:
        folder: The run folder.
        model: The trained network.
        data: Its data set, normalised as the network takes it.
        device: Where the network is.
        facts: What to say on top.
        title: Heading of the page.

    Returns:
        The page.

    Raises:
        WriteError: If it cannot be written.
        ImportError: If matplotlib is not installed.
    """
    sections = [training_section(read_summary(folder))]
    if not data.multi_label:  # a mistake is then not one class for another
        taken = first_batches(data.test, SEEN, device)
        sections += sections_of(find(model, taken, data.class_names, looks_inside=False, changes=False))
    page, *_ = write_sheet(folder / "report.html", title, facts, sections)
    return page
