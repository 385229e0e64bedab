import ast
import shlex
import sys
from pathlib import Path

import pytest

from bench import mutants

SOURCE = '''
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import x
def größe(a: int | None, b: "list[int]" = ()) -> int | None:
    """1 + 1"""
    if a == 0 and not b:
        raise ValueError(f"{a + 1} is < 2")
    for i in range(3):
        continue
    b.append(True); a -= 1
    return max(a, *b)
'''
EXPECTED = {
    ("a == 0 and not b", "(a == 0 or not b)"), ("a == 0 and not b", "(not (a == 0 and (not b)))"),
    ("a == 0", "(a != 0)"), ("0", "(1)"), ("0", "(-1)"), ('raise ValueError(f"{a + 1} is < 2")', "pass"),
    ("3", "(4)"), ("3", "(2)"), ("continue", "pass"), ("b.append(True)", "pass"), ("True", "False"),
    ("a -= 1", "pass"), ("1", "(2)"), ("1", "(0)"), ("max(a, *b)", "(a)"),
}  # fmt: skip


def test_every_mutant_is_one_change_of_what_runs() -> None:
    found = mutants.mutants("m.py", SOURCE)
    assert {(m.before, m.after) for m in found} == EXPECTED
    assert len(found) == len(EXPECTED)
    tree = ast.dump(ast.parse(SOURCE))
    for mutant in found:
        assert ast.dump(ast.parse(mutants.mutated(SOURCE.encode(), mutant))) != tree
        line, column = map(int, mutant.place.split(":")[1:])
        assert SOURCE.encode().splitlines()[line - 1][column - 1 :].decode().startswith(mutant.before[:5])


@pytest.mark.parametrize(
    ("tested", "limit", "killer"),
    [
        ("assert two() == 2", 60, "exit code 1"),
        ("print('FAILED tests/test_m.py::test_two - it is 3'); assert two() == 2", 60, "tests/test_m.py::test_two"),
        ("assert two() > 1", 60, None),
        pytest.param("while two() != 2: pass", 2, "the time limit", marks=pytest.mark.slow),
    ],
)
def test_a_mutant_is_judged_in_a_copy_that_is_mended_after(
    tmp_path: Path, tested: str, limit: float, killer: str | None
) -> None:
    (tmp_path / "m.py").write_text("def two():\n    return 2\n")
    (tmp_path / "t.py").write_text(f"from m import two\n{tested}\n")
    mutant = next(m for m in mutants.mutants("m.py", (tmp_path / "m.py").read_text()) if m.after == "(3)")
    row = mutants.judge(tmp_path, mutant, shlex.join([sys.executable, "t.py"]), limit)
    assert row == {"place": "m.py:2:12", "before": "2", "after": "(3)", "killed_by": killer}
    assert (tmp_path / "m.py").read_text() == "def two():\n    return 2\n"
    assert mutants.killed_by(tmp_path, shlex.join([sys.executable, "t.py"]), 60) is None


@pytest.mark.skipif(not (mutants.ROOT / ".git").exists(), reason="not a git checkout")
def test_what_was_drawn_and_has_a_row_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = mutants.Store("mutants.jsonl", ("place", "after"), folder=tmp_path)
    monkeypatch.setattr(mutants, "STORE", store)
    passing = shlex.join([sys.executable, "-c", ""])
    arguments = ["mutants", "bench/observing.py", "--count", "3", "--jobs", "2", "--command", passing]
    monkeypatch.setattr("sys.argv", arguments)
    mutants.main()
    rows = store.read()
    assert len(rows) == 3
    assert {row["killed_by"] for row in rows} == {None}
    assert "0 of 3 killed" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*arguments[:-1], "no such command"])
    mutants.main()
    assert "0 to run" in capsys.readouterr().out
    assert store.read() == rows
