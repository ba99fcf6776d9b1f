"""Reports of a network: how it was trained, what it gets wrong, what its capsules encode, how its routing decides."""

from capszoo.figures import write_report  # of an exploration, which stood here before

from .findings import Findings, find, first_batches
from .of_run import write_run_report
from .sheet import Section, check_sheet, sections_of, training_section, write_sheet

__all__ = [
    "Findings",
    "Section",
    "check_sheet",
    "find",
    "first_batches",
    "sections_of",
    "training_section",
    "write_report",
    "write_run_report",
    "write_sheet",
]
