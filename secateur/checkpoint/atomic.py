"""Write files whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from secateur.errors import RunError, UsageError


def write_atomic(path: str | os.PathLike[str], content: bytes, *, keep: Path | None = None) -> None:
    """Replace a file by new content, so that a reader at any moment sees the old file or the new one, whole.

    The content goes to a hidden file beside the target, is forced to the disk, and takes the target's name; being
    killed leaves at most the hidden file, which the next write to the same path clears away. A missing folder is
    made; a symbolic link is followed.

    Args:
        path: File to write.
        content: All of it.
        keep: Name that the file which is replaced takes, in the same folder; between the two renamings that file alone
            is there.

    Raises:
        UsageError: If the place can't be written to: no permission, a folder of that name, a file among the parents.
        RunError: If the disk fails or is full.
    """
    target = Path(os.path.realpath(path))
    host = socket.gethostname().partition(".")[0]
    partial = target.with_name(f".{target.name}.{host}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(target, host)
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                partial.chmod(target.stat().st_mode & 0o7777)
                if keep is not None:
                    target.replace(keep)
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)
    except (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        raise UsageError(
            f"{path}: can't be written: {error.strerror}; name a file in a folder that you own."
        ) from error
    except OSError as error:
        if error.errno == errno.EROFS:
            raise UsageError(
                f"{path}: can't be written: {error.strerror}; name a file in a folder that you own."
            ) from error
        raise RunError(f"{path}: writing failed: {error.strerror or error}.") from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as indented UTF-8 JSON, atomically as :func:`write_atomic` does.

    Raises:
        TypeError: If the value holds something that JSON has no form for.
        ValueError: If it holds a number that isn't finite, which JSON readers refuse.
        UsageError: If the place can't be written to.
        RunError: If the disk fails or is full.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, f"{text}\n".encode())


def _clear_abandoned(target: Path, host: str) -> None:
    """Remove the hidden files that killed processes of this host left of earlier writes to the same file."""
    prefix = f".{target.name}.{host}."
    for entry in target.parent.iterdir():
        if not (entry.name.startswith(prefix) and entry.name.endswith(".partial")):
            continue
        owner = entry.name.removeprefix(prefix).partition("-")[0]
        if owner.isdecimal() and not _alive(int(owner)):
            entry.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Force the folder's entry to the disk; some file systems can't, and then the rename alone has to do."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
