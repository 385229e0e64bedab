"""The README is held to the program: its commands parse, its code runs, its picture is what the demo prints."""

import functools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import secateur as sc
from secateur.cli import console
from secateur.cli.commands import app
from secateur.data import load
from secateur.runfile import config
from tests import detectors

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [README, (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "recipes/README.md").read_text()]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shown_commands() -> list[str]:
    """Every line that a reader can type, in fenced blocks of shell and in indented ones."""
    found = []
    for text in DOCUMENTS:
        for block in blocks("console", text):
            found += re.findall(r"^\$ (.+)$", block, re.MULTILINE)
        found += re.findall(r"^    (secateur .+)$", text, re.MULTILINE)
        found += re.findall(r"`((?:secateur|make) [a-z][^`]*)`", text)
    return found


COMMAND = typer.main.get_command(app)
SECATEUR = sorted({line for line in shown_commands() if line.startswith("secateur ")})
MAKE = sorted({line for line in shown_commands() if line.startswith("make ")})


@pytest.mark.parametrize("line", SECATEUR)
def test_every_command_shown_is_one(line: str) -> None:
    _, name, *words = shlex.split(line)
    if name == "COMMAND":
        assert words == ["--help"]
        return
    with COMMAND.make_context("secateur", [name, *words], resilient_parsing=True) as context:
        command = context.command.get_command(context, name)  # type: ignore[attr-defined]
        assert command is not None, f"there is no command {name}"
        with command.make_context(name, words, parent=context) as parsed:
            assert not parsed.args, f"{parsed.args} is left over"


@pytest.mark.parametrize("line", MAKE)
def test_every_make_target_shown_is_one(line: str) -> None:
    target = line.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_commands_are_shown_at_all() -> None:
    assert len(SECATEUR) > 8
    assert {"make demo", "make test", "make check", "make slow"} <= set(MAKE)


def test_the_table_of_commands_is_their_help() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", README, re.MULTILINE))
    commands: dict[str, Any] = COMMAND.commands  # type: ignore[attr-defined]
    assert table == {name: command.help.splitlines()[0] for name, command in commands.items()}


def test_every_option_and_key_named_exists() -> None:
    options = {o for c in COMMAND.commands.values() for p in c.params for o in p.opts}  # type: ignore[attr-defined]
    for text in DOCUMENTS:
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        for option in re.findall(r"`(--[a-z-]+)", prose):
            assert option in options | {"--help"}, option


def test_the_configuration_shown_is_valid(tmp_path: Path) -> None:
    (shown,) = blocks("yaml")
    (tmp_path / "run.yaml").write_text(shown)
    loaded = config.load(tmp_path / "run.yaml")
    assert loaded.settings.fraction == 0.125


@pytest.mark.slow
def test_the_code_shown_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("secateur.data.load", functools.partial(load, train_size=100))
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"README.md, block {number + 1}", "exec"), names)
    assert (tmp_path / "small.safetensors").is_file()
    assert (tmp_path / "runs/mine/model.safetensors").is_file()
    final, before = names["result"].report["final"], names["result"].report["baseline"]
    assert final["macs"] <= 0.7 * before["macs"]
    compressed = names["compress_detector"](detectors.ssd(), detectors.bundle())
    assert compressed.report["metric"] == "mAP"
    assert names["again"].layer1[0].conv1.out_channels == names["small"].layer1[0].conv1.out_channels < 64


def test_the_criterion_shown_works() -> None:
    from secateur import criteria

    (shown, *_) = blocks("python", DOCUMENTS[1])
    try:
        exec(compile(shown, "CONTRIBUTING.md", "exec"), {})
        assert criteria.get("linf").needs == {"filters"}
    finally:
        criteria.unregister("linf")


def test_links_lead_somewhere() -> None:
    for text, folder in zip(DOCUMENTS, (ROOT, ROOT, ROOT / "recipes"), strict=True):
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (folder / target).exists(), target


def test_the_picture_is_of_the_demo_and_of_nothing_foreign() -> None:
    picture = (ROOT / "docs/demo.svg").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"'<>)]+", picture)) == {"http://www.w3.org/2000/svg"}
    text = re.sub(r"<[^>]+>", " ", picture).replace("&#160;", " ")
    for words in ("accuracy, test set", "MACs", "parameters", "file size", "CPU latency", "verified exact"):
        assert words in text
    # The sentence under the picture, from its own numbers.
    removed = {row: float(n) for row, n in re.findall(r"(MACs|parameters|file size)[^−+]*?−([\d.]+)%", text)}
    caption = re.search(
        r"within a point while (\d+)% of its MACs, (\d+)% of its parameters and (\d+)% of its file", README
    )
    assert caption
    assert [int(n) for n in caption.groups()] == [round(removed[k]) for k in ("MACs", "parameters", "file size")]
    accuracy = re.search(r"accuracy, test set.*?([−+])([\d.]+) points", text)
    assert accuracy
    assert accuracy[1] == "+" or float(accuracy[2]) <= 1


def test_the_demos_picture_is_drawn_without_foreign_fonts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = {"test": 0.5, "validation": 0.5, "macs": 1000, "parameters": 10, "file_bytes": 10, "latency_ms": 1.0}
    values = {
        "parts": {"method": "auto: l2"}, "notes": [], "metric": "accuracy", "rounds": 1,
        "seconds": 1.0, "run_dir": "runs/demo", "reloaded": 0.5,
        "examples": {"train": 1, "validation": 1, "test": 1},
        "baseline": {**part, "widths": {"conv1": 8}}, "final": {**part, "widths": {"conv1": 2}},
        "verification": {"exact": True, "max_error": 0.0, "dtype": "float64", "refused": ()},
    }  # fmt: skip
    console.show_demo(values, tmp_path / "demo.svg")
    picture = (tmp_path / "demo.svg").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"'<>)]+", picture)) == {"http://www.w3.org/2000/svg"}
    assert "@font-face" not in picture
    assert "50.00% on the test set" in capsys.readouterr().out


def test_public_names_are_there_and_documented() -> None:
    for name in sc.__all__:
        value = getattr(sc, name)
        assert value.__doc__, name
    assert set(sc.__all__) <= set(dir(sc))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sc.nothing  # noqa: B018
    for name in re.findall(r"\bsc\.(\w+)", "".join(blocks("python"))):
        assert name in sc.__all__
