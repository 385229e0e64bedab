"""A file that takes its place only when it is whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import UsageError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file of the same suffix, which replaces the target if the block succeeds and is deleted if not.

    A missing folder is made.
    """
    if path.is_dir():
        raise UsageError(f"{path}: can't be written (it is a directory). Choose another target.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise UsageError(f"{path}: can't be written ({error.strerror}). Choose another target.") from error
    part = folder / path.name
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        raise UsageError(f"{path}: can't be written ({error.strerror}). Choose another target.") from error
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
