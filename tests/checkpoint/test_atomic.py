"""A file is the old one or the new one, whole, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.checkpoint import write_atomic, write_json
from secateur.errors import RunError, UsageError

ROOT = Path(__file__).parents[2]


def test_content_replaces_content_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "made" / "too" / "file.bin"
    write_atomic(path, b"old")
    write_atomic(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_on_the_way_leaves_the_old_file_whole(tmp_path, monkeypatch, step):
    path = tmp_path / "file.bin"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(RunError, match=r"file.bin: writing failed: No space left on device"):
        write_atomic(path, b"newer")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


KILLED = """
import os, pathlib, signal, sys, time
from secateur.checkpoint import write_atomic

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def write(path, moment):
    if moment == "before the disk has it":
        os.fsync = die
    elif moment == "before the rename":
        pathlib.Path.replace = die
    n = 0
    while True:
        n += 1
        write_atomic(path, bytes([n % 256]) * 300_000)

for moment in ("before the disk has it", "before the rename", "0.003", "0.02"):
    path = pathlib.Path(sys.argv[1]) / moment / "file.bin"
    write_atomic(path, b"old" * 100_000)
    child = os.fork()
    if not child:
        write(path, moment)
    if moment[0] == "0":
        time.sleep(float(moment))
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_a_whole_file_and_the_next_write_tidies_up(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    assert [int(status) for status in done.stdout.split()] == [-signal.SIGKILL] * 4
    for folder in tmp_path.iterdir():
        path = folder / "file.bin"
        content = path.read_bytes()
        assert len(content) == 300_000
        if folder.name.startswith("before"):
            assert content == b"old" * 100_000
            assert len(os.listdir(folder)) == 2, "the writer was killed on its way"
        assert len(set(content)) == 1 or content == b"old" * 100_000
        write_atomic(path, b"later")
        assert path.read_bytes() == b"later"
        assert os.listdir(folder) == ["file.bin"]


def test_files_of_living_writers_are_left_alone(tmp_path):
    import socket

    path = tmp_path / "file.bin"
    host = socket.gethostname().partition(".")[0]
    other = tmp_path / f".file.bin.{host}.{os.getppid()}-1.partial"
    foreign = tmp_path / ".file.bin.elsewhere.1-1.partial"
    dead = tmp_path / f".file.bin.{host}.999999999-1.partial"
    for file in (other, foreign, dead):
        file.write_bytes(b"x")
    write_atomic(path, b"new")
    assert other.exists()
    assert foreign.exists()
    assert not dead.exists()


def test_permissions_follow_the_old_file_or_the_process(tmp_path):
    path = tmp_path / "file.bin"
    mask = os.umask(0o027)
    try:
        write_atomic(path, b"1")
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o604)
        write_atomic(path, b"2")
        assert path.stat().st_mode & 0o777 == 0o604
    finally:
        os.umask(mask)


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_a_place_that_cannot_be_written_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below", tmp_path / "folder", Path("/proc/nothing")):
        with pytest.raises((UsageError, RunError), match=f"{path}: "):
            write_atomic(path, b"x")
    with pytest.raises(UsageError, match="can't be written"):
        write_atomic(tmp_path / "folder", b"x")
    assert os.listdir(tmp_path / "folder") == []


def test_json_is_readable_and_strict(tmp_path):
    path = tmp_path / "value.json"
    value = {"b": [1, 2.5, None, "é"], "a": {}}
    write_json(path, value)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "é" in text
    assert text.endswith("}\n")
    for bad, error in (({"x": float("nan")}, ValueError), ({"x": object()}, TypeError)):
        with pytest.raises(error):
            write_json(path, bad)
    assert json.loads(path.read_text(encoding="utf-8")) == value
