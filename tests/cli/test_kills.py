"""Runs of the command line stopped again and again, in one process and in two: what goes on ends as if never stopped.

``SECATEUR_KILLS=30 SECATEUR_TERMS=10 python -m pytest -s -m slow tests/cli/test_kills.py`` makes the full counts.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from secateur.cli.commands import main
from secateur.engine import compress
from tests.conftest import collect_no_garbage
from tests.engine.launching import launch
from tests.engine.nets import digits, trained
from tests.engine.test_resume import outcome

KILLS, TERMS = int(os.environ.get("SECATEUR_KILLS", "6")), int(os.environ.get("SECATEUR_TERMS", "2"))
WORDS = [
    *("compress", "lenet5", "--model-option", "widths=[4, 8]", "--model-option", "hidden=16"),
    *("--data", "digits", "--data-option", "size=16", "--data-option", "train_size=400", "--batch-size", "40"),
    *("--baseline", "epochs=8", "--baseline", "lr=0.02", "--macs", "0.5", "--set", "device=cpu"),
    *("--set", "final_epochs=6", "--set", "lr=0.005", "--resume", "--quiet", "--json", "--run-dir"),
]


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import whatever a run needs, once, before it is forked."""
    torch.set_num_threads(1)
    collect_no_garbage()
    train, validation, _ = digits(80)
    compress(trained(epochs=1), train=train, validation=validation, max_rounds=1, device="cpu")


def _killed(
    place: Path, number: int, draw: random.Random, sent: signal.Signals, early: bool, count: Counter[str]
) -> bool:
    """Run, or go on, until the signal; return whether it arrived in time."""
    run = place / "run"
    state, lines = run / "checkpoint" / "state.safetensors", run / "checkpoint" / "baseline.jsonl"
    epochs, wait = draw.randrange(8), draw.uniform(0, 0.05 if early else 1.5)
    ready: list[float] = []

    def when() -> bool:
        if not ready and (state.is_file() or (early and lines.is_file() and lines.read_bytes().count(b"\n") > epochs)):
            ready.append(time.monotonic())
        return bool(ready) and time.monotonic() - ready[0] > wait

    in_baseline: list[bool] = []

    def now() -> bool:
        if when():
            in_baseline.append(not state.is_file())
            return True
        return False

    one = draw.randrange(number) if sent == signal.SIGKILL else -1
    statuses = launch(lambda: main([*WORDS, str(run)]), place / "logs", number, (one, sent), now)
    logs = "".join((place / "logs" / f"err-{n}").read_text() for n in range(number))
    assert "Traceback" not in logs, logs
    if not any(statuses):
        return False
    expected = {-signal.SIGKILL} if sent == signal.SIGKILL else {143}
    # With one process gone, the other is told to end, or sees it first.
    assert set(statuses) & expected, (statuses, logs)
    assert set(statuses) <= expected | {1, 143, -signal.SIGTERM}, (statuses, logs)
    count[sent.name] += 1
    count["in the baseline"] += bool(in_baseline and in_baseline[0])
    return True


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_kills(tmp_path: Path, number: int) -> None:
    assert launch(lambda: main([*WORDS, str(tmp_path / "whole" / "run")]), tmp_path / "whole", number) == [0] * number
    whole = outcome(tmp_path / "whole" / "run")
    wanted = [signal.SIGKILL] * (KILLS // 2) + [signal.SIGTERM] * (TERMS // 2)
    draw, count, equal, ends = random.Random(number), Counter[str](), [], []
    draw.shuffle(wanted)
    each = 0
    while wanted:
        place = tmp_path / f"{each}"
        for stop in range(4):
            if wanted and not (place / "run" / "result.json").is_file() and _killed(
                place, number, draw, wanted[-1], stop < 2, count
            ):  # fmt: skip
                wanted.pop()
        each += 1
        assert launch(lambda place=place: main([*WORDS, str(place / "run")]), place / "logs", number) == [0] * number  # type: ignore[misc]
        assert not list(place.rglob("*.partial"))
        found = outcome(place / "run")
        equal.append(found == whole)
        ends.append(found["result"]["final"]["test"])
    points = 100 * max(abs(end - whole["result"]["final"]["test"]) for end in ends)
    print(f"{number} process(es): {dict(count)}, {sum(equal)} of {len(equal)} runs bit-equal, "  # noqa: T201
          f"test {whole['result']['final']['test']:.4f}, at most {points:.2f} points off")  # fmt: skip
    assert all(equal) or number > 1
    assert points <= 0.5
    assert count["in the baseline"] >= len(ends)
