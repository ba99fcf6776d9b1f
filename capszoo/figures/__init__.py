"""Figures of measurements and of explorations, as PNG files.

Figures of measurements take the rows of a CSV as `csv.DictReader` or the recipe that wrote it gives them, those of
explorations the solutions of :mod:`capszoo.explore`; values that are missing are skipped. matplotlib is imported only
when a figure is drawn, and without its global state.
"""

from .accuracy import curves, plot_accuracy, plot_time_to_best
from .comparison import plot_comparison
from .front import plot_front, plot_tradeoff
from .page import write_report
from .speed import plot_layers, plot_memory, plot_speedup
from .style import accuracy_limits

__all__ = [
    "accuracy_limits",
    "curves",
    "plot_accuracy",
    "plot_comparison",
    "plot_front",
    "plot_layers",
    "plot_memory",
    "plot_speedup",
    "plot_time_to_best",
    "plot_tradeoff",
    "write_report",
]
