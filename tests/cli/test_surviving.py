"""What a run's commands survive and say: signals, edits of run.yaml, a queue that repeats itself, logs, trackers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secateur import checkpoint
from secateur.cli import signals
from secateur.cli.commands import main
from secateur.data import ImageTensors
from secateur.data.bundle import Normalise
from secateur.data.imagefolder import imagefolder
from secateur.engine import request
from secateur.errors import DataError
from secateur.runfile import suspicions
from secateur.runfile.sources import SourceModel
from secateur.runfile.sources import data as load_data
from secateur.training import stages
from tests.engine.test_resume import outcome

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    *("lenet5", "--model-option", "widths=[4, 6]", "--model-option", "hidden=8"),
    *("--data", "digits", "--data-option", "size=16", "--data-option", "train_size=200"),
    *("--method", "cfp", "--set", "device=cpu", "--set", "finetune_epochs=1", "--set", "max_rounds=2"),
    *("--baseline", "epochs=2", "--tolerance", "30"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list: (n, signal) sends this process the signal at the n-th epoch from then on."""
    plan: list[tuple[int, int]] = []
    whole, count = stages.Stage._step, [0]

    def step(self: stages.Stage, *given: Any) -> torch.Tensor:
        count[0] += 1
        if plan and plan[0][0] == count[0]:
            count[0] = 0
            os.kill(os.getpid(), plan.pop(0)[1])
        return whole(self, *given)

    monkeypatch.setattr(stages.Stage, "_step", step)
    return plan


def test_a_run_that_a_scheduler_stops_goes_on_by_the_same_command(
    here: Path, signalled: list[tuple[int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compress", *WORDS, "--run-dir", "run", "--resume", "--json"]
    signalled += [(3, signal.SIGTERM), (4, signal.SIGUSR1)]  # in the baseline's second epoch; in the compression
    for status, name in ((143, "SIGTERM"), (138, "SIGUSR1")):
        assert main(command) == status
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.splitlines()[-1] == f"error: stopped by {name}; go on with: secateur resume {here / 'run'}"
    file = here / "run" / "run.yaml"
    written = file.read_text()
    file.write_text(written.replace("lr: 0.01\n", "lr: 0.02\n", 1))
    assert main(["resume", "run"]) == 2
    assert re.search(r"run\.yaml: the run began with settings\.lr 0\.01, and 0\.02 stands", capsys.readouterr().err)
    file.write_text(written)
    assert main([*command, "--tolerance", "20"]) == 2
    assert "the run there began with tolerance 30.0, and 20.0 is asked for" in capsys.readouterr().err
    assert main(["resume", "run", "--set", "lr=0.02", "--json"]) == 0
    shown = capsys.readouterr()
    config = json.loads((here / "run" / "config.json").read_text())
    assert [change["asked"] for change in config["changes"]] == [{"lr": 0.02}]
    assert "lr: 0.02" in file.read_text()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    for line in (
        (
            r"round 2, fine-tuning, epoch 1/1: loss [\d.e-]+, lr 0.02, \d+ images/s, last accepted accuracy [\d.]+%, "
            r"[\d,]+ MACs; next: accept the round or revert it"
        ),
        r"round 2: accepted, accuracy [\d.]+%, [\d,]+ MACs; next: measure the result",
        r"result: accuracy [\d.]+%, [\d,]+ MACs; next: write the result",
    ):
        assert re.search(f"^{stamp}{line}$", shown.err, re.MULTILINE), shown.err


def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise ImportError\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-m", "secateur"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "error: interrupted.\n")


def stopped(command: list[str], cwd: Path, line: str, number: int, delay: float) -> tuple[int, str]:
    """Run the command line in a process of its own, and send it a signal some time after a line of its log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "secateur", *command]
    with subprocess.Popen(words, cwd=cwd, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stderr is not None
        told = ""
        while line not in told and (read := running.stderr.readline()):
            told += read.decode()
        time.sleep(delay)
        running.send_signal(number)
        _, rest = running.communicate()
    return running.returncode, told + rest.decode()


@pytest.mark.slow
@pytest.mark.parametrize(
    "stops",
    [
        [("baseline, epoch 1/", signal.SIGTERM), ("unpruned network", signal.SIGKILL), ("cut", signal.SIGTERM)],
        [("baseline, epoch 2/", signal.SIGKILL), ("cut", signal.SIGUSR1), ("accepted", signal.SIGKILL)],
    ],
)
def test_a_stopped_run_ends_in_the_same_bits(tmp_path: Path, stops: list[tuple[str, signal.Signals]]) -> None:
    more = ["--baseline", "epochs=6", "--run-dir"]
    words = ["compress", *[w for w in WORDS if w != "--baseline" and w != "epochs=2"], *more]
    for folder in ("one", "two"):  # apart, so that they share no baseline
        (tmp_path / folder).mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    whole = [sys.executable, "-m", "secateur", *words, "whole"]
    assert subprocess.run(whole, cwd=tmp_path / "one", env=environment, capture_output=True).returncode == 0
    expected = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGUSR1: 138}
    for line, number in stops:
        status, told = stopped([*words, "cut", "--resume"], tmp_path / "two", line, number, 0.02)
        assert status == expected[number], told
        assert "Traceback" not in told
    last = [sys.executable, "-m", "secateur", *words, "cut", "--resume"]
    assert subprocess.run(last, cwd=tmp_path / "two", env=environment, capture_output=True).returncode == 0
    assert outcome(tmp_path / "two" / "cut") == outcome(tmp_path / "one" / "whole")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trackers_hold_a_whole_run_that_was_interrupted(
    here: Path, signalled: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{here / 'mlflow.db'}")
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    signalled.append((8, signal.SIGTERM))  # in the first round
    tracked = ["--track", "tensorboard", "--track", "mlflow", "--set", "correlation_target=null", "--json"]
    command = ["compress", *WORDS, *tracked, "--run-dir", "run", "--resume"]
    assert main(command) == 143
    assert main(command) == 0
    epochs = [json.loads(line) for line in (here / "run" / "epochs.jsonl").read_text().splitlines()]
    result = json.loads((here / "run" / "result.json").read_text())

    board: dict[str, list[tuple[int, float]]] = {}
    for file in (here / "run" / "trackers").rglob("events.out.tfevents*"):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            board.setdefault(tag, []).extend((e.step, e.value) for e in events.Scalars(tag))
    client = mlflow.MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "secateur"]
    (run,) = client.search_runs([experiment.experiment_id])
    store = {tag: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, tag)] for tag in board}
    for found in (board, store):
        assert {step for step, _ in found["baseline/loss"]} == {1, 2}
        losses = dict(found["train/loss"])  # an epoch that was repeated has the same value
        assert losses == pytest.approx({2 + e["number"]: e["loss"] for e in epochs}, rel=1e-6)
        assert {"train/learning_rate", "train/images_per_second", "train/min_abs_rho", "macs"} <= set(found)
        assert {"max_abs_rho/before", "max_abs_rho/after", "accepted", "round"} <= set(found)
        assert max(found["test/metric"])[1] == pytest.approx(result["final"]["test"], rel=1e-6)
    assert run.data.params["settings.lr"] == "0.01"
    assert run.data.params["method"] == "cfp"


def wandb_records(file: Path) -> Iterator[Any]:
    """Read what W&B keeps of a run: a log as LevelDB's, in blocks, a record in one part or several."""
    from wandb.proto import wandb_internal_pb2

    content, at, whole = file.read_bytes(), 7, b""  # after the file's own header
    while at + 7 <= len(content):
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        if (1 << 15) - at % (1 << 15) < 7 or not kind:  # the rest of a block is left empty
            at = (at // (1 << 15) + 1) << 15
            continue
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole in one, or the last part
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_holds_a_whole_run_that_was_interrupted_and_calls_nobody(
    here: Path,
    signalled: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wandb = pytest.importorskip("wandb", reason="W&B is not installed: pip install wandb")
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        place = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        for name, value in {
            "WANDB_MODE": "offline",
            "WANDB_BASE_URL": place,
            "HTTPS_PROXY": place,
            "HTTP_PROXY": place,
        }.items():
            monkeypatch.setenv(name, value)
        signalled.append((8, signal.SIGTERM))  # in the first round
        command = ["compress", *WORDS, "--track", "wandb", "--set", "correlation_target=null", "--json", "--quiet"]
        command += ["--run-dir", "run", "--resume"]
        assert main(command) == 143
        assert main(command) == 0
        wandb.teardown()
        nobody.settimeout(0.1)
        with pytest.raises(TimeoutError):
            nobody.accept()
    result = json.loads(capsys.readouterr().out)
    assert not (here / "wandb").exists()
    files = sorted((here / "run" / "trackers").rglob("run-*.wandb"), key=lambda file: file.stat().st_mtime)
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # one run, in two parts
    found: dict[str, dict[int, float]] = {}
    settings: dict[str, Any] = {}
    for file in files:
        for record in wandb_records(file):
            for item in (*record.run.config.update, *record.config.update):
                settings[item.key] = json.loads(item.value_json)
            values = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name, value in values.items():
                found.setdefault(name, {})[values["_step"]] = value
    epochs = [json.loads(line) for line in (here / "run" / "epochs.jsonl").read_text().splitlines()]
    assert set(found["baseline/loss"]) == {1, 2}
    assert found["train/loss"] == pytest.approx({2 + e["number"]: e["loss"] for e in epochs}, rel=1e-6)
    assert {"train/learning_rate", "train/images_per_second", "train/min_abs_rho", "macs", "round"} <= set(found)
    assert found["test/metric"][max(found["test/metric"])] == pytest.approx(result["final"]["test"], rel=1e-6)
    assert (settings["settings.lr"], settings["method"]) == (0.01, "cfp")


def test_a_tracker_that_is_not_there_is_refused_first(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", *WORDS, "--track", "tensorbord"]) == 2
    assert "track: tensorbord: no such tracker; known are" in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_suspicions(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    found = SourceModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 1000)), torch.zeros(1, 1, 8, 8), "lenet5")
    suspicions.of_fresh_weights(found, None, "prune")
    suspicions.of_fresh_weights(found, "trained.pth", "prune")
    suspicions.of_classes(found, load_data("digits", {"size": 8}))
    few, many = (
        [ImageTensors(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.zeros(n).long(), Normalise((0.5,), (1.0,)))]
        for n in (50, 1000)
    )
    for count in (few, many):
        batches = torch.utils.data.DataLoader(count[0])
        request.warn_if_seen(0.99, 0.93, batches, batches)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert messages[0].startswith("prune: lenet5 has fresh random weights")
    assert "scores 1000 classes, and digits has 10" in messages[1]
    assert "99.0% on the validation images and 93.0% on the test images" in messages[2]
    for part in ("Training", "Val"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"Training and Val look like parts of a data set .* train, val and test"):
        imagefolder(tmp_path)


def test_a_result_of_a_pruned_network_has_all_plans_from_the_first_writing(here: Path) -> None:
    assert main(["prune", *WORDS[:11], "--macs", "0.2", "--out", "first.safetensors", "--json"]) == 0
    words = [w for w in WORDS if w not in ("--baseline", "epochs=2")]
    assert main(["compress", *words, "--weights", "first.safetensors", "--run-dir", "run", "--json", "--quiet"]) == 0
    assert len(checkpoint.read_header(here / "run" / "model.safetensors").plans) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_arrives_where_nothing_can_be_raised_is_not_lost(
    number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in a finaliser, or while a process that reads images is forked."""

    class Finalised:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            time.sleep(0.001)

    def heeding() -> None:
        with signals.heeded():
            Finalised()
            signals.check()

    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else signals.Stopped):
        heeding()
    assert capfd.readouterr().err == ""
