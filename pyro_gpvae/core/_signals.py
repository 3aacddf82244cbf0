r"""Signals that end a training after the present step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["Interrupts", "Terminated", "stopped"]


class Terminated(SystemExit):
    """Raised after SIGTERM; the process ends with exit code 143 unless it is caught."""

    def __init__(self, message: str = "terminated") -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Interrupts:
    """Context manager that records SIGINT and SIGTERM instead of raising at once.

    A second signal raises at once. Outside the main thread Python cannot handle signals, and
    nothing is recorded.

    Attributes:
        signal: The number of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python, and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if kind is None and self.signal is not None:  # the block did not see it
            raise stopped(self.signal, "stopped after the last step")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise stopped(number, "stopped at once")
        self.signal = number


def stopped(number: int, message: str) -> BaseException:
    """Returns the exception for a signal: KeyboardInterrupt or Terminated."""
    return Terminated(message) if number == signal.SIGTERM else KeyboardInterrupt(message)
