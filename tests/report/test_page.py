import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from secateur.report import write_report
from tests.report.synthetic import write_run
from tests.report.test_charts import FIGURES


class _Elements(HTMLParser):
    """Collects elements outside scripts, and whatever a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def _elements(path: Path) -> list[tuple[str, dict[str, str | None]]]:
    parser = _Elements()
    parser.feed(path.read_text())
    return parser.found


@pytest.mark.parametrize("number", [1, 3])
def test_the_page_is_self_contained_and_every_figure_has_a_text_alternative(number: int, tmp_path: Path) -> None:
    files = write_report(
        [write_run(tmp_path / f"r{i}", seed=i, lost=0.002 * i) for i in range(number)], tmp_path / "report.html"
    )
    elements = _elements(files.html)
    assert files.html.stat().st_size < 6_000_000
    for tag, attributes in elements:
        assert tag not in {"iframe", "object", "embed", "base"}
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    page = files.html.read_text()
    assert "default-src 'none'" in page
    assert not re.findall(r"@import|url\(\s*['\"]?http", re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))
    plots = [a for t, a in elements if t == "div" and "plot" in (a.get("class") or "").split()]
    assert all(a.get("aria-label") and a.get("tabindex") == "0" for a in plots)
    folded = sum(a.get("class") == "run" for t, a in elements if t == "details")
    assert folded == (number if number > 1 else 0)
    assert sum(t == "figure" for t, _ in elements) == sum(t == "details" for t, _ in elements) - folded >= 6 * number
    ids = [a["id"] for _, a in elements if a.get("id")]
    assert len(ids) == len(set(ids))
    for _, a in elements:
        if (a.get("href") or "").startswith("#"):
            assert a["href"][1:] in ids
        if a.get("aria-labelledby"):
            assert a["aria-labelledby"] in ids
    json.loads(files.json.read_text())


def test_what_a_run_names_is_never_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", widths={"</script><img src=x>": (1, 4, 16), "b": (4, 6, 16)})
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "model": "<b onload=1>", "data": "a & b"}))
    elements = _elements(write_report(run).html)
    assert not [t for t, a in elements if t in ("img", "b") or "onload" in a]


def test_the_json_holds_what_the_page_shows(tmp_path: Path) -> None:
    numbers = json.loads(write_report(write_run(tmp_path / "run")).json.read_text())
    (run,) = numbers["runs"]
    assert [f["id"] for f in run["figures"]] == FIGURES
    assert run["headline"][1]["label"] == "MACs"
    assert run["verification"]["exact"] is True
    assert numbers["comparison"] is None


def test_the_headline_is_the_latency_that_was_asked_for(tmp_path: Path) -> None:
    asked = json.loads(write_report(write_run(tmp_path / "asked", latency=0.4)).json.read_text())["runs"][0]
    (item,) = [h for h in asked["headline"] if h["label"] == "Latency"]
    assert (item["before"], item["after"], item["change"]) == ("4.20 ms", "2.77 ms", "1.52× faster")
    assert item["note"] == "onnxruntime, batch 8, 1 thread"
    plain = json.loads(write_report(write_run(tmp_path / "plain")).json.read_text())["runs"][0]
    (item,) = [h for h in plain["headline"] if h["label"] == "Latency"]
    assert item["note"] == "eager, example inputs"


def test_a_run_without_optional_parts_still_reports(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", benchmark=False)
    (run / "baseline.safetensors").unlink()
    (run / "sensitivity.json").unlink()
    result = json.loads((run / "result.json").read_text())
    del result["max_abs_rho"], result["refused"], result["verification"]
    result["final"]["latency_ms"] = result["final"]["test"] = None
    (run / "result.json").write_text(json.dumps(result))
    numbers = json.loads(write_report(run).json.read_text())["runs"][0]
    assert [f["id"] for f in numbers["figures"]] == ["history", "macs", "filters", "memory"]
    assert numbers["correlation"] == []
    assert [h["label"] for h in numbers["headline"]] == ["Validation accuracy", "MACs", "Parameters", "File size"]


@pytest.mark.slow
def test_figures_for_a_paper_are_png_and_svg(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in "ab"]
    files = write_report(runs, tmp_path / "report.html", figures=tmp_path / "figures")
    assert len(files.figures) == len(set(files.figures)) == 2 * (2 * len(FIGURES) + 2 * 3 + 2)
    for file in files.figures:
        head = file.read_bytes()[:200]
        assert head.startswith(b"\x89PNG") if file.suffix == ".png" else b"<?xml" in head
    assert not list((tmp_path / "figures").rglob(".*"))
