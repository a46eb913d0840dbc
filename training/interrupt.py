"""Ctrl-C between the steps of a training, not inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Stop:
    """``asked`` once Ctrl-C was pressed."""

    asked: bool = False


@contextmanager
def interruptible() -> Iterator[Stop]:
    """The first Ctrl-C inside only sets ``asked``, a second one raises ``KeyboardInterrupt`` at once.

    Only the main thread can do this, and only where Ctrl-C does anything: elsewhere nothing is changed. On exit the handler
    is the one that was there before.
    """
    stop = Stop()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield stop
        return

    def heard(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    signal.signal(signal.SIGINT, heard)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
