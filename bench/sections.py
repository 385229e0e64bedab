"""Sections of documents: each bench owns the text between its two markers, and leaves all other text as it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from secateur.checkpoint import write_atomic

DOCS = Path(__file__).resolve().parent.parent / "docs"


def write_section(document: str | Path, name: str, text: str) -> None:
    """Put ``text`` between the markers of section ``name``; a new section goes to the end.

    Args:
        document: Markdown file; made if it is not there.
        name: Name of the section, letters, digits and dashes.
        text: Markdown, with a heading unless the section is all of the document.

    Raises:
        ValueError: If the document opens the section and never closes it.
    """
    path = Path(document)
    start, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    content = path.read_text(encoding="utf-8") if path.is_file() else ""
    section = f"{start}\n{text.strip()}\n{end}"
    if (start in content) != (end in content):
        raise ValueError(f"{path}: section {name!r} has only one of its two markers; restore {start} and {end}.")
    if start in content:
        content = re.sub(
            re.escape(start) + ".*?" + re.escape(end), lambda _: section, content, count=1, flags=re.DOTALL
        )
    else:
        content = f"{content.rstrip()}\n\n{section}\n".lstrip()
    write_atomic(path, content.encode())


@dataclass(frozen=True)
class Section:
    """A section that is made from measured rows: the same rows, the same text."""

    document: str
    """A file of ``docs``."""
    name: str
    render: Callable[[], str]

    def write(self) -> None:
        """Make the section's text anew from the rows."""
        write_section(DOCS / self.document, self.name, self.render())


@dataclass(frozen=True)
class Figure:
    """A drawing that is made from measured rows."""

    file: str
    """A file of ``docs``."""
    draw: Callable[[], str]

    def write(self) -> None:
        """Draw it anew from the rows."""
        write_atomic(DOCS / self.file, self.draw().encode())
