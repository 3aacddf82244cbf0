r"""SIGINT and SIGTERM end a training after a step with a checkpoint, and other commands at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: Seconds that Python has, after a second signal to a command, to end by itself.
GRACE = 2.0


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


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Turns SIGTERM into an exception inside the block, so that unfinished work is undone.

    Python runs the handler of a signal only between two of its instructions, and one instruction
    can be minutes of compilation. Therefore a thread watches for a second signal and ends the
    process ``GRACE`` seconds later. Outside the main thread nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    ended = threading.Event()
    threading.Thread(target=_watch, args=(reader, ended), daemon=True).start()
    previous_descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    previous: Any = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)
        signal.set_wakeup_fd(previous_descriptor)
        ended.set()
        os.close(writer)  # which ends the thread


def _terminate(number: int, frame: FrameType | None) -> None:
    raise stopped(number, "nothing half-written")


def _watch(reader: int, ended: threading.Event) -> None:
    """Reads the number of each signal; ends the process some time after the second one."""
    count = 0
    while number := os.read(reader, 1):
        count += number[0] in (signal.SIGINT, signal.SIGTERM)
        if count == 2 and not ended.wait(GRACE):
            os._exit(128 + number[0])
    os.close(reader)


# a child process that receives the same Ctrl-C must not report it to its parent
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
