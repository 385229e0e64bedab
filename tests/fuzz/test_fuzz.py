"""Whatever is in a file, its reader ends in what it declares, runs nothing, and takes no damage for the whole."""

import random
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.kinds import KINDS, Kind

RUNNING = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen", "pty.spawn"}
LONGEST = 5.0
"""Seconds of processor time that no file may take."""
_ran: list[tuple[str, Any]] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _ran is not None and event in RUNNING:
        _ran.append((event, arguments))


sys.addaudithook(_watch)


def search(kind: Kind, folder: Path, count: int) -> Counter[str]:
    """Read mutants of a kind, and return how many ended how; what must not happen begins with an exclamation mark."""
    global _ran
    found: Counter[str] = Counter()
    folder.mkdir()
    read = kind.prepare(folder)
    for seed in range(count):
        started, _ran = time.process_time(), []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(random.Random(f"{kind.name} {seed}"))
            end = "read"
        except kind.allowed as error:
            end = "refused" if "\n" not in str(error) else f"! {seed}: more than a line: {error}"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told below
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            end = f"! {seed}: {type(error).__name__} at {place}: {' '.join(str(error).split())[:200]}"
        if _ran:
            end = f"! {seed}: ran {_ran[0]}"
        if (seconds := time.process_time() - started) > LONGEST:
            end = f"! {seed}: took {seconds:.1f} s"
        found[end] += 1
    _ran = None
    return found


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_few_of_each(kind: Kind, tmp_path: Path) -> None:
    found = search(kind, tmp_path / "files", 8)
    assert not [end for end in found if end.startswith("!")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_all_of_each(kind: Kind, tmp_path: Path) -> None:
    found = search(kind, tmp_path / "files", kind.count)
    assert not [end for end in found if end.startswith("!")]
    assert found["refused"] > kind.count / 10, "the mutants are no mutants"
