"""Ctrl-C and SIGTERM as a request to stop."""

import signal
from typing import Any


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """0 after SIGTERM, by which a scheduler asks for an orderly end; 130 after Ctrl-C, as shells count it."""
        return 0 if self.received == signal.SIGTERM else 130
