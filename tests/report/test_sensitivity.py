"""The figure of a table of sensitivity: what its curves and marks are, as a page, a picture and a Plotly figure."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import secateur as sc
from secateur.errors import UsageError
from secateur.report import draw_sensitivity
from secateur.report.sensitivity import figure

TABLE = sc.Sensitivity(
    sizes={"mild": 8, "harsh": 4, "odd<b>": 10},
    damage={"mild": {2: 0.01, 4: 0.02, 7: 0.4}, "harsh": {1: 0.5, 3: 2.0}, "odd<b>": {5: 0.0, 9: 0.1}},
    measure="kl",
    images=24,
    network=1,
)
PLAN = sc.PruningPlan(removed={"mild": [0, 1, 2], "harsh": [3], "elsewhere": [1]})


def test_curves_are_sorted_by_harm_and_a_plans_widths_lie_on_them() -> None:
    drawn = figure(TABLE, PLAN)
    assert [series.name for series in drawn.series] == ["harsh", "mild", "odd<b>", "chosen"]
    mild, odd, chosen = drawn.series[1:]
    assert list(mild.x) == [0.25, 0.5, 0.875]
    assert list(mild.y) == [0.01, 0.02, 0.4]
    assert mild.labels[0] == "mild: 6 of 8 channels left"
    assert list(odd.y) == [None, 0.1]  # a logarithm has no place for 0
    assert list(zip(chosen.x, chosen.y, strict=True)) == [(0.375, pytest.approx(0.015)), (0.25, 0.5)]
    assert "harsh does most harm, 2.00" in drawn.summary
    assert "odd<b> least, 0.100" in drawn.summary
    assert [series.name for series in figure(TABLE).series] == ["harsh", "mild", "odd<b>"]
    empty = sc.Sensitivity(sizes={}, damage={}, measure="kl", images=1, network=1)
    assert figure(empty).summary == "No group has channels that can go."


def test_the_page_holds_everything_and_names_are_never_markup(tmp_path: Path) -> None:
    draw_sensitivity(TABLE, tmp_path / "page.html", PLAN, title="Sensitivity of <net>")
    page = (tmp_path / "page.html").read_text()
    assert '<h1 id="title">Sensitivity of &lt;net&gt;</h1>' in page
    assert "odd<b>" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    (held,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    (spec,) = json.loads(held)["figures"].values()
    assert [trace["name"] for trace in spec["data"]] == ["harsh", "mild", "odd<b>", "chosen"]
    assert 'data-figure="table-sensitivity"' in page


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
@pytest.mark.parametrize("groups", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_a_picture_is_drawn_however_many_groups_there_are(
    suffix: str, start: bytes, groups: int, tmp_path: Path
) -> None:
    names = [f"layer{n}" for n in range(groups)]
    table = sc.Sensitivity(dict.fromkeys(names, 4), {name: {1: 0.1, 3: 0.5} for name in names}, "loss", 8, 1)
    file = tmp_path / f"curves{suffix}"
    draw_sensitivity(table, file)
    assert file.read_bytes().startswith(start)
    if suffix == ".svg":
        assert all(f"layer{n}" in file.read_text() for n in (0, groups - 1))
        assert "rise of the loss" in file.read_text()


def test_a_table_draws_itself_for_a_notebook() -> None:
    drawn = TABLE.figure(PLAN)
    assert [trace.name for trace in drawn.data] == ["harsh", "mild", "odd<b>", "chosen"]
    assert "$" not in drawn.to_json()


def test_a_file_in_place_of_a_plan_is_told() -> None:
    with pytest.raises(UsageError, match=r"figure: takes a plan, .* found 'f.html'; .*write_html"):
        TABLE.figure("f.html")  # type: ignore[arg-type]


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sc.UsageError, match=r"curves\.pdf: the figure is a page or a picture"):
        draw_sensitivity(TABLE, tmp_path / "curves.pdf")
