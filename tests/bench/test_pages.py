"""Measured rows are in order, and the documents say what they do."""

import json
import re
from pathlib import Path

import pytest

from bench import pages, zoo
from bench.rows import RESULTS, Store
from bench.sections import DOCS, Figure, Section

IDS = [section.name for section in pages.SECTIONS]


def test_every_file_of_rows_is_one_that_a_bench_reads() -> None:
    assert sorted(path.name for path in RESULTS.iterdir()) == sorted(store.file for store in pages.STORES)
    assert not [path.name for path in DOCS.rglob("*.json*")]


@pytest.mark.parametrize("store", pages.STORES, ids=lambda store: store.file)
def test_rows_are_one_object_a_line_each_named_once_and_in_order(store: Store) -> None:
    lines = store.path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert lines == [json.dumps(row, sort_keys=True, ensure_ascii=False) for row in rows]
    names = [store.name(row) for row in rows]
    assert names == sorted(set(names))
    assert all(isinstance(row, dict) and any(key in row for key in store.names) for row in rows)


@pytest.mark.parametrize("section", pages.SECTIONS, ids=IDS)
def test_a_document_is_what_the_rows_give(section: Section) -> None:
    text = (DOCS / section.document).read_text(encoding="utf-8")
    expected = f"<!-- begin: {section.name} -->\n{section.render().strip()}\n<!-- end: {section.name} -->"
    assert expected in text, "python -m bench.pages makes it anew"


@pytest.mark.parametrize("figure", pages.FIGURES, ids=lambda figure: figure.file)
def test_a_figure_is_what_the_rows_give(figure: Figure) -> None:
    assert (DOCS / figure.file).read_text(encoding="utf-8") == figure.draw(), "python -m bench.pages draws it anew"


def test_a_row_takes_the_place_of_the_one_of_its_name(tmp_path: Path) -> None:
    store = Store("rows.jsonl", ("network", "tool"), folder=tmp_path / "results")
    assert store.read() == []
    for row in ({"tool": "b", "network": "x", "s": 1}, {"network": "x", "tool": "a"}, {"s": 2, "network": "w"}):
        store.keep(row)
    rows = store.keep({"network": "x", "tool": "b", "s": 3})
    assert rows == store.read() == [
        {"network": "w", "s": 2}, {"network": "x", "tool": "a"}, {"network": "x", "tool": "b", "s": 3},
    ]  # fmt: skip
    assert store.path.read_text().splitlines()[0] == '{"network": "w", "s": 2}'


def test_of_a_measurement_what_the_tables_say_is_kept() -> None:
    refusal = {"operator": "aten.view", "module": "a", "source": "net.py:3", "reason": "is merged", "tensors": 2}
    output = {"operator": "model output", "module": "", "source": "", "reason": "is returned", "tensors": 1}
    measured = {
        "inputs": [[1, 3, 8, 8]], "verdict": "exact", "detail": "", "error": 1e-16, "precision": "fp64", "groups": 3,
        "channels": 40, "macs_removed": 2 / 3, "seconds": 0.123456, "seconds_each": [0.123456], "refusals": [refusal,
        output, {**refusal, "module": "b"}], "forward_seconds": 12.3456, "bytes": 3 * 2**20, "peak_bytes": 2**21 + 5,
    }  # fmt: skip
    assert zoo.kept("timm/x", "secateur", measured) == {
        "network": "timm/x", "tool": "secateur", "verdict": "exact", "precision": "fp64", "groups": 3, "channels": 40,
        "macs_removed": 0.666667, "seconds": 0.1235, "forward_seconds": 12.35, "model_mb": 3, "peak_mb": 2,
        "refusals": 3, "reasons": [["aten.view", "is merged", 4]],
    }  # fmt: skip
    late = zoo.kept("timm/x", "peer", {"verdict": "timeout", "detail": "no end\nafter 60 s"})
    assert late == {"network": "timm/x", "tool": "peer", "verdict": "timeout", "detail": "no end after 60 s"}


def test_the_map_of_the_folder_names_every_file_and_command() -> None:
    text = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in RESULTS.parent.iterdir() if path.suffix in (".py", ".txt")} - {"__init__.py"}
    assert set(re.findall(r"`(\w+\.(?:py|txt))`", text)) == files
    assert {f"{name}.py" for name in re.findall(r"python -m bench\.(\w+)", text)} <= files
    assert set(re.findall(r"`([\w-]+\.jsonl)`", text)) == {store.file for store in pages.STORES}
