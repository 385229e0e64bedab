"""Runs that train their network first: killed in the middle of that, and sharing it with runs that ask alike.

``python -m tests.runfile.test_baselines FOLDER PART KIND:N ...`` is the run that is killed, in a process of its own;
PART is ``whole``, or ``baseline`` for what comes before the compression; each KIND:N is an attempt, and where it dies.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import checkpoint
from secateur.checkpoint import locks
from secateur.engine import RunDirectory
from secateur.engine.events import Steps
from secateur.errors import UsageError
from secateur.runfile import config, configured_run
from secateur.runfile.config import RunConfig
from secateur.training import baseline, stages
from tests.conftest import collect_no_garbage

ROOT = Path(__file__).resolve().parents[2]

VALUES: dict[str, Any] = {
    "model": "lenet5",
    "model_options": {"widths": [4, 6], "hidden": 8},
    "data": "digits",
    "data_options": {"size": 16, "train_size": 300},
    "target": {"macs": 0.3},
    "settings": {"device": "cpu", "max_rounds": 1, "optimise_epochs": 0, "finetune_epochs": 1, "fraction": 0.2},
    "baseline": {"epochs": 3, "lr": 0.02},
}


class Quiet(Steps):
    """Shows nothing, and calls a function at each batch of the baseline."""

    def __init__(self, on_batch: Any = None) -> None:
        self.on_batch = on_batch

    def __call__(self, step: str, done: int, total: int | None = None, note: str = "") -> None:
        if step == "training the baseline" and self.on_batch is not None:
            self.on_batch()

    def step(self, name: str) -> Any:
        from contextlib import nullcontext

        return nullcontext()


def request(folder: Path, **more: Any) -> RunConfig:
    return config.build({**VALUES, "run_dir": str(folder), **more})


def attempt(folder: Path, on_batch: Any = None) -> None:
    """Start the run, or go on with it, as a queue of commands does."""
    if (folder / config.FILE).is_file():
        configured_run.go_on(folder, Quiet(on_batch))
    else:
        configured_run.start(request(folder), Quiet(on_batch))


def doomed(folder: Path, kind: str, number: int) -> None:
    """Die at a batch of the baseline, or as a file is written, before or after it takes its name."""
    replace, count = os.replace, [0]

    def die() -> None:
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_replace(*names: Any, **options: Any) -> None:
        if kind == "write":
            die()
        replace(*names, **options)
        if kind == "written":
            die()

    os.replace = dying_replace
    attempt(folder, die if kind == "batch" else None)
    os._exit(0)


def only_kept(model: Any, *_: Any, run_dir: RunDirectory, **__: Any) -> None:
    """Stand in for the compression: write down what it would have begun with."""
    folder = run_dir.path
    checkpoint.save(model, None, folder / "baseline.safetensors")
    checkpoint.save(model, None, folder / "model.safetensors")
    checkpoint.write_json(folder / "result.json", {})


def main(folder: Path, part: str, places: list[str]) -> None:
    """Run to the end in one folder; in another, be killed some times first. Prints how often that was."""
    torch.set_num_threads(1)
    collect_no_garbage()
    if part == "baseline":
        configured_run.compress = only_kept  # type: ignore[assignment]
    attempt(folder / "one" / "whole")
    died = 0
    for place in places:
        kind, _, number = place.partition(":")
        child = os.fork()
        if child == 0:
            doomed(folder / "two" / "killed", kind, int(number))
        _, status = os.waitpid(child, 0)
        died += os.WIFSIGNALED(status)
    if not (folder / "two" / "killed" / "result.json").is_file():
        attempt(folder / "two" / "killed")
    sys.stdout.write(json.dumps({"died": died}) + "\n")


PLACES = [
    "batch:5",  # in the second epoch, of three batches each
    "write:4",  # after run.yaml, the lines of the first epoch and its state's new name: before the second's state
    "write:4",  # after run.yaml, the lines of the first epoch and the second's state: before the lines of the second
    "written:4",  # after run.yaml, the lines, the second state's new name and the last epoch's state
    "write:3",  # before the finished network takes its name
    "written:3",  # after it did, before the state that led to it is cleared away
]


def anywhere(seed: int) -> list[str]:
    draw = random.Random(seed)
    kinds = {"batch": 9, "write": 8, "written": 8}
    return [f"{kind}:{draw.randrange(1, kinds[kind])}" for kind in draw.choices([*kinds], k=6)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "places"),
    [("baseline", PLACES), *(("whole", anywhere(seed)) for seed in range(3))],
)
def test_killed_in_the_baseline_the_run_ends_in_the_same_bits(tmp_path: Path, part: str, places: list[str]) -> None:
    command = [sys.executable, "-m", "tests.runfile.test_baselines", str(tmp_path), part, *places]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    died = json.loads(done.stdout.splitlines()[-1])["died"]
    assert died == len(PLACES) if places is PLACES else died >= 2
    whole, cut = tmp_path / "one" / "whole", tmp_path / "two" / "killed"
    for name in ("baseline.safetensors", "model.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    assert not (cut / "checkpoint" / "baseline.safetensors").exists()
    lines = (cut / "checkpoint" / "baseline.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


@pytest.fixture
def handed_on(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Return a list to which each run adds its baseline's fingerprint and record, in place of going on."""
    found: list[tuple[str, dict[str, Any]]] = []

    def compress(model: Any, *_: Any, describe: dict[str, Any], **__: Any) -> None:
        found.append((baseline.fingerprint(model), describe["baseline"]))

    monkeypatch.setattr(configured_run, "compress", compress)
    return found


def test_runs_that_ask_alike_share_one_baseline(
    tmp_path: Path, handed_on: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = request(tmp_path / "first", baseline={"epochs": 1, "lr": 0.02})
    configured_run.start(first, Quiet())
    monkeypatch.setattr(baseline, "train", lambda *_, **__: pytest.fail("the baseline was trained again"))
    second = first.model_copy(update={"run_dir": str(tmp_path / "second"), "method": "l1"})
    configured_run.start(second, Quiet())
    (one, told), (other, again) = handed_on
    assert one == other
    assert Path(told["file"]).parent == tmp_path / "baselines"
    assert (told["trained_here"], again) == (True, {"file": told["file"], "trained_here": False})
    assert checkpoint.read_header(told["file"]).extra["request"]["baseline"]["epochs"] == 1


def test_of_runs_that_begin_at_once_one_trains_and_the_others_wait(
    tmp_path: Path, handed_on: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = request(tmp_path / "first", baseline={"epochs": 1, "lr": 0.02})
    configured_run.start(first, Quiet())
    file, waited = Path(handed_on[0][1]["file"]), []
    held = ExitStack()
    assert locks.lock(file.with_suffix(".lock"), held)  # by a run that is still training
    file.rename(tmp_path / "untold")

    class Waiting(Quiet):
        def __call__(self, step: str, *_: Any, **__: Any) -> None:
            if step == "waiting for the baseline":
                waited.append(step)
                if len(waited) == 2:
                    (tmp_path / "untold").rename(file)
                    held.close()

    monkeypatch.setattr(configured_run, "PAUSE", 0.01)
    monkeypatch.setattr(baseline, "train", lambda *_, **__: pytest.fail("the baseline was trained again"))
    configured_run.start(first.model_copy(update={"run_dir": str(tmp_path / "second")}), Waiting())
    (one, _), (other, again) = handed_on
    assert one == other
    assert (len(waited), again) == (2, {"file": str(file), "trained_here": False})
    assert list(file.parent.iterdir()) == [file]


def test_a_lock_lets_in_whoever_comes_where_there_can_be_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with ExitStack() as held, ExitStack() as late:
        assert locks.lock(tmp_path / "file" / "lock", held)  # below a file
        assert locks.lock(tmp_path / "new" / "lock", held)
        assert not locks.lock(tmp_path / "new" / "lock", late)
    with ExitStack() as held:
        assert locks.lock(tmp_path / "new" / "lock", held)
    assert list((tmp_path / "new").iterdir()) == []


CHANGES: list[dict[str, Any]] = [
    {"seed": 1},
    {"baseline": {"epochs": 1, "lr": 0.03}},
    {"batch_size": 64},
    {"data_options": {"size": 16, "train_size": 300, "seed": 1}},
    {"model_options": {"widths": [6, 10], "hidden": 8}},
    {"settings": {**VALUES["settings"], "precision": "bf16"}},
    {"settings": {**VALUES["settings"], "channels_last": False}},
]


def test_every_difference_makes_another_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    class EnoughError(Exception):
        pass

    def note(model: Any, batches: Any, file: Path, request: dict[str, Any], **_: Any) -> None:
        asked.append(request)
        raise EnoughError

    monkeypatch.setattr(baseline, "train", note)
    for number, change in enumerate([{}, *CHANGES]):
        with pytest.raises(EnoughError):
            configured_run.start(request(tmp_path / str(number), **change), Quiet())
    assert len({baseline.file_name(a) for a in asked}) == len(CHANGES) + 1


def test_what_the_users_code_makes_is_not_shared(tmp_path: Path, handed_on: list[Any]) -> None:
    (tmp_path / "net.py").write_text(
        "from secateur.models import lenet5\n\ndef build(**options):\n    return lenet5(**options, in_size=16)\n"
    )
    run = request(tmp_path / "run", model=f"{tmp_path / 'net.py'}:build", baseline={"epochs": 1})
    configured_run.start(run, Quiet())
    assert Path(handed_on[0][1]["file"]).parent == tmp_path / "run" / "checkpoint"
    assert not (tmp_path / "baselines").exists()


def test_a_folder_of_ones_own_for_baselines(tmp_path: Path, handed_on: list[Any]) -> None:
    configured_run.start(request(tmp_path / "run", baselines=str(tmp_path / "mine"), baseline={"epochs": 1}), Quiet())
    assert [str(p) for p in (tmp_path / "mine").iterdir()] == [handed_on[0][1]["file"]]
    assert config.load(tmp_path / "run" / config.FILE).baselines == str(tmp_path / "mine")


def test_another_request_leaves_a_baseline_under_way_as_it_is(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    count = [0]

    def stop() -> None:
        count[0] += 1
        if count[0] == 4:
            raise Killed

    with pytest.raises(Killed):
        configured_run.start(request(tmp_path / "run"), Quiet(stop))
    before = (tmp_path / "run" / config.FILE).read_text()
    with pytest.raises(UsageError, match="a baseline is under way here with seed 0, and 1 is asked for"):
        configured_run.start(request(tmp_path / "run", seed=1), Quiet())
    assert (tmp_path / "run" / config.FILE).read_text() == before


def test_the_baseline_goes_on_in_the_precision_that_it_began_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    ways: list[Any] = []
    stage = stages.Stage.__init__

    def noting(self: Any, *args: Any, **options: Any) -> None:
        ways.append((options["arithmetic"].precision, options["arithmetic"].channels_last))
        stage(self, *args, **options)

    def stop() -> None:
        raise Killed

    monkeypatch.setattr(baseline.Stage, "__init__", noting)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    with pytest.raises(Killed):
        configured_run.start(request(tmp_path / "run"), Quiet(stop))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(Killed):
        configured_run.go_on(tmp_path / "run", Quiet(stop))
    assert ways == [("bf16", True)] * 2


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
