"""Measured rows: JSON Lines under ``bench/results``, one row a line, in the order of what names a row.

A file of rows changes by the lines that were measured anew and by nothing else, so that its history can be read.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.checkpoint import write_atomic

RESULTS = Path(__file__).resolve().parent / "results"

Row = dict[str, Any]


@dataclass(frozen=True)
class Store:
    """One file of rows."""

    file: str
    names: tuple[str, ...]
    """The keys whose values together name a row; a row may lack some of them."""
    folder: Path = RESULTS

    @property
    def path(self) -> Path:
        """Where the rows are."""
        return self.folder / self.file

    def name(self, row: Row) -> tuple[str, ...]:
        """Return what names a row, and gives it its place."""
        return tuple(str(row.get(key, "")) for key in self.names)

    def read(self) -> list[Row]:
        """Return all rows, none if nothing was measured yet."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def write(self, rows: Iterable[Row]) -> None:
        """Replace all rows."""
        lines = (json.dumps(row, sort_keys=True, ensure_ascii=False) for row in sorted(rows, key=self.name))
        write_atomic(self.path, "".join(f"{line}\n" for line in lines).encode())

    def keep(self, row: Row) -> list[Row]:
        """Put a row in its place, instead of the one of the same name, and return all rows.

        Other processes may be adding rows to the same file meanwhile.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.folder, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)
        try:
            self.write([*(other for other in self.read() if self.name(other) != self.name(row)), row])
            return self.read()
        finally:
            os.close(folder)
