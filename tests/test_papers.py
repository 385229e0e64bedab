"""docs/papers.md is held to the code: each file, name, recipe and command that it cites exists."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/papers.md").read_text(encoding="utf-8")
CITED = sorted(set(re.findall(r"`((?:secateur|tests|bench|recipes)/[^`\s]+)`", TEXT)))
RECIPES = sorted(set(re.findall(r"`((?:lenet5|vgg16|resnet50|resnet56)_\w+)`", TEXT)))


def names_in(path: Path) -> set[str]:
    """Return what a module defines at its top."""
    return set(re.findall(r"^(?:def|class) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("cited", CITED)
def test_every_file_and_name_cited_exists(cited: str) -> None:
    path, _, name = cited.partition("::")
    assert (ROOT / path).is_file()
    assert not name or name in names_in(ROOT / path)


def test_every_row_is_cited_with_its_test() -> None:
    known = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert set(RECIPES) <= known
    of_the_papers = {name for name in known if not name.startswith(("resnet20", "ssdlite"))}
    assert of_the_papers - {"resnet56_cifar10_cfp"} <= set(RECIPES)
    sections = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
    assert [section.splitlines()[0].split(":")[0] for section in sections] == ["CFP"] * 4 + ["CorrNet", "CSHE"]
    for row in re.findall(r"^\| (?!---)(.*) \|$", TEXT, re.MULTILINE):
        if (" test " in f" {row} " and "code" in row) or row.startswith("table |"):
            continue  # a head
        assert "tests/" in row or "the same" in row or "not verified" in row, row


def test_every_equation_and_table_is_there_once() -> None:
    equations = re.search(r"^## CFP: equations\n(.*?)^## ", TEXT, re.MULTILINE | re.DOTALL)
    assert equations is not None
    numbers: list[int] = []
    for cell in re.findall(r"^\| (\d[^|]*) \|", equations[1], re.MULTILINE):
        for part in cell.split(", "):
            first, _, last = part.partition("–")
            numbers += range(int(first), int(last or first) + 1)
    assert sorted(numbers) == list(range(1, 14))
    tables = re.search(r"^## CFP: tables\n(.*?)^## ", TEXT, re.MULTILINE | re.DOTALL)
    assert tables is not None
    assert {int(n) for n in re.findall(r"^\| (\d)\b", tables[1], re.MULTILINE)} == set(range(1, 8))


def test_every_command_names_what_exists() -> None:
    commands = re.findall(r"^    python (.+)$", TEXT, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        first, *rest = command.split()
        if first == "-m":
            assert importlib.util.find_spec(rest[0]) is not None
        else:
            assert (ROOT / first).is_file()
            options = re.findall(r"\s--[\w-]+", command)
            source = (ROOT / first).read_text(encoding="utf-8")
            assert all(f'"{option.strip()}"' in source for option in options)
