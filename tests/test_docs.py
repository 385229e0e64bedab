"""The site is held to the program: its reference is complete, its tutorials run, its links lead somewhere."""

import dataclasses
import doctest
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import secateur as sc
from docs._pages import reference, tutorials
from secateur.cli.commands import app
from secateur.data import DATASETS
from secateur.models import MODELS
from secateur.runfile import config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
HOW_TO = sorted(path.stem for path in (DOCS / "how-to").glob("*.md") if path.stem != "index")
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
NUMBER = re.compile(r"[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


@pytest.mark.parametrize("name", reference.PAGES)
def test_the_reference_says_what_the_program_does(name: str) -> None:
    written = (DOCS / "reference" / name).read_text(encoding="utf-8")
    assert written == reference.PAGES[name](), f"write docs/reference/{name} anew: python -m docs._pages.reference"


def test_every_command_and_option_is_in_the_reference() -> None:
    text = (DOCS / "reference/commands.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^## secateur (\S+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(parts) == list(COMMANDS)
    for name, command in COMMANDS.items():
        for parameter in command.params:
            for word in [*parameter.opts, *parameter.secondary_opts] if parameter.opts[0][0] == "-" else []:
                assert re.search(rf"^\| `[^`]*{word}\b", parts[name], re.MULTILINE), f"{name} {word}"


def test_every_key_and_option_of_a_file_is_in_the_reference() -> None:
    text = (DOCS / "reference/run-file.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^##+ ([^\n]+)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL))
    keys = {
        "Keys of a run": config.RunConfig.model_fields,
        "A file for prune": config.PruneConfig.model_fields,
        "target": config.TargetConfig.model_fields,
        "settings": {field.name for field in dataclasses.fields(sc.Settings)},
        "baseline": {field.name for field in dataclasses.fields(config.Baseline)},
        "search": config.SearchConfig.model_fields,
        "A range": config.Range.model_fields,
        **{f"data: {name}": {*inspect.signature(of).parameters} - {"root"} for name, of in DATASETS.items()},
        **{head: inspect.signature(MODELS[head.split()[-1]]).parameters for head in sections if head[:6] == "model:"},
    }
    assert {name for head in sections if head[:6] == "model:" for name in head[7:].split(", ")} == set(MODELS)
    for section, known in keys.items():
        rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", sections[section], re.MULTILINE)
        assert {name for name, _ in rows} == set(known), section
        assert all(meaning.split("|")[-1].strip() for _, meaning in rows), f"{section}: a key without a meaning"


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "reference/api.md").read_text(encoding="utf-8")
    named = re.findall(r"^\.\. auto(\w+):: secateur\.(\w+)$", text, re.MULTILINE)
    assert sorted(name for _, name in named) == sorted(sc.__all__)
    for kind, name in named:
        value = getattr(sc, name)
        wanted = "function" if not inspect.isclass(value) else "exception" if issubclass(value, Exception) else "class"
        assert kind == wanted, name


def test_every_module_of_the_reference_is_one_and_every_list_of_names_is_there() -> None:
    text = (DOCS / "reference/modules.md").read_text(encoding="utf-8")
    named = re.findall(r"^\.\. automodule:: (\S+)$", text, re.MULTILINE)
    for name in named:
        path = ROOT.joinpath(*name.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), name
    listing = [p for p in (ROOT / "secateur").rglob("__init__.py") if "__all__" in p.read_text(encoding="utf-8")]
    lists = {".".join(path.parent.relative_to(ROOT).parts) for path in listing}
    # The papers stand there one by one, and rules are for those who change the package.
    assert lists - {"secateur", "secateur.criteria.papers", "secateur.tracing.rules"} <= set(named)
    papers = {f"secateur.criteria.papers.{p.stem}" for p in (ROOT / "secateur/criteria/papers").glob("[!_]*.py")}
    assert papers <= set(named)


def shown_commands() -> list[str]:
    found: set[str] = set()
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        found.update(re.findall(r"^\$ (secateur .+)$", text, re.MULTILINE))
        found.update(" ".join(line.split()) for line in re.findall(r"`(secateur [a-z][^`]*)`", text))
    return sorted(line for line in found if "…" not in line and not line.endswith("--version"))


@pytest.mark.parametrize("line", shown_commands())
def test_every_command_shown_is_one(line: str) -> None:
    _, name, *words = shlex.split(line)
    if words == ["--help"] or name == "--help":
        return
    with COMMANDS[name].make_context(name, words, resilient_parsing=True) as parsed:
        assert not parsed.args, f"{parsed.args} is left over"
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert given <= {option for p in COMMANDS[name].params for option in [*p.opts, *p.secondary_opts]}


@pytest.mark.parametrize("name", tutorials.NAMES)
def test_the_notebook_is_the_tutorial(name: str) -> None:
    written = (DOCS / f"notebooks/{name}.ipynb").read_text(encoding="utf-8")
    assert written == tutorials.notebook(name), "write the notebooks anew: python -m docs._pages.tutorials"


def masked(text: str) -> str:
    """Return the words of an output: numbers differ from machine to machine, and frames are as wide as they need.

    Whether times lie within noise is such a number, too.
    """
    text = re.sub(r", within noise| \(within noise\)", "", text).replace("within noise", "1%")
    return " ".join(NUMBER.sub("#", re.sub("[━┃│╇]+", " ", text)).split())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run(path: str) -> dict[str, Any]:
    """Run a page and hold its output to what it shows, word by word."""
    names: dict[str, Any] = {}
    for printed in tutorials.run(path, names):
        shown, found = masked(printed.shown), masked(printed.found)
        same = doctest.OutputChecker().check_output(shown, found, doctest.ELLIPSIS)
        assert same, f"{printed.block.text}\nshows\n{printed.shown}\nand prints\n{printed.found}"
    return names


@pytest.mark.slow
@pytest.mark.parametrize("name", tutorials.NAMES)
def test_the_tutorial_runs_and_prints_what_it_shows(name: str, folder: Path) -> None:
    names = run(f"tutorials/{name}")
    check, *_ = [names[n] for n in ("result", "check") if n in names] or [None]
    if name == "own-network":
        assert names["result"].check.exact
        assert names["accuracy"](names["small"]) > 0.9
    elif name == "training-loop":
        assert names["term"].minimum > 0.5
        assert names["evaluate"](names["model"], names["test"]) > 0.8
    else:
        before, after = check.report["baseline"], check.report["final"]
        assert check.report["verification"]["exact"]
        assert after["macs"] < before["macs"]
        assert after["test"] > before["test"] - 0.2


# Lightning and transformers warn of PyTorch's and of each other's deprecations.
FOREIGN = pytest.param("with-other-libraries", marks=pytest.mark.filterwarnings("ignore"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [FOREIGN if name in FOREIGN.values else name for name in HOW_TO])
def test_the_code_of_a_how_to_runs(name: str, folder: Path) -> None:
    run(f"how-to/{name}")


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "docs", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "reference/api.html").is_file()
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|link)\b[^>]*?(?:src|href)=\"(https?:[^\"]+)", page.read_text(encoding="utf-8")
        )
        assert not loaded, f"{page.name} loads {loaded[0]}"
