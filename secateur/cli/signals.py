"""What people and schedulers send: Ctrl-C, SIGTERM and SIGUSR1 stop a command at its next batch, in good order."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

CAUGHT = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))

_pending: list[int] = []


class Stopped(BaseException):
    """A signal asks to stop; like KeyboardInterrupt it is no Exception, so that nobody's handler takes it for one."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number
        self.name = signal.Signals(number).name
        super().__init__(f"stopped by {self.name}")


@contextmanager
def heeded() -> Iterator[None]:
    """Raise :class:`Stopped`, or KeyboardInterrupt for SIGINT, where one of :data:`CAUGHT` arrives in the block.

    What is raised where nobody can see it, as in a finaliser or while a process is forked, :func:`check` raises again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def stop(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a process that reads images, and that this one ends
            if number == signal.SIGINT:
                return
            os._exit(128 + number)
        for each in CAUGHT:
            # A second SIGTERM ends the process at once; a scheduler's warnings may come more than once.
            once_more = signal.SIG_DFL if each == signal.SIGTERM else signal.SIG_IGN
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else once_more)
        _pending.append(number)
        check()

    def unseen(lost: sys.UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, Stopped | KeyboardInterrupt):
            hook(lost)

    _pending.clear()
    hook, sys.unraisablehook = sys.unraisablehook, unseen
    # What a shell has this process ignore, as Ctrl-C of one in the background, stays ignored.
    before = {each: signal.signal(each, stop) for each in CAUGHT if signal.getsignal(each) != signal.SIG_IGN}
    try:
        yield
    finally:
        sys.unraisablehook = hook
        _pending.clear()
        for each, handler in before.items():
            signal.signal(each, handler)


def check() -> None:
    """Raise what a signal that has arrived asks for; again, if it was raised where nobody could see it.

    Raises:
        Stopped: If a signal has arrived.
        KeyboardInterrupt: If it was Ctrl-C.
    """
    if _pending:
        raise KeyboardInterrupt if _pending[0] == signal.SIGINT else Stopped(_pending[0])
