"""Work shared by processes: the results are those of one process; failures and killed processes are one clear error."""

from __future__ import annotations

import os
import signal

import pytest
import torch

import secateur as sc
from secateur.compensation.sharing import require_possible, shared
from tests.compensation.test_sensitivity import DATA, GRAPH, MODEL


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_every_piece_is_done_once(workers: int) -> None:
    here = os.getpid()
    found = list(shared(lambda piece: (piece * piece, os.getpid()), range(5), workers))
    assert sorted((piece, square) for piece, (square, _) in found) == [(n, n * n) for n in range(5)]
    processes = {process for _, (_, process) in found}
    assert processes == {here} if workers == 1 else here not in processes and len(processes) <= min(workers, 5)


def test_an_error_of_a_piece_is_the_callers() -> None:
    def work(piece: int) -> int:
        if piece == 1:
            raise sc.PlanError("one: this one can't be done.")
        return int("x")

    with pytest.raises(sc.PlanError, match=r"one: this one can't be done\."):
        list(shared(work, [1, 1], 2))
    with pytest.raises(sc.RunError, match="a process has failed: ValueError: invalid literal"):
        list(shared(work, [2, 2], 2))


def test_a_killed_process_is_told() -> None:
    with pytest.raises(sc.RunError, match="has ended before its work"):
        list(shared(lambda _: os.kill(os.getpid(), signal.SIGKILL), [1, 2], 2))


def test_a_table_by_two_processes_is_that_of_one() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = sc.sensitivity(MODEL, GRAPH, DATA, levels=3)
    finally:
        torch.set_num_threads(threads)
    seen: list[tuple[int, int]] = []
    two = sc.sensitivity(MODEL, GRAPH, DATA, levels=3, workers=2, progress=lambda *place: seen.append(place))
    assert two == one
    assert list(two.damage) == list(one.damage)
    assert seen == [(n, len(one.damage)) for n in range(len(one.damage) + 1)]


def test_what_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(sc.UsageError, match="workers is 0"):
        sc.sensitivity(MODEL, GRAPH, DATA, workers=0)
    with pytest.raises(sc.UsageError, match="2 processes can't share a network on cuda"):
        require_possible(2, torch.device("cuda"))
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(sc.UsageError, match="can't fork"):
        require_possible(2, torch.device("cpu"))
    require_possible(1, torch.device("cpu"))
