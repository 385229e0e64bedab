"""Processes of one run, as ``torchrun`` starts them, but forked from one that has imported everything already."""

from __future__ import annotations

import os
import signal
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

LONGEST = 240.0
"""Seconds after which a launch counts as hung."""


def launch(call: Callable[[], Any], folder: Path, number: int = 1, kill: tuple[int, signal.Signals] | None = None,
           when: Callable[[], bool] = lambda: True) -> list[int]:  # fmt: skip
    """Call a function in forked processes, and return their statuses: negative for a signal.

    As ``torchrun`` does, the others are ended as soon as one has failed. What a process writes goes into the files
    ``out-N`` and ``err-N``.

    Args:
        call: Returns the exit status, or None for 0.
        folder: Of the files.
        number: Processes; what one alone is told has no number.
        kill: Which process (-1: all) gets which signal.
        when: Asked again and again whether it gets the signal now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    world = {} if number == 1 else {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    if world:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = [_forked(call, folder, world, rank) for rank in range(number)]
    statuses: dict[int, int] = {}
    began, ended = time.monotonic(), 0.0
    while len(statuses) < number:
        for rank, child in enumerate(children):
            if rank not in statuses:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    statuses[rank] = os.waitstatus_to_exitcode(status)
        if kill is not None and when():
            for rank in range(number) if kill[0] == -1 else (kill[0],):
                if rank not in statuses:
                    os.kill(children[rank], kill[1])
            kill = None
        now = time.monotonic()
        failed = any(statuses.values())
        if failed and not ended:
            ended = now
            _signal(children, statuses, signal.SIGTERM)
        if (ended and now - ended > 30) or now - began > LONGEST:
            _signal(children, statuses, signal.SIGKILL)
        time.sleep(0.002)
    return [statuses[rank] for rank in range(number)]


def _signal(children: list[int], statuses: dict[int, int], number: signal.Signals) -> None:
    for rank, child in enumerate(children):
        if rank not in statuses:
            os.kill(child, number)


def _forked(call: Callable[[], Any], folder: Path, world: dict[str, str], rank: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        for name, descriptor in (("out", 1), ("err", 2)):
            os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        import sys

        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        # What this process has found out of its own being alone.
        AcceleratorState._reset_state(reset_partial_state=True)
        warnings.simplefilter("ignore")
        if world:
            os.environ.update(world, RANK=str(rank), LOCAL_RANK=str(rank))
        status = call() or 0
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        raise
    finally:
        os._exit(status)
    raise AssertionError("unreachable")
