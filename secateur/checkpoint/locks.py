"""Locks by which processes that want the same file leave its making to one of them, and wait for it."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import ExitStack
from pathlib import Path

if sys.platform != "win32":
    import fcntl

PAUSE = 0.5
"""Seconds between two tries."""


def lock(path: Path, held: ExitStack) -> bool:
    """Take a lock until ``held`` is closed; return False while another process has it, which is to be tried again.

    The kernel releases it when the process ends, however it ends. It saves work and protects nothing: where a folder
    can't be written to, or its file system has no locks, everybody is let in. Whoever was let in looks first whether
    what is to be made is there.

    Args:
        path: The lock's own file, which is removed in the end.
        held: Whatever is returned, to be closed.
    """
    if sys.platform == "win32":  # where there are no advisory locks of this kind
        return True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    except OSError:
        return True
    held.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    held.callback(path.unlink, missing_ok=True)
    return True
