"""The command line: what it prints and writes, and that every error is one line and the right status."""

import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file

import secateur as sc
from secateur import criteria
from secateur.cli import console
from secateur.cli.commands import app, main
from secateur.cli.console import change, quantity
from secateur.engine import Event
from secateur.errors import SecateurError, UsageError
from secateur.models import lenet5
from secateur.runfile import config, configured_run, sources
from secateur.training import baseline, stages, tasks

LENET = ["lenet5", "--model-option", "widths=[4, 6]", "--model-option", "hidden=8"]
DIGITS = ["--data", "digits", "--data-option", "size=16", "--data-option", "train_size=200"]
QUICK = [
    "--method",
    "cfp",
    "--set",
    "device=cpu",
    "--set",
    "finetune_epochs=1",
    "--set",
    "max_rounds=2",
    "--baseline",
    "epochs=2",
]

NETWORK = """
import torch
from torch import nn

def loud():
    print("building")
    return build()

def build():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))

class Broken(nn.Module):
    def forward(self, x):
        return x.undefined

def broken():
    return Broken()

class TwoModes(nn.Sequential):
    def forward(self, x):
        x = self[0](x)
        return self[1](x.view(len(x), 4, -1, 6) if self.training else x)

def two_modes():
    return TwoModes(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3))

def crash():
    import os
    os.abort_nothing()

def number():
    return 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files good and bad, as the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "network.py").write_text(NETWORK)
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "bad.yaml").write_text("model: lenet5\ndatta: digits\n")
    (tmp_path / "good.yaml").write_text("model: lenet5\ndata: digits\n")
    (tmp_path / "prune.yaml").write_text("model: lenet5\ntarget: {macs: 0.5}\nmax_ratio: {conv1: 2}\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.html").mkdir()
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    return tmp_path


def run(*words: str) -> int:
    return main(list(words))


# What works


def test_without_a_command_it_shows_help_and_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    assert "Usage: secateur" in capsys.readouterr().out


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_asked_for_in_short_and_in_long(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for word in ("-h", "--help"):
        assert run(command, word) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert f"Usage: secateur {command}" in shown[0]


def test_where_a_result_goes_is_said_by_the_same_words_in_every_command() -> None:
    said = {
        name: option.opts
        for name, command in COMMANDS.items()
        for option in command.params
        if {"--out", "--output", "-o"} & {*option.opts}
    }
    assert sorted(said) == ["benchmark", "export", "prune", "report", "sensitivity"]
    assert all(words == ["--out", "--output", "-o"] for words in said.values())


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert re.fullmatch(r"secateur \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_trace_shows_groups_and_what_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trace", *LENET) == 0
    shown = capsys.readouterr()
    assert re.search(r"conv1 +│ +4 │ conv1 +│ conv2", shown.out)
    assert "model output" in shown.out
    assert "3 groups, 18 prunable channels" in shown.out
    assert shown.err == "", "progress was shown although standard error is no terminal"


def test_trace_as_json_agrees_with_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trace", "--model", LENET[0], *LENET[1:], "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(g["name"], g["channels"]) for g in shown["groups"]] == [("conv1", 4), ("conv2", 6), ("fc1", 8)]
    assert shown["prunable_channels"] == 18
    # CFP eqs. 1-3: 24·24·25·4 + 8·8·25·4·6 + 96·8 + 8·10
    assert shown["macs"] == 57_600 + 38_400 + 768 + 80
    # What goes with a whole group: the layer that makes its channels, and the one that reads them.
    assert [g["macs"] for g in shown["groups"]] == [57_600 + 38_400, 38_400 + 768, 768 + 80]


def test_trace_draws_a_figure_beside_the_table_or_the_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trace", *LENET, "--figure", "new/graph.html", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["figure"] == "new/graph.html"
    page = (here / "new/graph.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert len(re.findall('<g class="strand', page)) == len(shown["groups"]) == 3
    assert [file.name for file in (here / "new").iterdir()] == ["graph.html"]
    assert run("trace", *LENET, "--figure", "again.htm") == 0
    assert capsys.readouterr().out.endswith("drawn: again.htm\n")
    assert (here / "again.htm").read_text(encoding="utf-8") == page


def test_json_stays_clean_when_the_users_code_prints(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trace", "network.py:loud", "--input", "1x1x8x8", "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["model"] == "network.py:loud"
    assert shown.err == "building\n"


def test_prune_saves_a_network_that_evaluate_loads(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prune", *LENET, *DIGITS, "--macs", "0.5", "--out", "small.safetensors", "--json"]
    assert run(*words, "--method", "corrnet", "--compensate", "least_squares", "--batches", "2") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["verification"]["exact"] is True
    assert shown["after"]["macs"] <= 0.5 * shown["before"]["macs"]
    assert shown["after"]["file_bytes"] == (here / "small.safetensors").stat().st_size
    assert run("evaluate", *LENET, *DIGITS, "--weights", "small.safetensors", "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["accuracy"] == shown["after"]["test"]
    assert (measured["macs"], measured["parameters"]) == (shown["after"]["macs"], shown["after"]["parameters"])


def test_a_threshold_lets_a_criterion_remove_less_than_asked_for(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prune", *LENET, *DIGITS, "--channels", "0.5", "--method", "corrnet", "--batches", "2", "--json"]
    removed = []
    for threshold in ("0", "0.5", "1.0"):
        capsys.readouterr()
        assert run(*words, "--method-option", f"threshold={threshold}") == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["verification"]["exact"] is True
        removed.append(sum(shown["widths"]["before"].values()) - sum(shown["widths"]["after"].values()))
    assert removed[0] == 9, "half of 4 + 6 + 8 channels"
    assert removed[0] > removed[1] > removed[2] == 0


def test_what_was_pruned_can_be_pruned_again_and_still_loads(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--model-option", "in_size=16"]
    assert run("prune", *LENET, *size, "--channels", "0.3", "--out", "one.safetensors") == 0
    again = ["--weights", "one.safetensors", "--channels", "0.3", "--out", "two.safetensors", "--json"]
    capsys.readouterr()
    assert run("prune", *LENET, *size, *again) == 0
    after = json.loads(capsys.readouterr().out)["after"]
    assert run("trace", *LENET, *size, "--weights", "two.safetensors", "--json") == 0
    assert json.loads(capsys.readouterr().out)["macs"] == after["macs"]


def test_weights_saved_with_other_options_say_with_which(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune", *LENET, "--channels", "0.3", "--out", "small.safetensors") == 0
    capsys.readouterr()
    assert run("trace", "lenet5", "--model-option", "hidden=8", "--weights", "small.safetensors") == 2
    assert capsys.readouterr().err == (
        "error: small.safetensors: was saved of lenet5 --model-option widths=[4, 6] --model-option hidden=8, and the "
        "model given is lenet5 --model-option hidden=8; give the same model and options.\n"
    )
    assert run("trace", "resnet20", "--weights", "small.safetensors") == 2
    assert "was saved of lenet5" in capsys.readouterr().err


def test_a_missing_folder_of_the_output_is_made(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune", *LENET, "--channels", "0.3", "--out", "new/deep/small.safetensors") == 0
    assert (here / "new/deep/small.safetensors").is_file()
    assert run("export", *LENET, "--out", "other/deep/small.pt2") == 0
    assert (here / "other/deep/small.pt2").is_file()


def test_prune_prints_the_report_of_the_library(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--macs", "0.3", "--method", "cshe", "--method-option", "clusters=2", "--ratio", "conv1=0.25"]
    words += ["--max-ratio", "0.5", "--skip", "fc1", "--min-channels", "2", "--allocation", "uniform", "--inexact"]
    words += ["--compensate", "merge,bn", "--batches", "2", "--seed", "3", "--out", "small.safetensors", "--json"]
    assert run("prune", *LENET, *DIGITS, *words) == 0
    shown = json.loads(capsys.readouterr().out)
    bundle = sources.data("digits", {"size": 16, "train_size": 200})
    sources.seed(3)
    found = sources.open_model("lenet5", {"widths": [4, 6], "hidden": 8}, bundle=bundle)
    result = sc.prune(
        found.model, found.inputs, sc.Target(macs=0.3), data=tasks.sample(bundle, 2, 3), method="cshe",
        method_options={"clusters": 2}, ratios={"conv1": 0.25}, max_ratio=0.5, skip=["fc1"], min_channels=2,
        allocation="uniform", inexact=True, compensate="merge,bn", seed=3,
        test=tasks.evaluation_batches(bundle, "test"),
    )  # fmt: skip
    assert any("lenet5 has fresh random weights" in warning for warning in shown.pop("warnings"))
    own = {"model": "lenet5", "file": "small.safetensors"}
    after = {**result.report["after"], "file_bytes": (here / "small.safetensors").stat().st_size}
    assert shown == {**json.loads(json.dumps(result.report)), **own, "after": after}
    saved = sc.load(sources.open_model("lenet5", {"widths": [4, 6], "hidden": 8}, bundle=bundle).model, own["file"])
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in result.model.state_dict().items())


def test_ratios_skips_and_rounding_are_followed(capsys: pytest.CaptureFixture[str]) -> None:
    # Of 4 filters 1 may go at this ratio, which 2 does not divide: an order for this layer is not dropped in silence.
    assert run("prune", *LENET, "--ratio", "conv1=0.3", "--round-to", "2", "--json") == 2
    assert "contradicts round_to 2" in capsys.readouterr().err
    assert run("prune", *LENET, "--ratio", "*=0.3", "--round-to", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["widths"]["after"]["conv1"] == 4
    assert run("prune", *LENET, "--ratio", "conv1=0.5", "--round-to", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["widths"]["after"] == {"conv1": 2, "conv2": 6, "fc1": 8, "fc2": 10}
    assert run("prune", *LENET, "--channels", "0.1", "--skip", "fc1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["widths"]["after"]["fc1"] == 8
    caps = ["--max-ratio", "0.5", "--max-ratio", "conv2=0.34", "--max-ratio", "Linear=0"]
    assert run("prune", *LENET, "--channels", "0.2", *caps, "--json") == 0
    # 2 of 4 and 2 of 6 filters are all that may go, and just over a fifth of the 18.
    assert json.loads(capsys.readouterr().out)["widths"]["after"] == {"conv1": 2, "conv2": 4, "fc1": 8, "fc2": 10}


PRUNE = """
model: lenet5
model_options: {widths: [8, 12], hidden: 16}
target: {channels: 0.2}
ratios: {conv1: 0.25}
max_ratio: {"*": 0.5, conv2: 0.34}
skip: Linear
round_to: 2
allocation: uniform
seed: 1
out: small.safetensors
"""


def test_prune_follows_a_file_and_options_go_before_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "prune.yaml").write_text(PRUNE)
    said = ["--model-option", "widths=[8, 12]", "--model-option", "hidden=16", "--ratio", "conv1=0.25"]
    said += ["--max-ratio", "0.5", "--max-ratio", "conv2=0.34", "--skip", "Linear", "--round-to", "2"]
    said += ["--allocation", "uniform", "--seed", "1", "--out", "small.safetensors"]
    shown = []
    for words in (["--config", "prune.yaml"], ["lenet5", "--channels", "0.1", *said]):
        # A target of 0.2 is out of reach: of 36 channels, 2 go by ratio and 4 at most by cap.
        assert run("prune", *words, "--json", *(["--channels", "0.1"] if "--config" in words else [])) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert shown[0] == shown[1]
    assert shown[0]["widths"]["after"] == {"conv1": 6, "conv2": 10, "fc1": 16, "fc2": 10}
    assert run("prune", "--config", "prune.yaml") == 1
    assert "all that may go is 0.1667" in capsys.readouterr().err
    # Another amount takes the place of the file's, and so does another model.
    words = ["--params", "0.05", "--max-ratio", "1", "--skip", "conv2", "--allocation", "global", "--min-channels", "6"]
    assert run("prune", "--model", "resnet20", "--config", "prune.yaml", *words, "--json") == 2
    assert "widths" in capsys.readouterr().err
    assert run("prune", "--config", "prune.yaml", *words, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["widths"]["after"]["conv2"] == 12
    assert shown["after"]["parameters"] <= 0.95 * shown["before"]["parameters"]


def test_compress_keeps_a_run_that_a_configuration_file_repeats(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--macs", "0.4", "--seed", "3", *QUICK[:-2], "--baseline", "epochs=2"]
    assert run("compress", *LENET, *DIGITS, *words, "--run-dir", "first", "--json") == 0
    first = json.loads(capsys.readouterr().out)
    assert first["verification"]["exact"] is True
    assert len(first["history"]) == first["rounds"]
    assert first["run_dir"] == str(here / "first")
    for name in (
        "run.yaml",
        "config.json",
        "history.jsonl",
        "result.json",
        "model.safetensors",
        "baseline.safetensors",
    ):
        assert (here / "first" / name).is_file(), name
    assert config.load("first/run.yaml").seed == 3
    assert run("compress", "--config", "first/run.yaml", "--run-dir", "second", "--json") == 0
    second = json.loads(capsys.readouterr().out)
    for part in ("baseline", "final"):
        for key in ("test", "validation", "macs", "widths"):
            assert second[part][key] == first[part][key]


def test_any_method_and_compensation_go_by_name_in_every_way(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "cshe.yaml").write_text(
        "model: lenet5\nmodel_options: {widths: [4, 6], hidden: 8}\n"
        "data: digits\ndata_options: {size: 16, train_size: 200}\n"
        "method: cshe\ntarget: {macs: 0.3}\nround_to: 2\nbaseline: {epochs: 2}\n"
        "settings: {compensate: least_squares, device: cpu, finetune_epochs: 1, fraction: 0.25}\n"
    )
    assert run("compress", "--config", "cshe.yaml", "--run-dir", "file", "--json") == 0
    by_file = json.loads(capsys.readouterr().out)
    words = [
        "--method",
        "cshe",
        "--compensate",
        "least_squares",
        "--macs",
        "0.3",
        "--baseline",
        "epochs=2",
        "--round-to",
        "2",
    ]
    sets = ["--set", "device=cpu", "--set", "finetune_epochs=1", "--set", "fraction=0.25"]
    assert run("compress", *LENET, *DIGITS, *words, *sets, "--run-dir", "words", "--json") == 0
    by_words = json.loads(capsys.readouterr().out)
    assert by_file["history"][0]["compensated"]["least_squares"]
    assert by_file["final"]["test"] == by_words["final"]["test"]
    assert [r["removed"] for r in by_file["history"]] == [r["removed"] for r in by_words["history"]]
    once = ["--method", "cshe", "--compensate", "least_squares", "--macs", "0.3", "--batches", "2"]
    assert run("prune", *LENET, *DIGITS, *once) == 0


def test_options_of_compress_are_those_of_prune(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One round without training: the command, its file and prune leave the same widths, multiples of 2."""
    limits = [
        "--macs",
        "0.5",
        "--round-to",
        "2",
        "--max-ratio",
        "conv1=0.5",
        "--skip",
        "fc1",
        "--allocation",
        "uniform",
    ]
    assert run("prune", *LENET, *DIGITS, *limits, "--json") == 0
    once = json.loads(capsys.readouterr().out)["widths"]["after"]
    words = ["--baseline", "epochs=1", "--set", "final_epochs=0", "--set", "finetune_epochs=0", "--set", "device=cpu"]
    # Scores are of other weights, so that only how many go, and not which, is the same.
    assert run("compress", *LENET, *DIGITS, *limits, *words, "--run-dir", "words", "--json") == 0
    by_words = json.loads(capsys.readouterr().out)
    assert by_words["final"]["widths"] == once
    assert run("compress", "--config", "words/run.yaml", "--run-dir", "file", "--json") == 0
    assert json.loads(capsys.readouterr().out)["final"]["widths"] == once
    kept = config.load("words/run.yaml")
    assert (kept.round_to, kept.max_ratio, kept.skip, kept.allocation) == (2, {"conv1": 0.5}, ("fc1",), "uniform")
    assert (by_words["parts"]["method"], by_words["parts"]["allocation"]) == ("auto: l2", "uniform")


def test_prune_says_whether_accuracy_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune", *LENET, "--macs", "0.4") == 0
    shown = capsys.readouterr().out
    assert "accuracy was not measured; next: the same with --data" in shown
    assert "note: auto: without data, channels go by norms of weights" in shown
    assert run("prune", *LENET, *DIGITS, "--macs", "0.4") == 0
    shown = capsys.readouterr().out
    assert re.search(r"accuracy, test set +.*%.*%", shown)
    assert "not measured" not in shown
    shown = " ".join(shown.split())
    assert "method: auto: l2; allocation: sensitivity; selection: l2; compensation: least_squares everywhere" in shown


CRITERIA = """
import secateur as sc

@sc.criterion("cli_span", needs=["filters"])
def span(filters, power=1.0):
    return (filters.amax(1) - filters.amin(1)) ** power

def plain(filters):
    return filters.amax(1) - filters.amin(1)
"""


def test_a_criterion_of_a_file_goes_by_its_place_in_every_way(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "own.py").write_text(CRITERIA)
    widths = []
    for words in (["own.py:span"], ["own.py:span", "--method-option", "power=2.0"], ["own.py:plain"]):
        assert (
            run("prune", *LENET, *DIGITS, "--macs", "0.4", "--allocation", "uniform", "--json", "--method", *words) == 0
        )
        widths.append(json.loads(capsys.readouterr().out)["widths"]["after"])
    assert widths[0] == widths[1] == widths[2]
    words = ["--macs", "0.3", "--set", "device=cpu", "--set", "finetune_epochs=1", "--baseline", "epochs=1"]
    assert run("compress", *LENET, *DIGITS, "--method", "own.py:plain", *words, "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["run_dir"] == str(here / "runs/lenet5-plain")
    original = stages.Stage.run_epoch

    def interrupted(self: stages.Stage, *given: Any, **named: Any) -> stages.EpochRecord:
        if (here / "parts/config.json").exists():
            raise KeyboardInterrupt
        return original(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(stages.Stage, "run_epoch", interrupted)
        (here / "own.yaml").write_text((here / "runs/lenet5-plain/run.yaml").read_text())
        assert run("compress", "--config", "own.yaml", "--method", "own.py:span", "--run-dir", "parts") == 130
    monkeypatch.chdir(here / "empty")
    capsys.readouterr()
    assert run("resume", "../parts", "--trust", "--json") == 0
    parts = json.loads(capsys.readouterr().out)
    assert [r["removed"] for r in parts["history"]] == [r["removed"] for r in whole["history"]]


def test_what_can_not_be_had_is_refused_before_the_baseline_is_trained(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline, "train", lambda *_, **__: pytest.fail("the baseline was trained"))
    named = (
        ["--skip", "conv9"],
        ["--set", "pairs={conv9: 1}"],
        ["--set", "widths={conv9: 3}"],
        ["--ratio", "conv9=0.5"],
    )
    for words in named:
        assert run("compress", *LENET, *DIGITS, "--method", "cfp", *words) == 2
        assert "conv9" in capsys.readouterr().err


def test_an_interrupted_run_says_how_it_goes_on_and_ends_the_same(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["compress", *LENET, *DIGITS, *QUICK, "--tolerance", "30"]
    assert run(*words, "--run-dir", "whole", "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    shutil.rmtree(here / "baselines")  # which the other run would take its own from
    original = stages.Stage.run_epoch
    epochs = 0

    def interrupted(self: stages.Stage, *given: Any, **named: Any) -> stages.EpochRecord:
        nonlocal epochs
        epochs += 1
        # The second epoch of the baseline; then, resumed, one in the middle of an episode.
        if epochs in (2, 6):
            raise KeyboardInterrupt
        return original(self, *given, **named)

    monkeypatch.setattr(stages.Stage, "run_epoch", interrupted)
    for attempt in ([*words, "--run-dir", "parts"], ["resume", "parts"]):
        assert run(*attempt, "--json", "--quiet") == 130
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("error: interrupted; go on with: secateur resume ")
        assert shown.err.count("\n") == 1
    assert run("resume", "parts", "--json") == 0
    parts = json.loads(capsys.readouterr().out)
    assert parts["baseline"]["test"] == whole["baseline"]["test"]
    assert [r["metric_tuned"] for r in parts["history"]] == [r["metric_tuned"] for r in whole["history"]]
    assert (parts["final"]["test"], parts["final"]["widths"]) == (whole["final"]["test"], whole["final"]["widths"])
    assert (here / "parts/model.safetensors").read_bytes() == (here / "whole/model.safetensors").read_bytes()


def test_progress_follows_every_event_of_a_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.cli.console import Steps
    from secateur.runfile import configured_run as runs

    lines: list[tuple[str, int, int | None, str]] = []

    def note(self: Steps, step: str, done: int, total: int | None = None, note: str = "") -> None:
        lines.append((step, done, total, note))

    monkeypatch.setattr(Steps, "__call__", note)
    show = runs.Show(Steps())
    show(Event("batch", "finetune", 2, 1, 1, 3, batch=4, batches=9, loss=0.5))
    show(Event("episode", "judge", 2, 1, record={"accepted": False, "metric_tuned": 0.915, "macs": 12_000}))
    assert lines[0] == ("  batches", 4, 9, "round 2, fine-tuning, epoch 1 of 3")
    show(Event("batch", "measure", 2, 1, 0, 0, batch=11, batches=30))
    assert lines[-2][:3] == ("  measuring", 11, 30)
    assert lines[-1][3] == "round 2, phase 1; 91.50% at 12,000 MACs, reverted"


@pytest.mark.parametrize(
    ("words", "name"),
    [(["--macs", "0.5"], "final_epochs"), (["--tolerance", "1"], "finetune_epochs"),
     (["--method", "l1", "--macs", "0.5"], "finetune_epochs")],
)  # fmt: skip
def test_what_is_set_most_often_has_an_option_of_its_own(
    here: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], name: str
) -> None:
    asked: list[config.RunConfig] = []

    def start(run: config.RunConfig, *_: object, **__: object) -> None:
        asked.append(run)
        raise UsageError("that is enough")

    monkeypatch.setattr(configured_run, "start", start)
    own = ["--lr", "0.003", "--epochs", "7", "--device", "cpu", "--workers", "2"]
    assert run("compress", "lenet5", "--data", "digits", *words, *own) == 2
    (found,) = asked
    assert (found.settings.lr, found.settings.device, found.workers) == (0.003, "cpu", 2)
    assert getattr(found.settings, name) == 7


def test_the_weights_of_a_detectors_base_are_found_from_anywhere(here: Path) -> None:
    given = config.build({"model": "ssd512", "data": "voc:x", "model_options": {"base_weights": "vgg.pth", "n": 1}})
    assert configured_run.grounded(given).model_options == {"base_weights": str(here / "vgg.pth"), "n": 1}


def test_config_completes_a_file_and_reads_its_own_answer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "run.yaml").write_text("model: lenet5\ndata: digits\nsettings: {lr: 1e-3}\n")
    assert run("config", "run.yaml") == 0
    (here / "whole.yaml").write_text(capsys.readouterr().out)
    whole = config.load("whole.yaml")
    assert whole == config.resolved(config.load("run.yaml"))
    assert (whole.settings.final_epochs, whole.settings.distillation) == (0, 0.9)
    assert (whole.settings.compensate, whole.allocation) == (("least_squares",), "sensitivity")
    assert run("config", "--schema") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(config.schema())


@pytest.mark.slow
def test_the_demo_holds_what_it_promises(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--json", "--picture", "demo.svg") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["final"]["macs"] <= 0.1 * shown["baseline"]["macs"]
    assert shown["final"]["test"] >= shown["baseline"]["test"] - 0.01
    assert shown["verification"]["exact"] is True
    assert shown["reloaded"] == shown["final"]["test"]
    assert shown["run_dir"] == "runs/demo"
    assert run("evaluate", "lenet5", "--data", "digits", "--weights", "runs/demo/model.safetensors", "--json") == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == shown["final"]["test"]


# What does not

ERRORS: list[tuple[list[str], int, str]] = [
    # The words themselves
    (["prun"], 2, "No such command 'prun'"),
    (["--verion"], 2, "No such option: --verion"),
    (["trace", "lenet5", "--jsn"], 2, "No such option: --jsn"),
    (["trace", "lenet5", "extra"], 2, "unexpected extra argument"),
    (["trace", "lenet5", "--weights"], 2, "requires an argument"),
    (["prune", "lenet5", "--macs", "half"], 2, "'--macs'"),
    (["prune", "lenet5", "--macs", "0.5", "--round-to", "0"], 2, "--round-to 0"),
    (["prune", "lenet5", "--macs", "0.5", "--allocation", "loudest"], 2, "--allocation loudest: no such file; give"),
    (["demo", "--seed", "-1"], 2, "'--seed'"),
    (["resume"], 2, "Missing argument"),
    # The model
    (["trace"], 2, "MODEL is missing"),
    (["trace", "lenet5", "--model", "vgg16"], 2, "given twice"),
    (["trace", "lenet"], 2, "no such model; did you mean lenet5"),
    (["trace", "torchvision:resnet19"], 2, "did you mean"),
    (["trace", "timm:nothing_of_the_kind"], 2, "no such model"),
    (["trace", "absent.py:build"], 2, "no such file"),
    (["trace", "network.py:bild"], 2, "did you mean build?"),
    (["trace", "network.py:number"], 2, "returned int"),
    (["trace", "network.py:crash"], 2, "AttributeError at"),
    (["trace", "network.py:broken"], 2, "give --input SHAPE"),
    (["trace", "no.such.module:build"], 2, "no module 'no.such.module'"),
    (["trace", "lenet5", "--model-option", "widths"], 2, "write NAME=VALUE"),
    (["trace", "lenet5", "--model-option", "widths=[1"], 2, "the value can't be read"),
    (["trace", "lenet5", "--model-option", "hidden=1", "--model-option", "hidden=2"], 2, "given twice"),
    (["trace", "lenet5", "--model-option", "depth=3"], 2, "'depth'"),
    (["trace", "lenet5", "--model-option", "hidden=0"], 2, "hidden=0"),
    (["trace", "lenet5", "--input", "1,1,28,28"], 2, "not a shape"),
    (["trace", "lenet5", "--input", "1x3x28x28"], 1, "fails on the example inputs"),
    (["trace", "network.py:broken", "--input", "1x3"], 1, "AttributeError"),
    (["prune", "network.py:two_modes", "--input", "1x1x8x8", "--channels", "0.5"], 1, "train mode: the pruned network"),
    (["trace", "lenet5", "--figure", "graph.png"], 2, "--figure graph.png: the figure is an HTML file"),
    (["trace", "lenet5", "--figure", "folder.html"], 2, "folder.html: is a folder"),
    (["trace", "lenet5", "--figure", "bad.yaml/graph.html"], 2, "bad.yaml/graph.html: can't be written"),
    # The weights
    (["trace", "lenet5", "--weights", "absent.pth"], 2, "no such file"),
    (["trace", "lenet5", "--weights", "empty"], 2, "can't be read"),
    (["trace", "lenet5", "--weights", "text.safetensors"], 1, "text.safetensors"),
    (["trace", "lenet5", "--weights", "other.safetensors"], 2, "not the weights of this LeNet5"),
    (["trace", "lenet5", "--weights", "pretrained"], 2, "no published weights"),
    # The data
    (["evaluate", "lenet5"], 2, "--data is missing"),
    (["evaluate", "lenet5", "--data", "digit"], 2, "did you mean digits?"),
    (["evaluate", "lenet5", "--data", "mnist"], 2, "folder"),
    (["evaluate", "lenet5", "--data", "mnist:absent"], 2, "absent"),
    (["evaluate", "lenet5", "--data", "imagefolder:empty"], 2, "empty"),
    (["evaluate", "lenet5", "--data", "network.py:number"], 2, "returned int; a data source returns"),
    (["evaluate", "lenet5", "--data", "digits", "--data-option", "sise=3"], 2, "'sise'"),
    (["evaluate", "resnet20", "--data", "digits", "--model-option", "in_channels=3"], 2, "channels"),
    # Pruning once
    (["prune", "lenet5"], 2, "how much?"),
    (["prune", "lenet5", "--macs", "0.5", "--params", "0.5"], 2, "contradict each other"),
    (["prune", "lenet5", "--macs", "1.5"], 2, "above 0 and below 1"),
    (["prune", "lenet5", "--macs", "0.9999"], 1, "Lower --macs"),
    (["prune", "lenet5", "--macs", "0.5", "--method", "l3"], 2, "unknown criterion 'l3'"),
    (["prune", "lenet5", "--macs", "0.5", "--method-option", "p=3"], 2, "'p'"),
    (["prune", "lenet5", "--macs", "0.5", "--method", "absent.py:mine"], 2, "no such file: absent.py"),
    (["prune", "lenet5", "--macs", "0.5", "--method", "network.py:bild"], 2, "has no function 'bild'"),
    (["prune", "lenet5", "--macs", "0.5", "--method", "network.py:number"], 2, "no parameter is named after a need"),
    (["prune", "lenet5", "--macs", "0.5", "--method", "corrnet"], 2, "(--data, e.g. --data digits)"),
    (
        ["prune", "lenet5", *DIGITS, "--macs", "0.5", "--method", "corrnet", "--method-option", "threshold=2"],
        2,
        "threshold is 2",
    ),
    (
        [
            *("prune", "lenet5", *DIGITS, "--macs", "0.5", "--method", "corrnet"),
            *("--method-option", "threshold=0.9", "--round-to", "4"),
        ],
        2,
        "round_to 4 can't hold",
    ),
    (["compress", *LENET, *DIGITS, "--method", "l1", "--set", "criterion={threshold: 1}"], 2, "unknown option"),
    (["compress", *LENET, *DIGITS, "--set", "min_width=2"], 2, "settings.min_width: no such key; it is min_channels"),
    (["compress", *LENET, *DIGITS, "--set", "skip=conv1"], 2, "settings.skip: no such key; it is an option"),
    (["compress", *LENET, *DIGITS, "--round-to", "0"], 2, "--round-to 0: give a whole number"),
    (["compress", *LENET, *DIGITS, "--min-channels", "0"], 2, "min_channels: "),
    (["compress", *LENET, *DIGITS, "--set", "pairs=2"], 2, "pairs: is cfp's, and the method is auto"),
    (["compress", *LENET, *DIGITS, "--method", "cfp", "--allocation", "uniform"], 2, "allocation: cfp takes pairs"),
    (["compress", *LENET, *DIGITS, "--max-ratio", "2"], 2, "--max-ratio 2: write FRACTION or"),
    (
        ["compress", *LENET, *DIGITS, "--compensate", "glue"],
        2,
        "error: settings.compensate: unknown compensation 'glue'",
    ),
    (["prune", "lenet5", "--macs", "0.5", "--compensate", "glue"], 2, "unknown compensation 'glue'"),
    (["prune", "lenet5", "--macs", "0.5", "--compensate", "bn"], 2, "(--data, e.g. --data digits)"),
    (["prune", "lenet5", "--macs", "0.5", "--allocation", "sensitivity"], 2, "allocation by sensitivity looks at"),
    (["prune", "lenet5", "--macs", "0.5", "--min-channels", "0"], 2, "min_channels: expected a whole number"),
    (["prune", "lenet5", "--ratio", "conv1"], 2, "write NAME=VALUE"),
    (["prune", "lenet5", "--ratio", "conv1=2"], 2, "a fraction in [0, 1)"),
    (["prune", "lenet5", "--ratio", "conv1=0.5", "--skip", "conv1"], 2, "conv1"),
    (["prune", "lenet5", "--macs", "0.5", "--max-ratio", "2"], 2, "--max-ratio 2: write FRACTION or"),
    (["prune", "lenet5", "--macs", "0.5", "--max-ratio", "conv1=most"], 2, "conv1=most: write FRACTION or"),
    (["prune", "lenet5", "--macs", "0.5", "--max-ratio", "0.5", "--max-ratio", "0.6"], 2, "given twice"),
    (["prune", "lenet5", "--ratio", "conv1=0.5", "--max-ratio", "conv1=0.2"], 2, "contradicts max_ratio 0.2"),
    (["prune", "lenet5", "--macs", "0.5", "--out", "empty"], 2, "is a folder"),
    (["prune", "lenet5", "--macs", "0.5", "--out", "bad.yaml/small.safetensors"], 2, "can't be written"),
    (["prune", "--config", "absent.yaml"], 2, "absent.yaml: can't be read"),
    (["prune", "--config", "bad.yaml"], 2, "bad.yaml:2: datta: no such key; did you mean data?"),
    (["prune", "--config", "prune.yaml"], 2, "prune.yaml:3: max_ratio"),
    # Runs
    (["compress"], 2, "MODEL is missing"),
    (["compress", "lenet5"], 2, "data: missing; give --data"),
    (["compress", "--config", "absent.yaml"], 2, "absent.yaml: can't be read"),
    (["compress", "--config", "bad.yaml"], 2, "bad.yaml:2: datta: no such key; did you mean data?"),
    (["compress", "lenet5", "--data", "digits", "--tolerance", "-1"], 2, "tolerance"),
    (["compress", "lenet5", "--data", "digits", "--set", "fractoin=0.1"], 2, "did you mean fraction?"),
    (["compress", "lenet5", "--data", "digits", "--set", "fraction=3"], 2, "fraction: is in (0, 1)"),
    (
        ["compress", "lenet5", "--data", "digits", "--baseline", "epochs=0"],
        2,
        "error: baseline.epochs: must be at least",
    ),
    (["compress", "--config", "good.yaml", "--baseline", "epochs=0"], 2, "error: baseline.epochs: must be at least 1"),
    (["compress", "lenet5", "--data", "digits", "--batch-size", "0"], 2, "batch_size"),
    (["compress", "lenet5", "--data", "digits", "--run-dir", "bad.yaml"], 2, "bad.yaml"),
    (["compress", *LENET, *DIGITS, *QUICK, "--method", "l3"], 2, "unknown method 'l3'"),
    (["compress", *LENET, *DIGITS, *QUICK, "--set", "widths={conv9: 3}"], 2, "conv9"),
    (["compress", *LENET, *DIGITS, *QUICK[:-2], "--baseline", "lr=1e6", "--quiet"], 1, "the training loss is"),
    (["resume", "absent"], 2, "no run to resume"),
    (["resume", "empty"], 2, "no run to resume"),
    (["config"], 2, "either a FILE to check or --schema"),
    (["config", "bad.yaml", "--schema"], 2, "either a FILE to check or --schema"),
    (["config", "absent.yaml"], 2, "can't be read"),
]


@pytest.mark.parametrize(("words", "status", "said"), ERRORS, ids=[" ".join(e[0])[:60] for e in ERRORS])
def test_an_error_is_one_line_and_the_right_status(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, said: str
) -> None:
    assert run(*words) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert len(lines) == 1, shown.err
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert "Traceback" not in shown.err


def test_the_error_table_covers_every_command() -> None:
    covered = {words[0] for words, _, _ in ERRORS}
    own = {"demo", "trace", "prune", "compress", "resume", "evaluate", "config"}
    assert own <= covered


@pytest.mark.slow
def test_folders_of_images_follow_the_network_in_runs_and_in_every_command(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    for number in range(60):
        folder = here / "images" / ("dark", "light")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (number + 120 * (number % 2),) * 3).save(folder / f"{number}.png")
    (here / "grey.py").write_text(
        "from torch import nn\ndef build(classes=2):\n    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), "
        "nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))\n"
    )
    (here / "run.yaml").write_text(
        "model: grey.py:build\ndata: imagefolder:images\ndata_options: {size: 8}\nbatch_size: 16\nworkers: 0\n"
        "target: {channels: 0.5}\nbaseline: {epochs: 1}\nsettings: {finetune_epochs: 0, final_epochs: 1}\n"
    )
    assert run("compress", "--config", "run.yaml", "--trust", "--run-dir", "made", "--quiet") == 0
    capsys.readouterr()
    same = ["grey.py:build", "--data", "imagefolder:images", "--data-option", "size=8"]
    assert run("evaluate", *same, "--weights", "made/model.safetensors", "--json") == 0
    expected = json.loads((here / "made/result.json").read_text())["final"]["test"]
    assert json.loads(capsys.readouterr().out)["accuracy"] == expected
    for words in (
        ["prune", *same, "--channels", "0.5", "-o", "small.safetensors"],
        ["sensitivity", *same, "--images", "16", "--levels", "1", "-o", "table.json"],
        ["compress", *same, "--estimate"],
    ):
        assert run(*words) == 0, capsys.readouterr().err
    assert (here / "small.safetensors").is_file()
    assert (here / "table.json").is_file()


def test_a_folder_with_a_run_is_not_overwritten(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compress", *LENET, *DIGITS, *QUICK, "--run-dir", "taken"]
    assert run(*words) == 0
    before = {path: path.read_bytes() for path in (here / "taken").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(*words) == 2
    assert "holds a finished run, which is left as it is" in capsys.readouterr().err
    for again in (["resume", "taken", "--json"], [*words, "--resume", "--json"]):
        assert run(*again) == 0
        shown = capsys.readouterr()
        assert (
            shown.err == f"note: {here / 'taken'}: the run has finished, and is left as it is.\n"
            or again[0] == "resume"
        )
        assert json.loads(shown.out)["final"] == json.loads((here / "taken/result.json").read_text())["final"]
    assert run("resume", "taken", "--set", "lr=0.1") == 2
    assert "Begin another one with settings" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (here / "taken").rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", [k for k in SecateurError.__subclasses__() if k.__module__ == "secateur.errors"])
def test_every_class_of_error_has_its_status(
    kind: type[SecateurError], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise kind("layer:\n  first\tsecond")

    monkeypatch.setattr(config, "load", fail)
    assert run("config", "any.yaml") == (2 if kind.__name__ in ("UsageError", "DataError") else 1)
    assert capsys.readouterr().err == "error: layer: first second\n"


def test_what_nobody_foresaw_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a [bold]bug[/]\nof ours")

    monkeypatch.setattr(config, "load", fail)
    monkeypatch.delenv("SECATEUR_DEBUG", raising=False)
    assert run("config", "any.yaml") == 1
    message = capsys.readouterr().err
    assert re.fullmatch(r"error: ZeroDivisionError at \S+:\d+: a \[bold\]bug\[/\] of ours \(.*\)\n", message)
    monkeypatch.setenv("SECATEUR_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("config", "any.yaml")


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", "runs/state")

    monkeypatch.setattr(config, "load", fail)
    assert run("config", "any.yaml") == 1
    assert capsys.readouterr().err == "error: runs/state: No space left on device.\n"


def test_ctrl_c_is_one_line_and_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "load", fail)
    assert run("config", "any.yaml") == 130
    assert capsys.readouterr().err == "error: interrupted.\n"


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error(here: Path) -> None:
    script = f"{sys.executable} -m secateur config --schema | head -c 1"
    result = subprocess.run(  # noqa: S602 - a pipe is what is tested
        script,
        shell=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert result.stderr == ""


# Help


def commands() -> dict[str, Any]:
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_and_option_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = commands()[name]
    assert command.help
    for parameter in command.params:
        assert parameter.help, f"{name} {parameter.name}"
        assert parameter.help.endswith("."), f"{name} {parameter.name}: a sentence ends with a full stop"
    assert run(name, "--help") == 0
    assert f"Usage: secateur {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["prune", "compress"])
def test_help_names_every_criterion(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    @criteria.criterion("of_a_plugin", needs=["filters"])
    def of_a_plugin(filters: torch.Tensor) -> torch.Tensor:
        return filters.abs().amax(1)

    try:
        assert run(name, "--help") == 0
    finally:
        criteria.unregister("of_a_plugin")
    shown = set(re.findall(r"\w+", capsys.readouterr().out))
    assert shown >= {*criteria.names(), "of_a_plugin"}
    assert "CRITERIA" not in shown


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from secateur.cli.commands import main; main(['--help']); sys.exit('torch' in sys.modules)"
    root = str(Path(__file__).parents[2])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONPATH": root})
    assert result.returncode == 0


def test_defaults_of_prune_are_those_of_the_library() -> None:
    own = {name: parameter.default for name, parameter in inspect.signature(sc.prune).parameters.items()}
    own |= asdict(sc.Options())
    given = {parameter.name: parameter.default for parameter in commands()["prune"].params}
    file = {
        name: field.get_default(call_default_factory=True) for name, field in config.PruneConfig.model_fields.items()
    }
    for name in ("method", "compensate", "seed"):
        assert given[name] == own[name], name
    for name in asdict(sc.Options()):
        # What is not said is left to the library.
        assert given["ratio" if name == "ratios" else name] is None, name
    for name in ("method", "compensate", "seed", *asdict(sc.Options())):
        assert file[name] == own[name], name


# Numbers


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (7, "7"), (999, "999"), (1000, "1 k"), (2_293_000, "2.29 M"), (4.1e9, "4.1 G")]
)
def test_quantities_are_written_as_people_say_them(value: float, text: str) -> None:
    assert quantity(value) == text


@pytest.mark.parametrize(("before", "after", "text"), [(2, 1, "−50.0%"), (1, 1, "+0.0%"), (0, 3, "")])
def test_changes_are_relative_to_before(before: float, after: float, text: str) -> None:
    assert change(before, after) == text


def test_lenet_of_the_tests_is_the_papers_but_narrower() -> None:
    assert [type(m).__name__ for m in lenet5((4, 6), 8).children()] == ["Conv2d", "Conv2d", "Linear", "Linear"]


@pytest.mark.parametrize("width", [80, 140])
def test_progress_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = console.Console(file=screen, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(console, "Console", lambda **_: terminal)
    with console.Steps() as steps:
        steps("training the baseline", 12, 425, "loss 0.476")
        steps("compressing", 3, None, "round 4, phase 1; 94.17% at 1,512,200 MACs, accepted " + "and so on " * 9)
    frame = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    lines = [line.strip("\r") for line in frame.splitlines() if "training" in line or "compressing" in line]
    assert lines
    assert max(map(len, lines)) <= width
    assert any(" 12/425 " in line and "0:00:0" in line and "loss 0.476" in line for line in lines)
    assert any("compressing" in line and "round 4, phase 1" in line for line in lines)
