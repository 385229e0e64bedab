"""What disks, rights and locks do to a command: one line that says so, and whatever was stored before is there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import checkpoint
from secateur.cli.commands import main
from secateur.engine import RunDirectory
from secateur.engine.rundir import NO_LOCKS
from secateur.models import lenet5
from secateur.runfile import configured_run
from tests.conftest import collect_no_garbage
from tests.engine.launching import launch
from tests.faults import places

MODEL = ["lenet5", "--model-option", "widths=[4, 6]", "--model-option", "hidden=8"]
RUN = [
    "compress", *MODEL, "--data", "digits", "--data-option", "size=16", "--data-option", "train_size=100",
    "--method", "cfp", "--set", "device=cpu", "--set", "optimise_epochs=0", "--set", "finetune_epochs=1",
    "--set", "max_rounds=2", "--baseline", "epochs=1", "--tolerance", "100", "--quiet", "--json",
]  # fmt: skip
Fault = Callable[[Path, Path], Iterator[list[str]]]
"""Of a run that was stopped and a file of a network: makes the fault, yields the command, and takes the fault away."""
ROWS: list[Any] = []


def row(status: int, text: str) -> Callable[[Fault], Fault]:
    """Enter a fault with the status that the command ends in, and what its line says."""

    def enter(fault: Fault) -> Fault:
        ROWS.append(pytest.param(fault, status, text, id=fault.__name__.replace("_", " ").strip()))
        return fault

    return enter


def full(run: Path, network: Path, leave: int, options: str = "size=600k") -> Path:
    """Move run and network to a file system of their own, with little left; return what fills it."""
    disk = run.parent / "disk"
    disk.mkdir()
    places.own_file_system(disk, options)
    for path in (run, network):
        shutil.move(path, disk)
        path.symlink_to(disk / path.name)
    return places.fill(disk, leave)


def prune(out: Path) -> list[str]:
    return ["prune", *MODEL, "--channels", "0.5", "--out", str(out)]


@row(1, "No space left on device")
def _the_disk_is_full_when_a_state_is_stored(run: Path, network: Path) -> Iterator[list[str]]:
    filler = full(run, network, 8192)
    yield ["resume", str(run)]
    filler.unlink()


@row(1, "No space left on device")
def _the_disk_is_full_when_a_run_begins(run: Path, network: Path) -> Iterator[list[str]]:
    filler = full(run, network, 4096)
    yield [*RUN, "--run-dir", str(run.parent / "disk" / "other")]
    filler.unlink()


@row(2, "No space left on device")
def _there_is_no_inode_left(run: Path, network: Path) -> Iterator[list[str]]:
    filler = full(run, network, 65536, "size=600k,nr_inodes=20")
    taken = [filler.with_name(f"taken{i}") for i in range(20)]
    try:
        for file in taken:
            file.touch()
    except OSError:
        pass
    yield [*RUN, "--run-dir", str(run.parent / "disk" / "other")]
    filler.unlink()
    for file in taken:
        file.unlink(missing_ok=True)


@row(2, "Read-only file system")
def _the_file_system_is_read_only(run: Path, network: Path) -> Iterator[list[str]]:
    full(run, network, 65536).unlink()
    places.change_file_system(run.parent / "disk", "", read_only=True)
    yield ["resume", str(run)]
    places.change_file_system(run.parent / "disk", "")


@row(1, "File too large")
def _a_file_may_not_grow(run: Path, network: Path) -> Iterator[list[str]]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield ["resume", str(run)]
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@row(2, "can't be written: Permission denied")
def _the_run_directory_is_closed(run: Path, network: Path) -> Iterator[list[str]]:
    places.without_rights_of_root()
    (run / "checkpoint").chmod(0o555)
    yield ["resume", str(run)]
    (run / "checkpoint").chmod(0o755)


@row(2, "can't be used as a run directory: Permission denied")
def _the_folder_of_run_directories_is_closed(run: Path, network: Path) -> Iterator[list[str]]:
    places.without_rights_of_root()
    closed = run.parent / "closed"
    closed.mkdir(0o555)
    yield [*RUN, "--run-dir", str(closed / "run")]


@row(2, "can't be used as a run directory: Permission denied")
def _the_run_directory_is_another_users(run: Path, network: Path) -> Iterator[list[str]]:
    if os.geteuid():
        raise places.CanNotError("chown")
    lock = run / "checkpoint" / "lock"
    os.chown(lock, 1234, 1234)
    lock.chmod(0o600)
    places.without_rights_of_root()
    yield ["resume", str(run)]
    os.rename(lock, lock.with_name("others"))


@row(2, "can't be used as a run directory: Not a directory")
def _the_run_directory_is_a_file(run: Path, network: Path) -> Iterator[list[str]]:
    yield [*RUN, "--run-dir", str(network)]


@row(2, "can't be used as a run directory: File exists")
def _checkpoint_is_a_file(run: Path, network: Path) -> Iterator[list[str]]:
    other = run.parent / "other"
    other.mkdir()
    (other / "checkpoint").touch()
    yield [*RUN, "--run-dir", str(other)]


@row(2, "can't be used as a run directory: Is a directory")
def _the_lock_is_a_folder(run: Path, network: Path) -> Iterator[list[str]]:
    lock = run / "checkpoint" / "lock"
    lock.unlink()
    lock.mkdir()
    yield ["resume", str(run)]
    lock.rmdir()


@row(1, "another process is running here")
def _the_lock_is_held(run: Path, network: Path) -> Iterator[list[str]]:
    with RunDirectory(run):
        yield ["resume", str(run)]


@row(1, "this file system has no locks (No locks available)")
def _the_file_system_has_no_locks(run: Path, network: Path) -> Iterator[list[str]]:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl.flock = none
    yield ["resume", str(run)]
    os.environ[NO_LOCKS] = "1"


@row(1, "the run's folder is gone")
def _the_run_directory_vanishes_under_the_run(run: Path, network: Path) -> Iterator[list[str]]:
    kept, whole = run.with_name("kept"), RunDirectory.store

    def store(self: RunDirectory, *given: Any) -> None:
        if run.is_dir():
            run.rename(kept)
        whole(self, *given)

    RunDirectory.store = store  # type: ignore[method-assign]
    yield ["resume", str(run)]
    RunDirectory.store = whole  # type: ignore[method-assign]
    shutil.rmtree(run, ignore_errors=True)
    kept.rename(run)


@row(0, "")
def _the_last_renaming_was_interrupted(run: Path, network: Path) -> Iterator[list[str]]:
    (run / "checkpoint" / "state.safetensors").rename(run / "checkpoint" / "state-before.safetensors")
    (run / "checkpoint" / ".state.safetensors.host.1-1.partial").write_bytes(b"half")
    yield ["resume", str(run), "--quiet", "--json"]


@row(1, "state.safetensors")
def _the_state_can_not_be_read(run: Path, network: Path) -> Iterator[list[str]]:
    places.without_rights_of_root()
    states = list((run / "checkpoint").glob("state*"))
    for state in states:
        state.chmod(0)
    yield ["resume", str(run)]
    for state in states:
        state.chmod(0o644)


@row(2, "run.yaml: can't be read")
def _the_run_file_can_not_be_read(run: Path, network: Path) -> Iterator[list[str]]:
    places.without_rights_of_root()
    (run / "run.yaml").chmod(0)
    yield ["resume", str(run)]
    (run / "run.yaml").chmod(0o644)


@row(1, "No space left on device")
def _the_disk_is_full_when_a_network_is_saved_over_another(run: Path, network: Path) -> Iterator[list[str]]:
    full(run, network, 0)
    yield prune(network)


@row(2, "can't be written")
def _a_network_goes_to_a_closed_folder(run: Path, network: Path) -> Iterator[list[str]]:
    places.without_rights_of_root()
    closed = run.parent / "closed"
    closed.mkdir(0o555)
    yield prune(closed / "small.safetensors")


@row(1, "File name too long")
def _the_name_of_a_file_is_too_long(run: Path, network: Path) -> Iterator[list[str]]:
    yield prune(run.parent / f"{'x' * 250}.safetensors")


@row(2, "can't be read")
def _the_weights_can_not_be_read(run: Path, network: Path) -> Iterator[list[str]]:
    places.without_rights_of_root()
    network.chmod(0)
    yield ["trace", *MODEL, "--weights", str(network)]
    network.chmod(0o644)


@row(1, "No space left on device")
def _the_disk_is_full_when_a_table_is_saved(run: Path, network: Path) -> Iterator[list[str]]:
    full(run, network, 0)
    data = ["--data", "digits", "--data-option", "size=16", "--data-option", "train_size=100"]
    yield ["sensitivity", *MODEL, *data, "--output", str(run.parent / "disk" / "table.json")]


@row(2, "No space left on device")
def _the_disk_is_full_when_a_network_is_exported(run: Path, network: Path) -> Iterator[list[str]]:
    full(run, network, 0)
    yield ["export", *MODEL, "--out", str(run.parent / "disk" / "network.onnx")]


@row(2, "No space left on device")
def _the_disk_is_full_when_a_report_is_written(run: Path, network: Path) -> Iterator[list[str]]:
    done = run.with_name("done")
    full(done, network, 8192)
    yield ["report", str(done), "--out", str(run.parent / "disk" / "report.html")]


@row(2, "can't be written (Permission denied)")
def _a_report_goes_to_a_closed_folder(run: Path, network: Path) -> Iterator[list[str]]:
    places.without_rights_of_root()
    closed = run.parent / "closed"
    closed.mkdir(0o555)
    yield ["report", str(run.with_name("done")), "--out", str(closed / "report.html")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run that was stopped in its second round, one that is done, and a network."""
    torch.set_num_threads(1)
    collect_no_garbage()
    folder = tmp_path_factory.mktemp("made")
    whole = configured_run.Show.__call__

    def stopping(self: configured_run.Show, event: Any) -> None:
        if event.kind == "batch" and event.round == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        whole(self, event)

    assert main([*RUN, "--run-dir", str(folder / "done")]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configured_run.Show, "__call__", stopping)
        assert main([*RUN, "--run-dir", str(folder / "run")]) == 143
    assert main(["prune", *MODEL, "--channels", "0.3", "--out", str(folder / "small.safetensors"), "--json"]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "status", "text"), ROWS)
def test_nothing_is_lost_and_one_line_says_what_is_wrong(
    made: Path, tmp_path: Path, fault: Fault, status: int, text: str
) -> None:
    for name in ("run", "done"):
        shutil.copytree(made / name, tmp_path / name)
    shutil.copy(made / "small.safetensors", tmp_path)
    run, network = tmp_path / "run", tmp_path / "small.safetensors"
    file = run / "run.yaml"
    file.write_text(file.read_text().replace(str(made), str(tmp_path)))

    def call() -> None:
        try:
            made_fault = fault(run, network)
            words = next(made_fault)
        except places.CanNotError as error:
            print(json.dumps({"can't": str(error)}))  # noqa: T201
            return
        ended = main(words)
        next(made_fault, None)
        os.dup2(os.open(tmp_path / "after", os.O_WRONLY | os.O_CREAT), 2)
        checkpoint.load(lenet5(widths=(4, 6), hidden=8), network)
        again = 0
        if status and str(run) in words:
            again = main(["resume", str(run), "--quiet"])
        if again == 0 and str(run) in words:
            checkpoint.load(lenet5(widths=(4, 6), hidden=8, in_size=16), run / "model.safetensors")
        RunDirectory(run).restore()
        left = [str(p) for p in tmp_path.rglob("*.partial") if ".host." not in p.name]
        os.write(1, json.dumps({"status": ended, "again": again, "left": left}).encode() + b"\n")

    logs = tmp_path / "logs"
    assert launch(call, logs) == [0], (logs / "err-0").read_text() + _text(tmp_path / "after")
    told = json.loads((logs / "out-0").read_text().splitlines()[-1])
    if "can't" in told:
        pytest.skip(f"not allowed here: {told}")
    lines = [line for line in (logs / "err-0").read_text().splitlines() if line.startswith("error: ")]
    assert told == {"status": status, "again": 0, "left": []}, (lines, _text(tmp_path / "after"))
    if status:
        assert len(lines) == 1, lines
        assert "Traceback" not in (logs / "err-0").read_text()
        assert text in lines[0]


def _text(file: Path) -> str:
    return file.read_text() if file.is_file() else ""
