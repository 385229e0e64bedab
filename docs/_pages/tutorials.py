"""The tutorials as what they are: documents whose blocks of code run, and notebooks made from them.

``python -m docs._pages.tutorials NAME...`` runs tutorials and writes what they print under their blocks; without a name
it only makes the notebooks of ``docs/notebooks`` from the documents. ``tests/test_docs.py`` runs the tutorials, and
refuses output of other words and notebooks of another text.

A block ``python`` is run; one that begins with a comment that names a file is written there first. A block ``text``
behind it is what it prints. In a block ``console`` a line that begins with ``$ secateur`` is a command, and the others
are what it prints.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
FENCE = re.compile(r"^```(python|text|console)\n(.*?)^```$\n?", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")
NAMES = ("own-network", "training-loop", "detector", "int8-onnx", "finding-the-target")
"""The tutorials, in their order."""


@dataclass
class Block:
    """A fenced block of a tutorial."""

    language: str
    text: str
    start: int
    end: int


@dataclass
class Printed:
    """What a block printed, beside what the document shows of it."""

    block: Block
    shown: str
    found: str


def text_of(path: str) -> str:
    """Return the text of a page, which is named from ``docs/`` on and without a suffix."""
    return (DOCS / f"{path}.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    """Return the blocks of a document that the tutorials' rules speak of."""
    return [Block(found[1], found[2], found.start(), found.end()) for found in FENCE.finditer(text)]


def run(path: str, names: dict[str, Any]) -> Iterator[Printed]:
    """Run a page in the present folder, block after block; ``names`` are what its code has defined."""
    names["__name__"] = "tutorial"
    found = blocks(text_of(path))
    for place, block in enumerate(found):
        if block.language == "python":
            file = FILE.match(block.text)
            if file:
                Path(file[1]).write_text(block.text, encoding="utf-8")
                sys.modules.pop(file[1].removesuffix(".py"), None)  # another tutorial's
                continue
            printed = _printed(exec, compile(block.text, "block", "exec"), names)
            follows = found[place + 1] if place + 1 < len(found) else None
            shown = follows.text if follows is not None and follows.language == "text" else ""
            yield Printed(block, shown, printed)
        elif block.language == "console":
            for command, shown in commands(block):
                yield Printed(block, shown, _printed(_command, shlex.split(command)[1:]))


def commands(block: Block) -> list[tuple[str, str]]:
    """Return the commands of a block, each with the lines below it."""
    parts = re.split(r"^\$ (.+)\n", block.text, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def _printed(action: Any, *given: Any) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        action(*given)
    return "".join(f"{line.rstrip()}\n" for line in printed.getvalue().strip("\n").splitlines())


def _command(words: Sequence[str]) -> None:
    from secateur.cli.commands import main

    status = main(words)
    if status:
        raise SystemExit(f"secateur {' '.join(words)}: ended with {status}")


def rewrite(name: str) -> None:
    """Run a tutorial and put what it prints in place of what it shows, but for what it shows in part."""
    path = f"tutorials/{name}"
    text = text_of(path)
    found = blocks(text)
    ran = list(run(path, {}))
    places = {block.start: place for place, block in enumerate(found)}
    for printed in reversed(ran):
        block = printed.block
        if printed.shown == printed.found or "\n...\n" in f"\n{printed.shown}":
            continue
        if block.language == "python":
            after = found[places[block.start] + 1] if places[block.start] + 1 < len(found) else None
            old = after if after is not None and after.language == "text" else None
            fence = f"```text\n{printed.found}```\n"
            text = (
                text[: block.end] + "\n" + fence + text[block.end :]
                if old is None
                else text[: old.start] + fence + text[old.end :]
            )
        else:
            part = text[block.start : block.end]
            (command,) = [c for c, shown in commands(block) if shown == printed.shown]
            text = (
                text[: block.start]
                + part.replace(f"$ {command}\n{printed.shown}", f"$ {command}\n{printed.found}")
                + text[block.end :]
            )
    (DOCS / f"{path}.md").write_text(text, encoding="utf-8")


def notebook(name: str) -> str:
    """Return a tutorial as a notebook, its output with it."""
    text = text_of(f"tutorials/{name}")
    cells: list[dict[str, Any]] = []
    at = 0
    for block in blocks(text):
        _say(cells, text[at : block.start])
        at = block.end
        if block.language == "python":
            file = FILE.match(block.text)
            cells.append(_code(f"%%writefile {file[1]}\n{block.text}" if file else block.text))
        elif block.language == "console":
            for command, shown in commands(block):
                cells.append(_code(f"!{command}", shown))
        elif cells and cells[-1]["cell_type"] == "code":
            cells[-1]["outputs"] = _code("", block.text)["outputs"]
    _say(cells, text[at:])
    for number, cell in enumerate(cells):
        cell["id"] = f"{name}-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _say(cells: list[dict[str, Any]], text: str) -> None:
    if text.strip():
        cells.append({"cell_type": "markdown", "id": "", "metadata": {}, "source": text.strip("\n")})


def _code(source: str, shown: str = "") -> dict[str, Any]:
    outputs = [{"name": "stdout", "output_type": "stream", "text": shown}] if shown else []
    return {
        "cell_type": "code", "execution_count": None, "id": "", "metadata": {}, "outputs": outputs,
        "source": source.rstrip("\n"),
    }  # fmt: skip


def main(names: Sequence[str]) -> None:
    """Run the tutorials named and write what they print; then make all notebooks."""
    home = os.getcwd()
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            sys.path.insert(0, folder)
            try:
                rewrite(name)
            finally:
                os.chdir(home)
                sys.path.remove(folder)
    for name in NAMES:
        (DOCS / "notebooks" / f"{name}.ipynb").write_text(notebook(name), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
