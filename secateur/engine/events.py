"""Events of a run, for progress bars and logs, and the steps of a command."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable


@dataclass(frozen=True)
class Event:
    """What a run is doing, for progress bars and logs."""

    kind: Literal["begin", "stage", "batch", "epoch", "cut", "episode", "milestone"]
    """``begin``: the run begins or goes on, with the unpruned network's figures as ``record``; ``stage``: a stage of
    training begins an epoch; ``batch``: a batch is done; ``epoch``: a line of ``epochs.jsonl`` is complete; ``cut``:
    channels are gone; ``episode``, ``milestone``: its record is complete."""
    stage: str
    """``optimise``, ``finetune`` or ``final``."""
    round: int
    phase: int
    epoch: int = 0
    epochs: int = 0
    batch: int = 0
    batches: int | None = None
    loss: float = math.nan
    record: Mapping[str, Any] | None = None
    next: str = ""
    """What comes next, in words."""


Progress = Callable[[Event], None]


@runtime_checkable
class Steps(Protocol):
    """Where a command shows which of its steps is running, and how far it is."""

    def __call__(self, step: str, done: int, total: int | None = None, note: str = "") -> None:
        """Show that ``done`` of ``total`` units of ``step`` are finished; None: their number is not known."""

    def step(self, name: str) -> AbstractContextManager[None]:
        """Show ``name`` as running until the block ends."""
