"""Write one section of a document and leave every other as it is: each bench owns the text between its markers."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path


def write_section(document: str | Path, name: str, text: str) -> None:
    """Put ``text`` between the markers of section ``name``; a new section goes to the end.

    Args:
        document: Markdown file; made if it is not there.
        name: Name of the section, letters, digits and dashes.
        text: Markdown with its heading.

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
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(content)
    Path(part).chmod(0o644)
    os.replace(part, path)
