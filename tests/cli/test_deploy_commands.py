import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import nn

from secateur.cli.commands import main
from secateur.deploy import timing
from tests.report.synthetic import write_run

TINY = ["lenet5", "--model-option", "widths=[2, 3]", "--model-option", "hidden=4", "--model-option", "in_size=16"]
DIGITS = ["--data", "digits", "--data-option", "size=16"]


def test_report_writes_page_and_numbers_and_shows_the_headline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "−0.40 points" in shown
    assert "−67.1%" in shown
    assert (run / "report.html").stat().st_size > 4_000_000
    assert json.loads((run / "report.json").read_text())["format"] == 1


def test_report_of_several_runs_as_json_is_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / name)) for name in "ab"]
    assert main(["report", *runs, "--out", str(tmp_path / "r.html"), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert [run["directory"] for run in numbers["runs"]] == runs
    assert numbers["comparison"]["figures"][0]["id"] == "pareto"


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the process that measures peak memory, whose own test is in ``tests/deploy``: a byte a parameter."""

    def weighed(network: nn.Module, _: object, sizes: Sequence[int]) -> list[int]:
        return [size * sum(p.numel() for p in network.parameters()) for size in sizes]

    monkeypatch.setattr(timing, "cpu_peak_bytes", weighed)


@pytest.mark.usefixtures("peaks")
def test_benchmark_measures_two_networks_and_writes_what_a_report_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b.json"
    words = ["benchmark", *TINY, "--against", "original", "--batch-size", "2", "--rounds", "2", "--out", str(out)]
    assert main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads(out.read_text())
    assert [row["variant"] for row in shown["rows"]] == ["pruned", "original"]
    assert shown["speed_ups"][0]["theoretical"] == 1.0
    parameters = 2 * 26 + 3 * 51 + 4 * 4 + 10 * 5
    assert [row["peak_bytes"] for row in shown["rows"]] == [2 * parameters] * 2


def test_export_says_what_was_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "net.pt2"
    assert main(["export", *TINY, "--out", str(out)]) == 0
    assert "at batch sizes 1, 3" in capsys.readouterr().out
    assert out.is_file()


@pytest.mark.slow
def test_export_in_int8_tabulates_both_files_and_the_unpruned_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, widths = tmp_path / "net.onnx", ["--model-option", "widths=[2, 3]", "--model-option", "hidden=4"]
    words = ["export", "lenet5", *widths, "--data", "digits", "--out", str(out), "--int8", "--calibration", "100"]
    assert main([*words, "--against", "lenet5", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["format"], shown["calibrated_on"], shown["path"]) == ("onnx", 100, str(out))
    assert [row["network"] for row in shown["files"]] == ["fp32", "unpruned fp32", "int8"]
    assert all(0 <= row["accuracy"] <= 1 for row in shown["files"])
    assert main(words) == 0
    assert "output error" in capsys.readouterr().out


def test_export_in_int8_says_what_works_where_the_data_hold_boxes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\nfrom secateur.data import DataBundle\n\n\ndef boxes():\n"
        "    one = [(torch.zeros(3, 8, 8), {'boxes': torch.ones(1, 4), 'labels': torch.ones(1).long()})]\n"
        "    return DataBundle('signs', one, one, one, (3, 8, 8), ('sign',), task='detection')\n"
    )
    words = ["export", "ssd300", "--data", f"{tmp_path}/own.py:boxes", "--int8", "-o", f"{tmp_path}/small.onnx"]
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert "--int8 takes no data of boxes (signs)" in shown
    assert "sc.export(model, path, int8=True, data=batches)" in shown
    assert len(shown.splitlines()) == 1
    assert not (tmp_path / "small.onnx").exists()


@pytest.mark.slow
def test_export_in_int8_measures_the_output_of_a_network_for_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.data.test_masks import squares

    squares(tmp_path / "data", {"train": 40, "val": 4, "test": 8})
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))\n"
    )
    words = ["export", f"{tmp_path}/net.py:build", "--data", f"masks:{tmp_path}/data", "--data-option", "size=16"]
    assert main([*words, "--int8", "--calibration", "16", "-o", f"{tmp_path}/small.onnx", "--json"]) == 0
    figures = {row["network"]: row for row in json.loads(capsys.readouterr().out)["files"]}
    assert figures["int8"]["accuracy"] is None
    assert 0 < figures["int8"]["error"] < 0.2


def test_prune_measures_which_multiple_of_channels_is_fastest(capsys: pytest.CaptureFixture[str]) -> None:
    widths = ["--model-option", "widths=[8, 8]", "--model-option", "hidden=16", "--model-option", "in_size=16"]
    assert main(["prune", "lenet5", *widths, "--macs", "0.4", "--round-to", "auto", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    times = {(t["round_to"], t["memory_format"]): t["ms"] for t in found["measured"]["times"]}
    assert {1, 4} <= {multiple for multiple, _ in times}
    assert "16" in found["measured"]["infeasible"]
    chosen = times[found["round_to"], found["measured"]["memory_format"]]
    assert chosen <= 1.03 * min(times.values())
    assert all(width % found["round_to"] == 0 for width in found["widths"]["after"].values() if width < 8)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["report", "{}/nowhere"], 2, "no such run directory"),
        (["report"], 2, "No run directory given"),
        (["benchmark"], 2, "MODEL is missing"),
        (["benchmark", *TINY, "--backend", "tensorrt"], 2, "unknown backend 'tensorrt'"),
        (["benchmark", *TINY, "--out", "/dev/null/b.json"], 2, "can't be written"),
        (["benchmark", "--run-dir", "{}"], 2, "no run.yaml"),
        (["benchmark", *TINY, "--run-dir", "{}"], 2, "leave out MODEL"),
        (["prune", *TINY, "--macs", "0.5", "--round-to", "0"], 2, "whole number from 1 up, or auto"),
        (["export", *TINY], 2, "where to?"),
        (["export", *TINY, "--out", "{}/net.tflite"], 2, "unknown export format"),
        (["export", *TINY, "--out", "{}/net.onnx", "--int8"], 2, "give --data"),
        (["export", *TINY, "--out", "{}/net.onnx", "--calibration", "64"], 2, "are for --int8"),
        (["export", *TINY, "--out", "{}/q.onnx", "--int8", "--data", "digits", "--against", "original"], 2, "fresh"),
        (
            [
                "export",
                *TINY,
                "--out",
                "{}/q.pt2",
                "--int8",
                "--data",
                "digits",
                "--data-option",
                "size=16",
                "--calibration",
                "3",
            ],
            2,
            "16 images",
        ),
    ],
)
def test_a_wrong_request_is_one_line_and_leaves_nothing(
    words: list[str], status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(tmp_path) for word in words]) == status
    shown = capsys.readouterr()
    assert said in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert not shown.out
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("peaks")
def test_benchmark_against_another_model_names_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = tmp_path / "other.py"
    network.write_text(
        "from secateur.models import lenet5\n\n\ndef build():\n    return lenet5((4, 4), 8, in_size=16)\n"
    )
    words = ["benchmark", *TINY, "--against", f"{network}:build", "--batch-size", "2", "--rounds", "2", "--json"]
    assert main(words) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["variant"] for row in shown["rows"]] == ["lenet5", "other.py:build"]
