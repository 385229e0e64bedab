import json
import re
from pathlib import Path

import pytest

from secateur.errors import DataError, RunError, SecateurError, UsageError
from secateur.report import read_run, write_report
from tests.report.synthetic import write_run


def test_a_finished_run_is_read_whole(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", rounds=5))
    assert [e.round for e in run.history] == [1, 2, 3, 4, 5]
    assert run.result.baseline.macs == sum(layer.macs for layer in run.result.baseline.layers)
    assert run.history[0].channels == 3
    assert run.benchmark is not None
    assert {row.variant for row in run.benchmark.rows} == {"original", "pruned"}


def _without(name: str):
    return lambda run: (run / name).unlink()


def _half(name: str):
    def spoil(run: Path) -> None:
        text = (run / name).read_text()
        (run / name).write_text(text[: len(text) // 2 - 3])

    return spoil


def _lacking(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    del result["final"]["macs"]
    (run / "result.json").write_text(json.dumps(result))


BAD = {
    "no history": (_without("history.jsonl"), UsageError, "no history.jsonl"),
    "no config": (_without("config.json"), UsageError, "no config.json"),
    "unfinished": (_without("result.json"), RunError, r"not finished: 8 round.*secateur.resume"),
    "half history": (_half("history.jsonl"), DataError, r"history.jsonl, line \d+: not JSON"),
    "half result": (_half("result.json"), DataError, r"result.json: not JSON \(line \d+"),
    "half weights": (
        lambda run: (run / "baseline.safetensors").write_bytes(b"\x10"),
        DataError,
        "not a readable safetensors",
    ),
    "a field missing": (_lacking, DataError, r"result.json: final.macs: field required"),
    "not text": (lambda run: (run / "history.jsonl").write_bytes(b"\xff\xfe"), DataError, "not a text file"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_run_is_one_clear_line_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    spoil, kind, words = BAD[case]
    run = write_run(tmp_path / "run")
    spoil(run)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SecateurError) as caught:
        write_report(run)
    assert type(caught.value) is kind
    assert re.search(words, str(caught.value))
    assert "\n" not in str(caught.value)
    assert "run" in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_directory_and_no_directory_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such run directory"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="No run directory"):
        write_report([])


@pytest.mark.parametrize("target", ["report.txt", "run/history.jsonl/report.html"])
def test_an_unwritable_target_is_one_clear_line_and_leaves_nothing(target: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=re.escape(str(tmp_path / target))):
        write_report(run, tmp_path / target)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_folder_of_the_target_is_made(tmp_path: Path) -> None:
    files = write_report(write_run(tmp_path / "run"), tmp_path / "new" / "deep" / "report.html")
    assert sorted((tmp_path / "new" / "deep").iterdir()) == [files.html, files.json]


def test_a_target_that_is_a_directory_leaves_it_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "a.html").mkdir()
    with pytest.raises(UsageError, match="can't be written"):
        write_report(run, tmp_path / "a.html")
    assert not list((tmp_path / "a.html").iterdir())
    assert not (tmp_path / "a.json").exists()


def test_runs_of_different_metrics_are_not_compared(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    result = json.loads((second / "result.json").read_text())
    (second / "result.json").write_text(json.dumps({**result, "metric": "mean_average_precision"}))
    with pytest.raises(UsageError, match="different things"):
        write_report([first, second], tmp_path / "c.html")
