"""A run killed anywhere goes on and ends in exactly the result of the uninterrupted run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.cli.commands import main
from secateur.engine import Engine, RunDirectory, Settings, State, compress, resume
from secateur.errors import UsageError
from tests.engine.nets import Small, digits, trained

ROOT = Path(__file__).resolve().parents[2]
UNTIMED = ("seconds", "latency_ms", "latency_within_noise")


def untimed(value: Any) -> Any:
    """Leave out what a clock measured."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in UNTIMED}
    if isinstance(value, list):
        return [untimed(v) for v in value]
    return value


def outcome(folder: Path) -> dict[str, Any]:
    """Return everything that a run leaves, but for times."""
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return {
        "history": untimed(history),
        "result": untimed(json.loads((folder / "result.json").read_text())),
        "plan": (folder / "plan.json").read_text(),
        "models": {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))},
    }


def check_killed(folder: Path, case: str, seed: int, kills: int, total: int) -> dict[str, Any]:
    """Run in another process, once whole and then killed ``total`` times; return what the whole run leaves."""
    command = [sys.executable, "-m", "tests.engine.killing", case, folder, *map(str, (seed, kills, total))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1]) >= total
    assert not list((folder / "whole").rglob("*.partial"))
    whole = outcome(folder / "whole")
    killed = [run for run in folder.iterdir() if run.name != "whole"]
    assert killed
    for run in killed:
        assert outcome(run) == whole
    return whole


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    records = check_killed(tmp_path, "classifier", seed=1, kills=5, total=5)["history"]
    # The run has every kind of step.
    assert {r["phase"] for r in records} == {1, 2}
    assert {r["accepted"] for r in records} == {True, False}
    assert len(records) >= 4


@pytest.mark.slow
def test_a_killed_run_of_auto_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole = check_killed(tmp_path, "auto", seed=3, kills=4, total=4)
    assert {r["accepted"] for r in whole["history"]} == {True, False}
    assert whole["result"]["parts"]["allocation"] == "sensitivity"


@pytest.mark.slow
def test_no_file_is_missing_after_a_kill_before_it_took_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    replace = Path.replace
    train, validation, test = digits(80)
    data = {"train": train, "validation": validation, "test": test}
    quick: dict[str, Any] = {
        "method": "cfp", "pairs": 4, "optimise_epochs": 1, "finetune_epochs": 1, "final_epochs": 1, "lr": 0.02,
    }  # fmt: skip
    model = trained(epochs=3)
    compress(model, run_dir=tmp_path / "whole", seed=7, tolerance=100, **data, **quick)
    assert "milestone-1.safetensors" in outcome(tmp_path / "whole")["models"]
    for name in ("milestone-1.safetensors", "history.jsonl", "model.safetensors", "result.json"):
        folder = tmp_path / name

        def dying(self: Path, target: Path, *, name: str = name, folder: Path = folder) -> Path:
            if target.name == name and (folder / "history.jsonl").is_file():
                raise Killed
            return replace(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", dying)
            with pytest.raises(Killed):
                compress(model, run_dir=folder, seed=7, tolerance=100, **data, **quick)
        resume(folder, Small(), **data)
        assert outcome(folder) == outcome(tmp_path / "whole"), name


@pytest.mark.slow
def test_many_kills(tmp_path: Path) -> None:
    check_killed(tmp_path, "classifier", seed=2, kills=5, total=20)


@pytest.mark.slow
def test_a_killed_run_of_a_detector_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole = check_killed(tmp_path, "detector", seed=54, kills=4, total=4)
    assert len(whole["history"]) >= 2
    assert whole["result"]["metric"] == "mAP"
    assert whole["result"]["final"]["validation"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cfp", "auto", "corrnet"])
def test_every_single_step_can_be_the_last(tmp_path: Path, method: str) -> None:
    """Store and reload the state after each step: the same network in the end as without."""
    train, validation, _ = digits(80)
    own: dict[str, Any] = {"pairs": 4, "optimise_epochs": 2} if method == "cfp" else {"fraction": 0.25}
    settings = Settings.of({**own, "optimizer": "adam", "lr": 1e-3, "schedule": "cosine"})

    def engine() -> Engine:
        return Engine(model, method, train=train, validation=validation, tolerance=10, settings=settings)

    model = trained(epochs=3)
    whole = engine()
    state = whole.init()
    while not whole.finished(state):
        state = whole.step(state)
    other = engine()
    stored = other.init()
    steps = 0
    while not other.finished(stored):
        stored.save(tmp_path / "state.safetensors")
        other = engine()
        loaded, tensors = State.load(tmp_path / "state.safetensors")
        stored = other.step(other.resume(loaded, tensors))
        steps += 1
    assert steps > 10
    first, second = state.network.state_dict(), stored.network.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert untimed(state.plain()) == untimed(json.loads(json.dumps(stored.plain())))


@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "tests.engine.several", str(tmp_path)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(line["rank"] for line in lines) == [0, 1], done.stderr[-2000:]
    assert lines[0]["sum"] == lines[0]["again"] == lines[1]["sum"] == lines[1]["again"]
    # Five batches of 40 a pass: two for each process.
    assert all(line["images"] % 160 == 0 for line in lines)
    assert all(line["test"] == line["alone"] for line in lines)
    assert (tmp_path / "result.json").is_file()


def test_a_folder_of_python_names_the_call_that_goes_on_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run/checkpoint").mkdir(parents=True)
    for file in ("config.json", "checkpoint/state.safetensors"):
        (tmp_path / "run" / file).write_text("{}")
    call = f"secateur.resume({str(tmp_path / 'run')!r}, model, train=..., validation=...)"
    with pytest.raises(UsageError, match=re.escape(call)):
        RunDirectory(tmp_path / "run").require_free()
    assert main(["resume", str(tmp_path / "run")]) == 2
    assert call in capsys.readouterr().err
    (tmp_path / "run/run.yaml").write_text("model: lenet5")
    with pytest.raises(UsageError, match="go on with 'secateur resume"):
        RunDirectory(tmp_path / "run").require_free()
