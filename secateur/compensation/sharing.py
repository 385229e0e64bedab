"""Independent pieces of work, shared by several processes.

The processes are forked, since a network need not be picklable: they hold all that the caller holds, and only numbers
of pieces and results go through pipes. Each computes on one thread, as the threads of the caller's are not forked.
"""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from secateur.errors import RunError, SecateurError, UsageError

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def require_possible(workers: int, device: torch.device) -> None:
    """Refuse more processes than can be had.

    Raises:
        UsageError: If there is none, or if several can't be forked.
    """
    if workers < 1:
        raise UsageError(f"workers is {workers}. Use 1 or more.")
    if workers > 1 and device.type != "cpu":
        raise UsageError(f"workers: {workers} processes can't share a network on {device.type}. Leave workers out.")
    if workers > 1 and "fork" not in multiprocessing.get_all_start_methods():
        raise UsageError("workers: this system can't fork processes. Leave workers out.")


def shared(work: Callable[[Piece], Result], pieces: Sequence[Piece], workers: int) -> Iterator[tuple[Piece, Result]]:
    """Yield each piece with its result: in order where one process works, else as they are done.

    Raises:
        RunError: If a process has ended before its work.
    """
    if min(workers, len(pieces)) < 2:
        yield from ((piece, work(piece)) for piece in pieces)
        return
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(range(len(pieces))))
    running: dict[Connection, int] = {}
    processes = []
    try:
        for _ in range(min(workers, len(pieces))):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, work, pieces), daemon=True)
            with warnings.catch_warnings():  # Python warns of forks beside threads, of which torch has some
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            there.close()
            processes.append(process)
            running[here] = waiting.pop()
            here.send(running[here])
        while running:
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                place = running.pop(ready)
                yield pieces[place], _received(ready)
                if waiting:
                    running[ready] = waiting.pop()
                    ready.send(running[ready])
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _received(connection: Connection) -> Any:
    try:
        result, error = connection.recv()
    except EOFError as ended:
        raise RunError("a process has ended before its work: killed, maybe for lack of memory. Use fewer.") from ended
    if error is not None:
        raise error
    return result


def _serve(connection: Connection, work: Callable[[Any], Any], pieces: Sequence[Any]) -> None:
    """Work off the pieces whose numbers come, until the caller ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller, interrupted too, ends it
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    failure: SecateurError | None
    while True:
        try:
            place = connection.recv()
        except EOFError:
            return
        result, failure = None, None
        try:
            result = work(pieces[place])
        except SecateurError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - of the user's own code, which may not be picklable: raised there
            failure = RunError(f"a process has failed: {type(error).__name__}: {error}")
        connection.send((result, failure))
