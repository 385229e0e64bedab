"""Places where nothing can be written, made for one process alone: file systems of its own, and no rights of root."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS, _PRIVATE, _REMOUNT, _READ_ONLY = 0x20000, (1 << 18) | (1 << 14), 32, 1


class CanNotError(Exception):
    """This process may not make such a place."""


def without_rights_of_root() -> None:
    """Let rights of files hold for root, too."""
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        if LIBC.capset(header, (ctypes.c_uint32 * 6)()):
            raise CanNotError("capset")


def own_file_system(folder: Path, options: str) -> None:
    """Put a small file system in memory at a folder, seen by this process only.

    Args:
        folder: Where.
        options: ``size=64k``, ``nr_inodes=9`` and the like.
    """
    if os.geteuid() or LIBC.unshare(_NEW_MOUNTS) or LIBC.mount(b"none", b"/", None, _PRIVATE, None):
        raise CanNotError("own mounts")
    _mount(folder, options, 0)


def change_file_system(folder: Path, options: str, *, read_only: bool = False) -> None:
    """Mount it anew, with other options."""
    _mount(folder, options, _REMOUNT | (_READ_ONLY if read_only else 0))


def _mount(folder: Path, options: str, flags: int) -> None:
    if LIBC.mount(b"tmpfs", str(folder).encode(), b"tmpfs", flags, options.encode() or None):
        raise CanNotError(os.strerror(ctypes.get_errno()))


def fill(folder: Path, leave: int) -> Path:
    """Fill a file system but for so many bytes; return the file that does."""
    file = folder / "filler"
    with file.open("wb", buffering=0) as full:
        try:
            while True:
                full.write(b"x" * 4096)
        except OSError:
            pass
        full.truncate(max(0, full.tell() - leave))
    return file
