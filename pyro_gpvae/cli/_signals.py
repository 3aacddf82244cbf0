r"""Ends a command on SIGINT and SIGTERM: cleanly at the first, within seconds at the second."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pyro_gpvae.core._signals import stopped

__all__ = ["ending_on_signals"]

#: Seconds that Python has, after a second signal, to end by itself.
GRACE = 2.0


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Turns SIGTERM into an exception inside the block, so that unfinished work is undone.

    Python runs the handler of a signal only between two of its instructions, and one instruction
    can be minutes of compilation. Therefore a thread watches for a second signal and ends the
    process ``GRACE`` seconds later. Files are written atomically, so that a process may end
    anywhere. Outside the main thread, where Python cannot handle signals, nothing is changed.
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
