"""Mutation testing: small wrong changes to the source, and which test notices each.

    python -m bench.mutants                                  # 50 mutants of secateur/tracing and secateur/pruning
    python -m bench.mutants secateur/criteria --command "python -m pytest -x -q tests/criteria" --count 20

Mutants are drawn at random from all that the modules offer, the same for the same seed and source: an operator of a
comparison or of arithmetic swapped, an integer one higher or lower, a condition negated, ``and`` for ``or``, a call's
first argument returned in place of the call's result, a statement dropped. Each is made in a copy of the checkout,
never in the checkout itself, where the tests then run. Rows go to ``runs/mutants.jsonl``; mutants that have one are not
run again. A survivor is a change that no test notices: one to write a test for, or one that changes nothing.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from queue import SimpleQueue

from bench.rows import Row, Store

ROOT = Path(__file__).resolve().parent.parent
STORE = Store("mutants.jsonl", ("place", "after"), folder=ROOT / "runs")
PYTEST = f'{shlex.quote(sys.executable)} -m pytest -x -q --tb=no -p no:cacheprovider -m "not slow"'
PAIRS = [
    (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.In, ast.NotIn), (ast.Is, ast.IsNot),
    (ast.Add, ast.Sub), (ast.Mult, ast.FloorDiv), (ast.BitAnd, ast.BitOr), (ast.And, ast.Or),
]  # fmt: skip
UNUSED = ("annotation", "returns")
SWAPPED = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])} | {ast.Div: ast.Mult, ast.Mod: ast.FloorDiv}


@dataclass(frozen=True)
class Mutant:
    """One change: bytes ``start`` to ``end`` of a file become ``after``."""

    file: str
    place: str
    """File, line and column; with ``after``, what names the mutant's row."""
    start: int
    end: int
    before: str
    after: str


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs: annotations don't, and the parts of an f-string have no reliable place in the source."""
    yield node
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr) and field not in UNUSED:
                yield from _nodes(child)


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yield what can be put in a node's place: the part of the node that goes, and the text that comes."""
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            changed = copy(node)
            changed.ops = [*node.ops[:place], SWAPPED[type(operator)](), *node.ops[place + 1 :]]
            yield node, f"({ast.unparse(changed)})"
    elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPPED:
        changed = copy(node)
        changed.op = SWAPPED[type(node.op)]()
        yield node, f"({ast.unparse(changed)})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield from ((node, f"({node.value + step})") for step in (1, -1))
    elif isinstance(node, (ast.If, ast.While, ast.IfExp)) and ast.unparse(node.test) != "TYPE_CHECKING":
        yield node.test, f"(not ({ast.unparse(node.test)}))"
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Call) and node.value.args:
        yield node.value, f"({ast.unparse(node.value.args[0]).removeprefix('*')})"
    elif isinstance(node, (ast.AugAssign, ast.Raise, ast.Continue)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield node, "pass"


def mutants(file: str, source: str) -> list[Mutant]:
    """Return every mutant of a file."""
    content = source.encode()
    starts = [0, *accumulate(len(line) for line in content.splitlines(keepends=True))]
    found = []
    for node in _nodes(ast.parse(source)):
        for part, after in _changes(node):
            start, end = (starts[part.lineno - 1] + part.col_offset, starts[part.end_lineno - 1] + part.end_col_offset)
            place, before = f"{file}:{part.lineno}:{part.col_offset + 1}", " ".join(content[start:end].decode().split())
            found.append(Mutant(file, place, start, end, before, after))
    return found


def mutated(content: bytes, mutant: Mutant) -> bytes:
    """Return a file's content with the change."""
    return content[: mutant.start] + mutant.after.encode() + content[mutant.end :]


def copied(folder: Path) -> Path:
    """Copy the checkout's files, those not committed yet too."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def killed_by(folder: Path, command: str, limit: float | None) -> str | None:
    """Run the tests in a copy: the test that failed, what else ended them, or None where all pass."""
    # No bytecode: a change within the second of the last one, and of its length, would not be seen.
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        shlex.split(command), cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "the time limit"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return None if process.returncode == 0 else failed[1] if failed else f"exit code {process.returncode}"


def judge(folder: Path, mutant: Mutant, command: str, limit: float | None) -> Row:
    """Make a change in a copy, run the tests, and take the change back."""
    path = folder / mutant.file
    content = path.read_bytes()
    path.write_bytes(mutated(content, mutant))
    try:
        killed = killed_by(folder, command, limit)
        return {"place": mutant.place, "before": mutant.before, "after": mutant.after, "killed_by": killed}
    finally:
        path.write_bytes(content)


def measure(missing: list[Mutant], command: str, limit: float | None, jobs: int) -> None:
    """Run the tests on the source itself, which have to pass, and then on each mutant."""
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(jobs) as pool:
        folders: SimpleQueue[Path] = SimpleQueue()
        for job in range(jobs):
            folders.put(last := copied(Path(work) / str(job)))
        started = time.monotonic()
        if failed := killed_by(last, command, None):
            sys.exit(f"{failed}: fails without any mutant; mend it first, or name other tests with --command.")
        limit = limit or 3 * (time.monotonic() - started)

        def run(mutant: Mutant) -> None:
            row = judge(folder := folders.get(), mutant, command, limit)
            folders.put(folder)
            STORE.keep(row)
            print(f"{row['place']}: {row['before']} → {row['after']}: {row['killed_by'] or 'SURVIVED'}", flush=True)

        list(pool.map(run, missing))


def main() -> None:
    """Run the mutants that have no row yet, and say how many were noticed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("modules", nargs="*", default=["secateur/tracing", "secateur/pruning"], help="files or folders")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    fast = f"{PYTEST} tests/tracing tests/pruning tests/network tests/graph"
    parser.add_argument("--command", default=fast, help="what runs the tests, in a copy of the checkout")
    parser.add_argument("--limit", type=float, help="seconds a mutant; default: three times those of the source itself")
    options = parser.parse_args()
    files = sorted(f for m in options.modules for f in ([ROOT / m] if m.endswith(".py") else (ROOT / m).rglob("*.py")))
    every = [m for f in files for m in mutants(f.relative_to(ROOT).as_posix(), f.read_text(encoding="utf-8"))]
    drawn = random.Random(options.seed).sample(every, min(options.count, len(every)))
    known = {STORE.name(row) for row in STORE.read()}
    missing = [mutant for mutant in drawn if STORE.name(vars(mutant)) not in known]
    print(f"{len(drawn)} of {len(every)} mutants drawn, {len(missing)} to run", flush=True)
    if missing:
        measure(missing, options.command, options.limit, options.jobs)
    rows = {STORE.name(row): row for row in STORE.read()}
    survived = [row for mutant in drawn if (row := rows[STORE.name(vars(mutant))])["killed_by"] is None]
    print(f"{len(drawn) - len(survived)} of {len(drawn)} killed; survivors:")
    print(*(f"  {row['place']}: {row['before']} → {row['after']}" for row in survived), sep="\n")


if __name__ == "__main__":
    main()
