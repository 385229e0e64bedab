"""Pickles, wherever weights are accepted: none runs anything, and each ends in a declared error, or fits."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secateur import checkpoint
from secateur.data import load
from secateur.engine.state import State
from secateur.errors import CheckpointError, DataError, UsageError
from secateur.runfile import weight_files
from tests.fuzz import test_fuzz


class Calls:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def zipped(value: Any) -> bytes:
    held = io.BytesIO()
    torch.save(value, held)
    return held.getvalue()


def legacy(value: Any) -> bytes:
    held = io.BytesIO()
    torch.save(value, held, _use_new_zipfile_serialization=False)
    return held.getvalue()


def raw(code: bytes) -> bytes:
    """Return a zip as torch.save writes, whose pickle is the given code."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("archive/data.pkl", code)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return held.getvalue()


WEIGHTS = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}


def itself() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["state_dict"] = value
    return value


PICKLES: dict[str, Callable[[], bytes]] = {
    "os.system": lambda: zipped(Calls(os.system, "true")),
    "os.system, legacy": lambda: legacy(Calls(os.system, "true")),
    "os.system, plain": lambda: pickle.dumps(Calls(os.system, "true")),
    "os.system beside weights": lambda: zipped({"state_dict": WEIGHTS, "note": Calls(os.system, "true")}),
    "os.system as a key": lambda: zipped({"a": WEIGHTS["bias"], Calls(os.system, "true"): 1}),
    "Popen": lambda: zipped({"state_dict": Calls(subprocess.Popen, ["true"])}),
    "eval": lambda: zipped(Calls(eval, "__import__('os').system('true')")),
    "getattr": lambda: raw(b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR."),
    "by name of protocol 0": lambda: raw(b"cos\nsystem\n(S'true'\ntR."),
    "stack of nothing": lambda: raw(b"R."),
    "no end": lambda: raw(b"}"),
    "memo of nothing": lambda: raw(b"h\x05."),
    "a module": lambda: zipped(nn.Linear(3, 2)),
    "itself": lambda: zipped(itself()),
    "a list": lambda: zipped([1, 2, 3]),
    "sparse": lambda: zipped({"weight": torch.ones(2, 3).to_sparse(), "bias": torch.zeros(2)}),
    "meta": lambda: zipped({"weight": torch.ones(2, 3, device="meta"), "bias": torch.zeros(2)}),
    "one value repeated": lambda: zipped({"weight": torch.ones(1).expand(2, 3), "bias": torch.zeros(2)}),
    "complex": lambda: zipped({"weight": torch.ones(2, 3, dtype=torch.complex64), "bias": torch.zeros(2)}),
    "names that are none": lambda: zipped(OrderedDict([(1, torch.ones(2)), ("bias", torch.zeros(2))])),
}

READERS: dict[str, Callable[[Path], Any]] = {
    "load_weights": checkpoint.load_weights,
    "into a model": lambda path: weight_files.load_weights(nn.Linear(3, 2), path),
    "by a run": lambda path: weight_files.filled(nn.Linear(3, 2), "linear", {}, str(path)),
    "load": lambda path: checkpoint.load(nn.Linear(3, 2), path),
    "read_header": checkpoint.read_header,
    "a run's state": State.load,
}
FIT = {"one value repeated": ("load_weights", "into a model", "by a run"), "complex": ("load_weights",)}
"""What is odd, and weights all the same -> who takes it."""


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_runs_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(PICKLES[name]())
    ran: list[Any] = []
    monkeypatch.setattr(test_fuzz, "_ran", ran)
    for reader, read in READERS.items():
        if reader in FIT.get(name, ()):
            read(path)
            continue
        with pytest.raises((CheckpointError, UsageError)) as error:
            read(path)
        assert "\n" not in str(error.value)
    # torchvision reads this file in place of the four of MNIST, where it is there.
    raw_folder, processed = tmp_path / "MNIST" / "raw", tmp_path / "MNIST" / "processed"
    for folder in (raw_folder, processed):
        folder.mkdir(parents=True)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw_folder / f"{part}-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\0")
    for part in ("training.pt", "test.pt"):
        (processed / part).write_bytes(path.read_bytes())
    with pytest.raises(DataError):
        load("mnist", root=tmp_path)
    assert not ran


def test_the_watch_sees_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(test_fuzz, "_ran", ran)
    pickle.loads(pickle.dumps(Calls(os.system, "true")))
    assert [event for event, _ in ran] == ["os.system"]
    assert len(PICKLES) == 20
