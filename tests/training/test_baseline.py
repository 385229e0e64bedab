"""The baseline's training goes on after any epoch, ends in the bits of the uninterrupted one, and is shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secateur.cli.console import log_lines
from secateur.errors import CheckpointError, UsageError
from secateur.training import baseline, stages
from secateur.training.arithmetic import Arithmetic
from secateur.training.stages import TrainingSettings, fit
from tests.engine.launching import launch
from tests.engine.nets import Small, digits

REQUEST = {"model": "small", "seed": 3}


def fresh(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Small()


class Killed(BaseException):
    pass


def trained(file: Path, stop_after: int | None = None, **options: Any) -> nn.Module:
    """Train for four epochs; with ``stop_after``, until that many batches of this call are done."""
    model, count = fresh(), 0

    def on_batch(done: int, total: int | None, loss: float) -> None:
        nonlocal count
        count += 1
        if count == stop_after:
            raise Killed

    baseline.train(
        model, digits(200)[0], file, options.pop("request", REQUEST), epochs=4, seed=3, on_batch=on_batch,
        settings=options.pop("settings", TrainingSettings(nesterov=True, schedule="cosine", warmup=0.2)), **options,
    )  # fmt: skip
    return model


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        (TrainingSettings(nesterov=True, schedule="cosine", warmup=0.2), Arithmetic()),
        (TrainingSettings(optimizer="adamw", lr=1e-3, schedule="linear"), Arithmetic("bf16", channels_last=True)),
    ],
)
def test_stopped_in_any_epoch_the_end_is_that_of_fit(
    tmp_path: Path, settings: TrainingSettings, way: Arithmetic
) -> None:
    whole, file = fresh(), tmp_path / "training.safetensors"
    fit(whole, digits(200)[0], epochs=4, seed=3, settings=settings, arithmetic=way)
    for stop in (3, 6, 5):  # batches, five an epoch: in the first epoch, in the second, at the end of the second
        with pytest.raises(Killed):
            trained(file, stop, settings=settings, arithmetic=way)
    done = trained(file, settings=settings, arithmetic=way)
    assert baseline.fingerprint(done) == baseline.fingerprint(whole)
    lines = file.with_suffix(".jsonl").read_text().splitlines()
    assert [f'"epoch": {n}, "loss": ' in line for n, line in enumerate(lines, 1)] == [True] * 4


@pytest.mark.slow
def test_a_training_that_goes_on_in_another_number_of_processes_says_so(tmp_path: Path) -> None:
    file = tmp_path / "training.safetensors"

    def part(stop_after: int | None = 4) -> nn.Module | None:  # two batches an epoch and process
        runtime = stages.accelerator("cpu")
        try:
            return trained(file, stop_after, runtime=runtime, write=runtime.is_main_process)
        except Killed:
            return None

    def rest() -> None:
        with log_lines():
            done = part(None)
        assert done is not None
        print(baseline.fingerprint(done))  # noqa: T201

    assert launch(lambda: part() and 1, tmp_path / "a", 2) == [0, 0], (tmp_path / "a" / "err-0").read_text()
    kept, said = file.read_bytes(), f"warning: baseline: {file}: goes on in 1 processes, 2 before"
    assert launch(rest, tmp_path / "b", 2) == [0, 0], (tmp_path / "b" / "err-0").read_text()
    ends = {(tmp_path / "b" / f"out-{n}").read_text() for n in (0, 1)}
    assert len(ends) == 1
    assert (tmp_path / "b" / "err-0").read_text() == ""
    file.write_bytes(kept)
    baseline.before(file).unlink(missing_ok=True)
    assert launch(rest, tmp_path / "c") == [0]
    assert (tmp_path / "c" / "err-0").read_text().startswith(said)
    assert (tmp_path / "c" / "out-0").read_text() not in ends


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    file = tmp_path / "training.safetensors"
    first = trained(file)
    assert baseline.fingerprint(trained(file, 1)) == baseline.fingerprint(first)


def test_another_training_in_the_same_place_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "training.safetensors"
    with pytest.raises(Killed):
        trained(file, 6)
    before = file.read_bytes()
    with pytest.raises(UsageError, match=r"a baseline is under way here with seed 3, and 4 is asked for; .* remove"):
        trained(file, request={**REQUEST, "seed": 4})
    assert file.read_bytes() == before
    file.write_bytes(before[:100])
    with pytest.raises(CheckpointError, match="damaged, or not a training under way"):
        trained(file)


def test_what_is_kept_is_found_by_its_request_alone(tmp_path: Path) -> None:
    model, file = fresh(), tmp_path / baseline.file_name(REQUEST)
    assert baseline.kept(fresh(1), file, REQUEST) is None
    baseline.keep(model, file, REQUEST, [])
    found = baseline.kept(fresh(1), file, REQUEST)
    assert found is not None
    assert baseline.fingerprint(found) == baseline.fingerprint(model)
    assert baseline.file_name({**REQUEST, "seed": 4}) != file.name
    with pytest.raises(CheckpointError, match="holds no network trained as this run asks"):
        baseline.kept(fresh(1), file, {**REQUEST, "seed": 4})


def test_the_fingerprint_tells_one_bit_a_type_and_a_name() -> None:
    model = fresh()
    before = baseline.fingerprint(model)
    assert before == baseline.fingerprint(fresh())
    with torch.no_grad():
        model.get_parameter("conv1.weight")[0, 0, 0, 0] += 1e-6
    assert baseline.fingerprint(model) != before
    assert baseline.fingerprint(fresh().double()) != before
    assert baseline.fingerprint(nn.Sequential(fresh())) != before
