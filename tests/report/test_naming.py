"""Runs are named by what was asked of them, and never by where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.report import write_report
from secateur.report.naming import bounded, name_of, names_of
from tests.report.synthetic import write_run

RUN: dict[str, Any] = {
    "model": "/home/me/nets/net.py:build",
    "method": "auto",
    "data": "digits",
    "seed": 0,
    "tolerance": 0.5,
    "target": {"macs": 0.5},
    "options": {"skip": []},
    "asked": {"lr": 0.01},
}


def changed(**other: Any) -> dict[str, Any]:
    return {**RUN, **other}


@pytest.mark.parametrize(
    ("others", "names"),
    [
        ([changed(target={"macs": 0.7})], ["MACs −50%", "MACs −70%"]),
        ([changed(target=None)], ["MACs −50%", "0.5 points"]),
        ([changed(method="cfp")], ["auto", "cfp"]),
        ([changed(seed=1)], ["seed 0", "seed 1"]),
        ([changed(asked={"lr": 0.1, "final_epochs": 9})],
         ["lr 0.01", "lr 0.1 · final epochs 9"]),
        ([changed(options={"skip": ["fc*"]}, method="l1")], ["auto", "l1 · skip fc*"]),
        ([changed(target={"latency": 0.5, "batch": 8})], ["MACs −50%", "latency −50% (batch 8)"]),
        ([changed(), changed(seed=2)], ["seed 0 (1)", "seed 0 (2)", "seed 2"]),
        ([changed(run={"weights": "/a/b/other.pth"})], ["defaults", "weights other.pth"]),
        ([changed(settings={"lr": 0.3})], [f"net.py:build · auto · MACs −50% ({place})" for place in (1, 2)]),
    ],
)  # fmt: skip
def test_runs_are_named_by_the_settings_in_which_they_differ(others: list[dict[str, Any]], names: list[str]) -> None:
    assert names_of([RUN, *others], [str(place) for place in range(1 + len(others))]) == names


def test_many_differences_are_counted() -> None:
    many = changed(asked={f"s{i}": i for i in range(7)})
    assert names_of([changed(asked={}), many], ["a", "b"])[1] == "s0 0 · s1 1 · s2 2 · s3 3 · 3 more settings"


def test_one_run_is_named_by_model_method_and_goal() -> None:
    assert name_of(RUN, "folder") == "net.py:build · auto · MACs −50%"
    assert name_of({}, "folder") == "folder"
    assert not bounded(RUN)
    assert not bounded(changed(target=None, settings={"widths": [{"conv1": 3}]}))
    assert bounded(changed(target=None, settings={"widths": []}))


def test_a_page_names_its_runs_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, latency=share, damage=False) for name, share in (("a", 0.3), ("b", 0.6))]
    files = write_report(runs, tmp_path / "page.html")
    assert [run.name for run in files.runs] == ["latency −30% (batch 8)", "latency −60% (batch 8)"]
