"""What schedulers send: SIGTERM and SIGUSR1 stop a command at its next batch, in good order."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

CAUGHT = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))

_pending: list[int] = []


class Stopped(BaseException):
    """A signal asks to stop; like KeyboardInterrupt it is no Exception, so that nobody's handler takes it for one."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number
        self.name = signal.Signals(number).name
        super().__init__(f"stopped by {self.name}")


@contextmanager
def heeded() -> Iterator[None]:
    """Raise :class:`Stopped` where one of :data:`CAUGHT` arrives while the block runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def stop(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a process that reads images
            os._exit(128 + number)
        for each in CAUGHT:
            # A second SIGTERM ends the process at once; a scheduler's warnings may come more than once.
            signal.signal(each, signal.SIG_DFL if each == signal.SIGTERM else signal.SIG_IGN)
        _pending.append(number)
        raise Stopped(number)

    _pending.clear()
    before = {each: signal.signal(each, stop) for each in CAUGHT}
    try:
        yield
    finally:
        _pending.clear()
        for each, handler in before.items():
            signal.signal(each, handler)


def check() -> None:
    """Raise :class:`Stopped` again, if it was raised where nobody could see it, as in a finaliser.

    Raises:
        Stopped: If a signal has arrived.
    """
    if _pending:
        raise Stopped(_pending[0])
