"""Several processes that train one network: what they have to agree on, and what one of them finds for all."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from secateur.errors import RunError, SecateurError, UsageError
from secateur.training.launched import counted

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
_LOG = logging.getLogger(__name__)


def require_launched() -> None:
    """Refuse to run alone where ``accelerate launch`` was asked for several processes and has started one.

    On CPUs it starts one, whatever ``--num_processes`` says, unless it is given MPI's list of machines.

    Raises:
        UsageError: If that is so.
    """
    if not counted() and "MASTER_PORT" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
        raise UsageError(
            "accelerate launch: was asked for several processes and has started one, as it does on CPUs; start them by "
            "torchrun --standalone --nproc-per-node N -m secateur …, or leave out --num_processes."
        )


def say_if_other(where: str, before: int, here: int) -> None:
    """Say that a training goes on in another number of processes than it began in, where it does."""
    if before != here:
        _LOG.warning(
            "%s: goes on in %d processes, %d before: a step of training takes a batch from each, so that the result is "
            "another than that of an uninterrupted run.",
            where,
            here,
            before,
        )


@contextmanager
def together() -> Iterator[None]:
    """Say in one line that another process has ended, where this one waits for it.

    Raises:
        RunError: If that is so.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _ENDED):
            raise
        raise RunError("another process of this run has ended; its own line says why.") from error


_ENDED = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Broken pipe")
"""What communication says where a process that it needs is gone."""


def told(runtime: Accelerator, find: Callable[[], T]) -> T:
    """Return what the main process finds, or raise what it raises, in every process; the others wait."""
    return _of_main(runtime, find if runtime.is_main_process else None, SecateurError)


def agreed(runtime: Accelerator, find: Callable[[], T], carried: type[SecateurError] = SecateurError) -> T:
    """Return what the main process finds, where all have to look: processors differ in a number's last bits.

    Args:
        runtime: Accelerate runtime.
        find: Called in every process.
        carried: Errors that every process waits for. Others end the process that meets them at once, as they must
            where the processes wait for each other in ``find``.

    Raises:
        SecateurError: What the main process raises.
        RunError: If another process fails alone.
    """
    return _of_main(runtime, find, carried)


def _of_main(runtime: Accelerator, find: Callable[[], T] | None, carried: type[SecateurError]) -> T:
    if runtime.num_processes == 1 and find is not None:
        return find()
    found: T | None = None
    error: SecateurError | None = None
    if find is not None:
        try:
            found = find()
        except carried as raised:
            error = raised
    held = [(found, error) if runtime.is_main_process else None]
    with together():
        torch.distributed.broadcast_object_list(held, src=0)
    assert held[0] is not None
    of_main, wrong = held[0]
    if wrong is not None:
        raise wrong
    if error is not None:
        raise RunError(f"process {runtime.process_index}: {error}") from error
    return of_main  # type: ignore[return-value]


def share(runtime: Accelerator, batches: Iterable[T]) -> Iterator[T]:
    """Yield every n-th batch, this process's own: as many to each of n processes, so that the last few may be left."""
    group = []
    for batch in batches:
        group.append(batch)
        if len(group) == runtime.num_processes:
            yield group[runtime.process_index]
            group.clear()


def summed(runtime: Accelerator, value: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if runtime.num_processes == 1:
        return value
    value = value.detach().clone()
    with together():
        torch.distributed.all_reduce(value)
    return value


def equalise(runtime: Accelerator, model: nn.Module) -> None:
    """Give every process the main one's weights and buffers, in place.

    Running statistics differ between the processes after the last batch of an epoch, each of which has seen its own.
    """
    if runtime.num_processes == 1:
        return
    with together(), torch.no_grad():
        for held in (*model.parameters(), *model.buffers()):
            sent = held.detach().contiguous()
            torch.distributed.broadcast(sent, src=0)
            held.copy_(sent)
