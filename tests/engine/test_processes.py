"""One run in two processes: what they agree on, what equals one process's, and how they end together."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

import secateur as sc
from secateur.cli import console
from secateur.cli.commands import main
from secateur.cli.console import error_line
from secateur.cli.run_commands import _show_run
from secateur.data import DetectionBatches
from secateur.engine import RunDirectory, compress, resume
from secateur.errors import PlanError, RunError, UsageError
from secateur.training import evaluation, launched, processes, stages
from secateur.training.detection import DetectionLoss, MeanAveragePrecision
from secateur.training.stages import TrainingSettings, fit
from tests import detectors
from tests.engine.launching import launch
from tests.engine.nets import Batches, Small, digits, trained
from tests.engine.test_resume import outcome

TRAIN, VALIDATION, TEST = digits(200)
DATA: dict[str, Any] = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
PLAIN: dict[str, Any] = {"device": "cpu", "precision": "fp32", "channels_last": False}


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def told(folder: Path, number: int = 0) -> str:
    return (folder / f"err-{number}").read_text()


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.set_num_threads(1)
    evaluation.evaluate(model := trained(epochs=4), TEST)
    return model


def test_accelerate_launch_on_a_cpu_says_why_it_starts_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    # What it sets for a command that it starts with --cpu --num_processes 2.
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(UsageError, match="has started one, as it does on CPUs; start them by torchrun"):
        stages.accelerator("cpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    stages.accelerator("cpu")


@pytest.mark.parametrize("name", ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"])
def test_only_the_first_process_shows_and_writes_whatever_has_started_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_warned", [])  # of earlier commands in this process
    assert launched.process() == 0
    monkeypatch.setenv(name, "1")
    assert launched.process() == 1
    _show_run({}, as_json=True)
    error_line("late")
    assert capsys.readouterr() == ("", "error: process 1: late\n")
    monkeypatch.setenv("RANK", "0")
    _show_run({}, as_json=True)
    assert capsys.readouterr().out == "{}\n"


@pytest.mark.slow
def test_a_run_that_mpi_starts_is_shown_once(tmp_path: Path) -> None:
    mpi = {"RANK": "OMPI_COMM_WORLD_RANK", "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
           "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK", "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE"}  # fmt: skip

    def call() -> int:
        for name, other in mpi.items():
            os.environ[other] = os.environ.pop(name)
        return main(["compress", "lenet5", "--data", "digits", "--data-option", "train_size=200", "--baseline",
                     "epochs=1", "--method", "l1", "--macs", "0.3", "--set", "device=cpu", "--set", "rounds=1",
                     "--set", "final_epochs=1", "--run-dir", str(tmp_path / "run"), "--quiet"])  # fmt: skip

    assert launch(call, tmp_path, 2) == [0, 0], told(tmp_path) + told(tmp_path, 1)
    assert "accuracy, test set" in (tmp_path / "out-0").read_text()
    assert (tmp_path / "out-1").read_text() == told(tmp_path, 1) == ""
    assert json.loads((tmp_path / "run" / "config.json").read_text())["machine"]["processes"] == 2


@pytest.mark.slow
def test_one_process_finds_and_tells_and_all_agree(tmp_path: Path) -> None:
    def call() -> None:
        runtime = stages.accelerator("cpu")
        found: list[Any] = [processes.told(runtime, lambda: f"by {rank()}"), processes.agreed(runtime, lambda: rank())]
        for fails in (lambda: True, lambda: rank() == 1):
            try:
                processes.agreed(runtime, lambda fails=fails: _fail() if fails() else 5)  # type: ignore[misc]
            except (PlanError, RunError) as error:
                found.append(f"{type(error).__name__}: {error}")
        found.append(list(processes.share(runtime, range(5))))
        found.append(float(processes.summed(runtime, torch.tensor(float(rank() + 1)))))
        layer = nn.BatchNorm2d(2)
        for held in layer.state_dict().values():
            held.fill_(rank())
        processes.equalise(runtime, layer)
        found += [float(held.sum()) for held in layer.state_dict().values()][:2]
        print(json.dumps(found))  # noqa: T201

    assert launch(call, tmp_path, 2) == [0, 0], told(tmp_path) + told(tmp_path, 1)
    first, second = (json.loads((tmp_path / f"out-{n}").read_text()) for n in (0, 1))
    assert first == ["by 0", 0, "PlanError: from 0", [0, 2], 3.0, 0.0, 0.0]
    assert second == ["by 0", 0, "PlanError: from 0", "RunError: process 1: from 1", [1, 3], 3.0, 0.0, 0.0]


def _fail() -> int:
    raise PlanError(f"from {rank()}")


@pytest.mark.slow
def test_what_is_not_trained_is_the_same_in_two_processes_bit_by_bit(network: nn.Module, tmp_path: Path) -> None:
    """Sensitivity, the first plan and least squares look at the same images, however many processes there are."""
    for number in (1, 2):
        place = tmp_path / str(number)

        def call(place: Path = place) -> None:
            compress(network, run_dir=place / "run", target=sc.Target(macs=0.5), final_epochs=0, rounds=1,
                     finetune_epochs=0, **DATA, **PLAIN)  # fmt: skip

        assert launch(call, place, number) == [0] * number, told(place)
    one, two = (tmp_path / str(n) / "run" for n in (1, 2))
    for name in ("sensitivity.json", "plan.json", "model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert outcome(one)["history"] == outcome(two)["history"]


@pytest.mark.slow
def test_both_processes_hold_one_network_to_its_last_buffer_and_go_on_in_another_number(
    network: nn.Module, tmp_path: Path
) -> None:
    class Stop(BaseException):
        pass

    def at(event: Any) -> None:
        if event.kind == "batch" and event.stage == "finetune" and event.round == 2:
            raise Stop

    def call() -> None:
        held: list[float] = []

        def epoch(event: Any) -> None:
            at(event)
            if event.kind == "epoch":
                held.append(event.record["loss"])

        try:
            compress(network, "l1", run_dir=tmp_path / "run", tolerance=100, max_rounds=2, progress=epoch,
                     finetune_epochs=1, **DATA, **PLAIN)  # fmt: skip
        except Stop:
            print(json.dumps(held))  # noqa: T201

    def again() -> None:
        from secateur.cli.console import log_lines

        with log_lines():
            result = resume(tmp_path / "run", Small(), **DATA)
        values = [v.double().sum() for v in result.model.state_dict().values()]
        print(json.dumps([float(v) for v in values]))  # noqa: T201

    assert launch(call, tmp_path / "a", 2) == [0, 0], told(tmp_path / "a")
    losses = [(tmp_path / "a" / f"out-{n}").read_text() for n in (0, 1)]
    assert losses[0] == losses[1] != "[]\n"
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    assert launch(again, tmp_path / "b", 2) == [0, 0], told(tmp_path / "b")
    values = [(tmp_path / "b" / f"out-{n}").read_text() for n in (0, 1)]
    assert values[0] == values[1]
    assert "processes" not in told(tmp_path / "b")
    shutil.rmtree(tmp_path / "run")
    shutil.move(tmp_path / "kept", tmp_path / "run")
    assert launch(again, tmp_path / "c") == [0], told(tmp_path / "c")
    assert "goes on in 1 processes, 2 before: a step of training takes a batch from each" in told(tmp_path / "c")


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", [True, False])
def test_a_loss_that_one_process_alone_sees_diverge_ends_the_round_in_both(
    network: nn.Module, tmp_path: Path, tolerance: bool
) -> None:
    whole = stages.Stage._step

    def step(self: stages.Stage, *given: Any) -> torch.Tensor:
        return whole(self, *given) * (math.nan if self.number == 2 and rank() == 1 else 1)

    def call() -> int:
        stages.Stage._step = step  # type: ignore[method-assign]
        goal: dict[str, Any] = {"tolerance": 100} if tolerance else {"target": sc.Target(macs=0.7)}
        try:
            compress(network, "l1", run_dir=tmp_path / "run", phases=(1,), finetune_epochs=1, max_rounds=3,
                     **goal, **DATA, **PLAIN)  # fmt: skip
        except RunError as error:
            print(error)  # noqa: T201
            return 1
        return 0

    statuses = launch(call, tmp_path, 2)
    # The first to fail has the other ended, which may be before its line.
    assert (statuses == [0, 0]) if tolerance else ({1} <= set(statuses) <= {1, -signal.SIGTERM}), told(tmp_path)
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    if tolerance:
        assert [r["accepted"] for r in history][:2] == [True, False]
        assert "is nan" in history[1]["diverged"]
    else:
        said = (tmp_path / "out-0").read_text() + (tmp_path / "out-1").read_text()
        assert "is nan" in said
        assert "The last accepted network is kept" in said
        assert "is nan" in json.loads((tmp_path / "run" / "result.json").read_text())["ended"]["error"]
        assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["an error in training", "an error in evaluation", "SIGKILL"])
def test_a_process_that_fails_alone_stops_all(network: nn.Module, tmp_path: Path, how: str) -> None:
    whole, bad = stages.Stage._step, VALIDATION.y.clone()
    bad[100:] = 10  # of the second batch, which the second process measures

    def step(self: stages.Stage, *given: Any) -> torch.Tensor:
        if rank() == 1 and self.number == 1:
            if how == "SIGKILL":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UsageError("this process alone")
        return whole(self, *given)

    def call() -> int:
        data = dict(DATA)
        if how == "an error in evaluation":
            data["validation"] = Batches(VALIDATION.x, bad, 100)
        else:
            stages.Stage._step = step  # type: ignore[method-assign]
        try:
            compress(network, "l1", run_dir=tmp_path / "run", tolerance=100, max_rounds=2, **data, **PLAIN)
        except (sc.SecateurError, RuntimeError) as error:
            error_line(f"{type(error).__name__}: {error}")
            return 1
        return 0

    began = time.monotonic()
    statuses = launch(call, tmp_path, 2)
    assert time.monotonic() - began < 60
    assert statuses[1] == (-signal.SIGKILL if how == "SIGKILL" else 1), told(tmp_path, 1)
    assert statuses[0] in (1, -signal.SIGTERM)
    assert told(tmp_path) in ("", "error: RunError: another process of this run has ended; its own line says why.\n")
    if how != "SIGKILL":
        said = "this process alone" if "training" in how else "labels run from 10 to 10"
        assert said in told(tmp_path, 1)
        assert told(tmp_path, 1).startswith("error: process 1: ")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_a_process_that_reads_images_holds_no_lock(tmp_path: Path) -> None:
    """A worker outlives a killed run by seconds, in which the run can be gone on with."""
    begun, begins = os.pipe()
    with RunDirectory(tmp_path):
        worker = os.fork()
        if worker == 0:
            os.write(begins, b"x")
            time.sleep(60)
            os._exit(0)
        os.read(begun, 1)
    try:
        with RunDirectory(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


@pytest.mark.slow
def test_distillation_in_two_processes_ends_within_half_a_point_of_one(tmp_path: Path) -> None:
    """With half the batch size, so that a step of training sees as many images."""
    train, _, _ = digits(400)
    images, classes = (torch.cat([getattr(part, n) for part in (VALIDATION, TEST)]) for n in ("x", "y"))
    model, ends = trained(epochs=16), []
    for number in (1, 2):

        def call(number: int = number) -> None:
            batches = Batches(train.x, train.y, train.size // number, shuffle=True)
            result = compress(model, train=batches, validation=Batches(images, classes, 100),
                              target=sc.Target(macs=0.4), final_epochs=4, lr=0.01, **PLAIN)  # fmt: skip
            print(json.dumps(result.report["final"]["validation"]))  # noqa: T201

        assert launch(call, tmp_path, number) == [0] * number, told(tmp_path)
        ends.append(json.loads((tmp_path / "out-0").read_text().splitlines()[-1]))
    assert ends[0] > 0.5
    assert abs(ends[0] - ends[1]) <= 0.005


@pytest.mark.slow
def test_a_detector_in_two_processes_is_trained_and_measured_on_all_images_once(tmp_path: Path) -> None:
    """Losses of images are averaged, norms are frozen and images have one size: both numbers train alike by law."""
    torch.manual_seed(0)
    model, loss, metric = detectors.frozen_retinanet(), DetectionLoss(), MeanAveragePrecision()
    alike = [index for index in range(240) if index % 2 and index % 3]  # of one size, with one or two boxes
    train, held = Subset(detectors.Squares(240), alike[:48]), Subset(detectors.Squares(240), alike[48:79])
    settings = TrainingSettings("adam", lr=1e-3, weight_decay=0.0, schedule="cosine")
    fit(model, DetectionBatches(train, 4, shuffle=True), epochs=40, loss=loss, settings=settings)
    found = []
    for number in (1, 2):

        def call(number: int = number) -> None:
            epochs: list[tuple[float, int]] = []

            def note(event: Any) -> None:
                if event.kind == "epoch":
                    epochs.append((event.record["loss"], event.record["images"]))

            # Eleven batches to measure on, which don't go round.
            result = compress(model, "l1", train=DetectionBatches(train, 4 // number, shuffle=True),
                              validation=DetectionBatches(held, 3), target=sc.Target(macs=0.2), rounds=1, lr=1e-3,
                              finetune_epochs=4, loss=loss, metric=metric, progress=note, **PLAIN)  # fmt: skip
            print(json.dumps([result.report["baseline"], result.report["final"], epochs]))  # noqa: T201

        place = tmp_path / str(number)
        assert launch(call, place, number) == [0] * number, told(place)
        found += [json.loads((place / f"out-{n}").read_text().splitlines()[-1]) for n in range(number)]
    (before, after, epochs), *others = found
    assert before["validation"] > 0.4
    assert after["validation"] > 0.3
    assert {images for _, images in epochs} == {48}
    for begun, ended, seen in others:
        assert (begun["validation"], begun["details"]) == (before["validation"], before["details"])
        assert abs(ended["validation"] - after["validation"]) <= 0.005
        assert [images for _, images in seen] == [48] * len(epochs)
        assert [value for value, _ in seen] == pytest.approx([value for value, _ in epochs], rel=1e-4)
