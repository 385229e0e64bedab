"""Measured tables as JSON files, which are read back or refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

from secateur.checkpoint.atomic import write_atomic
from secateur.errors import UsageError
from secateur.graph.structure import checked, parsed

Table = TypeVar("Table")


def write_table(path: str | os.PathLike[str], version: int, values: dict[str, Any], indent: int | None = None) -> None:
    """Write a table as JSON, whole or not at all."""
    write_atomic(path, json.dumps({"format_version": version, **values}, indent=indent).encode())


def read_table(path: str | os.PathLike[str], version: int, what: str, remedy: str, form: type[Table]) -> Table:
    """Read what :func:`write_table` wrote.

    Args:
        path: The file.
        version: The one version that is read.
        what: What the file ought to be, for errors: ``table of times``.
        remedy: What to do about a file that is none.
        form: The table's class.

    Raises:
        UsageError: If the file is not there or not of this form.
    """
    try:
        given = parsed(Path(path).read_bytes())
        if not isinstance(given, dict) or given.pop("format_version", None) != version:
            raise ValueError("its version is unknown")
        table = checked(form, given)
    except OSError as error:
        raise UsageError(f"{path}: can't be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"{path}: no {what} ({error}). {remedy}") from error
    object.__setattr__(table, "file", str(path))  # tables are frozen; a message names where one came from
    return table
