"""Measured tables as JSON files, which are read back or refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from secateur.checkpoint.atomic import write_atomic
from secateur.errors import UsageError

Table = TypeVar("Table")


def write_table(path: str | os.PathLike[str], version: int, values: dict[str, Any], indent: int | None = None) -> None:
    """Write a table as JSON, whole or not at all."""
    write_atomic(path, json.dumps({"format_version": version, **values}, indent=indent).encode())


def read_table(
    path: str | os.PathLike[str], version: int, what: str, remedy: str, make: Callable[[dict[str, Any]], Table]
) -> Table:
    """Read what :func:`write_table` wrote.

    Args:
        path: The file.
        version: The one version that is read.
        what: What the file ought to be, for errors: ``table of times``.
        remedy: What to do about a file that is none.
        make: Makes the table of the values.

    Raises:
        UsageError: If the file is not there or not of this form.
    """
    try:
        given = json.loads(Path(path).read_bytes())
        if given.pop("format_version") != version:
            raise ValueError("its version is unknown")
        return make(given)
    except OSError as error:
        raise UsageError(f"{path}: can't be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{path}: no {what} ({found}). {remedy}") from error
