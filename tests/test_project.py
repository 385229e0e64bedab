"""The project's own files agree: pins with ranges, the version with the package, nothing that belongs elsewhere."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import secateur

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
EXTRAS = PROJECT["project"]["optional-dependencies"]
REQUIRED = [*PROJECT["project"]["dependencies"], *(r for extra in EXTRAS.values() for r in extra)]


@pytest.mark.parametrize("text", [r for r in REQUIRED if not r.startswith("secateur")])
def test_every_requirement_has_a_pin_in_its_range(text: str) -> None:
    requirement = Requirement(text)
    pinned = PINS[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pinned), f"{pinned} is outside {requirement}"


def test_constraints_are_plain_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(PINS) == len([line for line in lines if line and not line.startswith("#")])


def test_extras_named_for_development_exist() -> None:
    (own,) = [Requirement(r) for r in EXTRAS["dev"] if r.startswith("secateur")]
    assert own.extras == set(EXTRAS) - {"dev"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, secateur; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not set(loaded.split()) & {"torch", "torchvision", "numpy", "sklearn", "pydantic", "rich", "typer"}


def test_versions_agree() -> None:
    assert "version" in PROJECT["project"]["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", secateur.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    dated = re.search(rf"^## \[{secateur.__version__}\] – (\S+)$", changelog, re.MULTILINE)
    assert dated
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["version"], str(cited["date-released"])) == (secateur.__version__, dated[1])


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.split("\0")[:-1] if listed.returncode == 0 else []
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_no_file_names_a_registry_or_a_machine() -> None:
    files = tracked()
    if not files:
        pytest.skip("not a git checkout")
    # Written in parts, so that this file does not hold them.
    foreign = re.compile("|".join(["pypi" + r"\.org", "python" + "hosted", "/wor" + "k/", "/roo" + "t/"]).encode())
    found = {str(p.relative_to(ROOT)): m[0] for p in files if (m := foreign.search(p.read_bytes()))}
    assert not found
