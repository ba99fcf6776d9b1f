"""`python -m capszoo` is the command `capszoo`."""

from capszoo.command_line.main import entry_point

entry_point()
