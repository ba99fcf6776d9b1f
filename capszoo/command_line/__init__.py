"""Command lines: options, signals, results and errors of the recipes."""

from capszoo import _moved
from capszoo.errors import UsageError, unknown_name
from capszoo.errors import first_line as format_error
from capszoo.files import check_kinds, read_json, read_rows, read_yaml
from capszoo.precision import choose_device, device_name

from .console import add_result, check_results, make_console, make_table_console, results_folder, run
from .parser import ExtendAction, OptionParser, SizeAction, add_options, key_value
from .resume import changed_options, parse_resumable
from .signals import StopSignal

__all__ = [
    "ExtendAction",
    "OptionParser",
    "SizeAction",
    "StopSignal",
    "UsageError",
    "add_options",
    "add_result",
    "changed_options",
    "check_kinds",
    "check_results",
    "choose_device",
    "device_name",
    "format_error",
    "key_value",
    "make_console",
    "make_table_console",
    "parse_resumable",
    "read_json",
    "read_rows",
    "read_yaml",
    "results_folder",
    "run",
    "unknown_name",
]

__getattr__ = _moved.getter(__name__)
