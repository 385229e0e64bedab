"""Files from elsewhere: what they name as code runs only where a person says so, and only if it can be meant."""

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from secateur.cli.commands import main
from secateur.errors import UsageError
from secateur.runfile import config, sources, trust, user_code
from tests.report import synthetic

CODE = """
from pathlib import Path
from torch import nn

Path(__file__).with_name("ran").touch()

def build():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.LazyLinear(10))
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder from elsewhere, whose file names code that would leave a trace."""
    monkeypatch.delenv(trust.TRUSTED, raising=False)
    monkeypatch.chdir(tmp_path)
    folder = synthetic.write_run(tmp_path / "theirs")
    (folder / "benchmark.json").unlink(missing_ok=True)
    (folder / "net.py").write_text(CODE)
    (folder / "run.yaml").write_text(f"model: {folder}/net.py:build\ndata: digits\n")
    (folder / "prune.yaml").write_text(f"model: {folder}/net.py:build\ninput: 1x1x8x8\nratios: {{'*': 0.5}}\n")
    return folder


COMMANDS = [
    ["resume", "theirs"],
    ["compress", "--config", "theirs/run.yaml"],
    ["prune", "--config", "theirs/prune.yaml"],
    ["report", "theirs", "--measure"],
    ["benchmark", "--run-dir", "theirs"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_what_a_file_names_is_not_run(theirs: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "names code, which was not run: model: " in said
    assert "net.py:build" in said
    assert "--trust" in said
    assert trust.TRUSTED in said
    assert not (theirs / "ran").exists()


def test_a_report_runs_nothing_that_a_run_names(theirs: Path) -> None:
    (theirs / "run.yaml").write_text(
        f"model: os:system\nmodel_options: {{command: touch {theirs}/ran}}\ndata: digits\n"
    )
    assert main(["report", "theirs"]) == 0
    assert (theirs / "report.html").is_file()
    assert not (theirs / "ran").exists()


@pytest.mark.parametrize("way", ["option", "folder", "yes", "no"])
def test_a_person_may_trust_a_file(theirs: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words, asked = ["prune", "--config", "theirs/prune.yaml"], []

    def confirm(question: str, **_: Any) -> bool:
        asked.append(question)
        return way == "yes"

    if way == "option":
        words.append("--trust")
    elif way == "folder":
        monkeypatch.setenv(trust.TRUSTED, os.pathsep.join(["", str(theirs.parent / "other"), str(theirs)]))
    else:
        monkeypatch.setattr("typer.confirm", confirm)
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(words) == (2 if way == "no" else 1)  # the lazy layer behind can't be pruned
    assert (theirs / "ran").exists() is (way != "no")
    assert len(asked) == (way in ("yes", "no"))
    assert all("prune.yaml names code that would run here: model: " in question for question in asked)


def test_what_the_command_line_names_is_the_persons_own_word(theirs: Path) -> None:
    run = config.load(theirs / "run.yaml")
    assert list(trust.code_named(run)) == ["model"]
    assert trust.code_named(run, {"model": "mine.py:build"}) == {}
    trust.require(theirs / "run.yaml", {}, given=False)
    assert main(["prune", "lenet5", "--config", "theirs/prune.yaml", "--input", "1x1x28x28"]) == 0
    assert not (theirs / "ran").exists()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model": "lenet5", "data": "mnist:data"}, {}),
        ({"model": "torchvision:resnet18", "data": "voc:data", "method": "cfp"}, {}),
        ({"model": "timm:resnet18", "data": "digits"}, {}),
        ({"model": "digits:build", "data": "torchvision:load"}, {"model": "digits:build", "data": "torchvision:load"}),
        (
            {"model": "secateur.checkpoint:write_atomic", "data": "digits"},
            {"model": "secateur.checkpoint:write_atomic"},
        ),
        ({"model": "lenet5", "data": "digits", "method": "own.py:mine"}, {"method": "own.py:mine"}),
        (
            {"model": "timm:resnet18", "model_options": {"checkpoint_path": "x.pth"}, "data": "digits"},
            {"model_options.checkpoint_path": "x.pth"},
        ),
    ],
)
def test_what_of_a_file_is_code(values: dict[str, Any], named: dict[str, str]) -> None:
    assert trust.code_named(config.build(values)) == named


MODULE = """
import functools, os, subprocess
from torch import nn
from os import system
from shutil import rmtree
from subprocess import Popen

def build(): return nn.Identity()
@functools.lru_cache
def cached(): return build()
part = functools.partial(build)
bad_part = functools.partial(rmtree, "x")
class Net(nn.Module):
    @classmethod
    def made(cls): return cls()
class Odd: pass
made = Net.made
odd = Odd()
call = print
"""


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("os:system", "os is of Python's standard library, which has no class derived from torch.nn.Module"),
        ("subprocess:run", "subprocess is of Python's standard library"),
        ("antigravity:build", "antigravity is of Python's standard library"),
        ("os.path:join", "os.path is of Python's standard library"),
        ("builtins:eval", "builtins is of Python's standard library"),
        ("{}:system", "is a builtin_function_or_method of posix, and no class derived from torch.nn.Module"),
        ("{}:rmtree", "of shutil, and no class derived"),
        ("{}:Popen", "is a class of subprocess, and no"),
        ("{}:bad_part", "is a partial of"),
        ("{}:Odd", "is a class of"),
        ("{}:call", "is a builtin_function_or_method of builtins"),
        ("{}:build", ""),
        ("{}:cached", ""),
        ("{}:part", ""),
        ("{}:Net", ""),
        ("{}:made", ""),
        ("torch.nn:Identity", ""),
    ],
)
def test_only_what_can_be_meant_is_called(spec: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "named.py").write_text(MODULE)
    spec = spec.format(tmp_path / "named.py")
    if not message:
        assert isinstance(sources.model(spec).model, nn.Module)
        return
    with pytest.raises(UsageError, match=message):
        sources.model(spec)
    assert "antigravity" not in sys.modules


def test_a_module_of_ones_own_may_be_called_as_one_of_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "this.py").write_text("from torch import nn\ndef build(): return nn.Identity()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "this", raising=False)
    assert isinstance(user_code.call("this:build", {}, "model"), nn.Identity)
    monkeypatch.delitem(sys.modules, "this")
