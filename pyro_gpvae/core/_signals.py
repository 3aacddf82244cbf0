r"""Signals: end a training after its step, with a checkpoint, and with the usual exit code."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["Interrupts", "Terminated", "stopped"]


class Terminated(SystemExit):
    """SIGTERM asked the process to end; left alone, it ends with exit code 143."""

    def __init__(self, message: str = "terminated") -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Interrupts:
    """Notes SIGINT and SIGTERM inside a block instead of acting on them at once.

    A second signal acts at once. Outside the main thread, where Python cannot, nothing is noted.
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
        if kind is None and self.signal is not None:  # it came too late for the block to see
            raise stopped(self.signal, "stopped after the last step")

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise stopped(number, "stopped at once")
        self.signal = number


def stopped(number: int, message: str) -> BaseException:
    """The exception that a signal stands for: KeyboardInterrupt, or Terminated."""
    return Terminated(message) if number == signal.SIGTERM else KeyboardInterrupt(message)
