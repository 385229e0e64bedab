"""What a run survives: damaged files, a loss that is not finite, a target out of reach, other settings, other data."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import checkpoint
from secateur.engine import CompressResult, RunDirectory, compress, resume, rundir
from secateur.errors import CheckpointError, RunError, UsageError
from secateur.training import evaluation, stages
from tests.engine.nets import Batches, Small, digits, trained
from tests.engine.test_resume import outcome

TRAIN, VALIDATION, TEST = digits(80)
DATA: dict[str, Any] = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
QUICK: dict[str, Any] = {
    "method": "cfp", "pairs": 2, "optimise_epochs": 0, "finetune_epochs": 1, "lr": 0.02, "precision": "fp32",
    "channels_last": False,
}  # fmt: skip


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return trained(epochs=4)


@pytest.fixture(scope="module")
def runs(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a whole run, and the same killed in its second round."""
    folder = tmp_path_factory.mktemp("runs")
    compress(network, run_dir=folder / "whole", max_rounds=3, tolerance=100, **DATA, **QUICK)
    with pytest.raises(Killed):
        compress(network, run_dir=folder / "cut", max_rounds=3, tolerance=100, progress=dying(2), **DATA, **QUICK)
    return folder


def dying(round_: int) -> Callable[[Any], None]:
    def at(event: Any) -> None:
        if event.kind == "batch" and event.round == round_:
            raise Killed

    return at


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    ["a tensor's bit", *(pytest.param(d, marks=pytest.mark.slow) for d in ("a record's bit", "half", "all", "gone"))],
)
def test_a_damaged_state_is_named_and_the_one_before_is_taken(
    runs: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(runs / "cut", tmp_path / "run")
    file = tmp_path / "run" / "checkpoint" / "state.safetensors"
    content = file.read_bytes()
    header = content.index(b'\\"images\\":') + len(b'\\"images\\":')
    made = {
        "a tensor's bit": flipped(content, len(content) - 5),
        "a record's bit": flipped(content, header),
        "half": content[: len(content) // 2],
        "all": b"",
    }
    file.unlink() if damage == "gone" else file.write_bytes(made[damage])
    with caplog.at_level(logging.WARNING):
        resume(tmp_path / "run", Small(), **DATA)
    told = [r.getMessage() for r in caplog.records if "state.safetensors" in r.getMessage()]
    assert bool(told) == (damage != "gone")
    assert all("damaged" in line and line.endswith("state-before.safetensors.") for line in told)
    assert outcome(tmp_path / "run") == outcome(runs / "whole")


def test_two_damaged_states_are_refused_in_one_line(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "cut", tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoint").glob("state*"):
        file.write_bytes(flipped(file.read_bytes(), -5))
    with pytest.raises(CheckpointError, match=r"state\.safetensors: damaged: its content is not") as caught:
        resume(tmp_path / "run", Small(), **DATA)
    assert "\n" not in str(caught.value)


def test_every_epoch_is_a_line(runs: Path) -> None:
    lines = [json.loads(line) for line in (runs / "whole" / "epochs.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(1, len(lines) + 1))
    assert {(line["round"], line["stage"]) for line in lines} >= {(1, "finetune"), (2, "finetune"), (3, "finetune")}
    cut = [json.loads(line) for line in (runs / "cut" / "epochs.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in cut] == [line["loss"] for line in lines[: len(cut)]]


def nan_in_round(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the loss be NaN from a round's training on, unless the learning rate is below 0.01."""
    whole = stages.Stage._step

    def step(self: stages.Stage, *given: Any) -> torch.Tensor:
        return whole(self, *given) * (torch.nan if self.number >= number and self.settings.lr >= 0.01 else 1)

    monkeypatch.setattr(stages.Stage, "_step", step)


def test_a_run_that_diverges_leaves_its_best_and_goes_on_with_another_rate(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_in_round(monkeypatch, 3)
    folder = tmp_path / "run"
    with pytest.raises(RunError, match=r"the training loss is nan.*last accepted network is kept.*resume") as caught:
        compress(network, run_dir=folder, target=sc.Target(macs=0.7), **DATA, **{**QUICK, "pairs": 1})
    kept = caught.value.result
    assert isinstance(kept, CompressResult)
    assert [r["accepted"] for r in kept.history] == [True, True]
    loaded = checkpoint.load(Small(), folder / "model.safetensors")
    report = json.loads((folder / "result.json").read_text())
    assert report["ended"]["round"] == 3
    assert "is nan" in report["ended"]["error"]
    assert evaluation.evaluate(loaded, TEST) == report["final"]["test"] == kept.report["final"]["test"]
    assert report["final"]["macs"] == kept.history[-1]["macs"]
    with pytest.raises(RunError, match="the training loss is nan"):  # nothing has changed
        resume(folder, Small(), **DATA)
    result = resume(folder, Small(), lr=0.005, target=sc.Target(macs=0.6), **DATA)
    assert "ended" not in json.loads((folder / "result.json").read_text())
    assert result.report["final"]["macs"] <= 0.4 * result.report["baseline"]["macs"]
    config = json.loads((folder / "config.json").read_text())
    assert config["changes"] == [{"target": {"macs": 0.6}, "asked": {"lr": 0.005}}]
    assert (config["settings"]["lr"], config["target"]["macs"]) == (0.005, 0.6)
    assert [r["round"] for r in result.history] == list(range(1, len(result.history) + 1))


@pytest.mark.slow
def test_a_target_out_of_reach_leaves_what_was_reached(network: nn.Module, tmp_path: Path) -> None:
    options = {**QUICK, "finetune_epochs": 0, "min_channels": 4}
    with pytest.raises(RunError, match=r"out of reach.*The last accepted network is kept, with"):
        compress(network, run_dir=tmp_path / "run", target=sc.Target(macs=0.95), **DATA, **options)
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    report = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(history) > 1
    assert report["final"]["widths"] == history[-1]["widths"]
    assert checkpoint.read_header(tmp_path / "run" / "model.safetensors").plans


def test_under_a_tolerance_a_round_that_diverges_is_reverted(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_in_round(monkeypatch, 2)
    result = compress(network, tolerance=100, phases=(1,), **DATA, **QUICK)
    assert [r["accepted"] for r in result.history] == [True, False]
    assert "is nan" in result.history[1]["diverged"]
    assert result.history[1]["metric_tuned"] is None
    assert result.report["final"]["macs"] == result.history[0]["macs"]
    assert all(bool(v.isfinite().all()) for v in result.model.state_dict().values())


@pytest.mark.slow
def test_other_settings_hold_from_the_round_under_way(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "cut", tmp_path / "run")
    with pytest.raises(UsageError, match="no such setting; did you mean lr"):
        resume(tmp_path / "run", Small(), lrr=1, **DATA)
    result = resume(tmp_path / "run", Small(), finetune_epochs=2, tolerance=100, **DATA)
    lines = [json.loads(line) for line in (tmp_path / "run" / "epochs.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 2, 3, 3]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["changes"] == [{"asked": {"finetune_epochs": 2}}]
    assert len(result.history) == 3


def test_other_data_are_refused_and_other_threads_named(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(runs / "cut", tmp_path / "run")
    other = Batches(VALIDATION.x.flip(0), VALIDATION.y.flip(0), 200)
    with pytest.raises(UsageError, match=r"the validation data are not those .* 1 batches with digest .* then"):
        resume(tmp_path / "run", Small(), train=TRAIN, validation=other, test=TEST)
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    config["machine"]["threads"] = 77
    file.write_text(json.dumps(config))
    resume(tmp_path / "run", Small(), **DATA)
    assert any("77 before" in r.getMessage() and "OMP_NUM_THREADS" in r.getMessage() for r in caplog.records)


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with (
        pytest.raises(RunError, match=r"no locks \(No locks available\).*--run-dir.*SECATEUR_NO_LOCK=1"),
        RunDirectory(tmp_path),
    ):
        pass
    monkeypatch.setenv(rundir.NO_LOCKS, "1")
    with RunDirectory(tmp_path):
        pass


def test_a_run_whose_checkpoint_is_gone_is_not_overwritten(runs: Path, network: nn.Module, tmp_path: Path) -> None:
    shutil.copytree(runs / "cut", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    with pytest.raises(UsageError, match="holds a run whose checkpoint/ is gone"):
        compress(network, run_dir=tmp_path / "run", **DATA, **QUICK)
