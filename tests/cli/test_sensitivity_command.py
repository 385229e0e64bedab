"""`secateur sensitivity`: what it prints and writes, that prune takes its table, and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

import secateur as sc
from secateur.cli import console
from tests.cli.test_commands import DIGITS, LENET, run

QUICK = ["--images", "64", "--levels", "2"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_measures_saves_draws_and_prune_takes_the_table(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sensitivity", *LENET, *DIGITS, *QUICK, "--output", "new/table.json", "--figure", "curves.html") == 0
    shown = capsys.readouterr().out
    table = sc.Sensitivity.load("new/table.json")
    assert (table.measure, table.images) == ("kl", 64)
    assert all(name in shown for name in table.damage)
    assert "lenet5: 3 groups measured on 64 images in" in shown
    assert "saved: new/table.json" in shown
    assert "drawn: curves.html" in shown
    assert (here / "curves.html").read_text().startswith("<!doctype html>")
    words = ["prune", *LENET, *DIGITS, "--macs", "0.4", "--allocation", "new/table.json"]
    assert run(*words, "--out", "small.safetensors") == 0
    assert "allocation: sensitivity" in capsys.readouterr().out
    again = ["--output", "new/table.json", "--figure", "marked.svg", "--pruned", "small.safetensors"]
    assert run("sensitivity", *LENET, *DIGITS, *QUICK, *again) == 0
    assert "chosen" in (here / "marked.svg").read_text()
    assert run(*words, "--seed", "1") == 1
    assert "new/table.json: the table of sensitivity was measured with other weights" in capsys.readouterr().err


def test_as_json_by_loss_and_by_two_processes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sensitivity", *LENET, *DIGITS, *QUICK, "--loss", "--workers", "2", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["measure"], values["model"], values["file"]) == ("loss", "lenet5", None)
    assert set(values["damage"]) == set(values["sizes"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --data"),
        ([*DIGITS, "--workers", "0"], "'--workers'"),
        ([*DIGITS, "--levels", "0"], "'--levels'"),
        ([*DIGITS, "--figure", "curves.pdf"], "curves.pdf: the figure is a page or a picture"),
        ([*DIGITS, "--pruned", "small.safetensors"], "give --figure, too"),
        ([*DIGITS, "--figure", "a.html", "--pruned", "absent.safetensors"], "absent.safetensors"),
        ([*DIGITS, *QUICK, "--output", "old.json"], "old.json: a table of another network, other data or options"),
        ([*DIGITS, *QUICK, "--output", "text.json"], "text.json: no table of sensitivity"),
        ([*DIGITS, "--output", "."], "is a folder"),
    ],
)
def test_bad_requests_are_one_line(words: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sc.Sensitivity({"a": 2}, {}, "kl", 1, 1).save("old.json")
    Path("text.json").write_text("table")
    assert run("sensitivity", *LENET, *words) in (1, 2)
    *warnings, line = capsys.readouterr().err.splitlines()
    assert all("random weights" in warning for warning in warnings)
    assert line.startswith("error: ")
    assert said in line


def test_without_a_terminal_a_long_step_is_told_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with console.Steps() as steps:
        for done in range(10):
            now += 11
            steps("measuring", done, 9)
        with steps.step("waiting"):
            now += 100
    lines = console.sys.stderr.getvalue().splitlines()
    assert lines == ["measuring: 2 of 9", "measuring: 5 of 9", "measuring: 8 of 9"]


def test_compress_measures_its_own_table(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sc.Sensitivity({"a": 2}, {}, "kl", 1, 1).save("table.json")
    assert run("compress", *LENET, *DIGITS, "--macs", "0.5", "--allocation", "table.json") == 2
    assert "found 'table.json'" in capsys.readouterr().err


def test_an_interrupted_measurement_says_how_it_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["sensitivity", *LENET, *DIGITS, *QUICK, "--output", "table.json"]
    save = sc.Sensitivity.save

    def saved(table: sc.Sensitivity, path: Path) -> None:
        save(table, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sc.Sensitivity, "save", saved)
        assert run(*words) == 130
    assert "interrupted; table.json is kept, and the same command goes on with it" in capsys.readouterr().err
    assert len(sc.Sensitivity.load("table.json").damage) == 1
    assert run(*words) == 0
    assert len(sc.Sensitivity.load("table.json").damage) == 3
