"""The walk through the architecture is held to the program: its code prints what it shows, and what it names exists."""

import contextlib
import io
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from secateur import criteria
from secateur.cli import console
from secateur.cli.commands import app
from secateur.tracing.rules import RULES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
PICTURE = (ROOT / "docs/architecture.svg").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```\w+\n.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
PLACES = ("", "secateur", "secateur/tracing")
"""Folders from which the page names files with their folder; a name alone is a file's anywhere."""


def packages() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "secateur").glob("*/__init__.py"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the page's network, in which its code runs; rules and criteria are as before afterwards."""
    (name,) = [text for language, text in BLOCKS if language == "python" and text.startswith("# net.py\n")]
    (tmp_path / "net.py").write_text(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "net", raising=False)
    rules = dict(RULES)
    yield tmp_path
    RULES.clear()
    RULES.update(rules)
    criteria.unregister("largest")
    sys.modules.pop("net", None)


def test_the_code_shown_prints_what_is_shown(folder: Path) -> None:
    names: dict[str, Any] = {"__name__": "walk"}
    compared = 0
    for place, (language, text) in enumerate(BLOCKS):
        if language != "python" or text.startswith("# net.py\n"):
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(text, "block", "exec"), names)
        follows, shown = BLOCKS[place + 1] if place + 1 < len(BLOCKS) else ("", "")
        assert printed.getvalue().replace(f"{folder}/", "") == (shown if follows == "text" else "")
        compared += follows == "text"
    assert compared == [language for language, _ in BLOCKS].count("text")


def test_the_command_shown_prints_what_is_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "WIDTH", 400)
    (shown,) = [text for language, text in BLOCKS if language == "console"]
    command, *lines = shown.splitlines()
    result = CliRunner().invoke(app, command.removeprefix("$ secateur ").split())
    assert result.exit_code == 0
    printed = [cells(line) for line in result.output.replace(f"{folder}/", "").splitlines()]
    assert lines
    for line in lines:
        assert cells(line) in printed


def cells(line: str) -> list[str]:
    """Return the cells of a table's row, however wide its columns are."""
    return [cell.strip() for cell in re.split("[┃│]", line)]


DIFFS = [text for language, text in BLOCKS if language == "diff"]


@pytest.mark.parametrize("text", DIFFS, ids=lambda text: text.partition("\n")[0].removeprefix("+++ "))
def test_a_change_shown_fits_the_file_that_it_names(text: str) -> None:
    head, *hunks = re.split(r"^@@.*\n", text, flags=re.MULTILINE)
    source = (ROOT / head.removeprefix("+++ ").strip()).read_text(encoding="utf-8")
    assert hunks
    for hunk in hunks:
        before = "".join(line[1:] for line in hunk.splitlines(keepends=True) if not line.startswith("+"))
        assert source.count(before) == 1 or not before


def test_every_file_and_folder_named_exists() -> None:
    named = set(re.findall(r"`([\w./]+(?:\.\w+|/))`", PROSE)) | set(re.findall(r"\b([\w/]+\.py)\b", PROSE))
    files = {name for name in named if name.endswith(("/", ".py", ".md", ".toml", ".json"))}
    files -= {"net.py", "result.json"}
    held = {path.name for folder in ("secateur", "tests", "bench") for path in (ROOT / folder).rglob("*.py")}
    here = [name for name in files if any((ROOT / place / name).exists() for place in PLACES)]
    missing = sorted(name for name in files.difference(here) if "/" in name or name not in held)
    assert len(files) > 60
    assert not missing


def test_every_package_and_every_module_of_tracing_is_named() -> None:
    named = set(re.findall(r"`([^`]+)`", PROSE))
    for package in packages():
        assert package in named or f"secateur/{package}/" in named, package
        assert f">{package}<" in PICTURE or package in ("data", "models"), package
    text = PROSE[PROSE.index("## 5.") :]
    for path in (ROOT / "secateur/tracing").rglob("*.py"):
        inside = path.relative_to(ROOT / "secateur/tracing")
        if inside.name != "__init__.py":
            assert re.search(rf"\b{inside.name}`", text) or f"`secateur/tracing/{inside.parts[0]}/`" in text, inside


def test_every_name_in_the_prose_is_one_of_the_source() -> None:
    """Words in backticks that look like names: each part of them is a word of the source, or of a block."""
    folders = ("secateur", "tests", "bench")
    source = "\n".join(p.read_text(encoding="utf-8") for f in folders for p in (ROOT / f).rglob("*.py"))
    words = set(re.findall(r"\w+", source + "".join(text for _, text in BLOCKS)))
    for name in re.findall(r"`(?:sc\.)?([A-Za-z_][\w.]*)`", PROSE):
        if name.endswith((".py", ".md", ".toml", ".json")):
            continue
        for part in name.split("."):
            assert part in words, name


def test_the_picture_has_the_packages_in_the_order_of_their_imports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = [c for c in project["tool"]["importlinter"]["contracts"] if c["id"] == "layout"]
    order = [name for layer in reversed(contract["layers"]) for name in sorted(layer.split(" | "))]
    shelf = PICTURE[PICTURE.index('class="order"') :]
    shown = re.findall(r'<text x="64"[^>]*>([\w, ]+)</text>', shelf)
    assert [name for names in shown for name in names.split(", ")] == order
    assert sorted(order) == sorted([*packages(), "errors"])


def test_the_list_of_contents_leads_to_the_headings() -> None:
    headings = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    targets = re.findall(r"\]\(#([\w-]+)\)", PAGE)
    assert len(targets) == len(headings) == 7
    assert set(targets) == anchors
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target


def test_every_bench_is_listed() -> None:
    listed = set(re.findall(r"`(\w+\.py)`", PAGE[PAGE.index("## 7.") :]))
    assert listed == {path.name for path in (ROOT / "bench").glob("*.py")} - {"__init__.py"}


def test_every_word_of_the_glossary_is_defined_once() -> None:
    words = re.findall(r"^\| \*\*([\w]+)\*\* \|", PAGE, re.MULTILINE)
    assert len(words) == len(set(words)) == 21
