"""The report of a sweep: its front and its importances hold what the trials say, and damage is one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from secateur.cli.commands import main
from secateur.errors import DataError
from secateur.report import write_report
from secateur.report.sweep import fronts, importances, write_sweep_report
from secateur.runfile import trials
from secateur.runfile.search import SearchConfig
from secateur.runfile.trials import Trial, Trials
from tests.report.synthetic import write_run, write_sweep

FILE = """model: lenet5
data: digits
search:
  space:
    settings.lr: {low: 0.001, high: 0.1, log: true}
    method: [l1, "a<b>.py:f"]
"""
LRS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.09, 0.1]


def made(objectives: tuple[Any, ...] = ("accuracy", "macs")) -> Trials:
    """Trials whose accuracy hangs on the learning rate alone."""
    rows = [
        Trial(
            number=number,
            state="complete",
            parameters={"settings.lr": lr, "method": ("l1", "a<b>.py:f")[number % 2]},
            values=[5 * lr, float(1000 * ((3 * number) % 8 + 1))][: len(objectives)],
            attempts=1,
        )
        for number, lr in enumerate(LRS)
    ]
    rows.append(Trial(number=8, state="failed", parameters={"settings.lr": 0.1}, attempts=4, error="<i>no</i>"))
    return Trials(study="of <b>", storage="", objectives=list(objectives), total=9, trials=rows)


def folder(path: Path, found: Trials) -> Path:
    (path / trials.SWEEP_FILE).write_text(FILE)
    trials.write(found, path)
    return path


def test_the_front_is_drawn_apart_from_what_it_beats() -> None:
    found = made()
    (figure,) = fronts(found)
    front, beaten = figure.series
    judged = [(trial.values or (), trial.number) for trial in found.of("complete")]
    best = [(v, n) for v, n in judged if not any(w[0] > v[0] and w[1] <= v[1] for w, _ in judged)]
    assert list(front.x) == sorted(v[1] for v, _ in best)
    assert sorted(zip(front.x, front.y, strict=True)) == sorted((v[1], v[0]) for v, _ in best)
    assert len(beaten.x) == len(judged) - len(best)
    assert all(label.startswith("runs/000") for label in [*front.labels, *beaten.labels])
    (course,) = fronts(made(("accuracy",)))
    assert list(course.series[1].y) == [5 * lr for lr in LRS]


@pytest.mark.slow
def test_what_decides_is_important() -> None:
    search = SearchConfig(
        space={"settings.lr": {"low": 0.001, "high": 0.1, "log": True}, "method": ["l1", "a<b>.py:f"]}
    )
    found = importances(search, made())
    assert found["accuracy"]["settings.lr"] > 0.8
    assert sum(found["macs"].values()) == pytest.approx(1)
    few = made().model_copy(update={"trials": made().trials[:3]})
    assert importances(search, few) == {}


@pytest.mark.slow
def test_the_page_holds_everything_and_names_are_never_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path, made())
    assert main(["report", str(tmp_path), "--figures", str(tmp_path / "figures")]) == 0
    assert "9 trials: 8 complete, 1 failed" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    plain = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert '<h1 id="title">of &lt;b&gt;</h1>' in plain
    assert "a<b>" not in plain
    assert "<i>no" not in plain
    assert "runs/0007" in plain
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["front"] == [trial.number for trial in made().front]
    assert sorted(file.name for file in (tmp_path / "figures").glob("*.svg")) == ["front-macs.svg", "importances.svg"]
    assert main(["report", str(tmp_path), "--measure"]) == 2
    assert "--measure and --layer are for runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:40], "trials.json: missing or damaged: not JSON"),
        (lambda text: text.replace('"attempts": 1', '"attempts": 0'), "attempts"),
        (lambda text: text.replace('"complete"', '"done"'), "state"),
        (
            lambda text: text.replace('"settings.lr": 0.001', '"settings.lr": 7'),
            "trial 0: is none of the sweep",
        ),
        (lambda text: re.sub(r'"values": \[\s*0.005,', '"values": [', text), "trial 0 has 1 values"),
    ],
)
def test_damage_is_one_line(damage: Any, said: str, tmp_path: Path) -> None:
    folder(tmp_path, made())
    file = tmp_path / trials.FILE
    changed = damage(file.read_text())
    assert changed != file.read_text()
    file.write_text(changed)
    with pytest.raises(DataError, match=said) as caught:
        write_sweep_report(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_sweep_without_a_complete_trial_has_no_report_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path, made().model_copy(update={"trials": made().trials[8:]}))
    assert main(["report", str(tmp_path)]) == 1
    assert "no trial of the sweep has been completed yet" in capsys.readouterr().err


@pytest.mark.slow
def test_trials_stand_beside_runs_and_nothing_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = write_sweep(tmp_path / "sweep")
    runs = [write_run(tmp_path / "a", method="l1"), sweep / "runs" / "0001"]
    page = tmp_path / "all.html"
    words = [str(path) for path in (runs[0], sweep, runs[1], runs[0], tmp_path / "sweep" / ".." / "sweep")]
    assert main(["report", *words, "-o", str(page)]) == 0
    assert "rates" in capsys.readouterr().out
    compared = json.loads(page.with_suffix(".json").read_text())["comparison"]
    names = [row[0] for row in compared["table"]["rows"]]
    assert len(names) == len(set(names)) == 4
    assert names[2:] == ["rates, trial 0: settings.lr 0.1", "rates, trial 2: settings.lr 0.3"]
    pareto, kept = compared["figures"]
    assert (pareto["id"], kept["id"]) == ("pareto", "kept")
    tones = {series["name"]: (series["tone"], len(series["x"])) for series in pareto["series"]}
    assert tones["trials of rates"] == ("trial", 2)
    assert [len_ for tone, len_ in tones.values() if tone == "run"] == [1, 1]
    assert len(kept["series"]) == 2
    plain = re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.DOTALL)
    assert "2 runs and 1 sweep side by side" in plain
    assert "Of rates, 1 complete trials are left out" in plain
    assert plain.count('<details class="run">') == 2


@pytest.mark.slow
def test_two_sweeps_are_compared_by_their_trials(tmp_path: Path) -> None:
    files = write_report([write_sweep(tmp_path / "one"), write_sweep(tmp_path / "two")], tmp_path / "both.html")
    assert [len(sweep.runs) for sweep in files.sweeps] == [3, 3]
    assert [figure["id"] for figure in json.loads(files.json.read_text())["comparison"]["figures"]] == ["pareto"]
