"""A file is the old one or the new one, whole, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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


WRITER = """
import os, signal, sys
from secateur.checkpoint import write_atomic
path, moment = sys.argv[1:]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "before the disk has it":
    os.fsync = die
elif moment == "before the rename":
    import pathlib
    pathlib.Path.replace = die
write_atomic(path, b"new" * 100_000)
"""


@pytest.mark.parametrize("moment", ["before the disk has it", "before the rename"])
def test_a_killed_writer_leaves_the_old_file_and_the_next_write_tidies_up(tmp_path, moment):
    path = tmp_path / "file.bin"
    write_atomic(path, b"old")
    done = subprocess.run([sys.executable, "-c", WRITER, str(path), moment], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 2, "the writer was killed on its way"
    write_atomic(path, b"later")
    assert path.read_bytes() == b"later"
    assert os.listdir(tmp_path) == ["file.bin"]


LOOP = """
import sys
from secateur.checkpoint import write_atomic
print("ready", flush=True)
n = 0
while True:
    n += 1
    write_atomic(sys.argv[1], bytes([n % 256]) * 300_000)
"""


@pytest.mark.parametrize("delay", [0.003, 0.02])
def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path, delay):
    path = tmp_path / "file.bin"
    write_atomic(path, b"\0" * 300_000)
    with subprocess.Popen([sys.executable, "-c", LOOP, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(delay)
        writer.kill()
    content = path.read_bytes()
    assert len(content) == 300_000
    assert len(set(content)) == 1


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
