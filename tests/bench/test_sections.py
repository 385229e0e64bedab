from pathlib import Path

import pytest

from bench.sections import write_section


def test_a_section_is_replaced_and_every_other_text_is_kept(tmp_path: Path) -> None:
    document = tmp_path / "docs" / "results.md"
    write_section(document, "speed", "## Speed\none")
    document.write_text("# Results\n\nBy hand.\n\n" + document.read_text())
    write_section(document, "zoo", "## Zoo\n\\1 stays as it is")
    write_section(document, "speed", "## Speed\ntwo")
    assert document.read_text() == (
        "# Results\n\nBy hand.\n\n<!-- begin: speed -->\n## Speed\ntwo\n<!-- end: speed -->\n\n"
        "<!-- begin: zoo -->\n## Zoo\n\\1 stays as it is\n<!-- end: zoo -->\n"
    )
    assert [p.name for p in document.parent.iterdir()] == ["results.md"]


def test_a_section_with_one_marker_is_refused_and_left(tmp_path: Path) -> None:
    document = tmp_path / "results.md"
    document.write_text("<!-- begin: speed -->\nhalf")
    with pytest.raises(ValueError, match="only one of its two markers"):
        write_section(document, "speed", "text")
    assert document.read_text() == "<!-- begin: speed -->\nhalf"
