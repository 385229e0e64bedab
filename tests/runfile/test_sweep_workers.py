"""A sweep done by two workers, one of which is killed in the middle: all trials are done, each once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import optuna
import pytest

from secateur.runfile import trials
from secateur.runfile.config import load
from secateur.runfile.storage import Storage
from tests import postgresql

TRIALS = 12
FILE = f"""
model: lenet5
model_options: {{widths: [4, 6], hidden: 8}}
data: digits
data_options: {{size: 16, train_size: 200}}
settings: {{device: cpu, rounds: 1, finetune_epochs: 2, final_epochs: 2, precision: fp32, channels_last: false}}
baseline: {{epochs: 3}}
search:
  space:
    method: [l1, l2, fpgm]
    target.macs: {{low: 0.2, high: 0.6}}
    settings.lr: {{low: 0.001, high: 0.1, log: true}}
  trials: {TRIALS}
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest) -> Iterator[str | None]:
    if request.param == "postgresql" and postgresql.programs() is None:
        pytest.skip("PostgreSQL's server is not installed: apt-get install postgresql")
    with postgresql.server() if request.param == "postgresql" else nullcontext() as url:
        yield url


@pytest.mark.slow
def test_a_killed_workers_trial_is_gone_on_with_and_every_trial_is_done_once(
    storage: str | None, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(FILE)
    folder = tmp_path / "sweep"
    words = [sys.executable, "-m", "secateur", "sweep", "run.yaml", "--sweep-dir", "sweep", "--heartbeat", "2", "-q"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    environment |= {} if storage is None else {"SECATEUR_STORAGE": storage}
    with (tmp_path / "said").open("w") as said:
        workers = [subprocess.Popen([*words, "--json"], cwd=tmp_path, env=environment, stdout=said) for _ in range(2)]
        try:
            left = workers[1 - _kill_in_a_trial(workers, folder)]
            assert left.wait(timeout=900) == 0
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    found = trials.read(folder)
    assert json.loads((tmp_path / "said").read_text())["trials"] == found.model_dump(mode="json")["trials"]
    assert [(trial.number, trial.state) for trial in found.trials] == [
        (trial.number, "complete") for trial in found.trials
    ]
    assert len(found.trials) == TRIALS
    assert max(trial.attempts for trial in found.trials) > 1
    assert (folder / "sweep.db").exists() == (storage is None)
    _require_front(found, folder)
    # The same command, given again, finds all done, and leaves it so.
    again = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert f"{TRIALS} of {TRIALS} trials: {TRIALS} complete" in again.stdout
    assert trials.read(folder).trials == found.trials


ALIKE = """
model: lenet5
model_options: {widths: [4, 6], hidden: 8}
data: digits
data_options: {size: 16, train_size: 200}
target: {macs: 0.4}
settings: {device: cpu, final_epochs: 1, precision: fp32, channels_last: false}
baseline: {epochs: 2}
search:
  space:
    settings.lr: {low: 0.001, high: 0.1, log: true}
  trials: 4
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_workers_that_begin_at_once_share_a_baseline_and_tables_and_end_as_runs_alone_do(
    storage: str | None, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(ALIKE)
    words = [sys.executable, "-m", "secateur", "sweep", "run.yaml", "--sweep-dir", "sweep", "--no-wait"]
    words += ["--heartbeat", "600"]  # nobody is taken for dead on a machine that is busy
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    environment |= {} if storage is None else {"SECATEUR_STORAGE": storage}
    workers = [
        subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    try:
        said = [worker.communicate(timeout=600)[1].decode() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0, 0], said
    folder = tmp_path / "sweep"
    found = trials.read(folder)
    assert [trial.state for trial in found.trials] == ["complete"] * 4
    assert len({trial.worker for trial in found.trials}) == 2
    # A table of all widths, and two finer ones around a plan's, of which the last may ask for the same: each once.
    with closing(Storage(storage or f"sqlite:///{folder / 'sweep.db'}", 600)) as opened:
        told = optuna.load_study(study_name="sweep", storage=opened.optuna).user_attrs
    kept = [key for key in told if key.startswith("sens")]
    assert 2 <= len(kept) <= 3
    assert sum(text.count("another trial's table serves this one, too") for text in said) == 4 * 3 - len(kept)
    assert {file.name for file in folder.rglob("*.lock")} <= {"sweep.db.lock"}
    configs = [json.loads((folder / trial.run / "config.json").read_text()) for trial in found.trials]
    assert sorted(config["baseline"]["trained_here"] for config in configs) == [False, False, False, True]
    for trial in found.trials[1:3]:
        alone = tmp_path / f"alone-{trial.number}"
        file = str(folder / trial.run / "run.yaml")
        run = [*words[:3], "compress", "--config", file, "--run-dir", str(alone), "--quiet"]
        subprocess.run(run, cwd=tmp_path, env=environment, check=True, capture_output=True)
        for name in ("sensitivity.json", "plan.json", "model.safetensors"):
            assert (alone / name).read_bytes() == (folder / trial.run / name).read_bytes(), name


def _kill_in_a_trial(workers: list[subprocess.Popen[bytes]], folder: Path) -> int:
    """Kill a worker while it is in a trial, after three have been completed; return which."""
    for _ in range(6000):
        assert all(worker.poll() is None for worker in workers)
        if (folder / trials.FILE).is_file():
            found = trials.read(folder)
            for place, worker in enumerate(workers):
                busy = [t for t in found.of("running") if (t.worker or "").endswith(f":{worker.pid}")]
                if len(found.of("complete")) >= 3 and busy and (folder / busy[0].run / "config.json").is_file():
                    worker.send_signal(signal.SIGKILL)
                    worker.wait()
                    return place
        time.sleep(0.05)
    raise AssertionError("no worker was ever in a trial")


def _require_front(found: trials.Trials, folder: Path) -> None:
    """Derive objectives and front again from the runs, each compared with each."""
    judged: dict[int, tuple[float, int]] = {}
    for trial in found.trials:
        run, result = folder / trial.run, json.loads((folder / trial.run / "result.json").read_text())
        judged[trial.number] = (result["final"]["validation"], result["final"]["macs"])
        assert trial.values == list(judged[trial.number])
        held: Any = load(run / "run.yaml")
        assert held.method == trial.parameters["method"]
        assert held.settings.lr == trial.parameters["settings.lr"]
        assert held.target.macs == trial.parameters["target.macs"]
    front = set(judged)
    for one, (accuracy, macs) in judged.items():
        for other, (better, fewer) in judged.items():
            if better >= accuracy and fewer <= macs and (better, fewer) != (accuracy, macs) and other != one:
                front.discard(one)
    assert {trial.number for trial in found.front} == front
